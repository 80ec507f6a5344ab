"""The edge: what the network sees of an engine. gRPC (server.py, services.py) and an OpenAI-compatible HTTP gateway (gateway.py)."""

from .run import run_server, serve
from .server import ServerParams, Tls

__all__ = ["ServerParams", "Tls", "run_server", "serve"]
