"""forerun client: a running server, asked from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags

if TYPE_CHECKING:
    from forerun.client import Client

Write = Callable[[str], Any]


def add_parsers(commands: Any) -> None:
    client: argparse.ArgumentParser = commands.add_parser("client", help="ask a running server", allow_abbrev=False)
    asks = client.add_subparsers(dest="ask", required=True)
    generate = asks.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("-p", "--prompt", help="text to continue")
    what.add_argument("--prompt-ids", type=flags.token_ids, help="token ids, as 1,2,3")
    what.add_argument("--chat", metavar="TEXT", help="what a user says; the model's chat template lays it out")
    flags.add_sampling(generate)
    generate.add_argument("--format", choices=("text", "json"), default="text", help="text as it comes, or one JSON object")
    tokenize = asks.add_parser("tokenize", help="the token ids of a text", allow_abbrev=False)
    tokenize.add_argument("text")
    detokenize = asks.add_parser("detokenize", help="the text of token ids", allow_abbrev=False)
    detokenize.add_argument("ids", type=flags.token_ids, help="as 1,2,3")
    abort = asks.add_parser("abort", help="end a request", allow_abbrev=False)
    abort.add_argument("request_id")
    others = (asks.add_parser("info", help="what model and server are"), asks.add_parser("loads", help="how busy the server is"))
    for parser in (generate, tokenize, detokenize, abort, *others):
        add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Where a server is, and how it knows us. Servers have flags of these names too, so the environment twins are others."""

    def option(*names: str, help: str, **kwargs: Any) -> None:
        flags.option(parser, *names, help=help, prefix="FORERUN_CLIENT_", **kwargs)

    option("-a", "--address", default="127.0.0.1:50051", help="host:port or unix:PATH (default: 127.0.0.1:50051)")
    option("--api-key", help="bearer token")
    parser.add_argument("--tls", action="store_true", help="speak TLS with a server that a public authority vouches for")
    option("--ssl-ca-file", type=Path, help="speak TLS; PEM file of who vouches for the server")
    option("--ssl-cert-file", type=Path, help="PEM file of the client's certificate")
    option("--ssl-key-file", type=Path, help="PEM file of its key")


def connect(args: argparse.Namespace) -> Client:
    from forerun.client import Client

    files = {"ca_file": args.ssl_ca_file, "certificate_file": args.ssl_cert_file, "key_file": args.ssl_key_file}
    return Client(args.address, token=args.api_key, tls=args.tls, **files)


async def ask(args: argparse.Namespace, write: Write, to_json: Callable[[Any], Any]) -> Any:
    """Does what `forerun client` was told. Returns the result when an answer was written as text."""
    async with connect(args) as client:
        match args.ask:
            case "generate":
                chat: list[Any] = [{"role": "user", "content": args.chat}]
                prompt = args.prompt if args.prompt is not None else args.prompt_ids or chat
                async with client.generate(prompt, **flags.options(args)) as stream:
                    async for delta in stream:
                        if args.format == "text":
                            write(delta.text)
                if args.format == "json":
                    write(json.dumps(to_json(stream.result)) + "\n")
                    return None
                write("\n")
                return stream.result
            case "tokenize":
                write(",".join(map(str, await client.tokenize(args.text))) + "\n")
            case "detokenize":
                write(await client.detokenize(args.ids) + "\n")
            case "abort":
                await client.abort(args.request_id)
            case "info":
                write(f"{await client.model_info()}{await client.server_info()}")
            case _:
                write(str(await client.loads()))
    return None
