"""A CPU in place of a CUDA device: the sources of kernels/cuda compiled by g++ against cuda_on_cpu.h, on NumPy's arrays."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from forerun.core.begun import Mark
from forerun.kernels.cuda.device import FOLDER, HOPPER_CAPABILITY, OF_HOPPER, SOURCES, Address, Array, Copy, Step, definitions, text_of

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
OPTIONS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-w")
BUILT = Path(tempfile.gettempdir()) / f"forerun-cuda-on-cpu-{os.getuid()}"
#: Bytes behind each array.
GUARD = 4096


class HostDevice:
    """`is_backwards`: threads and blocks run in the other order."""

    def __init__(self, is_backwards: bool = False) -> None:
        self.is_backwards = is_backwards
        self.num_launches = 0
        self._guards: list[Any] = []
        self.max_shared = (99 if is_backwards else 227) * 1024  # what a device has at least, and what a large one has
        self.capability = 80 if is_backwards else HOPPER_CAPABILITY

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        """With some bytes behind that nobody may write: see `check`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        whole = np.zeros(size + GUARD, np.uint8)
        whole[size:] = 0xA5
        self._guards.append(whole[size:])
        return whole[:size].view(dtype).reshape(tuple(shape))

    def check(self) -> None:
        assert all((guard == 0xA5).all() for guard in self._guards), "a kernel wrote beyond its buffer"

    def to_device(self, values: npt.NDArray[Any]) -> Array:
        return np.array(values, order="C")

    def to_host(self, values: Array) -> npt.NDArray[Any]:
        return values.copy()

    def put(self, to: Array, values: Any) -> None:
        to[...] = values

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(list(arrays))

    def interleave(self, one: Array, other: Array) -> Array:
        return np.stack([one, other], axis=1).reshape(2 * one.shape[0], *one.shape[1:])

    def address(self, values: Array) -> Address:
        return Address(values.__array_interface__["data"][0])

    def wait(self) -> None:
        pass

    def is_done(self) -> bool:
        return True

    def mark(self) -> Mark:
        return self

    def shared(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(num_bytes, np.uint8)

    def fetch(self, values: Array) -> Callable[[], npt.NDArray[Any]]:
        copy = values.copy()
        return lambda: copy

    def random(self, num_bytes: int, scale: float | None = None) -> Array:
        rng = np.random.default_rng(num_bytes)
        if scale is None:
            return rng.integers(0, 256, num_bytes, np.uint8)
        values = rng.uniform(-scale, scale, num_bytes // 2).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

    def compile(self, sizes: dict[str, int]) -> HostKernels:
        return HostKernels(self, sizes)


def _build(source: str, sizes: dict[str, int]) -> Path:
    text = text_of(f"{source}.cu")
    defined = definitions(text, sizes)
    key = hashlib.blake2b("\n".join([HEADER.read_text(), *OPTIONS, text, *defined]).encode(), digest_size=16).hexdigest()
    library = BUILT / f"{source}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *OPTIONS, *defined, "-include", str(HEADER), "-x", "c++", str(FOLDER / f"{source}.cu")]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


class HostKernels:
    """Built once for each set of sizes and version of the sources, and kept."""

    def __init__(self, device: HostDevice, sizes: dict[str, int]) -> None:
        self._device, self.num_recorded = device, 0
        BUILT.mkdir(mode=0o700, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            self._libraries = [ctypes.CDLL(str(path)) for path in pool.map(partial(_build, sizes=sizes), (*SOURCES, *OF_HOPPER))]

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._device.num_launches += 1
            grid, block = (c_int * 3)(*step.grid), (c_int * 3)(step.threads, 1, 1)
            arguments = (c_void_p * len(step.arguments))(*(ctypes.addressof(each) for each in step.arguments))
            code = 1
            for library in self._libraries:
                code = library.run(step.kernel.encode(), grid, block, c_size_t(step.shared), arguments, int(self._device.is_backwards))
                if code != 1:  # 1: it is in another
                    break
            if code:
                raise OSError(f"{step.kernel}: {'no such kernel' if code == 1 else 'too large a launch'}")

    def record(
        self, steps: Sequence[Step], inputs: Sequence[Copy] = (), outputs: Sequence[Copy] = (), *, overlap: bool = True
    ) -> Callable[[], None]:
        self.num_recorded += 1

        def launch() -> None:
            for array, bytes_ in inputs:
                array.reshape(-1).view(np.uint8)[:] = bytes_
            self.run(steps)
            for array, bytes_ in outputs:
                bytes_[:] = array.reshape(-1).view(np.uint8)

        return launch
