"""Fixtures shared by all tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from forerun.kernels.model.config import load_config
from forerun.kernels.model.weights import FolderCheckpoint, ModelWeights, load_weights
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the demo model's exactness over every held-out prompt and draft length (minutes)")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout name -> its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make(name, root / name) for name in LAYOUTS}


@cache
def _load(folder: Path) -> ModelWeights:
    return load_weights(FolderCheckpoint(folder), load_config(folder), ReferenceBackend())


@pytest.fixture
def weights(layout: str, checkpoints: dict[str, Path]) -> ModelWeights:
    return _load(checkpoints[layout])
