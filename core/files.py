"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def in_place_of(path: Path, ending: str = ".tmp") -> Generator[BinaryIO]:
    """A file that takes the place of whatever `path` held once the block has ended, at once and on the disk, whoever else writes there; if
    the block fails, `path` is as it was. Nobody but its owner can read it. What a crash leaves behind is called `.`, the name, `.`,
    something and the `ending`. OSError when the system does not let us, ValueError when no file can have such a name."""
    handle, mine = tempfile.mkstemp(ending, f".{path.name}.", path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(mine, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(mine)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
