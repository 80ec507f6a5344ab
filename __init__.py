"""Forerun: async streaming inference of hybrid language models, with speculation that changes the speed and nothing else.

async with forerun.open_engine("demo") as engine:
    async with engine.generate("def fibonacci(n):", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
"""

from .actors.embedding import Embedding
from .actors.engine import Engine, EngineStatistics
from .actors.model import Model, load_model
from .actors.opening import open_engine
from .actors.reply import CallArguments, CallBegun, Content, Reasoning, ReplyParser, ReplyPiece
from .actors.stream import DEFAULT_CHAT_TOKENS, DEFAULT_MAX_TOKENS, Options, Stream
from .actors.tree import ActorStatistics
from .core.chat import Chat, Message, ToolCall
from .core.embeddings import EmbeddingRows
from .core.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    ForerunError,
    InvalidRequest,
    ModelFileError,
    Overloaded,
    RequestFailed,
    SavedSequenceError,
)
from .core.speculation import DRAFTERS, DrafterStatistics, Speculation, SpeculationOptions, SpeculationParams
from .core.trace import Counter, Event, Flow, Notice, Span, Stage, Subscription
from .core.vocabulary import Delta, FinishReason, Prompt, Result, SamplingParams, Started, Timings, TokenLogprob, Usage
from .kernels.backends import BACKENDS
from .kernels.model.prefix import PrefixStatistics
from .kernels.model.recurrent import StoreName

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "DEFAULT_CHAT_TOKENS",
    "DEFAULT_MAX_TOKENS",
    "DRAFTERS",
    "ActorStatistics",
    "CallArguments",
    "CallBegun",
    "Chat",
    "Content",
    "Counter",
    "DeadlineExceeded",
    "Delta",
    "DrafterStatistics",
    "Embedding",
    "EmbeddingRows",
    "Engine",
    "EngineClosed",
    "EngineDead",
    "EngineStatistics",
    "Event",
    "FinishReason",
    "Flow",
    "ForerunError",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelFileError",
    "Notice",
    "Options",
    "Overloaded",
    "PrefixStatistics",
    "Prompt",
    "Reasoning",
    "ReplyParser",
    "ReplyPiece",
    "RequestFailed",
    "Result",
    "SamplingParams",
    "SavedSequenceError",
    "Span",
    "Speculation",
    "SpeculationOptions",
    "SpeculationParams",
    "Stage",
    "Started",
    "StoreName",
    "Stream",
    "Subscription",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "load_model",
    "open_engine",
]
