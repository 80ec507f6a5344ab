"""Curves of `forerun bench` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import ForerunError, InvalidRequest
from .bench import DRAFTS, ROW_COSTS, Figure


def plot(path: Path, figures: Sequence[Figure], title: str) -> None:
    """Tokens a second by drafts a round, and the cost of a verify by its rows, medians with quartiles, as PNG. InvalidRequest without
    matplotlib (the extra `bench`), ForerunError when the file cannot be written."""
    try:
        from matplotlib.figure import Figure as Page
    except ImportError:
        raise InvalidRequest([("--plot", 'needs matplotlib: pip install "forerun[bench]"')]) from None
    page: Any = Page(figsize=(11, 4.5), layout="constrained")
    page.suptitle(title)
    left, right = page.subplots(1, 2)
    _curve(left, [each for each in figures if each.kind == DRAFTS], "drafts a round", "tokens/s")
    one = Figure("verify of 1 row", "of 1 row", (1.0,), "", ROW_COSTS, 1)
    costs = [one, *(each for each in figures if each.kind == ROW_COSTS)]
    _curve(right, costs, "rows of a verify", "cost, in verifies of one row")
    rows = [each.at for each in costs]
    right.plot(rows, rows, linestyle=":", color="grey", label="row by row")
    right.legend()
    try:
        page.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ForerunError(f"{path}: cannot be written: {error.strerror}") from error


def _curve(axes: Any, figures: Sequence[Figure], x: str, y: str) -> None:
    at, medians = [each.at for each in figures], [each.median for each in figures]
    low, high = ([abs(each.quartiles[i] - each.median) for each in figures] for i in (0, 1))
    axes.errorbar(at, medians, yerr=[low, high], marker="o", capsize=3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.set_xticks(at)
    axes.grid(alpha=0.3)
