"""Means of a few seeds with their 95 % intervals, and differences of runs that share a seed.

Every interval is Student's t-interval: it holds for one comparison, and is not widened for having
looked at several.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the t-interval around it. NaN where there are too few values."""

    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation of the values, with n - 1."""
    n: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean, t-interval and standard deviation of independent values; NaN values are left out."""
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0)
    mean = math.fsum(known) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
    half = t_quantile(n - 1, level) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL
) -> Interval:
    """Mean of value - baseline over the seeds that both have, with its t-interval.

    What a seed does to both of them (order of the data, initial weights) cancels.
    """
    seeds = sorted(set(values) & set(baseline))
    return mean_interval([values[seed] - baseline[seed] for seed in seeds], level)


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t for which a Student variable of `degrees` lies in -t..t with probability `level`.

    The probability is a finite sum for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)
    and grows with the angle arctan(t / sqrt(degrees)), which is found by bisection.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees={degrees}, level={level}: need at least 1, and inside (0, 1)")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _probability(angle: float, degrees: int) -> float:
    """Share of Student's distribution within -t..t, where t = sqrt(degrees) x tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, degrees, 2):  # terms in cos, cos^3, ... or in 1, cos^2, ...
        total += term
        term *= power / (power + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
