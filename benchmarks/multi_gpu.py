"""multi_gpu.py: tokens per second and GPU of finetune.py under DDP, ZeRO-2, ZeRO-3 and FSDP2, against one GPU at the same work a GPU.

python benchmarks/multi_gpu.py --out=benchmarks/results/multi_gpu_h200.json --processes=2 --time_limit_s=560   # on a machine with 2 GPUs
python benchmarks/multi_gpu.py --out=FILE --processes=2 --tiny                                                  # two processes on a CPU

DoRA on Llama-3.1-8B's shape with random weights, 4 rows of 2,048 tokens a GPU and step, no accumulation. Every run is finetune.py under
profiles/ENGINE.yaml as a user starts it, once with the fused layers and once with PEFT's (--fused_adapters=False --fused_loss=False), read
from its own metrics.jsonl: tokens of a step over the median seconds a step behind --warmup, read every four steps. `single` is one such run
on every GPU at the same time, since GPUs differ (each_gpu) and share a host; `ratio` is to its mean, at the same layers and stage. --out is
written after every run; the next call, also with other --processes, --engines, --stages or --rounds, runs what is missing.
Needs deepspeed: DS_BUILD_OPS=0 pip install deepspeed.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from speed_run import ROOT, Setting, environment, figures, flags_of, inputs, last_error, ours
from speed_works import Work

PROFILES = {"single": "single", "ddp": "ddp", "zero2": "ds_zero2", "zero3": "ds_zero3", "fsdp2": "fsdp2"}
LAYERS = {"fused": [], "peft": ["--fused_adapters=False", "--fused_loss=False"]}
EXPECTED_S = 100  # a run's wall time before one of its kind was seen


class Case(NamedTuple):
    engine: str
    processes: int
    layers: str
    stage: int
    round: int


def bench(
    out: str, *, processes: int = 2, engines: Any = tuple(PROFILES), layers: Any = tuple(LAYERS), stages: Any = 3, rounds: int = 1,
    steps: int = 20, warmup: int = 4, tiny: bool = False, work: str = "/tmp/surefoot-speed", time_limit_s: float = 1e9,
    run_limit_s: float = 400, flags: str = "",
) -> None:  # fmt: skip
    """Runs what --out lacks.

    Args:
        engines, layers, stages: names or numbers with commas between them.
        time_limit_s: no run is started that would not be done by then.
        flags: more of finetune.py's, for every run.
    """
    began = time.perf_counter()
    setting = Setting(
        data=Path(), tokenizer=ROOT / "examples/small_model", work=Path(work).resolve(), tiny=tiny, steps=steps, warmup=warmup,
        run_limit_s=run_limit_s, peer_path="", ours_flags=tuple(flags.split()),
    )  # fmt: skip
    setting.work.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(Path(out).read_text())["runs"] if Path(out).is_file() else []
    wanted = _cases(processes, engines, layers, stages, rounds)
    runs = [one for one in earlier if "error" not in one or _case(one) not in wanted]  # what failed is tried again
    done = {_case(one) for one in runs}
    for case in [case for case in wanted if case not in done]:
        expected = max([one["wall_s"] for one in runs if one["engine"] == case.engine], default=EXPECTED_S)
        if time.perf_counter() - began + expected > time_limit_s:
            print("multi_gpu.py: the time limit is near; the same command goes on from here", flush=True)
            break
        runs.append(_run(setting, case))
        print(json.dumps({name: value for name, value in runs[-1].items() if name != "windows"}), flush=True)
        _write(out, setting, runs)


def _case(run: dict[str, Any]) -> Case:
    return Case(*(run[name] for name in Case._fields))


def _cases(processes: int, engines: Any, layers: Any, stages: Any, rounds: int) -> list[Case]:
    return [
        Case(engine, processes, kind, int(stage), number)
        for number in range(1, rounds + 1)
        for stage in _names(stages)
        for kind in _names(layers)
        for engine in _names(engines)
    ]


def _names(given: Any) -> list[str]:
    """Fire makes a tuple of words with commas between them."""
    return [str(one) for one in given] if isinstance(given, (tuple, list)) else str(given).split(",")


def _run(setting: Setting, case: Case) -> dict[str, Any]:
    """One launch, or one on each GPU: its speed, memory and what ran, or its error."""
    given, env = inputs(setting, _work(setting), case.processes), _env(setting, case.processes)
    launch = partial(_launch, setting, case._replace(processes=1) if case.engine == "single" else case, given, env)
    began, now = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    gpus = _gpus(setting, case.processes)
    with ThreadPoolExecutor(case.processes) as pool:
        each = list(pool.map(launch, gpus if case.engine == "single" else [",".join(gpus)], range(case.processes)))
    row = {
        **case._asdict(),
        "date": now,
        "wall_s": round(time.perf_counter() - began, 1),
        **next((one for one in each if "error" in one), each[0]),
    }
    if "error" in row or case.engine != "single":
        return row
    rates = [one["tokens_per_s"] for one in each]
    mean = {"tokens_per_s": round(sum(rates), 1), "tokens_per_s_per_gpu": round(statistics.mean(rates), 1)}
    return row | mean | {"each_gpu": rates}


def _launch(setting: Setting, case: Case, given: tuple[Path, Path], env: dict[str, str], gpus: str, copy: int) -> dict[str, Any]:
    """finetune.py under the engine's profile on `gpus` (names with commas between them)."""
    work, (model, rows) = _work(setting), given
    folder = setting.work / f"multi_{copy}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"profiles/{PROFILES[case.engine]}.yaml")]
    command += [] if case.engine == "single" else ["--num_processes", str(case.processes), "--main_process_port", "0"]
    command += [str(ROOT / "finetune.py"), f"--base_model={model}", f"--data_path={rows / 'rows.jsonl'}", f"--output_dir={folder}"]
    words = [word for word in flags_of(work, case.stage) if not word.startswith("--batch_size=")]
    words += [f"--batch_size={work.rows * case.processes}", f"--max_steps={setting.steps}", *LAYERS[case.layers], *setting.ours_flags]
    code, output = _finished([*command, *words], env | {"CUDA_VISIBLE_DEVICES": gpus.strip(",")}, setting.run_limit_s)
    if code != 0:
        return {"flags": words, "error": last_error(output.partition("torch/distributed/elastic")[0], code)}  # behind it the launcher's own
    record = json.loads((folder / "run.json").read_text())
    found = figures(ours(folder), setting.warmup)
    return {
        "flags": words,
        "engine_live": record["summary"]["engine"],
        "attention": record["plan"]["model"]["attn_implementation"],
        "compiled": record["plan"]["model"]["enable_torch_compile"],
        "fused": record["plan"]["model"]["fused_adapters"],
        **found,
        "tokens_per_s_per_gpu": round(found["tokens_per_s"] / case.processes, 1),
    }


def _finished(command: list[str], env: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Exit code and output; on SIGTERM the launcher ends its processes, which are in sessions of their own."""
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            output, _ = launcher.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            launcher.communicate()
            return 124, f"not done after {limit_s:.0f} s"
    return launcher.returncode, output


def _gpus(setting: Setting, processes: int) -> list[str]:
    """The first of those that are visible; on a CPU as many that are not there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in (visible or "").split(",") if name] if visible is not None else [str(index) for index in range(64)]
    return [""] * processes if setting.tiny else names[:processes]


def _env(setting: Setting, processes: int) -> dict[str, str]:
    """Threads for what is done on the host: accelerate would leave each process one."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return env | ({} if setting.tiny else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))})


def _work(setting: Setting) -> Work:
    return Work(method="dora").tiny() if setting.tiny else Work(method="dora")


def _write(out: str, setting: Setting, runs: list[dict[str, Any]]) -> None:
    """The JSON: machine and versions, of each kind of run the median with its ratio, and the runs."""
    result = {
        "work": f"{_work(setting).label()} a GPU and step, {setting.steps} steps, the first {setting.warmup} left out",
        "environment": environment(setting, is_peer=False),
        "medians": medians(runs),
        "runs": runs,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each engine, number of processes, layers and stage: tokens/s and GPU, the ratio to single, and peak memory of rank 0."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kind in dict.fromkeys((one["engine"], one["processes"], one["layers"], one["stage"]) for one in runs):
        mine = [one for one in runs if (one["engine"], one["processes"], one["layers"], one["stage"]) == kind and "error" not in one]
        if mine:
            found[kind] = {
                **dict(zip(("engine", "processes", "layers", "stage"), kind, strict=True)),
                "rounds": len(mine),
                "tokens_per_s_per_gpu": statistics.median(one["tokens_per_s_per_gpu"] for one in mine),
                "peak_memory_gib": statistics.median(one["peak_memory_gib"] for one in mine),
            }
    for (_, processes, layers, stage), row in found.items():
        alone = found.get(("single", processes, layers, stage))
        row["ratio"] = round(row["tokens_per_s_per_gpu"] / alone["tokens_per_s_per_gpu"], 4) if alone else None
    return list(found.values())


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
