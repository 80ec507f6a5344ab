"""The backends there are, by name, and what computes on each."""

from __future__ import annotations

import logging
from functools import cache

from ..core.errors import InvalidRequest
from .cpu.graph import CpuHead, CpuTrunk
from .cpu.matrices import CpuBackend
from .model.mtp import HeadBase, MtpHead
from .model.trunk import Trunk, TrunkBase
from .model.weights import ModelWeights
from .reference import ReferenceBackend

logger = logging.getLogger("forerun")

#: cpu: C kernels. reference: NumPy, to compare with.
BACKENDS = ("cpu", "reference")
AnyBackend = CpuBackend | ReferenceBackend


def make_backend(name: str | None, num_threads: int | None) -> AnyBackend:
    """A backend of BACKENDS; None: cpu, or reference where the C kernels could not be compiled, which is said once. InvalidRequest."""
    if name not in (None, *BACKENDS):
        raise InvalidRequest([("backend", f"must be one of {', '.join(BACKENDS)}, got {name!r:.50}")])
    if name == "reference":
        return ReferenceBackend()
    try:
        return CpuBackend(num_threads)
    except OSError as error:
        if name == "cpu":
            raise InvalidRequest([("backend", f"there are no C kernels: {error}")]) from error
        _say_slow(str(error))
        return ReferenceBackend()


@cache
def _say_slow(problem: str) -> None:
    logger.warning("%s: computing with NumPy, several times slower; with a C compiler (gcc or clang), install the package again", problem)


def make_trunk(weights: ModelWeights, backend: AnyBackend) -> TrunkBase:
    """`weights` were loaded for `backend`."""
    return CpuTrunk(weights, backend) if isinstance(backend, CpuBackend) else Trunk(weights, backend)


def make_head(weights: ModelWeights, backend: AnyBackend) -> HeadBase:
    return CpuHead(weights, backend) if isinstance(backend, CpuBackend) else MtpHead(weights, backend)
