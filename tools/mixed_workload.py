"""Measures drafters against each other on texts of several kinds: all ways open at once, each request asked of each in turn, in another
order every time, so that a machine's moods hit all alike.

python -m forerun.tools.mixed_workload PROMPTS.json [--runs 16]      # PROMPTS: [{"text": ...}, ...], at least 12

For each way of drafting and each part: tokens per second relative to the first way, by the lower quartile of the seconds each request took
(other programs only ever make it slower) and by the median, and tokens a verify. Of several drafters at once also relative to the best
alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio

from .. import DRAFTERS, Engine, Model, Options, Prompt, SpeculationOptions, load_model, open_engine

#: Ways of drafting: spec types, and what else is said of speculation.
WAYS: dict[str, tuple[str, SpeculationOptions]] = {
    "none": ("none", {}),
    **{name: (name, SpeculationOptions()) for name in DRAFTERS},
    "precedence": ("draft-mtp,ngram-simple", {"choose": "first"}),
    "chooser": ("draft-mtp,ngram-suffix", {}),
}
SEVERAL = ("precedence", "chooser")


def parts(texts: list[str]) -> dict[str, list[tuple[Prompt, Options]]]:
    """Requests by kind."""
    rng = random.Random(0)
    again = [f"{text}\n\n# The same again:\n{text}\n\n# The same again:\n{text[: len(text) // 4]}" for text in texts[4:7]]
    return {
        "completion": [(text, {"temperature": 0.0}) for text in texts[:4]],
        "the same again": [(text, {"temperature": 0.0}) for text in again],
        "chat": [([{"role": "user", "content": text[:300]}], {"temperature": 0.7, "seed": 1}) for text in texts[7:11]],
        "random text": [([rng.randrange(200, 4000) for _ in range(60)], {"temperature": 1.5, "seed": i}) for i in range(4)],
    }


class Measured:
    """Of one way and part: what decoding each request took, in seconds, in all runs, and rounds and tokens of all."""

    def __init__(self) -> None:
        self.seconds, self.num_rounds, self.num_tokens = defaultdict[int, list[float]](list), 0, 0

    def quantile(self, share: float) -> float:
        """Seconds of all requests, of each that share of the way from the fastest run to the slowest."""
        return sum(sorted(runs)[int(share * len(runs))] for runs in self.seconds.values())


async def measure(model: Model, ways: list[str], texts: list[str], num_runs: int, num_tokens: int) -> dict[str, dict[str, Measured]]:
    """Part -> way -> what was measured; of the part "all", everything. ValueError when a text differs."""
    found = {part: {way: Measured() for way in ways} for part in (*parts(texts), "all")}
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for way in ways:
            spec_type, options = WAYS[way]
            engines[way] = await stack.enter_async_context(open_engine(model, spec_type=spec_type, prefix_bytes=0, **options))
            await engines[way].complete(texts[11], max_tokens=num_tokens)
        requests = [(part, *request) for part, several in parts(texts).items() for request in several]
        for _ in range(num_runs):
            for number, (part, prompt, how) in enumerate(requests):
                how: Options = {**how, "max_tokens": num_tokens, "ignore_eos": True}
                heard = set[tuple[int, ...]]()
                for way in random.sample(ways, len(ways)):
                    result = await engines[way].complete(prompt, **how)
                    heard.add(result.token_ids)
                    for one in (found[part][way], found["all"][way]):
                        one.seconds[number].append(result.timings.decode_seconds)
                        one.num_rounds += result.speculation.num_rounds
                        one.num_tokens += len(result.token_ids)
                if len(heard) > 1:
                    raise ValueError(f"{part}: the texts differ")
    return found


def seconds(measured: dict[str, Measured], way: str) -> float:
    """A way's, by which it is compared."""
    return measured[way].quantile(0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    texts = [case["text"] for case in json.loads(args.prompts.read_text())]
    found = anyio.run(measure, load_model("demo"), args.ways, texts, args.runs, args.tokens)
    first: str = args.ways[0]
    alone: list[str] = [way for way in args.ways if way not in SEVERAL]
    print(f"| to {first} | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for way in args.ways:
        cells: list[str] = []
        for measured in found.values():
            low, median = (measured[first].quantile(share) / measured[way].quantile(share) for share in (0.25, 0.5))
            cells.append(f"{low:.2f} ({median:.2f}), {measured[way].num_tokens / max(1, measured[way].num_rounds):.1f} a verify")
        print(f"| {way} | " + " | ".join(cells) + " |")
    for way in args.ways:
        if way in SEVERAL and alone:
            best = {part: min(alone, key=partial(seconds, found[part])) for part in found}
            cells = [f"{seconds(found[part], one) / seconds(found[part], way):.2f} of {one}" for part, one in best.items()]
            print(f"| {way}, of the best alone | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
