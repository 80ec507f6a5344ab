"""Chats with thoughts and tools through both doors, with a model that goes on as its prompt began."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forerun
import openai
import pytest
from forerun.actors.model import SHIPPED
from forerun.client import Client

from tests.grpc.serving import Server, serving

pytestmark = pytest.mark.anyio

TEMPLATE = """{# It asks for <tool_call> and <function=. #}
{%- for tool in (tools or [] if list else []) %}{{ tool | tojson }} {% endfor -%}
{{- messages[-1].content }}{{ messages[-1].name }}{% for message in messages %}{% for call in message.tool_calls or [] -%}
{{ call.function.name }}({% for key, value in call.function.arguments | items %}{{ key }}={{ value | tojson }}{% endfor %})
{%- endfor %}{% endfor %}{% if think %}<think>{% endif %}"""
TURN = "<think>hm</think><tool_call><function=add></function></tool_call>\n"
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CHAT: Any = [{"role": "user", "content": TURN * 20}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "copying"
    shutil.copytree(SHIPPED["demo"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def copying(folder: Path) -> Iterator[Server]:
    with serving("--http", "0", "-m", str(folder), "--chat-template-kwargs", '{"think": true}') as server:
        yield server


async def answers(server: Server, **fields: Any) -> tuple[Any, Any]:
    """The whole answer to CHAT, and the chunks of it as a stream."""
    how: Any = {"messages": CHAT, "model": "copying", "temperature": 0, "max_tokens": 64, "tools": TOOLS} | fields
    client: Any = openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="x", max_retries=0)
    async with client:
        whole = await client.chat.completions.create(**how)
        return whole.choices[0], [chunk.choices[0] async for chunk in await client.chat.completions.create(stream=True, **how)]


async def test_thoughts_and_calls_are_told_apart(copying: Server) -> None:
    whole, chunks = await answers(copying, parallel_tool_calls=False, logprobs=True)
    assert (whole.finish_reason, whole.message.content, whole.message.reasoning_content) == ("tool_calls", None, "hm")
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "add", "{}")
    assert chunks[0].delta.role == "assistant"
    assert "".join(getattr(chunk.delta, "reasoning_content", "") for chunk in chunks) == "hm"
    assert not any(chunk.delta.content for chunk in chunks)
    calls = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
    assert calls[0].id.startswith("call_")
    assert [(call.index, call.function.name) for call in calls if call.function.name] == [(0, "add")]
    assert "".join(call.function.arguments for call in calls) == "{}"
    assert chunks[-1].finish_reason == "tool_calls"
    told = [each.logprob for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content]
    assert told == [each.logprob for each in whole.logprobs.content]


async def test_several_calls_until_there_is_no_room(copying: Server) -> None:
    whole, chunks = await answers(copying)
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    assert len({call.id for call in whole.message.tool_calls}) == len(whole.message.tool_calls) > 1
    assert whole.message.content == "".join(chunk.delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}])
async def test_without_tools_what_looks_like_a_call_is_content(copying: Server, fields: Any) -> None:
    whole, _ = await answers(copying, stop="\n", **fields)
    assert (whole.message.content, whole.message.tool_calls) == (TURN.removeprefix("<think>hm</think>").rstrip(), None)
    assert (whole.message.reasoning_content, whole.finish_reason) == ("hm", "stop")


async def test_a_call_that_has_to_be(copying: Server) -> None:
    properties = {"a": {"type": "integer", "maximum": 99, "minimum": 10}, "b": {"enum": ["x", "yy"]}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "other", "parameters": schema}}]
    for choice, name in (({"type": "function", "function": {"name": "other"}}, "other"), ("required", None)):
        messages: Any = [{"role": "user", "content": "say"}]
        how: Any = {"messages": messages, "max_tokens": 500, "extra_body": {"chat_template_kwargs": {"think": False}}}
        whole, chunks = await answers(copying, tools=tools, tool_choice=choice, **how)
        (call,) = whole.message.tool_calls
        assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"
        assert name is None or call.function.name == name
        arguments = json.loads(call.function.arguments)
        if call.function.name == "other":
            assert 10 <= arguments["a"] <= 99
            assert arguments["b"] in ("x", "yy")
        told = "".join(each.function.arguments for chunk in chunks for each in chunk.delta.tool_calls or ())
        assert told == call.function.arguments


async def test_json_after_a_thought(copying: Server, folder: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    whole, chunks = await answers(copying, response_format=form, tools=[], max_tokens=300)
    assert whole.message.reasoning_content == "hm"
    assert isinstance(json.loads(whole.message.content)["a"], int)
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    async with Client(copying.address) as client, forerun.open_engine(folder, spec_type="none") as engine:
        told = await client.complete(CHAT, max_tokens=300, temperature=0, json_schema=schema)
        chat = forerun.Chat(CHAT, (), {"think": True})
        assert told.text == (await engine.complete(chat, max_tokens=300, temperature=0, json_schema=schema)).text
        assert told.text.endswith(whole.message.content)
        others: list[Any] = [{"regex": "[a-c]{3}"}, {"grammar": 'root ::= "x" [0-9]'}]
        for how in others:
            text = (await client.complete("say", max_tokens=20, **how)).text
            assert re.fullmatch("[a-c]{3}|x[0-9]", text)


async def test_what_a_template_is_told(copying: Server, folder: Path) -> None:
    function = {"name": "f", "arguments": '{"a": "<|im_end|>"}'}
    named = forerun.Chat([{"role": "user", "content": "x", "name": "bob"}])
    called: Any = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    told: Any = {"think": False, "list": True}
    chat = forerun.Chat([*CHAT, *called], TOOLS, told)
    expected = json.dumps(TOOLS[0], ensure_ascii=False) + ' 2f(a="<|im_end|>")'
    async with forerun.open_engine(folder) as engine:
        ids = await engine.tokenize(chat)
        assert (await engine.detokenize(list(ids)), ids) == (expected, await engine.tokenize(expected))
        result = await engine.complete(chat, max_tokens=20, temperature=0)
    async with Client(copying.address) as client:
        assert await client.tokenize(chat) == ids
        assert "bob" in await client.detokenize(list(await client.tokenize(named)))
        assert (await client.complete(chat, max_tokens=20, temperature=0)).text == result.text
        async with client.generate(CHAT, max_tokens=20, temperature=0) as stream:
            async for _ in stream:
                pass
        assert stream.started is not None
        assert stream.started.opens_reasoning  # as the server's flag has it
    called[0]["content"] = None
    whole, _ = await answers(copying, messages=[*CHAT, *called], max_tokens=20, extra_body={"chat_template_kwargs": told})
    assert whole.message.content == result.text


@pytest.mark.parametrize("given", ["[]", "{", '{"messages": []}'])
def test_kwargs_that_are_none(given: str) -> None:
    with pytest.raises(AssertionError, match=r"chat-template-kwargs|template_kwargs\.messages"), serving("--chat-template-kwargs", given):
        pass
