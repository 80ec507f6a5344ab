"""A loaded model, as the engine sees it: what it can make for its actors, and what its files say about requests."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..core.checks import check_ranges
from ..core.errors import InvalidRequest, ModelFileError
from ..kernels.backends import AnyBackend, make_backend, make_head, make_memory, make_trunk
from ..kernels.formats.gguf import GgufFile
from ..kernels.model.config import load_config, read_json
from ..kernels.model.gguf_names import GgufCheckpoint, find_sidecar, gguf_config
from ..kernels.model.memory import MemoryMaker
from ..kernels.model.synthetic import SyntheticCheckpoint, size_of
from ..kernels.model.weights import FolderCheckpoint, ModelWeights, Progress, load_weights
from .hub import REPOSITORY, fetch
from .mtp_drafter import DraftHead
from .target_decoder import Target
from .tokenizer import Vocabulary
from .vocabularies import folder_vocabulary, gguf_stop_ids, gguf_vocabulary

logger = logging.getLogger("forerun")

SHIPPED = {"demo": Path(__file__).parents[1] / "kernels" / "model" / "demo"}


#: What generation_config.json says of sampling, and what GGUF files call it (after `general.sampling.`).
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it says nothing: the model's generation_config.json or general.sampling, else greedy."""

    stop_ids: frozenset[int]
    sampling: dict[str, float]

    @staticmethod
    def load(folder: Path) -> Defaults:
        path = folder / "generation_config.json"
        values = read_json(path) if path.exists() else {}
        config = read_json(folder / "config.json")
        found: list[Any] = [source.get("eos_token_id") for source in (values, config, config.get("text_config") or {})]
        stop: Any = next((each for each in found if each is not None), None)
        stop = cast("list[Any]", [] if stop is None else stop if isinstance(stop, list) else [stop])
        if not all(type(token) is int for token in stop):
            raise ModelFileError(f"{path}: eos_token_id: expected token ids, got {stop!r}")
        sampling: dict[str, float] = {"temperature": 0.0}
        if values.get("do_sample") is True:
            sampling = {"temperature": 1.0} | {k: v for k in SAMPLING if (v := values.get(k)) is not None}
        return Defaults(frozenset[int](stop), _checked(path, sampling))

    @staticmethod
    def of_gguf(file: GgufFile) -> Defaults:
        """Greedy where no temperature is said, and what is out of range is left out: it is a default, and no reason to refuse a model."""
        sampling: dict[str, float] = {"temperature": 0.0}
        for name, key in SAMPLING.items():
            value = file.metadata.get(f"general.sampling.{key}")
            if isinstance(value, float):  # of 32 bits, as the decimal that it was
                value = int(value) if name == "top_k" and value.is_integer() else float(str(np.float32(value)))
            if name in ("temperature", "top_k") and isinstance(value, int | float):
                value = max(value, 0)  # llama.cpp's greedy, and its off
            if value is not None and (not isinstance(value, int | float) or check_ranges({name: value})):
                logger.warning("%s: general.sampling.%s is left out: %r", file.path, key, value)
            elif value is not None:
                sampling[name] = value
        return Defaults(gguf_stop_ids(file), sampling)

    def gguf_metadata(self) -> dict[str, object]:
        """What `of_gguf` reads of sampling; nothing when greedy."""
        return {f"general.sampling.{SAMPLING[name]}": value for name, value in self.sampling.items() if self.sampling["temperature"] > 0}


def _checked(path: Path, sampling: dict[str, float]) -> dict[str, float]:
    if violations := check_ranges(sampling):
        raise ModelFileError(f"{path}: {violations[0][0]}: {violations[0][1]}")
    return sampling


class Model(Protocol):
    """A model ready to run. `vocabulary` is None without a tokenizer; there are `num_token_ids` ids and `context` positions;
    rows have `hidden` dimensions."""

    @property
    def name(self) -> str: ...
    @property
    def vocabulary(self) -> Vocabulary | None: ...
    @property
    def defaults(self) -> Defaults: ...
    @property
    def num_token_ids(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def has_mtp(self) -> bool: ...

    @property
    def fingerprint(self) -> str:
        """What tells its saved sequences from those of other models: 64 hexadecimal digits."""
        ...

    @property
    def instructions(self) -> str:
        """What else its bits depend on: see MatrixMaker."""
        ...

    def memory(self) -> MemoryMaker: ...

    def target(self) -> Target: ...

    def draft_head(self) -> DraftHead: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory."""

    name: str
    weights: ModelWeights
    backend: AnyBackend
    vocabulary: Vocabulary | None
    defaults: Defaults

    @property
    def fingerprint(self) -> str:
        return self.weights.fingerprint

    @property
    def instructions(self) -> str:
        return self.backend.instructions

    @property
    def num_token_ids(self) -> int:
        return self.weights.config.vocabulary

    @property
    def context(self) -> int:
        return self.weights.config.context

    @property
    def hidden(self) -> int:
        return self.weights.config.hidden

    @property
    def has_mtp(self) -> bool:
        return self.weights.mtp is not None

    def memory(self) -> MemoryMaker:
        return make_memory(self.weights.config, self.backend)

    def target(self) -> Target:
        return make_trunk(self.weights, self.backend)

    def draft_head(self) -> DraftHead:
        return make_head(self.weights, self.backend)


def synthetic_model(size: str, *, backend: str | None = None, num_threads: int | None = None) -> LoadedModel:
    """A model of random weights, NAME:TYPE as in kernels/model/synthetic.py, on a backend as load_model has them. InvalidRequest as
    there."""
    (config, kind), on = size_of(size), make_backend(backend, num_threads)
    weights = load_weights(SyntheticCheckpoint(config, kind), config, on)
    return LoadedModel(size, weights, on, None, Defaults(frozenset(), {"temperature": 0.0}))


def load_model(name: str, progress: Progress | None = None, *, backend: str | None = None, num_threads: int | None = None) -> LoadedModel:
    """Loads a model: the name of a shipped one, a Hugging Face folder, a GGUF file (its draft head may be in another beside it:
    find_sidecar), or `ORG/REPO` or `ORG/REPO:QUANT` of a hub (see fetch). `backend` is `cpu` (C kernels, by default), `cuda` (an
    NVIDIA device, with CuPy) or `reference` (NumPy); `num_threads` by default as many as there are physical cores. ModelFileError
    names the file and what was expected; InvalidRequest when there is no such backend."""
    path = SHIPPED.get(name) or Path(name)
    if not path.exists() and REPOSITORY.fullmatch(name):
        path = fetch(name)
    if violations := check_ranges({"num_threads": num_threads}):
        raise InvalidRequest(violations)
    on = make_backend(backend, num_threads)
    if path.is_file():
        file, beside = GgufFile(path), find_sidecar(path)
        sidecar = GgufFile(beside) if beside is not None and gguf_config(file).num_mtp_layers == 0 else None
        config = gguf_config(file, has_sidecar=sidecar is not None)
        weights = load_weights(GgufCheckpoint(file, config, sidecar), config, on, progress)
        vocabulary = gguf_vocabulary(file)
        if vocabulary is not None and vocabulary.size > config.vocabulary:
            raise ModelFileError(f"{path}: {vocabulary.size} tokens, but embeddings for {config.vocabulary}")
        return LoadedModel(name, weights, on, vocabulary, Defaults.of_gguf(file))
    if not path.is_dir():
        expected = f"{', '.join(SHIPPED)}, a Hugging Face folder, a GGUF file or ORG/REPO[:QUANT]"
        raise ModelFileError(f"{name}: no such model; expected {expected}")
    weights = load_weights(FolderCheckpoint(path), load_config(path), on, progress)
    vocabulary = folder_vocabulary(path) if (path / "tokenizer.json").exists() else None
    return LoadedModel(name, weights, on, vocabulary, Defaults.load(path))
