"""Loss curves judged by table: healthy or not, and whether two stay together."""

from __future__ import annotations

import math

import pytest

from surefoot.diagnosis import stability
from surefoot.diagnosis.stability import Step

NAN, INF = math.nan, math.inf


def steps(losses: list[float], norms: list[float] | None = None, rate: float = 100.0) -> tuple[Step, ...]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return tuple(Step(number, loss, norm, rate, 1.0) for number, (loss, norm) in enumerate(pairs, 1))


@pytest.mark.parametrize(
    ("losses", "status", "words"),
    [
        ([2.0, 1.5, 1.0], "ok", "3 of 3"), ([2.0, NAN, 1.0], "FAIL", "nan at step 2"), ([2.0, 1.0, INF], "FAIL", "inf at step 3"),
        ([0.0, 0.0], "FAIL", "0.0 at step 1, 0.0 at step 2"), ([NAN] * 7, "FAIL", "and 2 more"), ([], "FAIL", "no step was logged"),
    ],
)  # fmt: skip
def test_loss_when_judged_then_must_be_finite_and_not_zero(losses: list[float], status: str, words: str) -> None:
    check = stability.loss(steps(losses))
    assert (check.status, words in check.detail) == (status, True), check


@pytest.mark.parametrize(
    ("norms", "scales", "status", "words"),
    [
        ([0.1, 10.0], False, "ok", "0.1 to 10, inside"), ([0.5, 10.1], False, "warn", "10.1 at step 2"), ([0.09, 1.0], False, "warn", "0.09 at step 1"),
        ([1.0, NAN], False, "FAIL", "nan at step 2"), ([1.0, 0.0], False, "FAIL", "0.0 at step 2"), ([INF, 1.0], False, "FAIL", "inf at step 1"),
        ([INF, NAN, 1.0], True, "ok", "1 to 1"), ([1.0, INF], True, "FAIL", "inf at step 2"), ([INF, INF], True, "FAIL", "inf at step 1"),
        ([], False, "FAIL", "no step"),
    ],
)  # fmt: skip
def test_grad_norm_when_judged_then_fails_at_zero_and_non_finite_and_warns_outside_the_band(
    norms: list[float], scales: bool, status: str, words: str
) -> None:
    check = stability.grad_norm(steps([1.0] * len(norms), norms), scales=scales)
    assert (check.status, words in check.detail) == (status, True), check


@pytest.mark.parametrize(
    ("losses", "status", "words"),
    [
        ([3.0, 2.5, 2.0, 1.5, 1.0, 0.5], "ok", "2.5000 in the first 3 steps, 1.0000 in the last; slope -0.5"),
        ([2.0, 1.0], "ok", "first 1 steps"),
        ([1.0] * 10, "FAIL", "slope +0"),
        ([1.0 - 1e-7 * step for step in range(10)], "FAIL", "1.0000"),
        ([1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "FAIL", "3.0000 in the last"),
        ([2.0, 3.0, 1.9, 2.0, 3.2, 1.8], "FAIL", "within the batches' noise: more --steps tell"),
        ([2.0, 3.0, 1.9, 2.0, 2.9, 1.8], "ok", "within the batches' noise"),
        ([2.0, NAN, 1.0, 1.0], "FAIL", "not every loss is finite"),
        ([2.0], "FAIL", "too few steps were logged (1)"),
    ],
)
def test_falling_when_judged_then_compares_the_ends_and_says_how_sure_it_is(losses: list[float], status: str, words: str) -> None:
    check = stability.falling(losses)
    assert (check.status, words in check.detail) == (status, True), check


def test_slope_when_values_have_noise_then_matches_the_textbook_formula() -> None:
    slope, error = stability.slope_of([1.0, 2.0, 2.0, 3.0])
    assert slope == pytest.approx(0.6)
    assert error == pytest.approx(math.sqrt(0.2 / 2 / 5))


@pytest.mark.parametrize(
    ("b", "agrees", "words"),
    [
        ([1.6, 1.1, 0.7, 0.6], True, "0.00% <= 1.00% of the mean loss 1; 0.00% <= 10.00% of its loss"),
        ([1.609, 1.091, 0.709, 0.591], True, "0.90% <= 1.00%"),
        ([1.6, 1.12, 0.72, 0.62], False, "1.50% > 1.00%"),
        ([1.6, 1.1, 0.7, 0.71], False, "11.00% > 10.00% of its loss in the worst step"),
        ([1.6, 1.1, NAN, 0.6], False, "inf% > 10.00%"),
        ([1.6, 1.1], False, "4 and 2 steps were logged"),
        ([], False, "4 and 0 steps were logged"),
    ],
)
def test_agreement_when_curves_differ_then_says_by_how_much_and_whether(b: list[float], agrees: bool, words: str) -> None:
    found = stability.agreement(steps([1.6, 1.1, 0.7, 0.6]), steps(b), band=0.01)
    assert (found.agrees, words in found.reason) == (agrees, True), found


def test_agreement_when_a_curve_drifts_then_shows_growth_norm_ratio_and_speed() -> None:
    a = steps([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 0.0], rate=100.0)
    b = steps([2.0, 2.1, 2.2, 2.4], [1.0, math.e, 0.5, 1.0], rate=150.0)
    found = stability.agreement(a, b, band=1e-3)
    assert not found.agrees
    assert found.halves == pytest.approx((0.05, 0.3))
    assert (found.largest, found.largest_at) == (pytest.approx(0.4), 4)
    assert found.grad_norm == pytest.approx(1.0)
    assert found.speed == pytest.approx(1.5)
    assert stability.speed(b) == 150.0
