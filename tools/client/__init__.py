"""A client of `forerun serve`, for asyncio programs.

async with forerun.client.Client("127.0.0.1:50051", token="...") as client:
    async with client.generate("def fibonacci(n):", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
"""

from .client import AnswerStream, Client, ServerError

__all__ = ["AnswerStream", "Client", "ServerError"]
