"""The edge: what the network sees of an engine. gRPC (server.py, services.py) and an OpenAI-compatible HTTP gateway (gateway.py)."""
