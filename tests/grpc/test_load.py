"""A little of what load.py does at length."""

from __future__ import annotations

import pytest

from tests.grpc.load import fuzz, kills
from tests.grpc.serving import Server

pytestmark = pytest.mark.anyio


async def test_clients_that_are_killed_leave_nothing_behind(server: Server) -> None:
    await kills(server, 5)


async def test_hostile_requests_bring_no_fault(server: Server) -> None:
    await fuzz(server, 600)
