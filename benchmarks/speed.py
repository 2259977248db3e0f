"""speed.py: tokens per second and peak memory of finetune.py and of its peers, on models of a real shape with random weights.

python benchmarks/speed.py --data=ROWS.jsonl --out=benchmarks/results/speed_h200.json     # all cases of speed_works.py, hours on one GPU
python benchmarks/speed.py ... --only=dora_2048,lora_2048 --systems=ours3,unsloth --rounds=3 --time_limit_s=560
python benchmarks/speed.py --data=examples/data/commonsense_train.jsonl --out=FILE --tiny --only=dora_2048 --systems=ours1,peft  # a CPU
python benchmarks/speed_table.py                                                          # README's table and the plot

Every run is a process of its own; a round runs each system once, in turn. Ours is finetune.py as a user starts it, read from its own
metrics.jsonl; peers are speed_peers.py. The clock is read after the first step and every four (users log every ten): a run's speed is the
mean of the tokens of its steps (padding left out) over the median of their seconds, the first --warmup steps left out; what those took
longer than that is compile_s. --out is written after every run and continued by the next call, which runs what is missing; --redo=ours3
forgets that system's runs of the cases first.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speed_run import ROOT, Setting, run
from speed_works import CASES, SYSTEMS

EXPECTED_S = 75  # a run's wall time before one of its kind was seen


def bench(
    data: str, out: str, *, only: str = "", systems: str = "", rounds: int = 3, steps: int = 20, warmup: int = 4, tiny: bool = False,
    tokenizer: str = str(ROOT / "examples/small_model"), work: str = "/tmp/surefoot-speed", time_limit_s: float = 1e9,
    run_limit_s: float = 300, redo: str = "", peer_path: str = "", ours_flags: str = "",
) -> None:  # fmt: skip
    """Runs what --out lacks of the cases, systems and rounds.

    Args:
        data: commonsense rows, for the cases that take rows as they come.
        only, systems, redo: names with commas between them; only: cases, systems: those of each case.
        time_limit_s: no run is started that would not be done by then.
        run_limit_s: a run that takes longer has failed.
        peer_path: put before the peers' PYTHONPATH: packages that finetune.py shall not see.
        ours_flags: more flags for finetune.py.
    """
    began = time.perf_counter()
    setting = Setting(
        data=Path(data).resolve(), tokenizer=Path(tokenizer).resolve(), work=Path(work).resolve(), tiny=tiny, steps=steps, warmup=warmup,
        run_limit_s=run_limit_s, peer_path=peer_path, ours_flags=tuple(shlex.split(ours_flags)),
    )  # fmt: skip
    setting.work.mkdir(parents=True, exist_ok=True)
    cases = _names(only, CASES) or list(CASES)
    forgotten, chosen = _names(redo, SYSTEMS), _names(systems, SYSTEMS) or list(SYSTEMS)
    runs = [one for one in _earlier(out) if not (one["case"] in cases and one["system"] in forgotten)]
    done = {(one["case"], one["round"], one["system"]) for one in runs}
    wanted = [
        (case, number, system)
        for case in cases
        for number in range(1, rounds + 1)
        for system in CASES[case][1]
        if system in chosen and (case, number, system) not in done
    ]
    for case, number, system in wanted:
        expected = max([one["wall_s"] for one in runs if (one["case"], one["system"]) == (case, system)], default=EXPECTED_S)
        if time.perf_counter() - began + expected > time_limit_s:
            print("speed.py: the time limit is near; the same command, without --redo, goes on from here", flush=True)
            break
        runs.append(run(setting, case, number, system))
        _write(out, setting, runs)
        print(json.dumps({name: value for name, value in runs[-1].items() if name not in ("environment", "windows", "flags")}), flush=True)


def _earlier(out: str) -> list[dict[str, Any]]:
    if not Path(out).is_file():
        return []
    stored = json.loads(Path(out).read_text())
    return [one | {"environment": stored["environments"][one["environment"]]} for one in stored["runs"]]


def _write(out: str, setting: Setting, runs: list[dict[str, Any]]) -> None:
    """The JSON: each environment once, the runs with the number of theirs, and the medians."""
    environments: list[dict[str, Any]] = []
    for one in runs:
        if one["environment"] not in environments:
            environments.append(one["environment"])
    order = {case: place for place, case in enumerate(CASES)}
    runs = sorted(runs, key=lambda one: (order[one["case"]], one["round"]))
    result = {
        "command": f"python benchmarks/speed.py --data={setting.data.name} --steps={setting.steps} --warmup={setting.warmup}"
        + (" --tiny" if setting.tiny else ""),
        "works": {
            case: dataclasses.asdict(CASES[case][0].tiny() if setting.tiny else CASES[case][0])
            for case in CASES
            if case in {one["case"] for one in runs}
        },
        "medians": medians(runs),
        "environments": environments,
        "runs": [{**one, "environment": environments.index(one["environment"])} for one in runs],
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(_compact(json.dumps(result, indent=1)) + "\n")


def _compact(text: str) -> str:
    """Lists of numbers or words on one line."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and system: median, least and greatest tokens/s over its rounds, median peak, most compile seconds, errors."""
    found = []
    for case, system in dict.fromkeys((one["case"], one["system"]) for one in runs):
        mine = [one for one in runs if (one["case"], one["system"]) == (case, system)]
        good = [one for one in mine if "error" not in one]
        rates = [one["tokens_per_s"] for one in good]
        row: dict[str, Any] = {
            "case": case,
            "system": system,
            "rounds": len(good),
            "errors": [one["error"] for one in mine if "error" in one],
        }
        if good:
            row |= {"tokens_per_s": round(statistics.median(rates), 1), "low": min(rates), "high": max(rates)}
            row |= {"peak_memory_gib": round(statistics.median(one["peak_memory_gib"] for one in good), 2)}
            row |= {"compile_s": max(one["compile_s"] for one in good)}  # later rounds may find compiled code kept by the first
        found.append(row)
    return found


def _names(text: Any, known: Iterable[str]) -> list[str]:
    """Fire makes a tuple of words with commas between them."""
    names = [name for name in (text if isinstance(text, tuple) else str(text).split(",")) if name]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise SystemExit(f"speed.py: {', '.join(wrong)} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    import fire

    fire.Fire(bench)
