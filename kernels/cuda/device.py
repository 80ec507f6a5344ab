"""What the CUDA backend asks of a device: memory, and kernels launched in order. CuPy imports only here, when a device is opened."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_char, c_double, c_int, c_longlong, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...core.begun import Mark
from ...core.files import in_place_of
from ..model.config import ModelConfig

#: An array of a device: CuPy's, or NumPy's where a CPU plays the device.
Array = Any
FOLDER = Path(__file__).parent
SOURCES = ("products", "batch", "wide", "rows", "delta", "attention", "sampling", "rounds")
#: What devices of one compute capability have besides, and what it is compiled for: instructions that no later device has.
OF_HOPPER, HOPPER_CAPABILITY, HOPPER_ARCHITECTURE = ("hopper_products", "hopper_attention"), 90, "sm_90a"
#: Without contraction of a * b + c, an expression has the same bits in every kernel it stands in; fused ones are written so.
OPTIONS = ("--std=c++17", "--fmad=false")


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The macros that the sources are compiled with."""
    c = config
    return {
        "KEY_DIM": c.key_dim, "VALUE_DIM": c.value_dim, "KEY_HEADS": c.key_heads, "VALUE_HEADS": c.value_heads, "IS_TILED": int(c.is_tiled),
        "CONV_WIDTH": c.conv_width, "NUM_DELTA": max(c.num_delta, 1), "COLUMNS": columns_of(c), "CHUNK_COLUMNS": chunk_columns_of(c),
        "HEADS": c.heads, "KV_HEADS": c.kv_heads,
        "HEAD_DIM": c.head_dim, "ROTARY_DIM": c.rotary_dim, "MROPE_H": c.mrope_sections[1], "MROPE_W": c.mrope_sections[2],
    }  # fmt: skip


def text_of(source: str) -> str:
    """A source with the headers of this folder in the place of their #include: what a compiler keeps goes by all of it."""
    text = (FOLDER / source).read_text()
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda found: text_of(found[1]), text, flags=re.MULTILINE)


def definitions(text: str, sizes: dict[str, int]) -> list[str]:
    """Options that define the sizes a source speaks of; what is compiled for one model serves others with the same ones."""
    return [f"-D{name}={value}" for name, value in sizes.items() if re.search(rf"\b{name}\b", text)]


def columns_of(config: ModelConfig) -> int:
    """Columns of a head's state that one block of delta.cu has."""
    return next(n for n in (32, 16, 8) if config.value_dim % n == 0)


def chunk_columns_of(config: ModelConfig) -> int:
    """The same for a chunk: half as many where blocks would be too few for a large device."""
    c, columns = config, columns_of(config)
    is_small = c.value_heads * c.value_dim < 100 * columns and columns > 8 and c.key_dim % 64 == 0
    return columns // 2 if is_small else columns


def problem_with(config: ModelConfig) -> str | None:
    """Why the kernels cannot compute a model, if they cannot."""
    c = config
    if c.key_dim % 16 or c.key_dim > 160 or c.value_dim % 8 or c.head_dim % 32 or c.hidden % 16:
        return f"key heads of {c.key_dim}, value heads of {c.value_dim}, heads of {c.head_dim}, hidden rows of {c.hidden}"
    return None


class Address(int):
    """Where an array is on its device."""

    def __add__(self, num_bytes: int) -> Address:
        return Address(int(self) + num_bytes)


NOWHERE = Address(0)


@dataclass(frozen=True, slots=True)
class Step:
    """A launch: arguments are ctypes values, in order."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Any, ...]


class Device(Protocol):
    #: bytes of shared memory that a block may have
    max_shared: int
    #: ten times its compute capability
    capability: int

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array: ...

    def to_device(self, values: npt.NDArray[Any]) -> Array: ...

    def to_host(self, values: Array) -> npt.NDArray[Any]:
        """A copy, once all that was launched before has been computed."""
        ...

    def put(self, to: Array, values: npt.NDArray[Any] | Array) -> None:
        """All of an array, or of a view of one; before what is launched next."""
        ...

    def concatenate(self, arrays: Sequence[Array]) -> Array: ...

    def interleave(self, one: Array, other: Array) -> Array:
        """Rows of one and the other in turn."""
        ...

    def address(self, values: Array) -> Address: ...

    def wait(self) -> None:
        """Until all that was launched has been computed."""
        ...

    def mark(self) -> Mark:
        """Of all that was launched before this call."""
        ...

    def shared(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the host that recorded launches copy from and to."""
        ...

    def fetch(self, values: Array) -> Callable[[], npt.NDArray[Any]]:
        """Begins a copy to the host of what was computed so far, beside what is launched next; what is returned waits for it."""
        ...

    def random(self, num_bytes: int, scale: float | None = None) -> Array:
        """Bytes; or, with a scale, as many as bfloat16 values from -scale to scale take."""
        ...

    def compile(self, sizes: dict[str, int]) -> Kernels: ...


class Kernels(Protocol):
    #: How often `record` was called.
    num_recorded: int

    def run(self, steps: Sequence[Step]) -> None:
        """Launches steps, each of which sees what those before it wrote."""
        ...

    def record(
        self, steps: Sequence[Step], inputs: Sequence[Copy] = (), outputs: Sequence[Copy] = (), *, overlap: bool = True
    ) -> Callable[[], None]:
        """Something that launches them all at once: first the inputs are copied to the device, at the end the outputs from it. With
        `overlap` a step's blocks may take their places before the step before has ended."""
        ...


#: An array of the device, and the bytes of `Device.shared` that it is copied from or to.
Copy = tuple[Array, npt.NDArray[np.uint8]]


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("padding", c_char * 4), ("value", c_int), ("rest", c_char * 60))


class _Launch(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", c_uint),
    )  # fmt: skip


#: Compute capability from which a launch can begin before the one before it has ended.
OVERLAP_CAPABILITY = 90
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SUCCESS, NO_MEMORY, NOT_READY = 0, 2, 600  # cudaError_t


class CudaMark:
    def __init__(self, event: Any, query: Callable[[int], int]) -> None:
        self._event, self._query = event, query

    def is_done(self) -> bool:
        status = self._query(self._event.ptr)
        if status not in (SUCCESS, NOT_READY):
            self._event.synchronize()  # which raises the error that there is
        return status != NOT_READY

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """An NVIDIA device through CuPy. OSError where there is no CuPy, no compiler for it, or no device. All work is on one stream."""

    def __init__(self, number: int = 0) -> None:
        try:
            self.cupy: Any = importlib.import_module("cupy")
            self._device = self.cupy.cuda.Device(number)
            self._device.use()
            self.nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
            self.nvrtc.getVersion()  # which looks for it
            self.stream, self.copies = (self.cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        except Exception as error:  # CuPy has an error of its own for each way in which there is no device
            raise OSError(f"no CUDA device: {error}") from error
        self.capability = int(self._device.compute_capability)
        self._in_flight = list[tuple[Any, ...]]()  # copies to the host, and what they read and write
        self.max_shared = int(self.cupy.cuda.runtime.getDeviceProperties(number)["sharedMemPerBlockOptin"])
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._lock = threading.RLock()

    @contextmanager
    def using(self) -> Generator[Any]:
        """CuPy, on this device and its stream, for one thread at a time."""
        with self._lock, self._device, self.stream:
            yield self.cupy

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        with self.using() as cupy:
            return cupy.zeros(tuple(shape), dtype)

    def to_device(self, values: npt.NDArray[Any]) -> Array:
        with self.using() as cupy:
            return cupy.asarray(values)

    def to_host(self, values: Array) -> npt.NDArray[Any]:
        with self.using() as cupy:
            copied = self._copy(cupy.ascontiguousarray(values), self.stream)
        return copied()  # others may launch while this waits; what they launch comes after the copy

    def put(self, to: Array, values: npt.NDArray[Any] | Array) -> None:
        with self.using() as cupy:
            to[...] = cupy.asarray(values)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        with self.using() as cupy:
            return cupy.concatenate(list(arrays))

    def interleave(self, one: Array, other: Array) -> Array:
        with self.using() as cupy:
            return cupy.stack([one, other], axis=1).reshape(2 * one.shape[0], *one.shape[1:])

    def address(self, values: Array) -> Address:
        return Address(values.data.ptr)

    def wait(self) -> None:
        with self.using():
            self.stream.synchronize()

    def mark(self) -> Mark:
        with self.using():
            return CudaMark(self.stream.record(), self.cupy.cuda.runtime.eventQuery)

    def shared(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        with self.using() as cupy, self.full():
            return np.frombuffer(cupy.cuda.alloc_pinned_memory(num_bytes), np.uint8, num_bytes)

    @contextmanager
    def full(self) -> Generator[None]:
        """MemoryError for what CUDA says where there is no memory left; CuPy's own allocations raise it anyway."""
        try:
            yield
        except self.cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status == NO_MEMORY:
                raise MemoryError(str(error)) from error
            raise

    def fetch(self, values: Array) -> Callable[[], npt.NDArray[Any]]:
        with self.using() as cupy:
            values = cupy.ascontiguousarray(values)
            self.copies.wait_event(self.stream.record())
            return self._copy(values, self.copies)

    def _copy(self, values: Array, stream: Any) -> Callable[[], npt.NDArray[Any]]:
        pinned = self.cupy.cuda.alloc_pinned_memory(max(1, values.nbytes))
        values.data.copy_to_host_async(pinned.ptr, values.nbytes, stream)
        done = stream.record()
        # Whether anybody waits for them or not, nothing else may have this memory before they have ended.
        self._in_flight = [each for each in self._in_flight if not each[0].done] + [(done, values, pinned)]

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            return np.frombuffer(pinned, values.dtype, values.size).reshape(values.shape).copy()

        return wait

    def random(self, num_bytes: int, scale: float | None = None) -> Array:
        with self.using() as cupy:
            if scale is None:
                return cupy.random.randint(0, 256, num_bytes, np.uint8)
            out = cupy.empty(num_bytes // 2, np.uint16)
            for start in range(0, len(out), 2**26):  # the floats would take twice as much
                part = out[start : start + 2**26]
                part[...] = (cupy.random.uniform(-scale, scale, len(part), np.float32).view(np.uint32) >> 16).astype(np.uint16)
            return out.view(np.uint8)

    def free(self) -> None:
        """Gives back what nobody holds any more."""
        with self.using() as cupy:
            cupy.get_default_memory_pool().free_all_blocks()

    def seconds(self, run: Callable[[], None], times: int) -> list[float]:
        """What each of so many runs takes on the device, after one that is not counted."""
        with self.using() as cupy:
            events = [cupy.cuda.Event() for _ in range(times + 1)]
            run()
            events[0].record(self.stream)
            for event in events[1:]:
                run()
                event.record(self.stream)
            self.stream.synchronize()
            return [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in pairwise(events)]

    def compile(self, sizes: dict[str, int]) -> CudaKernels:
        with self.using():
            return CudaKernels(self, sizes)

    def copy_async(self, array: Array, bytes_: npt.NDArray[np.uint8], *, to_host: bool) -> None:
        """Between an array and bytes of `shared`."""
        there, here, size = c_ulonglong(array.data.ptr), c_void_p(bytes_.ctypes.data), c_size_t(bytes_.nbytes)
        driver, stream = self._driver, c_void_p(self.stream.ptr)
        code = driver.cuMemcpyDtoHAsync_v2(here, there, size, stream) if to_host else driver.cuMemcpyHtoDAsync_v2(there, here, size, stream)
        if code:
            raise OSError(f"copying {bytes_.nbytes} bytes failed with CUDA error {code}")

    def launch(self, function: int, step: Step, *, is_early: bool) -> None:
        attribute = _Attribute(id=PROGRAMMATIC, value=1)
        launch = _Launch((c_uint * 3)(*step.grid), (c_uint * 3)(step.threads, 1, 1), step.shared, self.stream.ptr)
        if is_early and self.capability >= OVERLAP_CAPABILITY:
            launch.attributes, launch.num_attributes = ctypes.pointer(attribute), 1
        arguments = (c_void_p * len(step.arguments))(*(ctypes.addressof(each) for each in step.arguments))
        code = self._driver.cuLaunchKernelEx(ctypes.byref(launch), c_void_p(function), arguments, None)
        if code:
            raise OSError(f"{step.kernel}: launching {step.grid} blocks of {step.threads} failed with CUDA error {code}")


class CudaKernels:
    """The sources of this folder, compiled for one model's sizes and this device; CuPy keeps what it compiled on disk."""

    def __init__(self, device: CudaDevice, sizes: dict[str, int]) -> None:
        self._device = device
        self._texts = [text_of(f"{name}.cu") for name in SOURCES]
        self._modules = [device.cupy.RawModule(code=text, options=(*OPTIONS, *definitions(text, sizes))) for text in self._texts]
        if device.capability == HOPPER_CAPABILITY:
            for name in OF_HOPPER:
                self._texts.append(text_of(f"{name}.cu"))
                self._modules.append(
                    module_of_hopper(device.cupy, device.nvrtc, name, self._texts[-1], definitions(self._texts[-1], sizes))
                )
        self._functions: dict[str, Any] = {}
        self.num_recorded = 0

    def function(self, name: str, shared: int = 0) -> int:
        if name not in self._functions:
            exported = re.compile(rf"^\s*[A-Z_]+\({name}[,)]", re.MULTILINE)
            source = next(i for i, text in enumerate(self._texts) if exported.search(text))
            self._functions[name] = self._modules[source].get_function(name)
        function = self._functions[name]
        if shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared
        return int(function.kernel.ptr)

    def run(self, steps: Sequence[Step], *, overlap: bool = True) -> None:
        with self._device.using():
            for i, step in enumerate(steps):
                self._device.launch(self.function(step.kernel, step.shared), step, is_early=overlap and i > 0)

    def record(
        self, steps: Sequence[Step], inputs: Sequence[Copy] = (), outputs: Sequence[Copy] = (), *, overlap: bool = True
    ) -> Callable[[], None]:
        self.num_recorded += 1
        with self._device.using():
            for step in steps:
                self.function(step.kernel, step.shared)  # loads what is not loaded yet, which must not happen while recording
            with self._device.full():
                self._device.stream.begin_capture()
                try:
                    for array, bytes_ in inputs:
                        self._device.copy_async(array, bytes_, to_host=False)
                    self.run(steps, overlap=overlap)
                    for array, bytes_ in outputs:
                        self._device.copy_async(array, bytes_, to_host=True)
                except BaseException:
                    with suppress(Exception):
                        self._device.stream.end_capture()  # or whatever is done from now on would be recorded
                    raise
                graph = self._device.stream.end_capture()

        def launch() -> None:
            with self._device.using():
                graph.launch(self._device.stream)

        return launch


def module_of_hopper(cupy: Any, nvrtc: Any, name: str, text: str, definitions: Sequence[str]) -> Any:
    """A source compiled for what CuPy does not compile for, and kept where it keeps its own if there is room. RuntimeError with what the
    compiler says when it does not compile."""
    options = (f"-arch={HOPPER_ARCHITECTURE}", *OPTIONS, *definitions)
    key = hashlib.blake2b("\n".join([repr(nvrtc.getVersion()), *options, text]).encode(), digest_size=16).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))
    path = folder / f"forerun-{key}.cubin"
    if not path.exists():
        compiled = _compiled(nvrtc, f"{name}.cu", text, options)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with in_place_of(path) as file:
                file.write(compiled)
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="forerun-")) / path.name
            path.write_bytes(compiled)
    return cupy.RawModule(path=str(path))


def _compiled(nvrtc: Any, name: str, text: str, options: tuple[str, ...]) -> bytes:
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name} does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


class SpanStruct(ctypes.Structure):
    """Span of forerun.cuh."""

    _fields_ = (
        ("position", c_longlong), ("base", c_longlong), ("states", c_void_p), ("columns", c_void_p), ("gates", c_void_p),
        ("keys", c_void_p), ("values", c_void_p), ("table", c_void_p), ("hidden", c_void_p), ("coordinates", c_void_p),
        ("given", c_void_p), ("num_coordinates", c_longlong), ("free", c_longlong), ("num_pages", c_longlong),
        ("first_row", c_int), ("num_rows", c_int), ("store", c_int), ("state_slots", c_int), ("column_slots", c_int),
        ("hidden_slots", c_int),
    )  # fmt: skip


SPAN = np.dtype(SpanStruct)
LOG, RING = range(2)


class DrawStruct(ctypes.Structure):
    """Draw of forerun.cuh."""

    _fields_ = (
        ("temperature", c_double), ("top_p", c_double), ("log_min_p", c_double), ("seed", c_ulonglong), ("position", c_longlong),
        ("top_k", c_int), ("reserved", c_int),
    )  # fmt: skip


DRAW = np.dtype(DrawStruct)


class RowsStruct(ctypes.Structure):
    """Rows of forerun.cuh."""

    _fields_ = (
        ("halves", c_void_p), ("quants", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("floats", c_void_p),
        ("halves_stride", c_int), ("quants_stride", c_int), ("halves_rows", c_int), ("reserved", c_int),
    )  # fmt: skip


class RoundStruct(ctypes.Structure):
    """Round of rounds.cu."""

    _fields_ = (
        ("verify", c_void_p), ("catch_up", c_void_p), ("draft", c_void_p), ("tokens", c_void_p), ("choices", c_void_p),
        ("drafted", c_void_p), ("picked", c_void_p), ("report", c_void_p), ("limits", c_void_p),
        ("draft_span_of", c_void_p), ("draws", c_void_p), ("shares", c_void_p), ("sure", c_void_p),
        ("verified", c_void_p), ("num_right", c_void_p), ("span_of", c_void_p), ("rates", c_void_p),
        ("depth", c_int), ("sequences", c_int), ("seed", c_int), ("reserved", c_int),
    )  # fmt: skip


class NextStruct(ctypes.Structure):
    """Next of rounds.cu."""

    _fields_ = (
        ("spans", c_void_p), ("tokens", c_void_p), ("chosen", c_void_p), ("verified", c_void_p), ("first", c_void_p),
        ("num_drafts", c_void_p), ("num_right", c_void_p), ("later_at", c_void_p), ("later", c_void_p), ("sequences", c_int),
    )  # fmt: skip


class AheadStruct(ctypes.Structure):
    """Ahead of forerun.cuh."""

    _fields_ = (("weights", c_void_p), ("bytes", c_int), ("is_spread", c_int))


class MatrixStruct(ctypes.Structure):
    """Matrix of forerun.cuh."""

    _fields_ = (
        ("tiles", c_void_p), ("scales", c_void_p), ("ends", c_void_p), ("outputs", c_int), ("units", c_int), ("format", c_int),
        ("reserved", c_int),
    )  # fmt: skip
