"""The measurement of what actors cost still measures."""

from __future__ import annotations

import anyio
import pytest

from tests.sim import overhead


@pytest.mark.parametrize("spec_type", ["none", "draft-mtp", "draft-mtp,ngram-simple"])
def test_every_case_has_a_figure(spec_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "NUM_TOKENS", 80)
    assert anyio.run(overhead.layer, spec_type, 2, True, True) > 0
