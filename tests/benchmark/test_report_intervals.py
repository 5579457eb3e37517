"""Student's t, paired differences and the words they allow."""

import math

import pytest

from nolora_vision.benchmark.intervals import Difference, in_words, interval, paired, signed, t_cdf, t_quantile
from nolora_vision.benchmark.report_tables import multiplicity


@pytest.mark.parametrize("df", [*range(1, 31), 99, 500])
@pytest.mark.parametrize("p", [0.6, 0.975, 0.9995])
def test_t_agrees_with_scipy(df: int, p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-10)  # fp64, two different routes
    for t in (-3.0, 0.0, 0.7, 12.0):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-13)


def test_t_in_closed_form() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)  # df 1 is Cauchy's
    assert t_quantile(0.975, 2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-12)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)


def test_the_interval_of_three_values_by_hand() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3), rel=1e-12)
    assert interval([1.0]) is None and interval([]) is None
    assert interval([0.1 + 0.2, 0.3]) is None  # equal but for rounding: that is no spread to judge by


def test_differences_are_paired_by_seed() -> None:
    difference = paired({0: 81.0, 1: 84.0, 2: 82.0, 7: 99.0}, {2: 84.0, 1: 82.0, 0: 81.0})
    assert difference is not None and difference.pairs == (0.0, 2.0, -2.0)
    assert difference.outcomes == (1, 1, 1) and difference.mean == 0
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert Difference((0.3 - 0.1 - 0.2,)).outcomes == (0, 1, 0)


@pytest.mark.parametrize("pairs, said", [
    ((1.0, 2.0, 3.0), "+2.00 points (−0.48 to +4.48), 3 seeds: no difference is shown"),
    ((1.0, 1.1, 1.2), "+1.10 points (+0.85 to +1.35), 3 seeds: higher by 1.10"),
    ((-1.0, -1.1, -1.2), "−1.10 points (−1.35 to −0.85), 3 seeds: lower by 1.10"),
    ((5.0,), "+5.00 points, 1 seed: one seed allows no interval"),
    ((5.0, 5.1), "+5.05 points, 2 seeds: two seeds allow no interval"),
    ((0.5, 0.5, 0.5), "+0.50 points, 3 seeds: equal for every seed, which allows no interval"),
    ((0.0, 0.0, 0.0), "0.00 points, 3 seeds: no difference is shown"),
])  # fmt: skip
def test_higher_and_lower_are_said_only_where_the_interval_excludes_zero(pairs: tuple, said: str) -> None:
    assert in_words(Difference(pairs)) == said


@pytest.mark.parametrize(("gain", "failed", "baseline_failed", "said"), [
    (1, (1, 5), (0, 4), "nothing is shown, as 1 of 5 seeds failed and is not counted"),
    (1, (0, 4), (2, 5), "higher by 1.10; 2 of the baseline's 5 seeds failed and are not counted"),
    (-1, (1, 5), (0, 4), "lower by 1.10; 1 of 5 seeds failed and is not counted"),
    (-1, (0, 4), (1, 5), "nothing is shown, as 1 of the baseline's 5 seeds failed and is not counted"),
])  # fmt: skip
def test_the_better_one_must_not_have_failed_seeds(
    gain: int, failed: tuple[int, int], baseline_failed: tuple[int, int], said: str
) -> None:
    pairs = tuple(gain * pair for pair in (1.0, 1.1, 1.2))
    assert in_words(Difference(pairs, failed, baseline_failed)).endswith(f", 3 seeds: {said}")


def test_bonferroni_widens_the_interval() -> None:
    difference = Difference((1.0, 1.1, 1.2))
    assert difference.excludes_zero() and difference.excludes_zero(10) and not difference.excludes_zero(1000)


def test_two_pairs_conclude_nothing() -> None:
    """By the interval of two values, 4.41 to 5.69, the method would be higher."""
    two, three = Difference((5.0, 5.1)), Difference((5.0, 5.1, 5.2))
    assert interval(two.pairs) and two.interval is None and not two.excludes_zero()
    assert three.excludes_zero() and "makes 1 comparison at" in multiplicity([two, three], "It")


def test_signs() -> None:
    assert [signed(x) for x in (0.304, -0.25, 0.0, -0.001)] == ["+0.30", "−0.25", "0.00", "0.00"]
