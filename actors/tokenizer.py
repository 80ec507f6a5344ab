"""The tokenizer actor: prompts to token ids, and the incremental way back.

User text never yields special tokens; only a chat template's own text may. Templates come from model files and are
rendered by chat_template.py in a process of its own.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable
from typing import Any, cast

import anyio
from tokenizers import Tokenizer

from ..core.actor import Actor, Executor
from ..core.channel import RETRY_AFTER_SECONDS, Envelope, Mailbox
from ..core.embeddings import EmbeddingRows, Encoded, Part, lay_out
from ..core.errors import ActorStuck, ForerunError, InternalBug, InvalidRequest, Overloaded, RequestFailed
from ..core.messages import Encode
from ..core.vocabulary import CheckedPrompt
from .chat_template import Renderers
from .reply import THINK

logger = logging.getLogger("forerun")

#: encoding speed of byte-level BPE on one core, characters a second, rounded down
CHARACTERS_PER_SECOND = 1e6
#: of embedding rows, likewise
BYTES_PER_SECOND = 1e8
#: prompts taken out of the mailbox at a time
NUM_AT_ONCE = 64
#: a text of more characters is long: encoding takes some 250 bytes a character, so few are encoded at a time, and few may wait for that
LONG, NUM_LONG, MAX_LONG = 100_000, 2, 16
#: chats rendered at a time, each in a process of its own
NUM_RENDERERS = 4


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where Latin-1 has a visible one, else the next
    code point from 256 (GPT-2, `encoder.py`)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


class Vocabulary:
    """Text to ids and back through the tokenizers package, as pure functions. Byte-level BPE, as all of the family. `tokenizer` is
    told special tokens by its added tokens, `plain` is the same and never finds any in text."""

    def __init__(self, tokenizer: Tokenizer, plain: Tokenizer, chat_template: str | None) -> None:
        self._tokenizer: Any = tokenizer
        self._plain: Any = plain
        self._plain.encode_special_tokens = True
        self._specials = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = dict.fromkeys(self._specials, b"")
        self.chat_template = chat_template

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> list[int]:
        return list(self._specials)

    @property
    def specials(self) -> list[str]:
        return list(self._specials.values())

    def encode(self, text: str) -> tuple[int, ...]:
        """User text: what looks like a special token is encoded as plain text."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_rendered(self, parts: list[tuple[bool, str]]) -> tuple[int, ...]:
        """A rendered chat, as chat_template.render gives it."""
        ids: list[int] = []
        for has_specials, text in parts:
            ids += (self._tokenizer if has_specials else self._plain).encode(text, add_special_tokens=False).ids
        return tuple(ids)

    def name(self, token: int) -> str:
        """What a token is called in the vocabulary; empty beyond it."""
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for special tokens and ids beyond the vocabulary."""
        if token not in self._bytes:
            name = self.name(token)
            known = all(character in BYTE_OF for character in name)
            self._bytes[token] = bytes(BYTE_OF[character] for character in name) if known else name.encode()
        return self._bytes[token]


class Detokenizer:
    """Text of a growing token sequence, piece by piece. Concatenated, the pieces equal the decode of the whole, for every
    split; a code point is never cut, and bytes that are no UTF-8 become U+FFFD. Runs in the sequence's own task: asking
    the tokenizer would cost more than the work."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: tuple[int, ...], *, is_last: bool = False) -> str:
        """The text that is certain once `ids` are known; all of it when they are the last. Empty without a vocabulary."""
        if self._vocabulary is None:
            return ""
        return self._decoder.decode(b"".join(map(self._vocabulary.token_bytes, ids)), is_last)


class TokenizerActor(Actor):
    """Texts, chats and parts are encoded side by side, so that a slow one holds up its own request alone; a prompt of ids is no work.
    What is wrong with one prompt, even a bug that it alone brings out, ends that request."""

    def __init__(self, mailbox: Mailbox, executor: Executor, vocabulary: Vocabulary | None) -> None:
        super().__init__(mailbox, executor)
        self._vocabulary = vocabulary

    async def run(self) -> None:
        self._room, self._renderers = anyio.Semaphore(NUM_AT_ONCE), anyio.CapacityLimiter(NUM_RENDERERS)
        self._long, self._num_long = anyio.Semaphore(NUM_LONG), 0
        self._templates = Renderers()
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                await super().run()
        finally:
            await self._templates.close()

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            message = envelope.message
            if not isinstance(message, Encode):
                raise InternalBug(f"tokenizer got {message!r}")
            prompt = message.prompt
            if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
                envelope.answer(Encoded(tuple(cast("list[int]", prompt))))
            else:
                await self._room.acquire()  # while it waits the mailbox fills, and refuses
                self._group.start_soon(self._encode, envelope, prompt)

    async def _encode(self, envelope: Envelope, prompt: CheckedPrompt) -> None:
        try:
            if not envelope.is_abandoned:
                envelope.answer(await self._encoded(prompt))
        except ForerunError as error:
            envelope.fail(error)
        except (InternalBug, ActorStuck):
            raise
        except Exception as error:
            logger.exception("a prompt could not be encoded")
            failure = RequestFailed("the prompt could not be encoded")
            failure.__cause__ = error
            envelope.fail(failure)
        finally:
            self._room.release()
            self.num_steps += 1

    async def _encoded(self, prompt: CheckedPrompt) -> Encoded:
        if isinstance(prompt, list):
            parts = cast("list[Part]", prompt)
            num_bytes = sum(len(part.data) for part in parts if isinstance(part, EmbeddingRows))
            return await self.compute(lambda: lay_out(parts), num_bytes / BYTES_PER_SECOND)
        vocabulary = self._vocabulary
        if vocabulary is None:
            raise InvalidRequest([("prompt", "this model has no tokenizer.json, only token ids can be given")])
        if isinstance(prompt, str):
            return Encoded(await self._tokens(lambda: vocabulary.encode(prompt), len(prompt)))
        if vocabulary.chat_template is None:
            raise InvalidRequest([("prompt", "this model has no chat template, give text or token ids")])
        async with self._renderers:
            parts = await self._templates.render(vocabulary.chat_template, prompt, vocabulary.specials)
        ids = await self._tokens(lambda: vocabulary.encode_rendered(parts), sum(len(text) for _, text in parts))
        return Encoded(ids, opens_reasoning=bool(parts) and parts[-1][1].rstrip().endswith(THINK))

    async def _tokens(self, work: Callable[[], tuple[int, ...]], length: int) -> tuple[int, ...]:
        if length <= LONG:
            return await self.compute(work, length / CHARACTERS_PER_SECOND)
        if self._num_long == MAX_LONG:
            raise Overloaded(f"{MAX_LONG} long prompts are being encoded already", RETRY_AFTER_SECONDS)
        self._num_long += 1
        try:
            async with self._long:
                return await self.compute(work, length / CHARACTERS_PER_SECOND)
        finally:
            self._num_long -= 1
