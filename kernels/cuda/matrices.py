"""Weights as the CUDA kernels read them: tiles of 16 outputs that are the registers of a matrix instruction (forerun.cuh,
products.cuh)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...core.errors import ModelFileError
from ..backend import ARITHMETIC, F32
from ..formats.stored import U8, Stored, quantise, unpack_codes, unpack_minima, unpack_no_minima, unpack_q6_k, unpack_sixteens
from ..model.config import ModelConfig
from .device import Address, Array, Device, Kernels, MatrixStruct, problem_with, sizes_of

STRIP = 16
#: Format numbers of forerun.cuh, and their inputs of a unit.
BF16, Q8_0, Q4_K, Q5_K, Q6_K = range(5)
UNITS = {BF16: 32, Q8_0: 128, Q4_K: 256, Q5_K: 256, Q6_K: 256}
#: Bytes that a strip has of a unit: tiles, scales (and high bits) and ends.
UNIT_BYTES = {BF16: (1024, 0, 0), Q8_0: (2048, 128, 0), Q4_K: (2048, 256, 64), Q5_K: (2048, 768, 64), Q6_K: (2048, 1280, 64)}
NAMES = {BF16: "bf16", Q8_0: "q8_0", Q4_K: "q4_k", Q5_K: "q5_k", Q6_K: "q6_k"}


@dataclass(slots=True, eq=False)
class CudaMatrix:
    """[outputs, inputs]: `tiles` [strips, units, bytes] and for quantised formats `scales` and `ends`, as forerun.cuh lays them out.
    Part of another matrix once they have been put together."""

    format: int
    outputs: int
    inputs: int
    tiles: Array
    scales: Array | None = None
    ends: Array | None = None

    @property
    def units(self) -> int:
        return -(-self.inputs // UNITS[self.format])

    @property
    def strips(self) -> int:
        return -(-self.outputs // STRIP)

    @property
    def parts(self) -> list[Array | None]:
        return [self.tiles, self.scales, self.ends]


class CudaBackend:
    """The kernels of this folder on one device. Matrices of floats are held as bfloat16."""

    name = "cuda"
    operations_per_second = 1e12

    def __init__(self, device: Device) -> None:
        self.device = device
        self.packing = Packing(self)
        self._kernels: dict[ModelConfig, Kernels] = {}

    @property
    def instructions(self) -> str:
        return f"cuda {self.device.capability} {ARITHMETIC}"

    def kernels(self, config: ModelConfig) -> Kernels:
        """Compiled for a model. ModelFileError when it is one they cannot compute."""
        if problem := problem_with(config):
            raise ModelFileError(f"the CUDA kernels cannot compute {problem}")
        if config not in self._kernels:
            self._kernels[config] = self.device.compile(sizes_of(config))
        return self._kernels[config]

    def matrix(self, weight: Stored) -> CudaMatrix:
        outputs, inputs = weight.shape
        pack = PACK.get(weight.type)
        number, parts = pack(weight) if pack is not None else (BF16, [_pack_bf16(weight)])
        return CudaMatrix(number, outputs, inputs, *(self.device.to_device(part) for part in parts))

    def first_outputs(self, weight: CudaMatrix, count: int) -> CudaMatrix:
        return CudaMatrix(weight.format, count, weight.inputs, weight.tiles, weight.scales, weight.ends)

    def stack(self, matrices: Sequence[CudaMatrix]) -> CudaMatrix:
        """One matrix of several of a format and with the same inputs, each filled up to whole strips; they become parts of it."""
        first, parts = matrices[0], list[Array | None]()
        for i, part in enumerate(first.parts):
            parts.append(None if part is None else self.device.concatenate([m.parts[i] for m in matrices]))
        _share(matrices, parts)
        return CudaMatrix(first.format, sum(STRIP * m.strips for m in matrices), first.inputs, parts[0], parts[1], parts[2])

    def interleave(self, gate: CudaMatrix, up: CudaMatrix) -> CudaMatrix:
        """A strip of one, then a strip of the other; they are taken apart no more."""
        tiles = self.device.interleave(gate.tiles, up.tiles)
        gate.tiles = up.tiles = tiles
        return CudaMatrix(gate.format, 2 * STRIP * gate.strips, gate.inputs, tiles)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Matrices that read the same rows: by format, one product each. `at[i]` says in which product's output, and from which column, the
    i-th matrix finds its own."""

    products: list[CudaMatrix]
    at: list[tuple[int, int]]


class Packing:
    """Weights as the programs read them, put together once and shared by all of them."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend, self.device = backend, backend.device
        self._stacked: dict[tuple[int, ...], tuple[Stacked, Sequence[CudaMatrix]]] = {}
        self._gated: dict[tuple[int, ...], tuple[CudaMatrix, Sequence[CudaMatrix]]] = {}
        self._floats: dict[int, tuple[Array, F32]] = {}

    def stack(self, *matrices: CudaMatrix) -> Stacked:
        key = tuple(id(m) for m in matrices)
        if key not in self._stacked:
            products, at = list[CudaMatrix](), dict[int, tuple[int, int]]()
            for number in {m.format: None for m in matrices}:
                of = [i for i, m in enumerate(matrices) if m.format == number]
                column = 0
                for i in of:
                    at[i] = len(products), column
                    column += STRIP * matrices[i].strips
                products.append(self.backend.stack([matrices[i] for i in of]) if len(of) > 1 else matrices[of[0]])
            self._stacked[key] = Stacked(products, [at[i] for i in range(len(matrices))]), matrices
        return self._stacked[key][0]

    def gated(self, gate: Sequence[CudaMatrix], up: Sequence[CudaMatrix], is_interleaved: bool) -> CudaMatrix:
        """Gate and up for one product: strip by strip (bfloat16), else gate then up; of experts all of them, one after another."""
        matrices = (*gate, *up)
        key = tuple(id(m) for m in matrices)
        if key not in self._gated:
            if is_interleaved:
                both = self.backend.interleave(self._together(gate), self._together(up))
                for m in matrices:
                    m.tiles = both.tiles
            else:
                both = self.all([m for pair in zip(gate, up, strict=True) for m in pair])
            self._gated[key] = both, matrices
        return self._gated[key][0]

    def _together(self, matrices: Sequence[CudaMatrix]) -> CudaMatrix:
        return self.backend.stack(matrices) if len(matrices) > 1 else matrices[0]

    def all(self, matrices: Sequence[CudaMatrix]) -> CudaMatrix:
        """One matrix of all. ModelFileError when they are not of one type."""
        products = self.stack(*matrices).products
        if len(products) > 1:
            raise ModelFileError("the CUDA kernels cannot compute experts of one layer in several types")
        return products[0]

    def floats(self, values: F32) -> Address:
        if id(values) not in self._floats:
            self._floats[id(values)] = self.device.to_device(np.ascontiguousarray(values, np.float32)), values
        return self.device.address(self._floats[id(values)][0])

    def struct(self, m: CudaMatrix) -> MatrixStruct:
        """What a kernel is told of a matrix."""
        parts = (0 if part is None else self.device.address(part) for part in m.parts)
        return MatrixStruct(*parts, m.outputs, m.units, m.format, 0)


def _share(matrices: Sequence[CudaMatrix], parts: Sequence[Array | None]) -> None:
    start = 0
    for m in matrices:
        end = start + m.strips
        m.tiles, m.scales, m.ends = (None if part is None else part[start:end] for part in parts)
        start = end


def _padded(values: npt.NDArray[Any], outputs: int, inputs: int) -> npt.NDArray[Any]:
    """[outputs, inputs, ...] with zeros up to multiples."""
    rows, columns = (-(-n // m) * m for n, m in zip(values.shape[:2], (outputs, inputs), strict=True))
    if values.shape[:2] == (rows, columns):
        return values
    whole = np.zeros((rows, columns, *values.shape[2:]), values.dtype)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole


def _bytes(values: npt.NDArray[Any], strips: int, units: int) -> U8:
    return np.ascontiguousarray(values).view(np.uint8).reshape(strips, units, -1)


def _pack_bf16(weight: Stored) -> U8:
    raw = weight.raw if weight.type == "BF16" else quantise(weight.values(), "BF16")
    w = _padded(np.ascontiguousarray(raw).view("<u2").reshape(weight.shape), STRIP, 32)
    strips, units = w.shape[0] // STRIP, w.shape[1] // 32
    # outputs: strip, half, g; inputs: unit, lane in four, instruction, pair, which of it
    tiles = w.reshape(strips, 2, 8, units, 4, 2, 2, 2).transpose(0, 3, 5, 2, 4, 6, 1, 7)
    return _bytes(tiles, strips, units)


def _pack_q8(quants: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> tuple[int, list[U8]]:
    """Of quants [outputs, inputs], and scales of each 32."""
    quants, scales = _padded(quants, STRIP, 128), _padded(scales, STRIP, 4)
    strips, units = quants.shape[0] // STRIP, quants.shape[1] // 128
    # inputs: unit, block, lane in four, half of its eight, which of it
    tiles = quants.reshape(strips, 2, 8, units, 4, 4, 2, 4).transpose(0, 3, 4, 2, 5, 6, 1, 7)
    pairs = scales.reshape(strips, 2, 8, units, 4).transpose(0, 3, 2, 4, 1)
    return Q8_0, [_bytes(tiles, strips, units), _bytes(pairs, strips, units)]


def _pack_k(number: int, d: npt.NDArray[Any], scales: npt.NDArray[Any], quants: U8) -> tuple[int, list[U8]]:
    """Of d [outputs, blocks, 2], two bytes of scales of each 32 inputs [outputs, blocks, 8, 2], and quants [outputs, inputs] of 4 bits and
    as many more as the format has."""
    quants = _padded(quants, STRIP, 256)
    strips, units = quants.shape[0] // STRIP, quants.shape[1] // 256

    def packed(bits: U8, width: int) -> U8:
        """In the order of a lane's bytes, each with those of several turns."""
        shared = 8 // width
        parts = (
            bits.reshape(strips, 2, 8, units, 8 // shared, shared, 4, 2, 4) << np.arange(0, 8, width, dtype=np.uint8)[:, None, None, None]
        )
        return _bytes(np.bitwise_or.reduce(parts, axis=5).transpose(0, 3, 4, 2, 5, 6, 1, 7), strips, units)

    of_scales = _padded(scales, STRIP, 1).reshape(strips, 2, 8, units, 8, 2).transpose(0, 3, 2, 4, 5, 1)
    of_ends = _padded(d, STRIP, 1).reshape(strips, 2, 8, units, 2).transpose(0, 3, 2, 4, 1)
    both = [_bytes(of_scales, strips, units)]
    if number != Q4_K:
        both.append(packed(quants >> np.uint8(4), 1 if number == Q5_K else 2))
    return number, [packed(quants & np.uint8(15), 4), np.concatenate(both, axis=2), _bytes(of_ends, strips, units)]


def _pack_q8_0(weight: Stored) -> tuple[int, list[U8]]:
    blocks = np.ascontiguousarray(weight.raw).reshape(weight.shape[0], -1, 34)
    quants = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(weight.shape[0], -1)
    return _pack_q8(quants, np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0])


def _pack_no_minima(weight: Stored) -> tuple[int, list[U8]]:
    """As Q8_0: the same values, in more memory."""
    d, quants = unpack_no_minima(weight)
    return _pack_q8(quants, d)


def _pack_codes(weight: Stored) -> tuple[int, list[U8]]:
    """As Q8_0, in more memory: the same values, but scales are halves, to which those of IQ2_XXS and IQ4_XS are rounded. What is beyond
    a half of them goes into the quants, as far as these can take it."""
    scales, quants = unpack_codes(weight)
    held = np.clip(scales, 2.0**-24, 2.0**15) if weight.type == "MXFP4" else np.clip(scales, -65504, 65504)
    beyond = np.divide(scales, held, out=np.ones_like(scales), where=held != 0)
    blocks = np.clip(np.rint(quants.reshape(*scales.shape, 32) * beyond[:, :, None]), -127, 127)
    return _pack_q8(blocks.astype(np.int8).reshape(quants.shape), held.astype(np.float16))


def _pack_sixteens(weight: Stored) -> tuple[int, list[U8]]:
    """As Q6_K: the same values, in more memory."""
    d, scales, quants = unpack_sixteens(weight)
    return _pack_sixes(d, scales, (quants + np.int8(32)).view(np.uint8))


def _pack_minima(weight: Stored) -> tuple[int, list[U8]]:
    d, dmin, scales, minima, quants = unpack_minima(weight)
    return _pack_k(Q4_K if weight.type == "Q4_K" else Q5_K, np.stack([d, dmin], 2), np.stack([scales, minima], 3), quants)


def _pack_q6_k(weight: Stored) -> tuple[int, list[U8]]:
    return _pack_sixes(*unpack_q6_k(weight))


def _pack_sixes(d: npt.NDArray[np.float16], scales: npt.NDArray[np.int8], quants: U8) -> tuple[int, list[U8]]:
    return _pack_k(Q6_K, np.stack([d, np.zeros_like(d)], 2), scales.view(np.uint8).reshape(*scales.shape[:2], 8, 2), quants)


PACK: dict[str, Callable[[Stored], tuple[int, list[U8]]]] = {
    "Q8_0": _pack_q8_0, "Q4_0": _pack_no_minima, "Q5_0": _pack_no_minima,
    "IQ2_XXS": _pack_codes, "IQ4_NL": _pack_codes, "IQ4_XS": _pack_codes, "MXFP4": _pack_codes,
    "Q3_K": _pack_sixteens, "IQ1_S": _pack_sixteens, "IQ1_M": _pack_sixteens, "IQ3_XXS": _pack_sixteens, "IQ3_S": _pack_sixteens,
    "Q4_K": _pack_minima, "Q5_K": _pack_minima, "Q6_K": _pack_q6_k,
}  # fmt: skip
