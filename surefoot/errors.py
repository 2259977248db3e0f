"""Every error that is the user's to mend, each with its exit code.

SurefootError
├── UsageError      2   a flag, a file name, a configuration file
├── PlanError       2   flags that cannot hold together, or not on this machine
├── DataError       3   the rows cannot be trained on
├── NumericsError   4   non-finite loss, an adapter that did not learn
├── BackendError    5   the model, a library or a kernel refused
└── Preempted      75   asked to stop, after a good checkpoint: start the same command again

Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 20  # problems that one message lists


class SurefootError(Exception):
    """One message for the user: flag, value given, rule, way out."""

    exit_code = 1


class UsageError(SurefootError):
    exit_code = 2


class PlanError(SurefootError):
    exit_code = 2


class DataError(SurefootError):
    exit_code = 3


class NumericsError(SurefootError):
    exit_code = 4


class BackendError(SurefootError):
    exit_code = 5


class LostError(BackendError):
    """Another process or the network was lost: the same command may go through, as after no other BackendError."""


class UnslothRefusedError(BackendError):
    """Unsloth is imported, hence transformers patched, and it does not take this run for `reason`: only a new process can go on."""

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.reason}. Start a new process with --backend=hf"


class Preempted(SurefootError):  # noqa: N818 - no error: the run did what it was asked
    exit_code = 75


def joined(problems: Sequence[str]) -> str:
    """All problems as one message, so that the user meets them together and not one a run."""
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in [*problems[:MOST], *more])
