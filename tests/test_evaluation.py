"""forerun eval: figures that can be worked out otherwise, answers that are right and wrong, files that go on where they ended."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import forerun
import numpy as np
import pytest
from forerun.actors.model import LoadedModel
from forerun.tools.convert import convert
from forerun.tools.evaluation import checks, command, identity, report, tasks, text

HELD_OUT = Path(__file__).parent / "data" / "heldout_prompts.json"

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    model = forerun.load_model("demo")
    assert isinstance(model, LoadedModel)
    return model


async def test_speculation_changes_no_token_and_a_change_would_be_seen(demo: LoadedModel) -> None:
    prompts, num_seen = command.read_prompts(HELD_OUT)[:2], 0

    def seen() -> None:
        nonlocal num_seen
        num_seen += 1

    found = await identity.identity(demo, prompts, ["draft-mtp", "ngram-suffix"], [0.0, 0.8], 16, seen)
    assert (len(found), num_seen) == (8, 12)
    assert all(each.is_identical for each in found)
    assert "| draft-mtp | 0.0 | 2 of 2 | none |" in identity.table(found)
    found.append(identity.Comparison(1, 0.0, "draft-mtp", 16, 5, 2.0))
    assert "| draft-mtp | 0.0 | 2 of 3 | prompt 1, token 5 |" in identity.table(found)


def test_bits_per_byte_are_those_of_the_log_probabilities(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "WINDOW", 160)
    written = HELD_OUT.read_text()[:1200]
    assert demo.vocabulary is not None
    tokens, total = demo.vocabulary.encode(written), 0.0
    found = text.measure(demo, written, lambda done, of: None)
    rows = np.concatenate(list(text.log_probabilities(demo, tokens)))
    scored = [i for i in range(1, len(tokens)) if i % 160]
    for i in scored:
        total -= rows[i - 1, tokens[i]] / np.log(2)
    assert found.num_tokens == len(scored)
    assert found.num_bytes == sum(len(demo.vocabulary.token_bytes(tokens[i])) for i in scored)
    assert found.bits_per_byte.value == pytest.approx(total / found.num_bytes)
    assert found.divergence is None


def test_a_quantised_file_is_near_its_parent_and_another_model_is_not(demo: LoadedModel, tmp_path: Path) -> None:
    convert(Path("demo"), tmp_path / "demo.gguf", "q8_0")
    quantised = forerun.load_model(str(tmp_path / "demo.gguf"))
    assert isinstance(quantised, LoadedModel)
    written = HELD_OUT.read_text()[:3000]
    same, near = (text.measure(model, written, lambda done, of: None, demo) for model in (demo, quantised))
    assert same.divergence is not None
    assert near.divergence is not None
    assert near.agreement is not None
    assert same.divergence.value == 0
    assert 0 < near.divergence.value < 0.02
    assert 0.9 < near.agreement.value < 1
    assert abs(near.bits_per_byte.value - same.bits_per_byte.value) < 0.02
    assert "divergence from it" in text.table(near)


def test_errors_are_those_of_a_weighted_mean() -> None:
    pieces = np.random.default_rng(1).normal(3, 2, 400)
    mean = text.Mean.of([float(each) for each in pieces], [1] * 400)
    assert mean.value == pytest.approx(pieces.mean())
    assert mean.error == pytest.approx(1.96 * pieces.std() / 20)


RIGHT: list[tuple[dict[str, Any], str, str]] = [
    ({"exact": "42"}, "", " 42\n"),
    ({"number": 204}, "", r"so 7 + 3 = 10, and the answer is \boxed{204}, not 5"),
    ({"number": -1234.5}, "", "It is -1,234.5"),
    ({"number": 3.14, "tolerance": 0.01}, "", "about 3.1416"),
    ({"python": "assert f(2) == 4"}, "def f(x):\n    return", " x * x\n"),
    ({"python": "assert f(2) == 4"}, "Write f.", "Here:\n```python\ndef f(x):\n    return x ** 2\n```\nDone."),
]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"exact": "42"}, "", "42!"), ({"number": 3}, "", "no idea"), ({"number": 3}, "", r"3, no: \boxed{4}"),
    ({"python": "assert f(2) == 4"}, "", "def f(x): return 3"),
    ({"python": "assert f(2) == 4"}, "", "import sys\nsys.exit(0)"),
    ({"python": "assert f(2) == 4"}, "", "import os\nos._exit(0)"),
    ({"python": "pass"}, "", "raise SystemExit('x')"),
    ({"python": "pass"}, "", "x = 'a' * 10**10"),
    ({"python": "pass"}, "", "open('big', 'w').write('x' * 10**7)"),
    ({"python": "pass"}, "", "import os\nassert 'HOME' not in os.environ and os.listdir() == []\nwhile True: pass"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "prompt", "answer"), RIGHT)
def test_right_answers(check: dict[str, Any], prompt: str, answer: str) -> None:
    assert checks.problem_of(check) is None
    assert checks.judge(check, prompt, answer) is None


@pytest.mark.parametrize(("check", "prompt", "answer"), WRONG)
def test_wrong_answers(check: dict[str, Any], prompt: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CPU_SECONDS", 1)
    monkeypatch.setattr(checks, "WALL_SECONDS", 5)
    assert checks.judge(check, prompt, answer)


@pytest.mark.parametrize(
    "line",
    ["", "7", '{"prompt": "x"}', '{"prompt": "x", "check": {}}', '{"prompt": "", "check": {"exact": "y"}}',
     '{"prompt": "x", "check": {"number": "1"}}',
     '{"prompt": "x", "check": {"exact": "y", "number": 1}}', '{"prompt": "x", "check": {"exact": "y", "tolerance": 1}}',
     '{"id": 1, "prompt": "x", "check": {"exact": "y"}}\n{"id": 1, "prompt": "x", "check": {"exact": "y"}}'],
)  # fmt: skip
def test_tasks_that_make_no_sense_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "tasks").write_text(line)
    with pytest.raises(forerun.ForerunError, match="tasks"):
        tasks.read_tasks(tmp_path / "tasks")


async def test_tasks_go_on_where_they_ended(demo: LoadedModel, tmp_path: Path) -> None:
    path, about = tmp_path / "answers", {"model": "demo"}
    lines = ['{"id": "a<b", "prompt": "1 + 1 =", "check": {"number": 2}}', '{"prompt": "x = ", "check": {"python": "pass"}}']
    (tmp_path / "tasks").write_text("\n".join(lines))
    wanted = tasks.read_tasks(tmp_path / "tasks")
    counts: list[int] = []
    options: forerun.Options = {"max_tokens": 8, "temperature": 0.9}
    async with forerun.open_engine(demo) as engine:

        async def ask(num_runs: int) -> list[tasks.Answer]:
            counts.clear()
            return await tasks.ask(engine, wanted, num_runs, options, 5, path, about, lambda done, of: counts.append(done))

        first = await ask(2)
        assert counts == [1, 2, 3, 4]
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])  # somebody pulled the plug while the last answer was written
        again = await ask(2)
        assert counts == [4]
        assert [(each.id, each.run, each.text) for each in again] == [(each.id, each.run, each.text) for each in first]
        more = await ask(3)
        assert counts == [5, 6]
        assert [each for each in more if each.run < 2] == again
        with pytest.raises(forerun.InvalidRequest, match="another model"):
            await tasks.ask(engine, wanted, 1, options, 5, path, {"model": "x"}, lambda done, of: None)
        with pytest.raises(forerun.ForerunError, match="no answers of ours"):
            await tasks.ask(engine, wanted, 1, options, 5, HELD_OUT, about, lambda done, of: None)
    page = report.page("tasks & more", about, wanted, more)
    assert "tasks &amp; more" in page
    assert "a&lt;b" in page
    assert "<b" not in page.replace("<body", "")
    assert page.count("run 2: ") == 2


def test_a_score_is_as_sure_as_there_are_tasks() -> None:
    answers = [tasks.Answer(str(i), run, "", 1, 0.0, None if i < 8 else "wrong") for i in range(10) for run in range(5)]
    found = tasks.score(answers)
    assert (found.num_tasks, found.num_answers, found.accuracy) == (10, 50, 0.8)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # R, binom::binom.wilson(8, 10)


def test_the_command(tmp_path: Path) -> None:
    shown: list[str] = []
    model: dict[str, Any] = {"model": "demo", "backend": None, "threads": None, "json": True}
    (tmp_path / "prompts").write_text(json.dumps({"prompt": [1, 2, 3]}) + "\n")
    args = argparse.Namespace(kind="identity", prompts=tmp_path / "prompts", predict=8, spec_type=["ngram-suffix"], temps=(0.0,), **model)
    assert command.run(args, shown.append)
    (tmp_path / "text").write_text("def f():\n    pass\n")
    assert command.run(argparse.Namespace(kind="text", file=tmp_path / "text", against=None, **model), shown.append)
    same, bits = (json.loads(each) for each in shown)
    assert same[0]["num_same"] == 8
    assert bits == json.loads(json.dumps(asdict(text.measure(forerun.load_model("demo"), "def f():\n    pass\n", lambda done, of: None))))  # type: ignore[arg-type]
