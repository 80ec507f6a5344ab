"""Models from the Hugging Face hub, through huggingface_hub: its cache, its tokens, its environment variables (`HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`), its progress bars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from ..core.errors import ModelFileError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")
#: What a folder is read from.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "chat_template*")


def fetch(name: str) -> Path:
    """`ORG/REPO`: the folder of that repository. `ORG/REPO:QUANT`: its one GGUF file with QUANT in its name, and the draft head beside
    it if there is one. `@REVISION` after that is a branch, tag or commit. What has been fetched before is not fetched again.
    ModelFileError when it cannot be had."""
    what, _, revision = name.partition("@")
    repository, _, quant = what.partition(":")
    hub: Any = huggingface_hub  # its types are partly unknown
    how: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if not quant:
            return Path(hub.snapshot_download(repository, allow_patterns=list(PATTERNS), **how))
        files: list[str] = [file for file in hub.list_repo_files(repository, **how) if file.endswith(".gguf")]
        heads = [file for file in files if file.rpartition("/")[2].startswith("mtp-")]
        found = [file for file in files if quant.lower() in file.lower() and file not in heads]
        if len(found) != 1:
            several = ", ".join(found) or ", ".join(files) or "no GGUF file at all"
            raise ModelFileError(f"{name}: expected one GGUF file with {quant!r} in its name, found {several}")
        for head in heads:
            hub.hf_hub_download(repository, head, **how)
        return Path(hub.hf_hub_download(repository, found[0], **how))
    except ModelFileError:
        raise
    except Exception as error:  # what its HTTP library raises, which was one and became another
        raise ModelFileError(f"{name}: cannot be fetched: {error!r:.300}") from error
