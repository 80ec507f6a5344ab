"""Deliberate bugs, one or more for every kind of fault, that the simulator must find within 200 seeds.

    python -m tests.sim.mutants        # all of them, in copies of the tree: bug, first seed that finds it

Each is a piece of the code as it stands and what to put in its place; one that no longer fits is an error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "actors", "kernels", "tools")
NUM_SEEDS = 200
#: Several times what 200 seeds take.
TIMEOUT_SECONDS = 90


@dataclass(frozen=True)
class Mutant:
    fault: str
    bug: str
    file: str
    code: str
    instead: str


MUTANTS = [
    Mutant("cancellation", "a lease is not given back", "actors/sequence.py",
           "await self._to.memory.ask(Release(self._flow, self._held))", "pass"),
    Mutant("pre-emption", "revoked memory is another's before its owner lets go", "kernels/model/memory.py",
           "        self._revoked.add(lease)\n", "        self.release(lease)\n"),
    Mutant("cancellation", "a drafter is not told to forget", "actors/drafting.py",
           "await drafter.mailbox.ask(Forget(flow, lease, is_over))", "pass"),
    Mutant("deadline", "a deadline ends a request without saying so", "actors/engine.py",
           "if anyio.current_time() >= job.scope.deadline:", "if False:"),
    Mutant("stalled reader", "a reader that took a delta does not wake the sequence", "core/outbox.py",
           "        self._room.set()\n        if self._trace", "        if self._trace"),
    Mutant("stalled reader", "merging keeps the later delta alone", "core/vocabulary.py",
           "Delta(self.text + later.text, self.token_ids + later.token_ids, source, self.logprobs + later.logprobs)", "later"),
    Mutant("full mailbox", "who waits for room is not woken", "core/channel.py",
           "        self._waiting.clear()\n        self._call_senders()\n        if", "        self._waiting.clear()\n        if"),
    Mutant("full mailbox", "a full mailbox takes one more", "core/channel.py",
           "if len(self._waiting) >= self.capacity:\n            policy", "if len(self._waiting) > self.capacity:\n            policy"),
    Mutant("full mailbox", "a message arrives between looking and waiting, and wakes nobody", "core/channel.py",
           "                self._arrived = self._new_event()\n                await self._arrived.wait()\n",
           "                event = self._new_event()\n                await checkpoint()\n                self._arrived = event\n                await event.wait()\n"),  # noqa: E501
    Mutant("full mailbox", "a message that an idle actor handles at once overtakes those that wait", "core/channel.py",
           "if self._at_once is not None and not self._waiting and", "if self._at_once is not None and"),
    Mutant("actor crash", "an actor lives on after what it did at once has failed", "core/channel.py",
           "        if self._struck is not None:\n            error, self._struck = self._struck, None\n            raise error\n",
           "        self._struck = None\n"),
    Mutant("full mailbox", "what was told with a question that a newer one displaced counts as told", "actors/drafting.py",
           "                drafter.num_told = before\n", "                drafter.num_told = after\n"),
    Mutant("actor crash", "asks that a dead actor had are not ended", "core/channel.py",
           "        for reply, envelope in list(self._unanswered.items()):\n            reply.fail(error)\n"
           "            envelope.finish(type(error).__name__)\n", ""),
    Mutant("device hang", "a draft that a dead actor had promised is waited for", "core/channel.py",
           "            reply.fail(error)\n            envelope.finish", "            envelope.fail(error)\n            envelope.finish"),
    Mutant("actor crash", "memory keeps the leases of its former life", "kernels/model/memory.py",
           "        self._leases.clear()\n", ""),
    Mutant("actor crash", "a replay starts where the lost memory had been", "core/protocol.py",
           "        self._num_computed = num_cached\n", "        self._num_computed = max(self._num_computed, num_cached)\n"),
    Mutant("actor crash", "a replay goes by chunks where steps were", "core/protocol.py",
           "return self.request.prompt_ids[self._num_computed : following[0]] if following else ()",
           "return (*self.request.prompt_ids, *self.output[:-1])[self._num_computed : following[0] if following[1:] else None] if following else ()"),  # noqa: E501
    Mutant("actor crash", "a drafter that dies too often is restarted for ever", "core/supervisor.py",
           "            if is_exhausted:\n", "            if False:\n"),
    Mutant("stuck actor", "the watchdog looks away", "core/supervisor.py",
           "if seen[actor][1] * WATCHDOG_SECONDS > actor.allowed_seconds:", "if seen[actor][1] * WATCHDOG_SECONDS > 1e9:"),
    Mutant("device error", "the dead target's memory goes on being used", "actors/tree.py", ", reset=pool.reset)", ")"),
    Mutant("device hang", "closing waits for work that never ends", "core/supervisor.py",
           "                for actor in life.actors.values():  # whatever ends this life, nobody waits for its work\n"
           "                    actor.leave_work()\n", ""),
    Mutant("garbage drafts", "a draft may be longer than was asked for", "actors/drafting.py",
           "Plan((found[0].cut(question.room),), 0.0)", "Plan((found[0],), 0.0)"),
    Mutant("garbage drafts", "drafts stand without comparison", "core/protocol.py",
           " and drafts[num_accepted] == verdict.choices[num_accepted]", ""),
    Mutant("garbage drafts", "what was rejected is not rolled back", "core/protocol.py",
           "self._num_computed += num_accepted + 1", "self._num_computed += len(drafts) + 1"),
    Mutant("late drafts", "a drafter counts a token twice after a draft that came too late", "actors/mtp_drafter.py",
           "behind += tokens[end - position :]", "behind += tokens"),
    Mutant("rollback", "memory goes on from its newest row, whatever position was asked for", "tests/sim/fakes.py",
           "        state = self.states[position - self.first]\n", "        state = self.states[-1]\n"),
    Mutant("hidden rows", "rows are overwritten before the drafter reads them", "tests/sim/fakes.py",
           "HiddenRows(2, 2 * CHUNK + max_rows + 1)", "HiddenRows(2, max_rows + 2)"),
    Mutant("prefixes", "a page that others hold is not copied", "kernels/model/memory.py",
           "arena.write(table[i], arena.read(block.place) if isinstance(block.place, int) else block.place)", "pass"),
    Mutant("prefixes", "a page is shared without counting", "kernels/model/memory.py",
           "        self._arena.share(list(shared.values()))\n", ""),
    Mutant("prefixes", "a block that was moved out comes back empty", "kernels/model/prefix.py",
           "            block.place = self._arena.read(page)\n",
           "            block.place = tuple(part * 0 for part in self._arena.read(page))\n"),
    Mutant("prefixes", "a page is written before what was in it has been moved out", "kernels/model/memory.py",
           "            prefixes.finish_moves()\n            arena.clear(used)\n",
           "            arena.clear(used)\n            prefixes.finish_moves()\n"),
    Mutant("prefixes", "who brings a block back does not hold its page", "kernels/model/prefix.py",
           "            self._arena.share([page])\n            block.place", "            block.place"),
    Mutant("saving", "a request is saved with the rows of its draft", "tests/sim/fakes.py",
           "        fake.seek(position)\n", ""),
    Mutant("saving", "a lost save order is forgotten", "actors/sequence.py",
           "            order = self._saves[0]\n", "            order = self._saves.pop(0)\n"),
    Mutant("prefixes", "answers are beginnings where steps are not what chunks are", "tests/sim/fakes.py",
           "        return FakeMaker(self.is_like_steps)\n", "        return FakeMaker(True)\n"),
    Mutant("prefixes", "a prefix is found by its length", "kernels/model/prefix.py",
           "(POSITION_BYTES, \"big\") + chain.digest()\n", "(POSITION_BYTES, \"big\")\n"),
    Mutant("prefixes", "all of a prompt is taken from memory", "kernels/model/prefix.py",
           "[end for end in where if end < len(tokens)]", "list(where)"),
    Mutant("drain", "the second who waits for the end is forgotten", "actors/engine.py",
           "            if self._idle.is_set():\n                self._idle = anyio.Event()\n", "            self._idle = anyio.Event()\n"),
    Mutant("drain", "a draining engine begins new requests", "actors/engine.py",
           "        if self._is_draining:\n", "        if False:\n"),
    Mutant("close", "a closed mailbox leaves its asks waiting", "core/channel.py",
           "            self._fail_all(self._closed)\n", ""),
    Mutant("verifies that are begun early", "one outlives a freeze, which drops its rows", "actors/target_decoder.py",
           "            self._drop(message.lease)  # memory goes back to the position, without rows after it\n", ""),
    Mutant("verifies that are begun early", "rows that nobody asked for are taken for the next one's", "actors/target_decoder.py",
           "        if num_rows > num_asked:\n", "        if num_asked and num_rows > num_asked:\n"),
    Mutant("verifies that are begun early", "memory does not hear of it", "actors/target_decoder.py",
           "            self._target.settle(rows.memory, position, num_rows)\n", ""),
]  # fmt: skip


def find(mutant: Mutant) -> str | None:
    """The first seed that finds the bug, or that a seed came to a stand still; None when it is missed."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "forerun"
        ignore = shutil.ignore_patterns("__pycache__", "demo")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, package / name, ignore=ignore)
        shutil.copy(ROOT / "__init__.py", package)
        shutil.copytree(ROOT / "tests" / "sim", Path(folder) / "tests" / "sim", ignore=ignore)
        path = (Path(folder) if mutant.file.startswith("tests") else package) / mutant.file
        text = path.read_text()
        if text.count(mutant.code) != 1:
            raise SystemExit(f"{mutant.bug}: stands {text.count(mutant.code)} times in {mutant.file}: {mutant.code}")
        path.write_text(text.replace(mutant.code, mutant.instead))
        command = [sys.executable, "-m", "tests.sim.simulator", "--first", "0", str(NUM_SEEDS)]
        try:
            done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": folder}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return "hangs, in real time too"
    lines = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
    return lines[0].removesuffix(" failed") if lines else None


def main() -> None:
    """All of them, or those of which a fault or bug has the first argument in it."""
    missed = 0
    for mutant in MUTANTS:
        if len(sys.argv) > 1 and sys.argv[1] not in mutant.fault + mutant.bug:
            continue
        found = find(mutant)
        missed += found is None
        print(f"{mutant.fault:16} {mutant.bug:80} {found or 'MISSED'}", flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
