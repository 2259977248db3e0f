"""Every profile for real, with two processes on a CPU: the engine that it names, fp32 masters, and one process's losses and adapter.

On GPUs: CUDA_VISIBLE_DEVICES=0,1 python -m pytest -o addopts= -m gpu tests/test_engines.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import train
from surefoot import support
from surefoot.support import Cell
from tests.conftest import ROOT, TRAIN_ROWS
from tests.runs import logs, quick, tensors, words

NAMES = {"zero2": "ds_zero2", "zero3": "ds_zero3"}  # profiles that are not called as their engine
LIVE = {
    "ddp": ("MULTI_GPU" if torch.cuda.is_available() else "MULTI_CPU", None),
    "zero2": ("DEEPSPEED", 2),
    "zero3": ("DEEPSPEED", 3),
    "fsdp2": ("FSDP", None),
}
LOSS_BAND = 2e-4  # of losses near 4, over six steps
ADAPTER_BAND = 2e-3  # of a tensor's largest element: Adam's first steps have the size of the rate, however small a gradient is
TWO = "tests/test_engines.py::test_cell_when_two_processes_run_it_then_losses_and_adapter_are_those_of_one"
ONE = "tests/test_engines.py::test_cell_when_one_process_runs_it_then_learns"
GPU = "tests/test_engines.py::test_cell_when_a_gpu_runs_it_then_learns"
TWO_GPUS = "tests/test_engines.py::test_cell_when_two_gpus_run_it_then_losses_and_adapter_are_those_of_one"


def flags_of(cell: Cell) -> dict[str, Any]:
    """Two rows a pass and process; a step takes four passes of one process or two of two, packed or not: the same batch."""
    return quick(
        adapter_name=cell.method, load_4bit=cell.quantization == "nf4", load_8bit=cell.quantization == "int8", packing=cell.packs,
        enable_torch_compile=cell.compiles, per_device_train_batch_size=2, save_step=6, eval_step=6, bf16=False,
        **({"pack_len": 200, "cutoff_len": 200} if cell.packs else {}), **({"learning_rate": 2e-4} if cell.method == "full" else {}),
    )  # fmt: skip


def launch(
    profile: str, given: list[str], *, processes: int | None = 2, script: str = "finetune.py", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """accelerate launch with a profile, as a user types it."""
    command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / f"profiles/{profile}.yaml", "--main_process_port", 0]
    command += [] if processes is None else ["--num_processes", processes]
    line = [sys.executable, *map(str, command), str(ROOT / script), *given]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **(env or {})}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=570)


def why(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed said, without the launcher's own words."""
    return done.stderr.partition("torch/distributed/elastic")[0][-3000:]


@pytest.fixture(scope="session")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """The run of one process that a cell is compared with, made once."""
    made: dict[Cell, Path] = {}

    def run(cell: Cell) -> Path:
        single = cell._replace(engine="single")
        if single not in made:
            made[single] = train(data_path=rows, output_dir=tmp_path_factory.mktemp(str(single)) / "run", **flags_of(single))
        return made[single]

    return run


def check(folder: Path, cell: Cell, other: Path) -> None:
    """The engine that ran, and losses and adapter against another run's."""
    record = json.loads((folder / "run.json").read_text())
    distributed, stage = LIVE[cell.engine]
    assert record["summary"]["engine"] == {"strategy": cell.engine, "distributed_type": distributed, "processes": 2, "zero_stage": stage}
    assert logs(folder, "loss") == pytest.approx(logs(other, "loss"), abs=LOSS_BAND)
    assert record["summary"]["eval_loss"] == pytest.approx(
        json.loads((other / "run.json").read_text())["summary"]["eval_loss"], abs=LOSS_BAND
    )
    if cell.method == "full":
        return
    mine, theirs = tensors(folder), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32
        assert float((tensor - theirs[name]).abs().max()) <= ADAPTER_BAND * float(theirs[name].abs().max()), name


def run_two(profile: str, cell: Cell, rows: Path, folder: Path, alone: Callable[[Cell], Path], processes: int | None = 2) -> None:
    """One launch of a profile for a cell, checked against one process."""
    done = launch(profile, words({**flags_of(cell), "data_path": rows, "output_dir": folder}), processes=processes)
    assert done.returncode == 0, why(done)
    check(folder, cell, alone(cell))


@pytest.fixture(scope="session")
def of_two(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], Path]:
    """The run of two processes of a cell: one launch makes those of all cells of its engine."""
    home = tmp_path_factory.mktemp("two")
    launched: dict[str, str] = {}

    def run(cell: Cell) -> Path:
        if cell.engine not in launched:
            cells = [one for one in support.cells_of(TWO) if one.engine == cell.engine]
            todo = [{**flags_of(one), "data_path": str(rows), "output_dir": str(home / str(one))} for one in cells]
            (home / f"{cell.engine}.json").write_text(json.dumps(todo, default=str))
            done = launch(NAMES.get(cell.engine, cell.engine), [str(home / f"{cell.engine}.json")], script="tests/engine_cells.py")
            launched[cell.engine] = why(done)
        assert (home / str(cell) / "adapter_model.safetensors").exists() or cell.method == "full", launched[cell.engine]
        return home / str(cell)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("cell", support.cells_of(TWO), ids=str)
def test_cell_when_two_processes_run_it_then_losses_and_adapter_are_those_of_one(
    cell: Cell, of_two: Callable[[Cell], Path], alone: Callable[[Cell], Path]
) -> None:
    check(of_two(cell), cell, alone(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", support.cells_of(ONE), ids=str)
def test_cell_when_one_process_runs_it_then_learns(cell: Cell, alone: Callable[[Cell], Path]) -> None:
    losses = logs(alone(cell), "loss")
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("cell", support.cells_of(GPU), ids=str)
def test_cell_when_a_gpu_runs_it_then_learns(cell: Cell, alone: Callable[[Cell], Path]) -> None:
    losses = logs(alone(cell), "loss")
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("cell", support.cells_of(TWO_GPUS), ids=str)
def test_cell_when_two_gpus_run_it_then_losses_and_adapter_are_those_of_one(
    cell: Cell, rows: Path, tmp_path: Path, alone: Callable[[Cell], Path]
) -> None:
    run_two(NAMES.get(cell.engine, cell.engine), cell, rows, tmp_path / "run", alone)


def test_fsdp2_when_two_processes_train_dora_then_is_as_one(rows: Path, tmp_path: Path, alone: Callable[[Cell], Path]) -> None:
    cell = Cell("dora", "none", "fsdp2", False, False)
    run_two("fsdp2", cell, rows, tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["single", "cpu"])
def test_profile_when_it_is_of_one_process_then_runs_one(profile: str, rows: Path, tmp_path: Path, alone: Callable[[Cell], Path]) -> None:
    cell = Cell("dora", "none", "single", False, False)
    done = launch(profile, words({**flags_of(cell), "data_path": rows, "output_dir": tmp_path / "run"}), processes=None)
    assert done.returncode == 0, why(done)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["summary"]["engine"] == {"strategy": "single", "distributed_type": "NO", "processes": 1, "zero_stage": None}
    assert logs(tmp_path / "run", "loss") == logs(alone(cell), "loss")


@pytest.mark.parametrize(("processes", "env", "code"), [(2, {}, 2), (None, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 0)])
def test_profile_of_one_when_several_are_asked_for_then_refuses_in_one_line(
    processes: int | None, env: dict[str, str], code: int, tmp_path: Path
) -> None:
    """accelerate starts one without a word; an address that was there before, as under SLURM, asks for nothing."""
    flags = words(quick(data_path=TRAIN_ROWS, output_dir=tmp_path / "run", dry_run=True))
    done = launch("cpu", flags, processes=processes, env=env)
    said = [line for line in done.stderr.splitlines() if line.startswith("finetune.py: ")]
    assert (f"non-zero exit status {code}" in done.stderr) == bool(code), done.stderr
    assert len(said) == bool(code)
    assert not said or said[0].startswith("finetune.py: accelerate was asked for several processes and started one")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_cpu_2proc_when_launched_without_a_number_then_runs_two(
    method: str, rows: Path, tmp_path: Path, alone: Callable[[Cell], Path]
) -> None:
    cell = Cell(method, "none", "ddp", False, False)
    run_two("cpu_2proc", cell, rows, tmp_path / "run", alone, processes=None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_zero3_when_offloaded_then_is_as_one(method: str, rows: Path, tmp_path: Path, alone: Callable[[Cell], Path]) -> None:
    cell = Cell(method, "none", "zero3", False, False)
    run_two("ds_zero3_offload", cell, rows, tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "optim", "clips", "logging"),
    [("zero2", "auto", 0, 1), ("zero2", "auto", 1, 100), ("zero3", "auto", 1, 100), ("fsdp2", "auto", 0, 1), ("fsdp2", "adamw_torch_fused", 1, 100)],
)  # fmt: skip
def test_step_when_it_is_not_finite_under_an_engine_then_all_end_with_4(
    engine: str, optim: str, clips: int, logging: int, rows: Path, tmp_path: Path
) -> None:
    """FSDP2 skips the step and keeps it with the whole adapter; DeepSpeed has used it when it is judged, with or without a log to wait for."""
    flags = {**flags_of(Cell("dora", "none", engine, False, False)), "learning_rate": 1e30, "max_grad_norm": clips, "warmup_steps": 0}
    flags |= {"optim": optim, "logging_steps": logging, "max_bad_steps": 1, "data_path": rows, "output_dir": tmp_path / "run"}
    done = launch(NAMES.get(engine, engine), words(flags))
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["4", "4"], why(done)
    assert done.stderr.count("finetune.py: step 2: the ") == 1
    assert (tmp_path / "run/bad_steps/step-2/adapter_model.safetensors").exists() == (engine == "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_evaluation_when_it_comes_in_between_then_dropout_is_off_in_it_and_on_behind_it(engine: str, rows: Path, tmp_path: Path) -> None:
    flags = {**flags_of(Cell("dora", "none", engine, False, False)), "lora_dropout": 0.5, "data_path": str(rows)}
    runs = {
        "plain": {"eval_strategy": "no"},
        "evaluated": {"eval_strategy": "steps", "eval_step": 2},
        "again": {"eval_strategy": "steps", "eval_step": 3},
    }
    (tmp_path / "runs.json").write_text(
        json.dumps([flags | {"output_dir": str(tmp_path / name)} | more for name, more in runs.items()], default=str)
    )
    done = launch(NAMES.get(engine, engine), [str(tmp_path / "runs.json")], script="tests/engine_cells.py")
    assert done.returncode == 0, why(done)
    assert logs(tmp_path / "plain", "loss") == logs(tmp_path / "evaluated", "loss") == logs(tmp_path / "again", "loss")
    assert logs(tmp_path / "evaluated", "eval_loss")[-1] == logs(tmp_path / "again", "eval_loss")[-1], "no dropout, hence the same twice"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_host_when_a_step_is_neither_logged_nor_saved_then_waits_for_nothing(engine: str, rows: Path, tmp_path: Path) -> None:
    flags = {**flags_of(Cell("dora", "none", engine, False, False)), "optim": "adamw_torch_fused", "logging_steps": 100, "val_set_size": 0}
    flags |= {"data_path": rows, "output_dir": tmp_path / "run", "save_step": 100}
    done = launch(NAMES.get(engine, engine), words(flags), script="tests/engine_waits.py", env={"WAITS": str(tmp_path / "waits")})
    assert done.returncode == 0, why(done)
    assert json.loads((tmp_path / "waits").read_text()) == ["watched"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_masters_when_an_engine_trains_in_bf16_then_are_fp32_in_forward_gradient_and_optimizer(
    engine: str, rows: Path, tmp_path: Path
) -> None:
    """Also: what ZeRO-3 and FSDP2 keep between the steps is a part, a layer has it whole, and norms are made once a step."""
    flags = {**flags_of(Cell("dora", "none", engine, False, False)), "bf16": True, "use_gradient_checkpointing": True}
    flags |= {"data_path": rows, "output_dir": tmp_path / "run", "val_set_size": 0, "max_steps": 3, "warmup_steps": 0}
    done = launch(NAMES.get(engine, engine), words(flags), script="tests/engine_probe.py", env={"PROBE": str(tmp_path / "probe")})
    assert done.returncode == 0, why(done)
    probes = [json.loads((tmp_path / f"probe.{rank}").read_text()) for rank in range(2)]
    for probe in probes:
        base = probe["tensors"].pop("base_layer")
        assert base == {"forward": "torch.bfloat16", "shape": [256, 256]}
        for kind, seen in probe["tensors"].items():
            assert {seen[what] for what in ("forward", "gradient", "master", "moment")} == {"torch.float32"}, kind
            assert seen["moves"], kind
        made = [probe["norms"][str(step)] for step in range(3)]
        assert made == [1, 1, 1], "of each step, though it has two passes, and each layer runs twice in each"
    kept = [probe["tensors"]["lora_B"]["kept"] for probe in probes]
    assert kept == ([512, 512] if engine in ("zero3", "fsdp2") else [1024, 1024])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_layers_when_they_recompute_without_down_then_losses_and_adapter_are_the_same(engine: str, rows: Path, tmp_path: Path) -> None:
    runs = {f"{method}-{again}": flags_of(Cell(method, "none", engine, False, False)) for method in ("lora", "dora") for again in (0, 1)}
    common = {"data_path": str(rows), "val_set_size": 0}
    todo = [
        {**flags, **common, "output_dir": str(tmp_path / name), "use_gradient_checkpointing": name[-1] == "1"}
        for name, flags in runs.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(todo, default=str))
    done = launch(NAMES.get(engine, engine), [str(tmp_path / "runs.json")], script="tests/engine_cells.py")
    assert done.returncode == 0, why(done)
    for method in ("lora", "dora"):
        plain, again = (tmp_path / f"{method}-{number}" for number in (0, 1))
        planned = [json.loads((folder / "run.json").read_text())["plan"]["model"]["spares_down"] for folder in (plain, again)]
        assert planned == [False, True]
        assert "recompute without down_proj in 4 layers" in json.loads((again / "backend.json").read_text())["kernels"]
        assert logs(again, "loss") == logs(plain, "loss")
        assert all(torch.equal(tensor, tensors(plain)[name]) for name, tensor in tensors(again).items())
