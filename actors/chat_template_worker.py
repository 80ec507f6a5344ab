"""Renders chat templates in a process of its own: for each line of JSON on stdin, the text or an error as a line of JSON on stdout.

Run by path, not imported: it needs nothing of Forerun's. The sandbox stops a template from reaching into Python; the
limits stop `{{ 'a' * 10**10 }}` and endless loops, which no sandbox does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 * 2**20
CPU_SECONDS = 5  # a chat
OUT_OF_MEMORY = 3
OUTPUT_CHARACTERS = 16_000_000


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: what an assistant says, which training wants to know and nobody here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@cache
def compiled(template: str) -> jinja2.Template:
    """The same settings as transformers' `utils/chat_template_utils.py`, which templates are written for."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _tojson
    functions: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment.from_string(template)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        job = json.loads(line)
        try:
            text = compiled(job["template"]).render(**job["variables"])
            answer = {"text": text} if len(text) <= OUTPUT_CHARACTERS else {"error": f"made more than {OUTPUT_CHARACTERS} characters"}
        except MemoryError:
            raise
        except Exception as error:  # whatever a template manages to raise is the template's fault
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
