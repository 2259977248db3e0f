"""Judging loss curves: are a few steps healthy, and do two runs over the same batches stay together? Plain arithmetic on log lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NORMAL_GRAD_NORM = (0.1, 10.0)  # the migration guide's band
LEAST_FALL = 1e-4  # of the loss: a smaller difference between the first and the last steps is rounding

# How far the curves may lie apart in the mean, as a share of the mean loss. Kernels that differ by rounding alone stay below it: published
# curves of fused DoRA kernels lie within 7.1e-4 nats (arXiv 2603.22276); in bf16 on one H200, DoRA over 100 steps
# (benchmarks/results/compare_stages_h200.txt): eager against sdpa 0.002 on a pretrained model, 0.005 from random weights, uncompiled
# against compiled 0.007 on the pretrained one. A learning rate 10 % higher lies far above it.
BAND = 0.01
OUTLIER = 10  # bands that a single step may differ by, as a share of its own loss where that is above the mean


class Step(NamedTuple):
    """A step of metrics.jsonl: loss in nats a trained token, grad_norm before clipping; NaN where a figure was not logged."""

    step: int
    loss: float
    grad_norm: float
    tokens_per_s: float = math.nan
    peak_memory_gib: float = math.nan


class Check(NamedTuple):
    """status is ok, warn or FAIL; a warning does not fail the test."""

    name: str
    status: str
    detail: str


def passed(checks: Iterable[Check]) -> bool:
    return all(check.status != "FAIL" for check in checks)


def loss(steps: Sequence[Step]) -> Check:
    """Every loss is finite and not 0.0."""
    bad = [f"{step.loss} at step {step.step}" for step in steps if not math.isfinite(step.loss) or step.loss == 0]
    if bad or not steps:
        return Check("loss", "FAIL", shown(bad) or "no step was logged")
    return Check("loss", "ok", f"{len(steps)} of {len(steps)} finite and not 0.0")


def grad_norm(steps: Sequence[Step], *, scales: bool = False) -> Check:
    """Every gradient norm is finite and not 0; outside 0.1 to 10 is a warning.

    Args:
        scales: fp16, whose loss scaler finds its scale by overflowing: what is not finite before the first finite norm is no fault.
    """
    if scales:
        steps = steps[next((index for index, step in enumerate(steps) if math.isfinite(step.grad_norm)), 0) :]
    bad = [f"{step.grad_norm} at step {step.step}" for step in steps if not math.isfinite(step.grad_norm) or step.grad_norm == 0]
    if bad or not steps:
        return Check("grad_norm", "FAIL", shown(bad) or "no step was logged")
    low, high = NORMAL_GRAD_NORM
    outside = [f"{step.grad_norm:.3g} at step {step.step}" for step in steps if not low <= step.grad_norm <= high]
    norms = [step.grad_norm for step in steps]
    seen = f"{min(norms):.3g} to {max(norms):.3g}"
    if outside:
        return Check("grad_norm", "warn", f"{seen}; outside {low:g} to {high:g}: {shown(outside)}")
    return Check("grad_norm", "ok", f"{seen}, inside {low:g} to {high:g}")


def falling(losses: Sequence[float]) -> Check:
    """The mean of the last three losses is below that of the first three; the slope's standard error tells how sure that is."""
    count = min(3, len(losses) // 2)
    if count == 0 or not all(map(math.isfinite, losses)):
        return Check(
            "falling",
            "FAIL",
            "cannot be judged: " + ("not every loss is finite" if count else f"too few steps were logged ({len(losses)})"),
        )
    first, last = statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])
    slope, error = slope_of(losses)
    seen = f"mean loss {first:.4f} in the first {count} steps, {last:.4f} in the last; slope {slope:+.2g} +- {error:.1g} a step"
    if first - last <= LEAST_FALL * abs(first):
        return Check("falling", "FAIL", seen + (", within the batches' noise: more --steps tell" if abs(slope) < 2 * error else ""))
    return Check("falling", "ok", seen + (", within the batches' noise" if abs(slope) < 2 * error else ""))


def is_rising(losses: Sequence[float]) -> bool:
    """The slope is above 0 by more than twice its standard error, or a loss is not finite."""
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return True
    slope, error = slope_of(losses)
    return slope > 2 * error


def slope_of(values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope a step and its standard error (0 for two values)."""
    slope, intercept = statistics.linear_regression(range(len(values)), values)
    squares = sum((value - intercept - slope * step) ** 2 for step, value in enumerate(values))
    spread = sum((step - (len(values) - 1) / 2) ** 2 for step in range(len(values)))
    return slope, math.sqrt(squares / max(1, len(values) - 2) / spread)


def shown(items: Sequence[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


class Agreement(NamedTuple):
    """Two loss curves over the same batches. Differences are |loss_a - loss_b| in nats, infinite where a loss is not finite.

    A difference that grows from the first half to the second is drift, one that does not is rounding. grad_norm is the largest
    |ln(norm_a / norm_b)|, speed the median of tokens_per_s_b / tokens_per_s_a; NaN where neither was logged.
    """

    agrees: bool
    reason: str
    differences: tuple[float, ...]
    mean: float
    largest: float
    largest_at: int
    halves: tuple[float, float]
    grad_norm: float
    speed: float


def agreement(a: Sequence[Step], b: Sequence[Step], band: float = BAND) -> Agreement:
    """Whether the curves stay together: as many steps in each, mean difference <= band x mean loss of a, no step above 10 bands.

    The first step is left out of `speed`: it holds the warm-up of kernels and compile.
    """
    pairs = list(zip(a, b, strict=False))
    differences = [_difference(one.loss, other.loss) for one, other in pairs] or [math.inf]
    mean, largest = statistics.fmean(differences), max(differences)
    half = -(-len(differences) // 2)
    level = statistics.fmean(step.loss for step in a) if a else math.nan
    worst = max((gap / max(level, one.loss) for gap, (one, _) in zip(differences, pairs, strict=False)), default=math.inf)
    return Agreement(
        agrees=len(a) == len(b) and mean <= band * level and worst <= OUTLIER * band,
        reason=f"{len(a)} and {len(b)} steps were logged" if len(a) != len(b) or not a else _reason(mean / level, worst, band, level),
        differences=tuple(differences),
        mean=mean,
        largest=largest,
        largest_at=pairs[differences.index(largest)][0].step if pairs else 0,
        halves=(statistics.fmean(differences[:half]), statistics.fmean(differences[half:] or [math.nan])),
        grad_norm=max(
            (abs(math.log(x.grad_norm / y.grad_norm)) for x, y in pairs if _is_ratio(x.grad_norm, y.grad_norm)), default=math.nan
        ),
        speed=_median([y.tokens_per_s / x.tokens_per_s for x, y in pairs[1:] if _is_ratio(x.tokens_per_s, y.tokens_per_s)]),
    )


def speed(steps: Sequence[Step]) -> float:
    """Median tokens/s, the first step left out; NaN where none was logged."""
    return _median([step.tokens_per_s for step in steps[1:] if math.isfinite(step.tokens_per_s)])


def _reason(mean: float, worst: float, band: float, level: float) -> str:
    limits = ((mean, band, f"of the mean loss {level:.3g}"), (worst, OUTLIER * band, "of its loss in the worst step"))
    return "; ".join(f"{share:.2%} {'<=' if share <= limit else '>'} {limit:.2%} {what}" for share, limit, what in limits)


def _difference(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _is_ratio(a: float, b: float) -> bool:
    return 0 < a < math.inf and 0 < b < math.inf


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
