"""The scores themselves: intervals, answers, SARI and ROUGE-L, likelihoods, and batched generation."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surefoot import generate
from surefoot.data import asked, masking, prompts
from surefoot.data.formats import Example, Turn, normalise
from surefoot.data.loading import SourceRow, read_rows
from surefoot.errors import BackendError, DataError
from surefoot.evaluation import answers, harness, intervals, likelihood, texts
from surefoot.generate import Sampling
from tests.conftest import HELDOUT_ROWS, ROOT, SMALL_MODEL


def test_wilson_when_shares_are_extreme_then_stays_inside_and_wider_than_nothing() -> None:
    assert intervals.wilson(178, 400) == pytest.approx((0.3971, 0.4940), abs=1e-4)  # README's demo
    assert intervals.wilson(0, 50)[0] == 0
    assert 0.06 < intervals.wilson(0, 50)[1] < 0.08


def test_paired_difference_when_drawn_often_then_holds_the_truth_19_times_in_20() -> None:
    draw, held = random.Random(0), 0
    for _ in range(1000):
        base = [draw.random() < 0.4 for _ in range(80)]
        trained = [draw.random() < (0.8 if right else 0.3) for right in base]  # share 0.5, correlated with the base
        gap, low, high = intervals.paired_difference(trained, base)
        assert low <= gap <= high
        held += low <= 0.1 <= high
    assert 0.93 < held / 1000 < 0.975


def test_sari_when_given_the_published_example_then_gives_the_published_values() -> None:
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert texts.sari(source, "About 95 you now get in .", references) == pytest.approx(26.9536, abs=1e-4)
    assert texts.sari(source, "About 95 species are now agreed .", references) == pytest.approx(61.7097, abs=1e-4)
    assert texts.sari(source, source, [source]) == 100


def test_rouge_l_when_half_of_the_words_are_in_order_then_is_their_f_measure() -> None:
    assert texts.rouge_l(["the cat sat", "a b"], ["the cat sat", "a x b y"]) == pytest.approx([1.0, 2 * (1.0 * 0.5) / 1.5])


def test_first_match_when_several_answers_stand_there_then_takes_the_first_allowed() -> None:
    assert answers.first_match("Answer9, answer2 or answer1", "ARC-Easy") == "answer2"
    assert answers.first_match("It is True.", "boolq") == "true"
    assert answers.first_match("option3", "winogrande") is None
    assert answers.options("Answer1: x Answer format: answer1/answer2/answer3", "openbookqa") == ("answer1", "answer2", "answer3")


class Small(NamedTuple):
    model: Any
    encoder: masking.Encoder
    prompts: prompts.Prompts


@pytest.fixture(scope="module")
def small() -> Small:
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32).eval()
    return Small(model, masking.make_encoder(tokenizer), prompts.load("alpaca", tokenizer))


def heldout(count: int) -> list[Example]:
    found = [normalise(row, "text") for row in read_rows([str(HELDOUT_ROWS)], "test")[:count]]
    return [one for one in found if isinstance(one, Example)]


def test_answer_scores_when_candidates_differ_in_length_then_are_the_whole_texts_probabilities(small: Small) -> None:
    said = ["the correct answer is answer1", "the correct answer is a very long one", "true"]
    rows = [
        [small.encoder.encode([asked.with_answer(small.prompts, example, text)])[0].ids.tolist() for text in said] for example in heldout(3)
    ]
    found = likelihood.answer_scores(small.model, likelihood.wanted(rows), batch_size=4)
    for index, candidates in enumerate(rows):
        common = next(place for place in range(999) if len({row[place] for row in candidates}) > 1)
        for candidate, score in zip(candidates, found[index], strict=True):
            with torch.no_grad():
                logs = small.model(input_ids=torch.tensor([candidate])).logits[0].log_softmax(-1)
            naive = sum(float(logs[place - 1, candidate[place]]) for place in range(common, len(candidate)))
            assert score == pytest.approx(naive, abs=1e-3)


def test_wanted_when_candidates_differ_in_the_last_token_then_reads_each_row_once() -> None:
    assert len(likelihood.wanted([[(1, 2, 3, 7), (1, 2, 3, 8), (1, 2, 3, 9)], [(5, 1), (5, 2)]])) == 2
    assert len(likelihood.wanted([[(1, 2, 7), (1, 2, 8, 9)]])) == 2


def test_batches_when_one_row_is_long_then_hold_few_logits() -> None:
    jobs = [
        likelihood.Wanted((1,) * length, ((length, 5, (row, 0)),))
        for row, length in enumerate([1100, *[100 + row % 7 for row in range(600)]])
    ]
    found = list(likelihood.batches(jobs, 512))
    assert [len(batch) for batch in found] == [16, 512, 73]
    assert sum(map(len, found)) == len(jobs)
    assert all(len(batch) * (len(batch[0].ids) - min(job.first for job in batch)) <= likelihood.POSITIONS for batch in found)


def test_trained_loss_when_summed_then_is_the_models_own_loss(small: Small) -> None:
    rendered = [small.prompts.render(example) for example in heldout(5)]
    rows = small.encoder.encode([one for one in rendered if isinstance(one, prompts.Rendered)])
    for row, (loss, count) in zip(rows, likelihood.trained_loss(small.model, rows, batch_size=3), strict=True):
        ids = torch.tensor([row.ids.tolist()])
        labels = torch.where(torch.tensor([row.trained.tolist()]), ids, -100)
        with torch.no_grad():
            assert loss / count == pytest.approx(float(small.model(input_ids=ids, labels=labels).loss), abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=12), Sampling(max_new_tokens=6, num_beams=3)])
def test_complete_when_batched_then_says_what_each_prompt_gets_alone(small: Small, sampling: Sampling) -> None:
    rows = [asked.before_answer(small.prompts, example) for example in heldout(6)]
    ids = [one.ids.tolist()[-40 - 7 * number :] for number, one in enumerate(small.encoder.encode(rows))]
    ends = [small.encoder.tokenizer.eos_token_id]
    together = generate.complete(small.model, ids, sampling, ends, batch_size=4)
    assert together == [generate.complete(small.model, [one], sampling, ends)[0] for one in ids]
    assert any(together)


def test_before_answer_when_rendered_then_is_what_training_put_before_it(small: Small) -> None:
    chat = prompts.load("chat", small.encoder.tokenizer)
    talk = asked.conversation([("user", "Hi"), ("assistant", "Hello there"), ("user", "Bye")], system="Be brief")
    whole = Example(
        format="messages", where="row", columns={}, turns=(*talk.turns[:-1], Turn("assistant", "See you", True))
    )  # fmt: skip
    for style, example in ((small.prompts, heldout(1)[0]), (chat, whole)):
        rendered = style.render(example)
        assert isinstance(rendered, prompts.Rendered)
        before = asked.before_answer(style, example)
        assert before.text == rendered.text[: rendered.trained[-1][0]]
        assert rendered.text[len(before.text) :].startswith(example.turns[-1].text)
    assert asked.before_answer(chat, talk) == asked.before_answer(chat, whole)


def test_question_when_the_row_has_an_answer_then_does_not_show_it() -> None:
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "SECRET"}]}
    for columns in (row, {"instruction": "Who?", "input": "", "output": "SECRET"}, {"prompt": "Who?", "completion": "SECRET"}):
        assert "SECRET" not in str(asked.question(SourceRow(columns, "row 1")).turns)
    with pytest.raises(DataError, match="row 1: no question: the row has columns text"):
        asked.question(SourceRow({"text": "x"}, "row 1"))


def test_lm_eval_when_not_installed_then_says_how_to_get_it(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendError, match="pip install"):
        harness.run(small.model, small.encoder.tokenizer, ["arc_easy"], folder=None, batch_size=4, limit=1)


def test_mean_when_values_vary_then_has_the_normal_interval() -> None:
    centre, low, high = intervals.mean([1.0, 2.0, 3.0, 4.0])
    assert centre == 2.5
    assert high - centre == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-3) == centre - low


def test_evaluate_when_rouge_score_is_missing_then_says_so_before_a_model_is_opened(tmp_path: Path) -> None:
    for file in SMALL_MODEL.glob("*.json"):  # a model without weights: opening it would be another error
        shutil.copy(file, tmp_path)
    code = "import runpy, sys; sys.modules['rouge_score'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = ["scripts/evaluate.py", f"--base_model={tmp_path}", f"--data_path={HELDOUT_ROWS}", "--metrics=rougeL"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5
    assert "--metrics=rougeL needs rouge_score" in done.stderr
