"""The command line as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from forerun import Message, open_engine


def forerun(*args: str, env: dict[str, str] | None = None, stdin: str = "") -> Any:
    code = "from forerun.tools.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args], capture_output=True, text=True, timeout=60, env=env, input=stdin
    )


def test_json_is_one_object_with_everything() -> None:
    done = forerun("generate", "-p", "def f(", "-n", "12", "--temp", "0.8", "--seed", "7", "--format", "json")
    answer = json.loads(done.stdout)
    assert {"text", "token_ids", "finish_reason", "usage", "timings", "speculation"} <= set(answer)
    assert len(answer["token_ids"]) == answer["usage"]["num_completion_tokens"] == 12
    assert answer["sampling"]["seed"] == 7
    assert done.stderr == ""


def test_every_way_to_give_a_prompt(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "prompt").write_text("import os\n")
    texts = {
        forerun("generate", "-n", "8", *args, stdin="import os\n").stdout
        for args in (("-p", "import os\n"), ("-f", str(tmp_path / "prompt")), ("-f", "-"))
    }
    assert len(texts) == 1
    done = forerun("generate", "-m", str(checkpoints["moe"]), "--prompt-ids", "1,2,3", "-n", "4", "--ignore-eos", "--format", "json")
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    assert "left out the vision tower" in done.stderr


def test_the_plain_loop_says_the_same() -> None:
    args = ("generate", "-p", "import os", "-n", "20", "--temp", "0.8", "--seed", "3")
    assert forerun(*args).stdout == forerun(*args, "--no-overlap").stdout


def test_a_conversation_goes_on_from_what_was_said() -> None:
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    flags = ("--system", "be brief", "-n", "12", "--temp", "0.8", "--seed", "3")
    done = forerun("chat", *flags, stdin=f"write a loop\n\nand another\n{'x ' * 6000}\n/clear\nwrite a loop\n")
    assert done.returncode == 0
    assert "exceed the context of 4096" in done.stderr or "leave no room" in done.stderr
    assert "/clear begins anew" in done.stderr

    async def expected() -> str:
        beginning: list[Message] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "write a loop"}]
        async with open_engine("demo") as engine:
            first = (await engine.complete(beginning, **how)).text
            more: list[Message] = [*beginning, {"role": "assistant", "content": first}, {"role": "user", "content": "and another"}]
            return "".join(text + "\n" for text in (first, (await engine.complete(more, **how)).text, first))

    assert done.stdout == anyio.run(expected)


def test_an_interrupt_ends_an_answer_and_not_the_conversation() -> None:
    command = [
        sys.executable,
        "-u",
        "-W",
        "error",
        "-c",
        "from forerun.tools.cli import main; main()",
        "chat",
        "-n",
        "4000",
        "--ignore-eos",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("write a loop\n")
        process.stdin.flush()
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, problems = process.communicate("\n", timeout=60)
    assert (process.returncode, problems) == (0, "")
    assert 20 < len(begun + rest) < 8000  # 4,000 tokens are more


def test_an_environment_twin_is_a_default_and_a_flag_wins() -> None:
    env = {"FORERUN_PREDICT": "3", "FORERUN_SPEC_TYPE": "none"}
    answer = json.loads(forerun("generate", "-p", "x", "--format", "json", env=env).stdout)
    assert (len(answer["token_ids"]), answer["speculation"]["drafters"]) == (3, {})
    assert len(json.loads(forerun("generate", "-p", "x", "-n", "5", "--format", "json", env=env).stdout)["token_ids"]) == 5


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (("-p", "x", "-m", "nowhere"), 1, "nowhere: no such model"),
        (("-p", "x", "--temp", "-1"), 1, "temperature: must be between"),
        (("-p", "x", "--spec-type", "magic"), 1, "expected none, or a comma list of"),
        (("-p", "x", "--timeout", "0"), 1, "not finished after 0.0 s"),
        (("-p", "x", "--draft-max", "4"), 2, "use --spec-draft-n-max"),
        (("-f", "/nowhere/at/all"), 1, "No such file"),
        (("--prompt-ids", "1,x"), 2, "whole numbers"),
        ((), 2, "one of the arguments -p/--prompt -f/--file --prompt-ids is required"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(args: tuple[str, ...], status: int, says: str) -> None:
    done = forerun("generate", *args)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("--version", 0, ""),
        ("generate -hf nowhere/at:all@v1 -p x", 1, "nowhere/at:all@v1: cannot be fetched"),
        ("trace -p x --temp -1", 1, "temperature: must be between"),
        ("serve -c -1", 1, "--ctx-size: must not be below 0"),
        ("serve --http 99999", 1, "http: must be between 0 and 65535"),
        ("serve --host unix:/tmp/forerun --http 0", 1, "give an API key"),
        ("serve --admin-key= --stall-timeout 0", 1, "admin_key: was given"),
        ("serve --state-folder /nowhere", 1, "/nowhere is no folder"),
        ("client info --ssl-ca-file /nowhere", 1, "/nowhere: No such file"),
        ("client info --ssl-cert-file x --ssl-key-file y", 1, "and both with TLS"),
        ("client detokenize 1,-2", 1, "ids: "),
        ("eval tasks x -o /nowhere/answers --runs 0", 1, "/nowhere is no folder; num_runs: must be"),
    ],
)
def test_mistakes_of_every_command(command: str, status: int, says: str) -> None:
    done = forerun(*command.split(), env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
