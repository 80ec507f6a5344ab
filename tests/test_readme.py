"""Every README example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forerun
import pytest
from forerun.actors.lookup.family import Family

from tests.grpc.serving import CODE, serving

README = Path(__file__).parents[1] / "README.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_examples(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FinishReason.LENGTH" in done.stdout


@pytest.mark.anyio
async def test_the_drafter_that_is_shown_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (README.parent / "actors" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown: dict[str, Any] = {}
    exec(compile(code, "actors/README.md", "exec"), shown)  # noqa: S102
    assert len(code.splitlines()) <= 40
    period = Family("ngram-simple", lambda salt: shown["Period"]())
    monkeypatch.setattr("forerun.actors.tree.family", Mock(return_value=period))
    prompt, answers = [7, 8, 9, 10] * 12, list[forerun.Result]()
    for spec_type in ("none", "ngram-simple"):
        async with forerun.open_engine("demo", spec_type=spec_type, choose="first") as engine:
            answers.append(await engine.complete(prompt, max_tokens=60, ignore_eos=True))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].speculation.drafters["ngram-simple"].num_accepted_tokens > 10


@pytest.mark.parametrize("line", re.findall(r"^\.venv/bin/(forerun generate .*)$", README.read_text(), re.MULTILINE))
def test_command_lines(line: str) -> None:
    command = f"{sysconfig.get_path('scripts')}/{line}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3
    assert "mean accepted length" in done.stderr


def test_the_example_in_another_language(tmp_path: Path) -> None:
    (code,) = (code for language, code in BLOCKS if language == "js")
    packages = re.search(r"`(npm\s+install\s[^`]*)`", README.read_text())
    assert packages is not None
    impatient = ("--fetch-retries=0", "--fetch-timeout=20000")
    try:
        is_there = not subprocess.run([*packages[1].split(), *impatient], cwd=tmp_path, capture_output=True, timeout=60).returncode
    except (FileNotFoundError, subprocess.TimeoutExpired):
        is_there = False
    if not is_there:
        pytest.skip("needs Node.js, and its packages from the network")
    (tmp_path / "proto").symlink_to(README.parent / "proto")
    (tmp_path / "example.js").write_text(code)
    with serving() as server:
        done = subprocess.run(["node", "example.js", server.address], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        asked = [sys.executable, "-c", CODE, "client", "generate", "-a", server.address, "-p", "def walk(", "-n", "48"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        assert answer.stdout == done.stdout
        assert "mean accepted length" in answer.stderr


def test_the_server_starts_as_it_is_written() -> None:
    (line,) = re.findall(r"&& \.venv/bin/forerun (serve --http .*)$", README.read_text(), re.MULTILINE)
    with serving(*line.split()[1:-1], "0") as server:
        assert server.http
        assert server.end() == 0
