"""forerun bench: what is measured, and how it is shown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from . import flags
from .bench import TEXT, BenchParams, bench, table
from .bench_cuda import bench_cuda
from .plots import plot

#: Drafts a round that a picture has, unless others are asked for.
PLOTTED_LENGTHS = [1, 2, 3, 4, 6, 8]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("bench", help="measure a model on this machine", allow_abbrev=False)
    flags.add_model(parser)
    flags.option(parser, "-n", "--n-predict", "--predict", dest="predict", type=int, default=128, help="tokens of a run (default: 128)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="tokens of the prompt that is timed (default: 512)")
    parser.add_argument("-p", "--prompt", default=TEXT, help="text that runs continue")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind, in turn (default: 5)")
    parser.add_argument("--spec-type", action="append", help="a way to speculate, as in generate; may be given again (default: draft-mtp)")
    parser.add_argument("--parallel", type=flags.numbers, default=[], help="so many requests at once, as 1,2,4,8 (default: none)")
    parser.add_argument("--draft-lengths", type=flags.numbers, default=[], help="so many drafts a round, as 1,2,3,4 (default: none)")
    parser.add_argument("--synth-rates", type=flags.rates, default=(), help="accept drafts at random at these rates, as 0.8,0.7,0.6")
    parser.add_argument(
        "--plot", type=Path, help="PNG file: tokens a second by drafts a round, cost of a verify by rows (needs the extra `bench`)"
    )
    parser.add_argument("--vs", choices=("llama.cpp",), help="runs it in turn on the same GGUF file (needs the extra `bench`)")
    parser.add_argument("--json", action="store_true", help="every run's figure, instead of a table")
    parser.add_argument("--device", choices=("cuda",), help="instead: kernels and whole rounds on an NVIDIA device; needs no model")
    parser.add_argument(
        "--size",
        action="append",
        help="random weights of such a size and type, as 0.8B:q8_0 or 35B-A3B:iq4_xs, instead of a model; with --device, of bf16, q8_0, "
        "q4_k, q5_k or q6_k, and may be given again",
    )


def run(args: argparse.Namespace, write: Callable[[str], Any]) -> None:
    """Does what `forerun bench` was told."""
    if args.device == "cuda":
        bench_cuda(write, args.size or ["0.8B:bf16"])
        return
    size: str | None = args.size[0] if args.size else None
    lengths: list[int] = args.draft_lengths or (PLOTTED_LENGTHS if args.plot else [])
    params = BenchParams(
        num_prompt=args.prompt_tokens,
        num_tokens=args.predict,
        num_runs=args.runs,
        spec_types=args.spec_type or ["draft-mtp"],
        text=args.prompt,
        num_threads=args.threads,
        backend=args.backend,
        is_beside_llama_cpp=args.vs is not None,
        parallel=args.parallel,
        draft_lengths=lengths,
        synth_rates=args.synth_rates,
        size=size,
    )
    figures = anyio.run(bench, args.model, params)
    write(json.dumps([figure.to_json() for figure in figures]) + "\n" if args.json else table(figures) + "\n")
    if args.plot:
        plot(args.plot, figures, size or args.model)
