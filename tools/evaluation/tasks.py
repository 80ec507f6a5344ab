"""Tasks with checkers, asked several times each: how many are solved, and how sure that is. What has been asked is in a file, and not asked
again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import anyio

from ... import DeadlineExceeded, Engine, ForerunError, InvalidRequest, Options, Prompt, RequestFailed
from . import checks

#: Requests that are asked at once.
AT_ONCE = 4
Z = 1.96


@dataclass(frozen=True, slots=True)
class Task:
    id: str
    prompt: Prompt
    check: Mapping[str, object]

    @property
    def text(self) -> str:
        """Of the prompt, for a program that goes on from it."""
        return self.prompt if isinstance(self.prompt, str) else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """To one task, in one of the runs. `problem` says what is wrong with it."""

    id: str
    run: int
    text: str
    num_tokens: int
    seconds: float
    problem: str | None


@dataclass(frozen=True, slots=True)
class Score:
    """The share of answers that are right, and between what it is in 95 of 100 cases (Wilson 1927), with no more evidence than there are
    tasks: answers to one task are alike."""

    num_tasks: int
    num_answers: int
    accuracy: float
    low: float
    high: float


def read_tasks(path: Path) -> list[Task]:
    """One JSON object a line: `prompt` (text or chat messages), `check`, perhaps `id`. ForerunError says which line is wrong."""
    found: list[Task] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ForerunError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
            task = Task(str(value.get("id", number)), value["prompt"], value["check"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ForerunError(f"{path}: line {number}: {error!r:.100}") from None
        if problem := checks.problem_of(task.check):
            raise ForerunError(f"{path}: line {number}: check {problem}")
        if not isinstance(value["prompt"], str | list) or not value["prompt"]:
            raise ForerunError(f"{path}: line {number}: prompt must be text or chat messages")
        found.append(task)
    if not found or len({task.id for task in found}) < len(found):
        raise ForerunError(f"{path}: must have tasks, each with an id of its own")
    return found


def read_answers(path: Path, about: Mapping[str, object]) -> list[Answer]:
    """What a file has already; none if there is no file, or nothing in it. ForerunError when it is no such file, InvalidRequest when they
    were asked otherwise than `about` says. A line that was cut off while it was written is left out."""
    try:
        if not path.exists():
            return []
        first, *lines = path.read_text().splitlines() or [json.dumps(about)]
        is_ours = json.loads(first) == about
    except (OSError, ValueError) as error:
        raise ForerunError(f"{path}: has no answers of ours: {error!r:.100}") from None
    if not is_ours:
        raise InvalidRequest([("--out", f"{path} has answers of another model, to other tasks or with other options: {first:.200}")])
    found: list[Answer] = []
    for line in lines:
        try:
            found.append(Answer(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def begin(path: Path, about: Mapping[str, object]) -> None:
    """Makes the file one that a line can be added to."""
    raw = path.read_bytes() if path.exists() else b""
    if not raw:
        path.write_text(json.dumps(about) + "\n")
    elif not raw.endswith(b"\n"):
        path.write_bytes(raw + b"\n")


async def answered(engine: Engine, task: Task, run: int, options: Options) -> Answer:
    """What is asked for in vain, since it is too long or takes too long, is a wrong answer. Cancelled: nothing is left behind."""
    try:
        result = await engine.complete(task.prompt, **options)
    except (InvalidRequest, RequestFailed, DeadlineExceeded) as error:
        return Answer(task.id, run, "", 0, 0.0, str(error))
    problem = await anyio.to_thread.run_sync(checks.judge, task.check, task.text, result.text)
    seconds = result.timings.prefill_seconds + result.timings.decode_seconds
    return Answer(task.id, run, result.text, len(result.token_ids), seconds, problem)


async def ask(
    engine: Engine, tasks: Sequence[Task], num_runs: int, options: Options, seed: int, path: Path, about: Mapping[str, object],
    seen: Callable[[int, int], None],
) -> list[Answer]:  # fmt: skip
    """All answers, of which those that the file `path` lacks are asked for, and added to it one by one. Cancelled: it has what came."""
    answers = read_answers(path, about)
    begin(path, about)
    known, total = {(answer.id, answer.run) for answer in answers}, num_runs * len(tasks)
    open_ends = [(task, run) for run in range(num_runs) for task in tasks if (task.id, run) not in known]
    with path.open("a") as file:
        limiter = anyio.CapacityLimiter(AT_ONCE)

        async def one(task: Task, run: int) -> None:
            async with limiter:
                answer = await answered(engine, task, run, {**options, "seed": seed + run})
            answers.append(answer)
            file.write(json.dumps(asdict(answer)) + "\n")
            file.flush()
            seen(len(answers), total)

        async with anyio.create_task_group() as group:
            for task, run in open_ends:
                group.start_soon(one, task, run)
    wanted = {(task.id, run) for task in tasks for run in range(num_runs)}
    return sorted((answer for answer in answers if (answer.id, answer.run) in wanted), key=lambda answer: (answer.run, answer.id))


def score(answers: Sequence[Answer]) -> Score:
    num_tasks = len({answer.id for answer in answers})
    share = sum(answer.problem is None for answer in answers) / len(answers)
    middle, width = share + Z * Z / (2 * num_tasks), Z * math.sqrt(share * (1 - share) / num_tasks + Z * Z / (4 * num_tasks**2))
    scale = 1 + Z * Z / num_tasks
    return Score(num_tasks, len(answers), share, max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale))


def prompt_text(prompt: Prompt) -> str:
    """For people."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{each['role']}: {each['content']}" for each in cast("list[dict[str, str]]", prompt))
