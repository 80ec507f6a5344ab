"""The supervision tree: which actors an engine has, who hears from whom, and who dies with whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..core.actor import Actor, Executor, InPlace, Threads
from ..core.channel import Mailbox, MailboxStatistics
from ..core.errors import ForerunError
from ..core.outbox import CAPACITY, MERGED_TOKENS
from ..core.speculation import DrafterName, SpeculationParams
from ..core.supervisor import ChildSpec, Group, Supervisor, WhenExhausted
from ..core.trace import Trace
from ..kernels.model.memory import MemoryParams, SequencePool
from ..kernels.model.saved import PrefixFolder
from .experience import Experience
from .lookup.family import family
from .memory_manager import MemoryManager
from .model import Model
from .mtp_drafter import HeadDrafts, MtpDrafter
from .ngram_drafter import NgramDrafter
from .sequence import Blame, Surroundings
from .target_decoder import TargetDecoder
from .tokenizer import TokenizerActor

#: More than every sequence of a full engine can have outstanding at one actor (at most 1024 slots, two messages each). The tokenizer
#: hears from those who will queue for memory as well.
MAILBOX = 2048
#: Restarts a group is allowed, and within how many seconds. More than a sequence's MAX_FRUITLESS_REPLAYS, so that a request
#: which kills the target whenever it is worked on is found out before the engine gives up.
RESTARTS, PERIOD_SECONDS = 5, 60.0


@dataclass(frozen=True, slots=True)
class ActorStatistics:
    """One actor: its mailbox, how often it was restarted, whether it was switched off for failing too often."""

    mailbox: MailboxStatistics
    num_restarts: int
    is_switched_off: bool


@dataclass(frozen=True, slots=True)
class EngineParams:
    """What open_engine was given; what it sets no value for is how simulations get in. `instrument` sees every actor as it is made."""

    speculation: SpeculationParams
    memory: MemoryParams
    queue_size: int
    overlap: bool
    preempt_after_seconds: float = math.inf
    queue_tokens: float = math.inf
    folder: PrefixFolder | None = None
    executor: Executor = field(default_factory=Threads)
    instrument: Callable[[Actor], None] = lambda actor: None
    trace: Trace | None = None
    mailbox_capacity: int = MAILBOX
    outbox_capacity: int = CAPACITY
    merged_tokens: int = MERGED_TOKENS


class SupervisionTree:
    """The actors of an engine, their mailboxes, and the memory they share. `die` hears who failed beyond repair."""

    def __init__(self, model: Model, params: EngineParams, trace: Trace, die: Callable[[str, Exception], None]) -> None:
        self._model, self._params, self._trace = model, params, trace
        self.pool = SequencePool(model.memory(), params.memory)
        self.mailboxes: dict[str, Mailbox] = {}
        self.memory: MemoryManager | None = None  # in its present life
        self.supervisor = Supervisor(self._groups(), trace, die)

    def _groups(self) -> list[Group]:
        """Target and memory live and die together: what one knows of memory is worth nothing without the other."""
        model, params, pool, trace = self._model, self._params, self.pool, self._trace

        def child(name: str, make: Callable[[Mailbox], Actor]) -> ChildSpec:
            capacity = params.mailbox_capacity + (params.queue_size if name == "tokenizer" else 0)
            mailbox = self.mailboxes[name] = Mailbox(name, capacity, trace)

            def begin() -> Actor:
                actor = make(mailbox)
                params.instrument(actor)
                return actor

            return ChildSpec(mailbox, begin)

        executor = params.executor if params.overlap else InPlace()

        def memory_manager(mailbox: Mailbox) -> Actor:
            limits = params.queue_size, params.queue_tokens, params.preempt_after_seconds
            self.memory = MemoryManager(mailbox, executor, pool, model.fingerprint, params.folder, *limits, trace)
            return self.memory

        tokenizer = child("tokenizer", lambda mailbox: TokenizerActor(mailbox, executor, model.vocabulary))
        memory = child("memory manager", memory_manager)
        speculation = params.speculation
        types = speculation.types

        def target_decoder(mailbox: Mailbox) -> Actor:
            # Each life has graphs of its own: work that was left behind may still run in the former one's.
            drafts = HeadDrafts(model.draft_head(), speculation) if "draft-mtp" in types else None
            return TargetDecoder(mailbox, executor, model.target(), pool, trace, drafts)

        target = child("target decoder", target_decoder)
        drafters: dict[DrafterName, ChildSpec] = {}
        for name in types:
            if name == "draft-mtp":
                drafters[name] = child("MTP drafter", lambda mailbox: MtpDrafter(mailbox, executor, model.draft_head(), pool, speculation))
            else:
                make = partial(family, name, speculation, model.num_token_ids)
                drafters[name] = child(f"{name} drafter", lambda mailbox, make=make: NgramDrafter(mailbox, executor, make()))
        mailboxes: dict[DrafterName, Mailbox] = {name: spec.mailbox for name, spec in drafters.items()}
        keeps_prefixes = params.memory.prefix_bytes > 0
        keeps_answers = keeps_prefixes and pool.steps_equal_chunks
        self.surroundings = Surroundings(
            memory.mailbox, target.mailbox, mailboxes, speculation, Experience(), params.overlap, keeps_prefixes, keeps_answers,
            pool.max_together, Blame(lambda count: self.supervisor.forgive("target decoder", count)), trace,
        )  # fmt: skip
        limits = RESTARTS, PERIOD_SECONDS
        return [
            Group((tokenizer,), *limits, WhenExhausted.ESCALATE),
            Group((memory, target), *limits, WhenExhausted.ESCALATE, reset=pool.reset),
            *(Group((drafter,), *limits, WhenExhausted.SWITCH_OFF) for drafter in drafters.values()),
        ]

    def close(self, why: ForerunError) -> None:
        """Nobody is heard any more, and all leases have ended."""
        for mailbox in self.mailboxes.values():
            mailbox.close(why)
        self.pool.end()

    def statistics(self) -> dict[str, ActorStatistics]:
        """Of every actor, by name."""
        restarts, switched_off = self.supervisor.num_restarts, self.supervisor.switched_off
        return {
            name: ActorStatistics(mailbox.statistics(), restarts[name], name in switched_off) for name, mailbox in self.mailboxes.items()
        }
