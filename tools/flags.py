"""Flags that several commands have: llama-server's names where it has them, an environment twin for those with a value."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

from .. import BACKENDS, DEFAULT_CHAT_TOKENS, DEFAULT_MAX_TOKENS, DRAFTERS, Engine, SpeculationParams, open_engine
from ..core.checks import json_of

#: wrong or old flag -> what to use
RENAMED = {
    "--draft": "--spec-draft-n-max", "--draft-n": "--spec-draft-n-max", "--draft-max": "--spec-draft-n-max",
    "--max-tokens": "--predict", "--lookup": "--spec-type ngram-simple",
    "--repetition-penalty": "--repeat-penalty", "--spec-ngram-size-n": "--spec-ngram-simple-size-n",
}  # fmt: skip
BAR_WIDTH = 30


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def rates(text: str) -> tuple[float, ...]:
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
    "synth_rates": (rates, "accept drafts at random at these rates, as 0.8,0.7,0.6, to measure speed: the text is senseless"),
}


def _flag(name: str) -> str:
    return "--" + ("" if name.startswith("lookup") else "spec-") + name.replace("_", "-")


def _bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"(\d+)([+-].+)", text)
    try:
        return int(found[1]), float(found[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a token id and a bias, as 15043+1 or 15043-1, got {text!r}") from None


def option(parser: argparse.ArgumentParser, *names: str, help: str, prefix: str = "FORERUN_", **kwargs: Any) -> None:
    """An option whose default comes from its environment twin when that is set."""
    twin = prefix + names[-1].lstrip("-").upper().replace("-", "_")
    if twin in os.environ and not re.match("tcp://", os.environ[twin]):  # what Kubernetes tells of a service called forerun
        kwargs["default"] = os.environ[twin]  # argparse converts and checks text defaults as it does arguments
    parser.add_argument(*names, help=f"{help} [{twin}]", **kwargs)


def token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, got {text!r}") from None


def _json_object(text: str) -> dict[str, Any]:
    found = json_of(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r:.100}")
    return cast("dict[str, Any]", found)


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


def add_model(parser: argparse.ArgumentParser) -> None:
    """What is run, and on what."""
    what = "demo, a GGUF file, a Hugging Face folder or ORG/REPO[:QUANT][@REVISION] (default: demo)"
    option(parser, "-m", "-hf", "--hf-repo", "--model", dest="model", default="demo", help=what)
    option(parser, "-t", "--threads", type=int, help="threads that compute (default: the physical cores)")
    option(parser, "--backend", help=f"{' or '.join(BACKENDS)} (default: cpu, or reference where C kernels could not be compiled)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when an answer ends."""
    most = f"{DEFAULT_MAX_TOKENS}, in chats {DEFAULT_CHAT_TOKENS}, or what there is room for"
    option(parser, "-n", "--n-predict", "--predict", dest="predict", type=int, help=f"most tokens to generate (default: {most})")
    option(parser, "--temperature", "--temp", dest="temp", type=float, help="temperature; 0 is greedy (default: the model's, else 0)")
    option(parser, "--top-k", type=int, help="keep the k likeliest tokens; 0 keeps all")
    option(parser, "--top-p", type=float, help="keep the likeliest tokens up to this share")
    option(parser, "--min-p", type=float, help="drop tokens less likely than this times the likeliest")
    option(parser, "--timeout", type=float, help="seconds after which an unfinished request is an error")
    option(parser, "-s", "--seed", type=int, help="seed of the noise that chooses tokens (default: random)")
    option(parser, "--repeat-penalty", type=float, help="divides logits above 0 of tokens that were there, multiplies others (default: 1)")
    option(parser, "--presence-penalty", type=float, help="subtracted from logits of tokens in the answer (default: 0)")
    option(parser, "--frequency-penalty", type=float, help="subtracted each time a token stands in the answer (default: 0)")
    parser.add_argument("--logit-bias", action="append", type=_bias, default=[], metavar="ID+BIAS", help="as 15043+1 or 15043-1")
    parser.add_argument("--stop", action="append", help="the answer ends where this text begins; may be given again")
    parser.add_argument("-j", "--json-schema", help="the answer is JSON of this schema")
    parser.add_argument("--grammar", help="or what this grammar says, in GBNF or Lark's notation")
    parser.add_argument("--regex", help="or what this matches")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")


def add_template(parser: argparse.ArgumentParser) -> None:
    """What chat templates are told."""
    help = """variables for the model's chat template, as '{"enable_thinking": false}'"""
    option(parser, "--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help=help)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of a request, from `add_sampling`."""
    return {
        "max_tokens": args.predict,
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "timeout_seconds": args.timeout,
        "repetition_penalty": args.repeat_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "logit_bias": dict(args.logit_bias),
        "stop": args.stop,
        "json_schema": args.json_schema,
        "grammar": args.grammar,
        "regex": args.regex,
        "ignore_eos": args.ignore_eos,
    }


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Who drafts, and how."""
    option(parser, "--spec-type", help=f"none, or a comma list of {', '.join(DRAFTERS)} (default: what --spec-default says)")
    parser.add_argument("--spec-default", action="store_true", help="ngram-suffix, and draft-mtp if the model has that head")
    for name, (read, text) in SPECULATION_FLAGS.items():
        default = getattr(SpeculationParams(), name)
        option(parser, _flag(name), type=read, default=default, help=f"{text} (default: {default or 'none'})")
    parser.add_argument("--spec-ngram-suffix-shared", action="store_true", help="ngram-suffix learns from finished requests too")


def engine(args: argparse.Namespace, **more: Any) -> AbstractAsyncContextManager[Engine]:
    """The engine of `add_model` and `add_speculation`, with a bar while it is loaded."""
    return open_engine(
        args.model,
        spec_type=None if args.spec_default else args.spec_type,
        **{name: getattr(args, _flag(name).lstrip("-").replace("-", "_")) for name in SPECULATION_FLAGS},
        ngram_suffix_shared=args.spec_ngram_suffix_shared,
        backend=args.backend,
        num_threads=args.threads,
        load_progress=Bar("loading"),
        **more,
    )
