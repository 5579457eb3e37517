"""Means with Student's t intervals, paired differences, and the words that they allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
LEAST_PAIRS = 3
"""Of fewer pairs nothing is concluded: two that happen to be nearly equal have a spread that says nothing."""
ROUNDING = 1e-9
"""Differences up to this, in points, are ties, and a spread up to this is none: they come of floating point alone."""


def t_cdf(t: float, df: int) -> float:
    """P(T ≤ t) of Student's distribution with df degrees of freedom.

    For whole df it is a finite sum, exact to rounding.
    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0 if df == 1 else term
    for k in range(2 + odd, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + central) / 2


def t_quantile(p: float, df: int) -> float:
    """The t with P(T ≤ t) = p, for 0.5 ≤ p < 1, by bisection of `t_cdf`."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's t interval for the mean of independent values; None for fewer than two, or if they are all equal."""
    if len(values) < 2 or (spread := statistics.stdev(values)) <= ROUNDING:
        return None
    mean, reach = statistics.fmean(values), t_quantile((1 + level) / 2, len(values) - 1) * spread
    reach /= math.sqrt(len(values))
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline, pair by pair: over seeds, or over datasets."""

    pairs: tuple[float, ...]
    """Differences in points."""
    failed: tuple[int, int] = (0, 0)
    """How many of the method's seeds failed, and of how many: the mean is that of the others."""
    baseline_failed: tuple[int, int] = (0, 0)

    @property
    def mean(self) -> float:
        """Of the pairs."""
        return statistics.fmean(self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean; None where the pairs are fewer than LEAST_PAIRS, or all equal."""
        return self._interval(LEVEL)

    @property
    def outcomes(self) -> tuple[int, int, int]:
        """Pairs that the method wins, ties and loses."""
        wins, losses = (sum(sign * pair > ROUNDING for pair in self.pairs) for sign in (1, -1))
        return wins, len(self.pairs) - wins - losses, losses

    def excludes_zero(self, comparisons: int = 1) -> bool:
        """Whether 0 is outside the interval, which Bonferroni's correction widens for so many comparisons."""
        found = self._interval(1 - (1 - LEVEL) / comparisons)
        return found is not None and not found[0] <= 0 <= found[1]

    @property
    def sign(self) -> int:
        """1: higher, −1: lower, 0: neither may be said, as 0 is in the interval or the better side has failed seeds."""
        better = self.failed if self.mean > 0 else self.baseline_failed
        return 0 if better[0] or not self.excludes_zero() else 1 if self.mean > 0 else -1

    def _interval(self, level: float) -> tuple[float, float] | None:
        return interval(self.pairs, level) if len(self.pairs) >= LEAST_PAIRS else None

    @property
    def verdict(self) -> str:
        """What may be said: higher or lower only where the interval excludes 0 and no seed of the better one failed."""
        told = (not_counted(*self.failed), not_counted(*self.baseline_failed, whose="the baseline's "))
        lost = "; ".join(filter(None, told))
        if self.excludes_zero() and not self.sign:
            return f"nothing is shown, as {lost}"
        return f"{self._words}; {lost}" if lost else self._words

    @property
    def _words(self) -> str:
        if self.sign:
            return f"{'higher' if self.mean > 0 else 'lower'} by {abs(self.mean):.2f}"
        if len(self.pairs) < LEAST_PAIRS:
            return f"{'one seed allows' if len(self.pairs) == 1 else 'two seeds allow'} no interval"
        if self.interval is None and abs(self.mean) > ROUNDING:
            return "equal for every seed, which allows no interval"
        return "no difference is shown"


def not_counted(failed: int, of: int, *, whose: str = "") -> str:
    """1 of 5 seeds failed and is not counted; empty if none did."""
    return f"{failed} of {whose}{of} seeds failed and {'is' if failed == 1 else 'are'} not counted" if failed else ""


def paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Differences over the seeds that both have; None without any."""
    pairs = tuple(method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys()))
    return Difference(pairs) if pairs else None


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a real minus among them: +0.30, −0.25, 0.00."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def in_words(difference: Difference) -> str:
    """+0.30 points (−0.50 to +1.10), 5 seeds: no difference is shown."""
    found, n = difference.interval, len(difference.pairs)
    reach = "" if found is None else f" ({signed(found[0])} to {signed(found[1])})"
    return f"{signed(difference.mean)} points{reach}, {n} {'seed' if n == 1 else 'seeds'}: {difference.verdict}"
