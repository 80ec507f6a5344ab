"""The backends there are, by name, and what computes on each."""

from __future__ import annotations

import logging
from functools import cache

from ..core.errors import InvalidRequest
from .cpu.graph import CpuHead, CpuTrunk
from .cpu.matrices import CpuBackend
from .cuda.device import CudaDevice
from .cuda.graph import CudaHead, CudaTrunk
from .cuda.matrices import CudaBackend
from .cuda.memory import CudaMemory
from .model.config import ModelConfig
from .model.memory import MemoryMaker, ModelMemory
from .model.mtp import HeadBase, MtpHead
from .model.trunk import Trunk, TrunkBase
from .model.weights import ModelWeights
from .reference import ReferenceBackend

logger = logging.getLogger("forerun")

#: cpu: C kernels. cuda: an NVIDIA device. reference: NumPy, to compare with.
BACKENDS = ("cpu", "cuda", "reference")
AnyBackend = CpuBackend | CudaBackend | ReferenceBackend


def make_backend(name: str | None, num_threads: int | None) -> AnyBackend:
    """A backend of BACKENDS; None: cpu, or reference where the C kernels could not be compiled, which is said once. InvalidRequest."""
    if name not in (None, *BACKENDS):
        raise InvalidRequest([("backend", f"must be one of {', '.join(BACKENDS)}, got {name!r:.50}")])
    if name == "reference":
        return ReferenceBackend()
    if name == "cuda":
        try:
            return CudaBackend(CudaDevice())
        except OSError as error:
            raise InvalidRequest([("backend", str(error))]) from error
    try:
        return CpuBackend(num_threads)
    except OSError as error:
        if name == "cpu":
            raise InvalidRequest([("backend", f"there are no C kernels: {error}")]) from error
        _say_slow(str(error))
        return ReferenceBackend()
    except ImportError as error:
        raise InvalidRequest([("backend", str(error))]) from error


@cache
def _say_slow(problem: str) -> None:
    logger.warning("%s: computing with NumPy, several times slower; with a C compiler (gcc or clang), install the package again", problem)


def make_trunk(weights: ModelWeights, backend: AnyBackend) -> TrunkBase:
    """`weights` were loaded for `backend`."""
    match backend:
        case CpuBackend():
            return CpuTrunk(weights, backend)
        case CudaBackend():
            return CudaTrunk(weights, backend)
        case ReferenceBackend():
            return Trunk(weights, backend)


def make_head(weights: ModelWeights, backend: AnyBackend) -> HeadBase:
    match backend:
        case CpuBackend():
            return CpuHead(weights, backend)
        case CudaBackend():
            return CudaHead(weights, backend)
        case ReferenceBackend():
            return MtpHead(weights, backend)


def make_memory(config: ModelConfig, backend: AnyBackend) -> MemoryMaker:
    if isinstance(backend, CudaBackend):
        return CudaMemory(config, backend.device)
    return ModelMemory(config, steps_equal_chunks=isinstance(backend, CpuBackend))
