"""gRPC for Python and the openai package are asyncio's; the server's own loop is what varies here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.grpc.serving import Server, serving


@pytest.fixture(scope="package", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="package", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """For all tests of this folder: gRPC's poller wakes the loop that it first met, closed or not."""
    yield  # noqa: PT022 - the loop ends with it


@pytest.fixture(scope="package", params=["asyncio", "trio"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Serves the demo model to anybody, on each event loop."""
    with serving("--event-loop", request.param, "--http", "0", "--admin-key", "admin", "--stall-timeout", "2", "--state-folder",
                 str(request.getfixturevalue("tmp_path_factory").mktemp("states"))) as server:  # fmt: skip
        yield server
        assert server.end() == 0
        assert not [line for line in server.lines if not line.startswith("forerun: ")], server.lines
