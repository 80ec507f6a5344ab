"""forerun serve: the engine behind gRPC, and HTTP."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import InvalidRequest
from ..kernels.model.pages import PAGE
from . import flags


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("serve", help="serve a model over gRPC", allow_abbrev=False)
    flags.add_model(parser)
    flags.option(parser, "-a", "--alias", help="name of the model for those who ask (default: what --model says)")
    flags.option(parser, "--host", default="127.0.0.1", help="address to listen on, or unix:PATH (default: 127.0.0.1)")
    flags.option(parser, "--port", type=int, default=50051, help="port to listen on, 0 for any (default: 50051)")
    flags.option(parser, "--http", type=int, help="port of an OpenAI-compatible HTTP gateway as well (default: none)")
    flags.option(parser, "--api-key", help="bearer tokens that are let in, with commas between (default: anybody on this machine)")
    flags.option(parser, "--api-key-file", type=Path, help="file with one such token a line")
    flags.option(parser, "--admin-key", help="bearer token of AdminService (default: there is no such service)")
    flags.option(parser, "--ssl-cert-file", type=Path, help="PEM file of the server's certificate; read again when it changes")
    flags.option(parser, "--ssl-key-file", type=Path, help="PEM file of its key")
    flags.option(parser, "--ssl-client-ca-file", type=Path, help="PEM file: clients need a certificate of this authority")
    parser.add_argument("--insecure", action="store_true", help="let other machines in without TLS or token")
    flags.option(parser, "-np", "--parallel", type=int, default=8, help="requests that run at once (default: 8)")
    flags.option(parser, "-c", "--ctx-size", type=int, help="positions that all have together (default, and 0: 8192 each, or the context)")
    flags.option(parser, "--queue-size", type=int, default=256, help="requests that may wait for memory (default: 256)")
    flags.option(parser, "--queue-tokens", type=int, default=4_000_000, help="tokens their prompts may have together (default: 4000000)")
    flags.option(parser, "--cache-ram", type=int, help="MiB for beginnings that requests share, 0 for none (default: two states a slot)")
    flags.option(parser, "--cache-folder", type=Path, help="folder for those that do not fit, which outlive the server")
    flags.option(parser, "--cache-disk", type=int, default=8192, help="MiB they may take there (default: 8192)")
    flags.option(parser, "--preempt-after", type=float, default=20.0, help="seconds a request waits for memory of others (default: 20)")
    flags.option(parser, "--stall-timeout", type=float, default=30.0, help="seconds after which who does not read is dropped (default: 30)")
    flags.option(parser, "--max-message-mib", type=int, default=4, help="MiB a request may have, embedding rows need more (default: 4)")
    flags.option(parser, "--state-folder", type=Path, help="where AdminService saves requests")
    parser.add_argument("--otel", action="store_true", help="export OpenTelemetry spans, where OTEL_EXPORTER_OTLP_ENDPOINT says")
    flags.add_template(parser)
    flags.option(parser, "--event-loop", default="asyncio", help="asyncio or trio (default: asyncio)")
    flags.add_speculation(parser)


def _tokens(args: argparse.Namespace) -> tuple[str, ...]:
    tokens = [each for each in (args.api_key or "").split(",") if each]
    if args.api_key_file is not None:
        try:
            tokens += args.api_key_file.read_text().split()
        except OSError as error:
            raise InvalidRequest([("--api-key-file", f"{args.api_key_file}: {error.strerror}")]) from error
    if not tokens and (args.api_key is not None or args.api_key_file is not None):
        raise InvalidRequest([("--api-key", "was given, but there is no key in it")])
    return tuple(tokens)


def run(args: argparse.Namespace) -> None:
    """Returns when the server has been told to stop, and has."""
    from ..actors.edge import ServerParams, Tls, run_server

    if (args.ssl_cert_file is None) != (args.ssl_key_file is None):
        raise InvalidRequest([("--ssl-cert-file", "needs --ssl-key-file, and the other way round")])
    tls = Tls(args.ssl_cert_file, args.ssl_key_file, args.ssl_client_ca_file) if args.ssl_cert_file is not None else None
    if args.ssl_client_ca_file is not None and tls is None:
        raise InvalidRequest([("--ssl-client-ca-file", "needs --ssl-cert-file")])
    if not 1 <= args.max_message_mib <= 1024:
        raise InvalidRequest([("--max-message-mib", "must be between 1 and 1024")])
    limits = args.stall_timeout, args.max_message_mib * 2**20
    params = ServerParams(args.host, args.port, _tokens(args), args.admin_key, tls, args.insecure, *limits, args.chat_template_kwargs)
    if args.ctx_size is not None and args.ctx_size < 0:
        raise InvalidRequest([("--ctx-size", "must not be below 0")])
    sizes: dict[str, Any] = {
        "num_slots": args.parallel, "num_pages": -(-args.ctx_size // PAGE) if args.ctx_size else None,
        "queue_size": args.queue_size, "queue_tokens": args.queue_tokens, "preempt_after_seconds": args.preempt_after,
        "prefix_bytes": None if args.cache_ram is None else args.cache_ram * 2**20,
        "prefix_folder": args.cache_folder, "folder_bytes": args.cache_disk * 2**20,
    }  # fmt: skip
    run_server(
        lambda: flags.engine(args, **sizes),
        args.alias or args.model,
        params,
        event_loop=args.event_loop,
        state_folder=args.state_folder,
        http_port=args.http,
        is_traced=args.otel,
        announce=lambda text: print(f"forerun: {text}", file=sys.stderr, flush=True),  # noqa: T201
    )
