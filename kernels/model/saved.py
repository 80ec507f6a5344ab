"""One sequence in a file: everything it needs to go on, in this engine or another of the same model, in any slot.

The file is safetensors, all float32: `state`, `columns` and `hidden` as in prefix.Checkpoint, and the keys and values of all
positions before, `trunk` and `mtp`. Its metadata are FORMAT, the model's fingerprint, the position, the request with what it
has produced (JSON), and a BLAKE2b checksum of the whole file with the checksum's own digits zero. There is nothing in it
to execute. A file that is not wholly what it should be is refused before anything is changed.

A file appears under its name at once or not at all: it is written beside it, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...core.errors import InvalidRequest, ModelFileError, SavedSequenceError
from ...core.vocabulary import Request, SamplingParams, check_ranges, check_salt
from ..backend import F32
from ..formats import safetensors
from .prefix import Checkpoint, PrefixIndex, Snapshot

logger = logging.getLogger("forerun")

FORMAT = "forerun sequence 1"
NO_CHECKSUM = "0" * 64


def write(path: Path, fingerprint: str, record: str, snapshot: Snapshot) -> None:
    """Puts a sequence in place of whatever `path` held. SavedSequenceError when the system does not let us; `path` is as it was then."""
    metadata = {
        "format": FORMAT, "model": fingerprint, "position": str(snapshot.checkpoint.position), "record": record, "checksum": NO_CHECKSUM,
    }  # fmt: skip
    arrays = [array for _, array in sorted(snapshot.arrays.items())]
    header = safetensors.header({name: ("F32", array) for name, array in snapshot.arrays.items()}, metadata)
    whole = header.replace(NO_CHECKSUM.encode(), _checksum(header, arrays).encode())
    mine = path.with_name(f".{path.name}.{os.getpid()}.saving")
    try:
        _remove_left_behind(path)
        with open(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(whole)
            for array in arrays:
                file.write(np.ascontiguousarray(array, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
        mine.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            mine.unlink()
        raise SavedSequenceError(f"{path}: cannot be written: {error.strerror}") from error


def read(path: Path, fingerprint: str) -> tuple[str, Snapshot, str]:
    """The record, the sequence and the checksum of a file. SavedSequenceError unless it is whole, of this format, and of this model."""
    try:
        file = safetensors.SafetensorsFile(path)
    except ModelFileError as error:
        raise SavedSequenceError(str(error)) from None
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise SavedSequenceError(f"{path}: its format is {metadata.get('format')!r:.50}, expected {FORMAT!r}")
    if metadata.get("model") != fingerprint:
        raise SavedSequenceError(f"{path}: was saved by another model: {metadata.get('model')!r:.70}, this one is {fingerprint}")
    try:
        arrays = {name: file.read(name) for name in ("state", "columns", "hidden", "trunk", "mtp")}
        position, record, checksum = int(metadata["position"]), metadata["record"], metadata["checksum"]
    except (KeyError, ValueError) as error:
        raise SavedSequenceError(f"{path}: {error} is missing or wrong") from None
    header = file.header.replace(checksum.encode(), NO_CHECKSUM.encode())
    if len(checksum) != len(NO_CHECKSUM) or checksum != _checksum(header, [array for _, array in sorted(arrays.items())]):
        raise SavedSequenceError(f"{path}: is damaged: its checksum is not that of its contents")
    checkpoint = Checkpoint(position, arrays["state"], arrays["columns"], arrays["hidden"])
    return record, Snapshot(checkpoint, arrays["trunk"], arrays["mtp"]), checksum


def _checksum(header: bytes, arrays: Sequence[F32]) -> str:
    digest = hashlib.blake2b(header, digest_size=32)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, "<f4").data)
    return digest.hexdigest()


def _remove_left_behind(path: Path) -> None:
    """Removes what processes that have died in the middle of saving left beside `path`."""
    for other in path.parent.glob(f".{path.name}.*.saving"):
        pid = other.name.removesuffix(".saving").rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue  # alive, another user's, or not ours


class PrefixFolder:
    """Checkpoints of prefixes in the files of a folder, one each, named by key; at most `max_bytes`, the longest unused go first. Models do
    not see each other's. Blocking, and for one user at a time."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder, self._fingerprint, self._max_bytes = folder / fingerprint[:16], fingerprint, max_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files = sorted(((path.stat(), path) for path in self._folder.glob("*.safetensors")), key=lambda each: each[0].st_mtime_ns)
        except OSError as error:
            raise SavedSequenceError(f"{folder}: cannot be used: {error.strerror}") from error
        self._sizes = {path.stem: stat.st_size for stat, path in files}  # the longest unused first

    def __contains__(self, key: bytes) -> bool:
        return key.hex() in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def load(self, key: bytes, blank: Snapshot) -> Snapshot:
        """SavedSequenceError when the file is damaged, which is then removed."""
        name = key.hex()
        try:
            _, snapshot, _ = read(self._path(name), self._fingerprint)
            if not snapshot.fits(blank):
                raise SavedSequenceError(f"{self._path(name)}: its arrays have other shapes than this model's")
            with suppress(OSError):
                os.utime(self._path(name))
        except SavedSequenceError:
            self._remove(name)
            raise
        self._sizes[name] = self._sizes.pop(name)
        return snapshot

    def store(self, key: bytes, snapshot: Snapshot) -> None:
        """SavedSequenceError when the system does not let us."""
        name = key.hex()
        if name not in self._sizes:
            write(self._path(name), self._fingerprint, "", snapshot)
            self._sizes[name] = self._path(name).stat().st_size
        while sum(self._sizes.values()) > self._max_bytes:
            self._remove(next(iter(self._sizes)))

    def store_all(self, prefixes: PrefixIndex) -> None:
        """Stores what the index still has, the most valuable first, as far as there is room; what cannot be written is left out."""
        for entry in prefixes.entries:
            room = self._max_bytes - sum(self._sizes.values())
            try:
                if entry.key not in self and (snapshot := prefixes.snapshot(entry)).num_bytes < room:
                    self.store(entry.key, snapshot)
            except SavedSequenceError as error:
                logger.warning("checkpoints are forgotten: %s", error)
                return

    def _remove(self, name: str) -> None:
        self._sizes.pop(name, None)
        with suppress(OSError):
            self._path(name).unlink()


def record_of(request: Request, output: Sequence[int]) -> str:
    """A request, and the tokens it has produced, as JSON."""
    values = asdict(request)
    del values["request_id"], values["vocabulary"]
    for name in ("stop_ids", "boundary_ids"):
        values[name] = sorted(values[name])
    return json.dumps(values | {"output_ids": list(output)})


def parse_record(record: str, request_id: str, vocabulary: int, context: int) -> tuple[Request, tuple[int, ...]]:
    """The request under a new id, and what it had produced. SavedSequenceError unless this model could have been asked for it."""
    try:
        values: Any = json.loads(record)
        ids = {name: tuple(cast("list[int]", values.pop(name))) for name in ("prompt_ids", "output_ids", "stop_ids", "boundary_ids")}
        for name, tokens in ids.items():
            if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
                raise ValueError(f"{name} are not all token ids of this model")
        sampling, max_tokens, salt = SamplingParams(**values.pop("sampling")), values.pop("max_tokens"), values.pop("cache_salt")
        if values or max_tokens is None or check_ranges({"max_tokens": max_tokens}) or check_salt(salt) or salt is None:
            raise ValueError(f"max_tokens, cache_salt or {sorted(values)} are not as expected")
        if not ids["prompt_ids"] or not 0 < len(ids["output_ids"]) < max_tokens or len(ids["prompt_ids"]) + max_tokens > context:
            raise ValueError("prompt and answer are longer than they could have been")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest) as error:
        raise SavedSequenceError(f"the saved request makes no sense: {error}") from None
    stop, boundary = frozenset(ids["stop_ids"]), frozenset(ids["boundary_ids"])
    return Request(request_id, ids["prompt_ids"], max_tokens, sampling, stop, vocabulary, boundary, salt), ids["output_ids"]
