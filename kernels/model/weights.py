"""Checkpoint tensors to the weights the graphs use. One table says which tensors a config calls for, and their shapes;
what is missing, surplus or misshapen is named. Quirks of the files end here:

- names carry the prefix `model.language_model.` (multimodal files) or `model.`; `model.visual.*` is left out, with a notice;
- norms are stored as their distance from one, except the gated delta net's output norm (`linear_attn.norm`);
- Qwen3-Next interleaves q, k, v, z (`in_proj_qkvz`) and b, a (`in_proj_ba`) per key head;
- experts come fused (`experts.gate_up_proj` [E, 2 I, hidden]) or one by one (`experts.N.gate_proj`...).
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ...core.errors import ModelFileError
from ..backend import F32, Experts, Matrix, MatrixMaker
from ..formats.safetensors import SafetensorsFile
from ..formats.stored import Stored
from .config import ModelConfig, MoeConfig, read_json

T = TypeVar("T")
logger = logging.getLogger("forerun")

#: Pieces of a tensor that tell two models apart: fine-tuning changes a tensor everywhere.
FINGERPRINT_PIECES, PIECE_BYTES = 16, 4096
#: called with (tensors read, tensors in all) as a checkpoint loads
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """A gated delta net layer. `conv` is [width, channels], oldest tap first; `log_decay` is -exp(A_log)."""

    qkv: Matrix
    z: Matrix
    b: Matrix
    a: Matrix
    conv: F32
    log_decay: F32
    dt_bias: F32
    norm: F32
    out: Matrix


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """A gated attention layer; `q` gives, per head, query then gate."""

    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    q_norm: F32
    k_norm: F32


@dataclass(frozen=True, slots=True)
class DenseWeights:
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class MoeWeights:
    router: Matrix
    experts: Experts
    shared: DenseWeights
    shared_gate: Matrix


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: F32
    mixer: DeltaWeights | AttentionWeights
    ffn_norm: F32
    ffn: DenseWeights | MoeWeights


@dataclass(frozen=True, slots=True)
class MtpWeights:
    embedding_norm: F32
    hidden_norm: F32
    fc: Matrix
    layer: LayerWeights
    norm: F32


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole model. `head` is `embedding` itself when tied. `mtp` is None for checkpoints without that head."""

    config: ModelConfig
    embedding: Matrix
    layers: list[LayerWeights]
    norm: F32
    head: Matrix
    mtp: MtpWeights | None
    num_parameters: int
    fingerprint: str


class Checkpoint(Protocol):
    """A model's tensors, under Hugging Face's names without prefix, in its layouts."""

    folder: Path

    @property
    def has_fused_experts(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...
    @property
    def has_mtp(self) -> bool: ...

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every tensor expected is there in its shape, and no other."""
        ...

    def read(self, name: str) -> F32: ...

    def stored(self, name: str) -> Stored:
        """A matrix as the file has it."""
        ...

    def gate_up(self, name: str) -> tuple[Stored, Stored]:
        """The two halves of fused experts [E, 2 I, hidden]: [E, I, hidden] each."""
        ...

    def norm(self, name: str) -> F32:
        """What a norm multiplies by."""
        ...

    def log_decay(self, name: str) -> F32:
        """-exp(A_log)."""
        ...

    def fingerprint(self, config: ModelConfig, backend: str) -> str: ...


def fingerprint(config: ModelConfig, backend: str, tensors: Iterable[tuple[str, npt.NDArray[np.uint8]]]) -> str:
    """Of a model, as one backend computes it: 64 hexadecimal digits from the sizes, and of every tensor what is said of it and
    FINGERPRINT_PIECES pieces spread over its bytes (all of them if they are few)."""
    digest = hashlib.blake2b(f"{backend} {config}".encode(), digest_size=32)
    for text, raw in tensors:
        digest.update(text.encode())
        step = max(PIECE_BYTES, len(raw) // FINGERPRINT_PIECES)
        for start in range(0, len(raw), step):
            digest.update(raw[start : start + PIECE_BYTES].tobytes())
    return digest.hexdigest()


class HubLayout(ABC):
    """Tensors that lie as transformers saves them; a checkpoint has to say how one is `stored`."""

    @abstractmethod
    def stored(self, name: str) -> Stored: ...

    def read(self, name: str) -> F32:
        return self.stored(name).values()

    def gate_up(self, name: str) -> tuple[Stored, Stored]:
        both = self.stored(name)
        half = both.shape[1] // 2
        return both[:, :half], both[:, half:]

    def norm(self, name: str) -> F32:
        return 1 + self.read(name)

    def log_decay(self, name: str) -> F32:
        return -np.exp(self.read(name))


class FolderCheckpoint(HubLayout):
    """The tensors of a Hugging Face folder: one file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, tuple[SafetensorsFile, str]] = {}
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in cast("dict[str, object]", weight_map).values()):
                raise ModelFileError(f"{index}: weight_map: expected an object of file names")
            names = sorted(set(cast("dict[str, str]", weight_map).values()))
        skipped = 0
        for name in names:
            if Path(name).name != name:
                raise ModelFileError(f"{index}: {name!r} is not the name of a file in this folder")
            file = SafetensorsFile(folder / name)
            for full in file.tensors:
                if full.startswith(("model.visual.", "visual.")):
                    skipped += 1
                    continue
                short = full.removeprefix("model.").removeprefix("language_model.")
                if short in self._files:
                    raise ModelFileError(f"{file.path}: tensor {full} appears twice, also in {self._files[short][0].path.name}")
                self._files[short] = (file, full)
        if skipped:
            logger.warning("%s: left out the vision tower (%d tensors): only text is served", folder, skipped)

    @property
    def has_fused_experts(self) -> bool:
        return not any(".experts.0." in name for name in self._files)

    @property
    def has_head(self) -> bool:
        return "lm_head.weight" in self._files

    @property
    def has_mtp(self) -> bool:
        return any(name.startswith("mtp.") for name in self._files)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every tensor expected is there in its shape, and no other."""
        if missing := [name for name in expected if name not in self._files]:
            name = missing[0]
            raise ModelFileError(f"{self.folder}: tensor {name} is missing, expected {list(expected[name])}" + _and_more(missing))
        if surplus := sorted(set(self._files) - set(expected)):
            raise ModelFileError(f"{self.folder}: tensor {self._files[surplus[0]][1]} is not part of this model" + _and_more(surplus))
        for name, shape in expected.items():
            file, full = self._files[name]
            if file.tensors[full].shape != shape:
                raise ModelFileError(f"{file.path}: tensor {full} has shape {list(file.tensors[full].shape)}, expected {list(shape)}")

    def stored(self, name: str) -> Stored:
        file, full = self._files[name]
        return file.stored(full)

    def fingerprint(self, config: ModelConfig, backend: str) -> str:
        def tensors() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
            for name in sorted(self._files):
                file, full = self._files[name]
                info = file.tensors[full]
                yield f"{name} {info.dtype} {info.shape}", file.raw(full)

        return fingerprint(config, backend, tensors())


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def expected_tensors(c: ModelConfig, *, fused_experts: bool, has_mtp: bool, has_head: bool) -> dict[str, tuple[int, ...]]:
    """Name without prefix -> shape, for everything a checkpoint of this config holds."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocabulary, c.hidden), "norm.weight": (c.hidden,)}
    if has_head:
        shapes["lm_head.weight"] = (c.vocabulary, c.hidden)
    for i, is_full in enumerate(c.is_full_attention):
        shapes.update(_layer_shapes(c, f"layers.{i}.", is_full, c.moe if c.is_moe[i] else None, fused_experts))
    if has_mtp:
        shapes |= {f"mtp.{name}.weight": (c.hidden,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
        shapes["mtp.fc.weight"] = (c.hidden, 2 * c.hidden)
        shapes.update(_layer_shapes(c, "mtp.layers.0.", True, c.moe, fused_experts))
    return shapes


def _layer_shapes(
    c: ModelConfig, prefix: str, is_full: bool, moe: MoeConfig | None, fused_experts: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "input_layernorm.weight", (c.hidden,)
    yield prefix + "post_attention_layernorm.weight", (c.hidden,)
    values = c.value_heads * c.value_dim
    if is_full:
        at = prefix + "self_attn."
        yield at + "q_proj.weight", (2 * c.heads * c.head_dim, c.hidden)
        yield at + "k_proj.weight", (c.kv_heads * c.head_dim, c.hidden)
        yield at + "v_proj.weight", (c.kv_heads * c.head_dim, c.hidden)
        yield at + "o_proj.weight", (c.hidden, c.heads * c.head_dim)
        yield at + "q_norm.weight", (c.head_dim,)
        yield at + "k_norm.weight", (c.head_dim,)
    else:
        at = prefix + "linear_attn."
        if c.family == "qwen3_next":
            yield at + "in_proj_qkvz.weight", (c.channels + values, c.hidden)
            yield at + "in_proj_ba.weight", (2 * c.value_heads, c.hidden)
        else:
            yield at + "in_proj_qkv.weight", (c.channels, c.hidden)
            yield at + "in_proj_z.weight", (values, c.hidden)
            yield at + "in_proj_b.weight", (c.value_heads, c.hidden)
            yield at + "in_proj_a.weight", (c.value_heads, c.hidden)
        yield at + "conv1d.weight", (c.channels, 1, c.conv_width)
        yield at + "A_log", (c.value_heads,)
        yield at + "dt_bias", (c.value_heads,)
        yield at + "norm.weight", (c.value_dim,)
        yield at + "out_proj.weight", (c.hidden, values)
    at = prefix + "mlp."
    if moe is None:
        yield from _dense_shapes(at, c.hidden, c.intermediate)
        return
    yield at + "gate.weight", (moe.num_experts, c.hidden)
    yield at + "shared_expert_gate.weight", (1, c.hidden)
    yield from _dense_shapes(at + "shared_expert.", c.hidden, moe.shared_intermediate)
    if fused_experts:
        yield at + "experts.gate_up_proj", (moe.num_experts, 2 * moe.intermediate, c.hidden)
        yield at + "experts.down_proj", (moe.num_experts, c.hidden, moe.intermediate)
    else:
        for i in range(moe.num_experts):
            yield from _dense_shapes(f"{at}experts.{i}.", c.hidden, moe.intermediate)


def _dense_shapes(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)


class _Loader:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, backend: MatrixMaker, fused: bool, total: int, progress: Progress | None
    ) -> None:
        self._checkpoint, self._c, self._backend, self._fused = checkpoint, config, backend, fused
        self._total, self._progress, self._done = total, progress, 0

    def raw(self, name: str) -> F32:
        return self._count(self._checkpoint.read(name))

    def stored(self, name: str) -> Stored:
        return self._count(self._checkpoint.stored(name))

    def _count(self, tensor: T) -> T:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return tensor

    def matrix(self, name: str) -> Matrix:
        return self._backend.matrix(self.stored(name + ".weight"))

    def norm(self, name: str) -> F32:
        return self._count(self._checkpoint.norm(name + ".weight"))

    def layer(self, prefix: str, is_full: bool, moe: MoeConfig | None) -> LayerWeights:
        mixer = self.attention(prefix + "self_attn.") if is_full else self.delta(prefix + "linear_attn.")
        ffn = self.dense(prefix + "mlp.") if moe is None else self.moe(prefix + "mlp.", moe)
        return LayerWeights(self.norm(prefix + "input_layernorm"), mixer, self.norm(prefix + "post_attention_layernorm"), ffn)

    def attention(self, prefix: str) -> AttentionWeights:
        q, k, v, o = (self.matrix(f"{prefix}{x}_proj") for x in "qkvo")
        return AttentionWeights(q, k, v, o, self.norm(prefix + "q_norm"), self.norm(prefix + "k_norm"))

    def delta(self, prefix: str) -> DeltaWeights:
        c, matrix = self._c, self._backend.matrix
        if c.family == "qwen3_next":
            ratio = c.value_heads // c.key_heads
            packed = self.stored(prefix + "in_proj_qkvz.weight").reshape(c.key_heads, -1)
            ends = [0, c.key_dim, 2 * c.key_dim, 2 * c.key_dim + ratio * c.value_dim, packed.shape[1]]
            parts = [packed[:, start:stop].raw.reshape(-1, packed.raw.shape[-1]) for start, stop in pairwise(ends)]
            qkv, z = (matrix(Stored(packed.type, c.hidden, raw)) for raw in (np.concatenate(parts[:3]), parts[3]))
            packed = self.stored(prefix + "in_proj_ba.weight").reshape(c.key_heads, 2 * ratio)
            b, a = (matrix(packed[:, part].reshape(-1)) for part in (slice(ratio), slice(ratio, None)))
        else:
            qkv, z, b, a = (self.matrix(f"{prefix}in_proj_{x}") for x in ("qkv", "z", "b", "a"))
        return DeltaWeights(
            qkv, z, b, a,
            conv=np.ascontiguousarray(self.raw(prefix + "conv1d.weight")[:, 0].T),
            log_decay=self._count(self._checkpoint.log_decay(prefix + "A_log")),
            dt_bias=self.raw(prefix + "dt_bias"),
            norm=self.raw(prefix + "norm.weight"),
            out=self.matrix(prefix + "out_proj"),
        )  # fmt: skip

    def dense(self, prefix: str) -> DenseWeights:
        return DenseWeights(*(self.matrix(f"{prefix}{x}_proj") for x in ("gate", "up", "down")))

    def moe(self, prefix: str, moe: MoeConfig) -> MoeWeights:
        matrix = self._backend.matrix
        gate, up, down = list[Matrix](), list[Matrix](), list[Matrix]()
        if self._fused:
            halves = self._count(self._checkpoint.gate_up(prefix + "experts.gate_up_proj"))
            for matrices, all_of in zip((gate, up, down), (*halves, self.stored(prefix + "experts.down_proj")), strict=True):
                matrices += [matrix(all_of[i]) for i in range(moe.num_experts)]
        else:
            for i in range(moe.num_experts):
                for matrices, name in ((gate, "gate"), (up, "up"), (down, "down")):
                    matrices.append(self.matrix(f"{prefix}experts.{i}.{name}_proj"))
        experts = Experts(gate, up, down, moe.num_used)
        return MoeWeights(
            self.matrix(prefix + "gate"), experts, self.dense(prefix + "shared_expert."), self.matrix(prefix + "shared_expert_gate")
        )


def load_weights(checkpoint: Checkpoint, config: ModelConfig, backend: MatrixMaker, progress: Progress | None = None) -> ModelWeights:
    """Loads a model. ModelFileError names the tensor and what was expected of it."""
    fused = checkpoint.has_fused_experts
    has_mtp = checkpoint.has_mtp if config.num_mtp_layers is None else config.num_mtp_layers > 0
    # Some tied files repeat the embedding as lm_head; the config decides which is used.
    has_head = not config.is_tied or checkpoint.has_head
    expected = expected_tensors(config, fused_experts=fused, has_mtp=has_mtp, has_head=has_head)
    checkpoint.check(expected)
    num_read = len(expected) - (config.is_tied and has_head)
    load = _Loader(checkpoint, config, backend, fused, num_read, progress)
    embedding = load.matrix("embed_tokens")
    moe_of = [config.moe if is_moe else None for is_moe in config.is_moe]
    layers = [load.layer(f"layers.{i}.", is_full, moe_of[i]) for i, is_full in enumerate(config.is_full_attention)]
    mtp = None
    if has_mtp:
        mtp = MtpWeights(
            load.norm("mtp.pre_fc_norm_embedding"),
            load.norm("mtp.pre_fc_norm_hidden"),
            load.matrix("mtp.fc"),
            load.layer("mtp.layers.0.", True, config.moe),
            load.norm("mtp.norm"),
        )
    head = embedding if config.is_tied else load.matrix("lm_head")
    count = sum(int(np.prod(shape)) for shape in expected.values())
    return ModelWeights(config, embedding, layers, load.norm("norm"), head, mtp, count, checkpoint.fingerprint(config, backend.name))
