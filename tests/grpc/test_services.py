"""Every method of every service, as a client sees it, on both event loops."""

from __future__ import annotations

import asyncio
import itertools
import math
from contextlib import aclosing
from typing import Any, cast

import anyio
import forerun
import grpc
import grpc.aio
import numpy as np
import pytest
from forerun.actors.edge import ServerParams, serve
from forerun.actors.edge.statuses import status_of
from forerun.actors.edge.telemetry import Telemetry
from forerun.client import Client, ServerError
from forerun.client.client import heard
from forerun.core.errors import PositionLost, WorkFailed
from forerun.v1 import admin_service_pb2, admin_service_pb2_grpc
from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import generation_service_pb2_grpc as generation
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # pyright: ignore[reportMissingTypeStubs]
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.grpc.serving import Server, refused

pytestmark = pytest.mark.anyio

ADMIN = (("authorization", "Bearer admin"),)
PROMPT = "def read_lines(path):\n"


async def quiet(client: Client) -> None:
    """Returns once nothing runs, waits or is lent."""
    with anyio.fail_after(10):
        while True:
            loads = await client.loads()
            if loads.num_requests_running == loads.num_requests_waiting == loads.num_slots_used == 0:
                return
            await anyio.sleep(0.02)


async def test_an_answer_is_that_of_the_engine_in_process(server: Server) -> None:
    requests: list[tuple[forerun.Prompt, dict[str, Any]]] = [
        (PROMPT, {"max_tokens": 40}),
        (PROMPT, {"max_tokens": 40, "temperature": 0.7, "seed": 2**64 - 1, "top_p": 0.9, "num_logprobs": 3}),
        ([{"role": "user", "content": "write a loop"}], {"max_tokens": 20, "temperature": 0.3, "seed": 1}),
        ([5, 6, 7], {"max_tokens": 12, "ignore_eos": True, "logit_bias": {9: 3.5}, "repetition_penalty": 1.1}),
        (PROMPT, {"max_tokens": 60, "stop": ["return", "\n\n"], "stop_ids": [4000]}),
    ]
    async with Client(server.address) as client, forerun.open_engine("demo") as engine:
        for prompt, options in requests:
            expected = await engine.complete(prompt, **options)
            async with client.generate(prompt, **options) as stream:
                deltas = [delta async for delta in stream]
            result = stream.result
            assert "".join(delta.text for delta in deltas) == result.text == expected.text
            assert result.token_ids == expected.token_ids
            assert (result.finish_reason, result.matched_stop, result.logprobs) == (
                expected.finish_reason, expected.matched_stop, expected.logprobs,
            )  # fmt: skip
            assert result.usage.num_prompt_tokens == expected.usage.num_prompt_tokens
            if "seed" in options:
                assert result.sampling == expected.sampling
            assert stream.started is not None
            assert stream.started.num_prompt_tokens == expected.usage.num_prompt_tokens
            assert stream.started.sampling == result.sampling
            speculation = result.speculation
            assert set(speculation.drafters) == {"draft-mtp", "ngram-suffix"}
            accepted = sum(each.num_accepted_tokens for each in speculation.drafters.values())
            assert speculation.num_rounds + accepted >= len(result.token_ids) - 1


async def test_reflection_lists_and_calls_everything(server: Server) -> None:
    """As grpcurl does it: with nothing but the server's own descriptors."""
    own: dict[str, Any] = {
        "forerun.v1.GenerationService/Generate": {"prompt": {"text": PROMPT}, "max_tokens": 3},
        "forerun.v1.GenerationService/Abort": {"request_id": "nobody's"},
        "forerun.v1.GenerationService/Tokenize": {"prompt": {"text": PROMPT}},
        "forerun.v1.GenerationService/Detokenize": {"ids": [300, 301]},
        "forerun.v1.GenerationService/Embed": {"prompt": {"text": PROMPT}},
        "forerun.v1.AdminService/SaveState": {"request_id": "nobody's", "name": "x"},
        "forerun.v1.AdminService/LoadState": {"name": "there-is-none"},
        "forerun.v1.AdminService/Profile": {"seconds": 0.01},
    }
    expected = {"Abort": "NOT_FOUND", "SaveState": "NOT_FOUND", "LoadState": "NOT_FOUND", "Watch": "DEADLINE_EXCEEDED"}

    def work() -> set[str]:
        called: set[str] = set()
        with grpc.insecure_channel(server.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = descriptor_pool.DescriptorPool(cast(Any, database))
            for service in database.get_services():
                for method in pool.FindServiceByName(service).methods:
                    if service.startswith("grpc.") or method.name == "Drain":
                        continue
                    name = f"{service}/{method.name}"
                    request = message_factory.GetMessageClass(method.input_type)(**own.get(name, {}))
                    answer = message_factory.GetMessageClass(method.output_type).FromString
                    make = channel.unary_stream if method.server_streaming else channel.unary_unary
                    call: Any = make(
                        f"/{name}", request_serializer=cast(Any, type(request)).SerializeToString, response_deserializer=answer
                    )
                    status = "OK"
                    try:
                        done = call(request, timeout=0.5 if method.name == "Watch" else 10, metadata=ADMIN)
                        assert not method.server_streaming or list(done)
                    except grpc.RpcError as error:
                        status = cast(Any, error).code().name
                    assert status == expected.get(method.name, "OK"), name
                    called.add(name)
        return called

    assert len(await anyio.to_thread.run_sync(work)) == 12


async def test_health_is_as_probes_expect_it(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "forerun.v1.GenerationService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_tokens_and_back(server: Server) -> None:
    async with Client(server.address) as client, forerun.open_engine("demo") as engine:
        chat: forerun.Prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<|im_end|>"}]
        for prompt in (PROMPT, chat):
            assert await client.tokenize(prompt) == await engine.tokenize(prompt)
        assert await client.detokenize(list(await client.tokenize(PROMPT))) == PROMPT
        with pytest.raises(forerun.InvalidRequest, match="ids"):
            await client.detokenize([4096])


async def test_hidden_rows(server: Server) -> None:
    """Of a prompt of many chunks, four at once, beside requests that draft: each has its own rows, bit for bit."""
    prompts = [[(i * 37 + j * (i + 3)) % 4000 for j in range(150 + 40 * i)] for i in range(4)]

    async def rows_of(engine: forerun.Engine, prompt: list[int]) -> Any:
        async with engine.embed(prompt) as embedding:
            return np.concatenate([rows async for _, rows in embedding])

    async with forerun.open_engine("demo") as engine:
        expected = [await rows_of(engine, prompt) for prompt in prompts]
        answers = [(await engine.complete(prompt, max_tokens=20, ignore_eos=True)).token_ids for prompt in prompts]
    found: dict[int, Any] = {}
    tokens: dict[int, tuple[int, ...]] = {}
    async with Client(server.address) as client:

        async def embed(i: int) -> None:
            found[i] = await client.embed(prompts[i])

        async def answer(i: int) -> None:
            tokens[i] = (await client.complete(prompts[i], max_tokens=20, ignore_eos=True)).token_ids

        async with anyio.create_task_group() as group:
            for i in range(4):
                group.start_soon(embed, i)
                group.start_soon(answer, i)
        assert all(np.array_equal(found[i], expected[i]) for i in range(4))
        assert [tokens[i] for i in range(4)] == answers
        half = await client.embed(prompts[0], is_half=True)
        assert np.array_equal(half, expected[0].astype(np.float16))
        await quiet(client)


async def test_embedding_rows_are_taken_as_in_process(server: Server) -> None:
    width = forerun.load_model("demo").hidden
    rows = np.random.default_rng(1).normal(size=(40, width)).astype(np.float32)
    parts: forerun.Prompt = [[1, 2, 3], forerun.EmbeddingRows.of(rows, [(0, i // 8, i % 8) for i in range(40)]), [4, 5]]
    async with forerun.open_engine("demo") as engine:
        expected = await engine.complete(parts, max_tokens=20, ignore_eos=True)
    async with Client(server.address) as client:
        found = await client.complete(parts, max_tokens=20, ignore_eos=True)
        assert (found.token_ids, found.usage) == (expected.token_ids, expected.usage)
        assert (await client.embed(parts)).shape == (45, width)


async def test_who_waits_to_be_embedded_is_counted() -> None:
    async with forerun.open_engine("demo", num_slots=1) as engine, serve(engine, ServerParams(port=0)) as address:
        async with Client(address) as client, client.generate(PROMPT, max_tokens=3000, ignore_eos=True):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(client.embed, PROMPT)
                with anyio.fail_after(5):
                    while (loads := await client.loads()).num_requests_waiting < 3:
                        await anyio.sleep(0.01)
                assert loads.num_requests_running == 1
                group.cancel_scope.cancel()


def test_a_fault_has_its_reason() -> None:
    for cause, reason in ((None, "REQUEST_FAILED"), (WorkFailed("the target failed"), "ACTOR_RESTARTED")):
        error = forerun.RequestFailed("secret")
        error.__cause__ = cause
        status = status_of(error)
        assert (status.code, status.reason) == (grpc.StatusCode.INTERNAL, reason)
        assert b"secret" not in status.details
    assert status_of(PositionLost("secret")).code is grpc.StatusCode.INTERNAL


async def test_a_request_is_ended_by_its_sender_alone(server: Server) -> None:
    async with Client(server.address, token="mine") as client, Client(server.address, token="another's") as other:
        async with client.generate(PROMPT, max_tokens=4000, ignore_eos=True) as stream:
            assert stream.started is not None
            with pytest.raises(ServerError, match="NOT_FOUND"):
                await other.abort(stream.started.request_id)
            await client.abort(stream.started.request_id)
            async for _ in stream:
                pass
            assert stream.result.finish_reason is forerun.FinishReason.CANCELLED
        await quiet(client)


async def test_who_leaves_gives_memory_back(server: Server) -> None:
    async with Client(server.address) as client:
        for num_deltas in range(5):
            async with client.generate(PROMPT, max_tokens=4000, ignore_eos=True) as stream:
                for _ in range(num_deltas):
                    await anext(stream)
        with pytest.raises(forerun.DeadlineExceeded):
            await client.complete(PROMPT, max_tokens=4000, ignore_eos=True, timeout_seconds=0.1)
        with anyio.move_on_after(0.1) as scope:
            await client.complete(PROMPT, max_tokens=4000, ignore_eos=True)
        assert scope.cancelled_caught
        await quiet(client)


async def test_a_scopes_deadline_cancels_though_the_server_says_so_first() -> None:
    async def passed() -> None:
        raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata())

    with anyio.move_on_after(0.05) as scope:
        await heard(passed())
    assert scope.cancelled_caught
    with anyio.move_on_after(10), pytest.raises(forerun.DeadlineExceeded):  # another deadline than the scope's
        await heard(passed())


async def test_who_does_not_read_is_dropped_and_holds_nobody_up(server: Server) -> None:
    window = [("grpc.http2.bdp_probe", 0)]  # that of HTTP/2, 64 KiB: a client that widens it is not behind as long as all fits in
    async with grpc.aio.insecure_channel(server.address, options=window) as channel, Client(server.address) as client:
        stub: Any = generation.GenerationServiceStub(channel)
        request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), max_tokens=4000, num_logprobs=20, ignore_eos=True)
        stalled = [stub.Generate(request) for _ in range(4)]
        for call in stalled:
            await call.read()
        assert len((await client.complete(PROMPT, max_tokens=100, ignore_eos=True)).token_ids) == 100
        await quiet(client)
        for call in stalled:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            refused(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED, "READER_STALLED")


async def test_what_happens_inside_is_watched(server: Server) -> None:
    async with Client(server.address) as client:
        names: set[str] = set()

        async def first_spans() -> list[Any]:
            async with aclosing(client.watch(actors=("target decoder",))) as responses:
                async for response in responses:
                    if spans := [event.span for event in response.events if event.WhichOneof("kind") == "span"]:
                        return spans
            return []

        watching = asyncio.create_task(first_spans())
        while not watching.done():  # it sees what comes once it is under way
            names.add((await client.complete(PROMPT, max_tokens=5)).request_id)
        spans = await watching
        assert {span.actor for span in spans} == {"target decoder"}
        assert {span.message for span in spans} <= {"Prefill", "Verify", "Forget"}
        assert {span.request_id for span in spans} <= names
        assert all(span.enqueued_ns <= span.started_ns <= span.finished_ns for span in spans)


async def test_a_request_is_saved_and_goes_on(server: Server) -> None:
    options: dict[str, Any] = {"max_tokens": 600, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    async with grpc.aio.insecure_channel(server.address) as channel, Client(server.address) as client:
        admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        expected = await client.complete(PROMPT, **options)
        async with client.generate(PROMPT, **options) as stream:
            assert stream.started is not None
            first = await anext(stream)
            order = admin_service_pb2.SaveStateRequest(request_id=stream.started.request_id, name="one")
            saved = await admin.SaveState(order, metadata=ADMIN)
            assert saved.num_bytes > 1000
        responses = [each async for each in admin.LoadState(admin_service_pb2.LoadStateRequest(name="one"), metadata=ADMIN)]
        tokens = tuple(token for each in responses for token in each.delta.token_ids)
        assert len(tokens) < 600
        assert expected.token_ids[-len(tokens) :] == tokens
        assert expected.token_ids[: len(first.token_ids)] == first.token_ids
        for name in ("../one", "", ".one", "a/b", "x" * 101):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await admin.SaveState(admin_service_pb2.SaveStateRequest(request_id="x", name=name), metadata=ADMIN)
            found = refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert [each.field for each in found["BadRequest"].field_violations] == ["name"]


async def test_a_profile_says_where_time_went(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel, Client(server.address) as client:
        admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        pending = admin.Profile(admin_service_pb2.ProfileRequest(seconds=2), metadata=ADMIN)
        asking = asyncio.ensure_future(pending)
        await anyio.sleep(0.5)
        result = await client.complete(PROMPT, max_tokens=20)
        entries = {(each.actor, each.message): each for each in (await asking).entries}
        assert entries["target decoder", "Verify"].count == result.speculation.num_rounds
        assert 0 < entries["target decoder", "Verify"].longest_seconds <= entries["target decoder", "Verify"].handled_seconds < 3


async def test_the_name_a_caller_gives_comes_back(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)
        for name in ("abc-1", "x" * 128):
            call = stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x")), metadata=(("x-request-id", name),))
            assert dict(await call.initial_metadata())["x-request-id"] == name
            await call


# What cannot be

BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"prompt"}),
    ({"prompt": {"text": ""}}, {"prompt"}),
    ({"prompt": {"token_ids": {"ids": []}}}, {"prompt"}),
    ({"prompt": {"token_ids": {"ids": [4096]}}}, {"prompt"}),
    ({"prompt": {"token_ids": {"ids": [1] * 4097}}}, {"prompt"}),
    ({"prompt": {"chat": {"messages": []}}}, {"prompt"}),
    ({"prompt": {"chat": {"messages": [{}] * 5000}}}, {"prompt.chat.messages"}),
    ({"prompt": {"token_ids": {"ids": [1] * 1_000_000}}}, {"prompt"}),
    ({"prompt": {"parts": {"parts": []}}}, {"prompt"}),
    ({"prompt": {"parts": {"parts": [{"token_ids": {"ids": [4096]}}]}}}, {"prompt"}),
    ({"prompt": {"parts": {"parts": [{"token_ids": {"ids": [1]}}, {"rows": {"data": b"1234", "width": 1, "coordinates": [0, 0]}}]}}},
     {"prompt.parts.parts[1].rows.coordinates"}),
    ({"prompt": {"parts": {"parts": [{"rows": {"data": b"123", "width": 1}}, {"rows": {"data": b"1234"}}]}}},
     {"prompt.parts.parts[0].rows.data", "prompt.parts.parts[1].rows.width"}),
    ({"prompt": {"parts": {"parts": [{"rows": {"data": b"1234", "width": 1, "coordinates": [0, 1, 0]}}]}}},
     {"prompt.parts.parts[0].rows.coordinates[0]"}),
    ({"prompt": {"parts": {"parts": [{"rows": {"data": b"1234", "width": 1}}]}}}, {"prompt"}),
    ({"prompt": {"chat": {"messages": [{"role": "boss", "content": "x"}]}}}, {"prompt.chat.messages[0].role"}),
    ({"prompt": {"chat": {"messages": [{"role": "user"}], "tools": ["{"]}}}, {"prompt.chat.tools[0]"}),
    ({"prompt": {"chat": {"messages": [{"role": "user"}], "tools": ["{}"]}}}, {"prompt.chat.tools[0]"}),
    ({"prompt": {"chat": {"messages": [{"role": "user"}], "template_kwargs": "3"}}}, {"prompt.chat.template_kwargs"}),
    ({"max_tokens": 0}, {"max_tokens"}),
    ({"max_tokens": 2**32 - 1}, {"max_tokens"}),
    ({"max_tokens": 4096}, {"max_tokens"}),
    ({"sampling": {"temperature": math.nan, "top_p": 1.5, "min_p": -1, "repetition_penalty": 0}},
     {"sampling.temperature", "sampling.top_p", "sampling.min_p", "sampling.repetition_penalty"}),
    ({"sampling": {"temperature": math.inf, "top_k": 2**32 - 1}}, {"sampling.temperature", "sampling.top_k"}),
    ({"sampling": {"presence_penalty": 3, "frequency_penalty": -3}}, {"sampling.presence_penalty", "sampling.frequency_penalty"}),
    ({"sampling": {"logit_bias": {1: math.nan}}}, {"sampling.logit_bias"}),
    ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}}, {"sampling.logit_bias"}),
    ({"stop": [""]}, {"stop[0]"}),
    ({"stop": ["x"] * 17}, {"stop"}),
    ({"stop": ["x" * 257, "y"]}, {"stop[0]"}),
    ({"stop_ids": [4096]}, {"stop_ids"}),
    ({"num_logprobs": 21}, {"num_logprobs"}),
    ({"cache_salt": "x" * 257}, {"cache_salt"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "wrong"), BAD)
async def test_every_violation_is_named_with_its_path(server: Server, fields: dict[str, Any], wrong: set[str]) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)
        everything: dict[str, Any] = {"prompt": {"text": "x"}, **fields} if fields else {}
        request = pb.GenerateRequest(**everything)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request).read()
        found = refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert {each.field for each in found["BadRequest"].field_violations} == wrong


NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e308, -1e308]))
WHOLE = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
TEXTS = st.one_of(st.text(max_size=20), st.just("\x00"), st.just("<|im_end|>"), st.just("x" * 5000))
PROMPTS = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"token_ids": st.fixed_dictionaries({"ids": st.lists(WHOLE, max_size=6)})}),
    st.fixed_dictionaries(
        {"chat": st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2)})}
    ),
)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": NUMBERS, "top_k": WHOLE, "top_p": NUMBERS, "min_p": NUMBERS, "seed": st.integers(0, 2**64 - 1),
        "repetition_penalty": NUMBERS, "presence_penalty": NUMBERS, "frequency_penalty": NUMBERS,
        "logit_bias": st.dictionaries(WHOLE, NUMBERS, max_size=3),
    },
)  # fmt: skip
REQUESTS = st.fixed_dictionaries(
    {"prompt": PROMPTS, "max_tokens": st.one_of(st.integers(0, 4), WHOLE)},
    optional={
        "sampling": SAMPLING, "stop": st.lists(TEXTS, max_size=3), "stop_ids": st.lists(WHOLE, max_size=3), "ignore_eos": st.booleans(),
        "num_logprobs": WHOLE, "cache_salt": TEXTS,
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(fields=REQUESTS)
def test_extremes_in_every_field(server: Server, fields: dict[str, Any]) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = generation.GenerationServiceStub(channel)
        try:
            request = pb.GenerateRequest(**fields)
        except (TypeError, ValueError):  # protobuf itself takes no lone surrogates
            return
        try:
            events = [each.WhichOneof("event") for each in itertools.islice(stub.Generate(request, timeout=20), 10)]
            assert events[0] == "started"
        except grpc.RpcError as error:
            refused(error, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


# Telemetry


async def test_requests_are_spans_of_their_callers_trace() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with forerun.open_engine("demo") as engine:
        async with serve(engine, ServerParams(port=0), meters=[Telemetry("demo", provider)]) as address:
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = generation.GenerationServiceStub(channel)
                request = pb.GenerateRequest(prompt=pb.Prompt(text="secret words"), max_tokens=7, ignore_eos=True)
                await stub.Generate(request, metadata=(("traceparent", f"00-{trace_id}-{parent}-01"),)).read()
                async for _ in stub.Generate(request, metadata=(("traceparent", f"00-{trace_id}-{parent}-01"),)):
                    pass
                bad = pb.GenerateRequest(prompt=pb.Prompt(text="x"), max_tokens=4096)
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Generate(bad).read()
    spans = exporter.get_finished_spans()
    done = [span for span in spans if "gen_ai.usage.output_tokens" in (span.attributes or {})]
    assert len(done) in (1, 2)  # the call whose reader left may have been done
    for span in done:
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, parent)
        attributes = dict(span.attributes or {})
        assert (attributes["gen_ai.usage.output_tokens"], attributes["gen_ai.response.finish_reasons"]) == (7, ("length",))
        assert cast(float, attributes["gen_ai.server.time_to_first_token"]) > 0
        assert "secret" not in span.to_json()
    assert [dict(span.attributes or {})["error.type"] for span in spans if span.parent is None] == ["InvalidRequest"]
