"""Tensors as files have them: types in which values are stored, and what they mean.

Quantised types are those of ggml (`ggml-quants.c`, `dequantize_row_*`): a block of values shares scales, and blocks lie along
the innermost dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..backend import F32
from . import grids

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
Halves = npt.NDArray[np.float16]

#: What quants of 4 bits stand for (ggml's kvalues_iq4nl and kvalues_mxfp4; those of MXFP4 are twice the OCP format's, scales are half).
CODES = {
    "IQ4_NL": np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8),
    "MXFP4": np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8),
}
CODES["IQ4_XS"] = CODES["IQ4_NL"]


# Blocks [blocks, bytes] to values [blocks, values].


def _half(raw: U8) -> F32:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _f32(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _bf16(blocks: U8) -> F32:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: U8) -> F32:
    return cast("F32", _half(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32))


def _halves_of_bytes(packed: U8) -> U8:
    """[blocks, n] as [blocks, 2 n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1, dtype=np.uint8)


def _quants_4_0(blocks: U8) -> I8:
    return _halves_of_bytes(blocks[:, 2:]).view(np.int8) - np.int8(8)


def _q4_0(blocks: U8) -> F32:
    return cast("F32", _half(blocks[:, :2]) * _quants_4_0(blocks).astype(np.float32))


def _q4_1(blocks: U8) -> F32:
    d, least = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return cast("F32", d * _halves_of_bytes(blocks[:, 4:]).astype(np.float32) + least)


def _quants_of_5(blocks: U8, at: int) -> U8:
    """Quants of Q5_0 and Q5_1 [blocks, 32], from 0 to 31; `at` is where their fifth bits are."""
    fifth = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return _halves_of_bytes(blocks[:, at + 4 :]) | fifth << np.uint8(4)


def _q5_0(blocks: U8) -> F32:
    return cast("F32", _half(blocks[:, :2]) * (_quants_of_5(blocks, 2).astype(np.float32) - np.float32(16)))


def _q5_1(blocks: U8) -> F32:
    d, least = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return cast("F32", d * _quants_of_5(blocks, 4).astype(np.float32) + least)


def _codes(kind: str, blocks: U8) -> tuple[F32, I8]:
    """What IQ4_NL, IQ4_XS and MXFP4 are made of: scales of 32 values [blocks, groups], and quants [blocks, groups, 32]. A value is scale *
    quant."""
    if kind == "MXFP4":
        scales, packed = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), blocks[:, 1:]
    elif kind == "IQ4_NL":
        scales, packed = _half(blocks[:, :2]), blocks[:, 2:]
    else:
        low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
        high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        scales = _half(blocks[:, :2]) * ((low | high << 4).astype(np.float32) - np.float32(32))
        packed = blocks[:, 8:]
    quants = CODES[kind][_halves_of_bytes(packed.reshape(-1, 16))]
    return cast("F32", scales), quants.reshape(len(blocks), -1, 32)


def _coded(kind: str, blocks: U8) -> F32:
    scales, quants = _codes(kind, blocks)
    return cast("F32", (scales[:, :, None] * quants.astype(np.float32)).reshape(len(blocks), -1))


def _quants_2(packed: U8) -> U8:
    """Quants of Q2_K, and the low bits of Q3_K [blocks, 64], as [blocks, 2, 4, 32]."""
    return packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)


def _q2_k(blocks: U8) -> F32:
    scales, minima = (blocks[:, :16] & 15).astype(np.float32), (blocks[:, :16] >> 4).astype(np.float32)
    return _with_minima(blocks[:, 80:], scales, minima, _quants_2(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32))


def _parts_3(blocks: U8) -> tuple[Halves, I8, I8]:
    """What Q3_K is made of: d [blocks, 1], scales of 16 values [blocks, 16] from -32 to 31, and quants [blocks, 16, 16] from -4 to 3. A
    value is d * scale * quant."""
    low = _halves_of_bytes(blocks[:, 96:104])
    high = (blocks[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)).reshape(-1, 16)
    third = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    quants = _quants_2(blocks[:, 32:96]).reshape(-1, 8, 32) | third << np.uint8(2)
    scales = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    return _halves(blocks, 108), scales, (quants.view(np.int8) - np.int8(4)).reshape(-1, 16, 16)


def _q3_k(blocks: U8) -> F32:
    d, scales, quants = _parts_3(blocks)
    return cast("F32", ((d.astype(np.float32) * scales)[:, :, None] * quants.astype(np.float32)).reshape(len(blocks), -1))


def _scales_k4(raw: U8) -> tuple[F32, F32]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes: [blocks, 8] each."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """Quants of Q4_K [blocks, 128] as [blocks, 8, 32]: the low nibbles of 32 bytes, then the high ones."""
    packed = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([packed & 15, packed >> 4], axis=2, dtype=np.uint8).reshape(-1, 8, 32)


def _q4_k(blocks: U8) -> F32:
    scales, minima = _scales_k4(blocks[:, 4:16])
    return _with_minima(blocks, scales, minima, _nibbles(blocks[:, 16:]).astype(np.float32))


def _q5_k(blocks: U8) -> F32:
    scales, minima = _scales_k4(blocks[:, 4:16])
    return _with_minima(blocks, scales, minima, _quants_5(blocks).astype(np.float32))


def _quants_5(blocks: U8) -> U8:
    """Quants of Q5_K [blocks, 8, 32], from 0 to 31."""
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _nibbles(blocks[:, 48:]) | high << np.uint8(4)


def _with_minima(blocks: U8, scales: F32, minima: F32, quants: F32) -> F32:
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return cast("F32", ((d * scales)[:, :, None] * quants - (dmin * minima)[:, :, None]).reshape(len(blocks), -1))


def _quants_6(blocks: U8) -> U8:
    """Quants of Q6_K [blocks, 2, 4, 32], from 0 to 63."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quants = np.concatenate([low & 15, low >> 4], axis=2, dtype=np.uint8).reshape(-1, 2, 4, 32)
    return quants | (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)) << np.uint8(4)


def _q6_k(blocks: U8) -> F32:
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    d = _half(blocks[:, 208:])
    values = (_quants_6(blocks).astype(np.float32) - np.float32(32)).reshape(-1, 16, 16)
    return cast("F32", ((d * scales)[:, :, None] * values).reshape(len(blocks), -1))


class _Type(NamedTuple):
    name: str
    block: int  # values
    size: int  # bytes
    read: Callable[[U8], F32]
    halves: tuple[int, ...] = ()  # bytes of a block at which halves are that scale it, then what is added or taken away


def _grid(name: str, size: int) -> _Type:
    return _Type(name, 256, size, partial(grids.values, name), (0,))


TYPES = {
    0: _Type("F32", 1, 4, _f32), 1: _Type("F16", 1, 2, _half), 30: _Type("BF16", 1, 2, _bf16), 2: _Type("Q4_0", 32, 18, _q4_0, (0,)),
    3: _Type("Q4_1", 32, 20, _q4_1, (0, 2)), 6: _Type("Q5_0", 32, 22, _q5_0, (0,)), 7: _Type("Q5_1", 32, 24, _q5_1, (0, 2)),
    8: _Type("Q8_0", 32, 34, _q8_0, (0,)), 10: _Type("Q2_K", 256, 84, _q2_k, (80, 82)),
    11: _Type("Q3_K", 256, 110, _q3_k, (108,)), 12: _Type("Q4_K", 256, 144, _q4_k, (0, 2)), 13: _Type("Q5_K", 256, 176, _q5_k, (0, 2)),
    14: _Type("Q6_K", 256, 210, _q6_k, (208,)), 20: _Type("IQ4_NL", 32, 18, partial(_coded, "IQ4_NL"), (0,)),
    23: _Type("IQ4_XS", 256, 136, partial(_coded, "IQ4_XS"), (0,)), 39: _Type("MXFP4", 32, 17, partial(_coded, "MXFP4")),
    16: _grid("IQ2_XXS", 66), 17: _grid("IQ2_XS", 74), 22: _grid("IQ2_S", 82), 18: _grid("IQ3_XXS", 98), 21: _grid("IQ3_S", 110),
    19: _grid("IQ1_S", 50), 29: _grid("IQ1_M", 56),
}  # fmt: skip
BY_NAME = {each.name: each for each in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor [..., inputs] as a file has it: its type, and `raw` [..., bytes of a row]."""

    type: str
    inputs: int
    raw: U8

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.raw.shape[:-1], self.inputs)

    def values(self) -> F32:
        """All of it as float32, exactly."""
        kind = BY_NAME[self.type]
        return kind.read(self.raw.reshape(-1, kind.size)).reshape(self.shape)

    def reshape(self, *outer: int) -> Stored:
        """The same with other outer dimensions."""
        return Stored(self.type, self.inputs, self.raw.reshape(*outer, self.raw.shape[-1]))

    def __getitem__(self, at: int | slice | tuple[slice, ...]) -> Stored:
        """Part of the outer dimensions."""
        return Stored(self.type, self.inputs, self.raw[at])


def _blocks(tensor: Stored) -> tuple[U8, tuple[int, int]]:
    """Blocks of a matrix [blocks, bytes], and how many outputs of how many of them it has."""
    kind = BY_NAME[tensor.type]
    return np.ascontiguousarray(tensor.raw).reshape(-1, kind.size), (tensor.shape[0], tensor.inputs // kind.block)


def _halves(blocks: U8, at: int) -> Halves:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def unpack_no_minima(tensor: Stored) -> tuple[Halves, I8]:
    """What a matrix [outputs, inputs] of Q4_0 or Q5_0 is made of: d [outputs, blocks], quants [outputs, inputs] from -8 to 7 or -16 to 15.
    A value is d * quant."""
    blocks, shape = _blocks(tensor)
    quants = _quants_4_0(blocks) if tensor.type == "Q4_0" else _quants_of_5(blocks, 2).view(np.int8) - np.int8(16)
    return _halves(blocks, 0).reshape(shape), quants.reshape(shape[0], -1)


def unpack_codes(tensor: Stored) -> tuple[F32, I8]:
    """What a matrix [outputs, inputs] of IQ2_XXS, IQ4_NL, IQ4_XS or MXFP4 is made of: scales of 32 inputs [outputs, inputs / 32], quants
    [outputs, inputs] from -127 to 113. A value is scale * quant."""
    blocks, (outputs, _) = _blocks(tensor)
    scales, quants = grids.scaled(tensor.type, blocks) if tensor.type == "IQ2_XXS" else _codes(tensor.type, blocks)
    return scales.reshape(outputs, -1), quants.reshape(outputs, -1)


def unpack_sixteens(tensor: Stored) -> tuple[Halves, I8, I8]:
    """A matrix [outputs, inputs] of Q3_K, IQ1 or IQ3 as d [outputs, blocks], scales of 16 inputs [outputs, blocks, 16] from -32 to 31, and
    quants [outputs, inputs] from -31 to 31. A value is d * scale * quant; of IQ1 and IQ3_XXS, a d below 2^-11 or 2^-13 is rounded."""
    blocks, shape = _blocks(tensor)
    d, scales, quants = _parts_3(blocks) if tensor.type == "Q3_K" else grids.sixteens(tensor.type, blocks)
    return d.reshape(shape), scales.reshape(*shape, 16), quants.reshape(shape[0], -1)


def unpack_minima(tensor: Stored) -> tuple[Halves, Halves, U8, U8, U8]:
    """What a matrix [outputs, inputs] of Q4_K or Q5_K is made of: d and dmin [outputs, blocks], scales and minima [outputs, blocks, 8] from
    0 to 63, quants [outputs, inputs] from 0 to 15 or 31. A value is d * scale * quant - dmin * minimum."""
    blocks, shape = _blocks(tensor)
    scales, minima = (part.astype(np.uint8).reshape(*shape, 8) for part in _scales_k4(blocks[:, 4:16]))
    quants = _nibbles(blocks[:, 16:]) if tensor.type == "Q4_K" else _quants_5(blocks)
    return _halves(blocks, 0).reshape(shape), _halves(blocks, 2).reshape(shape), scales, minima, quants.reshape(shape[0], -1)


def unpack_q6_k(tensor: Stored) -> tuple[Halves, I8, U8]:
    """What a matrix [outputs, inputs] of Q6_K is made of: d [outputs, blocks], scales of 16 inputs [outputs, blocks, 16], quants [outputs,
    inputs] from 0 to 63. A value is d * scale * (quant - 32)."""
    blocks, shape = _blocks(tensor)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).reshape(*shape, 16)
    return _halves(blocks, 208).reshape(shape), scales, _quants_6(blocks).reshape(shape[0], -1)


def put_half(kind: str, blocks: U8, which: int, values: npt.ArrayLike) -> None:
    """Sets one of the halves that blocks [blocks, bytes] of a type have (`TYPES`), to a value or to one for each."""
    halves = np.broadcast_to(np.asarray(values, "<f2"), len(blocks))
    if kind == "IQ1_M":
        grids.put_half_of_iq1_m(blocks, halves)
        return
    at = BY_NAME[kind].halves[which]
    blocks[:, at : at + 2] = np.ascontiguousarray(halves)[:, None].view(np.uint8)


#: Types that values are written in.
WRITTEN = ("F32", "F16", "BF16", "Q8_0")


def quantise(values: F32, kind: str) -> U8:
    """Rows [..., inner] as one of WRITTEN, in bytes. Rounds to nearest, as ggml does."""
    flat = np.ascontiguousarray(values, "<f4").reshape(-1)
    if kind == "F32":
        return flat.view(np.uint8)
    if kind == "F16":
        return flat.astype("<f2").view(np.uint8)
    if kind == "BF16":
        bits = flat.view("<u4")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    if kind != "Q8_0":
        raise ValueError(f"{kind} is not written")
    blocks = flat.reshape(-1, 32)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    scaled = blocks * inverse
    quants = (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))).astype(np.int8)  # halves away from zero, as roundf
    return np.concatenate([d.astype("<f2").view(np.uint8), quants.view(np.uint8)], axis=1).reshape(-1)
