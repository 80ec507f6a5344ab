"""Our errors as gRPC statuses with google.rpc details. No text of an exception leaves the house: what a status says is written here,
but for the list of what is wrong with a request, which is written for its sender."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from ...core.channel import RETRY_AFTER_SECONDS
from ...core.errors import (
    ActorRestarted,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    ForerunError,
    InvalidRequest,
    ModelFileError,
    Overloaded,
    RequestFailed,
    SavedSequenceError,
)

DOMAIN = "forerun"
#: Violations a status lists, and characters of each: statuses travel in headers, of which clients take 8 KiB or so.
MAX_VIOLATIONS, VIOLATION_CHARACTERS = 16, 200


class NotFound(ForerunError):
    """No such request, or it is another's."""

    status = "NOT_FOUND"


class NoState(NotFound):
    """Nothing was saved under a name."""


class Stalled(ForerunError):
    """The reader has not read for too long."""

    status = "RESOURCE_EXHAUSTED"


class Left(ForerunError):
    """The caller has cancelled the call, or its connection is gone. Nobody hears of it."""

    status = "CANCELLED"


class Starting(ForerunError):
    """The model is still being loaded."""

    status = "UNAVAILABLE"


#: class -> (reason, what is said of it)
TEXTS: dict[type[ForerunError], tuple[str, str]] = {
    InvalidRequest: ("INVALID_REQUEST", "the request is not valid"),
    Overloaded: ("OVERLOADED", "too many requests are waiting already"),
    DeadlineExceeded: ("DEADLINE_EXCEEDED", "not finished by the deadline"),
    RequestFailed: ("REQUEST_FAILED", "this request could not be finished, others go on"),
    ActorRestarted: ("ACTOR_RESTARTED", "what worked on this request had to be restarted, and it could not be gone on with"),
    EngineClosed: ("DRAINING", "the server is about to stop, and begins nothing new"),
    EngineDead: ("ENGINE_DEAD", "the engine has failed"),
    ModelFileError: ("MODEL_FILE", "a file is not as expected"),
    SavedSequenceError: ("SAVED_STATE", "the state could not be saved, or is damaged or another model's"),
    NotFound: ("NOT_FOUND", "there is no such request"),
    NoState: ("NO_STATE", "nothing was saved under this name"),
    Left: ("LEFT", "the call was cancelled"),
    Stalled: ("READER_STALLED", "the stream was not read for too long"),
    Starting: ("LOADING", "the model is being loaded"),
}


@dataclass(frozen=True, slots=True)
class Status:
    """What is answered."""

    code: grpc.StatusCode
    message: str
    reason: str
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_seconds: float | None = None

    @property
    def details(self) -> bytes:
        """google.rpc.Status, for the trailer grpc-status-details-bin."""
        found: list[Any] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.violations:
            found.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=field, description=problem) for field, problem in self.violations
                    ]
                )
            )
        if self.retry_after_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after_seconds * 1000))
            found.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed: list[any_pb2.Any] = []
        for each in found:
            packed.append(any_pb2.Any())
            packed[-1].Pack(each)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed).SerializeToString()


def status_of(error: ForerunError) -> Status:
    """The answer to a request that ended with `error`."""
    told = error.__cause__ if isinstance(error, RequestFailed) and isinstance(error.__cause__, ActorRestarted) else error
    reason, message = next((TEXTS[kind] for kind in type(told).__mro__ if kind in TEXTS), TEXTS[RequestFailed])
    violations: list[tuple[str, str]] = []
    retry_after: float | None = None
    if isinstance(error, InvalidRequest):
        found = error.violations
        violations = [(_plain(field), _plain(problem)) for field, problem in found[:MAX_VIOLATIONS]]
        message += ": " + "; ".join(f"{field} {problem}" for field, problem in violations[:3])
    if isinstance(error, Overloaded):
        retry_after = error.retry_after_seconds
    elif isinstance(error, EngineClosed | Starting):
        retry_after = RETRY_AFTER_SECONDS
    return Status(grpc.StatusCode[error.status], message, reason, tuple(violations), retry_after)


def _plain(problem: str) -> str:
    """As headers may have it."""
    return re.sub(r"[^ -~]", "?", problem)[:VIOLATION_CHARACTERS]
