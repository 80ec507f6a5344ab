"""GGUF: every type against a twin written value by value, files that are damaged in all ways, and models that come back as they were."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import forerun
import numpy as np
import pytest
from forerun.actors.model import SHIPPED, Defaults
from forerun.actors.vocabularies import folder_vocabulary, gguf_metadata, gguf_vocabulary
from forerun.core.errors import ModelFileError
from forerun.kernels.formats.gguf import GgufFile, write
from forerun.kernels.formats.grids import GRIDS
from forerun.kernels.formats.stored import BY_NAME, quantise
from forerun.kernels.model.drafts import MtpRows
from forerun.kernels.model.gguf_names import GgufCheckpoint, gguf_config
from forerun.kernels.model.memory import ModelMemory, alone
from forerun.kernels.model.mtp import MtpHead
from forerun.kernels.model.trunk import Rows, Trunk
from forerun.kernels.model.weights import ModelWeights, load_weights
from forerun.kernels.reference import ReferenceBackend
from forerun.tools.convert import convert, info

from tests.checkpoints import prompt
from tests.kernels.blocks import random_blocks


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, "<f2", 1, at)[0])


def scale_of(block: bytes, j: int) -> tuple[int, int]:
    """The j-th scale and minimum of a Q4_K or Q5_K block (ggml's get_scale_min_k4)."""
    q = block[4:16]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
LEVELS = {"IQ1": [-1, 0, 1], "IQ2": [8, 25, 43], "IQ3": [4, 12, 20, 28, 36, 44, 52, 62], "IQ3_S": [1, 3, 5, 7, 9, 11, 13, 15]}
#: How the SHA-256 begins of the codebooks as ggml-common.h has them, a byte a value.
CODEBOOKS = {
    "IQ1_S": "07540ffc1aeaf6ad", "IQ2_XXS": "05826b5d3e472a3a", "IQ2_XS": "06e47aaca60b4dc1", "IQ2_S": "e1aa1473412b0552",
    "IQ3_XXS": "46e35f5a997efdee", "IQ3_S": "bd1af4945a1717c6",
}  # fmt: skip
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nibble(block: bytes, at: int, i: int) -> int:
    return block[at + i % 16] >> (4 if i >= 16 else 0) & 15


def bits(block: bytes, at: int, size: int, shift: int, width: int) -> int:
    return int.from_bytes(block[at : at + size], "little") >> shift & (1 << width) - 1


def sign_of(seven: int, i: int) -> int:
    return -1 if (seven | (seven.bit_count() & 1) << 7) >> i & 1 else 1


def codebook_value(kind: str, block: bytes, i: int) -> float:
    """The i-th value of a block of IQ1, IQ2 or IQ3, in units of its half."""
    g, of_32, of_16, levels = i // 8, i // 32, i // 16, LEVELS[kind[:3] if kind != "IQ3_S" else kind]
    book: list[list[int]] = GRIDS[kind].codebook.tolist()
    match kind:
        case "IQ1_S":
            word = bits(block, 34 + 2 * of_32, 2, 0, 16)
            level = levels[book[block[2 + g] + 256 * (word >> 3 * (g % 4) & 7)][i % 8]]
            return (2 * (word >> 12 & 7) + 1) * (level - 0.125 if word >> 15 else level + 0.125)
        case "IQ1_M":
            high = bits(block, 32 + g // 2, 1, 4 * (g % 2), 4)
            level = levels[book[block[g] + 256 * (high & 7)][i % 8]]
            return (2 * bits(block, 48 + of_16 // 4 * 2, 2, 3 * (of_16 % 4), 3) + 1) * (level - 0.125 if high & 8 else level + 0.125)
        case "IQ2_XXS":
            at, sign = 2 + 8 * of_32, sign_of(bits(block, 6 + 8 * of_32, 4, 7 * (g % 4), 7), i % 8)
            return (0.5 + bits(block, at + 4, 4, 28, 4)) / 4 * sign * levels[book[block[at + g % 4]][i % 8]]
        case "IQ2_XS":
            word = bits(block, 2 + 2 * g, 2, 0, 16)
            scale = (0.5 + bits(block, 66 + of_32, 1, 4 * (of_16 % 2), 4)) / 4
            return scale * sign_of(word >> 9, i % 8) * levels[book[word & 511][i % 8]]
        case "IQ2_S":
            index, sign = block[2 + g] + 256 * bits(block, 66 + g // 4, 1, 2 * (g % 4), 2), 1 - 2 * (block[34 + g] >> i % 8 & 1)
            return (0.5 + bits(block, 74 + of_32, 1, 4 * (of_16 % 2), 4)) / 4 * sign * levels[book[index][i % 8]]
        case "IQ3_XXS":
            sign = sign_of(bits(block, 66 + 4 * of_32, 4, 7 * (g % 4), 7), i % 8)
            return (0.5 + bits(block, 66 + 4 * of_32, 4, 28, 4)) / 2 * sign * levels[book[block[2 + i // 4]][i % 4]]
        case _:
            index, sign = block[2 + i // 4] + 256 * bits(block, 66 + of_32, 1, i // 4 % 8, 1), 1 - 2 * (block[74 + g] >> i % 8 & 1)
            return (1 + 2 * bits(block, 106 + i // 64, 1, 4 * (of_32 % 2), 4)) * sign * levels[book[index][i % 4]]


def twin(kind: str, block: bytes) -> list[float]:
    values: list[float]
    match kind:
        case "Q8_0":
            return [half(block, 0) * byte for byte in np.frombuffer(block, np.int8, 32, 2)]
        case "Q4_0":
            return [half(block, 0) * (nibble(block, 2, i) - 8) for i in range(32)]
        case "Q4_1":
            return [half(block, 0) * nibble(block, 4, i) + half(block, 2) for i in range(32)]
        case "Q5_0":
            return [half(block, 0) * (nibble(block, 6, i) + 16 * bits(block, 2, 4, i, 1) - 16) for i in range(32)]
        case "Q5_1":
            return [half(block, 0) * (nibble(block, 8, i) + 16 * bits(block, 4, 4, i, 1)) + half(block, 2) for i in range(32)]
        case "IQ1_M":
            parts = (bits(block, 48 + 2 * i, 2, 12, 4) << 4 * i for i in range(4))
            d = float(np.array(sum(parts), "<u2").view("<f2"))
            return [d * codebook_value(kind, block, i) for i in range(256)]
        case "IQ1_S" | "IQ2_XXS" | "IQ2_XS" | "IQ2_S" | "IQ3_XXS" | "IQ3_S":
            return [half(block, 0) * codebook_value(kind, block, i) for i in range(256)]
        case "IQ4_NL":
            return [half(block, 0) * IQ4[nibble(block, 2, i)] for i in range(32)]
        case "IQ4_XS":
            values = []
            for i in range(256):
                j = i // 32
                low, high = block[4 + j // 2] >> (4 if j % 2 else 0) & 15, int.from_bytes(block[2:4], "little") >> 2 * j & 3
                values.append(half(block, 0) * ((low | high << 4) - 32) * IQ4[nibble(block, 8 + 16 * j, i % 32)])
            return values
        case "MXFP4":  # a sign, two bits of exponent, one of fraction; a power of two for all
            codes = [nibble(block, 1, i) for i in range(32)]
            return [(-1) ** (code >> 3) * E2M1[code & 7] * 2.0 ** (block[0] - 127) for code in codes]
        case "Q2_K":
            values = []
            for i in range(256):
                quant = block[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
                values.append(half(block, 80) * (block[i // 16] & 15) * quant - half(block, 82) * (block[i // 16] >> 4))
            return values
        case "Q3_K":
            values = []
            for i in range(256):
                quant = block[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
                quant -= 0 if block[i % 32] >> (i // 32) & 1 else 4
                j = i // 16
                scale = (block[96 + j % 8] >> (4 if j >= 8 else 0) & 15) + 16 * (block[104 + j % 4] >> 2 * (j // 4) & 3)
                values.append(half(block, 108) * (scale - 32) * quant)
            return values
        case "Q4_K" | "Q5_K":
            values = []
            packed = block[16:] if kind == "Q4_K" else block[48:]
            for i in range(256):
                scale, least = scale_of(block, i // 32)
                quant = packed[i // 64 * 32 + i % 32] >> (4 if i // 32 % 2 else 0) & 15
                if kind == "Q5_K":
                    quant += 16 * (block[16 + i % 32] >> (i // 32) & 1)
                values.append(half(block, 0) * scale * quant - half(block, 2) * least)
            return values
        case "Q6_K":
            values = []
            for i in range(256):
                part, quarter, j = i // 128, i % 128 // 32, i % 32
                low = block[part * 64 + quarter % 2 * 32 + j] >> (4 if quarter >= 2 else 0) & 15
                high = block[128 + part * 32 + j] >> (2 * quarter) & 3
                scale = int(np.frombuffer(block, np.int8, 1, 192 + i // 16)[0])
                values.append(half(block, 208) * scale * ((low | high << 4) - 32))
            return values
        case "F32":
            return [float(np.frombuffer(block, "<f4")[0])]
        case "F16":
            return [half(block, 0)]
        case _:
            return [float((np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)[0])]


@pytest.mark.parametrize(("kind", "digest"), CODEBOOKS.items())
def test_codebooks_are_those_of_ggml(kind: str, digest: str) -> None:
    levels = np.array(LEVELS[kind if kind == "IQ3_S" else kind[:3]], np.int8)
    assert hashlib.sha256(levels[GRIDS[kind].codebook].tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize("kind", BY_NAME)
def test_every_type_is_read_as_it_is_defined(kind: str) -> None:
    blocks = random_blocks(kind, 40, np.random.default_rng(5))
    if kind == "MXFP4":
        blocks[:8, 0] = 0, 1, 2, 3, 127, 128, 129, 250
    expected = np.array([twin(kind, block.tobytes()) for block in blocks])
    np.testing.assert_allclose(BY_NAME[kind].read(blocks), expected, rtol=2e-6, atol=1e-6)


def test_what_is_written_is_what_is_read_as_near_as_the_type_allows(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(0, 1, (5, 64)).astype(np.float32)
    x[0, :32] = 0
    for kind, error in (("F32", 0.0), ("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 0.02)):
        write(tmp_path / "a.gguf", {"a": 1, "b": "x", "c": [1, -2], "d": ["p", "q"], "e": 0.5, "f": True}, {"x": (kind, lambda: x)})
        file = GgufFile(tmp_path / "a.gguf")
        assert file.metadata == {"a": 1, "b": "x", "c": [1, -2], "d": ["p", "q"], "e": 0.5, "f": True}
        assert np.abs(file.read("x") - x).max() <= error * np.abs(x).max()
        np.testing.assert_array_equal(quantise(file.read("x"), kind), file.raw("x"))  # rounds what is exact to itself
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def load(path: Path) -> ModelWeights:
    file = GgufFile(path)
    config = gguf_config(file)
    return load_weights(GgufCheckpoint(file, config), config, ReferenceBackend())


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_a_converted_model_computes_the_same(checkpoints: dict[str, Path], layout: str, weights: ModelWeights, tmp_path: Path) -> None:
    convert(checkpoints[layout], tmp_path / "m.gguf", "f32")
    converted = load(tmp_path / "m.gguf")
    is_tiled = weights.config.value_heads > weights.config.key_heads
    # GGUF has the epsilon in float32.
    assert converted.config == replace(weights.config, rms_eps=converted.config.rms_eps, is_tiled=is_tiled)
    logits: list[Any] = []
    for each in (weights, converted):
        trunk, head = Trunk(each, ReferenceBackend()), MtpHead(each, ReferenceBackend())
        memory = alone(ModelMemory(each.config), 80, 4)
        tokens = tuple(prompt(40))
        logits.append(trunk.prefill(Rows(memory, 0, tokens), is_last=True))
        logits.append(trunk.verify([Rows(memory, 40, (1, 2, 3))])[0])
        logits.append(head.logits(head.forward([MtpRows(memory, 1, tokens[1:], memory.hidden.read(0, 39))])))
    for one, other in zip(logits[:3], logits[3:], strict=True):
        if is_tiled:  # value heads are summed up in another order
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(one, other)


def test_the_converted_demo_model_says_the_same(tmp_path: Path) -> None:
    convert(Path("demo"), tmp_path / "m.gguf", "bf16")
    file, folder = gguf_vocabulary(GgufFile(tmp_path / "m.gguf")), folder_vocabulary(SHIPPED["demo"])
    assert file is not None
    for text in ("def f(x):\n    return 'é ñ 漢字 \u0301' # <|im_end|>\t1234", "", "a" * 100, "\r\n\n  x"):
        assert file.encode(text) == folder.encode(text)
        assert b"".join(map(file.token_bytes, file.encode(text))) == b"".join(map(folder.token_bytes, folder.encode(text)))
    assert (file.specials, file.chat_template) == (folder.specials, folder.chat_template)
    one, other = forerun.load_model(str(tmp_path / "m.gguf")), forerun.load_model("demo")
    assert (one.context, one.num_token_ids, one.has_mtp) == (other.context, other.num_token_ids, True)
    assert one.defaults == other.defaults
    assert one.fingerprint != other.fingerprint  # other bytes; their bits agree, but nothing says so
    assert "5.3 million parameters, 71 BF16, 52 F32" in info(tmp_path / "m.gguf")


def test_what_a_file_says_of_sampling_and_of_tokens_that_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(SHIPPED["demo"], folder)
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, **sampling, "do_sample": True}))
    convert(folder, tmp_path / "m.gguf", "bf16")
    assert Defaults.of_gguf(GgufFile(tmp_path / "m.gguf")) == Defaults.load(folder)
    assert Defaults.load(folder).sampling == sampling
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [9, 5, 7, 3]}))
    with pytest.raises(ModelFileError, match="4 tokens end a text, GGUF has room for 3"):
        convert(folder, tmp_path / "l.gguf", "bf16")
    metadata = gguf_metadata(folder, 5000)  # there are more embeddings than tokens
    write(
        tmp_path / "n.gguf", {**metadata, "general.sampling.temp": 0.5, "general.sampling.top_p": 7.0, "general.sampling.top_k": 20.0}, {}
    )
    padded, names = gguf_vocabulary(GgufFile(tmp_path / "n.gguf")), cast("list[str]", metadata["tokenizer.ggml.tokens"])
    assert padded is not None
    assert (len(names), names[-1], padded.size) == (5000, "[PAD4999]", folder_vocabulary(folder).size)
    assert Defaults.of_gguf(GgufFile(tmp_path / "n.gguf")).sampling == {"temperature": 0.5, "top_k": 20}
    assert "top_p is left out: 7.0" in caplog.text
    write(tmp_path / "o.gguf", {"general.sampling.temp": -1.0, "general.sampling.top_k": -1.0, "general.sampling.min_p": "x"}, {})
    assert Defaults.of_gguf(GgufFile(tmp_path / "o.gguf")).sampling == {"temperature": 0, "top_k": 0}


def test_positions_that_are_scaled_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    convert(checkpoints["dense"], tmp_path / "m.gguf", "f32")
    file = GgufFile(tmp_path / "m.gguf")
    for kind in ("none", "yarn"):
        tensors = {name: ("F32", partial(file.read, name)) for name in file.tensors}
        write(tmp_path / f"{kind}.gguf", {**file.metadata, "qwen35.rope.scaling.type": kind}, tensors)
    gguf_config(GgufFile(tmp_path / "none.gguf"))
    with pytest.raises(ModelFileError, match=r"rope\.scaling\.type: expected 'none', got 'yarn'"):
        gguf_config(GgufFile(tmp_path / "yarn.gguf"))


def test_a_file_in_parts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    convert(checkpoints["dense"], tmp_path / "whole.gguf", "f32")
    whole = GgufFile(tmp_path / "whole.gguf")
    names = list(whole.tensors)

    def put(part: int, count: int, file: str, of: list[str]) -> Path:
        metadata = {"split.no": part, "split.count": count, "split.tensors.count": len(names)}
        write(tmp_path / file, {**(whole.metadata if not part else {}), **metadata}, {n: ("F32", partial(whole.read, n)) for n in of})
        return tmp_path / file

    for i in range(3):
        put(i, 3, f"m-{i + 1:05}-of-00003.gguf", names[i::3])
    parts = GgufFile(tmp_path / "m-00001-of-00003.gguf")
    assert parts.tensors.keys() == whole.tensors.keys()
    for name in names:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))
    one, other = (forerun.load_model(str(file.path), backend="cpu") for file in (parts, whole))
    assert one.fingerprint == other.fingerprint
    for path, problem in (
        (tmp_path / "m-00002-of-00003.gguf", r"split\.no: expected 0"),
        (put(0, 3, "n-00001-of-00002.gguf", names[::3]), "its name does not end with -00001-of-00003"),
        (put(0, 2, "o-00001-of-00002.gguf", names), "o-00002-of-00002.gguf: cannot be read"),
        (put(0, 10**6, "p-00001-of-1000000.gguf", names), r"split\.no"),
    ):
        with pytest.raises(ModelFileError, match=problem):
            GgufFile(path)
    put(1, 2, "o-00002-of-00002.gguf", names[:1])
    with pytest.raises(ModelFileError, match="is in another part too"):
        GgufFile(tmp_path / "o-00001-of-00002.gguf")


def test_a_draft_head_in_a_file_of_its_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    convert(checkpoints["dense"], tmp_path / "whole.gguf", "f32")
    whole = GgufFile(tmp_path / "whole.gguf")

    def part(path: Path, names: list[str], metadata: dict[str, Any]) -> None:
        write(path, {**whole.metadata, **metadata}, {name: ("F32", partial(whole.read, name)) for name in names})

    of_head = [name for name in whole.tensors if name.startswith("blk.4.")]
    trunk = {"qwen35.nextn_predict_layers": 0, "qwen35.block_count": 4}
    part(tmp_path / "small-Q4_K_M.gguf", [name for name in whole.tensors if name not in of_head], trunk)
    assert not forerun.load_model(str(tmp_path / "small-Q4_K_M.gguf")).has_mtp
    part(tmp_path / "mtp-small-Q8_0.gguf", [*of_head, "token_embd.weight", "output_norm.weight"], {})
    model, other = (forerun.load_model(str(tmp_path / name), backend="reference") for name in ("small-Q4_K_M.gguf", "whole.gguf"))
    assert model.weights.mtp is not None
    assert other.weights.mtp is not None
    np.testing.assert_array_equal(model.weights.mtp.fc, other.weights.mtp.fc)
    (tmp_path / "mtp-small-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="mtp-small-Q8_0"):
        forerun.load_model(str(tmp_path / "small-Q4_K_M.gguf"))


def test_what_cannot_be_converted_or_read_is_said(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for layout, problem in (("next", "qwen3_next is not converted"), ("dense_r3", "no regular interval")):
        with pytest.raises(ModelFileError, match=problem):
            convert(checkpoints[layout], tmp_path / "m.gguf", "f32")
    write(tmp_path / "m.gguf", {"general.architecture": "llama"}, {})
    with pytest.raises(ModelFileError, match="expected one of qwen35, qwen35moe, got 'llama'"):
        forerun.load_model(str(tmp_path / "m.gguf"))
    with pytest.raises(ModelFileError, match="no such model"):
        forerun.load_model(str(tmp_path / "missing.gguf"))


def test_damaged_files_are_refused_or_read_and_nothing_else(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Cut at every byte of what precedes the data; and 2,000 files with a few bytes changed there."""
    convert(checkpoints["dense"], tmp_path / "m.gguf", "q8_0")
    good, bad = (tmp_path / "m.gguf").read_bytes(), tmp_path / "bad.gguf"
    size = good.index(b"output_norm.weight") + 3000
    for length in range(0, size, 7):
        bad.write_bytes(good[:length])
        with pytest.raises(ModelFileError):
            GgufFile(bad)
    rng, num_read = random.Random(6), 0
    bad.write_bytes(good)
    with bad.open("r+b") as file:
        for _ in range(2000):
            places = [rng.randrange(size if rng.random() < 0.5 else 600) for _ in range(rng.randrange(1, 4))]
            for place in places:
                file.seek(place)
                file.write(bytes([rng.choice([0, 1, 8, 127, 255, good[place] ^ 1 << rng.randrange(8)])]))
            file.flush()
            try:
                read = GgufFile(bad)
                config = gguf_config(read)
                if config.hidden < 10_000 and config.vocabulary < 100_000 and len(config.is_full_attention) < 100:
                    GgufCheckpoint(read, config).check({})
                    gguf_vocabulary(read)
                num_read += 1
            except ModelFileError:
                pass
            for place in places:
                file.seek(place)
                file.write(good[place : place + 1])
            file.flush()
    assert num_read < 1500


def test_names_of_no_length_and_counts_beyond_the_file_cost_nothing(tmp_path: Path) -> None:
    def refused(raw: bytes) -> None:
        (tmp_path / "bad.gguf").write_bytes(raw)
        with pytest.raises(ModelFileError):
            GgufFile(tmp_path / "bad.gguf")

    head = b"GGUF" + (3).to_bytes(4, "little")
    huge = (2**63).to_bytes(8, "little")
    refused(head + huge + (0).to_bytes(8, "little"))
    refused(head + (0).to_bytes(8, "little") + huge)
    one = head + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    refused(one + huge + b"x" * 40)
    key = (1).to_bytes(8, "little") + b"k"
    for inner in (0, 8, 9, 12, 99):
        refused(one + key + (9).to_bytes(4, "little") + inner.to_bytes(4, "little") + huge + b"x" * 40)
    refused(b"GGUF" + (3).to_bytes(4, "big") + bytes(40))
    refused(b"")
