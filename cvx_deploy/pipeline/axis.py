"""One axis of a video that is cut into windows which overlap, and what each counts for in the average.

Weights fall in a straight line from a window's middle to its ends, as those of FreeNoise (arXiv:2310.15169) do.
"""

from dataclasses import dataclass, replace
from math import ceil, gcd

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0.618
"""By what share of a loop windows move on each step: a golden one comes by no seam again soon."""


@dataclass(frozen=True)
class Axis:
    """One axis that is cut into windows, in latents or in pixels.

    Attributes:
        length: Of all; `window` of each.
        starts: Where windows begin.
        ring: Whether the end leads back to the beginning, and windows may reach over it.
        period: What starts are multiples of.
    """

    length: int
    window: int
    starts: tuple[int, ...] = (0,)
    ring: bool = False
    period: int = 1

    @classmethod
    def of(cls, length: int, window: int, overlap: int, period: int = 1, *, ring: bool = False) -> "Axis":
        """Spread as few windows as share `overlap` with each neighbour evenly over a length that holds one."""
        stride = window - overlap
        span = length if ring else length - window
        count = ceil(span / stride) + (not ring)
        gap = span / (count if ring else max(count - 1, 1))
        starts = tuple(round(index * gap / period) * period for index in range(count))
        return cls(length, window, starts, ring, period)

    def scaled(self, factor: int) -> "Axis":
        """Return the same axis in units so many times finer."""
        starts = tuple(factor * start for start in self.starts)
        return replace(self, length=factor * self.length, window=factor * self.window, starts=starts)

    def cuts(self, turn: int = 0) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return each window's places (window,) and weights (window,); a place's weights sum to one.

        Args:
            turn: Which step it is for: those of a ring move on with each.
        """
        begins = [(start + turn * self._hop) % self.length if self.ring else start for start in self.starts]
        places = [(begin + np.arange(self.window)) % self.length for begin in begins]
        slope = np.minimum(np.arange(1, self.window + 1), np.arange(self.window, 0, -1)).astype(np.float64)
        total = np.zeros(self.length)
        for place in places:
            total[place] += slope
        return [(place, (slope / total[place]).astype(np.float32)) for place in places]

    @property
    def _hop(self) -> int:
        """How far a ring's windows move on each step: after as many steps as it has places they have been at all."""
        places = self.length // self.period
        hops = (hop for hop in range(1, places + 1) if gcd(hop, places) == 1)
        return self.period * min(hops, key=lambda hop: abs(hop - _GOLDEN * places))
