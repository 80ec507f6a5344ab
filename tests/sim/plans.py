"""What a seed decides before the start: the workload, the engine, and which faults there are."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from forerun.actors.tree import EngineParams
from forerun.core.speculation import DRAFTERS, DrafterName, SpeculationParams
from forerun.core.vocabulary import SamplingParams
from forerun.kernels.model.memory import MemoryParams

from tests.sim.fakes import NUM_TOKEN_IDS, reference


@dataclass
class RequestPlan:
    prompt: list[int]
    is_text: bool
    max_tokens: int
    sampling: SamplingParams
    arrival: float
    timeout: float | None  # its deadline
    cancel_at_message: float  # counted over all actors; inf: never
    leave_after: float  # deltas
    pause: float  # seconds between two reads, at most
    stall_at: float  # deltas; then the reader sleeps for long, once
    save_at: float  # deltas; then it is put into a file, from which another goes on once this one has ended


@dataclass
class Plan:
    """All that a seed decides before the start."""

    requests: list[RequestPlan]
    params: EngineParams
    crashes: dict[tuple[str, int], str]  # (actor, its n-th message) -> "before", "within", "after" or "stuck"
    storm: str | None  # an actor that dies at every third message
    device_errors: float  # chance a call
    device_hangs: float
    spoilt_drafts: float
    late_drafts: float
    drain_at: float
    close_at: float
    is_cancelled: bool  # at close_at, from outside, and not closed
    latency: float  # seconds of a call to the device, on average
    is_like_steps: bool  # what chunks compute, so that answers are beginnings of others' prompts
    is_elsewhere: bool  # the device goes on while whoever asked it does other things
    inline_seconds: float  # up to so many nothing waits for the device, and actors that have nothing to do are asked at once
    has_raising_observer: bool

    @property
    def loses_actors(self) -> bool:
        return bool(self.crashes or self.storm or self.device_errors or self.device_hangs or self.late_drafts)


def make_plan(rng: random.Random) -> Plan:
    has = {
        fault: rng.random() < 0.3
        for fault in ("cancel", "deadline", "crash", "device", "hang", "spoilt", "late", "drain", "close", "stall", "save")
    }
    requests: list[RequestPlan] = []
    is_like_steps = rng.random() < 0.5
    is_long = rng.random() < 0.2
    for _ in range(rng.randint(2, 9)):
        length = rng.choice([1, 3, 20, 63, 64, 65, 130]) if not is_long else rng.randint(200, 900)
        unit = [rng.randrange(NUM_TOKEN_IDS) for _ in range(rng.choice([1, 5, length]))]
        former: list[int] = []
        if requests and rng.random() < 0.5:
            other = rng.choice(requests)
            answer = reference(other.prompt, other.max_tokens, other.sampling, is_like_steps=is_like_steps)
            former = [*other.prompt, *(answer if rng.random() < 0.5 else ())]
        requests.append(
            RequestPlan(
                prompt=(former[: rng.choice([20, 64, 130, 2000])] + unit * length)[: max(length, len(former))],
                is_text=rng.random() < 0.3,
                max_tokens=rng.randint(1, 40),
                sampling=SamplingParams(rng.choice([0.0, 0.0, 0.3]), seed=rng.randrange(1000)),
                arrival=rng.choice([0.0, rng.random() * 0.05, rng.random() * 0.3, 100.0 if rng.random() < 0.4 else 0.0]),
                timeout=rng.random() * rng.choice([0.2, 5.0]) if has["deadline"] and rng.random() < 0.5 else None,
                cancel_at_message=rng.randrange(300) if has["cancel"] and rng.random() < 0.5 else math.inf,
                leave_after=rng.randrange(4) if has["cancel"] and rng.random() < 0.2 else math.inf,
                pause=rng.choice([0.0, 0.0, 0.01]),
                stall_at=rng.randint(1, 5) if has["stall"] and rng.random() < 0.4 else math.inf,
                save_at=rng.randint(1, 5) if has["save"] and rng.random() < 0.4 else math.inf,
            )
        )
    others = rng.choice([0.0, 0.25, 0.25])  # the head drafts behind verifies only where it is alone, or clearly the best
    types: tuple[DrafterName, ...] = tuple(name for name in DRAFTERS if rng.random() < (0.8 if name == "draft-mtp" else others))
    names = ("tokenizer", "memory manager", "target decoder", "MTP drafter", *(f"{name} drafter" for name in types if name != "draft-mtp"))
    how = ("before", "within", "after", "stuck")
    crashes = {(rng.choice(names), rng.randint(1, 60)): rng.choice(how) for _ in range(rng.randint(1, 6) if has["crash"] else 0)}
    num_slots = rng.randint(1, 4)
    params = EngineParams(
        SpeculationParams(
            types,
            draft_n_max=rng.randint(1, 4),
            ngram_simple_size_n=rng.randint(1, 3),
            ngram_simple_size_m=rng.randint(1, 8),
            ngram_map_k_size_n=2,
            ngram_map_k4v_size_n=1,
            ngram_mod_n_match=2,
            ngram_mod_n_min=1,
            ngram_suffix_shared=rng.random() < 0.5,
            choose=rng.choice(["rate", "first"]),
        ),
        MemoryParams(
            num_slots, num_pages=rng.choice([3, 4, 8, 20]) if not is_long else 50, prefix_bytes=rng.choice([0, 60, 10_000]), store="log"
        ),
        queue_size=rng.choice([0, 2, 100, 100, 100]),
        overlap=rng.random() < 0.8,
        preempt_after_seconds=rng.choice([math.inf, 0.0, 0.02, 0.2]),
        mailbox_capacity=rng.choice([1, 4, 2048, 2048]),
        outbox_capacity=rng.choice([1, 2, 16]),
        merged_tokens=rng.choice([1, 6, 256]),
    )
    storm = rng.choice(names) if has["crash"] and rng.random() < 0.2 else None
    return Plan(
        requests,
        params,
        crashes,
        storm=storm,
        device_errors=0.01 if has["device"] else 0.0,
        device_hangs=rng.choice([0.005, 0.3]) if has["hang"] else 0.0,
        spoilt_drafts=0.3 if has["spoilt"] else 0.0,
        late_drafts=0.02 if has["late"] else 0.0,
        drain_at=rng.random() * 0.2 if has["drain"] else math.inf,
        close_at=rng.random() * 0.3 if has["close"] and rng.random() < 0.7 else math.inf,
        is_cancelled=rng.random() < 0.5,
        # With a slow device a storm of deaths never exceeds what a minute allows, nor does anything get done.
        latency=rng.choice([0.002, 0.002, 0.002, 1.0]) if storm is None else 0.002,
        has_raising_observer=rng.random() < 0.2,
        is_like_steps=is_like_steps,
        inline_seconds=math.inf if (kind := rng.random()) < 0.3 else 0.008 if kind < 0.5 else -1.0,
        is_elsewhere=random.Random(rng.getstate()[1][0]).random() < 0.3,  # draws nothing: what else a seed decides stays
    )
