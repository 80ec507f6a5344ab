"""Who is let in, how a server starts and ends, and what its clients see of that."""

from __future__ import annotations

import datetime
import http.client
import json
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import forerun
import grpc
import grpc.aio
import pytest
import trustme
from forerun.actors.edge.server import MAX_HEALTH_WATCHERS, ServerParams, is_local
from forerun.client import Client, ServerError
from forerun.v1 import admin_service_pb2, admin_service_pb2_grpc
from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import generation_service_pb2_grpc as generation
from grpc_health.v1 import health_pb2, health_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]

from tests.grpc.serving import CODE, Server, refused, serving

pytestmark = pytest.mark.anyio

PROMPT = "def read_lines(path):\n"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("second\nthird\n")
    with serving("--api-key", "first", "--api-key-file", str(keys), "--admin-key", "root") as server:
        yield server


async def test_nobody_is_let_in_without_a_token(guarded: Server) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)
        admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        request = pb.TokenizeRequest(prompt=pb.Prompt(text="x"))
        for metadata in ((), bearer("First"), bearer(""), bearer("first "), (("authorization", "first"),),
                         (("authorization", "Basic first"),)):  # fmt: skip
            for call in (
                lambda how=metadata: stub.Tokenize(request, metadata=how),
                lambda how=metadata: stub.Generate(pb.GenerateRequest(), metadata=how).read(),
                lambda how=metadata: admin.Profile(admin_service_pb2.ProfileRequest(seconds=1), metadata=how),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call()
                refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, "NO_TOKEN")
        for token in ("first", "second", "third"):
            assert (await stub.Tokenize(request, metadata=bearer(token))).ids
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # a user is no admin
                await admin.Profile(admin_service_pb2.ProfileRequest(seconds=1), metadata=bearer(token))
            refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, "NO_TOKEN")
        assert (await admin.Profile(admin_service_pb2.ProfileRequest(seconds=0.01), metadata=bearer("root"))) is not None
        unsent = cast(Any, channel.stream_stream("/forerun.v1.GenerationService/Generate"))(timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # nobody's message is waited for
            await unsent.read()
        refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, "NO_TOKEN")
        health: Any = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_HEALTH_WATCHERS)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # who waits at the door keeps nobody out
            await health.Watch(health_pb2.HealthCheckRequest()).read()
        refused(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert (await stub.Tokenize(request, metadata=(("authorization", "bearer first"),))).ids
        for watch in watches:
            watch.cancel()
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    async with Client(guarded.address) as client:
        with pytest.raises(ServerError, match="UNAUTHENTICATED"):
            await client.complete("x", max_tokens=1)
    async with Client(guarded.address, token="second") as client:
        assert (await client.complete("x", max_tokens=1)).usage.num_completion_tokens == 1


async def test_what_is_too_large_is_refused(guarded: Server) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x" * (4 * 2**20))), metadata=bearer("first"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("unix:/tmp/x", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_other_machines_need_a_token_or_tls(host: str, local: bool) -> None:
    assert is_local(host) == local
    if local:
        ServerParams(host)
    else:
        with pytest.raises(forerun.InvalidRequest, match="can be reached from other machines"):
            ServerParams(host)
        ServerParams(host, tokens=("x",))
        ServerParams(host, is_insecure=True)


# TLS


class Authority:
    """A certificate authority, and files of what it issued."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca, self._folder, self._name = trustme.CA(), folder, name
        self.file = folder / f"{name}-ca.pem"
        self.ca.cert_pem.write_to_path(self.file)

    def issue(self, who: str, **kwargs: Any) -> tuple[str, str]:
        """Certificate and key files."""
        issued, files = self.ca.issue_cert("localhost", **kwargs), [self._folder / f"{self._name}-{who}.{kind}" for kind in ("pem", "key")]
        files[0].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files[1])
        return str(files[0]), str(files[1])


async def test_tls_and_who_the_client_is(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(ours.file.read_bytes())
    certificate, key = ours.issue("server")
    good, bad = ours.issue("client"), theirs.issue("client")
    old = ours.issue("old", not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
    files = ("--ssl-cert-file", certificate, "--ssl-key-file", key, "--ssl-client-ca-file", str(clients))
    with serving(*files, "--http", "0") as server:
        address = server.address.replace("127.0.0.1", "localhost")
        async with Client(address, ca_file=ours.file, certificate_file=good[0], key_file=good[1]) as client:
            assert (await client.model_info()).name == "demo"
        for name, pair in (("good", good), ("bad", bad), ("old", old), ("none", None)):
            assert https(server, ours.file, pair) == (200 if name == "good" else None)
        for pair in (bad, old, (None, None)):
            async with Client(address, ca_file=ours.file, certificate_file=pair[0], key_file=pair[1]) as client:
                with pytest.raises((ServerError, forerun.DeadlineExceeded)):
                    await client.model_info(timeout_seconds=1)
        async with Client(address) as client:
            with pytest.raises((ServerError, forerun.DeadlineExceeded)):
                await client.model_info(timeout_seconds=1)
        # New files are used by the next handshake; files that are no pair leave those before in use.
        certificate_of_theirs, key_of_theirs = theirs.issue("server")
        Path(certificate).write_bytes(Path(certificate_of_theirs).read_bytes())
        Path(key).write_bytes(Path(key_of_theirs).read_bytes())
        async with Client(address, ca_file=theirs.file, certificate_file=good[0], key_file=good[1]) as client:
            assert (await client.model_info()).name == "demo"
        with anyio.fail_after(15):
            while https(server, theirs.file, good) != 200:
                await anyio.sleep(0.5)
            clients.write_bytes(theirs.file.read_bytes())
            while https(server, theirs.file, bad) != 200:
                await anyio.sleep(0.5)
        assert https(server, theirs.file, good) is None
        assert server.end() == 0


def https(server: Server, authority: Path, pair: tuple[str, str] | None) -> int | None:
    """The gateway's answer to one who trusts an authority and has a certificate; None if they do not shake hands."""
    context = ssl.create_default_context(cafile=authority)
    if pair is not None:
        context.load_cert_chain(*pair)
    try:
        with urllib.request.urlopen(server.http.replace("127.0.0.1", "localhost") + "/v1/models", context=context, timeout=5) as answer:
            return answer.status
    except (OSError, http.client.HTTPException):
        return None


# From start to end


async def test_a_unix_socket(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/socket") as server:
        async with Client(f"unix:{tmp_path}/socket") as client:
            assert (await client.complete(PROMPT, max_tokens=3)).usage.num_completion_tokens == 3
        assert server.end() == 0


@pytest.mark.parametrize("event_loop", ["asyncio", "trio"])
async def test_draining_finishes_what_runs_and_begins_nothing(event_loop: str) -> None:
    options: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "seed": 1, "temperature": 0.5}
    with serving("--event-loop", event_loop) as server:
        async with grpc.aio.insecure_channel(server.address) as channel, Client(server.address) as client:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            results: list[forerun.Result] = []
            begun: list[Any] = []
            going = anyio.Event()

            async def run() -> None:
                async with client.generate(PROMPT, **options) as stream:
                    begun.append(stream)
                    if len(begun) == 4:
                        going.set()
                    async for _ in stream:
                        pass
                results.append(stream.result)

            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(run)
                await going.wait()
                server.process.send_signal(signal.SIGTERM)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                stub: Any = generation.GenerationServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x"))).read()
                found = refused(caught.value, grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0
                assert not results
            assert [len(result.token_ids) for result in results] == [1500] * 4
            assert len({result.token_ids for result in results}) == 1
        assert await anyio.to_thread.run_sync(lambda: server.process.wait(20)) == 0


@pytest.mark.parametrize("event_loop", ["asyncio", "trio"])
async def test_a_second_signal_ends_it_at_once(event_loop: str) -> None:
    with serving("--event-loop", event_loop) as server:
        async with Client(server.address) as client, client.generate(PROMPT, max_tokens=4000, ignore_eos=True) as stream:
            await anext(stream)
            server.process.send_signal(signal.SIGTERM)
            while not any("draining" in line for line in server.lines):
                await anyio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(forerun.ForerunError):
                async for _ in stream:
                    pass
        assert await anyio.to_thread.run_sync(lambda: server.process.wait(10)) == 0


async def test_an_order_to_drain(tmp_path: Path) -> None:
    with serving("--admin-key", "root") as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
            await admin.Drain(admin_service_pb2.DrainRequest(), metadata=bearer("root"))
        assert await anyio.to_thread.run_sync(lambda: server.process.wait(20)) == 0


async def test_while_the_model_is_loaded_it_is_not_serving() -> None:
    slow = "import time; from forerun.actors import opening; load = opening.load_model\n"
    slow += "def later(*args, **kwargs):\n    time.sleep(2)\n    return load(*args, **kwargs)\nopening.load_model = later\n" + CODE
    with serving(code=slow) as first:  # to know a port that is free
        pass
    port = first.address.rpartition(":")[2]
    command = ("--port", port)
    with subprocess.Popen([sys.executable, "-c", slow, "serve", *command], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, Client(f"127.0.0.1:{port}") as client:
                health: Any = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
                stub: Any = generation.GenerationServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x"))).read()
                assert "RetryInfo" in refused(caught.value, grpc.StatusCode.UNAVAILABLE, "LOADING")
                assert (await client.complete("x", max_tokens=2)).usage.num_completion_tokens == 2  # it tries again, as it was told
        finally:
            process.kill()
    with subprocess.Popen([sys.executable, "-c", slow, "serve", *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            await anyio.sleep(0.2)
        assert process.wait(1) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--host", "0.0.0.0"), "give TLS files or an API key, or say --insecure"),
        (("--ssl-cert-file", "x"), "needs --ssl-key-file"),
        (("--ssl-cert-file", "nowhere", "--ssl-key-file", "nowhere"), "nowhere: No such file"),
        (("--port", "70000"), "between 0 and 65535"),
        (("--event-loop", "curio"), "must be one of asyncio, trio"),
        (("--api-key", "a b"), "printable ASCII"),
        (("--api-key", ","), "there is no key in it"),
        (("--api-key-file", "/dev/null"), "there is no key in it"),
        (("-m", "nowhere"), "no such model"),
        (("-np", "0"), "num_slots: must be between"),
        (("--cache-ram", "-1"), "prefix_bytes: must be between"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_start_says_why(args: tuple[str, ...], says: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, "serve", "--port", "0", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


async def test_beginnings_of_prompts_outlive_the_server(tmp_path: Path) -> None:
    args = "--cache-folder", str(tmp_path), "--cache-ram", "64", "--cache-disk", "64", "--preempt-after", "5"
    cached = list[int]()
    for _ in range(2):
        with serving(*args) as server:
            async with Client(server.address) as client:
                result = await client.complete([7] * 300, max_tokens=4, ignore_eos=True)
            cached.append(result.usage.num_cached_tokens)
            assert server.end() == 0
    assert cached == [0, 256]


def test_a_port_that_is_taken() -> None:
    with serving() as server:
        port = server.address.rpartition(":")[2]
        done = subprocess.run([sys.executable, "-c", CODE, "serve", "--port", port], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "cannot listen on" in done.stderr


async def test_the_client_hears_deadlines_of_scopes_around_it(guarded: Server) -> None:
    async with Client(guarded.address, token="first") as client:
        with pytest.raises((forerun.DeadlineExceeded, TimeoutError)):
            with anyio.fail_after(0.2):
                await client.complete(PROMPT, max_tokens=4000, ignore_eos=True)
        with pytest.raises(forerun.InvalidRequest, match="options"):
            client.generate("x", max_tokens=-1)
        with pytest.raises(forerun.InvalidRequest, match="options"):
            client.generate("x", **cast(Any, {"no_such": 1}))
    client = Client(guarded.address, token="first")
    async with anyio.create_task_group() as group:

        async def read() -> None:
            with pytest.raises(ServerError, match="CANCELLED"):
                await client.complete(PROMPT, max_tokens=4000, ignore_eos=True)

        group.start_soon(read)
        await anyio.sleep(0.3)
        await client.aclose()
    async with Client("127.0.0.1:9") as client:
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await client.complete("x", timeout_seconds=1)


# The command line


def forerun_(*args: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_server_is_asked_from_the_command_line(guarded: Server, tmp_path: Path) -> None:
    where = ("-a", guarded.address, "--api-key", "third")
    answer = json.loads(forerun_("client", "generate", *where, "--chat", "hello", "-n", "4", "--ignore-eos", "--format", "json"))
    assert answer["usage"]["num_completion_tokens"] == 4
    ids = forerun_("client", "tokenize", *where, PROMPT).strip()
    assert forerun_("client", "detokenize", *where, ids) == PROMPT + "\n"
    answers = {forerun_("client", "generate", *where, *prompt, "-n", "4") for prompt in (("-p", PROMPT), ("--prompt-ids", ids))}
    assert len(answers) == 1
    assert 'name: "demo"' in forerun_("client", "info", *where)
    assert "num_slots: 8" in forerun_("client", "loads", *where)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "client", "loads", "-a", guarded.address], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "forerun: UNAUTHENTICATED: a bearer token is needed\n")
    watch = [sys.executable, "-c", CODE, "trace", *where, "--actor", "target decoder", "--events", "20", "--lines"]
    watch += ["-o", str(tmp_path / "run.json")]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        while watching.poll() is None:  # it sees what comes once it has begun
            forerun_("client", "generate", *where, "-p", PROMPT, "-n", "2")
        assert watching.stdout is not None
        lines = watching.stdout.read().splitlines()
    assert len(lines) == 20
    assert any("target decoder: Verify ok" in line for line in lines)
    assert "target decoder: Verify" in forerun_("trace", str(tmp_path / "run.json"), "--summary")
    assert re.search(r"^target decoder +\d+ +\d+", forerun_("trace", str(tmp_path / "run.json")), re.MULTILINE)
