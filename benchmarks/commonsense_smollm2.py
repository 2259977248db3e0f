"""commonsense_smollm2.py: does a fine-tuned SmolLM2-135M answer better, and do the fused path and stock PEFT's layers agree?

python benchmarks/commonsense_smollm2.py --model=models/smollm2 --data=shared/data/commonsense \\
    --out=benchmarks/results/commonsense_smollm2_h200.json --time_limit_s=520     # again until it says that nothing is missing
python benchmarks/commonsense_smollm2.py --model=examples/small_model --data=... --out=FILE --rows=400 --test_rows=40 --seeds=1,2  # a CPU

One epoch on the 147,580 commonsense rows for each of ours and peft x LoRA and DoRA x the seeds, every run a real finetune.py; then
scripts/evaluate.py on the test sets (all that --data holds), by generation and by log-likelihood, and once on the untrained model.
--out is written after every run, and the next call does what is missing. A training that the time limit stops saves a checkpoint (it gets
GRACE_S for that), and goes on from it while --work is there; one that is killed goes on from its last. An evaluation begins again.
--at_once runs share the GPU: one alone leaves it idle between the small model's kernels.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PATHS = {"ours": [], "peft": ["--fused_adapters=False", "--fused_loss=False", "--packing=False", "--group_by_length=True"]}
METHODS, SCORINGS = ("lora", "dora"), ("generate", "loglikelihood")
COMMON = (
    "--num_epochs=1 --lora_r=32 --lora_alpha=64 --lora_dropout=0 --learning_rate=1e-3 --lr_scheduler_type=linear --weight_decay=0 "
    "--cutoff_len=512 --val_set_size=0 --batch_size=128 --per_device_train_batch_size=128 --save_step=150 --save_total_limit=1 "
    "--logging_steps=50 --report_to=none"
).split()
GRACE_S = 30.0
T_975 = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306}  # Student's t by degrees of freedom


class Setting(NamedTuple):
    model: Path
    train: Path
    tests: Path
    work: Path
    flags: list[str]
    batch_size: int
    deadline: float


class Run(NamedTuple):
    path: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.path}_{self.method}_{self.seed}"


def bench(
    model: str, data: str, out: str, *, work: str = "/tmp/surefoot-commonsense", seeds: str = "1,2,3", methods: str = "lora,dora",
    at_once: int = 3, stage: int = 2,
    time_limit_s: float = 1e9, rows: int = 0, test_rows: int = 0, batch_size: int = 512, flags: str = "",
) -> None:  # fmt: skip
    """Does what --out lacks.

    Args:
        rows, test_rows: only the first so many of the training set and of each test set; 0: all.
        batch_size: of the evaluation; flags: more for finetune.py, with spaces between them.
    """
    folder = Path(work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        model=Path(model).resolve(),
        train=shortened(Path(data) / "commonsense_147k.jsonl.gz", folder / f"train-{rows}.jsonl.gz", rows),
        tests=tests(Path(data), folder / "tests", test_rows),
        work=folder,
        flags=[*COMMON, f"--stage={stage}", *flags.split()],
        batch_size=batch_size,
        deadline=time.monotonic() + time_limit_s,
    )
    wanted = [Run(path, method, int(seed)) for seed, path, method in itertools.product(_words(seeds), PATHS, _words(methods))]
    result = json.loads(Path(out).read_text()) if Path(out).is_file() else {"untrained": {}, "runs": {}}
    before = result.setdefault(
        "asked", asked := {"model": setting.model.name, "flags": setting.flags, "rows": rows, "test_rows": test_rows}
    )
    if before != asked:
        sys.exit(f"{out} is of other settings ({before}): give another --out and --work")
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {pool.submit(done, setting, run): run.name for run in wanted if run.name not in result["runs"]}
        if not result["untrained"]:
            jobs[pool.submit(evaluated, setting, [f"--base_model={setting.model}", "--prompt_style=alpaca"], "untrained")] = "untrained"
        failed = []
        for job in as_completed(jobs):
            if job.exception():
                failed.append(f"{jobs[job]}: {job.exception()}")
            elif found := job.result():
                (result if jobs[job] == "untrained" else result["runs"])[jobs[job]] = found
                _write(out, result, len(wanted))
    _write(out, result, len(wanted))
    left = len(wanted) - len(result["runs"])
    print(json.dumps(result["verdict"], indent=1))
    print(f"{left} of {len(wanted)} runs are missing: the same command goes on from here" if left else "nothing is missing")
    if failed:
        sys.exit("\n".join(failed))


def _words(text: Any) -> list[str]:
    """Fire makes a tuple of words with commas between them."""
    return [str(word) for word in (text if isinstance(text, tuple) else str(text).split(","))]


def shortened(source: Path, target: Path, count: int) -> Path:
    """The file itself, or its first `count` rows at `target`."""
    if not count:
        return source.resolve()
    if target.is_file():  # made again it would be another file, and no run could go on
        return target
    with gzip.open(source, "rt") as lines, gzip.open(target, "wt") as kept:
        kept.writelines(itertools.islice(lines, count))
    return target


def tests(data: Path, folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for file in data.glob("test_*.jsonl.gz"):
        shutil.copy(shortened(file, folder / f".{count}-{file.name}", count), folder / file.name)
    return folder


def done(setting: Setting, run: Run) -> dict[str, Any] | None:
    """Trains and evaluates; None where the time limit came first."""
    folder, began = setting.work / run.name, time.monotonic()
    if not _is_done(folder):
        words = [
            f"--base_model={setting.model}", f"--data_path={setting.train}", f"--output_dir={folder}", f"--adapter_name={run.method}",
            f"--seed={run.seed}", *setting.flags, *PATHS[run.path], "--resume",
        ]  # fmt: skip
        if not _ended("finetune.py", words, setting.deadline, setting.work / f"{run.name}.log"):
            return None
    scores = evaluated(setting, [f"--lora_weights={folder}", "--with_base=False"], run.name)
    if scores is None:
        return None
    record = json.loads((folder / "run.json").read_text())
    summary = record["summary"]
    facts = {"path": run.path, "method": run.method, "seed": run.seed, "wall_s": round(time.monotonic() - began, 1), "summary": summary}
    return facts | {"packing": record["plan"]["train"]["packing"], "scores": scores}


def _is_done(folder: Path) -> bool:
    record = folder / "run.json"
    return record.is_file() and json.loads(record.read_text()).get("status") == "done"


def evaluated(setting: Setting, which: list[str], name: str) -> dict[str, Any] | None:
    """By scoring and task: correct, formed and rows."""
    found: dict[str, Any] = {}
    for scoring in SCORINGS:
        out = setting.work / f"{name}.{scoring}.json"
        words = [
            *which, "--dataset=all", f"--data_dir={setting.tests}", "--metrics=accuracy", f"--scoring={scoring}", f"--out={out}",
            f"--batch_size={setting.batch_size}",
        ]  # fmt: skip
        if not out.is_file() and not _ended("scripts/evaluate.py", words, setting.deadline, setting.work / f"{name}.log"):
            return None
        sets = json.loads(out.read_text())["sets"]
        found[scoring] = {
            task: {key: next(iter(one["scores"].values()))["accuracy"][key] for key in ("correct", "formed", "commonest", "rows")}
            for task, one in sets.items()
        }
    return found


def _ended(program: str, words: list[str], deadline: float, log: Path) -> bool:
    """Runs a program to its end; False where the deadline came first (it is stopped).

    Raises:
        RuntimeError: it failed.
    """
    if time.monotonic() > deadline:
        return False
    with log.open("a") as lines:
        process = subprocess.Popen([sys.executable, str(ROOT / program), *words], stdout=lines, stderr=lines)
        try:
            code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # finetune.py saves a checkpoint and ends
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return False
    if code != 0:
        raise RuntimeError(f"{program} ended with {code}: {log.read_text()[-600:]}")
    return True


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Per method: the paths' mean accuracy over the test sets, their difference with Student's interval over the seeds, and the two claims.

    agree: the interval holds 0. beat_untrained: over all rows, each run's lower Wilson limit lies above the untrained model's upper one.
    """
    from surefoot.evaluation.intervals import wilson

    found: dict[str, Any] = {}
    for method, scoring in itertools.product(METHODS, SCORINGS):
        runs = [run for run in result["runs"].values() if run["method"] == method]
        values = {path: [mean_accuracy(run["scores"][scoring]) for run in runs if run["path"] == path] for path in PATHS}
        if not all(values.values()) or not result["untrained"]:
            continue
        untrained = result["untrained"][scoring]
        lows = [wilson(*_pooled(run["scores"][scoring]))[0] for run in runs]
        found[f"{method} {scoring}"] = {
            **{path: round(statistics.fmean(each), 4) for path, each in values.items()},
            "untrained": round(mean_accuracy(untrained), 4),
            **difference(values["ours"], values["peft"]),
            "beat_untrained": min(lows) > wilson(*_pooled(untrained))[1],
        }
    return found


def difference(ours: list[float], peft: list[float]) -> dict[str, Any]:
    """ours - peft of the means, with the 95 % interval from the spread of the seeds; without an interval below two seeds each."""
    gap = statistics.fmean(ours) - statistics.fmean(peft)
    if len(ours) < 2 or len(ours) != len(peft):
        return {"ours_minus_peft": round(gap, 4)}
    variance = (statistics.variance(ours) + statistics.variance(peft)) / len(ours)
    half = T_975[2 * len(ours) - 2] * math.sqrt(variance)
    return {"ours_minus_peft": round(gap, 4), "low": round(gap - half, 4), "high": round(gap + half, 4), "agree": abs(gap) <= half}


def mean_accuracy(sets: dict[str, Any]) -> float:
    return statistics.fmean(one["correct"] / one["rows"] for task, one in sets.items() if task != "all")


def _pooled(sets: dict[str, Any]) -> tuple[int, int]:
    own = [one for task, one in sets.items() if task != "all"]
    return sum(one["correct"] for one in own), sum(one["rows"] for one in own)


def _write(out: str, result: dict[str, Any], wanted: int) -> None:
    from surefoot import machine
    from surefoot.evaluation.intervals import wilson

    here = machine.probe()
    result["machine"] = {"gpu": here.gpu.name if here.gpu else None, "cpu": here.cpu_name, "versions": here.versions, "cuda": here.cuda}
    result |= {"paths": PATHS, "done": f"{len(result['runs'])} of {wanted}"}
    for one in [result["untrained"], *(run["scores"] for run in result["runs"].values())]:
        for task in itertools.chain.from_iterable(one[scoring].values() for scoring in one):
            task["accuracy"] = round(task["correct"] / task["rows"], 4)
            task["interval"] = [round(limit, 4) for limit in wilson(task["correct"], task["rows"])]
    result["verdict"] = verdict(result)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
