"""The support matrix says nothing that no test runs: its tests exist and run its cells, its page is today's, and the plan refuses from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from surefoot import support
from surefoot.config import Config
from surefoot.errors import PlanError
from surefoot.plan import make_plan
from surefoot.support import Cell, Cells
from tests.conftest import H200, ROOT, inputs, machine

ENGINES = {
    "single": {}, "ddp": {"engine": "ddp"}, "zero2": {"engine": "deepspeed", "zero_stage": 2}, "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "fsdp2": {"engine": "fsdp"},
}  # fmt: skip


def test_matrix_when_a_cell_says_tested_then_its_test_is_collected_with_it() -> None:
    files = sorted({test.name.partition("::")[0] for test in support.TESTS})
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    collected = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout.splitlines()
    claimed = [f"{test.name}[{cell}]" for test in support.TESTS for cell in support.cells_of(test.name)]
    assert len(claimed) > 20
    assert sorted(set(claimed) - set(collected)) == []


def test_page_when_the_matrix_changes_then_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import support_table

    assert support_table.DOC.read_text() == support_table.document(), "python scripts/support_table.py"


def test_matrix_when_read_then_every_cell_has_one_verdict_and_refusals_a_way_out() -> None:
    states = {cell: support.verdict(cell).state for cell in support.every_cell()}
    assert len(states) == 4 * 3 * 6 * 2 * 2
    assert {"refused", "untested"} <= set(states.values()) <= {"tested", "refused", "untested"}
    assert all(one.reason and one.way_out for one in support.REFUSED)
    for test in support.TESTS:
        device = "gpu" if "gpu" in test.name else "cpu"
        assert [cell for cell in support.cells_of(test.name) if support.refusal(cell, device)] == [], test.name


def planned(cell: Cell, device: str) -> object:
    flags = {
        "base_model": "org/model", "adapter_name": cell.method, "load_4bit": cell.quantization == "nf4", "load_8bit": cell.quantization == "int8",
        "enable_torch_compile": cell.compiles, "packing": cell.packs, "bf16": False,
    }  # fmt: skip
    world = 1 if cell.engine == "single" else 2
    gpus = (H200,) * world if device == "gpu" else ()
    on = machine(gpus=gpus, world_size=world, local_world_size=world, **ENGINES[cell.engine])
    return make_plan(Config.parse(flags), on, inputs())


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_plan_when_asked_for_any_cell_then_does_what_the_matrix_says(device: str) -> None:
    for cell in Cells(engines=tuple(ENGINES)):
        refused = support.refusal(cell, device)
        if refused is not None:
            with pytest.raises(PlanError) as caught:
                planned(cell, device)
            assert refused.reason in str(caught.value)
            continue
        untested = [note for note in planned(cell, device).notes if "docs/support.md" in note]  # type: ignore[attr-defined]
        assert bool(untested) == (support.verdict(cell).state == "untested")
