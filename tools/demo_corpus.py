# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
"""The text the demo model learns from: permissively licensed Python, its licences, and a byte-level BPE over it.

    python tools/demo_corpus.py OUT [--wheels FOLDER] [--vocab 4096]

Reads the standard library of the running interpreter and every wheel in FOLDER whose project is listed in LICENCES
(get them with `pip download --no-deps -d FOLDER $(python tools/demo_corpus.py --list)`). Nothing else is read, so an
unlisted licence cannot slip in. Writes OUT/tokenizer.json, OUT/train.bin and OUT/heldout.bin (uint16 ids, files
separated by <|endoftext|>), OUT/heldout.json (names and texts of held-out files) and OUT/sources.json.

A file is held out by the hash of its name alone, so that it stays held out whatever else joins the corpus.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

#: project on PyPI -> SPDX licence of the Python files in its wheel
LICENCES = {
    "anyio": "MIT", "attrs": "MIT", "click": "BSD-3-Clause", "django": "BSD-3-Clause", "flask": "BSD-3-Clause",
    "httpx": "BSD-3-Clause", "jinja2": "BSD-3-Clause", "matplotlib": "Matplotlib (PSF-based)", "networkx": "BSD-3-Clause",
    "nltk": "Apache-2.0", "numpy": "BSD-3-Clause", "pandas": "BSD-3-Clause", "pydantic": "MIT", "pygments": "BSD-2-Clause",
    "pytest": "MIT", "requests": "Apache-2.0", "rich": "MIT", "scikit-learn": "BSD-3-Clause", "scipy": "BSD-3-Clause",
    "sqlalchemy": "MIT", "starlette": "BSD-3-Clause", "sympy": "BSD-3-Clause", "tornado": "Apache-2.0",
    "trio": "MIT OR Apache-2.0", "werkzeug": "BSD-3-Clause",
}  # fmt: skip
#: ids of the specials follow the merges, as in Qwen's own files
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Qwen3.5's pre-tokenizer (its tokenizer.json, field pre_tokenizer): words with their leading space, single digits,
#: punctuation, line ends, the rest of the white space
PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: folders whose files are data or machine-made rather than code somebody wrote to be read
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|idle_test|site-packages|lib2to3|pydoc_data|encodings|locale|_vendor|externals?|_pytest/_py|lexers|"
    r"formatters|styles|config-3[^/]*|ensurepip|turtledemo)(/|$)"
)
#: characters; shorter files are stubs, longer ones are mostly tables
SIZES = range(400, 120_000)
HELD_OUT_SHARE = 50  # one file in so many


class Source(NamedTuple):
    name: str
    project: str
    licence: str
    text: str


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] * HELD_OUT_SHARE < 256


def is_readable_python(text: str) -> bool:
    if len(text) not in SIZES or max(map(len, text.splitlines())) > 400:
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def sources(wheels: Path | None) -> Iterator[Source]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        text = path.read_text(encoding="utf-8", errors="ignore")
        if not SKIPPED.search(name) and is_readable_python(text):
            yield Source(f"cpython/{name}", "cpython", "PSF-2.0", text)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        project = wheel.name.split("-")[0].replace("_", "-").lower()
        if project not in LICENCES:
            print(f"left out: {wheel.name} (its licence is not in LICENCES)")
            continue
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py") and not SKIPPED.search(name):
                    text = archive.read(name).decode("utf-8", errors="ignore")
                    if is_readable_python(text):
                        yield Source(f"{wheel.name.split('-')[0]}/{name}", project, LICENCES[project], text)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def write_ids(tokenizer: Tokenizer, texts: list[str], path: Path) -> int:
    end = tokenizer.token_to_id("<|endoftext|>")
    chunks = [np.array([*encoded.ids, end], np.uint16) for encoded in tokenizer.encode_batch(texts)]
    np.concatenate(chunks).tofile(path)
    return sum(map(len, chunks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--list", action="store_true", help="print the projects the corpus may hold")
    args = parser.parse_args()
    if args.list or args.out is None:
        print(*LICENCES)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = list(sources(args.wheels))
    kept = [source for source in found if not is_held_out(source.name)]
    held_out = [source for source in found if is_held_out(source.name)]
    # A 16 MB sample, the standard library first, gives the same merges as all of it to within a few.
    sample, size = [], 0
    for source in sorted(kept, key=lambda s: (s.project != "cpython", hashlib.md5(s.name.encode()).digest())):  # noqa: S324 - order only
        if size < 16_000_000:
            sample.append(source.text)
            size += len(source.text)
    tokenizer = train_tokenizer(sample, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    totals: dict[str, dict[str, object]] = {}
    for source in kept:
        entry = totals.setdefault(source.project, {"licence": source.licence, "num_files": 0, "num_characters": 0})
        entry["num_files"] = int(str(entry["num_files"])) + 1
        entry["num_characters"] = int(str(entry["num_characters"])) + len(source.text)
    num_train = write_ids(tokenizer, [source.text for source in kept], args.out / "train.bin")
    num_held_out = write_ids(tokenizer, [source.text for source in held_out], args.out / "heldout.bin")
    (args.out / "heldout.json").write_text(json.dumps([[s.name, s.licence, s.text] for s in held_out]))
    summary = {"projects": totals, "num_train_tokens": num_train, "num_heldout_tokens": num_held_out}
    summary["num_heldout_bytes"] = sum(len(source.text.encode()) for source in held_out)
    (args.out / "sources.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
