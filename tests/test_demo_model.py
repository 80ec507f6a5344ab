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
    async with forerun.open_engine("demo", spec_type="draft-mtp", draft_n_max=3) as engine:
        for text in HELD_OUT:
            speculation = (await engine.complete(text, max_tokens=128, temperature=0)).speculation
            statistics = speculation.drafters["draft-mtp"]
            rounds += speculation.num_rounds
            drafts += statistics.num_drafts
            accepted += statistics.num_accepted_tokens
            first += statistics.num_accepted_tokens_per_pos[0] if statistics.num_accepted_tokens_per_pos else 0
    assert first / drafts >= 0.6
    assert 1 + accepted / rounds >= 2


async def test_a_file_asked_for_again_is_drafted_mostly_by_ngrams() -> None:
    function = HELD_OUT[0]
    text = f"{function}\n\n# The same again:\n{function}\n\n# The same again:\n{function[: len(function) // 4]}"
    async with forerun.open_engine("demo") as engine:
        drafters = (await engine.complete(text, max_tokens=64, temperature=0)).speculation.drafters
    assert drafters["ngram-simple"].num_accepted_tokens > drafters["draft-mtp"].num_accepted_tokens


async def test_everyday_prompts_become_python() -> None:
    prompts = ["import os\nimport ", "def __init__(self, name", "for i in range(", 'if __name__ == "__main__":\n', "class Node:\n    def "]
    num_parsed = 0
    async with forerun.open_engine("demo") as engine:
        for text in prompts:
            lines = (text + (await engine.complete(text, max_tokens=96, temperature=0)).text).splitlines()
            # The last line may be cut; what stands before it should parse, at least once a block is closed.
            for end in range(len(lines) - 1, 1, -1):
                try:
                    ast.parse("\n".join(lines[:end]))
                except SyntaxError:
                    continue
                num_parsed += 1
                break
    assert num_parsed >= 3
