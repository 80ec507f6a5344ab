"""The compiled C kernels (kernels/cpu/*.c) through ctypes, which lets other Python threads run meanwhile. The structures mirror
forerun.h."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...core.errors import InternalBug
from ...core.vocabulary import SamplingParams
from ..backend import ARITHMETIC, F32

_NAMES = """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL IQ4_XS MXFP4 Q2_K Q3_K Q4_K Q5_K Q6_K
IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S"""
FORMATS = {name: number for number, name in enumerate(_NAMES.split())}
#: Instruction sets, best first. Which of them there are depends on the processor.
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")
LOG, RING, CHUNK = range(3)
MAX_OUTPUTS = 4

#: Tokens, and how likely each was held.
Drafts = tuple[list[int], list[float]]


class MatrixStruct(Structure):
    _fields_ = [("data", c_void_p), ("format", c_int32), ("outputs", c_int32), ("inputs", c_int32), ("reserved", c_int32)]


class SpanStruct(Structure):
    _fields_ = [
        ("position", c_int64), ("num_rows", c_int32), ("num_kept", c_int32), ("store", c_int32), ("num_slots", c_int32),
        ("states", c_void_p), ("columns", c_void_p), ("b", c_void_p), ("a", c_void_p), ("columns_stride", c_int64),
        ("gates_stride", c_int64), ("keys", c_void_p), ("values", c_void_p), ("layer_stride", c_int64), ("table", c_void_p),
    ]  # fmt: skip


class SizesStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "rotary_dim", "key_heads", "value_heads", "key_dim",
                                       "value_dim", "conv_width", "num_delta", "is_tiled")),
        ("eps", c_float),
    ]  # fmt: skip


class OpStruct(Structure):
    _fields_ = [
        ("code", c_int32), ("layer", c_int32), ("inputs", c_int32 * MAX_OUTPUTS), ("outputs", c_int32 * MAX_OUTPUTS),
        ("num_matrices", c_int32), ("adds", c_int32), ("offset", c_int32), ("num_used", c_int32), ("is_last", c_int32),
        ("reserved", c_int32), ("matrices", POINTER(MatrixStruct)), ("weights", c_void_p * 4),
    ]  # fmt: skip


class CallStruct(Structure):
    _fields_ = [
        ("sizes", POINTER(SizesStruct)), ("ops", POINTER(OpStruct)), ("num_ops", c_int32), ("num_buffers", c_int32),
        ("widths", POINTER(c_int32)), ("tokens", POINTER(c_int32)), ("rows", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("spans", POINTER(SpanStruct)), ("num_spans", c_int32), ("num_rows", c_int32), ("by_position", c_int32), ("reserved", c_int32),
        ("given", POINTER(c_void_p)),
    ]  # fmt: skip


class SamplingStruct(Structure):
    _fields_ = [("temperature", c_double), ("top_p", c_double), ("min_p", c_double), ("top_k", c_int64), ("seed", c_uint64)]


class WantedStruct(Structure):
    _fields_ = [("sampling", SamplingStruct), ("floor", c_double), ("least", c_double), ("limit", c_int32), ("reserved", c_int32)]


#: api.h's number of the interface; with it, what both sides must agree on.
INTERFACE = 1


class HeadBuffers(Structure):
    _fields_ = [("hidden", c_int32), ("out", c_int32), ("logits", c_int32)]


def _check_layout(library: ctypes.CDLL, path: Path) -> None:
    structs = MatrixStruct, SpanStruct, OpStruct, CallStruct, SamplingStruct, WantedStruct, HeadBuffers
    mine = [INTERFACE, ARITHMETIC, len(FORMATS), *map(ctypes.sizeof, structs)]
    theirs = (c_int32 * 64)()  # more than any library has
    if hasattr(library, "forerun_layout"):
        library.forerun_layout(theirs)
    if theirs[: len(mine) + 1] != [*mine, 0]:
        raise ImportError(f"{path} was compiled from other sources than these: install the package again")


class Library:
    """What api.h offers. OSError where this installation has no compiled kernels, ImportError where they are of other sources."""

    def __init__(self) -> None:
        names = [f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
        paths = [path for name in names if (path := Path(__file__).with_name(name)).exists()]
        if not paths:
            raise OSError("kernels/cpu was not compiled when this package was installed")
        library = ctypes.CDLL(str(paths[0]))
        _check_layout(library, paths[0])
        self._use = library.forerun_use
        self._use.restype, self._use.argtypes = c_char_p, [c_char_p]
        self.packed_bytes = library.forerun_packed_bytes
        self.packed_bytes.restype, self.packed_bytes.argtypes = c_int64, [c_int, c_int64, c_int64]
        self._pack = library.forerun_pack
        self._pack.restype, self._pack.argtypes = c_int, [c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int]
        self._run = library.forerun_run
        self._run.restype, self._run.argtypes = c_int, [POINTER(CallStruct), c_int]
        self._draw = library.forerun_draw
        self._draw.restype = c_int
        self._draw.argtypes = [c_void_p, c_int, c_int64, POINTER(SamplingStruct), POINTER(c_uint64), POINTER(c_int64)]
        self._draft = library.forerun_draft
        self._draft.restype = c_int
        self._draft.argtypes = [
            POINTER(CallStruct), c_int, HeadBuffers, POINTER(WantedStruct), c_int, POINTER(c_int32), POINTER(c_float), POINTER(c_int32),
        ]  # fmt: skip
        self.instruction_set = self.use("")

    def use(self, name: str) -> str:
        """Computes with an instruction set from now on ("": the best there is), in the whole process. Returns its name; InternalBug
        when this processor does not have it."""
        found = self._use(name.encode())
        if found is None:
            raise InternalBug(f"this processor has no {name}")
        self.instruction_set = found.decode()
        return self.instruction_set

    def pack(self, number: int, outputs: int, inputs: int, raw: int, codebook: int | None, packed: int, num_threads: int) -> None:
        """Puts the blocks at `raw` into tiles at `packed`; `number` is their format's."""
        if self._pack(number, outputs, inputs, raw, codebook, packed, num_threads):
            raise MemoryError("no memory to repack a matrix")

    def run(self, call: CallStruct, num_threads: int) -> None:
        if self._run(ctypes.byref(call), num_threads):
            raise MemoryError("no memory for the intermediate results of a forward pass")

    def draw(self, logits: F32, how: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
        """The token of each row of logits [R, V] at its position, with noise and filters."""
        logits = np.ascontiguousarray(logits, np.float32)
        num_rows, size = logits.shape
        hows, tokens = (SamplingStruct * num_rows)(), (c_int64 * num_rows)()
        for row, params in enumerate(how):  # of a sequence all are one
            hows[row] = hows[row - 1] if row and params is how[row - 1] else sampling_struct(params)
        if self._draw(address(logits), num_rows, size, hows, (c_uint64 * num_rows)(*positions), tokens):
            raise MemoryError("no memory to choose a token")
        return list(tokens)

    def draft(self, call: CallStruct, num_threads: int, buffers: HeadBuffers, wanted: Sequence[WantedStruct]) -> list[Drafts]:
        """The tokens drafted for each sequence, and how likely each was held, with what is wanted of it."""
        number, most = len(wanted), max(each.limit for each in wanted)
        tokens, shares, counts = (c_int32 * (number * most))(), (c_float * (number * most))(), (c_int32 * number)()
        if self._draft(ctypes.byref(call), num_threads, buffers, (WantedStruct * number)(*wanted), most, tokens, shares, counts):
            raise MemoryError("no memory for the intermediate results of a draft")
        parts = [slice(i * most, i * most + count) for i, count in enumerate(counts)]
        return [(tokens[part], shares[part]) for part in parts]


def sampling_struct(params: SamplingParams) -> SamplingStruct:
    return SamplingStruct(params.temperature, params.top_p, params.min_p, params.top_k, params.seed)


def address(array: np.ndarray[Any, Any]) -> int:
    """Where its data is. (`ndarray.ctypes.data` says the same, ten times slower.)"""
    try:
        return ctypes.addressof(c_char.from_buffer(cast("Any", array)))
    except (TypeError, ValueError):  # read-only, in pieces, or empty
        where: int = array.__array_interface__["data"][0]
        return where


@cache
def library() -> Library:
    return Library()


def physical_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: set[str] = set()
    for number in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(number))
    return len(cores)
