"""The command line. Flags are llama-server's where it has them; those with a default have an environment twin (FORERUN_PREDICT)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from .. import BACKENDS, DEFAULT_MAX_TOKENS, DRAFTERS, ForerunError, InvalidRequest, Prompt, Result, SpeculationParams, open_engine
from .bench import TEXT, BenchParams, bench, table
from .convert import OUT_TYPES, convert, info

#: wrong or old flag -> what to use
RENAMED = {
    "--draft": "--spec-draft-n-max", "--draft-n": "--spec-draft-n-max", "--draft-max": "--spec-draft-n-max",
    "--temperature": "--temp", "--n-predict": "--predict", "--max-tokens": "--predict", "--lookup": "--spec-type ngram-simple",
    "--repetition-penalty": "--repeat-penalty", "--spec-ngram-size-n": "--spec-ngram-simple-size-n",
}  # fmt: skip
BAR_WIDTH = 30

SAMPLING_FLAGS = (
    ("--repeat-penalty", float, "divides logits above 0 of tokens that were there, and multiplies others (default: 1)"),
    ("--presence-penalty", float, "subtracted from logits of tokens in the answer (default: 0)"),
    ("--frequency-penalty", float, "subtracted each time a token stands in the answer (default: 0)"),
)


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


#: a field of SpeculationParams -> (how its text is read, what it says)
SPECULATION_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "draft_n_max": (int, "most tokens the MTP head drafts at once"),
    "draft_n_min": (int, "it drafts none rather than fewer"),
    "draft_p_min": (float, "it stops where its likeliest token is less likely"),
    "draft_sampling": (str, "coupled: it draws with the target's noise; greedy: it takes its likeliest token"),
    "ngram_simple_size_n": (int, "tokens that must match"),
    "ngram_simple_size_m": (int, "most tokens drafted"),
    "ngram_map_k_size_n": (int, "tokens that must match"),
    "ngram_map_k_size_m": (int, "most tokens drafted"),
    "ngram_map_k_min_hits": (int, "times they must have stood there before"),
    "ngram_map_k4v_size_n": (int, "tokens that must match"),
    "ngram_map_k4v_size_m": (int, "most tokens drafted"),
    "ngram_map_k4v_min_hits": (int, "times one continuation must have come before"),
    "ngram_mod_n_match": (int, "tokens that must match"),
    "ngram_mod_n_min": (int, "it drafts none rather than fewer"),
    "ngram_mod_n_max": (int, "most tokens drafted"),
    "ngram_cache_n_max": (int, "most tokens drafted"),
    "ngram_suffix_n_max": (int, "most tokens drafted"),
    "lookup_cache_static": (str, "file of counts that ngram-cache reads"),
    "lookup_cache_dynamic": (str, "file of counts that it reads, and brings up to date"),
    "choose": (str, "rate: the draft with the most expected tokens per second; first: the first there is, whole"),
    "synth_rates": (_rates, "accept drafts at random at these rates, as 0.8,0.7,0.6, to measure speed: the text is senseless"),
}


def _flag(name: str) -> str:
    return "--" + ("" if name.startswith("lookup") else "spec-") + name.replace("_", "-")


def _bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"(\d+)([+-].+)", text)
    try:
        return int(found[1]), float(found[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a token id and a bias, as 15043+1 or 15043-1, got {text!r}") from None


class Bar:
    """A progress bar on stderr when that is a terminal, nothing otherwise. Gone when full."""

    def __init__(self, label: str) -> None:
        self._label, self._is_terminal = label, sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if self._is_terminal:
            filled = BAR_WIDTH * done // total
            line = f"\r{self._label} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total}"
            sys.stderr.write(line if done < total else "\r" + " " * len(line) + "\r")
            sys.stderr.flush()


def _option(parser: argparse.ArgumentParser, *names: str, help: str, **kwargs: Any) -> None:
    """An option whose default comes from its environment twin when that is set."""
    twin = "FORERUN_" + names[-1].lstrip("-").upper().replace("-", "_")
    if twin in os.environ:
        kwargs["default"] = os.environ[twin]  # argparse converts and checks text defaults as it does arguments
    parser.add_argument(*names, help=f"{help} [{twin}]", **kwargs)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forerun", description="Fast, exact, observable inference of hybrid language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    _option(generate, "-m", "--model", default="demo", help="demo, a GGUF file or a Hugging Face folder (default: demo)")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="text to continue")
    prompt.add_argument("-f", "--file", type=Path, help="file that holds the text, - for standard input")
    prompt.add_argument("--prompt-ids", type=_token_ids, help="token ids, as 1,2,3; needs no tokenizer")
    _option(
        generate, "-n", "--predict", type=int, help=f"most tokens to generate (default: {DEFAULT_MAX_TOKENS}, or what the context leaves)"
    )
    _option(generate, "--temp", type=float, help="temperature; 0 is greedy (default: the model's, else 0)")
    _option(generate, "--top-k", type=int, help="keep the k likeliest tokens; 0 keeps all")
    _option(generate, "--top-p", type=float, help="keep the likeliest tokens up to this share")
    _option(generate, "--min-p", type=float, help="drop tokens less likely than this times the likeliest")
    _option(generate, "--timeout", type=float, help="seconds after which an unfinished request is an error")
    _option(generate, "-s", "--seed", type=int, help="seed of the noise that chooses tokens (default: random)")
    generate.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    for flag, read, text in SAMPLING_FLAGS:
        _option(generate, flag, type=read, help=text)
    generate.add_argument("--logit-bias", action="append", type=_bias, default=[], metavar="ID+BIAS", help="as 15043+1 or 15043-1")
    generate.add_argument("--stop", action="append", help="the answer ends where this text begins; may be given again")
    _option(generate, "--spec-type", help=f"none, or a comma list of {', '.join(DRAFTERS)} (default: what --spec-default says)")
    generate.add_argument("--spec-default", action="store_true", help="ngram-suffix, and draft-mtp if the model has that head")
    for name, (read, text) in SPECULATION_FLAGS.items():
        default = getattr(SpeculationParams(), name)
        flag = _flag(name)
        _option(generate, flag, type=read, default=default, help=f"{text} (default: {default or 'none'})")
    generate.add_argument("--spec-ngram-suffix-shared", action="store_true", help="ngram-suffix learns from finished requests too")
    _option(generate, "-t", "--threads", type=int, help="threads that compute (default: the physical cores)")
    _option(generate, "--backend", help=f"{' or '.join(BACKENDS)} (default: cpu, or reference where C kernels could not be compiled)")
    generate.add_argument("--no-overlap", action="store_true", help="one thing at a time: the same tokens, for comparison")
    measured = commands.add_parser("bench", help="measure a model on this machine", allow_abbrev=False)
    _option(measured, "-m", "--model", default="demo", help="demo, a GGUF file or a Hugging Face folder (default: demo)")
    _option(measured, "-t", "--threads", type=int, help="threads that compute (default: the physical cores)")
    _option(measured, "-n", "--predict", type=int, default=128, help="tokens of a run (default: 128)")
    measured.add_argument("--prompt-tokens", type=int, default=512, help="tokens of the prompt that is timed (default: 512)")
    measured.add_argument("-p", "--prompt", default=TEXT, help="text that runs continue")
    measured.add_argument("--runs", type=int, default=5, help="runs of each kind, in turn (default: 5)")
    measured.add_argument(
        "--spec-type", action="append", help="a way to speculate, as in generate; may be given again (default: draft-mtp)"
    )
    measured.add_argument("--vs", choices=("llama.cpp",), help="runs it in turn on the same GGUF file (needs the extra `bench`)")
    measured.add_argument("--json", action="store_true", help="every run's figure, instead of a table")
    shown = commands.add_parser("info", help="say what a model file is", allow_abbrev=False)
    shown.add_argument("path", type=Path, help="a GGUF file, a Hugging Face folder, or demo")
    converted = commands.add_parser("convert", help="write a Hugging Face folder as a GGUF file", allow_abbrev=False)
    converted.add_argument("folder", type=Path, help="a Hugging Face folder, or demo")
    converted.add_argument("out", type=Path, help="the file to write")
    converted.add_argument("--outtype", choices=OUT_TYPES, default="bf16", help="type of the matrices (default: bf16)")
    generate.add_argument("--format", choices=("text", "json"), default="text", help="text as it comes, or one JSON object")
    return parser


def _prompt(args: argparse.Namespace) -> Prompt:
    if args.prompt_ids is not None:
        return args.prompt_ids
    if args.file is None:
        return args.prompt
    try:
        raw = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
        return raw.decode()
    except OSError as error:
        raise InvalidRequest([("--file", f"{args.file}: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest([("--file", f"{args.file}: not UTF-8 at byte {error.start}")]) from None


def figures(result: Result) -> str:
    """One line: speeds, acceptance per drafter, mean accepted length."""
    t, usage = result.timings, result.usage
    decode = (usage.num_completion_tokens - 1) / t.decode_seconds if t.decode_seconds and usage.num_completion_tokens > 1 else 0.0
    prefill = usage.num_prompt_tokens / t.prefill_seconds if t.prefill_seconds else 0.0
    parts = [f"{usage.num_completion_tokens} tokens at {decode:.1f} tok/s, prompt of {usage.num_prompt_tokens} at {prefill:.0f} tok/s"]
    for name, s in result.speculation.drafters.items():
        if s.num_draft_tokens:
            share = s.num_accepted_tokens / s.num_draft_tokens
            parts.append(f"{name} accepted {s.num_accepted_tokens}/{s.num_draft_tokens} ({share:.0%})")
    parts.append(f"mean accepted length {result.speculation.mean_acceptance_length:.2f}")
    return ("SYNTHETIC acceptance; " if result.speculation.is_synthetic else "") + "; ".join(parts)


def to_json(result: Result) -> dict[str, Any]:
    """A result as plain values, with the mean accepted length worked out."""
    speculation = asdict(result.speculation) | {"mean_acceptance_length": result.speculation.mean_acceptance_length}
    return asdict(result) | {"finish_reason": result.finish_reason.value, "speculation": speculation}


async def _generate(args: argparse.Namespace, write: Callable[[str], Any]) -> None:
    prompt = _prompt(args)
    engine = open_engine(
        args.model,
        spec_type=args.spec_type,
        **{name: getattr(args, _flag(name).lstrip("-").replace("-", "_")) for name in SPECULATION_FLAGS},
        ngram_suffix_shared=args.spec_ngram_suffix_shared,
        overlap=not args.no_overlap,
        backend=args.backend,
        num_threads=args.threads,
        load_progress=Bar("loading"),
    )
    async with engine as opened:
        stream = opened.generate(
            prompt,
            max_tokens=args.predict,
            temperature=args.temp,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
            timeout_seconds=args.timeout,
            repetition_penalty=args.repeat_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
            logit_bias=dict(args.logit_bias),
            stop=args.stop,
            ignore_eos=args.ignore_eos,
            prefill_progress=Bar("prompt"),
        )
        async with stream:
            async for delta in stream:
                if args.format == "text":
                    write(delta.text)
    if args.format == "json":
        write(json.dumps(to_json(stream.result)) + "\n")
    else:
        write("\n")
        sys.stderr.write(figures(stream.result) + "\n")


def main() -> None:
    """Entry point of the `forerun` command. Exit codes: 0, 1 for our errors, 2 for wrong usage, 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = _parser()
    for argument in sys.argv[1:]:
        flag = argument.split("=")[0]
        if flag in RENAMED:
            parser.error(f"{flag} is not a flag here; use {RENAMED[flag]}")
    args = parser.parse_args()

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        if args.command == "info":
            write(info(args.path) + "\n")
        elif args.command == "convert":
            convert(args.folder, args.out, args.outtype)
        elif args.command == "bench":
            params = BenchParams(
                args.prompt_tokens, args.predict, args.runs, args.spec_type or ["draft-mtp"], args.prompt, args.threads, args.vs is not None
            )
            measured = anyio.run(bench, args.model, params)
            write(json.dumps([figure.to_json() for figure in measured]) + "\n" if args.json else table(measured) + "\n")
        else:
            anyio.run(_generate, args, write)
    except ForerunError as error:
        sys.exit(f"forerun: {error}")
    except BrokenPipeError:  # the reader of our output has gone; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
