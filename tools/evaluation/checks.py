"""Whether an answer is right: the same text, the same number, or a program that passes its tests.

A program runs in a process of its own, in an empty folder, without our environment, with limits on time, memory, files and processes. That
keeps an answer from taking the machine down with it; it is no jail: answers of models one does not trust belong into a container.
"""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import cast

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES, FILE_BYTES = 10, 20, 2**30, 2**20
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?"
#: what a check may ask for, exactly one of them
KINDS = ("exact", "number", "python")


def problem_of(check: object) -> str | None:
    """What is wrong with a check, if anything."""
    if not isinstance(check, Mapping):
        return "must be an object"
    values = cast("Mapping[str, object]", check)
    found = [kind for kind in KINDS if kind in values]
    if len(found) != 1:
        return f"must have one of {', '.join(KINDS)}"
    value, more = values[found[0]], set(values) - {found[0]}
    if found[0] == "number":
        is_right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        tolerance = values.get("tolerance", 0)
        if not is_right or more - {"tolerance"} or not isinstance(tolerance, int | float) or not tolerance >= 0:
            return "number must be finite, and tolerance 0 or more"
        return None
    return None if isinstance(value, str) and not more else f"{found[0]} must be text, with nothing beside it"


def judge(check: Mapping[str, object], prompt: str, answer: str) -> str | None:
    """What is wrong with an answer to a prompt, None if nothing."""
    if "exact" in check:
        expected = cast("str", check["exact"]).strip()
        return None if answer.strip() == expected else f"expected {expected!r:.100}"
    if "number" in check:
        number, tolerance = cast("float", check["number"]), cast("float", check.get("tolerance", 0))
        found = number_in(answer)
        return None if found is not None and abs(found - number) <= tolerance else f"expected {number}, found {found}"
    return run_python(program_of(prompt, answer), cast("str", check["python"]))


def number_in(answer: str) -> float | None:
    """The last that is boxed, as mathematicians are asked to; else the last there is."""
    boxed = re.findall(r"\\boxed\{\s*(" + NUMBER + r")\s*\}", answer)
    found = boxed or re.findall(NUMBER, answer)
    return float(found[-1].replace(",", "")) if found else None


def program_of(prompt: str, answer: str) -> str:
    """The answer's last fenced block; without one the answer goes on from the prompt."""
    blocks = re.findall(r"```(?:python|py)?\n(.*?)```", answer, re.DOTALL)
    return blocks[-1] if blocks else prompt + answer


def run_python(program: str, tests: str) -> str | None:
    """What went wrong when a program, and its tests after it, ran in a process of its own; None if nothing."""

    def limit() -> None:
        for what, most in (
            (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
        ):  # fmt: skip
            resource.setrlimit(what, (most, most))

    # Said after the tests: a program that merely ends has not passed them.
    passed = os.urandom(16).hex()
    source = f"{program}\n\n{tests}\n\nprint({passed!r})\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", "import sys; exec(compile(sys.stdin.read(), 'answer', 'exec'), {'__name__': 'answer'})"],
            stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, cwd=folder, env={}, start_new_session=True, preexec_fn=limit,
        )  # fmt: skip
        try:
            child.communicate(source.encode("utf-8", "replace"), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"not finished after {WALL_SECONDS} s"
        finally:
            with suppress(ProcessLookupError):  # it may have left children behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        lines = said.read(FILE_BYTES).decode("utf-8", "replace").strip().splitlines()
    if child.returncode == 0 and lines[-1:] == [passed]:
        return None
    return lines[-1][:200] if lines and lines[-1] != passed else f"ended with {child.returncode}"
