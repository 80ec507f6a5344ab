"""The HTTP gateway, as OpenAI's own client and as bare HTTP see it."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, cast

import anyio
import forerun
import openai
import pytest
from forerun.client import Client

from tests.grpc.serving import Server, serving

pytestmark = pytest.mark.anyio

PROMPT = "def read_lines(path):\n"
CHAT: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "write a loop"}]}]
PLAIN: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "write a loop"}]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with serving("--http", "0", "--api-key", "secret") as server:
        yield server


def client_of(server: Server, key: str) -> Any:
    """OpenAI's own."""
    return openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key=key, max_retries=0)


def post(url: str, body: bytes | None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and JSON."""
    request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


async def test_openais_client_streams_a_chat(server: Server) -> None:
    how: Any = {"model": "demo", "max_tokens": 30, "temperature": 0.7, "seed": 3, "extra_body": {"ignore_eos": True}}
    async with forerun.open_engine("demo") as engine:
        expected = await engine.complete(PLAIN, max_tokens=30, temperature=0.7, seed=3, ignore_eos=True, num_logprobs=2)
    async with client_of(server, "x") as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                messages=CHAT, stream=True, stream_options={"include_usage": True}, **how
            )
        ]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (expected.usage.num_prompt_tokens, 30)
        whole = await client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **how)
        assert whole.choices[0].message.content == expected.text
        content: list[Any] = whole.choices[0].logprobs.content
        assert [each.logprob for each in content] == [each.logprob for each in expected.logprobs]
        assert len(content[0].top_logprobs) == 2


async def test_completions(server: Server) -> None:
    async with forerun.open_engine("demo") as engine:
        expected = await engine.complete(PROMPT, max_tokens=40, stop=["return"])
        ids = await engine.tokenize(PROMPT)
    async with client_of(server, "x") as client:
        for prompt in (PROMPT, [PROMPT], list(ids)):
            done = await client.completions.create(model="demo", prompt=prompt, max_tokens=40, stop=["return"])
            assert done.choices[0].text == expected.text
        stream = await client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, stop="return", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == expected.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),  # it knows no calls
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]}, "messages[0].tool_calls[0].function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": None}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "response_format"),
        ({"\ud800": 1}, "?"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "response_format"),
        ({"regex": "("}, "regex"),
        ({"regex": "a", "grammar": "b"}, "grammar"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": 7}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "max_tokens": 10**7}, "max_tokens"),
        ({"top_logprobs": 50, "logprobs": True}, "top_logprobs"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_is_said_in_openais_words(server: Server, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "demo", "messages": PLAIN} | fields).encode()
    status, _, answer = post(f"{server.http}/v1/chat/completions", body, content_type="application/json")
    assert status == 400
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)


NO_PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ["a", 1]}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ["a", []]}, "prompt"), ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"), ({"prompt": ["a", "b"], "seed": "x"}, "seed"), ({"prompt": "a", "seed": True}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), NO_PROMPTS)
def test_prompts_that_are_none(server: Server, fields: Any, param: str) -> None:
    status, _, answer = post(f"{server.http}/v1/completions", json.dumps(fields).encode(), content_type="application/json")
    assert (status, answer["error"]["param"]) == (400, param)


async def test_tokens_of_texts_and_texts_of_tokens(server: Server) -> None:
    def ask(path: str, **fields: Any) -> tuple[int, Any]:
        status, _, answer = post(f"{server.http}{path}", json.dumps(fields).encode(), content_type="application/json")
        return status, answer

    async with forerun.open_engine("demo") as engine:
        text, chat = list(await engine.tokenize("import os")), list(await engine.tokenize(PLAIN))
        assert ask("/tokenize", prompt="import os") == (200, {"tokens": text, "count": len(text), "max_model_len": engine.model.context})
    assert ask("/tokenize", content="import os")[1]["tokens"] == text
    assert ask("/tokenize", messages=PLAIN)[1]["tokens"] == chat
    assert ask("/detokenize", tokens=text)[1] == {"prompt": "import os", "content": "import os"}
    for path, fields, param in (
        ("/tokenize", {}, "prompt"), ("/tokenize", {"messages": "x"}, "messages"), ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ):  # fmt: skip
        status, answer = ask(path, **fields)
        assert (status, answer["error"]["param"]) == (400, param), answer
    assert post(f"{server.http}/tokenize", b"{}", content_type="text/plain")[0] == 415


async def test_several_answers_to_several_prompts(server: Server) -> None:
    how: Any = {"model": "demo", "max_tokens": 30, "temperature": 0.9, "seed": 3, "extra_body": {"ignore_eos": True}}
    prompts, seeds = ["def walk(", "import "], (3, 4, 5)
    async with forerun.open_engine("demo") as engine:
        expected = [
            (await engine.complete(prompt, max_tokens=30, temperature=0.9, seed=seed, ignore_eos=True)).text
            for prompt in prompts
            for seed in seeds
        ]
        num_prompt = [len(await engine.tokenize(prompt)) for prompt in prompts]
        chats = [(await engine.complete(PLAIN, max_tokens=30, temperature=0.9, seed=seed, ignore_eos=True)).text for seed in seeds]
    async with client_of(server, "x") as client:
        whole = await client.completions.create(prompt=prompts, n=3, **how)
        assert [choice.text for choice in whole.choices] == expected
        assert [choice.index for choice in whole.choices] == [*range(6)]
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (sum(num_prompt), 180)
        texts, usage = dict.fromkeys(range(6), ""), cast("Any", None)
        stream = await client.completions.create(prompt=prompts, n=3, stream=True, stream_options={"include_usage": True}, **how)
        async with stream, aclosing(aiter(stream)) as chunks:
            async for chunk in chunks:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                usage = chunk.usage
        assert [*texts.values()] == expected
        assert usage.completion_tokens == 180
        chat = await client.chat.completions.create(messages=PLAIN, n=3, **how)
        assert [choice.message.content for choice in chat.choices] == chats
        assert len({choice.index for choice in chat.choices}) == 3


def test_every_violation_is_told(server: Server) -> None:
    body = json.dumps({"messages": PLAIN} | dict.fromkeys("abcdef", 1)).encode()
    _, _, answer = post(f"{server.http}/v1/chat/completions", body, content_type="Application/JSON; charset=utf-8")
    assert answer["error"]["message"] == "; ".join(f"{name} is not supported" for name in "abcdef")
    assert post(f"{server.http}/v1/nothing", None)[2]["error"]["type"] == "invalid_request_error"


async def test_what_is_so_unless_it_is_said(server: Server) -> None:
    """Thoughts come before the answer to a chat, so it may be longer; -1 says nothing."""
    nothing: Any = {"top_k": -1, "ignore_eos": True, "reasoning_effort": "low"}
    async with client_of(server, "x") as client, Client(server.address) as other:
        for tokens, how in ((700, {}), (-1, {"max_tokens": -1, "seed": -1})):
            chat = await client.chat.completions.create(model="demo", messages=PLAIN, stream=True, extra_body=nothing, **how)
            async with chat, aclosing(aiter(chat)) as chunks:
                num_characters = 0
                async for chunk in chunks:
                    num_characters += len(chunk.choices[0].delta.content or "")
                    if num_characters > 4 * max(tokens, 256):
                        break
        with anyio.fail_after(5):
            while (await other.loads()).num_requests_running:
                await anyio.sleep(0.02)
        answer = await client.completions.with_raw_response.create(model="demo", prompt="def", extra_body={"ignore_eos": True})
    completion = answer.parse()
    assert completion.usage.completion_tokens == 256
    assert completion.id == "cmpl-" + answer.headers["x-request-id"]


async def test_log_probabilities_of_a_completion(server: Server) -> None:
    how: Any = {"model": "demo", "prompt": "# 中文 中文 ", "max_tokens": 30, "logprobs": 5, "temperature": 1, "seed": 1}
    async with client_of(server, "x") as client:
        whole = await client.completions.create(**how, extra_body={"ignore_eos": True})
        chunks = [chunk async for chunk in await client.completions.create(**how, stream=True, extra_body={"ignore_eos": True})]
    found: Any = whole.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 30
    assert any(name.startswith("bytes:\\x") for top in found.top_logprobs for name in top)
    for name, logprob, top, offset, following in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, found.text_offset[1:], strict=False
    ):
        assert top[name] == logprob
        assert following == offset + len(name)
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for each in told for offset in each.text_offset] == found.text_offset
    assert [name for each in told for name in each.tokens] == found.tokens


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": 1e999}'])
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    status, _, answer = post(f"{server.http}/v1/chat/completions", body, content_type="application/json")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [(b'{"\\ud800": 1}', {}, 400), (b"{}", {"host": "["}, 403), (b'{"messages": [{"role": "assistant", "content": null}]}', {}, 200)],
)
def test_oddities(server: Server, body: bytes, headers: dict[str, str], status: int) -> None:
    sent = {**json.loads(body), "max_tokens": 1} if status == 200 else None
    raw = json.dumps(sent).encode() if sent else body
    found, answer, _ = post(f"{server.http}/v1/chat/completions", raw, content_type="application/json", **headers)
    assert found == status
    assert len(answer["x-request-id"]) == 24


async def test_one_model(server: Server) -> None:
    async with client_of(server, "x") as client:
        assert (await client.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("another/one")


async def test_who_hangs_up_while_it_waits_keeps_no_place() -> None:
    with serving("-np", "1", "--http", "0") as server:
        async with client_of(server, "x") as client, Client(server.address) as other:
            async with other.generate(PROMPT, max_tokens=4000, ignore_eos=True):
                with anyio.move_on_after(0.5):
                    await client.chat.completions.create(model="demo", messages=PLAIN, max_tokens=1)
                with anyio.fail_after(5):
                    while (await other.loads()).num_requests_waiting:
                        await anyio.sleep(0.02)


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_body_that_never_comes_does_not_hold_up_the_end(num_signals: int) -> None:
    with serving("--http", "0") as server:
        host, port = server.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            time.sleep(0.3)
            for _ in range(num_signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert server.process.wait(1 if num_signals == 2 else 10) == 0
    assert len(server.lines) == 4  # nothing but ours


def test_a_page_in_a_browser_is_not_let_in(server: Server) -> None:
    body = json.dumps({"messages": PLAIN, "max_tokens": 1}).encode()
    url = f"{server.http}/v1/chat/completions"
    assert post(url, body, content_type="text/plain")[0] == 415  # what a page may send without asking
    assert post(url, body, content_type="application/json", host="rebound.example.org")[0] == 403
    assert post(url, body, content_type="application/json", host="localhost:1")[0] == 200
    assert post(url, b" " * (4 * 2**20 + 1), content_type="application/json")[0] == 413


async def test_a_token_is_asked_for(guarded: Server) -> None:
    for key in ("wrong", "secre", "secrett"):
        async with client_of(guarded, key) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="demo", messages=PLAIN)
    for path in ("/v1/models", "/metrics"):
        status, headers, _ = post(guarded.http + path, None)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert post(f"{guarded.http}/v1/models", None, authorization="bearer secret")[0] == 200
    assert post(f"{guarded.http}/health", None)[0] == 200
    async with client_of(guarded, "secret") as client:
        assert (await client.chat.completions.create(model="demo", messages=PLAIN, max_tokens=1)).usage


async def test_who_hangs_up_gives_memory_back(server: Server) -> None:
    async with (
        client_of(server, "x") as client,
        Client(server.address) as grpc_client,
    ):
        how: Any = {"model": "demo", "messages": PLAIN, "max_tokens": 3500, "extra_body": {"ignore_eos": True}}
        stream = await client.chat.completions.create(stream=True, **how)
        await anext(aiter(stream))
        await stream.close()
        with anyio.move_on_after(0.3):
            await client.chat.completions.create(**how)
        with anyio.fail_after(5):
            while (await grpc_client.loads()).num_requests_running:
                await anyio.sleep(0.02)


async def test_metrics_count_what_was_done(guarded: Server) -> None:
    def figures() -> dict[str, float]:
        request = urllib.request.Request(f"{guarded.http}/metrics", headers={"authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    before = figures()
    async with Client(guarded.address, token="secret") as client:
        result = await client.complete(PROMPT, max_tokens=60, ignore_eos=True)
    after = figures()
    labels = 'model_name="demo"'

    def grown(name: str, more: str = "") -> float:
        found = name + "{" + ",".join(filter(None, [more, labels])) + "}"
        return after[found] - before.get(found, 0.0)

    assert grown("forerun:generation_tokens_total") == 60
    assert grown("forerun:prompt_tokens_total") == result.usage.num_prompt_tokens
    assert grown("forerun:request_success_total", 'finished_reason="length"') == 1
    assert grown("forerun:time_to_first_token_seconds_count") == 1
    assert grown("forerun:inter_token_latency_seconds_count") > 0
    for name, each in result.speculation.drafters.items():
        assert grown("forerun:spec_decode_num_draft_tokens_total", f'drafter="{name}"') == each.num_draft_tokens
        assert grown("forerun:spec_decode_num_accepted_tokens_total", f'drafter="{name}"') == each.num_accepted_tokens
    assert after["forerun:num_requests_running{" + labels + "}"] == 0
    assert 0 <= after["forerun:kv_cache_usage_perc{" + labels + "}"] <= 1
