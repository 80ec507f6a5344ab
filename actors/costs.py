"""What things take, by their size: measured while the engine works, and drawn as a curve."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict, deque
from statistics import median

#: Of a new measurement; old ones fade.
NEWEST_SHARE = 0.1
#: A measurement more than so many times the mean is an accident of the machine, and counts as that much.
OUTLIER = 2.0
#: Measurements of other sizes after which one is forgotten: what was once slow must be tried again.
FORGOTTEN_AFTER = 300
#: The share by which a mean moves before the curve is drawn anew, and measurements that go by first.
NOTABLE, REDRAWN_AFTER = 0.05, 4
#: How much cheaper than its only measurement a size may be.
HOPE = 0.3
#: What twice the only size that was measured costs more, as a share. Low, so that drafts are tried.
HOPED_SLOPE = 0.25


def usual(seconds: list[float]) -> float:
    """What several like things took: the mean of the shorter three quarters, for the others may be accidents."""
    shorter = sorted(seconds)[: max(1, len(seconds) * 3 // 4)]
    return sum(shorter) / len(shorter)


class Costs:
    """Seconds by size, as measured; between sizes and beyond by straight lines, and never less for more. A size that was measured a few
    times only is taken for somewhat cheaper than it seemed, by the share `hope` after the first, so that an accident is not believed for
    long. With a `window`, the median of so many measurements stands for their mean."""

    def __init__(self, hope: float = HOPE, window: int = 0) -> None:
        self._hope, self._window = hope, window
        self._newest = defaultdict[int, deque[float]](lambda: deque(maxlen=window))  # size -> measurements, where there is a window
        self._means: dict[int, tuple[float, int, int]] = {}  # size -> mean, measurements, the clock at the last
        self._clock = self._redrawn_at = 0  # the clock from which on the curve may be drawn anew
        self._curve: tuple[list[int], list[float]] = [], []
        self._drawn: dict[int, float] = {}  # the means it was made of
        self._table: list[float] = []  # what `__call__` has said of sizes 0, 1, ... since the curve was drawn

    def saw(self, size: int, seconds: float) -> None:
        if seconds <= 0:
            return
        self._clock += 1
        mean, number, _ = self._means.get(size, (seconds, 0, 0))
        if self._window:
            self._newest[size].append(seconds)
            mean = median(self._newest[size])
        else:
            mean += (min(seconds, OUTLIER * mean) - mean) * max(1 / (number + 1), NEWEST_SHARE)
        self._means[size] = mean, number + 1, self._clock
        if self._clock % FORGOTTEN_AFTER == 0:
            self._means = {size: each for size, each in self._means.items() if self._clock - each[2] < FORGOTTEN_AFTER}
            for size in self._newest.keys() - self._means.keys():
                del self._newest[size]
            self._table.clear()
        drawn = self._drawn.get(size, 0.0)
        if not drawn or (self._clock >= self._redrawn_at and abs(mean * (1 - self._hope / (number + 1)) - drawn) > NOTABLE * drawn):
            self._table.clear()

    def _draw(self) -> None:
        """Makes the curve of what was measured."""
        self._redrawn_at = self._clock + min(self._clock, REDRAWN_AFTER)
        sizes = sorted(self._means)
        self._drawn = {size: mean * (1 - self._hope / number) for size, (mean, number, _) in self._means.items()}
        # Where more seemed to cost less, neighbours are averaged (pool adjacent violators).
        pools: list[tuple[float, int, int]] = []  # mean, measurements, sizes
        for each in sizes:
            pools.append((self._drawn[each], self._means[each][1], 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (one, n, k), (other, m, j) = pools[-2:]
                pools[-2:] = [((one * n + other * m) / (n + m), n + m, k + j)]
        self._curve = sizes, [mean for mean, _, count in pools for _ in range(count)]

    @property
    def reach(self) -> int:
        """The largest size that may be tried: twice the largest that was, so that the curve is measured from its beginning."""
        return 2 * max(self._means, default=0) or 1

    def num_measured(self, size: int) -> int:
        return self._means[size][1] if size in self._means else 0

    def num_since(self, size: int) -> float:
        """Measurements of others since the last of this size."""
        return self._clock - self._means[size][2] if size in self._means else math.inf

    def __call__(self, size: int) -> float:
        """0 before anything was measured."""
        return self._table[size] if size < len(self._table) else self.curve(size, size + 1)[0]

    def curve(self, first: int, end: int) -> list[float]:
        """Of sizes from `first` on."""
        if not self._table:
            self._draw()
        while len(self._table) < end:
            self._table.append(self._estimate(len(self._table)))
        return self._table[first:end]

    def _estimate(self, size: int) -> float:
        sizes, seconds = self._curve
        if not sizes:
            return 0.0
        at = bisect_left(sizes, size)
        if at < len(sizes) and sizes[at] == size:
            return seconds[at]
        if at == 0:
            return seconds[0] * (1 + HOPED_SLOPE * (size - 1)) / (1 + HOPED_SLOPE * (sizes[0] - 1))
        if at < len(sizes):
            share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
            return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
        slope = HOPED_SLOPE * seconds[-1] / sizes[-1]
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])  # of two neighbours it may be anything
        return seconds[-1] + slope * (size - sizes[-1])
