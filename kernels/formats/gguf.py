"""Reads and writes GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 2 and 3, little endian.

    "GGUF", version u32, number of tensors u64, number of key-values u64
    key-values: key (u64 length, bytes), type u32, value; an array is its elements' type u32, their number u64, and they
    tensors: name, number of dimensions u32, dimensions u64 (the innermost first), type u32, offset u64
    padding to the alignment, then the data; offsets count from here

Ours, because a file is not trusted: every count and length is compared with the bytes that are left before anything is
allocated. The data is memory-mapped, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from ...core.errors import ModelFileError
from ..backend import F32
from .stored import BY_NAME, TYPES, U8, Stored, quantise

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 65_536
MAX_DIMENSIONS = 4
MAX_PARTS = 1000
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
    """One open file, or the first part of one and all its others (`NAME-00001-of-00003.gguf`, gguf-split): `metadata` by key, `tensors`
    by name; `read` returns float32."""

    def __init__(self, path: Path, part: int = 0) -> None:
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
        self._parts: dict[str, GgufFile] = {}  # that hold tensors, but for this one
        number, count = self.metadata.get("split.no", 0), self.metadata.get("split.count", 1)
        if type(number) is not int or type(count) is not int or number != part or not number < count <= MAX_PARTS:
            raise ModelFileError(f"{path}: split.no: expected {part} of at most {MAX_PARTS} parts, got {number!r:.20} of {count!r:.20}")
        for i in range(1, count if not part else 0):
            self._add(GgufFile(path.with_name(f"{self._name_of_parts(count)}-{i + 1:05}-of-{count:05}.gguf"), i))

    def _name_of_parts(self, count: int) -> str:
        name = self.path.name.removesuffix(f"-00001-of-{count:05}.gguf")
        if name == self.path.name:
            raise ModelFileError(f"{self.path}: is the first of {count} parts, but its name does not end with -00001-of-{count:05}.gguf")
        return name

    def _add(self, part: GgufFile) -> None:
        if twice := self.tensors.keys() & part.tensors.keys():
            raise ModelFileError(f"{part.path}: tensor {min(twice)} is in another part too")
        self.tensors |= part.tensors
        self._parts |= dict.fromkeys(part.tensors, part)

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
        if name in self._parts:
            return self._parts[name].raw(name)
        tensor = self.tensors[name]
        return self._raw[self._start + tensor.begin : self._start + tensor.end]

    def stored(self, name: str) -> Stored:
        """A tensor as it is in the file."""
        tensor = self.tensors[name]
        return Stored(tensor.type, tensor.shape[-1], self.raw(name).reshape(*tensor.shape[:-1], -1))

    def read(self, name: str) -> F32:
        """A tensor as float32."""
        return self.stored(name).values()

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata. ModelFileError unless it is of a type, or missing where there is a default."""
        value = self.metadata.get(key, default)
        if value is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
            raise ModelFileError(f"{self.path}: {key}: expected {expected}, got {value!r:.50}")
        return value


# Writing


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
