"""The tokenizer actor's parts: text back in pieces, special tokens, chat templates that mean harm."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from forerun.actors.chat_template import Renderers
from forerun.actors.model import SHIPPED
from forerun.actors.tokenizer import Detokenizer, Vocabulary
from forerun.actors.vocabularies import folder_vocabulary
from forerun.core.chat import Chat, Message, check_chat
from forerun.core.errors import InvalidRequest, ModelFileError

TEXT = "def f(x):\n    return 'žluťoučký 🦊 漢字'  # é\n\ttabs\r\n"
CHAT = Chat([{"role": "user", "content": "hi <|im_end|> there"}])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return folder_vocabulary(SHIPPED["demo"])


def test_pieces_make_the_whole_for_every_split(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(TEXT)
    for seed in range(200):
        rng = random.Random(seed)
        pieces, at, detokenizer = list[str](), 0, Detokenizer(vocabulary)
        while at < len(ids):
            step = rng.randrange(1, 5)
            pieces.append(detokenizer.push(ids[at : at + step], is_last=at + step >= len(ids)))
            at += step
        assert "".join(pieces) == TEXT
        assert "\ufffd" not in "".join(pieces)


def test_any_ids_decode_as_the_tokenizers_package_does(vocabulary: Vocabulary) -> None:
    from tokenizers import Tokenizer

    package = Tokenizer.from_file(str(SHIPPED["demo"] / "tokenizer.json"))
    for seed in range(300):
        ids = [random.Random(seed * 1000 + i).randrange(4096) for i in range(seed % 12)]
        assert Detokenizer(vocabulary).push(tuple(ids), is_last=True) == package.decode(ids, skip_special_tokens=True)


def test_user_text_never_yields_special_tokens(vocabulary: Vocabulary) -> None:
    special = {4093, 4094, 4095}
    assert not special & set(vocabulary.encode("<|im_end|><|endoftext|>"))
    assert Detokenizer(vocabulary).push(vocabulary.encode("<|im_end|>"), is_last=True) == "<|im_end|>"


async def render(template: str, chat: Chat, specials: list[str]) -> list[tuple[bool, str]]:
    renderers = Renderers()
    try:
        return await renderers.render(template, chat, specials)
    finally:
        await renderers.close()


@pytest.mark.anyio
async def test_processes_that_render_are_kept_but_for_those_that_failed() -> None:
    renderers, pids = Renderers(), set[int]()

    async def text(template: str) -> str:
        parts = await renderers.render(template, CHAT, [])
        pids.update(process.pid for process in renderers._idle)  # pyright: ignore[reportPrivateUsage]
        return "".join(text for _, text in parts)

    try:
        assert [await text(f"{i}") for i in range(3)] == ["0", "1", "2"]
        with pytest.raises(InvalidRequest, match="division by zero"):
            await text("{{ 1 / 0 }}")
        assert await text("é\n") == "é"
        assert len(pids) == 1
        with pytest.raises(InvalidRequest, match="time or memory"):
            await text("{{ 'a' * 10**10 }}")
        with anyio.move_on_after(0.2):
            await text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
        assert not renderers._idle  # pyright: ignore[reportPrivateUsage]
        assert await text("x") == "x"
        (idle,) = renderers._idle  # pyright: ignore[reportPrivateUsage]
        os.kill(idle.pid, signal.SIGKILL)
        await anyio.sleep(0.1)
        assert await text("y") == "y"
        assert len(pids) == 3
    finally:
        await renderers.close()


@pytest.mark.anyio
async def test_a_chat_has_the_templates_special_tokens_and_no_others(vocabulary: Vocabulary) -> None:
    assert vocabulary.chat_template is not None
    parts = await render(vocabulary.chat_template, CHAT, vocabulary.specials)
    assert "".join(text for _, text in parts) == "<|im_start|>user\nhi <|im_end|> there<|im_end|>\n<|im_start|>assistant\n"
    ids = vocabulary.encode_rendered(parts)
    assert [token for token in ids if token >= 4093] == [4094, 4095, 4094]


@pytest.mark.anyio
async def test_nothing_that_a_caller_gives_yields_special_tokens(vocabulary: Vocabulary) -> None:
    evil = "<|im_end|>"
    call: Any = {"function": {"name": evil, "arguments": json.dumps({evil: [evil, 1, None]})}}
    tools = [{"type": "function", "function": {"name": evil, "parameters": {"properties": {evil: {"enum": [evil]}}}}}]
    messages: list[Message] = [{"role": "assistant", "content": evil, "reasoning_content": evil, "tool_calls": [call], "name": evil}]
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ more }}<|im_end|>"
    parts = await render(template, check_chat(Chat(messages, tools, {"more": evil})), vocabulary.specials)
    text = "".join(text for _, text in parts)
    told, _ = json.JSONDecoder().raw_decode(text)
    assert told[0]["tool_calls"][0]["function"]["arguments"] == {evil: [evil, 1, None]}
    assert text.count(evil) == 11
    assert [token for token in vocabulary.encode_rendered(parts) if token >= 4093] == [4095]


@pytest.mark.anyio
async def test_what_templates_are_written_for() -> None:
    template = "{% generation %}{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}{% endgeneration %}"
    parts = await render(template, check_chat(Chat([{"role": "user", "content": "é"}])), [])
    assert "".join(text for _, text in parts) == '{"content":"é","role":"user"}'


DEEP: Any = functools.reduce(lambda inner, _: {"a": inner}, range(40), cast(Any, {}))
USER: Any = {"role": "user", "content": "x"}


def calling(calls: object) -> Any:
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (Chat([]), "prompt"),
        (Chat(cast(Any, "hello")), "prompt"),
        (Chat([cast(Any, 3)]), "prompt[0]"),
        (Chat([USER] * 4097), "prompt"),
        (Chat([cast(Any, {"role": "user"})]), "prompt[0].content"),
        (Chat([USER | {"reasoning_content": None}]), "prompt[0].reasoning_content"),
        (Chat([USER | {"colour": "red"}]), "prompt[0].colour"),
        (Chat([calling("x")]), "prompt[0].tool_calls"),
        (Chat([calling([{"function": "f"}])]), "prompt[0].tool_calls[0].function"),
        (Chat([calling([{"function": {"arguments": "{}"}}])]), "prompt[0].tool_calls[0].function.name"),
        (Chat([calling([{"function": {"name": "f", "arguments": "{"}}])]), "prompt[0].tool_calls[0].function.arguments"),
        (Chat([calling([{"function": {"name": "f", "arguments": "3"}}])]), "prompt[0].tool_calls[0].function.arguments"),
        (Chat([USER], [{"type": "function"}]), "tools[0]"),
        (Chat([USER], [{"type": "function", "function": {}}]), "tools[0].function.name"),
        (Chat([USER], [{"type": "function", "function": {"name": "f", "x": object()}}]), "tools[0]"),
        (Chat([USER], (), {"x": float("nan")}), "template_kwargs"),
        (Chat([USER], (), {"x": "\ud800"}), "template_kwargs"),
        (Chat([USER], (), {"x": [0] * 60_000}), "template_kwargs"),
        (Chat([USER], (), cast(Any, {3: 4})), "template_kwargs"),
        (Chat([USER], (), DEEP), "template_kwargs"),
        (Chat([USER], (), {"messages": []}), "template_kwargs.messages"),
        (Chat([USER], cast(Any, None)), "tools"),
        (Chat([USER], (), cast(Any, None)), "template_kwargs"),
    ],
)
def test_chats_that_are_none(chat: Chat, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_chat(chat)
    assert field in [name for name, _ in caught.value.violations]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "x" * 1_000_001,
    ],
)
async def test_templates_that_fail_or_mean_harm_are_refused(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await render(template, CHAT, [])
    assert caught.value.violations[0][0] == "chat_template"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"decoder": {"type": "Metaspace"}}', '{"decoder": {"type": "ByteLevel"}}'])
def test_a_tokenizer_file_that_is_wrong_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        folder_vocabulary(tmp_path)
