"""The edge under load, from other processes.

python -m tests.grpc.load streams [--seconds 120]  # 64 streams at once: tokens as in process, memory, the latency that the edge adds
python -m tests.grpc.load stalled                  # what 16 clients that do not read cost 16 that do, and whether they are dropped
python -m tests.grpc.load kills [--times 200]      # clients killed in mid-stream
python -m tests.grpc.load fuzz [--times 20000]     # random and hostile requests
python -m tests.grpc.load rate                     # deltas a second of the edge alone: an engine that is always ahead
python -m tests.grpc.load latency                  # milliseconds from such an engine to the client, at some deltas a second and stream
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import forerun
import grpc
import grpc.aio
from forerun.client import Client
from forerun.core.vocabulary import Started
from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import generation_service_pb2_grpc as generation

from tests.grpc.serving import CODE, Server, details, serving

PROMPT = "def read_lines(path):\n"


def rss(server: Server) -> float:
    """MiB of memory of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def is_quiet(client: Client) -> bool:
    """Whether within some seconds nothing runs, waits or is lent."""
    for _ in range(600):
        loads = await client.loads()
        if loads.num_requests_running == loads.num_requests_waiting == loads.num_slots_used == 0:
            return True
        await anyio.sleep(0.05)
    return False


# Streams


async def streams(server: Server, seconds: float, num_streams: int) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0.8, "seed": i, "max_tokens": 40 + 30 * (i % 5), "ignore_eos": True} for i in range(16)]
    async with forerun.open_engine("demo", num_threads=1) as engine:
        expected = [(await engine.complete(PROMPT, **kind)).token_ids for kind in kinds]
    end, num_done, errors = time.monotonic() + seconds, 0, Counter[str]()
    gaps: list[float] = []
    memory = [(0.0, rss(server))]
    produced: dict[tuple[str, int], int] = {}  # (request, tokens before it) -> when the delta was handed to the edge
    got: dict[tuple[str, int], int] = {}

    async def worker(i: int, client: Client) -> None:
        nonlocal num_done
        n = i
        while time.monotonic() < end:
            kind, n = kinds[n % 16], n + 1
            try:
                async with client.generate(PROMPT, timeout_seconds=60, **kind) as stream:
                    before, count = time.perf_counter(), 0
                    async for _ in stream:
                        assert stream.started is not None
                        got[stream.started.request_id, count] = time.perf_counter_ns()
                        count += 1
                        gaps.append(time.perf_counter() - before)
                        before = time.perf_counter()
                if stream.result.token_ids != expected[kind["seed"]]:
                    errors["other tokens"] += 1
                num_done += 1
            except Exception as error:
                errors[repr(error)[:100]] += 1

    async def watch(client: Client) -> None:
        counts = Counter[str]()
        async with aclosing(client.watch()) as responses:
            async for response in responses:
                for event in response.events:
                    if event.WhichOneof("kind") == "span" and event.span.message == "Delta":
                        name = event.span.request_id
                        produced[name, counts[name]] = event.span.enqueued_ns
                        counts[name] += 1

    async def look() -> None:
        while time.monotonic() < end:
            await anyio.sleep(5)
            memory.append((seconds - (end - time.monotonic()), rss(server)))

    async with Client(server.address) as client:
        watching = asyncio.create_task(watch(client))
        async with anyio.create_task_group() as group:
            group.start_soon(look)
            for i in range(num_streams):
                group.start_soon(worker, i, client)
        watching.cancel()
        quiet = await is_quiet(client)
    late = sorted((got[key] - produced[key]) / 1e6 for key in got if key in produced)
    half = [mib for at, mib in memory if at > seconds / 2]
    print(f"{num_done} requests, errors {dict(errors)}, quiet after {quiet}; longest gap {max(gaps):.2f} s")
    print(f"memory {memory[0][1]:.0f} MiB at first, {half[0]:.0f} at half time, {half[-1]:.0f} at the end")
    if late:
        print(f"from engine to client, {len(late)} deltas: median {late[len(late) // 2]:.2f} ms, p99 {late[int(len(late) * 0.99)]:.2f} ms")


# Stalled readers


async def stalled(server: Server) -> None:
    async def rate(client: Client) -> float:
        """Tokens a second of 16 readers together."""
        begin, tokens = time.perf_counter(), 0

        async def one(i: int) -> None:
            nonlocal tokens
            result = await client.complete(PROMPT, max_tokens=200, temperature=0.8, seed=i, ignore_eos=True)
            tokens += len(result.token_ids)

        async with anyio.create_task_group() as group:
            for i in range(16):
                group.start_soon(one, i)
        return tokens / (time.perf_counter() - begin)

    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), max_tokens=3500, ignore_eos=True)
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]  # full soon
    ratios: list[float] = []
    async with Client(server.address) as client:
        await rate(client)
        for _ in range(5):
            alone = await rate(client)
            async with grpc.aio.insecure_channel(server.address, options=window) as channel:
                calls = [cast(Any, generation.GenerationServiceStub(channel)).Generate(request) for _ in range(16)]
                for call in calls:
                    await call.read()
                done, before = 0, -1
                while done != before:  # until they are full
                    await anyio.sleep(1)
                    done, before = (await client.loads()).actors[2].num_received, done
                assert (await client.loads()).num_requests_running == 16
                beside, begin = await rate(client), time.perf_counter()
                dropped = await is_quiet(client)
                ratios.append(beside / alone)
                print(f"alone {alone:.0f} tokens/s, beside 16 that stall {beside:.0f}: {ratios[-1]:.3f}; all dropped {dropped} "
                      f"after {time.perf_counter() - begin:.1f} s more", flush=True)  # fmt: skip
    print(f"median {statistics.median(ratios):.3f} of the rate alone")


# Killed clients

VICTIM = """
import sys, anyio
from forerun.client import Client
async def main():
    async with Client(sys.argv[1]) as client:
        async with client.generate("x", max_tokens=4000, ignore_eos=True) as stream:
            async for _ in stream:
                print(".", flush=True)
anyio.run(main)
"""


async def kills(server: Server, times: int) -> None:
    for i in range(times):
        with subprocess.Popen([sys.executable, "-c", VICTIM, server.address], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1 + i % 5)
            process.kill()
    async with Client(server.address) as client:
        assert await is_quiet(client), await client.loads()
    print(f"{times} clients killed; everything was given back")


# Hostile requests


def hostile(rng: random.Random) -> tuple[str, bytes]:
    """A method and what to send to it."""
    request = pb.GenerateRequest(max_tokens=rng.choice([0, 1, 2, 2**32 - 1]))
    numbers = [0.0, -1.0, 1e308, float("nan"), float("inf"), 0.5, 1.0]
    match rng.randrange(4):
        case 0:
            request.prompt.text = rng.choice(["", "x", "\x00", "<|im_end|>", "\U0001d518" * 50, "a" * 10_000])
        case 1:
            request.prompt.token_ids.ids.extend(rng.choice([0, 5, 4095, 4096, 2**32 - 1]) for _ in range(rng.randrange(5)))
        case 2:
            for _ in range(rng.randrange(3)):
                request.prompt.chat.messages.add(role=rng.choice(["user", "", "system", "{{ 7 }}"]), content=rng.choice(["x", "{% raw %}"]))
        case _:
            pass
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if rng.random() < 0.2:
            setattr(request.sampling, name, rng.choice(numbers))
    if rng.random() < 0.1:
        request.stop.extend(rng.choice(["", "x", "y" * 300]) for _ in range(rng.randrange(20)))
    if rng.random() < 0.1:
        request.num_logprobs = rng.choice([0, 20, 21, 2**32 - 1])
    if rng.random() < 0.1:
        request.cache_salt = rng.choice(["a", "b" * 300])
    raw = request.SerializeToString()
    if rng.random() < 0.3:  # no message at all, or one cut or bent
        raw = rng.choice([rng.randbytes(rng.randrange(40)), raw[: rng.randrange(len(raw) + 1)], raw + rng.randbytes(8)])
    service = "GenerationService"
    method = rng.choice(["Generate"] * 6 + ["Abort", "Tokenize", "Detokenize", "Embed", "Nothing"])
    if rng.random() < 0.1:
        service, method = rng.choice([("ModelService", "GetLoads"), ("AdminService", "Drain"), ("AdminService", "SaveState"), ("", "")])
    return f"/forerun.v1.{service}/{method}", raw


async def fuzz(server: Server, times: int) -> None:
    rng, found, leaks = random.Random(1), Counter[str](), list[str]()
    async with grpc.aio.insecure_channel(server.address) as channel:
        limiter = anyio.CapacityLimiter(16)

        async def one(method: str, raw: bytes) -> None:
            async with limiter:
                call = cast(Any, channel.unary_stream(method))(raw, timeout=20)
                try:
                    async for _ in call:
                        pass
                    found["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    reason = details(error)["ErrorInfo"].reason if details(error) else ""
                    found[f"{error.code().name} {reason}".strip()] += 1
                    said = error.details() or ""
                    if any(word in said for word in ("Traceback", "Error(", ".py", "Exception")) or reason == "BUG":
                        leaks.append(f"{method} {raw[:80]!r}: {said[:200]}")

        async with anyio.create_task_group() as group:
            for i in range(times):
                group.start_soon(one, *hostile(rng))
                if i % 100 == 0:
                    await anyio.sleep(0.01)
    async with Client(server.address) as client:
        assert len((await client.complete(PROMPT, max_tokens=10, ignore_eos=True)).token_ids) == 10
        assert await is_quiet(client), await client.loads()
    assert not leaks, leaks[:5]
    assert not [status for status in found if status.startswith(("INTERNAL", "UNKNOWN"))], found
    print(f"{times} requests: {dict(found.most_common())}; no fault, nothing of our insides shown, all given back")


# The edge alone


class Ahead:
    """An engine, and the stream of a request, whose next delta is always there."""

    def __init__(self, num_deltas: int = 0) -> None:
        self._left = num_deltas
        self.request_id = str(id(self))

    def generate(self, prompt: Any, **options: Any) -> Any:
        """A prompt that is a number: so many seconds between deltas, whose text is when they were made."""
        return Paced(float(prompt), options["max_tokens"]) if prompt != "x" else Ahead(options["max_tokens"])

    async def ended(self) -> None:
        await anyio.sleep_forever()

    async def drain(self) -> None:
        pass

    async def __aenter__(self) -> Ahead:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def started(self) -> Started:
        return Started(self.request_id, forerun.SamplingParams(), self._left, 1, 0, 0.0)

    def __aiter__(self) -> Ahead:
        return self

    async def __anext__(self) -> forerun.Delta:
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        await anyio.lowlevel.checkpoint()
        return forerun.Delta(" token", (7,), None)

    @property
    def result(self) -> forerun.Result:
        usage, timings = forerun.Usage(1, 0), forerun.Timings(0, 0, 0)
        return forerun.Result(
            self.request_id, "", (), forerun.FinishReason.LENGTH, None, forerun.SamplingParams(), usage, timings, forerun.Speculation()
        )


class Paced(Ahead):
    def __init__(self, seconds: float, num_deltas: int) -> None:
        super().__init__(num_deltas)
        self._seconds, self._due = seconds, anyio.current_time() + seconds * random.random()

    async def __anext__(self) -> forerun.Delta:
        await anyio.sleep_until(self._due)
        self._due += self._seconds
        delta = await super().__anext__()
        return forerun.Delta(str(time.perf_counter_ns()), delta.token_ids, None)


@asynccontextmanager
async def _ahead() -> AsyncGenerator[Any]:
    yield Ahead()


def serve_ahead(event_loop: str) -> None:
    """In the server's process."""
    from forerun.actors.edge import ServerParams, run_server

    def announce(text: str) -> None:
        print(f"forerun: {text}", file=sys.stderr, flush=True)

    run_server(cast(Any, _ahead), "ahead", ServerParams(port=0), event_loop=event_loop, announce=announce)


async def rate(server: Server, num_deltas: int = 2000) -> None:
    rates: list[float] = []
    request = pb.GenerateRequest(prompt=pb.Prompt(text="x"), max_tokens=num_deltas)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)

        async def one() -> None:
            async for _ in stub.Generate(request):
                pass

        for _ in range(6):
            begin = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(16):
                    group.start_soon(one)
            rates.append(16 * num_deltas / (time.perf_counter() - begin))
    print(f"deltas a second over 16 streams: median {statistics.median(rates[1:]):.0f}, {min(rates[1:]):.0f} to {max(rates[1:]):.0f}")


async def latency(server: Server) -> None:
    for num_streams, each in ((16, 20), (64, 20), (16, 100)):
        late: list[float] = []
        request = pb.GenerateRequest(prompt=pb.Prompt(text=str(1 / each)), max_tokens=each * 8)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = generation.GenerationServiceStub(channel)

            async def one(stub: Any = stub, request: pb.GenerateRequest = request, late: list[float] = late) -> None:
                async for event in stub.Generate(request):
                    if event.WhichOneof("event") == "delta":
                        late.append((time.perf_counter_ns() - int(event.delta.text)) / 1e6)

            async with anyio.create_task_group() as group:
                for _ in range(num_streams):
                    group.start_soon(one)
        late.sort()
        middle, last = late[len(late) // 2], late[int(len(late) * 0.99)]
        print(f"{num_streams} streams of {each} deltas a second: median {middle:.2f} ms, p99 {last:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("streams", "stalled", "kills", "fuzz", "rate", "latency"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--times", type=int)
    parser.add_argument("--event-loop", default="asyncio")
    parser.add_argument("--threads", default="2", help="that compute")
    args = parser.parse_args()
    works: dict[str, Callable[[Server], Awaitable[None]]] = {
        "streams": lambda server: streams(server, args.seconds, args.streams),
        "stalled": stalled,
        "kills": lambda server: kills(server, args.times or 200),
        "fuzz": lambda server: fuzz(server, args.times or 20_000),
        "rate": rate,
        "latency": latency,
    }
    is_stub = args.what in ("rate", "latency")
    code = f"from tests.grpc.load import serve_ahead; serve_ahead({args.event_loop!r})" if is_stub else CODE
    slots = "32" if args.what == "stalled" else "16"
    how = ("--event-loop", args.event_loop, "-np", slots, "-t", args.threads, "--stall-timeout", "15", "--queue-size", "2000")
    with serving(*how, code=code) as server:
        asyncio.run(cast(Any, works[args.what](server)))
        print("exit code", server.end())
        print(*[line for line in server.lines if not line.startswith("forerun: ")][:20], sep="\n")


if __name__ == "__main__":
    main()
