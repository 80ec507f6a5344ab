"""Models from the Hugging Face hub, through huggingface_hub: its cache, its tokens, its environment variables (`HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`), its progress bars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from ..core.errors import ModelFileError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")
#: What the name of one part of a GGUF file ends with (gguf-split).
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
#: What a folder is read from.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "chat_template*")


#: Of a GGUF repository, where nothing is said; as llama.cpp.
DEFAULT_QUANT = "Q4_K_M"


def fetch(name: str) -> Path:
    """`ORG/REPO`: the folder of that repository, or its GGUF file of DEFAULT_QUANT. `ORG/REPO:QUANT`: its GGUF file with QUANT in its name
    (of several, the one that ends with it and nothing before), all its parts, and the draft head beside it if there is one. `@REVISION`
    after that is a branch, tag or commit. What has been fetched before is not fetched again. ModelFileError when it cannot be had."""
    what, _, revision = name.partition("@")
    repository, _, quant = what.partition(":")
    hub: Any = huggingface_hub  # its types are partly unknown
    how: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if not quant:
            folder = Path(hub.snapshot_download(repository, allow_patterns=list(PATTERNS), **how))
            if (folder / "config.json").exists():
                return folder
        files = _listed(repository, how)
        heads = [file for file in files if file.rpartition("/")[2].startswith("mtp-")]
        parts = _parts_of(quant or DEFAULT_QUANT, [file for file in files if file not in heads])
        if not parts:
            there = ", ".join(files) or "no GGUF file at all"
            raise ModelFileError(f"{name}: expected one GGUF file with {quant or DEFAULT_QUANT!r} in its name, found {there}")
        for file in (*heads, *parts[1:]):
            hub.hf_hub_download(repository, file, **how)
        return Path(hub.hf_hub_download(repository, parts[0], **how))
    except ModelFileError:
        raise
    except Exception as error:  # what its HTTP library raises, which was one and became another
        raise ModelFileError(f"{name}: cannot be fetched: {error!r:.300}") from error


def _listed(repository: str, how: dict[str, Any]) -> list[str]:
    """Its GGUF files; those fetched before, where the hub cannot be asked."""
    hub: Any = huggingface_hub
    try:
        files: list[str] = hub.list_repo_files(repository, **how)
    except Exception as error:  # see fetch
        try:
            folder = Path(hub.snapshot_download(repository, local_files_only=True, **how))
        except Exception:  # nothing is there: the first says why
            raise error from None
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    return sorted(file for file in files if file.endswith(".gguf") and not file.rpartition("/")[2].startswith("mmproj"))


def _parts_of(quant: str, files: list[str]) -> list[str]:
    """The one file among `files`, which are sorted, in all its parts; none if there is none, or several."""
    found: dict[str, list[str]] = {}
    for file in files:
        if quant.lower() in file.lower():
            found.setdefault(PART.sub("", file), []).append(file)
    if len(found) > 1:
        exact = re.compile(rf"(?<!UD)[-.]{re.escape(quant)}(\.gguf)?$", re.IGNORECASE)
        found = {whole: parts for whole, parts in found.items() if exact.search(whole)}
    return next(iter(found.values())) if len(found) == 1 else []
