"""Errors, named by who is at fault. `status` is the gRPC status name the edge answers with; nothing else translates."""

from __future__ import annotations

from typing import ClassVar


class ForerunError(Exception):
    """Base of every error a caller may see."""

    status: ClassVar[str] = "UNKNOWN"


class InvalidRequest(ForerunError):
    """The caller's fault. `violations` lists every (field, what is wrong), not only the first."""

    status = "INVALID_ARGUMENT"

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in violations))
        self.violations = violations


class Overloaded(ForerunError):
    """The admission queue is full; trying again later may work."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(ForerunError):
    """The time the caller gave has passed."""

    status = "DEADLINE_EXCEEDED"


class RequestFailed(ForerunError):
    """This request could not be finished, others go on."""

    status = "INTERNAL"


class EngineClosed(ForerunError):
    """The engine was closed or is draining."""

    status = "UNAVAILABLE"


class EngineDead(ForerunError):
    """An actor failed in a way the engine could not recover from; `__cause__` is the first error."""

    status = "UNAVAILABLE"


class ModelFileError(ForerunError):
    """A model file is missing, damaged or not what was expected; the message names the file, the place and the expectation."""

    status = "FAILED_PRECONDITION"


class SavedSequenceError(ForerunError):
    """A sequence could not be saved, or a saved one is damaged, of another model, or of another version; nothing was changed."""

    status = "FAILED_PRECONDITION"


class PositionLost(ForerunError):
    """Memory cannot restore the position asked for exactly, and says which it holds. It never approximates."""

    status = "INTERNAL"


class LeaseLost(ForerunError):
    """The lease named is not lent: it was given back, or memory has begun a new life since."""

    status = "INTERNAL"


class ActorStopped(ForerunError):
    """An ask could not be answered because the actor has stopped for good."""

    status = "UNAVAILABLE"


class ActorRestarted(ForerunError):
    """The actor died with this ask in its mailbox or its hands. It runs again, and remembers nothing."""

    status = "INTERNAL"


class WorkFailed(ActorRestarted):
    """The actor died working on this ask, which may be the cause."""


class Superseded(ForerunError):
    """A newer message took this one's place in a full mailbox."""

    status = "INTERNAL"


class ActorStuck(Exception):
    """An actor has not finished what it began long ago. The reason of its restart."""


class InternalBug(Exception):
    """A state that Forerun's own code rules out. Never caught, never retried, never shown as anybody else's fault."""
