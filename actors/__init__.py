"""One file an actor; tree.py puts them together, engine.py is the in-process API."""
