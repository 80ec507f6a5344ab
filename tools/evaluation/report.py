"""Answers to tasks as a page of HTML, with nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .tasks import Answer, Task, prompt_text, score

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
.right { color: #17692f } .wrong { color: #a3231f } svg text { font: 12px system-ui, sans-serif }
"""
BAR_WIDTH, BAR_HEIGHT = 360, 18


def page(title: str, about: Mapping[str, object], tasks: Sequence[Task], answers: Sequence[Answer]) -> str:
    """The whole page."""
    found = score(answers)
    summary = [
        ("right", f"{found.accuracy:.1%}, in 95 of 100 cases {found.low:.1%} to {found.high:.1%}"),
        ("answers", f"{found.num_answers} to {found.num_tasks} tasks"),
        ("tokens an answer", f"{sum(answer.num_tokens for answer in answers) / len(answers):.0f}"),
        *((name, str(value)) for name, value in about.items()),
    ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary)
    parts = [_task(task, [answer for answer in answers if answer.id == task.id]) for task in tasks]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><table>{rows}</table><h2>Share of right answers, by task</h2>{_bars(tasks, answers)}"
        f"<h2>Tasks</h2>{''.join(parts)}</html>\n"
    )


def _bars(tasks: Sequence[Task], answers: Sequence[Answer]) -> str:
    lines: list[str] = []
    for i, task in enumerate(tasks):
        own = [answer.problem is None for answer in answers if answer.id == task.id]
        share, y = sum(own) / len(own) if own else 0.0, i * (BAR_HEIGHT + 4)
        lines.append(
            f'<text x="0" y="{y + 13}">{escape(task.id[:24])}</text>'
            f'<rect x="160" y="{y}" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" fill="#e6e6e6"/>'
            f'<rect x="160" y="{y}" width="{BAR_WIDTH * share:.1f}" height="{BAR_HEIGHT}" fill="#3f8f58"/>'
            f'<text x="{168 + BAR_WIDTH}" y="{y + 13}">{sum(own)} of {len(own)}</text>'
        )
    return f'<svg width="{BAR_WIDTH + 260}" height="{len(tasks) * (BAR_HEIGHT + 4)}" role="img">{"".join(lines)}</svg>'


def _task(task: Task, answers: Sequence[Answer]) -> str:
    parts = [f"<h3>{escape(task.id)}</h3><details><summary>prompt</summary><pre>{escape(prompt_text(task.prompt))}</pre></details>"]
    for answer in answers:
        verdict = "right" if answer.problem is None else "wrong"
        about = f"run {answer.run}: {verdict}" + (f", {answer.problem}" if answer.problem is not None else "")
        parts.append(
            f'<details><summary class="{verdict}">{escape(about)} ({answer.num_tokens} tokens, {answer.seconds:.1f} s)</summary>'
            f"<pre>{escape(answer.text)}</pre></details>"
        )
    return "".join(parts)
