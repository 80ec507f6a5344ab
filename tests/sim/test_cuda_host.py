"""The engine where a device is at work for a while, of every length: what is waited for in place, what is looked at, what is neither."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.sim import cuda_host
from tests.sim.cuda_host import idle_model, measure


@pytest.mark.parametrize("microseconds", [100, 800, 1500, 2500, 6000])
def test_work_of_every_length(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, microseconds: int) -> None:
    monkeypatch.setattr(cuda_host, "NUM_TOKENS", 30)
    model = idle_model(checkpoints["dense"], microseconds / 1e6)
    for spec_type in ("none", "draft-mtp", "draft-mtp,ngram-suffix"):
        for at_once in (1, 3):
            assert "tokens a round" in anyio.run(measure, model, spec_type, "rate", at_once, 0.0)
