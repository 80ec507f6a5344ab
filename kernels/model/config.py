"""config.json to sizes. Names on the left are ours, keys are Hugging Face's (`configuration_qwen3_5.py` and its kin)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ...core.errors import ModelFileError
from ..backend import DeltaHeads

#: model_type -> family. Multimodal wrappers hold their text model under `text_config`.
MODEL_TYPES: dict[str, Literal["qwen3_5", "qwen3_5_moe", "qwen3_next"]] = {
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_next": "qwen3_next",
}


@dataclass(frozen=True, slots=True)
class MoeConfig:
    num_experts: int
    num_used: int
    intermediate: int
    shared_intermediate: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of one text model. `is_full_attention[i]` tells layer i's kind, `is_moe[i]` its FFN's."""

    family: Literal["qwen3_5", "qwen3_5_moe", "qwen3_next"]
    vocabulary: int
    hidden: int
    intermediate: int
    is_full_attention: tuple[bool, ...]
    is_moe: tuple[bool, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    mrope_sections: tuple[int, int, int]  # of the rotary frequencies, those of t, h and w
    rms_eps: float
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    context: int
    is_tied: bool
    num_mtp_layers: int | None  # None: the file does not say, its tensors do
    moe: MoeConfig | None
    is_tiled: bool = False  # the order of value heads: see DeltaHeads

    @property
    def delta_heads(self) -> DeltaHeads:
        return DeltaHeads(self.key_heads, self.value_heads, self.key_dim, self.value_dim, self.is_tiled)

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v of a gated delta net layer together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def num_attention(self) -> int:
        return sum(self.is_full_attention)

    @property
    def num_delta(self) -> int:
        return len(self.is_full_attention) - self.num_attention


class _Reader:
    """Typed look-ups in a JSON object that name the file and the key when they fail."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path, self._values = path, values

    def fail(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {key}: {problem}")

    def integer(self, key: str, default: int | None = None, *, lowest: int = 1, highest: int = 10_000_000) -> int:
        value = self._values.get(key, default)
        if type(value) is not int or not lowest <= value <= highest:
            raise self.fail(key, f"expected a whole number from {lowest} to {highest}, got {value!r:.50}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(key, f"expected a positive number, got {value!r:.50}")
        return float(value)

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MB, or ModelFileError."""
    try:
        if path.stat().st_size > 64_000_000:
            raise ModelFileError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file of a model")
        value: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", value)


def load_config(folder: Path) -> ModelConfig:
    """Reads `folder`/config.json. ModelFileError names the key and what was expected."""
    path = folder / "config.json"
    outer = read_json(path)
    text = outer.get("text_config", outer)
    if not isinstance(text, dict):
        raise ModelFileError(f"{path}: text_config: expected an object")
    values = cast("dict[str, Any]", text)
    model_type = values.get("model_type", outer.get("model_type"))
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ModelFileError(f"{path}: model_type {model_type!r} is unknown; expected one of {', '.join(MODEL_TYPES)}")
    family = MODEL_TYPES[model_type]
    read = _Reader(path, values)
    layers = read.integer("num_hidden_layers", highest=10_000)
    given: Any = values.get("layer_types")
    if given is None:
        interval = read.integer("full_attention_interval", 4)
        is_full = tuple((i + 1) % interval == 0 for i in range(layers))
    else:
        types = cast("list[Any]", given if isinstance(given, list) else [])
        if len(types) != layers or not all(kind in ("full_attention", "linear_attention") for kind in types):
            raise read.fail("layer_types", f"expected {layers} entries, each full_attention or linear_attention")
        is_full = tuple(kind == "full_attention" for kind in types)
    moe, is_moe = None, (False,) * layers
    if family != "qwen3_5":
        moe = MoeConfig(
            read.integer("num_experts"),
            read.integer("num_experts_per_tok"),
            read.integer("moe_intermediate_size"),
            read.integer("shared_expert_intermediate_size"),
        )
        if moe.num_used > moe.num_experts:
            raise read.fail("num_experts_per_tok", f"expected at most num_experts = {moe.num_experts}, got {moe.num_used}")
        listed: Any = read.get("mlp_only_layers") or []
        every = read.integer("decoder_sparse_step", 1)
        if not isinstance(listed, list):
            raise read.fail("mlp_only_layers", "expected a list of layers")
        dense = cast("list[Any]", listed)
        is_moe = tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
    if read.get("norm_topk_prob", True) is not True:
        raise read.fail("norm_topk_prob", "expected true: no model of the family leaves expert weights unnormalised")
    for key, only in (("hidden_act", "silu"), ("attention_bias", False)):
        if read.get(key, only) != only:
            raise read.fail(key, f"expected {only!r}, got {read.get(key)!r}")
    for key in ("rope_parameters", "rope_scaling"):
        part: Any = values.get(key) or {}
        if not isinstance(part, dict) or any(
            _Reader(path, cast("dict[str, Any]", part)).get(name, "default") != "default" for name in ("rope_type", "type")
        ):
            raise read.fail(key, f"expected an object of type 'default', got {part!r:.100}")
    rope = _Reader(path, {**values, **(values.get("rope_parameters") or {})})
    head_dim = read.integer("head_dim", 256)
    rotary = int(head_dim * rope.number("partial_rotary_factor", 0.25))
    config = ModelConfig(
        family=family,
        vocabulary=read.integer("vocab_size"),
        hidden=read.integer("hidden_size"),
        intermediate=read.integer("intermediate_size", 1 if family == "qwen3_5_moe" else None),
        is_full_attention=is_full,
        is_moe=is_moe,
        heads=read.integer("num_attention_heads"),
        kv_heads=read.integer("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rotary,
        rope_theta=rope.number("rope_theta", 10_000.0),
        mrope_sections=mrope_sections(path, rope.get("mrope_section") if family != "qwen3_next" else None, rotary),
        rms_eps=read.number("rms_norm_eps", 1e-6),
        key_heads=read.integer("linear_num_key_heads"),
        value_heads=read.integer("linear_num_value_heads"),
        key_dim=read.integer("linear_key_head_dim"),
        value_dim=read.integer("linear_value_head_dim"),
        conv_width=read.integer("linear_conv_kernel_dim", 4, lowest=2, highest=64),
        context=read.integer("max_position_embeddings", 32768),
        is_tied=bool(outer.get("tie_word_embeddings", values.get("tie_word_embeddings", False))),
        num_mtp_layers=_mtp_layers(read),
        moe=moe,
    )
    for part, whole in (("linear_num_key_heads", "linear_num_value_heads"), ("num_key_value_heads", "num_attention_heads")):
        if read.integer(whole) % read.integer(part):
            raise read.fail(whole, f"{read.integer(whole)} is not a multiple of {part} = {read.integer(part)}")
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise rope.fail("partial_rotary_factor", f"{rotary} rotary dimensions of a head of {head_dim} cannot be paired")
    return config


def mrope_sections(path: Path, given: object, rotary: int) -> tuple[int, int, int]:
    """Three counts of frequencies, from a file; all are t's where it says none."""
    if given is None:
        return rotary // 2, 0, 0
    counts = cast("list[object]", given) if isinstance(given, list) else []
    match counts:
        case [int(t), int(h), int(w)] | [int(t), int(h), int(w), 0] if min(t, h, w) >= 0 and t + h + w == rotary // 2:
            return t, h, w
        case _:
            raise ModelFileError(f"{path}: mrope_section: expected three counts that make {rotary // 2}, got {given!r:.50}")


def _mtp_layers(read: _Reader) -> int | None:
    value = read.get("mtp_num_hidden_layers")
    if value not in (None, 0, 1):
        raise read.fail("mtp_num_hidden_layers", f"expected 0 or 1, got {value!r}")
    return value
