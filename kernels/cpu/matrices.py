"""Weights as the C kernels read them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.stored import U8, Stored
from .library import FORMATS, library, physical_cores


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

    def matrix(self, weight: Stored) -> CpuMatrix:
        (outputs, inputs), number = weight.shape, FORMATS[weight.type]
        raw = np.ascontiguousarray(weight.raw)
        packed = _huge(self.library.packed_bytes(number, outputs, inputs))
        self.library.pack(number, outputs, inputs, address(raw), address(packed), self.num_threads)
        return CpuMatrix(number, outputs, inputs, packed)

    def first_outputs(self, weight: CpuMatrix, count: int) -> CpuMatrix:
        return CpuMatrix(weight.format, count, weight.inputs, weight.data)


def _huge(num_bytes: int) -> U8:
    """Memory in large pages, where the system has them: weights are read from end to end, and small pages cost a tenth of that."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def address(array: np.ndarray[Any, Any]) -> int:
    """Where its data is. (`ndarray.ctypes.data` says the same, five times slower.)"""
    where: int = array.__array_interface__["data"][0]
    return where
