"""forerun eval: identity, text and tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import anyio

from ... import ForerunError, InvalidRequest, Options, Prompt
from ...actors.model import LoadedModel, load_model
from ...core.checks import check_ranges
from .. import flags
from . import identity, report, tasks, text

Write = Callable[[str], Any]
NUM_TOKENS = 128
#: Ways to speculate that are compared, where the model has a head and where it has not.
SPEC_TYPES = {True: ["draft-mtp", "ngram-suffix", "draft-mtp,ngram-suffix"], False: ["ngram-simple", "ngram-suffix"]}


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("eval", help="measure quality", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    same = kinds.add_parser("identity", help="whether speculation changes a token", allow_abbrev=False)
    same.add_argument("prompts", type=Path, help="JSON list, or a JSON object a line, with `prompt` or `text`")
    flags.add_model(same)
    flags.option(same, "-n", "--predict", type=int, default=NUM_TOKENS, help=f"tokens of an answer (default: {NUM_TOKENS})")
    same.add_argument("--spec-type", action="append", help="a way to speculate, as in generate; may be given again")
    same.add_argument("--temps", type=flags.rates, default=(0.0, 0.8, 1.5), help="temperatures (default: 0,0.8,1.5)")
    of_text = kinds.add_parser("text", help="bits per byte of a text, and divergence from another model", allow_abbrev=False)
    of_text.add_argument("file", type=Path, help="UTF-8")
    flags.add_model(of_text)
    of_text.add_argument("--against", help="another model with the same tokens: the parent that this one was quantised from")
    solved = kinds.add_parser("tasks", help="how many tasks are solved", allow_abbrev=False)
    solved.add_argument("file", type=Path, help='a JSON object a line: {"id", "prompt", "check": {"exact"|"number"|"python": ...}}')
    flags.add_model(solved)
    flags.add_sampling(solved)
    flags.add_speculation(solved)
    solved.add_argument("--runs", type=int, default=1, help="times that each task is asked, with another seed each (default: 1)")
    solved.add_argument("-o", "--out", type=Path, required=True, help="file of answers; those it has are not asked for again")
    solved.add_argument("--report", type=Path, help="HTML file")
    for each in (same, of_text, solved):
        each.add_argument("--json", action="store_true", help="figures for programs")


def run(args: argparse.Namespace, write: Write) -> bool:
    """Does what `forerun eval` was told. Whether all is as it should be: only identity can say no."""
    if args.kind == "identity":
        found = anyio.run(_identity, args)
        write(json.dumps([asdict(each) for each in found]) + "\n" if args.json else identity.table(found) + "\n")
        return all(each.is_identical for each in found)
    if args.kind == "text":
        model = _load(args, args.model)
        parent = _load(args, args.against) if args.against is not None else None
        result = text.measure(model, _read(args.file), flags.Bar("text"), parent)
        write(json.dumps(asdict(result)) + "\n" if args.json else text.table(result) + "\n")
    else:
        anyio.run(_tasks, args, write)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ForerunError(f"{path}: cannot be read: {error}") from error


def _load(args: argparse.Namespace, name: str) -> LoadedModel:
    return load_model(name, flags.Bar("loading"), backend=args.backend, num_threads=args.threads)


def read_prompts(path: Path) -> list[Prompt]:
    """ForerunError when there are none."""
    raw = _read(path)
    try:
        values: Any = json.loads(raw) if raw.lstrip().startswith("[") else [json.loads(line) for line in raw.splitlines() if line.strip()]
        prompts = [value["prompt"] if "prompt" in value else value["text"] for value in values]
    except (ValueError, KeyError, TypeError) as error:
        raise ForerunError(f"{path}: no prompts: {error!r:.100}") from None
    if not prompts:
        raise ForerunError(f"{path}: no prompts")
    return prompts


async def _identity(args: argparse.Namespace) -> list[identity.Comparison]:
    prompts, model = read_prompts(args.prompts), await anyio.to_thread.run_sync(_load, args, args.model)
    spec_types = args.spec_type or SPEC_TYPES[model.has_mtp]
    bar, done, total = flags.Bar("answers"), 0, len(prompts) * len(args.temps) * (1 + len(spec_types))

    def seen() -> None:
        nonlocal done
        done += 1
        bar(done, total)

    return await identity.identity(model, prompts, spec_types, args.temps, args.predict, seen)


async def _tasks(args: argparse.Namespace, write: Write) -> None:
    places = {"--out": args.out, "--report": args.report}
    violations = [(name, f"{path.parent} is no folder") for name, path in places.items() if path is not None and not path.parent.is_dir()]
    if violations := violations + check_ranges({"num_runs": args.runs}):
        raise InvalidRequest(violations)
    wanted, seed = tasks.read_tasks(args.file), args.seed or 0
    options = cast("Options", flags.options(args))
    async with flags.engine(args) as engine:
        about: dict[str, object] = {
            "model": engine.model.name, "fingerprint": engine.model.fingerprint, "tasks": args.file.name, "seed": seed,
            "options": {name: value for name, value in options.items() if value is not None and name not in ("seed", "timeout_seconds")},
        }  # fmt: skip
        about = json.loads(json.dumps(about))
        answers = await tasks.ask(engine, wanted, args.runs, options, seed, args.out, about, flags.Bar("answers"))
    found = tasks.score(answers)
    if args.report is not None:
        await anyio.Path(args.report).write_text(report.page(f"{args.file.name}, {engine.model.name}", about, wanted, answers))
    line = f"{found.accuracy:.1%} right ({found.low:.1%} to {found.high:.1%}), {found.num_answers} answers to {found.num_tasks} tasks\n"
    write(json.dumps(asdict(found)) + "\n" if args.json else line)
