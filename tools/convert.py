"""`forerun convert`: a Hugging Face folder to one GGUF file with its MTP head, as llama.cpp reads it too; `forerun info`: what a
model file is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..actors.model import SHIPPED, Defaults
from ..actors.vocabularies import gguf_metadata
from ..core.errors import InvalidRequest, ModelFileError
from ..kernels.backend import F32
from ..kernels.formats.gguf import GgufFile, write
from ..kernels.formats.stored import BY_NAME
from ..kernels.model.config import ModelConfig, load_config, read_json
from ..kernels.model.gguf_names import ARCHITECTURES, gguf_config, is_shifted_norm, names_of, tiled
from ..kernels.model.sizes import MIB, memory_sizes
from ..kernels.model.weights import FolderCheckpoint, expected_tensors

#: --outtype -> GGUF's type, and its number for a file mostly of it (`llama_ftype`).
OUT_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
#: Matrices that stay float32: small, and what they decide is decided by little.
ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


def convert(folder: Path, out: Path, out_type: str) -> None:
    """ModelFileError when the folder is not what it should be, or of a family that has no GGUF here."""
    folder = SHIPPED.get(str(folder), folder)
    config, checkpoint = load_config(folder), FolderCheckpoint(folder)
    if config.family not in ARCHITECTURES:
        raise ModelFileError(f"{folder}: {config.family} is not converted; expected {', '.join(ARCHITECTURES)}")
    has_head = not config.is_tied
    expected = expected_tensors(config, fused_experts=checkpoint.has_fused_experts, has_mtp=checkpoint.has_mtp, has_head=has_head)
    if not checkpoint.has_fused_experts:
        raise ModelFileError(f"{folder}: experts that are stored one by one are not converted")
    kind, file_type = OUT_TYPES[out_type]
    tensors: dict[str, tuple[str, Callable[[], F32]]] = {}
    for name, shape in expected.items():
        parts = names_of(name, len(config.is_full_attention))
        for i, part in enumerate(parts):
            tensors[part] = _stored(part, shape, kind), partial(_values, checkpoint, config, name, i, len(parts))
    try:
        write(out, _metadata(folder, config, checkpoint.has_mtp, file_type), tensors)
    except OSError as error:
        raise InvalidRequest([("OUT", f"{out}: {error.strerror}")]) from error


def _stored(part: str, shape: tuple[int, ...], kind: str) -> str:
    """The type a tensor gets in a file of `kind`; rows that are no whole blocks are F16."""
    if len(shape) < 2 or part.endswith(ALWAYS_F32):
        return "F32"
    return "F16" if shape[-1] % BY_NAME[kind].block else kind


def _values(checkpoint: FolderCheckpoint, config: ModelConfig, name: str, part: int, num_parts: int) -> F32:
    if is_shifted_norm(name):
        return checkpoint.norm(name)
    x = checkpoint.log_decay(name) if name.endswith("A_log") else checkpoint.read(name)
    if name.endswith("conv1d.weight"):
        x = x[:, 0]
    if name.endswith("shared_expert_gate.weight"):
        x = x[0]
    x = tiled(name, config, x)
    return np.split(x, num_parts, axis=1)[part] if num_parts > 1 else x


def _metadata(folder: Path, c: ModelConfig, has_mtp: bool, file_type: int) -> dict[str, object]:
    architecture = ARCHITECTURES[c.family]  # type: ignore[index]
    interval = c.is_full_attention.index(True) + 1
    if c.is_full_attention != tuple((i + 1) % interval == 0 for i in range(len(c.is_full_attention))):
        raise ModelFileError(f"{folder}: attention layers in no regular interval cannot be said in GGUF")
    values = read_json(folder / "config.json")
    rope: dict[str, list[int]] = (values.get("text_config") or values).get("rope_parameters") or {}
    sizes: dict[str, object] = {
        "block_count": len(c.is_full_attention) + has_mtp, "context_length": c.context, "embedding_length": c.hidden,
        "feed_forward_length": c.intermediate, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.rms_eps,
        "rope.freq_base": c.rope_theta, "rope.dimension_count": c.rotary_dim,
        "rope.dimension_sections": [*(rope.get("mrope_section") or [c.rotary_dim // 2, 0, 0]), 0],
        "full_attention_interval": interval, "ssm.conv_kernel": c.conv_width, "ssm.state_size": c.key_dim,
        "ssm.group_count": c.key_heads, "ssm.time_step_rank": c.value_heads, "ssm.inner_size": c.value_heads * c.value_dim,
    }  # fmt: skip
    if has_mtp:
        sizes["nextn_predict_layers"] = 1
    if c.moe is not None:
        sizes |= {
            "expert_count": c.moe.num_experts, "expert_used_count": c.moe.num_used, "expert_feed_forward_length": c.moe.intermediate,
            "expert_shared_feed_forward_length": c.moe.shared_intermediate,
        }  # fmt: skip
    defaults = Defaults.load(folder)
    stops = dict(zip(("eos", "eot", "eom"), sorted(defaults.stop_ids), strict=False))
    if len(stops) < len(defaults.stop_ids):
        raise ModelFileError(
            f"{folder}: {len(defaults.stop_ids)} tokens end a text, GGUF has room for {len(stops)}: eos_token_id in its JSON files"
        )
    return {
        "general.architecture": architecture,
        "general.name": folder.name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        **gguf_metadata(folder, c.vocabulary),
        **defaults.gguf_metadata(),
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in stops.items()},
        "tokenizer.ggml.add_bos_token": False,
    }


def info(path: Path) -> str:
    """What a GGUF file or a folder holds, in a few lines."""
    path = SHIPPED.get(str(path), path)
    if path.is_dir():
        config, types = load_config(path), "safetensors"
        has_mtp = FolderCheckpoint(path).has_mtp
    else:
        file = GgufFile(path)
        config, has_mtp = gguf_config(file), gguf_config(file).num_mtp_layers == 1
        types = ", ".join(f"{count} {kind}" for kind, count in Counter(tensor.type for tensor in file.tensors.values()).most_common())
    shapes = expected_tensors(config, fused_experts=True, has_mtp=has_mtp, has_head=not config.is_tied)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    memory = memory_sizes(config, 4, "log")
    moe = f"; {config.moe.num_experts} experts, {config.moe.num_used} used" if config.moe is not None else ""
    return "\n".join(
        [
            f"{path}: {config.family}, {count / 1e6:.1f} million parameters, {types}",
            f"layers: {config.num_delta} gated delta net, {config.num_attention} attention{moe}; MTP head: {'yes' if has_mtp else 'no'}",
            f"hidden {config.hidden}, heads {config.heads} of {config.head_dim} over {config.kv_heads}, "
            f"gated delta net {config.value_heads} of {config.key_dim} x {config.value_dim} over {config.key_heads}",
            f"context {config.context}, vocabulary {config.vocabulary}{', tied' if config.is_tied else ''}",
            f"memory of a sequence: {(memory.state + memory.rollback) / MIB:.1f} MiB, and {memory.page / MIB:.2f} for every 64 positions",
        ]
    )
