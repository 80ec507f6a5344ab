"""GGUF files as checkpoints: metadata to a config, tensors under the names and in the layouts of Hugging Face, and back.

What conversion changes (llama.cpp, `conversion/qwen.py`): every norm but the gated delta net's has the one added; `ssm_a` is
-exp(A_log); the convolution has lost its middle dimension; and where there are more value heads than key heads, value heads
stand tiled: head h reads key head h mod Hk, where Hugging Face has it read key head h // (Hv / Hk). That order stays: columns
of a quantised matrix cannot be moved within its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...core.errors import ModelFileError
from ..backend import F32
from ..formats.gguf import GgufFile
from ..formats.stored import Stored
from .config import ModelConfig, MoeConfig, mrope_sections
from .weights import fingerprint

FAMILIES: dict[str, Literal["qwen3_5", "qwen3_5_moe"]] = {"qwen35": "qwen3_5", "qwen35moe": "qwen3_5_moe"}
ARCHITECTURES = {family: name for name, family in FAMILIES.items()}

#: Hugging Face -> GGUF, within a layer; without `.weight` where the table of expected tensors has none.
IN_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
OUTSIDE = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
OF_MTP = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}
#: An MTP head's own embedding and LM head: no model of the family has them, and we would not read them.
UNSUPPORTED = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")


def names_of(name: str, num_layers: int) -> tuple[str, ...]:
    """The GGUF tensors that make the Hugging Face tensor `name` of a model with `num_layers` layers: one, or gate and up of experts."""
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    if name.startswith("mtp.layers.0."):
        block, rest = num_layers, name.removeprefix("mtp.layers.0.")
    elif name.startswith("mtp."):
        return (f"blk.{num_layers}.nextn.{OF_MTP[name.removeprefix('mtp.').removesuffix('.weight')]}.weight",)
    else:
        block, rest = int(name.split(".")[1]), name.split(".", 2)[2]
    at = f"blk.{block}."
    special = {
        "linear_attn.A_log": ("ssm_a",), "linear_attn.dt_bias": ("ssm_dt.bias",),
        "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    }  # fmt: skip
    found = special.get(rest) or (IN_LAYER[rest.removesuffix(".weight")] + ".weight",)
    return tuple(at + each for each in found)


def tiled(name: str, c: ModelConfig, x: F32) -> F32:
    """A tensor of Hugging Face's order of value heads in GGUF's."""
    ratio = c.value_heads // c.key_heads
    part = name.rpartition("linear_attn.")[2].removesuffix(".weight")
    keys = 2 * c.key_heads * c.key_dim

    def rows(x: F32) -> F32:
        heads = x.reshape(c.key_heads, ratio, -1).swapaxes(0, 1)
        return np.ascontiguousarray(heads).reshape(x.shape)

    if ratio > 1 and part in ("in_proj_qkv", "conv1d"):
        return np.concatenate([x[:keys], rows(x[keys:])])
    if ratio > 1 and part in ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        return rows(x)
    return np.ascontiguousarray(rows(np.ascontiguousarray(x.T)).T) if ratio > 1 and part == "out_proj" else x


def is_shifted_norm(name: str) -> bool:
    """Whether Hugging Face stores this norm as its distance from one."""
    return "norm" in name.rpartition(".weight")[0].rpartition(".")[2] and not name.endswith("linear_attn.norm.weight")


#: What a draft head's own file repeats of its model.
REPEATED = ("token_embd.weight", "output_norm.weight", "output.weight")


def find_sidecar(path: Path) -> Path | None:
    """The file of a model's draft head, where that comes beside it: `mtp-NAME-TYPE.gguf` to `NAME-TYPE.gguf`, of whatever type; the first
    by name if there are several."""
    name = path.stem.rpartition("-")[0] or path.stem
    return min(path.parent.glob(f"mtp-{escape(name)}-*.gguf"), default=None)


def gguf_config(file: GgufFile, *, has_sidecar: bool = False) -> ModelConfig:
    """Of a file, and of the draft head in another. ModelFileError names the key and what was expected."""
    architecture = file.get("general.architecture", str)
    if architecture not in FAMILIES:
        raise ModelFileError(f"{file.path}: general.architecture: expected one of {', '.join(FAMILIES)}, got {architecture!r:.50}")
    family = FAMILIES[architecture]

    def integer(key: str, default: int | None = None, highest: int = 10_000_000) -> int:
        value = file.get(f"{architecture}.{key}", int, default)
        if not 0 < value <= highest:
            raise ModelFileError(f"{file.path}: {architecture}.{key}: expected 1 to {highest}, got {value}")
        return value

    num_mtp = file.get(f"{architecture}.nextn_predict_layers", int, 0)
    if num_mtp not in (0, 1):
        raise ModelFileError(f"{file.path}: {architecture}.nextn_predict_layers: expected 0 or 1, got {num_mtp}")
    num_layers = integer("block_count", highest=10_000) - num_mtp
    interval = integer("full_attention_interval", 4)
    is_full = tuple((i + 1) % interval == 0 for i in range(num_layers))
    if "token_embd.weight" not in file.tensors:
        raise ModelFileError(f"{file.path}: tensor token_embd.weight is missing")
    moe = None
    if family == "qwen3_5_moe":
        used, own = integer("expert_used_count"), integer("expert_feed_forward_length")
        moe = MoeConfig(integer("expert_count"), used, own, integer("expert_shared_feed_forward_length"))
        if moe.num_used > moe.num_experts:
            raise ModelFileError(f"{file.path}: {architecture}.expert_used_count: {used} of {moe.num_experts} experts")
    heads, kv_heads = integer("attention.head_count"), integer("attention.head_count_kv")
    key_heads, value_heads = integer("ssm.group_count"), integer("ssm.time_step_rank")
    inner, rotary = integer("ssm.inner_size"), integer("rope.dimension_count")
    head_dim = integer("attention.key_length")
    if heads % kv_heads or value_heads % key_heads or inner % value_heads or rotary % 2 or rotary > head_dim or num_layers < 1:
        raise ModelFileError(f"{file.path}: heads do not divide, or rotary dimensions cannot be paired")
    if (scaling := file.metadata.get(f"{architecture}.rope.scaling.type", "none")) != "none":
        raise ModelFileError(f"{file.path}: {architecture}.rope.scaling.type: expected 'none', got {scaling!r:.50}")
    return ModelConfig(
        family=family,
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        hidden=integer("embedding_length"),
        intermediate=integer("feed_forward_length", 1),
        is_full_attention=is_full,
        is_moe=(moe is not None,) * num_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary,
        rope_theta=float(file.get(f"{architecture}.rope.freq_base", (int, float), 10_000.0)),
        mrope_sections=mrope_sections(file.path, file.metadata.get(f"{architecture}.rope.dimension_sections"), rotary),
        rms_eps=float(file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float)),
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=integer("ssm.state_size"),
        value_dim=inner // value_heads,
        conv_width=integer("ssm.conv_kernel", highest=64),
        context=integer("context_length"),
        is_tied="output.weight" not in file.tensors,
        num_mtp_layers=1 if has_sidecar else num_mtp,
        moe=moe,
        is_tiled=value_heads > key_heads,
    )


class GgufCheckpoint:
    """The tensors of a GGUF file, and perhaps of its draft head's, as weights.Checkpoint has those of a folder."""

    has_fused_experts = True

    def __init__(self, file: GgufFile, config: ModelConfig, sidecar: GgufFile | None = None) -> None:
        self.folder, self._config = file.path, config
        self._num_layers = len(config.is_full_attention)
        self._files = dict.fromkeys(file.tensors, file)
        if sidecar is not None:
            self._files |= {name: sidecar for name in sidecar.tensors if name not in REPEATED}

    @property
    def has_head(self) -> bool:
        return not self._config.is_tied

    @property
    def has_mtp(self) -> bool:
        return self._config.num_mtp_layers == 1

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every tensor expected is there in its shape, and no other."""
        surplus = set(self._files)
        for name, shape in expected.items():
            parts = names_of(name, self._num_layers)
            for part in parts:
                if part not in self._files:
                    raise ModelFileError(f"{self.folder}: tensor {part} is missing, expected for {name} {list(shape)}")
                wanted, file = self._shape(name, shape, len(parts)), self._files[part]
                if file.tensors[part].shape != wanted:
                    found = list(file.tensors[part].shape)
                    raise ModelFileError(f"{file.path}: tensor {part} has shape {found}, expected {list(wanted)}")
            surplus -= set(parts)
        if surplus:
            name, more = min(surplus), len(surplus) - 1
            raise ModelFileError(f"{self._files[name].path}: tensor {name} is not part of this model (and {more} more)")

    @staticmethod
    def _shape(name: str, shape: tuple[int, ...], num_parts: int) -> tuple[int, ...]:
        """Of a part, as GGUF has it."""
        if name.endswith("conv1d.weight"):
            return shape[0], shape[2]
        if name.endswith("shared_expert_gate.weight"):
            return shape[1:]
        return (shape[0], shape[1] // num_parts, *shape[2:]) if num_parts > 1 else shape

    def read(self, name: str) -> F32:
        x = self.stored(name).values()
        return x[:, None] if name.endswith("conv1d.weight") else x

    def stored(self, name: str) -> Stored:
        (part,) = names_of(name, self._num_layers)
        stored = self._files[part].stored(part)
        return stored.reshape(1) if name.endswith("shared_expert_gate.weight") else stored

    def gate_up(self, name: str) -> tuple[Stored, Stored]:
        gate, up = names_of(name, self._num_layers)
        return self._files[gate].stored(gate), self._files[up].stored(up)

    def norm(self, name: str) -> F32:
        return self.read(name)

    def log_decay(self, name: str) -> F32:
        return self.read(name)

    def fingerprint(self, config: ModelConfig, backend: str) -> str:
        def tensors() -> Iterator[tuple[str, Any]]:
            for name in sorted(self._files):
                file = self._files[name]
                tensor = file.tensors[name]
                yield f"{name} {tensor.type} {tensor.shape}", file.raw(name)

        return fingerprint(config, backend, tensors())
