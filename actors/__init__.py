"""One file an actor; engine.py puts them together and is the in-process API."""
