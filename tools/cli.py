"""The command line. Flags are llama-server's where it has them; those with a default have an environment twin (FORERUN_PREDICT)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from .. import ForerunError, InvalidRequest, Prompt, Result, __version__
from . import bench_command, chat, client_command, flags, serve
from .convert import OUT_TYPES, convert, info
from .evaluation import command as evaluation
from .tracing import command as tracing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forerun", description="Fast, exact, observable inference of hybrid language models.")
    parser.add_argument("--version", action="version", version=f"forerun {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="text to continue")
    prompt.add_argument("-f", "--file", type=Path, help="file that holds the text, - for standard input")
    prompt.add_argument("--prompt-ids", type=flags.token_ids, help="token ids, as 1,2,3; needs no tokenizer")
    flags.add_model(generate)
    flags.add_sampling(generate)
    flags.add_speculation(generate)
    generate.add_argument("--no-overlap", action="store_true", help="one thing at a time: the same tokens, for comparison")
    generate.add_argument("--format", choices=("text", "json"), default="text", help="text as it comes, or one JSON object")
    chat.add_parser(commands)
    serve.add_parser(commands)
    client_command.add_parsers(commands)
    tracing.add_parser(commands)
    bench_command.add_parser(commands)
    evaluation.add_parser(commands)
    shown = commands.add_parser("info", help="say what a model file is", allow_abbrev=False)
    shown.add_argument("path", type=Path, help="a GGUF file, a Hugging Face folder, or demo")
    converted = commands.add_parser("convert", help="write a Hugging Face folder as a GGUF file", allow_abbrev=False)
    converted.add_argument("folder", type=Path, help="a Hugging Face folder, or demo")
    converted.add_argument("out", type=Path, help="the file to write")
    converted.add_argument("--outtype", choices=OUT_TYPES, default="bf16", help="type of the matrices (default: bf16)")
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
    async with flags.engine(args, overlap=not args.no_overlap) as engine:
        stream = engine.generate(prompt, prefill_progress=flags.Bar("prompt"), **flags.options(args))
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
        if flag in flags.RENAMED:
            parser.error(f"{flag} is not a flag here; use {flags.RENAMED[flag]}")
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
            bench_command.run(args, write)
        elif args.command == "eval":
            if not evaluation.run(args, write):
                sys.exit("forerun: speculation changed a text")
        elif args.command == "chat":
            anyio.run(chat.chat, args, write, figures)
        elif args.command == "serve":
            serve.run(args)
        elif args.command == "client":
            result = anyio.run(client_command.ask, args, write, to_json)
            if result is not None:
                sys.stderr.write(figures(result) + "\n")
        elif args.command == "trace":
            anyio.run(tracing.trace, args, write)
        else:
            anyio.run(_generate, args, write)
    except ForerunError as error:
        sys.exit(f"forerun: {error}")
    except BrokenPipeError:  # the reader of our output has gone; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
