"""Asked to stop: SIGTERM, SIGINT, SIGUSR1, a stop file, or a launcher that is gone. A run notices; it acts at the end of its step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from surefoot.errors import Preempted

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_S = 2.0  # a terminal and a launcher each pass on one Ctrl-C: what comes so soon is the same request
STOP_FILE = "SUREFOOT_STOP_FILE"  # the variable that names it; surefoot.launcher always sets it
EXIT_CODE, ENDED = "surefoot-exit-code", "surefoot-ended-"  # files of the processes of one launch, the second with the local rank
STUCK_S = 5.0  # for a Python handler to get its turn


@dataclass(kw_only=True)
class StopRequest:
    """`asked` says by whom a stop was asked for. Until `begin()` nothing can be lost, and a signal ends the process at once."""

    stop_file: Path | None = None
    watches_launcher: bool = False
    asked: str | None = None
    since: float = 0.0
    parent: int = field(default_factory=os.getppid)
    has_begun: bool = False

    def begin(self) -> None:
        """The first step of this process is done: from here on a stop waits for the end of a step."""
        self.has_begun = True

    def is_asked(self) -> bool:
        if self.asked is None and self.stop_file is not None and self.stop_file.exists():
            self._note(f"the stop file {self.stop_file}")
        if self.asked is None and self.watches_launcher and os.getppid() != self.parent:
            self._note("the end of its launcher")
        return self.asked is not None

    def leave_if_asked(self) -> None:
        """For places where nothing can be lost yet, and a stop file may have been laid."""
        if self.is_asked():
            self._leave(str(self.asked))

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.has_begun:
            self._leave(name)
        if self.asked is None:
            self._note(name)
            _write(f"{name}: a checkpoint follows at the end of this step; a second signal stops at once")
        elif time.monotonic() - self.since > ECHO_S:
            _write(f"{name} after {self.asked}: stopped at once; the last checkpoint is as it was")
            os._exit(Preempted.exit_code)

    def _leave(self, who: str) -> None:
        _write(f"{who} before this process has finished a step: nothing is lost, the same command with --resume goes on")
        tell_of_launcher()
        settle(Preempted.exit_code)
        ignore()
        raise SystemExit(Preempted.exit_code)

    def _note(self, who: str) -> None:
        self.asked, self.since = who, time.monotonic()


def _write(text: str) -> None:
    """Past sys.stderr, which the signal may have interrupted in the middle of a line."""
    os.write(2, f"finetune.py: process {os.getpid()}: {text}\n".encode())


def tell_of_launcher() -> None:
    """Rank 0 says what torchrun, under accelerate launch or by itself, makes of exit code 75. Ours passes it on."""
    if os.environ.get("RANK") == "0" and "TORCHELASTIC_RUN_ID" in os.environ and STOP_FILE not in os.environ:
        _write("this launcher answers 1 to our exit code 75; `python -m surefoot.launcher` in place of `accelerate launch` passes it on")


def launch_folder() -> Path | None:
    """The folder that torchrun keeps for the processes that it started on this host, and removes behind them."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(file).parent.parent if file else None
    return folder if folder is not None and folder.is_dir() else None


def settle(code: int) -> bool:
    """Says that this process ends; the first to say so gives all of this host their exit code, and gets True."""
    folder = launch_folder()
    if folder is None:
        return True
    (folder / f"{ENDED}{os.environ.get('LOCAL_RANK', '0')}").touch()
    try:
        with (folder / EXIT_CODE).open("x") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    return True


def ignore() -> None:
    """The exit code is settled; the launcher's SIGTERM to the ranks that are still leaving must not change it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _deafen() -> None:
    """A signal to the whole process group is not for the processes that load data: they leave with the one they serve."""
    signal.set_wakeup_fd(-1)
    ignore()


def _unstick(request: StopRequest, inlet: int) -> None:
    """Ends a process that waits for the others in C, where no Python handler runs, and that has nothing to lose."""
    while numbers := os.read(inlet, 64):
        if set(numbers) & set(STOPS):
            time.sleep(STUCK_S)
            if not request.has_begun:
                settle(Preempted.exit_code)
                os._exit(Preempted.exit_code)
    os.close(inlet)


@contextmanager
def heeded(stop_file: str | None, *, watches_launcher: bool) -> Iterator[StopRequest]:
    """Signals go to the request while the context lasts. Only a main thread can take them; elsewhere the stop file alone is heeded."""
    request = StopRequest(stop_file=Path(stop_file) if stop_file else None, watches_launcher=watches_launcher)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    waker = signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
    threading.Thread(target=_unstick, args=(request, inlet), name="signals", daemon=True).start()
    before = {number: signal.signal(number, request.on_signal) for number in STOPS}
    over: list[bool] = []
    os.register_at_fork(after_in_child=lambda: None if over else _deafen())
    try:
        yield request
    finally:
        over.append(True)
        signal.set_wakeup_fd(waker)
        os.close(outlet)
        for number, handler in before.items():
            if signal.getsignal(number) == request.on_signal:
                signal.signal(number, handler)
