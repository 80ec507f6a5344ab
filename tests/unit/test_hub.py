"""Loading by name from a hub: a server of our own that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forerun.actors.hub import _parts_of  # pyright: ignore[reportPrivateUsage]
from forerun.tools.convert import convert

from tests.checkpoints import make

COMMIT = "c" * 40
FLAGS = ("--prompt-ids", "1,2,3", "-n", "8", "--format", "json")


def handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        """root/ORG/REPO/FILE."""

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"] and (root / path[2] / path[3]).is_dir():
                files = sorted((root / path[2] / path[3]).iterdir())
                listing: object = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1" * 40} for file in files]
                if "tree" not in path:
                    siblings = [{"rfilename": file.name} for file in files]
                    listing = {"id": f"{path[2]}/{path[3]}", "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(listing).encode(), "application/json")
            elif len(path) == 5 and path[2] == "resolve" and (root / path[0] / path[1] / path[4]).is_file():
                self.answer((root / path[0] / path[1] / path[4]).read_bytes(), "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment to find it in."""
    make("dense", tmp_path / "hub" / "org" / "model")
    folder = tmp_path / "hub" / "org" / "model-gguf"
    folder.mkdir()
    convert(tmp_path / "hub" / "org" / "model", folder / "model-Q8_0.gguf", "q8_0")
    convert(tmp_path / "hub" / "org" / "model", folder / "model-BF16.gguf", "bf16")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(tmp_path / "hub"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    server.shutdown()
    thread.join()
    server.server_close()


def generate(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from forerun.tools.cli import main; main()", "generate", "-m", name, *FLAGS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_folder_or_a_quantised_file_by_name(hub: dict[str, str]) -> None:
    for name in ("org/model", "org/model-gguf:q8_0", "org/model-gguf:BF16"):
        done = generate(name, hub)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["token_ids"]) == 8
    for name in ("org/model", "org/model-gguf:q8_0"):
        assert generate(name, {**hub, "HF_HUB_OFFLINE": "1"}).returncode == 0


def test_which_file_is_meant() -> None:
    files = [
        "BF16/m-00001-of-00002.gguf",
        "BF16/m-00002-of-00002.gguf",
        *(f"m-{kind}.gguf" for kind in ("Q4_K_M", "Q4_K_S", "UD-Q4_K_M", "IQ4_XS")),
    ]
    for quant, found in {"bf16": files[:2], "Q4_K_M": files[2:3], "UD-Q4_K_M": files[4:5], "Q4": [], "Q8_0": [], "IQ4": files[5:]}.items():
        assert _parts_of(quant, files) == found, quant


def test_what_is_not_there_is_said_in_one_line(hub: dict[str, str]) -> None:
    for name, problem in (
        ("org/missing", "cannot be fetched"), ("org/model-gguf:q4_k_m", "found model-BF16.gguf, model-Q8_0.gguf"),
        ("org/model-gguf:model", "found model-BF16.gguf, model-Q8_0.gguf"),
    ):  # fmt: skip
        done = generate(name, hub)
        assert done.returncode == 1
        assert problem in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
