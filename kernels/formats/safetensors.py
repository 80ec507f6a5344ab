"""Reads and writes safetensors files (https://huggingface.co/docs/safetensors, "Format").

    8 bytes   N, little endian: length of the header
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest  tensor data; offsets count from here; together they cover it without gap or overlap

Ours, because the safetensors package reads bfloat16 only through torch. Every length is checked against the bytes there
are before anything is allocated; the file is memory-mapped, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ...core.errors import ModelFileError
from ..backend import F32
from .stored import Stored

#: safetensors' own limit (100 MB), far above any real header
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
#: dtype name -> NumPy dtype of its raw bytes. BF16 has none: it is the upper half of a float32.
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """`tensors` by name, `metadata`, and all bytes before the data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: BinaryIO, path: Path, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Of a file open at its start, which is left at its data. ModelFileError, with the name `path`, unless all is as it should be."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, max_bytes):
        raise ModelFileError(f"{path}: truncated: {size} bytes cannot hold its header of {length}, or that is too long")
    raw = file.read(length)
    try:
        header: Any = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is not a JSON object")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name, entry in cast("dict[str, Any]", header).items():
        if name != "__metadata__":
            tensors[name] = _check(path, name, entry, size - 8 - length)
        elif not isinstance(entry, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", entry).values()):
            raise ModelFileError(f"{path}: __metadata__: expected an object of texts")
        else:
            metadata = cast("dict[str, str]", entry)
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if info.begin != end:
            raise ModelFileError(f"{path}: tensor {name} begins at {info.begin}, expected {end} (gap or overlap)")
        end = info.end
    if end != size - 8 - length:
        raise ModelFileError(f"{path}: tensors end at {end}, the file holds {size - 8 - length} bytes of data")
    return Header(tensors, metadata, prefix + raw)


def _check(path: Path, name: str, entry: Any, num_data_bytes: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ModelFileError(f"{where}: needs dtype, shape and data_offsets, got {str(entry)[:200]}") from None
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ModelFileError(f"{where}: shape and data_offsets must be whole numbers, and there may be {MAX_DIMENSIONS} dimensions")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFileError(f"{where}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    count = 1
    for n in shape:
        count *= n
    if end > num_data_bytes:
        raise ModelFileError(f"{where}: truncated: ends at byte {end} of {num_data_bytes}")
    if end - begin != count * DTYPES[dtype].itemsize:
        raise ModelFileError(f"{where}: shape {list(shape)} of {dtype} does not fill bytes {begin} to {end}")
    return TensorInfo(dtype, shape, begin, end)


class SafetensorsFile:
    """One open file. `tensors` maps names to what the header says; `read` returns float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                header = read_header(file, path)
                has_data = bool(file.read(1))
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
        self.tensors = header.tensors
        self._data = np.memmap(path, np.uint8, "r", len(header.raw)) if has_data else np.zeros(0, np.uint8)

    def stored(self, name: str) -> Stored:
        """A tensor as it is in the file; it has at least one dimension."""
        info = self.tensors[name]
        return Stored(info.dtype, info.shape[-1], self.raw(name).reshape(*info.shape[:-1], -1))

    def read(self, name: str) -> F32:
        """Tensor `name` as float32, exactly: f16 and bf16 are subsets of it."""
        return self.stored(name).values()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, in the file."""
        return self._data[self.tensors[name].begin : self.tensors[name].end]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key appears twice")
    return keys


def header(tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """All that precedes the data of name -> (dtype, raw array of DTYPES[dtype]), which follow in order of name."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, array) in sorted(tensors.items()):
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write(path: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
    """Writes name -> (dtype, raw array of DTYPES[dtype])."""
    with path.open("wb") as file:
        file.write(header(tensors))
        for _, (dtype, array) in sorted(tensors.items()):
            file.write(np.ascontiguousarray(array, DTYPES[dtype]).tobytes())
