"""The run folder: run.json, backend.json, the adapter and the tokenizer at its root. Only rank 0 writes."""

from __future__ import annotations

import datetime
import fcntl
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from surefoot import checkpoint
from surefoot.config import PROMPT_STYLES
from surefoot.errors import BackendError, DataError, LostError, Preempted, SurefootError, UsageError
from surefoot.inputs import LOCK
from surefoot.json_file import read_json, write_json
from surefoot.plan import Plan
from surefoot.plan_text import as_record

PROMPT = "prompt.jinja"  # what --prompt_style=FILE held, in the run folder and in what is exported of it
META = "surefoot_meta.json"  # of an exported model: among others its run's records
OURS = (
    "report.html", "run.json", "backend.json", "metrics.jsonl", "audit.json", "bad_steps", "bad_steps.jsonl", "heartbeats",
    "adapter_config.json", "adapter_model.safetensors", "README.md", "config.json",
    "generation_config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
    "checkpoint-*", "runs", PROMPT, "evaluation.json", "evaluation.jsonl",
)  # fmt: skip
PATIENCE_S = 120.0  # for a killed run to be gone: an NFS server keeps the lock of a dead machine for 90 s
REASONED = ("backend", "precision", "quantization", "attn_implementation", "sdpa_kernels", "use_gradient_checkpointing", "fused_adapters")


@dataclass(kw_only=True)
class RunFolder:
    """An opened run folder; `record` is run.json as it stands."""

    path: Path
    is_main: bool
    resumes: bool
    record: dict[str, Any] = field(default_factory=dict)

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json."""
        self.record.update(facts)
        if self.is_main:
            write_json(self.path / "run.json", self.record)

    def note_data(self, report: dict[str, Any]) -> None:
        """Adds the data report; a resumed run must meet the rows it began with.

        Raises:
            DataError: the data changed since the run began.
        """
        before = self.record.get("data", {}).get("fingerprint")
        if self.resumes and before not in (None, report["fingerprint"]):
            raise DataError(
                f"{self.path}: the training rows are not those this run began with (fingerprint {before[:12]} -> "
                f"{report['fingerprint'][:12]}). Restore the data files and flags, or start anew with another --output_dir"
            )
        self.note(data=report)

    def check_saved(self) -> None:
        """Raises BackendError when the weights did not reach the folder: some engines save nothing and say nothing."""
        if self.is_main and not any(file.stat().st_size > 0 for file in self.path.glob("*.safetensors")):
            raise BackendError(f"{self.path}: saving wrote no weights")


@contextmanager
def opened(plan: Plan, kernels: Sequence[str] = ()) -> Iterator[RunFolder]:
    """The run folder, its record begun; on the way out run.json says done, or failed, why, and whether the same command may go through.

    Args:
        kernels: those that really run, for backend.json.

    Raises:
        UsageError: the folder cannot be made or written, which rights alone do not tell (a full quota, a mount that is not there),
            or another run writes there.
    """
    path = Path(plan.output.folder)
    folder = RunFolder(path=path, is_main=plan.machine.is_main, resumes=plan.output.resume_from is not None)
    with ExitStack() as held:
        if folder.is_main:
            with _writing(path):
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(_alone(path, plan.output.resume_from))
                _begin(plan, folder, kernels)
        with _recorded(plan, folder):
            yield folder


@contextmanager
def _recorded(plan: Plan, folder: RunFolder) -> Iterator[None]:
    path = folder.path
    if folder.resumes:
        folder.record = _continued(read_json(path / "run.json"), plan.output.resume_from)
    folder.note(status="running", **({} if folder.resumes else {"started": _now()}), plan=as_record(plan), code=code_state())
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, SurefootError) else f"{type(error).__name__}: {error}"
        code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", None)
        may_pass = code == Preempted.exit_code or isinstance(error, LostError)
        folder.note(status="preempted" if code == Preempted.exit_code else "failed", reason=reason, may_pass=may_pass, ended=_now())
        raise
    folder.note(status="done", ended=_now())


def _continued(record: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """run.json of the run so far, without its end, and with a line on where it goes on."""
    ended = {name: record.get(name) for name in ("status", "reason", "may_pass", "ended")}
    kept = {name: value for name, value in record.items() if name not in ended}
    return {**kept, "resumes": [*record.get("resumes", []), {"from": checkpoint, "at": _now(), "before": ended}]}


def vacant(plan: Plan) -> Path | None:
    """The run folder, made, for what a refused run leaves; None where an earlier run's records are, and on other ranks than 0."""
    path = Path(plan.output.folder)
    if not plan.machine.is_main or (path / "run.json").exists():
        return None
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _alone(path: Path, resume_from: str | None) -> Iterator[None]:
    """Holds the folder's lock, which goes with the process, however it ends. A file system without locks is taken as it is.

    Raises:
        UsageError: another run holds it and goes on for PATIENCE_S, or has left a newer checkpoint meanwhile.
    """
    began = time.monotonic()
    with (path / LOCK).open("a") as file:
        is_free = was_free = _locked(file)
        if not is_free:
            print(f"{path}: another run writes there. Waiting {PATIENCE_S:.0f} s for its end", flush=True)
        while not is_free and time.monotonic() - began < PATIENCE_S:
            time.sleep(0.2)
            is_free = _locked(file)
        if not is_free:
            raise UsageError(f"--output_dir={path}: another run still writes there. Wait for its end, stop it, or give another folder")
        newest = checkpoint.folders(path)[-1:]
        if not was_free and resume_from and newest and newest[0].name != Path(resume_from).name:
            raise UsageError(f"--output_dir={path}: the run there went on to {newest[0].name} meanwhile. Start the same command again")
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--output_dir={path} cannot be written: {error.strerror}. Give a folder with room and rights") from error


def _begin(plan: Plan, folder: RunFolder, kernels: Sequence[str]) -> None:
    style = plan.data.prompt_style
    prompt = None if style in PROMPT_STYLES else Path(style).read_bytes()  # before the file may go with the earlier run
    if plan.output.clears_earlier_run or not folder.resumes:
        _clear(folder.path)
    if prompt is not None:
        (folder.path / PROMPT).write_bytes(prompt)
    reasons = {choice.name: choice.reason for choice in plan.choices if choice.name in REASONED and choice.reason}
    write_json(
        folder.path / "backend.json", plan.stamp() | {"versions": plan.machine.versions, "kernels": list(kernels), "reasons": reasons}
    )


def _clear(path: Path) -> None:
    """Removes what an earlier run of ours wrote; other files stay. The plan has refused folders that are not ours."""
    if not (path / "run.json").is_file():
        return
    for pattern in OURS:
        for file in path.glob(pattern):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def code_state() -> dict[str, Any]:
    """Version of this package, and commit and cleanliness of its checkout where git knows them."""
    import surefoot

    home = Path(surefoot.__file__).parent
    commit = _git(home, "rev-parse", "HEAD")
    return {
        "surefoot": surefoot.__version__,
        "commit": commit,
        "is_clean": None if commit is None else _git(home, "status", "--porcelain") == "",
    }


def _git(home: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
