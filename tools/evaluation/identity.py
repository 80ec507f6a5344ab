"""Whether speculation changes a token: every prompt at every temperature, without and with each way to draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ... import Engine, Model, Options, Prompt, open_engine


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt at one temperature: how many of the tokens without speculation the same ones had, `num_same` of `num_tokens`."""

    prompt: int
    temperature: float
    spec_type: str
    num_tokens: int
    num_same: int
    mean_acceptance_length: float

    @property
    def is_identical(self) -> bool:
        return self.num_same == self.num_tokens


async def identity(
    model: Model,
    prompts: Sequence[Prompt],
    spec_types: Sequence[str],
    temperatures: Sequence[float],
    num_tokens: int,
    seen: Callable[[], None],
) -> list[Comparison]:
    """`seen` is called after every answer. The drafted ones have seed and prompt in common with the plain ones, and nothing else."""
    plain: dict[tuple[int, float], tuple[int, ...]] = {}
    found: list[Comparison] = []

    async def answers(engine: Engine, spec_type: str) -> None:
        for i, prompt in enumerate(prompts):
            for temperature in temperatures:
                options: Options = {"max_tokens": num_tokens, "temperature": temperature, "seed": i, "ignore_eos": True}
                result = await engine.complete(prompt, **options)
                if spec_type == "none":
                    plain[i, temperature] = result.token_ids
                else:
                    pairs = zip(plain[i, temperature], result.token_ids, strict=False)
                    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    most = max(len(plain[i, temperature]), len(result.token_ids))
                    found.append(Comparison(i, temperature, spec_type, most, num_same, result.speculation.mean_acceptance_length))
                seen()

    for spec_type in ("none", *spec_types):
        async with open_engine(model, spec_type=spec_type, num_slots=1, prefix_bytes=0) as engine:
            await answers(engine, spec_type)
    return found


def table(found: Sequence[Comparison]) -> str:
    """For people, in Markdown."""
    lines = ["| speculation | temperature | identical | first difference | tokens a round |", "|---|---|---|---|---|"]
    for spec_type, temperature in dict.fromkeys((each.spec_type, each.temperature) for each in found):
        some = [each for each in found if (each.spec_type, each.temperature) == (spec_type, temperature)]
        differing = [each for each in some if not each.is_identical]
        first = f"prompt {differing[0].prompt}, token {differing[0].num_same}" if differing else "none"
        mean = sum(each.mean_acceptance_length for each in some) / len(some)
        lines.append(f"| {spec_type} | {temperature} | {len(some) - len(differing)} of {len(some)} | {first} | {mean:.2f} |")
    return "\n".join(lines)
