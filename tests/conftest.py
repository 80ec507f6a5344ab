"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from forerun.kernels.backends import AnyBackend, make_backend
from forerun.kernels.cpu.matrices import CpuBackend
from forerun.kernels.model.config import load_config
from forerun.kernels.model.weights import FolderCheckpoint, ModelWeights, load_weights

from tests.checkpoints import LAYOUTS, make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the demo model's exactness over every held-out prompt and draft length (minutes)")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout name -> its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make(name, root / name) for name in LAYOUTS}


@cache
def _load(folder: Path, name: str) -> ModelWeights:
    return load_weights(FolderCheckpoint(folder), load_config(folder), make_backend(name, None))


#: For `indirect` parameters of `backend`: NumPy, the C kernels as this processor runs them best, and in plain C.
ALL_BACKENDS = ("reference", "cpu", "portable")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[AnyBackend]:
    """NumPy, or what a module asks for."""
    name = getattr(request, "param", "reference")
    found = make_backend("reference" if name == "reference" else "cpu", 2)
    if isinstance(found, CpuBackend):
        found.library.use("portable" if name == "portable" else "")
    yield found
    if isinstance(found, CpuBackend):
        found.library.use("")


@pytest.fixture
def weights(layout: str, checkpoints: dict[str, Path], backend: AnyBackend) -> ModelWeights:
    return _load(checkpoints[layout], backend.name)
