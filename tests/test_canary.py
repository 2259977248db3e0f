"""The attention canary: right kernels pass, wrong, crashing and hanging ones are caught, and the answer is kept."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from surefoot import verdicts
from surefoot.attention import canary, kernels, reference
from surefoot.attention.canary import Case
from surefoot.verdicts import Shape, Verdicts
from tests.conftest import machine
from tests.runs import NanGradient

SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, dtype="fp32", length=64, rows=2)
CPU = torch.device("cpu")
RUNS_ON_CPU = ("eager", "sdpa_flash", "sdpa_math")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return machine(cache_dir=str(tmp_path_factory.mktemp("cache")), cpu_name="test")


@pytest.fixture(scope="module")
def found(here: Any) -> Verdicts:
    return verdicts.ask(here, SHAPE, ("eager", "sdpa_math", "sdpa_flash", "sdpa_cudnn"))


def test_canary_when_run_on_this_cpu_then_right_kernels_pass_and_absent_ones_say_so(found: Verdicts) -> None:
    assert all(found.passes(backend, verdicts.MASKS) for backend in RUNS_ON_CPU)
    cudnn = found.of("sdpa_cudnn", "causal")
    assert cudnn is not None
    assert (cudnn.state, cudnn.reason) == ("unavailable", "torch has no such kernel for this case")
    assert all((verdict.error or 0) < 1e-4 for verdict in found.rows)
    assert all((verdict.milliseconds or 0) > 0 for verdict in found.rows if verdict.state == "pass")


def test_verdicts_when_asked_again_then_come_from_the_kept_file(here: Any, found: Verdicts) -> None:
    again = verdicts.ask(here, SHAPE, ("eager", "sdpa_math", "sdpa_flash", "sdpa_cudnn"))
    assert again.rows == found.rows
    assert "kept in" in again.origin
    other = dataclasses.replace(here, versions={**here.versions, "torch": "9.9"})
    assert verdicts.known(other, SHAPE, ("eager", "sdpa_math", "sdpa_flash", "sdpa_cudnn")) is None


def test_kept_verdicts_when_damaged_then_are_not_used(here: Any, found: Verdicts, tmp_path: Path) -> None:
    damaged = dataclasses.replace(here, cache_dir=str(tmp_path))
    path = verdicts._path(damaged, SHAPE, ("eager",))
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found.as_record())[:-40])
    assert verdicts.known(damaged, SHAPE, ("eager",)) is None
    said: list[str] = []
    assert verdicts.ask(damaged, SHAPE, ("eager",), say=said.append).passes("eager", verdicts.MASKS)
    assert said == [f"attention canary: {path} is damaged, made again"]
    assert verdicts.known(damaged, SHAPE, ("eager",)) is not None


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", RUNS_ON_CPU)
def test_backend_when_judged_in_each_dtype_then_passes_every_case(backend: str, dtype: str) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    for case in canary.cases(shape, 192):
        verdict = canary.judge(backend, case, shape, CPU)
        assert verdict.state == "pass", verdict.reason


BREAKS = {
    "a_nan_in_one_value": lambda output: output.index_put((torch.tensor(0), torch.tensor(3), torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan"))),
    "one_head_scaled": lambda output: output * torch.tensor([1.0, 1.0, 1.001, 1.0])[None, None, :, None],
    "one_head_zero": lambda output: output * torch.tensor([1.0, 0.0, 1.0, 1.0])[None, None, :, None],
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_kernel_when_one_head_is_wrong_then_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *given: BREAKS[name](real(*given)))
    verdict = next(canary.verdicts("eager", SHAPE, CPU))
    assert verdict.state == "fail"
    assert ("non-finite" in verdict.reason) is (name == "a_nan_in_one_value")


def test_kernel_when_only_its_gradient_is_nan_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN 9.19 does: the forward pass is right."""

    real = kernels.run
    monkeypatch.setattr(kernels, "run", lambda backend, case, query, *rest: real(backend, case, NanGradient.apply(query), *rest))
    assert "non-finite values in the query gradient" in next(canary.verdicts("eager", SHAPE, CPU)).reason


def test_kernel_when_it_ignores_the_borders_of_packed_rows_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in canary.cases(SHAPE, 192) if case.mask == "packed")
    real = kernels.run
    monkeypatch.setattr(
        kernels, "run", lambda backend, given, *rest: real(backend, dataclasses.replace(given, mask="causal", lens=(64,)), *rest)
    )
    assert canary.judge("sdpa_math", case, SHAPE, CPU).state == "fail"


def test_reference_when_left_padded_then_padding_sees_nothing_and_is_not_judged() -> None:
    case = Case(mask="explicit", length=16, lens=(16, 5), is_left=True)
    assert reference.allowed(case, CPU)[1, :11].sum() == 0
    assert reference.real(case, CPU).sum().item() == 21


CRASH = """
import os, time
from surefoot.attention import kernels
real = kernels.run
def run(backend, *given):
    if backend == "sdpa_flash":
        {how}
    return real(backend, *given)
kernels.run = run
"""


@pytest.fixture
def broken_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts code that runs when a child's Python starts before the canary's."""

    def install(how: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(CRASH.format(how=how))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(verdicts.__file__).parent.parent)]))

    return install


@pytest.mark.parametrize(
    ("how", "reason"), [("os.abort()", "ended its process"), ("time.sleep(60)", "did not return within 12 s")], ids=["crashes", "hangs"]
)
def test_kernel_when_it_takes_its_process_down_then_fails_and_the_others_are_still_judged(
    broken_child: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, reason: str
) -> None:
    broken_child(how)
    monkeypatch.setattr(verdicts, "TIMEOUT_S", 12.0 if "sleep" in how else 60.0)
    found = verdicts.ask(machine(cache_dir=str(tmp_path / "cache"), cpu_name="test"), SHAPE, ("eager", "sdpa_flash", "sdpa_math"))
    flash = found.of("sdpa_flash", "causal")
    assert flash is not None
    assert flash.state == "fail"
    assert reason in flash.reason
    assert found.passes("eager", verdicts.MASKS)
    assert found.passes("sdpa_math", verdicts.MASKS)
