"""One sequence in a file: everything it needs to go on, in this engine or another of the same model, in any slot.

The file is safetensors, all float32: `state`, `columns` and `hidden` as in prefix.Checkpoint, the keys and values of
all positions before, `trunk` and `mtp`, and `rows`, those that the prompt has in place of tokens. Its metadata are
FORMAT, the model's fingerprint, the position, the request with what it has produced (JSON), and a BLAKE2b checksum of
the whole file with the checksum's own digits zero. There is nothing in it to execute. A file that is not wholly what it
should be is refused before anything is changed.

A file appears under its name at once or not at all: it is written beside it under a name nobody else has, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...core.checks import check_ranges, check_stop
from ...core.embeddings import EmbeddingRows, Encoded, Part, lay_out
from ...core.errors import InvalidRequest, ModelFileError, SavedSequenceError
from ...core.files import in_place_of
from ...core.vocabulary import Request, SamplingParams, check_salt, grammar_of
from ..backend import F32
from ..formats import safetensors
from .prefix import Checkpoint, PrefixIndex, Snapshot, position_of

logger = logging.getLogger("forerun")

FORMAT = "forerun sequence 2"
CHECKSUM_DIGITS = 64
#: Far above the header of a request of 262,144 tokens.
MAX_HEADER_BYTES = 8_000_000
#: Seconds after which what a dead process left half written beside a file is removed.
LEFT_BEHIND_SECONDS = 3600.0
ENDING = ".saving"
#: A checkpoint's, of its key.
NAME = re.compile(r"[0-9a-f]{72}\.safetensors")
#: Of keys that did not tell their position: nobody asks for those.
FORMER_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
BLOCK_BYTES = 2**20


def write(path: Path, fingerprint: str, record: str, snapshot: Snapshot) -> None:
    """Puts a sequence in place of whatever `path` held. SavedSequenceError when the system does not let us; `path` is as it was then."""
    metadata = {
        "format": FORMAT, "model": fingerprint, "position": str(snapshot.checkpoint.position), "record": record,
        "checksum": "0" * CHECKSUM_DIGITS,
    }  # fmt: skip
    arrays = [np.ascontiguousarray(array, "<f4") for _, array in sorted(snapshot.arrays.items())]
    header = safetensors.header({name: ("F32", array) for name, array in snapshot.arrays.items()}, metadata)
    digest = hashlib.blake2b(header, digest_size=CHECKSUM_DIGITS // 2)
    for array in arrays:
        digest.update(array.data)
    try:
        _remove_left_behind(path)
        with in_place_of(path, ENDING) as file:
            file.write(_with_checksum(header, digest.hexdigest()))
            for array in arrays:
                file.write(array.data)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise SavedSequenceError(f"{str(path)!r}: cannot be written: {error}") from error


def _with_checksum(header: bytes, checksum: str) -> bytes:
    """The header with other digits for its checksum. ValueError unless there is one checksum in it."""
    start = header.index(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    return header[:start] + checksum.encode("ascii") + header[start + CHECKSUM_DIGITS :]


#: How a header names its checksum. Within a JSON text no quotation mark stands alone, so nothing else in it can look like this.
CHECKSUM_KEY = b'"checksum": "'


def _remove_left_behind(path: Path) -> None:
    """Removes what was left half written beside `path` long ago."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(ENDING):
            other = path.parent / name
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > LEFT_BEHIND_SECONDS:
                    other.unlink()


def check(path: Path, fingerprint: str, blank: Snapshot) -> tuple[int, str, str, int, F32]:
    """Position, record, checksum, bytes and embedding rows of a file that is whole, of this format, and of the model whose sequences are
    shaped like `blank`. SavedSequenceError otherwise. Takes as much memory as the file's header and the rows."""
    with _open(path, fingerprint, blank) as (file, position, metadata, header, shapes):
        digest = hashlib.blake2b(_with_checksum(header, "0" * CHECKSUM_DIGITS), digest_size=CHECKSUM_DIGITS // 2)
        rows = np.empty(shapes["rows"], "<f4")
        for name, shape in sorted(shapes.items()):
            left = 4 * math.prod(shape)
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                if name == "rows":
                    rows.reshape(-1).view(np.uint8)[rows.nbytes - left :][: len(block)] = np.frombuffer(block, np.uint8)
                digest.update(block)
                left -= len(block)
        digest.update(file.read(1))  # there should be no more
        _compare(path, digest.hexdigest(), metadata)
        return position, metadata["record"], metadata["checksum"], file.tell(), rows


def read(path: Path, fingerprint: str, blank: Snapshot, checksum: str | None = None) -> tuple[str, Snapshot]:
    """The record and the sequence of a file that `check` finds right, and whose checksum is `checksum` if that is known."""
    with _open(path, fingerprint, blank) as (file, position, metadata, header, shapes):
        digest = hashlib.blake2b(_with_checksum(header, "0" * CHECKSUM_DIGITS), digest_size=CHECKSUM_DIGITS // 2)
        arrays: dict[str, F32] = {}
        for name, shape in sorted(shapes.items()):
            array = np.empty(shape, "<f4")
            if file.readinto(array.data.cast("B") if array.size else bytearray()) != array.nbytes:
                raise SavedSequenceError(f"{path}: truncated")
            digest.update(array.data)
            arrays[name] = array.astype(np.float32, copy=False)
        _compare(path, digest.hexdigest(), metadata)
        if checksum is not None and metadata["checksum"] != checksum:
            raise SavedSequenceError(f"{path}: is another file than it was a moment ago")
        checkpoint = Checkpoint(position, arrays["state"], arrays["columns"], arrays["hidden"])
        return metadata["record"], Snapshot(checkpoint, arrays["trunk"], arrays["mtp"], arrays["rows"])


@contextmanager
def _open(
    path: Path, fingerprint: str, blank: Snapshot
) -> Generator[tuple[io.BufferedReader, int, dict[str, str], bytes, dict[str, tuple[int, ...]]]]:
    """An open file at its data, its position, metadata, header and shapes, once they are what they should be."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SavedSequenceError(f"{path}: is not a file")
        with path.open("rb") as file:
            tensors, metadata, header = safetensors.read_header(file, path, MAX_HEADER_BYTES)
            if metadata.get("format") != FORMAT:
                raise SavedSequenceError(f"{path}: its format is {metadata.get('format')!r:.50}, expected {FORMAT!r}")
            if metadata.get("model") != fingerprint:
                found = f"{metadata.get('model')!r:.70}, this one is {fingerprint}"
                raise SavedSequenceError(f"{path}: was saved by another model: {found}")
            position, checksum, _ = int(metadata["position"]), metadata["checksum"], metadata["record"]
            shapes = blank.shapes_at(position, tensors["rows"].shape[0])
            if {name: (info.dtype, info.shape) for name, info in tensors.items()} != {n: ("F32", s) for n, s in shapes.items()}:
                raise SavedSequenceError(f"{path}: its arrays are not those of this model at position {position}")
            if len(checksum) != CHECKSUM_DIGITS or header.count(CHECKSUM_KEY + checksum.encode("ascii")) != 1:
                raise SavedSequenceError(f"{path}: is damaged: it has no checksum")
            yield file, position, metadata, header, shapes
    except (OSError, ModelFileError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise SavedSequenceError(f"{str(path)!r}: cannot be read: {error}") from error


def _compare(path: Path, checksum: str, metadata: dict[str, str]) -> None:
    if metadata["checksum"] != checksum:
        raise SavedSequenceError(f"{path}: is damaged: its checksum is not that of its contents")


class PrefixFolder:
    """Checkpoints of prefixes in the files of a folder, one each, named by key; at most `max_bytes`, the longest unused go first. Models do
    not see each other's. Blocking; one thread at a time reads or writes files."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder, self._fingerprint, self._max_bytes = folder / fingerprint[:16], fingerprint, max_bytes
        self._lock = threading.Lock()  # an actor that is ended leaves its work behind
        found: list[tuple[int, str, int]] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                with suppress(OSError):  # it goes just now, or points to nothing
                    status = path.stat()
                    if NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                        found.append((status.st_mtime_ns, path.stem, status.st_size))
                    elif FORMER_NAME.fullmatch(path.name) or (
                        path.name.endswith(ENDING) and time.time() - status.st_mtime > LEFT_BEHIND_SECONDS
                    ):
                        path.unlink()
        except (OSError, ValueError) as error:
            raise SavedSequenceError(f"{folder}: cannot be used: {error}") from error
        self._sizes = {name: size for _, name, size in sorted(found)}  # the longest unused first
        self._make_room(0)

    def __contains__(self, key: bytes) -> bool:
        return key.hex() in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def positions(self) -> set[int]:
        """Of its checkpoints."""
        return {position_of(bytes.fromhex(name)) for name in self._sizes}

    def size(self, key: bytes) -> int:
        return self._sizes[key.hex()]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def load(self, key: bytes, position: int, blank: Snapshot) -> Snapshot:
        """SavedSequenceError when the file is damaged or not what its name says, which is then removed."""
        with self._lock:
            return self._load(key.hex(), position, blank)

    def _load(self, name: str, position: int, blank: Snapshot) -> Snapshot:
        try:
            record, snapshot = read(self._path(name), self._fingerprint, blank)
            if (record, snapshot.checkpoint.position) != (name, position):
                raise SavedSequenceError(f"{self._path(name)}: is of another prefix than its name says")
        except SavedSequenceError:
            self._remove(name)
            raise
        with suppress(OSError):
            os.utime(self._path(name))
        self._sizes[name] = self._sizes.pop(name)
        return snapshot

    def store(self, key: bytes, snapshot: Snapshot) -> None:
        """Does nothing when there can be no room. SavedSequenceError when the system does not let us."""
        with self._lock:
            self._store(key, snapshot)

    def _store(self, key: bytes, snapshot: Snapshot) -> None:
        name, size = key.hex(), snapshot.num_bytes + 4096
        if name not in self._sizes and size <= self._max_bytes:
            self._make_room(size)
            write(self._path(name), self._fingerprint, name, snapshot)
            self._sizes[name] = size

    def store_all(self, prefixes: PrefixIndex) -> None:
        """Stores what the index still has, the most valuable first, as far as there is room; what cannot be written is left out."""
        with self._lock:
            for entry in prefixes.entries:
                try:
                    if entry.key not in self and prefixes.num_bytes(entry) + 4096 < self._max_bytes - sum(self._sizes.values()):
                        self._store(entry.key, prefixes.snapshot(entry))
                except (SavedSequenceError, MemoryError) as error:
                    logger.warning("checkpoints are forgotten: %s", error)
                    return

    def _make_room(self, size: int) -> None:
        while self._sizes and sum(self._sizes.values()) + size > self._max_bytes:
            self._remove(next(iter(self._sizes)))

    def _remove(self, name: str) -> None:
        self._sizes.pop(name, None)
        with suppress(OSError):
            self._path(name).unlink()


def record_of(request: Request, output: Sequence[int]) -> str:
    """A request, and the tokens it has produced, as JSON; all but the embedding rows themselves."""
    values = asdict(replace(request, embeddings=()))
    del values["request_id"], values["vocabulary"]
    values["embeddings"] = [(start, len(rows), rows.coordinates) for start, rows in request.embeddings]
    for name in ("stop_ids", "boundary_ids"):
        values[name] = sorted(values[name])
    return json.dumps(values | {"output_ids": list(output)})


def parse_record(record: str, rows: F32, request_id: str, vocabulary: int, context: int) -> tuple[Request, tuple[int, ...]]:
    """The request under a new id, with the embedding rows that were saved with it, and what it had produced. SavedSequenceError unless
    this model could have been asked for it."""
    try:
        values: Any = json.loads(record)
        ids = {name: tuple(cast("list[int]", values.pop(name))) for name in ("prompt_ids", "output_ids", "stop_ids", "boundary_ids")}
        prompt = _laid_out(ids["prompt_ids"], values.pop("embeddings"), rows)
        for name, tokens in (ids | {"prompt_ids": tuple(prompt.token_ids)}).items():
            if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
                raise ValueError(f"{name} are not all token ids of this model")
        chosen: Any = values.pop("sampling")
        chosen["logit_bias"] = tuple((token, bias) for token, bias in chosen["logit_bias"])
        sampling = SamplingParams(**chosen)
        max_tokens, salt, stops = values.pop("max_tokens"), values.pop("cache_salt"), tuple(values.pop("stop"))
        numbers = {"max_tokens": max_tokens, "num_logprobs": values.pop("num_logprobs")}
        opens_reasoning, grammar = values.pop("opens_reasoning", False) is True, values.pop("grammar", None)
        if grammar is not None and (grammar := grammar_of({grammar["kind"]: grammar["text"]})) is None:
            raise ValueError("its grammar is of no known kind")
        if values or max_tokens is None or check_ranges(numbers) or check_salt(salt) or salt is None or check_stop(stops):
            raise ValueError(f"max_tokens, cache_salt or {sorted(values)} are not as expected")
        if not ids["prompt_ids"] or not 0 < len(ids["output_ids"]) < max_tokens or len(ids["prompt_ids"]) + max_tokens > context:
            raise ValueError("prompt and answer are longer than they could have been")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest) as error:
        raise SavedSequenceError(f"the saved request makes no sense: {error}") from None
    stop_ids, boundary_ids = frozenset(ids["stop_ids"]), frozenset(ids["boundary_ids"])
    rest = numbers["num_logprobs"], prompt.embeddings, opens_reasoning, grammar
    request = Request(request_id, prompt.ids, max_tokens, sampling, stop_ids, vocabulary, boundary_ids, salt, stops, *rest)
    return request, ids["output_ids"]


def _laid_out(ids: tuple[int, ...], embeddings: Any, rows: F32) -> Encoded:
    """A prompt as it was, `embeddings` being (start, number of rows, coordinates) of each part that has rows. ValueError when it was
    not."""
    parts: list[Part] = []
    position = taken = 0
    for start, count, coordinates in embeddings:
        if type(start) is not int or type(count) is not int or start < position or count < 1:
            raise ValueError("embedding rows are not where they could be")
        part = EmbeddingRows(rows[taken : taken + count].tobytes(), rows.shape[1], coordinates)
        if len(part) != count or part.check("rows"):
            raise ValueError("embedding rows are not as they could be")
        parts += [list(ids[position:start]), part]
        position, taken = start + count, taken + count
    prompt = lay_out([*parts, list(ids[position:])])
    if taken != len(rows) or prompt.ids != ids or not np.isfinite(rows).all():
        raise ValueError("embedding rows are not those of the prompt")
    return prompt
