"""Faults as a simulation makes them: deaths, a device that fails, observers with a bug, drafts that are garbage."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import anyio
from forerun.core.channel import Envelope, Reply
from forerun.core.errors import ForerunError
from forerun.core.speculation import Draft
from forerun.core.trace import Event

from tests.sim.fakes import NUM_TOKEN_IDS


class DeviceError(Exception):
    """The simulated device failed."""


class Crash(Exception):
    """An actor died, as the seed has it."""


def raising(event: Event) -> None:
    """An observer with a bug."""
    raise ZeroDivisionError


@dataclass
class SpoiltReply:
    inner: Reply[Any]
    spoilt: Callable[[Draft], Draft]

    def set(self, value: Draft | None) -> None:
        self.inner.set(self.spoilt(value) if value is not None else None)

    def fail(self, error: ForerunError) -> None:
        self.inner.fail(error)

    async def wait(self) -> Draft | None:
        return await self.inner.wait()


class Spoilt(Envelope):
    """A question to a drafter, or a verify, whose draft is garbage, or the draft of the question before."""

    __slots__ = ("_former", "_rng")

    def __init__(self, envelope: Envelope, rng: random.Random, former: list[tuple[int, ...]]) -> None:
        for name in Envelope.__slots__:
            setattr(self, name, getattr(envelope, name))
        self._rng, self._former = rng, former

    def answer(self, value: object) -> None:
        if isinstance(value, Draft):
            value = self._spoilt(value)
        super().answer(value)

    def promise(self) -> Reply[Any]:
        return cast("Reply[Any]", SpoiltReply(super().promise(), self._spoilt))

    def _spoilt(self, draft: Draft) -> Draft:
        garbage = tuple(self._rng.randrange(-2, NUM_TOKEN_IDS + 2) for _ in range(self._rng.randrange(80)))
        tokens = self._rng.choice([garbage, *self._former[-3:]])
        self._former.append(draft.tokens)
        return Draft(draft.drafter, tokens)


@dataclass(frozen=True)
class SimulatedMark:
    end: float
    is_failing: bool

    def is_done(self) -> bool:
        if self.is_failing:
            raise DeviceError
        return anyio.current_time() >= self.end

    def wait(self) -> None:
        """In place nothing takes time."""
        if self.is_failing:
            raise DeviceError
