"""Results of evaluations as tables: one with its base beside it, several next to each other, and the rows that flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.errors import UsageError
from surefoot.json_file import read_json

SHARES = ("accuracy", "exact_match")


def read(path: str) -> dict[str, Any]:
    """A result that scripts/evaluate.py wrote.

    Raises:
        UsageError: there is none at `path`.
    """
    content = read_json(Path(path))
    if "sets" not in content or "label" not in content:
        why = "is no result of scripts/evaluate.py" if Path(path).is_file() else "is no file"
        raise UsageError(f"--compare {path} {why}")
    return content


def own_table(result: Mapping[str, Any]) -> list[list[str]]:
    """A line for each set and metric: trained model, base and gain (where there are both), rows, share of the commonest answer."""
    sides = list(next(iter(result["sets"].values()))["scores"])
    has_gain = len(sides) > 1
    rows = [["set", "metric", *sides, *(["gain (95 %)"] if has_gain else []), "rows", "commonest"]]
    for name, one in result["sets"].items():
        for metric, value in one["scores"][sides[0]].items():
            cells = [shown(metric, one["scores"][side][metric]) for side in sides]
            gain = [_gain(metric, one["gain"].get(metric))] if has_gain else []
            common = f"{value['commonest'] / value['rows']:.1%}" if "commonest" in value else ""
            rows.append([name, metric, *cells, *gain, f"{one['rows']:,}", common])
    return rows


def comparison(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A column for each result's trained model, a line for each set and metric that any of them has, and the mean accuracy of the sets."""
    rows = [["set", "metric", *(str(result["label"]) for result in results)]]
    keys = dict.fromkeys((name, metric) for result in results for name, one in result["sets"].items() for metric in _first(one))
    for name, metric in keys:
        found = [_first(result["sets"][name]).get(metric) if name in result["sets"] else None for result in results]
        rows.append([name, metric, *("" if one is None else shown(metric, one) for one in found)])
    means = [mean_accuracy(result) for result in results]
    if all(mean is not None for mean in means) and len({tuple(_answered(result)) for result in results}) == 1:
        rows.append(["mean of the sets", "accuracy", *(f"{mean:.1%}" for mean in means)])
    return rows


def mean_accuracy(result: Mapping[str, Any]) -> float | None:
    """The unweighted mean over the sets, as the papers' last column; None below two sets."""
    values = [_first(result["sets"][name])["accuracy"]["value"] for name in _answered(result)]
    return sum(values) / len(values) if len(values) > 1 else None


def _answered(result: Mapping[str, Any]) -> list[str]:
    return [name for name, one in result["sets"].items() if name != "all" and "accuracy" in _first(one)]


def _first(one: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(one["scores"].values()))


def shown(metric: str, score: Mapping[str, Any]) -> str:
    """`44.5% (39.7 to 49.4)`, or a plain number where there is no interval."""
    scale, sign = (100, "%") if metric in SHARES else (1, "")
    text = f"{scale * score['value']:.1f}{sign}" if "low" in score else f"{score['value']:.4g}"
    return text + (f" ({scale * score['low']:.1f} to {scale * score['high']:.1f})" if "low" in score else "")


def _gain(metric: str, gain: Mapping[str, float] | None) -> str:
    if gain is None:
        return ""
    scale = 100 if metric in SHARES else 1
    return f"{scale * gain['value']:+.1f} ({scale * gain['low']:+.1f} to {scale * gain['high']:+.1f})"


def flips(predictions: Sequence[Mapping[str, Any]], metric: str, count: int) -> list[str]:
    """Up to `count` rows that the training put right and as many that it put wrong, by the `metric` (a share) of each side.

    Args:
        predictions: rows of the .jsonl beside a result, each with the sides `trained` and `base`.
    """
    lines = []
    for title, was, now in (("put right by training", 0.0, 1.0), ("put wrong by training", 1.0, 0.0)):
        rows = [row for row in predictions if row["base"].get(metric) == was and row["trained"].get(metric) == now]
        lines.append(f"{len(rows):,} rows {title}" + (":" if rows and count else ""))
        lines += [
            f"  {row['where']}: {row['reference'][:60]!r}, base {_said(row['base'])}, trained {_said(row['trained'])}"
            for row in rows[:count]
        ]
    return lines


def _said(side: Mapping[str, Any]) -> str:
    return repr((side["text"] or side["prediction"] or "")[:60])
