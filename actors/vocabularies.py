"""Vocabularies from files: tokenizer.json of a Hugging Face folder, and the tokens and merges of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..core.errors import ModelFileError
from ..kernels.formats.gguf import GgufFile
from ..kernels.model.config import read_json
from .tokenizer import Vocabulary

#: GGUF's names of the family's pre-tokenizers -> the pattern they split text by (llama.cpp, `llama-vocab.cpp`).
PRE_TOKENIZERS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
#: GGUF's token types that never come from text.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def folder_vocabulary(folder: Path) -> Vocabulary:
    """ModelFileError unless tokenizer.json is byte-level BPE."""
    path = folder / "tokenizer.json"
    decoder: Any = read_json(path).get("decoder")
    if not isinstance(decoder, dict) or cast("dict[str, Any]", decoder).get("type") != "ByteLevel":
        raise ModelFileError(f"{path}: decoder: expected type ByteLevel, got {decoder!r:.100}")
    settings = folder / "tokenizer_config.json"
    template: object = read_json(settings).get("chat_template") if settings.exists() else None
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        template = jinja.read_text(errors="replace")
    try:
        both = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(f"{path}: {error}") from None
    return Vocabulary(*both, template if isinstance(template, str) else None)


def gguf_vocabulary(file: GgufFile) -> Vocabulary | None:
    """None without tokens. ModelFileError unless they are byte-level BPE with a pre-tokenizer of the family."""
    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    model, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFileError(f"{file.path}: tokenizer {model!r:.50} with pre-tokenizer {pre!r:.50}: expected 'gpt2' with one of {known}")
    tokens, merges = cast("list[Any]", file.get("tokenizer.ggml.tokens", list)), cast("list[Any]", file.get("tokenizer.ggml.merges", list))
    types = cast("list[Any]", file.get("tokenizer.ggml.token_type", list, [1] * len(tokens)))
    if len(types) != len(tokens) or not all(isinstance(each, str) for each in (*tokens, *merges)) or len(set(tokens)) < len(tokens):
        raise ModelFileError(f"{file.path}: tokenizer.ggml: tokens, their types or merges are not what they should be, or appear twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    added = [
        AddedToken(token, special=kind == CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    try:
        ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
        both = _bpe(ids, pairs, added, pre), _bpe(ids, pairs, added, pre)
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(f"{file.path}: tokenizer.ggml: {error}") from None
    template = file.metadata.get("tokenizer.chat_template")
    return Vocabulary(*both, template if isinstance(template, str) else None)


def _bpe(ids: dict[str, int], merges: list[tuple[str, ...]], added: list[AddedToken], pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ids, cast("list[tuple[str, str]]", merges)))
    made: Any = tokenizer
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_tokens(added)
    return tokenizer


def gguf_stop_ids(file: GgufFile) -> frozenset[int]:
    """The tokens that end a text or a message."""
    found = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return frozenset(token for token in found if type(token) is int)


def gguf_metadata(folder: Path, num_embeddings: int) -> dict[str, object]:
    """What a GGUF file says of a folder's tokenizer; nothing without one. There is a token for each embedding, as llama.cpp demands.
    ModelFileError when its pre-tokenizer has no name there."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    values = read_json(path)
    patterns = {pattern: name for name, pattern in PRE_TOKENIZERS.items()}
    pre = next((name for pattern, name in patterns.items() if json.dumps(pattern) in json.dumps(values.get("pre_tokenizer"))), None)
    if pre is None:
        raise ModelFileError(f"{path}: its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}")
    model: Any = values["model"]
    ids: dict[str, int] = dict(model["vocab"])
    types = dict.fromkeys(ids.values(), 1)
    for token in cast("list[Any]", values.get("added_tokens") or []):
        ids[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    names = {i: name for name, i in ids.items()}
    size = max(max(names) + 1, num_embeddings)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = folder_vocabulary(folder)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": [types.get(i, UNUSED) for i in range(size)],
        "tokenizer.ggml.merges": merges,
        **({"tokenizer.chat_template": vocabulary.chat_template} if vocabulary.chat_template is not None else {}),
    }
