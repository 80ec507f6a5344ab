"""Weights as the C kernels read them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import ARITHMETIC
from ..formats.grids import GRIDS
from ..formats.stored import U8, Stored
from .library import FORMATS, address, library, physical_cores

#: Bytes that are asked of the system at once.
REGION = 2**26


@dataclass(frozen=True, slots=True)
class CpuMatrix:
    """[outputs, inputs] in a format of the kernels, repacked into tiles of 16 outputs."""

    format: int
    outputs: int
    inputs: int
    data: np.ndarray[Any, Any]


class CpuBackend:
    """The C kernels with `num_threads` threads (None: one for each physical core). OSError where there are none."""

    name = "cpu"
    operations_per_second = 2e10

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or physical_cores()
        self.library = library()
        self._room: U8 = np.zeros(0, np.uint8)

    @property
    def instructions(self) -> str:
        return f"{self.library.instruction_set} {ARITHMETIC}"

    def matrix(self, weight: Stored) -> CpuMatrix:
        (outputs, inputs), number = weight.shape, FORMATS[weight.type]
        raw = np.ascontiguousarray(weight.raw)
        packed = self._take(self.library.packed_bytes(number, outputs, inputs))
        codebook = address(GRIDS[weight.type].codebook) if weight.type in GRIDS else None
        self.library.pack(number, outputs, inputs, address(raw), codebook, address(packed), self.num_threads)
        return CpuMatrix(number, outputs, inputs, packed)

    def first_outputs(self, weight: CpuMatrix, count: int) -> CpuMatrix:
        return CpuMatrix(weight.format, count, weight.inputs, weight.data)

    def _take(self, num_bytes: int) -> U8:
        """Memory from regions so large that the system gives large pages for it: weights are read from end to end, through thousands of
        small pages otherwise."""
        num_bytes = -(-num_bytes // 64) * 64
        if num_bytes > len(self._room):
            # Private: shared memory gets no large pages.
            memory = mmap.mmap(-1, max(num_bytes, REGION), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._room = np.frombuffer(memory, np.uint8)
        taken, self._room = self._room[:num_bytes], self._room[num_bytes:]
        return taken
