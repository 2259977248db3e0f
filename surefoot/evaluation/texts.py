"""Generated texts against references: exact match, ROUGE-L (rouge-score) and SARI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from surefoot.errors import BackendError

Grams = Counter[tuple[str, ...]]
ORDER = 4  # of SARI's longest n-grams


def exact_match(prediction: str, reference: str) -> bool:
    """Equal but for white space at both ends."""
    return prediction.strip() == reference.strip()


def rouge_scorer() -> Any:
    """google-research's rouge-score for ROUGE-L, words stemmed. Ask for it before there is anything to lose.

    Raises:
        BackendError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        way_out = "Use pip install rouge-score, or --metrics exact_match sari perplexity"
        raise BackendError(f"--metrics=rougeL needs {error.name}, which is not installed. {way_out}") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L's F-measure of each text. Raises as rouge_scorer() does."""
    scorer = rouge_scorer()
    return [float(scorer.score(right, said)["rougeL"].fmeasure) for said, right in zip(predictions, references, strict=True)]


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI, 0 to 100: how well n-grams of the source are kept and deleted, and new ones added.

    Xu et al. 2016 (TACL 4, 401-415), with the two changes that Hugging Face's metric documents: 0/0 is 1, and the recall of what is kept is
    taken over all that should be. Words are lower-cased and split at white space. No package on PyPI holds it: evaluate's is a script on
    the Hub.
    """
    said, asked, right = prediction.lower().split(), source.lower().split(), [text.lower().split() for text in references]
    parts = [
        _operations(_grams(asked, order), _grams(said, order), [_grams(text, order) for text in right]) for order in range(1, ORDER + 1)
    ]
    return 100 * sum(sum(part) for part in parts) / (3 * ORDER)


def _operations(source: Grams, said: Grams, references: Sequence[Grams]) -> tuple[float, float, float]:
    """F1 of the kept n-grams, precision of the deleted, F1 of the added; counts are times the number of references."""
    right: Grams = sum(references, Counter())
    source, said = (Counter({gram: count * len(references) for gram, count in grams.items()}) for grams in (source, said))
    kept, to_keep = source & said, source & right
    kept_well = kept & to_keep
    keep = _f1(_mean_share(kept_well, kept), _share(kept_well.total(), to_keep.total()))
    deleted, to_delete = source - said, source - right
    delete = _mean_share(deleted & to_delete, deleted)
    added, to_add = set(said) - set(source), set(right) - set(source)
    add = _f1(_share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add)))
    return keep, delete, add


def _grams(words: Sequence[str], order: int) -> Grams:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _mean_share(good: Grams, of: Grams) -> float:
    """The mean over the n-grams of `of` of the share of each that is good."""
    return _share(sum(good[gram] / count for gram, count in of.items()), len(of))


def _share(good: float, of: int) -> float:
    return good / of if of else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
