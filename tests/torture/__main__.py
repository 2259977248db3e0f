"""python -m tests.torture --kills N --seed S: runs are killed at random places, started again with the same command, and compared.

torch is imported once and every process is forked from there, so that a kill costs seconds. Exits 1 when a run is not bitwise the undisturbed
one, when a polite signal does not end every rank with 75, or when a run does not come to its end. CUDA_VISIBLE_DEVICES=0,1 in front runs it
on GPUs, in deterministic mode.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT, TRAIN_ROWS
from tests.torture.blow import PLACES, Blow, name_of, run
from tests.torture.cells import CELLS, COMMON, EVERY_CELL, ROWS, Cell
from tests.torture.compare import differences, reached, resumed_at
from tests.torture.report import COUNTS, add

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ON_GPU = bool(os.environ["CUDA_VISIBLE_DEVICES"])  # set empty by tests/conftest.py where it is not given
BLOWS_A_RUN = 12
TURNS = {
    "step": 10,
    "evaluation": 4,
    "write": 1,
    "sync": 1,
    "manifest": 1,
    "rename": 20,
    "prune": 1,
    "last_save": 2,
}  # of one process in two or three steps
OF_RANK_0 = ("manifest", "rename", "prune", "last_save")
LIMIT_S = 120
PRELOADED = (
    "finetune",
    "surefoot.backends.hf",
    "surefoot.training.trainer",
    "surefoot.data.prepare",
    "surefoot.assembly",
    "surefoot.artifacts",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "deepspeed",
    "bitsandbytes",
    "datasets",
)


class Tally(NamedTuple):
    kills: int
    resumes: int
    lost_steps: int
    problems: list[str]


def attempt(cell: Cell, argv: list[str], blow: Blow | None, folder: Path) -> list[int]:
    """Starts the cell's processes, waits for them as a launcher does (one gone, all go), and returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment(cell.profile)  # asked once, before any fork
    errors = Path(tempfile.mkdtemp(dir=folder), "rank", "error.json")  # torchrun makes such a folder for each start
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_ERROR_FILE": str(errors)}
    children = [_fork(cell, argv, rank, blow, folder, meeting) for rank in range(cell.processes)]
    codes: dict[int, int] = {}
    deadline, told = time.monotonic() + LIMIT_S, False
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            [os.kill(child, signal.SIGKILL) for child in children if child not in codes]
        elif codes and any(codes.values()) and not told:
            told, deadline = True, min(deadline, time.monotonic() + 20)
            [os.kill(child, signal.SIGTERM) for child in children if child not in codes]
        else:
            time.sleep(0.01)
    return [codes[child] for child in children]


def _fork(cell: Cell, argv: list[str], rank: int, blow: Blow | None, folder: Path, meeting: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        sink = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if cell.processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cell.processes), "LOCAL_WORLD_SIZE": str(cell.processes),
                **meeting, **environment(cell.profile),
            }  # fmt: skip
        code = run(argv, rank, blow, folder / f"rows-of-rank-{rank}.jsonl")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@functools.cache
def environment(profile: str | None) -> dict[str, str]:
    """What accelerate's launcher makes of a profile, as its processes find it."""
    if profile is None:
        return {"ACCELERATE_USE_CPU": str(not ON_GPU)}
    words = ["-m", "accelerate.commands.launch", "--config_file", ROOT / f"profiles/{profile}.yaml", "--num_processes", 2]
    words += ["--main_process_port", 0, Path(__file__).with_name("tell.py")]
    said = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True).stdout
    variables: dict[str, str] = json.loads(said.splitlines()[-1])
    return variables


def draw(rng: random.Random, cell: Cell) -> Blow:
    """Mostly within the next few steps, so that a run meets many."""
    place = rng.choice(PLACES)
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, *POLITE))
    ranks = tuple(range(cell.processes)) if rng.random() < 0.5 else (rng.randrange(1 if place in OF_RANK_0 else cell.processes),)
    last_turn = -(-TURNS[place] // cell.processes) * rng.choice((1, 1, 1, 3))
    return Blow(place, rng.randint(1, last_turn), number, ranks)


def torture(cell: Cell, blows: list[Blow], home: Path, rows: Path) -> Tally:
    """Runs the cell undisturbed once, then with the blows, and compares."""
    folders = home / cell.name / "calm", home / cell.name / f"tortured-{len(list(home.glob(cell.name + '/*')))}"
    kills = resumes = lost = 0
    problems: list[str] = []
    for folder, struck in zip(folders, ([], blows), strict=True):
        if (folder / "run").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        flags = {**COMMON, **cell.flags, "deterministic": ON_GPU, "data_path": rows, "output_dir": folder / "run"}
        argv = [f"--{name}={value}" for name, value in flags.items()]
        queue = list(struck)
        for _ in range(len(struck) + 1):
            blow = queue.pop(0) if queue else None
            codes = attempt(cell, argv, blow, folder)
            if not any(codes):
                break  # the blow's turn never came, or the end was reached before it
            kills += 1
            problems += _wrong_codes(cell, blow, codes)
            lost += max(0, reached(folder) - resumed_at(folder / "run"))
            resumes += 1
        else:
            problems.append(f"{cell.name}: no end after {len(struck) + 1} starts")
    problems += [f"{cell.name} after {[_told(blow) for blow in blows]}: {text}" for text in differences(*folders)]
    return Tally(kills, resumes, lost, problems)


def _wrong_codes(cell: Cell, blow: Blow | None, codes: list[int]) -> list[str]:
    if blow is not None and blow.number == signal.SIGKILL:
        return []
    return [] if set(codes) == {75} else [f"{cell.name}: {_told(blow) if blow else 'no blow'} ended the ranks with {codes}"]


def _told(blow: Blow) -> str:
    return f"{name_of(blow.number)} at {blow.place} {blow.turn} of rank {','.join(map(str, blow.ranks))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after so long")
    parser.add_argument("--report", type=Path, help="JSON file that sums up all calls that name it")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="for the report")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    asked = parser.parse_args()
    for name in () if ON_GPU else PRELOADED:  # some of them ask for GPUs, and CUDA does not survive a fork
        importlib.import_module(name)

    home = asked.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    rows = home / "rows.jsonl"
    home.mkdir(parents=True, exist_ok=True)
    rows.write_text("\n".join(sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:ROWS]) + "\n")
    rng, cells = random.Random(asked.seed), [cell for cell in EVERY_CELL if cell.name in asked.cells]
    began, totals = time.monotonic(), {cell.name: dict.fromkeys(COUNTS, 0) for cell in cells}
    while sum(total["kills"] for total in totals.values()) < asked.kills and time.monotonic() - began < asked.seconds:
        cell = min(cells, key=lambda cell: totals[cell.name]["kills"])
        tally = torture(cell, [draw(rng, cell) for _ in range(BLOWS_A_RUN)], home, rows)
        found = dict(zip(COUNTS, (1, *tally[:3], len(tally.problems)), strict=True))
        totals[cell.name] = {name: totals[cell.name][name] + count for name, count in found.items()}
        for problem in tally.problems:
            print(problem, flush=True)
        if asked.report:
            add(asked.report, {cell.name: found}, asked.seed, asked.machine)
    return _say(totals, time.monotonic() - began)


def _say(totals: dict[str, dict[str, int]], seconds: float) -> int:
    """The exit code."""
    print(f"{'cell':<18}{'kills':>7}{'resumes':>9}{'lost steps':>12}{'mismatches':>12}")
    for name, row in totals.items():
        print(f"{name:<18}{row['kills']:>7}{row['resumes']:>9}{row['lost_steps']:>12}{row['mismatches']:>12}")
    kills, resumes, lost, mismatches = (sum(row[name] for row in totals.values()) for name in COUNTS[1:])
    print(f"{len(totals)} cells, {kills} kills, {resumes} resumes, {lost} lost steps, {mismatches} mismatches, {seconds:.0f} s")
    return 1 if mismatches else 0


if __name__ == "__main__":
    raise SystemExit(main())
