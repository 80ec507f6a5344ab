"""Work that goes on elsewhere, as on a device, while the thread that began it does other things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Mark(Protocol):
    """A point in what was begun elsewhere."""

    def is_done(self) -> bool:
        """Whether all before it has been done."""
        ...

    def wait(self) -> None:
        """Until it has; others may begin more meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """Once all up to `mark` has been done, `finish` has the result: at once, unless it `is_long`. Without a mark nothing has been begun:
    `finish` does it. `on_device` is the result where it is made, for what is begun behind it before anybody reads it."""

    mark: Mark | None
    finish: Callable[[], T]
    is_long: bool = False
    on_device: object = None
