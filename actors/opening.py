"""open_engine: what may be said of an engine, checked, and what holds where nothing is said."""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import anyio

from ..core.checks import check_ranges
from ..core.errors import InvalidRequest
from ..core.speculation import SpeculationOptions, SpeculationParams, parse_spec_type
from ..kernels.model.memory import MemoryParams, blank
from ..kernels.model.memory import num_pages as pages_of
from ..kernels.model.recurrent import STORES, StoreName
from ..kernels.model.saved import PrefixFolder
from ..kernels.model.weights import Progress
from .engine import Engine, run_engine
from .lookup.family import CountsFamily
from .model import Model, load_model
from .tree import EngineParams

#: Positions that each slot has pages for by default, when the context is longer.
PAGED_CONTEXT = 8192
#: Tokens that the prompts of those who wait may have by default.
QUEUE_TOKENS = 4_000_000
#: Bytes of checkpoints kept by default: so many for each slot, and no fewer bytes than that.
CHECKPOINTS_PER_SLOT, PREFIX_BYTES = 2, 256 * 2**20
#: Bytes of checkpoints kept in files by default, where a folder is given.
FOLDER_BYTES = 8 * 2**30
#: Seconds a request waits for memory before others are pre-empted for it, by default.
PREEMPT_AFTER_SECONDS = 20.0


@asynccontextmanager
async def open_engine(
    model: str | Path | Model = "demo",
    *,
    spec_type: str | None = None,
    num_slots: int = 8,
    num_pages: int | None = None,
    queue_size: int = 256,
    queue_tokens: int = QUEUE_TOKENS,
    prefix_bytes: int | None = None,
    prefix_folder: str | Path | None = None,
    folder_bytes: int = FOLDER_BYTES,
    recurrent_store: StoreName = "log",
    preempt_after_seconds: float | None = PREEMPT_AFTER_SECONDS,
    overlap: bool = True,
    backend: str | None = None,
    num_threads: int | None = None,
    load_progress: Progress | None = None,
    **speculation: Unpack[SpeculationOptions],
) -> AsyncGenerator[Engine]:
    """A running engine for a shipped model's name, a Hugging Face folder, or a model already loaded.

    `spec_type` is `none` or a comma list of DRAFTERS; by default `ngram-suffix`, and `draft-mtp` if the model has that head. What else
    can be said of speculation: SpeculationParams.
    `num_slots` requests run at once, `queue_size` more wait, with prompts of `queue_tokens` in all. They share `num_pages` pages of 64
    positions, by default as many as all of them need for the context, or for PAGED_CONTEXT positions if that is less. `prefix_bytes` of
    checkpoints let requests go on from what others with the same beginning have computed (and the same `cache_salt`); by default two for
    each slot, or PREFIX_BYTES if that is more; 0 keeps none. What
    does not fit goes into at most `folder_bytes` of files in `prefix_folder`, if there is one, and so does everything at the end.
    `recurrent_store` is `log`, or `snapshots`: the same tokens, more memory for a draft. For a request that has waited
    `preempt_after_seconds` (None: however long) the newest that have run as long are pre-empted, once each, and go on later with the same
    tokens. `overlap=False` does one thing at a time, in the event loop: the same tokens, for comparison. A model loaded here computes on
    `backend` with `num_threads`: see load_model.
    Leaving the block ends what still runs with EngineClosed.
    Raises ModelFileError, InvalidRequest, SavedSequenceError if `prefix_folder` cannot be used; at the end, EngineDead if an actor
    failed beyond repair and the block did not raise."""
    sizes: dict[str, object] = {
        "num_slots": num_slots, "queue_size": queue_size, "queue_tokens": queue_tokens, "folder_bytes": folder_bytes,
    }  # fmt: skip
    others = {"num_pages": num_pages, "prefix_bytes": prefix_bytes, "preempt_after_seconds": preempt_after_seconds}
    if violations := check_ranges(sizes | others) or [(name, "must be given") for name in sizes if sizes[name] is None]:
        raise InvalidRequest(violations)
    if recurrent_store not in STORES:
        raise InvalidRequest([("recurrent_store", f"must be one of {', '.join(STORES)}, got {recurrent_store!r:.50}")])
    types = None if spec_type is None else parse_spec_type(spec_type)
    if unknown := speculation.keys() - SpeculationOptions.__annotations__.keys():
        raise TypeError(f"open_engine() got an unexpected keyword argument {min(unknown)!r}")
    params = SpeculationParams(**speculation)  # pyright: ignore[reportArgumentType] - checked there
    if isinstance(model, str | Path):
        name = str(model)
        model = await anyio.to_thread.run_sync(lambda: load_model(name, load_progress, backend=backend, num_threads=num_threads))
    if types is None:
        types = parse_spec_type("draft-mtp,ngram-suffix" if model.has_mtp else "ngram-suffix")
    if "draft-mtp" in types and not model.has_mtp:
        raise InvalidRequest([("spec_type", f"{model.name} has no MTP head")])
    if "ngram-cache" in types:  # ModelFileError now, rather than in an actor
        await anyio.to_thread.run_sync(CountsFamily, params, model.num_token_ids)
    if num_pages is None:
        max_rows = 1 + max(map(params.limit, types), default=0)
        num_pages = num_slots * pages_of(min(model.context, PAGED_CONTEXT), max_rows)
    if prefix_bytes is None:
        prefix_bytes = max(CHECKPOINTS_PER_SLOT * num_slots * blank(model.memory(), recurrent_store).checkpoint.num_bytes, PREFIX_BYTES)
    memory = MemoryParams(num_slots, num_pages, prefix_bytes, recurrent_store, is_archived=prefix_folder is not None)
    folder: PrefixFolder | None = None
    if prefix_folder is not None:
        bits = hashlib.sha256(f"{model.fingerprint} {model.instructions}".encode()).hexdigest()
        folder = await anyio.to_thread.run_sync(PrefixFolder, Path(prefix_folder), bits, folder_bytes)
    patience = math.inf if preempt_after_seconds is None else preempt_after_seconds
    every = EngineParams(replace(params, types=types), memory, queue_size, overlap, patience, queue_tokens, folder)
    async with run_engine(model, every) as engine:
        yield engine
