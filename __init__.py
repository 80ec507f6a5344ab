"""Forerun: async streaming inference of hybrid language models, with speculation that changes the speed and nothing else.

async with forerun.open_engine("demo") as engine:
    async with engine.generate("def fibonacci(n):", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
"""

from .actors.engine import Engine, EngineStatistics, Model, load_model, open_engine
from .actors.stream import DEFAULT_MAX_TOKENS, Options, Stream
from .core.errors import (
    EngineClosed,
    EngineDead,
    ForerunError,
    InvalidRequest,
    ModelFileError,
    Overloaded,
    RequestFailed,
)
from .core.vocabulary import (
    Delta,
    DrafterStatistics,
    FinishReason,
    Message,
    Prompt,
    Result,
    SamplingParams,
    Speculation,
    Timings,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "Delta",
    "DrafterStatistics",
    "Engine",
    "EngineClosed",
    "EngineDead",
    "EngineStatistics",
    "FinishReason",
    "ForerunError",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelFileError",
    "Options",
    "Overloaded",
    "Prompt",
    "RequestFailed",
    "Result",
    "SamplingParams",
    "Speculation",
    "Stream",
    "Timings",
    "Usage",
    "load_model",
    "open_engine",
]
