"""Reads and writes GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 2 and 3, little endian.

    "GGUF", version u32, number of tensors u64, number of key-values u64
    key-values: key (u64 length, bytes), type u32, value; an array is its elements' type u32, their number u64, and they
    tensors: name, number of dimensions u32, dimensions u64 (the innermost first), type u32, offset u64
    padding to the alignment, then the data; offsets count from here

Ours, because a file is not trusted: every count and length is compared with the bytes that are left before anything is
allocated. The data is memory-mapped, and a tensor is read when it is asked for. The formulas of the quantised types are
those of ggml (`ggml-quants.c`, `dequantize_row_*`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ...core.errors import ModelFileError
from ..backend import F32

U8 = npt.NDArray[np.uint8]
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 65_536
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65_535
#: value type -> struct format; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """`shape` has the outermost dimension first; `begin` and `end` are bytes of the data."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


# Quantised types. Blocks [blocks, bytes] to values [blocks, values].


def _half(raw: U8) -> F32:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _f32(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _bf16(blocks: U8) -> F32:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: U8) -> F32:
    return cast("F32", _half(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32))


def _q4_0(blocks: U8) -> F32:
    quants = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    return cast("F32", _half(blocks[:, :2]) * (quants - np.float32(8)))


def _scales_k4(raw: U8) -> tuple[F32, F32]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes: [blocks, 8] each."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: U8) -> F32:
    scales, minima = _scales_k4(blocks[:, 4:16])
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    quants = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    return _with_minima(blocks, scales, minima, quants.astype(np.float32))


def _q5_k(blocks: U8) -> F32:
    scales, minima = _scales_k4(blocks[:, 4:16])
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _with_minima(blocks, scales, minima, (low | high << 4).astype(np.float32))


def _with_minima(blocks: U8, scales: F32, minima: F32, quants: F32) -> F32:
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return cast("F32", ((d * scales)[:, :, None] * quants - (dmin * minima)[:, :, None]).reshape(len(blocks), -1))


def _q6_k(blocks: U8) -> F32:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quants = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    quants |= (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    d = _half(blocks[:, 208:])
    values = (quants.astype(np.float32) - np.float32(32)).reshape(-1, 16, 16)
    return cast("F32", ((d * scales)[:, :, None] * values).reshape(len(blocks), -1))


class _Type(NamedTuple):
    name: str
    block: int  # values
    size: int  # bytes
    read: Callable[[U8], F32]


TYPES = {
    0: _Type("F32", 1, 4, _f32), 1: _Type("F16", 1, 2, _half), 30: _Type("BF16", 1, 2, _bf16), 2: _Type("Q4_0", 32, 18, _q4_0),
    8: _Type("Q8_0", 32, 34, _q8_0), 12: _Type("Q4_K", 256, 144, _q4_k), 13: _Type("Q5_K", 256, 176, _q5_k),
    14: _Type("Q6_K", 256, 210, _q6_k),
}  # fmt: skip
BY_NAME = {each.name: each for each in TYPES.values()}


class _Cursor:
    """Goes through bytes that are not trusted."""

    def __init__(self, raw: U8, path: Path) -> None:
        self._raw, self._path, self.at = raw, path, 0

    def fail(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: at byte {self.at}: {problem}")

    def need(self, count: int, what: str) -> None:
        if count > len(self._raw) - self.at:
            raise self.fail(f"truncated: {what} needs {count} bytes, {len(self._raw) - self.at} are left")

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize("<" + form)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + form, self._raw.data, self.at)
        self.at += size
        return value

    def text(self, what: str, max_bytes: int = 2**31) -> str:
        size = self.number("Q", what)
        if size > max_bytes:
            raise self.fail(f"{what} of {size} bytes is longer than {max_bytes}")
        self.need(size, what)
        raw = self._raw[self.at : self.at + size].tobytes()
        self.at += size
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind != ARRAY:
            raise self.fail(f"{key}: value type {kind} is unknown")
        inner, count = self.number("I", key), self.number("Q", key)
        if inner == STRING:
            self.need(8 * count, key)
            return [self.text(key) for _ in range(count)]
        if inner not in SCALARS:
            raise self.fail(f"{key}: an array of type {inner} is not supported")
        size = struct.calcsize("<" + SCALARS[inner])
        self.need(size * count, key)
        values = np.frombuffer(self._raw, "<" + SCALARS[inner], count, self.at).tolist()
        self.at += size * count
        return values


class GgufFile:
    """One open file: `metadata` by key, `tensors` by name; `read` returns float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            self._raw: U8 = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path}: cannot be read: {error}") from error
        cursor = _Cursor(self._raw, path)
        cursor.need(24, "a GGUF file")
        if self._raw[:4].tobytes() != MAGIC:
            raise ModelFileError(f"{path}: is no GGUF file: it begins with {self._raw[:4].tobytes()!r}")
        cursor.at = 4
        version, num_tensors, num_values = cursor.number("I", "version"), cursor.number("Q", "tensors"), cursor.number("Q", "values")
        if version not in VERSIONS:
            raise ModelFileError(f"{path}: GGUF version {version} is not one of {VERSIONS} (or the file is big endian)")
        cursor.need(num_tensors * 24 + num_values * 13, f"{num_tensors} tensors and {num_values} key-values")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text("a key", MAX_NAME_BYTES)
            if key in self.metadata:
                raise cursor.fail(f"key {key!r:.80} appears twice")
            self.metadata[key] = cursor.value(cursor.number("I", key), key)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ModelFileError(f"{path}: general.alignment: expected a power of two, got {alignment!r:.50}")
        self.tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = cursor.text("a tensor's name", MAX_NAME_BYTES)
            if name in self.tensors:
                raise cursor.fail(f"tensor {name!r:.80} appears twice")
            self.tensors[name] = self._tensor(cursor, name, alignment)
        self._start = -(-cursor.at // alignment) * alignment
        num_bytes, end, before = size - self._start, 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin < end:
                raise ModelFileError(f"{path}: tensors {before} and {name} overlap")
            if tensor.end > num_bytes:
                raise ModelFileError(f"{path}: tensor {name} is truncated: it ends at byte {tensor.end} of {num_bytes}")
            end, before = tensor.end, name

    @staticmethod
    def _tensor(cursor: _Cursor, name: str, alignment: int) -> GgufTensor:
        num_dimensions = cursor.number("I", name)
        if not 0 < num_dimensions <= MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name}: {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        dimensions = [cursor.number("Q", name) for _ in range(num_dimensions)]
        number, offset = cursor.number("I", name), cursor.number("Q", name)
        if number not in TYPES:
            raise cursor.fail(f"tensor {name}: type {number} is not one of {', '.join(BY_NAME)}")
        kind, count = TYPES[number], 1
        for n in dimensions:
            count *= n
        if not count or dimensions[0] % kind.block:
            raise cursor.fail(f"tensor {name}: {dimensions} are no whole blocks of {kind.block} values of {kind.name}")
        if offset % alignment:
            raise cursor.fail(f"tensor {name}: offset {offset} is no multiple of the alignment {alignment}")
        return GgufTensor(kind.name, tuple(dimensions[::-1]), offset, offset + count // kind.block * kind.size)

    def raw(self, name: str) -> U8:
        """A tensor's bytes, in the file."""
        tensor = self.tensors[name]
        return self._raw[self._start + tensor.begin : self._start + tensor.end]

    def read(self, name: str) -> F32:
        """A tensor as float32."""
        tensor = self.tensors[name]
        kind = BY_NAME[tensor.type]
        return kind.read(self.raw(name).reshape(-1, kind.size)).reshape(tensor.shape)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata. ModelFileError unless it is of a type, or missing where there is a default."""
        value = self.metadata.get(key, default)
        if value is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
            raise ModelFileError(f"{self.path}: {key}: expected {expected}, got {value!r:.50}")
        return value


# Writing


def quantise(values: F32, kind: str) -> U8:
    """Rows [..., inner] as F32, F16, BF16 or Q8_0, in bytes. Rounds to nearest, as ggml does."""
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


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    """Type and value. Whole numbers are u32, or i32 in arrays; numbers f32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    values = cast("list[Any]", value)
    if all(isinstance(each, str) for each in values):
        return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(_text, values))
    return struct.pack(f"<IIQ{len(values)}i", ARRAY, 5, len(values), *values)


def write(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, tuple[str, Callable[[], F32]]]) -> None:
    """Writes name -> (type, what makes its values), one tensor in memory at a time, in place of whatever `path` held."""
    numbers = {kind.name: number for number, kind in TYPES.items()}
    header, infos = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)), b""
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    mine = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with mine.open("wb") as data:
            offset = 0
            for name, (kind, make) in tensors.items():
                values = make()
                raw = quantise(values, kind)
                shape = values.shape[::-1]
                infos += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, numbers[kind], offset)
                offset += _put(data, raw)
        with mine.open("rb") as data, path.open("wb") as file:
            _put(cast(BinaryIO, file), np.frombuffer(header + infos, np.uint8))
            while block := data.read(2**20):
                file.write(block)
    finally:
        mine.unlink(missing_ok=True)


def _put(file: BinaryIO, raw: U8) -> int:
    padding = -len(raw) % DEFAULT_ALIGNMENT
    file.write(raw.tobytes() + b"\0" * padding)
    return len(raw) + padding
