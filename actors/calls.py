"""Grammars of answers that have to call a tool, in the form that a model's chat template asks for: see reply.py, which reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.errors import InvalidRequest
from ..core.vocabulary import GRAMMAR_CHARACTERS
from .grammar import BLANKS
from .reply import CALL, END_CALL, END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, at_path, several, types_in, values_of
from .tokenizer import Vocabulary

LINE = "\n"
#: what schemas say to people, and what is said for the whole of one
ANNOTATIONS = ("description", "title", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions")
#: values of a schema, and how deep references may lead, until which they are replaced by what they mean: others are anything
MAX_NODES, MAX_REFERENCES = 5_000, 6


def call_grammar(tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary | None) -> str:
    """In Lark's notation as llguidance has it (`docs/syntax.md`): one call of one of the tools, as check_chat leaves them, with arguments
    of the kinds that its schema says; texts that are not one of several are free. InvalidRequest where the model's template has no form
    for calls, or the form has no room for a name."""
    if not tools:
        raise InvalidRequest([("grammar", "must name a tool that there is")])
    template = (vocabulary.chat_template if vocabulary is not None else None) or ""
    if CALL not in template:
        raise InvalidRequest([("grammar", "this model's chat template has no form for calls")])
    is_tagged = FUNCTION in template
    rule, rules = (_tagged, [f"text[suffix={_text(END_PARAMETER)}]: /(?s:.*)/"]) if is_tagged else (_json, list[str]())
    for i, tool in enumerate(tools):
        rules += rule(f"f{i}", cast("Mapping[str, Any]", tool["function"]))
        if sum(map(len, rules)) > GRAMMAR_CHARACTERS:
            raise InvalidRequest([("grammar", "would be too large for so many tools")])
    either = " | ".join(f"f{i}" for i in range(len(tools)))
    return "\n".join([f"start: /[ \\n]{{0,4}}/ {_text(CALL, LINE)} ({either}) {_text(END_CALL)}", *rules]) + "\n"


def _json(name: str, function: Mapping[str, Any]) -> list[str]:
    """A JSON object of name and arguments."""
    head = _text('{"name": ', json.dumps(function["name"], ensure_ascii=False), ', "arguments": ')
    schema = _plain(function.get("parameters"))
    return [f"{name}: {head} {name}_arguments {_text('}', LINE)}", f"{name}_arguments: {_rule({**schema, 'type': 'object'})}"]


def _tagged(name: str, function: Mapping[str, Any]) -> list[str]:
    """Parameters in the order of their schema, those that need not be there perhaps; texts end where they are closed."""
    properties, required, is_open = _members(_plain(function.get("parameters")))
    rules, sequence = list[str](), list[str]()
    for i, (key, kind) in enumerate(properties.items()):
        rule, choices = f"{name}_{i}", _choices(kind)
        types = types_in(kind, kind)
        if choices:
            value = f"({' | '.join(_text(each) for each in choices)}) {_text(LINE, END_PARAMETER)}"
        elif types and "string" not in types:
            value = f"{rule}_value {_text(LINE, END_PARAMETER)}"
            rules.append(f"{rule}_value: {_rule(kind)}")
        else:
            value = "text"
        rules.append(f"{rule}: {_text(PARAMETER, _named(key), '>', LINE)} {value} {_text(LINE)}")
        sequence.append(rule if key in required else f"{rule}?")
    if is_open:
        rules.append(f"{name}_more: {_text(PARAMETER)} /[A-Za-z0-9_-]+/ {_text('>', LINE)} text {_text(LINE)}")
        sequence.append(f"{name}_more*")
    head = _text(FUNCTION, _named(cast(str, function["name"])), ">", LINE)
    return [f"{name}: {' '.join([head, *sequence, _text(END_FUNCTION, LINE)])}", *rules]


def _members(schema: Mapping[str, Any]) -> tuple[dict[str, Any], set[str], bool]:
    """Properties, those that have to be there, and whether there may be others that nothing is said of."""
    properties, required = dict[str, Any](), set[str]()
    is_open = schema.get("additionalProperties", False) is not False
    is_open |= any(word in schema for word in ("anyOf", "oneOf", "patternProperties"))
    parts: list[Any] = [schema, *(each for each in several(schema.get("allOf")) if isinstance(each, dict))]
    for part in parts:
        given = cast("dict[str, Any]", part)
        known = given.get("properties")
        properties |= cast("dict[str, Any]", known) if isinstance(known, dict) else {}
        required |= {each for each in several(given.get("required")) if isinstance(each, str)}
    return properties, required, is_open or not required <= properties.keys()


def _choices(kind: Any) -> list[str]:
    """The texts of which a value is one, if that is what its schema says."""
    if not isinstance(kind, dict):
        return []
    given = cast("dict[str, Any]", kind)
    values = values_of(given)
    if not values:
        either = [_choices(each) for each in several(given.get("anyOf")) if each != {"type": "null"}]
        return [text for each in either for text in each] if either and all(either) else []
    return cast("list[str]", values) if all(isinstance(each, str) for each in values) else []


def _plain(schema: Any) -> dict[str, Any]:
    """A schema without references and what is for people."""
    num_nodes = 0

    def plain(value: Any, depth: int) -> Any:
        nonlocal num_nodes
        num_nodes += 1
        if isinstance(value, list):
            return [plain(each, depth) for each in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        given = cast("dict[str, Any]", value)
        reference = given.get("$ref")
        if isinstance(reference, str):
            if not reference.startswith("#") or depth == MAX_REFERENCES or num_nodes > MAX_NODES:
                return {}
            return plain(at_path(schema, reference.strip("#/").split("/") if reference.strip("#/") else ()), depth + 1)
        found = dict[str, Any]()
        for name, inner in given.items():
            if name == "properties" and isinstance(inner, dict):  # whose names say nothing
                found[name] = {key: plain(each, depth) for key, each in cast("dict[str, Any]", inner).items()}
            elif name in ("enum", "const"):
                found[name] = inner
            elif name not in ANNOTATIONS:
                found[name] = plain(inner, depth)
        return found

    whole = plain(schema, 0)
    return cast("dict[str, Any]", whole) if isinstance(whole, dict) else {}


def _rule(schema: Any) -> str:
    given = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}
    how = {"whitespace_pattern": BLANKS, "lenient": True, "coerce_one_of": True}
    return f"%json {json.dumps({**given, 'x-guidance': how}, ensure_ascii=False)}"


def _named(name: str) -> str:
    """What is written between two marks must be none, and be read as it is."""
    if not name or name != name.strip() or any(each in name for each in ">\n\r"):
        raise InvalidRequest([("grammar", f"{name!r:.50} is no name that this model's template has room for")])
    return name


def _text(*parts: str) -> str:
    """As a literal."""
    return json.dumps("".join(parts), ensure_ascii=False).replace("\x7f", "\\u007f")
