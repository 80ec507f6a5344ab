"""All look-ups of one name in an engine, and what they share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ...core.speculation import DrafterName, SpeculationParams
from .base import Lookup
from .counts import Cached, Counts, load, merge, save
from .fixed import MapK, MapK4V, Simple
from .mod import Mod, Table
from .suffix import MAX_SHARED, SEPARATOR, Automaton, Suffix

logger = logging.getLogger("forerun")


class Family:
    """`make` begins the look-up of one sequence. `seconds_to_end` is about what its end takes for each of its tokens."""

    seconds_to_end = 0.0

    def __init__(self, name: DrafterName, make: Callable[[str], Lookup]) -> None:
        self.name: DrafterName = name
        self.make = make

    def ended(self, lookup: Lookup, salt: str) -> None:
        """A sequence will say no more."""

    def close(self) -> None:
        """The actor ends."""


class CountsFamily(Family):
    """Learns into the dynamic file what requests without a cache salt have said; the file is written when the actor ends."""

    seconds_to_end = 5e-6

    def __init__(self, params: SpeculationParams, vocabulary: int) -> None:
        super().__init__("ngram-cache", lambda salt: Cached(self._dynamic, self._static))
        self._path = Path(params.lookup_cache_dynamic) if params.lookup_cache_dynamic else None
        self._dynamic: Counts = load(self._path, vocabulary) if self._path is not None and self._path.exists() else {}
        self._static: Counts = load(Path(params.lookup_cache_static), vocabulary) if params.lookup_cache_static else {}
        self._is_changed = False

    def ended(self, lookup: Lookup, salt: str) -> None:
        if self._path is not None and not salt and isinstance(lookup, Cached):
            merge(self._dynamic, lookup.context)
            self._is_changed = True

    def close(self) -> None:
        if self._path is not None and self._is_changed:
            try:
                save(self._path, self._dynamic)
            except OSError as error:
                logger.warning("%s: cannot be written: %s", self._path, error.strerror)
            except Exception:  # the actor is cancelled, and nobody else would hear of it
                logger.exception("%s: cannot be written", self._path)


class SuffixFamily(Family):
    """With `is_shared`, what a sequence has said serves later ones with its cache salt."""

    def __init__(self, is_shared: bool) -> None:
        super().__init__("ngram-suffix", lambda salt: Suffix(self._automata.get(salt)))
        self._automata: dict[str, Automaton] = {}  # by salt, the longest unused first
        self.seconds_to_end = 1e-5 if is_shared else 0.0
        self._is_shared = is_shared

    def ended(self, lookup: Lookup, salt: str) -> None:
        if self._is_shared:
            automaton = self._automata[salt] = self._automata.pop(salt, None) or Automaton()
            for token in (*lookup.tokens, SEPARATOR):
                automaton.add(token)
            while sum(each.num_tokens for each in self._automata.values()) > MAX_SHARED:
                del self._automata[next(iter(self._automata))]


def family(name: DrafterName, p: SpeculationParams, vocabulary: int) -> Family:
    """A look-up family by its drafter's name. ModelFileError when a file of counts is not what it should be."""
    match name:
        case "ngram-simple":
            return Family(name, lambda salt: Simple(p.ngram_simple_size_n))
        case "ngram-map-k":
            return Family(name, lambda salt: MapK(p.ngram_map_k_size_n, p.ngram_map_k_min_hits))
        case "ngram-map-k4v":
            return Family(name, lambda salt: MapK4V(p.ngram_map_k4v_size_n, p.ngram_map_k4v_min_hits))
        case "ngram-mod":
            table = Table()
            return Family(name, lambda salt: Mod(table, p.ngram_mod_n_match, p.ngram_mod_n_min, salt))
        case "ngram-cache":
            return CountsFamily(p, vocabulary)
        case "ngram-suffix":
            return SuffixFamily(p.ngram_suffix_shared)
        case "draft-mtp":
            raise ValueError("the MTP head looks nothing up")
