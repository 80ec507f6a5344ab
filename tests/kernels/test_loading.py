"""Model folders that are wrong in one place: the error names the place and what was expected."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.errors import ModelFileError
from forerun.kernels.formats import safetensors
from forerun.kernels.model.config import load_config
from forerun.kernels.model.weights import FolderCheckpoint, ModelWeights, load_weights
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import make


def load(folder: Path) -> ModelWeights:
    return load_weights(FolderCheckpoint(folder), load_config(folder), ReferenceBackend())


def tensors_of(folder: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    file = safetensors.SafetensorsFile(folder / "model.safetensors")
    return {name: ("F32", file.read(name)) for name in file.tensors}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make("dense", tmp_path / "model")


def test_a_missing_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["model.layers.2.linear_attn.A_log"]
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"layers\.2\.linear_attn\.A_log is missing, expected \[2\]"):
        load(folder)


def test_a_surplus_tensor(folder: Path) -> None:
    tensors = tensors_of(folder) | {"model.layers.9.norm.weight": ("F32", np.zeros(4, np.float32))}
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"model\.layers\.9\.norm\.weight is not part of this model"):
        load(folder)


def test_a_misshapen_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = ("F32", tensors[name][1].T)
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"up_proj\.weight has shape \[64, 160\], expected \[160, 64\]"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        load(folder)


def test_flipped_bits_of_a_header_are_an_error_or_load(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(rng.integers(0, 4000))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            load(folder)
        except ModelFileError as error:
            assert "model" in str(error)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_hostile_headers(tmp_path: Path, entry: Any) -> None:
    raw = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(ModelFileError, match="tensor x"):
        safetensors.SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model_type", "llama", "model_type 'llama' is unknown; expected one of qwen3_5"),
        ("hidden_size", None, "hidden_size: expected a whole number"),
        ("hidden_size", 10**12, "hidden_size: expected a whole number"),
        ("layer_types", ["full_attention"], "layer_types: expected 4 entries"),
        ("linear_num_value_heads", 3, "3 is not a multiple of linear_num_key_heads = 2"),
        ("rms_norm_eps", -1, "rms_norm_eps: expected a positive number"),
        ("hidden_act", "gelu", "hidden_act: expected 'silu'"),
        ("model_type", [], "model_type"),
        ("rope_parameters", "x", "rope_parameters: expected an object"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_scaling: expected an object of type 'default'"),
        ("linear_conv_kernel_dim", 1, "linear_conv_kernel_dim: expected a whole number from 2"),
        ("mtp_num_hidden_layers", 3, "mtp_num_hidden_layers: expected 0 or 1"),
    ],
)
def test_a_wrong_config(folder: Path, key: str, value: Any, problem: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelFileError, match=problem):
        load(folder)


def test_the_vision_tower_is_left_out_with_one_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(make("moe", tmp_path))
    (record,) = caplog.records
    assert record.message.endswith("left out the vision tower (1 tensors): only text is served")


def test_bf16_and_f16_are_read_exactly(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3e-5, 65504.0], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    safetensors.write(tmp_path / "x.safetensors", {"b": ("BF16", raw), "h": ("F16", values.astype("<f2"))})
    file = safetensors.SafetensorsFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.read("b").view(np.uint32), raw.astype(np.uint32) << 16)
    np.testing.assert_array_equal(file.read("h"), values.astype("<f2").astype(np.float32))
