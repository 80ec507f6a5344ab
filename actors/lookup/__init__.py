"""Drafting by looking up what followed before: no weights, no arrays of activations, microseconds a draft."""
