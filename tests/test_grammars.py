"""Answers that follow a grammar: drafts change nothing, and everything that can happen to a request can happen to them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, cast

import anyio
import forerun
import pytest
from forerun.actors.calls import call_grammar
from forerun.actors.grammar import Grammars, TokenLimits
from forerun.core.vocabulary import Grammar

pytestmark = pytest.mark.anyio

SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": r"def [a-z_]{3,12}\(\):( pass)?"},
    {"grammar": 'root ::= ("yes, " | "no, ") ("yes, " | "no, ")? "ok"'},
]


@pytest.fixture(scope="module")
def demo() -> forerun.Model:
    return forerun.load_model("demo")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind)))
async def test_speculation_changes_nothing(demo: forerun.Model, kind: dict[str, Any]) -> None:
    found: dict[float, set[str]] = {}
    engines: list[Any] = [{"spec_type": "none"}, {}, {"spec_type": "draft-mtp", "choose": "first"}, {"spec_type": "ngram-mod,ngram-simple"}]
    for options in engines:
        async with forerun.open_engine(demo, **options) as engine:
            for temperature in (0.0, 0.9):
                result = await engine.complete("people = [", max_tokens=800, temperature=temperature, seed=5, **kind)
                found.setdefault(temperature, set()).add(result.text)
    for texts in found.values():
        (text,) = texts
        if "json_schema" in kind:
            value = json.loads(text)
            assert 0 <= value["age"] <= 120
            assert {"red", "green", "blue"} >= set(value["tags"])
            assert 2 <= len(value["tags"]) <= 4
        else:
            assert re.fullmatch(kind.get("regex", "(yes, |no, ){1,2}ok"), text)


async def test_drafts_follow_it_too(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo, spec_type="draft-mtp", choose="first") as engine:
        result = await engine.complete("people = [", max_tokens=800, temperature=0, json_schema=SCHEMA)
    assert result.finish_reason is forerun.FinishReason.STOP
    assert result.speculation.mean_acceptance_length > 1.5


async def test_others_in_the_batch_are_left_alone(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo, num_slots=4) as engine:
        alone = await engine.complete("import os", max_tokens=40, temperature=0.7, seed=1)
        found: dict[str, forerun.Result] = {}

        async def one(name: str, **how: Any) -> None:
            found[name] = await engine.complete("import os", max_tokens=40, temperature=0.7, seed=1, **how)

        async with anyio.create_task_group() as group:
            group.start_soon(one, "free")
            for i, kind in enumerate(KINDS):
                group.start_soon(lambda i=i, kind=kind: one(str(i), **kind))
    assert found["free"].token_ids == alone.token_ids


async def test_it_is_saved_and_survives_the_loss_of_memory(demo: forerun.Model, tmp_path: Path) -> None:
    how: Any = {"max_tokens": 800, "temperature": 0.9, "seed": 5, "json_schema": SCHEMA}
    async with forerun.open_engine(demo) as engine:
        whole = await engine.complete("people = [", **how)
        async with engine.generate("people = [", **how) as stream:
            await anext(stream)
            await stream.save(tmp_path / "request")
            engine.tree.supervisor.kill("target decoder", RuntimeError("killed by a test"))
            async for _ in stream:
                pass
        assert stream.result.text == whole.text
    async with forerun.open_engine(demo, spec_type="none") as engine, engine.restore(tmp_path / "request") as stream:
        async for _ in stream:
            pass
    assert stream.result.text == whole.text


async def test_a_draft_that_leads_nowhere_is_nobodys_failure(demo: forerun.Model) -> None:
    """Only what was chosen is: here the target would rather say anything else."""
    assert demo.vocabulary is not None
    (b,), (d,), (a,) = (demo.vocabulary.encode(letter) for letter in "bda")
    grammar = 'start: ("b" | "d" | "a" /[^\\s\\S]/)+'
    found: set[str] = set()
    for options in ({"spec_type": "none"}, {"spec_type": "ngram-suffix", "choose": "first"}):
        async with forerun.open_engine(demo, **cast(Any, options)) as engine:
            ids = [b, d, a, demo.vocabulary.encode("c")[0]] * 30 + [d]
            how: Any = {"grammar": grammar, "logit_bias": {b: 100.0, d: 99.0}, "frequency_penalty": 2.0, "max_tokens": 12}
            found.add((await engine.complete(ids, **how)).text)
            with pytest.raises(forerun.RequestFailed, match="cannot be followed"):
                await engine.complete(ids, **how | {"logit_bias": {a: 500.0}})
    assert found == {"bdbdbdbdbdbd"}


class Panic(BaseException):
    """As those of Rust are seen here."""


async def test_a_library_that_panics_fails_its_request_alone(demo: forerun.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError

    def panic(*_: object) -> str:
        raise Panic("index out of bounds")

    async with forerun.open_engine(demo) as engine:
        alone = (await engine.complete("import", max_tokens=400, ignore_eos=True)).token_ids
        async with engine.generate("import", max_tokens=400, ignore_eos=True) as stream:
            await anext(stream)
            with monkeypatch.context() as patch:
                patch.setattr(TokenLimits, "_go_to", broken)
                with pytest.raises(forerun.RequestFailed, match="cannot be followed any further: ZeroDivisionError"):
                    await engine.complete("people = [", max_tokens=20, json_schema=SCHEMA)
                patch.setattr("llguidance.grammar_from", panic)
                with pytest.raises(forerun.InvalidRequest, match="index out of bounds"):
                    await engine.complete("people = [", max_tokens=20, regex="a+")
            async for _ in stream:
                pass
        assert stream.result.token_ids == alone
        assert engine.statistics().actors["target decoder"].num_restarts == 0


def test_the_end_of_a_thought_whatever_spells_it(demo: forerun.Model) -> None:
    assert demo.vocabulary is not None
    limits = Grammars(demo.vocabulary, demo.num_token_ids, demo.defaults.stop_ids).limits(Grammar("regex", "yes"), True)
    thought = demo.vocabulary.encode("hm </thin or not " * 30)
    plain = Grammars(demo.vocabulary, demo.num_token_ids, demo.defaults.stop_ids).limits(Grammar("regex", "yes"), False).allowed(())
    for end in ("</think>", "</th", "</thi"):
        whole = (*thought, *demo.vocabulary.encode(end), *demo.vocabulary.encode("</think>".removeprefix(end)))
        assert limits.allowed(thought) is None
        assert limits.allowed((*thought[:5], *thought)) is None
        assert limits.allowed(whole) == plain
        assert limits.allowed(whole[:-1]) is None


async def test_what_is_no_grammar(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo) as engine:
        bad: list[Any] = [{"json_schema": {"type": "nonsense"}}, {"regex": "("}, {"grammar": "root ::= root2"}, {"grammar": "start: x"}]
        for how in bad:
            with pytest.raises(forerun.InvalidRequest) as caught:
                await engine.complete("x", **how)
            assert caught.value.violations[0][0] in how
        assert (await engine.complete("x", max_tokens=3)).token_ids


def test_limits_depend_on_the_tokens_before_alone(demo: forerun.Model) -> None:
    """Whatever was asked before: a draft, one that no answer begins with, or another beginning."""
    assert demo.vocabulary is not None
    grammars = Grammars(demo.vocabulary, demo.num_token_ids, demo.defaults.stop_ids)
    text = '{"name": "Eve", "age": 33, "tags": ["red", "blue"]}'
    ids = demo.vocabulary.encode(text)
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    expected = [grammars.limits(grammar, False).allowed(ids[:i]) for i in range(len(ids) + 1)]
    limits = grammars.limits(grammar, False)
    for i in (3, 9, 2, len(ids), 0, 5, 1):
        limits.allowed((*ids[:i], *demo.vocabulary.encode('x"?')))
        assert limits.allowed(demo.vocabulary.encode("what?")) is None
        assert limits.allowed(ids[:i]) == expected[i]
    last = expected[-1]
    assert last is not None
    assert {i for i in range(demo.num_token_ids) if last[i // 8] >> i % 8 & 1} <= demo.defaults.stop_ids


@pytest.mark.parametrize("template", ["<tool_call> <function=", "<tool_call>"])
def test_grammars_of_calls_have_what_the_parser_reads(demo: forerun.Model, template: str) -> None:
    assert demo.vocabulary is not None
    demo_vocabulary = demo.vocabulary
    kinds = {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}
    properties = {"path": {"type": "string"}, "at": {"$ref": "#/$defs/Point"}, "how": {"enum": ["fast", "slow"]}, "say": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["path", "at", "how"], "$defs": kinds}
    tools: Any = [{"function": {"name": "stop"}}, {"function": {"name": "write", "parameters": schema}}]
    given: Any = {"path": "a\n</param\n", "at": {"x": 3}, "how": "slow"}
    vocabulary = copy.copy(demo_vocabulary)
    vocabulary.chat_template = template
    text = call_grammar(tools, vocabulary)
    grammars = Grammars(demo_vocabulary, demo.num_token_ids, demo.defaults.stop_ids)

    def is_of(answer: str) -> bool:
        limits = grammars.limits(Grammar("grammar", text), False)
        mask = limits.allowed(demo_vocabulary.encode(answer))
        return mask is not None and any(mask[each // 8] >> each % 8 & 1 for each in demo.defaults.stop_ids)

    def call(name: str, arguments: dict[str, Any]) -> str:
        if "<function=" not in template:
            return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in texts.items())
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"

    calls: list[tuple[str, Any]] = [("stop", {}), ("write", given), ("write", given | {"say": "hi"})]
    for name, arguments in calls:
        assert is_of(call(name, arguments))
        assert is_of("\n\n" + call(name, arguments))
        assert not is_of(call(name, arguments)[:-3])
        parser = forerun.ReplyParser(tools)
        parser.push(call(name, arguments))
        (found,) = parser.message().get("tool_calls", [])
        assert (found["function"]["name"], json.loads(cast(str, found["function"]["arguments"]))) == (name, arguments)
    for wrong in (
        call("nobody", {}),
        call("write", {"path": "a"}),
        call("write", given | {"how": "x"}),
        call("write", given | {"at": 3}),
        "hello",
    ):
        assert not is_of(wrong)
    with pytest.raises(forerun.InvalidRequest):
        call_grammar([], vocabulary)
    vocabulary.chat_template = "{{ messages }}"
    with pytest.raises(forerun.InvalidRequest, match="no form for calls"):
        call_grammar(tools, vocabulary)


def loop(size: int) -> Any:
    """A schema that refers to itself over and over."""
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}] * size}}}


@pytest.mark.parametrize("template", ["<tool_call> <function=", "<tool_call>"])
@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (None, {}),
        ({}, {}),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"a": 3}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"type": "boolean"}}}}}, {"a": True}),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}]}, {"a": 3}),
        ({"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}}, {"a": 3, "b": 4}),
        ({"properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "v": {"type": "integer"}}}, {"n": {"v": 1}, "v": 2}),
        ({"properties": {"c": {"$ref": "#/$defs/C"}}, "$defs": {"C": {"enum": ["red", "gr\x7f\"een"]}}}, {"c": "gr\x7f\"een"}),
        ({"properties": {"c": {"const": "r", "description": "x" * 500_000}}}, {"c": "r"}),
        (
            {"properties": {"description": {"type": "string"}, "title": {"type": "array"}}},
            {"description": "d", "title": ["</parameter>", "<parameter=x>", "</tool_call>"]},
        ),
        ({"properties": {"s": {"type": "string"}}}, {"s": "a\n</param\n\n</function>\nb"}),
        ({"additionalProperties": {"type": "string"}}, {"other": "x", "more": "y"}),
        (loop(50), {}),
    ],
)  # fmt: skip
def test_calls_of_many_schemas_come_back(demo: forerun.Model, template: str, schema: Any, arguments: Any) -> None:
    assert demo.vocabulary is not None
    vocabulary = copy.copy(demo.vocabulary)
    vocabulary.chat_template = template
    tools: Any = [{"function": {"name": "f", "parameters": schema}}]
    if "<function=" in template:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        answer = "<tool_call>\n<function=f>\n" + "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
        answer += "</function>\n</tool_call>"
    else:
        answer = "<tool_call>\n" + json.dumps({"name": "f", "arguments": arguments}) + "\n</tool_call>"
    grammar = Grammar("grammar", call_grammar(tools, vocabulary))
    limits = Grammars(demo.vocabulary, demo.num_token_ids, demo.defaults.stop_ids).limits(grammar, False)
    mask = limits.allowed(demo.vocabulary.encode(answer))
    assert mask is not None
    assert any(mask[each // 8] >> each % 8 & 1 for each in demo.defaults.stop_ids)
    for size in (1, 7, len(answer)):
        parser = forerun.ReplyParser(tools)
        for at in range(0, len(answer), size):
            parser.push(answer[at : at + size])
        (found,) = parser.message().get("tool_calls", [])
        assert json.loads(cast(str, found["function"]["arguments"])) == arguments


@pytest.mark.parametrize("name", ["a>b", "a\nb", " a", ""])
def test_names_that_a_form_has_no_room_for(demo: forerun.Model, name: str) -> None:
    vocabulary = copy.copy(demo.vocabulary)
    assert vocabulary is not None
    vocabulary.chat_template = "<tool_call> <function="
    bad: list[Any] = [{"name": name}, {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}]
    for function in bad:
        with pytest.raises(forerun.InvalidRequest, match="no name"):
            call_grammar([{"function": function}], vocabulary)
