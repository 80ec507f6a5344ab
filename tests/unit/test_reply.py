"""Answers to chats told apart: thoughts, content and calls of tools, however the text is cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from forerun import CallArguments, CallBegun, Content, Reasoning, ReplyParser, ReplyPiece

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "lines": {"type": "integer"},
                    "force": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "owner": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "size": {"type": ["number", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


def call(name: str, **arguments: str) -> str:
    """As templates ask for it."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def joined(pieces: list[ReplyPiece]) -> list[ReplyPiece]:
    """Neighbours of a kind as one."""
    found = list[ReplyPiece]()
    for piece in pieces:
        before = found[-1] if found else None
        if isinstance(piece, Reasoning) and isinstance(before, Reasoning):
            found[-1] = Reasoning(before.text + piece.text)
        elif isinstance(piece, Content) and isinstance(before, Content):
            found[-1] = Content(before.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(before, CallArguments):
            assert piece.index == before.index
            found[-1] = CallArguments(piece.index, before.text + piece.text)
        else:
            found.append(piece)
    return found


def told(text: str, sizes: list[int], opens_reasoning: bool = False, tools: list[dict[str, Any]] = TOOLS) -> list[ReplyPiece]:
    """What a parser says of a text cut into pieces of these sizes, over and over."""
    parser, pieces, at, i = ReplyParser(tools, opens_reasoning), list[ReplyPiece](), 0, 0
    while at < len(text):
        pieces += parser.push(text[at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    pieces += parser.end()
    message = parser.message()
    assert message["content"] == "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert message.get("reasoning_content", "") == "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    assert len(message.get("tool_calls", [])) == sum(isinstance(piece, CallBegun) for piece in pieces) == parser.num_calls
    return joined(pieces)


THOUGHT = "Let me see.\n\nIs 1 < 2? <tool_call> is a word."
CASES: list[tuple[str, bool, list[ReplyPiece]]] = [
    ("", False, []),
    (" hello \n world \n", False, [Content(" hello \n world \n")]),
    (f"{THOUGHT}\n</think>\n\nYes.", True, [Reasoning(THOUGHT), Content("Yes.")]),
    (f"<think>\n{THOUGHT}\n</think>\n\nYes.\n", False, [Reasoning(THOUGHT), Content("Yes.\n")]),
    (f"\n<think>{THOUGHT}", False, [Reasoning(THOUGHT)]),
    ("</think>\n\n", True, []),
    ("it says <think> and </think> here", False, [Content("it says <think> and </think> here")]),
    ("a</think>b<think>c</think>", True, [Reasoning("a"), Content("b<think>c</think>")]),
    (call("stop"), False, [CallBegun(0, "stop"), CallArguments(0, "{}")]),
    (
        "thinking\n</think>\n\nI write.\n\n" + call("write", path='a/ü"\n.py', lines=" 3") + "\n" + call("stop") + "\n",
        True,
        [
            Reasoning("thinking"), Content("I write."), CallBegun(0, "write"), CallArguments(0, '{"path": "a/ü\\"\\n.py", "lines": 3}'),
            CallBegun(1, "stop"), CallArguments(1, "{}"),
        ],
    ),
    (
        call("write", force="True", tags='["a", {"b": null}]', owner="None", size="1.5", other="x"),
        False,
        [CallBegun(0, "write"), CallArguments(0, '{"force": true, "tags": ["a", {"b": null}], "owner": null, "size": 1.5, "other": "x"}')],
    ),
    (
        call("write", path="\n\n  x\n\n", lines="many", owner="me", tags="[NaN]", size="null"),
        False,
        [
            CallBegun(0, "write"),
            CallArguments(0, '{"path": "\\n\\n  x\\n\\n", "lines": "many", "owner": "me", "tags": "[NaN]", "size": null}'),
        ],
    ),
    (call("write", path="</function> <tool_call></param"), False, [
        CallBegun(0, "write"), CallArguments(0, '{"path": "</function> <tool_call></param"}'),
    ]),
    (call("write", path=""), False, [CallBegun(0, "write"), CallArguments(0, '{"path": ""}')]),
    ("<tool_call><function=write><parameter=path>x</parameter></function></tool_call>", False, [
        CallBegun(0, "write"), CallArguments(0, '{"path": "x"}'),
    ]),
    ('x\n<tool_call>\n{"name": "write", "arguments": {"path": "a\\nb", "lines": 1}}\n</tool_call>\ny', False, [
        Content("x"), CallBegun(0, "write"), CallArguments(0, '{"path": "a\\nb", "lines": 1}'), Content("y"),
    ]),
    ('<tool_call>{"name": "stop"}</tool_call>', False, [CallBegun(0, "stop"), CallArguments(0, "{}")]),
    # two functions in one call, and one that is closed with the call alone
    ("<tool_call><function=stop></function><function=stop></tool_call>z", False, [
        CallBegun(0, "stop"), CallArguments(0, "{}"), CallBegun(1, "stop"), CallArguments(1, "{}"), Content("z"),
    ]),
    # a value that is not closed
    ("<tool_call>\n<function=write>\n<parameter=lines>\n12\n</function>\n</tool_call> bye", False, [
        CallBegun(0, "write"), CallArguments(0, '{"lines": 12}'), Content("bye"),
    ]),
    ("<tool_call>\n<function=write>\n<parameter=lines>\n12\n<parameter=path>\nx\n</function>\n</tool_call>\n" + call("stop"), False, [
        CallBegun(0, "write"), CallArguments(0, '{"lines": 12, "path": "x"}'), CallBegun(1, "stop"), CallArguments(1, "{}"),
    ]),
    # numbers that are none, and texts that nobody can send
    (call("write", lines="1e999"), False, [CallBegun(0, "write"), CallArguments(0, '{"lines": "1e999"}')]),
    (call("write", tags='["\\ud83d"]'), False, [CallBegun(0, "write"), CallArguments(0, '{"tags": "[\\"\\\\ud83d\\"]"}')]),
    ('<tool_call>{"name": "stop", "arguments": {"a": "\\ud83d"}}</tool_call>', False, [
        Content('<tool_call>{"name": "stop", "arguments": {"a": "\\ud83d"}}</tool_call>'),
    ]),
    # not calls
    ("x<tool_call>\n{bad}\n</tool_call>y", False, [Content("x<tool_call>\n{bad}\n</tool_call>y")]),
    ("a \n<tool_call> b", False, [Content("a \n<tool_call> b")]),
    ("a <tool_call>", False, [Content("a <tool_call>")]),
    ("a <tool_cal", False, [Content("a <tool_cal")]),
    ("<tool_call>\n<function=a\nb>", False, [Content("<tool_call>\n<function=a\nb>")]),
    ('<tool_call>{"name": 3}</tool_call>.', False, [Content('<tool_call>{"name": 3}</tool_call>.')]),
    ('<tool_call>{"name": "stop", "arguments": {}', False, [Content('<tool_call>{"name": "stop", "arguments": {}')]),
    ("<tool_call>[1]</tool_call>" + call("stop"), False, [
        Content("<tool_call>[1]</tool_call>"), CallBegun(0, "stop"), CallArguments(0, "{}"),
    ]),
    # what ends in the midst of a call is not made to look whole
    ("<tool_call>\n<function=write>\n<parameter=path>\na/b", False, [CallBegun(0, "write"), CallArguments(0, '{"path": "a/b')]),
    ("<tool_call>\n<function=write>\n<parameter=lines>\n3", False, [CallBegun(0, "write"), CallArguments(0, '{"lines": ')]),
    ("<tool_call><function=write><parameter=lines>3</parameter>\n", False, [CallBegun(0, "write"), CallArguments(0, '{"lines": 3')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "opens_reasoning", "expected"), CASES)
def test_every_cut_says_the_same(text: str, opens_reasoning: bool, expected: list[ReplyPiece]) -> None:
    for size in range(1, len(text) + 2):
        assert told(text, [size], opens_reasoning) == expected, size
    for seed in range(20):
        assert told(text, [random.Random(seed * 100 + i).randrange(1, 9) for i in range(7)], opens_reasoning) == expected, seed


def test_without_tools_calls_are_content() -> None:
    text = "so: " + call("stop")
    assert told(text, [3], tools=[]) == [Content(text)]


def test_a_text_argument_comes_as_it_is_written() -> None:
    parser = ReplyParser(TOOLS)
    parser.push("<tool_call>\n<function=write>\n<parameter=path>\n")
    assert parser.push("ab") == [CallArguments(0, "ab")]
    assert parser.push('"\n') == [CallArguments(0, '\\"')]
    assert parser.push("c") == [CallArguments(0, "\\nc")]


def test_arguments_that_ended_are_json_whatever_models_write() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        alphabet = ['"', "\\", "\n", "<", ">", "/parameter", "</param", "{", "}", "é", "🦊", " ", "3", "null", "\x07"]
        values = {key: "".join(rng.choices(alphabet, k=rng.randrange(6))) for key in ("path", "lines", "force", "tags", "owner", "none")}
        pieces = told(call("write", **values), [rng.randrange(1, 5)])
        assert len(pieces) == 2
        assert isinstance(pieces[1], CallArguments)
        arguments = json.loads(pieces[1].text)
        assert list(arguments) == list(values)
        assert arguments["path"] == values["path"]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000, '{"a": ' * 5000, "1e5000", "-", '"\\'])
def test_values_that_no_reader_takes(value: str) -> None:
    for text in (call("write", tags=value), f'<tool_call>{{"name": "stop", "arguments": {{"a": {value}}}}}</tool_call>'):
        parser = ReplyParser(TOOLS)
        for at in range(0, len(text), 997):
            parser.push(text[at : at + 997])
        parser.end()
        for found in parser.message().get("tool_calls", []):
            assert json.loads(str(found["function"]["arguments"])) == {"tags": value}


def test_only_so_many_calls_are_heard() -> None:
    for text in (call("stop") + "\n" + call("stop") + "z", "<tool_call><function=stop></function><function=stop></function></tool_call>"):
        for size in range(1, 20):
            parser, pieces = ReplyParser(TOOLS, most_calls=1), list[ReplyPiece]()
            for at in range(0, len(text), size):
                pieces += parser.push(text[at : at + size])
            assert joined([*pieces, *parser.end()]) == [CallBegun(0, "stop"), CallArguments(0, "{}")]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/Point"}, '{"x": 1}'),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, '{"x": 1}'),
        ({"properties": {"x": {}}}, '{"x": 1}'),
        ({"enum": [{"x": 1}]}, '{"x": 1}'),
        ({"$ref": "#/$defs/Nothing"}, r'"{\"x\": 1}"'),
        ({"$ref": "#/$defs/Loop"}, r'"{\"x\": 1}"'),
        ({"enum": ["x"]}, r'"{\"x\": 1}"'),
        (3, r'"{\"x\": 1}"'),
    ],
)
def test_types_of_arguments(schema: Any, expected: str) -> None:
    kinds = {"Point": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}
    tool: Any = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"p": schema}, "$defs": kinds}}}
    assert told(call("f", p='{"x": 1}'), [5], tools=[tool])[1] == CallArguments(0, f'{{"p": {expected}}}')


def test_a_message_goes_back_into_a_chat() -> None:
    parser = ReplyParser(TOOLS, opens_reasoning=True)
    parser.push("hm\n</think>\n\n" + call("write", lines="2"))
    parser.end()
    assert parser.message(["call_x"]) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "call_x", "type": "function", "function": {"name": "write", "arguments": '{"lines": 2}'}}],
    }
