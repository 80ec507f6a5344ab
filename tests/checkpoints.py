"""Small random checkpoints of every layout, the same on every machine: Hugging Face folders made with NumPy alone.

`tests/make_fixtures.py` runs them through transformers and records logits; the tests compare ours with the record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from forerun.core.embeddings import EmbeddingRows, Part
from forerun.kernels.formats import safetensors
from forerun.kernels.model.config import load_config
from forerun.kernels.model.weights import expected_tensors

# What is recorded of each: see make_fixtures.py.
LENGTHS = (1, 5, 63, 64, 65, 130)
STEPS = 16
DRAFT_FROM = (0, 1, 40, 64)  # chains start with the token after these positions of the 65-token prompt
NUM_DRAFTS = 3

COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "hidden_act": "silu", "attention_bias": False,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "eos_token_id": 255,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
                        "mrope_interleaved": True},
}  # fmt: skip
MOE: dict[str, Any] = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip

#: name -> (text config, how the folder is written)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (
        {"model_type": "qwen3_5_text", "intermediate_size": 160, "tie_word_embeddings": True, "mtp_num_hidden_layers": 1},
        {"prefix": "model.", "dtype": "F32"},
    ),
    "dense_r3": (  # grouped value heads, dk != dv, sharded bf16, other layer order
        {
            "model_type": "qwen3_5_text", "intermediate_size": 128, "tie_word_embeddings": False, "mtp_num_hidden_layers": 1,
            "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 24, "num_hidden_layers": 5,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
        },
        {"prefix": "model.", "dtype": "BF16", "shards": 2},
    ),
    "moe": (  # multimodal wrapper with a vision tower to leave out
        {"model_type": "qwen3_5_moe_text", "tie_word_embeddings": False, "linear_num_value_heads": 4, "mtp_num_hidden_layers": 1, **MOE},
        {"prefix": "model.language_model.", "dtype": "BF16", "wrapper": "qwen3_5_moe"},
    ),
    "next": (  # interleaved projections, experts one by one
        {
            "model_type": "qwen3_next", "intermediate_size": 96, "tie_word_embeddings": False, "linear_num_value_heads": 4,
            "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [1], **MOE,
        },
        {"prefix": "model.", "dtype": "F16", "fused_experts": False},
    ),
}  # fmt: skip


def prompt(length: int) -> list[int]:
    return [int(t) for t in np.random.Generator(np.random.PCG64(length)).integers(0, 250, length)]


def prompt_with_rows(hidden: int, *, is_text: bool = False) -> list[Part]:
    """9 tokens, 20 rows that lie as an image of 4 by 5 patches does, 8 tokens, 3 rows that lie as text does, 50 tokens. `is_text`: all
    rows lie so."""
    rng = np.random.Generator(np.random.PCG64(hidden))
    image, more = ((rng.random((n, hidden)) * 2 - 1).astype(np.float32) for n in (20, 3))
    patches = None if is_text else [(0, i // 5, i % 5) for i in range(20)]
    ids = prompt(67)
    return [ids[:9], EmbeddingRows.of(image, patches), ids[9:17], EmbeddingRows.of(more), ids[17:]]


def places_of_rows(*, is_text: bool = False) -> list[tuple[int, int, int]]:
    """(t, h, w) of that prompt's positions, written down by hand, and of STEPS more."""
    if is_text:
        return [(i, i, i) for i in range(90 + STEPS)]
    image = [(9, 9 + i // 5, 9 + i % 5) for i in range(20)]
    return [(i, i, i) for i in range(9)] + image + [(i, i, i) for i in range(14, 14 + 61 + STEPS)]


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    # Uniform draws, whose stream NumPy keeps stable, spread so that gates, decays and routers all see a wide range.
    x = rng.random(shape, np.float64) * 2 - 1
    if name.endswith("A_log"):
        return (np.log(0.3 + 4 * (x + 1))).astype(np.float32)
    if name.endswith("dt_bias"):
        return (x - 1.5).astype(np.float32)
    if "norm" in name:
        return (0.3 * x + (1 if name.endswith("linear_attn.norm.weight") else 0)).astype(np.float32)
    scale = 1.0 if "embed" in name or "conv1d" in name else 1.7 * shape[-1] ** -0.5
    return (x * scale).astype(np.float32)


def _stored(array: np.ndarray[Any, Any], dtype: str) -> tuple[str, np.ndarray[Any, Any]]:
    if dtype == "BF16":
        return dtype, (array.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, array.astype(safetensors.DTYPES[dtype])


def make(name: str, folder: Path) -> Path:
    """Writes layout `name` into `folder` and returns it."""
    config, how = LAYOUTS[name]
    text = {**COMMON, **config}
    folder.mkdir(parents=True, exist_ok=True)
    whole = text
    if "wrapper" in how:
        whole = {"model_type": how["wrapper"], "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 255, "do_sample": False}))
    parsed = load_config(folder)
    shapes = expected_tensors(parsed, fused_experts=how.get("fused_experts", True), has_mtp=True, has_head=not parsed.is_tied)
    rng = np.random.Generator(np.random.PCG64(sum(name.encode())))
    tensors: dict[str, tuple[str, np.ndarray[Any, Any]]] = {}
    for short, shape in shapes.items():
        full = short if short.startswith(("mtp.", "lm_head")) else how["prefix"] + short
        keep = "F32" if short.endswith(("A_log", "linear_attn.norm.weight")) else how["dtype"]
        tensors[full] = _stored(_random(rng, short, shape), keep)
    if "wrapper" in how:
        tensors["model.visual.patch_embed.proj.weight"] = _stored(np.zeros((4, 4), np.float32), "BF16")
    shards = how.get("shards", 1)
    if shards == 1:
        safetensors.write(folder / "model.safetensors", tensors)
        return folder
    weight_map = {full: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, full in enumerate(tensors)}
    for shard in set(weight_map.values()):
        safetensors.write(folder / shard, {full: tensors[full] for full in tensors if weight_map[full] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
