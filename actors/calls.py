"""Grammars of answers that have to call a tool, in the form that a model's chat template asks for: see reply.py, which reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.errors import InvalidRequest
from .grammar import BLANKS
from .reply import CALL, END_CALL, END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, types_of
from .tokenizer import Vocabulary


def call_grammar(tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary | None) -> str:
    """In Lark's notation as llguidance has it (`docs/syntax.md`): one call of one of the tools, as check_chat leaves them, with arguments
    that its schema allows. InvalidRequest where the model's template has no form for calls."""
    if not tools:
        raise InvalidRequest([("grammar", "must name a tool that there is")])
    template = (vocabulary.chat_template if vocabulary is not None else None) or ""
    if CALL not in template:
        raise InvalidRequest([("grammar", "this model's chat template has no form for calls")])
    rule = _tagged if FUNCTION in template else _json
    rules = [text for i, tool in enumerate(tools) for text in rule(f"f{i}", cast("Mapping[str, Any]", tool["function"]))]
    either = " | ".join(f"f{i}" for i in range(len(tools)))
    return "\n".join([f"start: /[ \\n]{{0,4}}/ {_text(CALL + chr(10))} ({either}) {_text(END_CALL)}", *rules]) + "\n"


def _json(name: str, function: Mapping[str, Any]) -> list[str]:
    """A JSON object of name and arguments."""
    head = _text('{"name": ' + json.dumps(function["name"], ensure_ascii=False) + ', "arguments": ')
    return [f"{name}: {head} {name}_arguments {_text('}' + chr(10))}", f"{name}_arguments: %json {_schema(function.get('parameters'))}"]


def _tagged(name: str, function: Mapping[str, Any]) -> list[str]:
    """Parameters in the order of their schema, those that need not be there perhaps; texts end where they are closed."""
    schema = cast("object", function.get("parameters"))
    given = cast("dict[str, Any]", schema) if isinstance(schema, dict) else dict[str, Any]()
    properties, required = given.get("properties"), given.get("required")
    keys = list(cast("dict[str, Any]", properties)) if isinstance(properties, dict) else []
    shared = {word: given[word] for word in ("$defs", "definitions") if word in given}
    rules, sequence = list[str](), list[str]()
    for i, key in enumerate(keys):
        kind, rule, end = cast("dict[str, Any]", properties)[key], f"{name}_{i}", f"\n{END_PARAMETER}\n"
        choices = cast("dict[str, Any]", kind).get("enum") if isinstance(kind, dict) else None
        if "string" not in types_of(given, key):
            value = f"{rule}_value {_text(end)}"
            rules.append(f"{rule}_value: %json {_schema({**kind, **shared})}")
        elif isinstance(choices, list) and choices and all(isinstance(each, str) for each in cast("list[object]", choices)):
            value = f"({' | '.join(map(_text, cast('list[str]', choices)))}) {_text(end)}"
        else:
            value = f"{rule}_value"
            rules.append(f"{rule}_value[suffix={_text(end)}]: /(?s:.*)/")
        rules.append(f"{rule}: {_text(f'{PARAMETER}{key}>' + chr(10))} {value}")
        sequence.append(rule if isinstance(required, list) and key in required else f"{rule}?")
    head, end = _text(f"{FUNCTION}{function['name']}>\n"), _text(f"{END_FUNCTION}\n")
    return [f"{name}: {' '.join([head, *sequence, end])}", *rules]


def _schema(schema: Any) -> str:
    given = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {"type": "object"}
    return json.dumps({**given, "x-guidance": {"whitespace_pattern": BLANKS}})


def _text(text: str) -> str:
    """As a literal."""
    return json.dumps(text, ensure_ascii=False)
