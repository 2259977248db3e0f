"""Finite or stop: bad steps are skipped, named, kept and replayed, and a run of them ends; and what counts as a spike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune import train
from surefoot.errors import NumericsError
from surefoot.training.guard import Guard, StepNumbers, is_bad, read
from tests.conftest import ROOT
from tests.runs import NanGradient, logs, quick, tensors, words

NAN, INF = float("nan"), float("inf")


def guard(losses: Sequence[float] = (), **changes: Any) -> Guard:
    made = Guard(max_bad_steps=3, processes=1, **changes)
    for loss in losses:
        made.accept(StepNumbers(loss, 1.0, 10))
    return made


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((1.0, 0.5, 9), None), ((1.0, 0.5, None), None), ((NAN, 0.5, 9), "the loss is nan"), ((1.0, INF, 9), "the gradient norm is inf"),
        ((1.0, NAN, 9), "the gradient norm is nan"), ((NAN, NAN, 0), "no token of the batch is trained"), ((-INF, 1.0, None), "the loss is -inf"),
    ],
)  # fmt: skip
def test_step_when_a_number_is_not_finite_then_says_which(numbers: tuple[float, float, int | None], complaint: str | None) -> None:
    assert StepNumbers(*numbers).complaint() == complaint


def test_step_when_only_the_fp16_scale_overflowed_then_is_the_scalers_business() -> None:
    assert StepNumbers(1.0, INF, 9).complaint(may_overflow=True) is None
    assert StepNumbers(NAN, INF, 9).complaint(may_overflow=True) == "the loss is nan"


def test_numbers_when_measured_then_are_the_windows_sum_and_norm() -> None:
    one = guard()
    for loss in (0.5, 0.25):
        one.collect({}, torch.tensor([0]), torch.tensor(loss), {})
    assert read(one.measure(torch.tensor(2.0), torch.tensor(7), stops=True)) == StepNumbers(0.75, 2.0, 7, stops=True)
    one.window[0] = one.window[0]._replace(loss=torch.tensor(INF))
    one.window[1] = one.window[1]._replace(loss=torch.tensor(-INF))
    assert read(one.measure(2.0, None, stops=False)).complaint() == "the loss is nan"


@pytest.mark.parametrize(
    "numbers", [(1.0, 2.0, 3.0, 0.0), (1.0, 2.0, -1.0, 0.5), (NAN, 2.0, 3.0, 0.0), (1.0, INF, 3.0, 0.0), (1.0, 2.0, 0.0, 0.0)]
)
def test_step_when_judged_on_the_device_then_as_on_the_host(numbers: tuple[float, ...]) -> None:
    measured = torch.tensor(numbers, dtype=torch.float64)
    assert bool(is_bad(measured)) is (read(measured).complaint() is not None)


@pytest.mark.parametrize(
    ("losses", "loss", "is_spike"),
    [
        ([1.0 + 0.01 * (step % 5) for step in range(32)], 1.5, True), ([1.0 + 0.01 * (step % 5) for step in range(32)], 1.05, False),
        ([1.0] * 32, 1.1, False), ([1.0] * 32, 1.2, True), ([1.0] * 15, 100.0, False), ([3.0 - 0.05 * step for step in range(40)], 1.1, False),
        ([1.0, 2.0] * 16, 3.0, False), ([1.0] * 32, 0.1, False),
    ],
    ids=["jump", "usual", "flat_small", "flat_large", "too_early", "falling", "noisy", "fall"],
)  # fmt: skip
def test_loss_when_far_above_the_recent_median_then_is_a_spike(losses: list[float], loss: float, is_spike: bool) -> None:
    text = guard(losses).spike(loss)
    assert (text is not None) is is_spike
    assert text is None or "robust deviations above" in text


def test_rejected_steps_when_broken_by_a_good_one_then_are_counted_anew() -> None:
    one = guard()
    assert [one.reject(step) for step in (1, 2)] == [False, False]
    one.accept(StepNumbers(1.0, 1.0, 5))
    assert [one.reject(step) for step in (4, 5, 6)] == [False, False, True]
    assert one.bad_steps == [1, 2, 4, 5, 6]


def test_guard_when_restored_then_goes_on_counting_unless_it_had_ended_the_run() -> None:
    one, other = guard([0.1, 0.7]), guard()
    one.reject(3)
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one
    for step in (4, 5):
        one.reject(step)
    other.restore(one.state())
    assert (other.in_a_row, other.bad_steps) == (0, [3, 4, 5])


@pytest.fixture
def sick_sdpa(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes transformers' sdpa attention return NaN gradients for batches wider than a number of tokens."""
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def install(width: int) -> None:
        def sick(module: Any, query: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return real(module, NanGradient.apply(query) if query.shape[2] > width else query, *rest, **named)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = sick

    yield install
    ALL_ATTENTION_FUNCTIONS["sdpa"] = real


@pytest.fixture
def rows_with_one_long(rows: Path, tmp_path: Path) -> Path:
    lines = rows.read_text().splitlines()[:23]
    long = {"instruction": "Say five. " * 40, "output": "five"}
    path = tmp_path / "one_long.jsonl"
    path.write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    return path


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_bad_step_when_one_batch_is_sick_then_is_skipped_named_kept_and_replayed(
    sick_sdpa: Callable[[int], None], rows_with_one_long: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], optim: str
) -> None:
    """The fused optimizer skips on the device, and the host hears of it a step later: the logging interval lets it."""
    sick_sdpa(200)
    flags = quick(attn_implementation="sdpa", val_set_size=0, max_steps=3, eval_strategy="no", cutoff_len=512, optim=optim, logging_steps=2)
    folder = train(data_path=rows_with_one_long, output_dir=tmp_path / "run", **flags)
    said = capfd.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    (step,) = record["summary"]["bad_steps"]
    assert f"step {step} skipped: the gradient norm is nan; first in base_model.model.model.layers.3.self_attn.q_proj" in said
    kept = json.loads((folder / f"bad_steps/step-{step}/record.json").read_text())
    assert kept["culprit"]["phase"] == "backward"
    assert f"{rows_with_one_long}:24" in kept["ranks"][0]["rows"]
    assert len(kept["ranks"][0]["rows"]) == 4  # the guilty micro-batch of two, not the whole step
    assert record["summary"]["train_loss"] > 0
    assert all(isinstance(loss, float) for loss in logs(folder, "loss")[1:])
    assert all(torch.isfinite(tensor).all() for tensor in tensors(folder).values())
    import scripts.replay_batch as replay_batch

    results = replay_batch.run(replay_batch.read(folder / f"bad_steps/step-{step}"), "")
    states = {result.backend: result.state for result in results}
    assert states["eager"] == "finite"
    assert states["sdpa_math"] == states["sdpa_flash"] == "not finite"
    text = replay_batch.finding(results, replay_batch.read(folder / f"bad_steps/step-{step}"))
    assert text.startswith("at fault: sdpa_flash, sdpa_math (first in base_model.model.model.layers.3")


SICK_RANK = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
    class NanGradient(torch.autograd.Function):
        forward = staticmethod(lambda context, query: query.clone())
        backward = staticmethod(lambda context, gradient: gradient * float("nan"))
    real, calls = attention["sdpa"], []
    def sick(module, query, *rest, **named):
        calls.append(1)
        query = NanGradient.apply(query) if query.requires_grad and 5 <= len(calls) <= 8 else query
        return real(module, query, *rest, **named)
    attention["sdpa"] = sick
"""


def test_bad_step_when_one_rank_is_sick_then_all_ranks_skip_it(rows: Path, tmp_path: Path) -> None:
    """The second pass of rank 1, by count: the rerun that looks for the cause finds nothing, and the record says so."""
    (tmp_path / "sitecustomize.py").write_text(SICK_RANK)
    flags = words(quick(data_path=rows, output_dir=tmp_path / "run", attn_implementation="sdpa", max_steps=4, eval_strategy="no"))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "profiles/cpu_2proc.yaml"),
        "--main_process_port=29547",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([*launch, str(ROOT / "finetune.py"), *flags], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 2 skipped: the gradient norm is nan; kept in" in done.stdout
    assert json.loads((tmp_path / "run/run.json").read_text())["summary"]["bad_steps"] == [2]
    kept = json.loads((tmp_path / "run/bad_steps.jsonl").read_text())
    assert kept["culprit"] is None
    assert [rank["rank"] for rank in kept["ranks"]] == [0, 1]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "run").values())


@pytest.mark.parametrize(("optim", "logging", "saved"), [("adamw_torch", 1, 5), ("adamw_torch_fused", 1, 5), ("adamw_torch_fused", 100, 6)])
def test_bad_steps_when_too_many_in_a_row_then_stops_with_the_last_good_state(
    sick_sdpa: Callable[[int], None], rows: Path, tmp_path: Path, optim: str, logging: int, saved: int
) -> None:
    """Without a log to wait for, the host hears of a fused step one step later; that step is not taken either."""
    more = {"attn_implementation": "sdpa", "optim": optim, "logging_steps": logging, "save_step": 3, "eval_strategy": "no"}
    good = train(data_path=rows, output_dir=tmp_path / "good", **quick(max_steps=3, **more))
    shutil.copytree(good, tmp_path / "run")
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    sick_sdpa(0)
    with pytest.raises(NumericsError, match=r"step 5: the gradient norm is nan.*2 steps in a row.*replay_batch"):
        train(data_path=rows, output_dir=folder, resume=True, **quick(max_steps=9, max_bad_steps=2, **more))
    last = tensors(folder / f"checkpoint-{saved}")
    assert all(torch.equal(tensor, last[name]) for name, tensor in tensors(folder / "checkpoint-3").items())
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_replay_when_every_backend_gives_it_then_attention_is_not_at_fault(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError):
        train(
            data_path=rows, output_dir=tmp_path / "run", **quick(adapter_name="lora", learning_rate=1e18, max_grad_norm=0, warmup_steps=0)
        )
    (step, *_) = sorted((tmp_path / "run/bad_steps").iterdir())
    done = subprocess.run([sys.executable, str(ROOT / "scripts/replay_batch.py"), str(step)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "attention is not at fault" in done.stdout
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "scripts/replay_batch.py"), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2
    assert "is no kept step" in wrong.stderr


def test_loss_spike_when_it_is_to_stop_then_ends_before_the_step(
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("surefoot.training.guard.SPIKE_HISTORY", 2)
    monkeypatch.setattr("surefoot.training.guard.SPIKE_SCORE", -1e9)
    with pytest.raises(NumericsError, match=r"step 3: loss .* and --loss_spike=stop"):
        train(data_path=rows, output_dir=tmp_path / "run", **quick(loss_spike="stop"))
    assert json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())["global_step"] == 3
