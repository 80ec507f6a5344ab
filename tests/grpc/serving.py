"""Starts `forerun serve` as its users do: a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

SECONDS_TO_START = 60.0
CODE = "from forerun.tools.cli import main; main()"


@dataclass(slots=True)
class Server:
    """A running server. `address` is the gRPC one, `http` the gateway's, if there is any."""

    process: subprocess.Popen[str]
    address: str
    http: str
    lines: list[str] = field(default_factory=list[str])

    def end(self) -> int:
        """Drains it. The exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(*args: str, host: str = "127.0.0.1", code: str = CODE) -> Generator[Server]:
    """A server on a free port, until the block is left."""
    where = [] if host.startswith("unix:") else ["--port", "0"]
    command = [sys.executable, "-W", "error", "-c", code, "serve", "--host", host, *where, *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        server, is_ready = Server(process, "", ""), threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                server.lines.append(line.rstrip())
                if line.startswith("forerun: listening on http"):
                    server.http = line.split()[-1]
                elif line.startswith("forerun: listening on "):
                    server.address = line.split()[-1]
                elif line.startswith("forerun: serving "):
                    is_ready.set()
            is_ready.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert is_ready.wait(SECONDS_TO_START), "the server did not start"
            assert server.address, "\n".join(server.lines)
            yield server
        finally:
            process.kill()
            process.wait()
            reader.join()


def details(error: Any) -> dict[str, Any]:
    """Name -> message, of the google.rpc details of a gRPC error."""
    from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0]
            for packed in status.details:
                name = packed.TypeName().rpartition(".")[2]
                found[name] = getattr(error_details_pb2, name)()
                assert packed.Unpack(found[name])
    return found


def refused(error: Any, code: grpc.StatusCode, reason: str) -> dict[str, Any]:
    """The details of an error, which must have this status and reason, and say nothing of our insides."""
    assert error.code() is code, (error.code(), error.details())
    found = details(error)
    assert found["ErrorInfo"].reason == reason
    assert found["ErrorInfo"].domain == "forerun"
    assert "Traceback" not in error.details()
    assert "Error(" not in error.details()
    return found
