"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from forerun.kernels.backends import AnyBackend, make_backend
from forerun.kernels.cpu.matrices import CpuBackend
from forerun.kernels.cuda.device import CudaDevice
from forerun.kernels.cuda.matrices import CudaBackend
from forerun.kernels.model.config import load_config
from forerun.kernels.model.weights import FolderCheckpoint, ModelWeights, load_weights

from tests.checkpoints import LAYOUTS, make
from tests.kernels.cuda_on_cpu import HostDevice


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda", action="store_true", help="tests of the CUDA backend use a device, not a CPU in its place")
    parser.addoption("--full", action="store_true", help="the demo model's exactness over every held-out prompt and draft length (minutes)")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout name -> its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make(name, root / name) for name in LAYOUTS}


@cache
def load(folder: Path, backend: AnyBackend) -> ModelWeights:
    return load_weights(FolderCheckpoint(folder), load_config(folder), backend)


#: For `indirect` parameters of `backend`: NumPy, the C kernels as this processor runs them best, and in plain C.
ALL_BACKENDS = ("reference", "cpu", "portable")


@cache
def cuda_backend(is_real: bool, is_backwards: bool = False) -> CudaBackend:
    """The CUDA kernels on a device, or on a CPU that plays it, whose threads may run in the other order."""
    return CudaBackend(CudaDevice() if is_real else HostDevice(is_backwards))


@cache
def _made(name: str) -> AnyBackend:
    return make_backend(name, 2)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[AnyBackend]:
    """NumPy, or what a module asks for."""
    name = getattr(request, "param", "reference")
    if name == "cuda":
        yield cuda_backend(request.config.getoption("--cuda"))
        return
    found = _made("reference" if name == "reference" else "cpu")
    if isinstance(found, CpuBackend):
        found.library.use("portable" if name == "portable" else "")
    yield found
    if isinstance(found, CpuBackend):
        found.library.use("")


@pytest.fixture
def weights(layout: str, checkpoints: dict[str, Path], backend: AnyBackend) -> ModelWeights:
    return load(checkpoints[layout], backend)
