"""What the shipped model is for: its MTP head is accepted often enough to pay, and repetition is drafted by n-grams."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import forerun
import pytest

HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_mtp_drafts_are_mostly_accepted() -> None:
    first = drafts = rounds = accepted = 0
    async with forerun.open_engine("demo", spec_type="draft-mtp", draft_n_max=3, choose="first") as engine:
        for text in HELD_OUT:
            speculation = (await engine.complete(text, max_tokens=128, temperature=0)).speculation
            statistics = speculation.drafters["draft-mtp"]
            rounds += speculation.num_rounds
            drafts += statistics.num_drafts
            accepted += statistics.num_accepted_tokens
            first += statistics.num_accepted_tokens_per_pos[0] if statistics.num_accepted_tokens_per_pos else 0
    assert first / drafts >= 0.6
    assert 1 + accepted / rounds >= 2


async def test_files_asked_for_again_are_drafted_mostly_by_ngrams() -> None:
    by_ngrams = by_mtp = 0
    async with forerun.open_engine("demo") as engine:
        for text in HELD_OUT:
            again = f"{text}\n\n# The same again:\n{text}\n\n# The same again:\n{text[: len(text) // 4]}"
            drafters = (await engine.complete(again, max_tokens=64, temperature=0)).speculation.drafters
            by_ngrams += drafters["ngram-suffix"].num_accepted_tokens
            by_mtp += drafters["draft-mtp"].num_accepted_tokens
    assert by_ngrams > by_mtp


def parses(lines: list[str]) -> bool:
    """Whether some beginning of at least three lines is Python; the last line may be cut."""
    for end in range(len(lines) - 1, 2, -1):
        try:
            ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        return True
    return False


async def test_everyday_prompts_become_python() -> None:
    prompts = ["import os\n", "def read_lines(path):\n", "class Node:\n    def __init__(self, value):\n", "def add(a, b):\n"]
    num_parsed = 0
    async with forerun.open_engine("demo") as engine:
        for text in prompts:
            for seed in range(5):
                answer = await engine.complete(text, max_tokens=96, temperature=0.5, seed=seed)
                num_parsed += parses((text + answer.text).splitlines())
    assert num_parsed >= 10
