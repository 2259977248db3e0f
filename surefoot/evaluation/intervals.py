"""95 % confidence intervals of shares, of means, and of the difference of two shares on the same rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z = 1.959964  # the normal distribution's 97.5th percentile


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of count / total."""
    share, n = count / total, total
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """share(first) - share(second) on the same rows, with its interval: (difference, low, high).

    Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on paired data", method 8 with
    Wilson's limits: it stays right where few rows differ, or none.
    """
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    p, q = sum(first) / n, sum(second) / n
    (low_p, high_p), (low_q, high_q) = wilson(sum(first), n), wilson(sum(second), n)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    phi = 0.0 if spread == 0 else (both / n - p * q) / spread
    down = (p - low_p) ** 2 - 2 * phi * (p - low_p) * (high_q - q) + (high_q - q) ** 2
    up = (high_p - p) ** 2 - 2 * phi * (high_p - p) * (q - low_q) + (q - low_q) ** 2
    return p - q, p - q - math.sqrt(max(0.0, down)), p - q + math.sqrt(max(0.0, up))


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) by the normal approximation; with one value all three are it."""
    centre = statistics.fmean(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return centre, centre - half, centre + half
