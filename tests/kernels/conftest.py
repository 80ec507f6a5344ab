"""The CUDA backend for tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forerun.kernels.cuda.matrices import CudaBackend

from tests.conftest import cuda_backend
from tests.kernels.cuda_on_cpu import HostDevice


@pytest.fixture(params=["forwards", "backwards"])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    backend = cuda_backend(bool(request.config.getoption("--cuda")), request.param == "backwards")
    yield backend
    if isinstance(backend.device, HostDevice):
        backend.device.check()
