"""finetune.py: fine-tunes a causal language model. `python finetune.py --help`, or `from finetune import train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from surefoot import cli, last_words, runtime, signals, terminal
from surefoot.errors import SurefootError, UnslothRefusedError
from surefoot.run import run


def train(**flags: Any) -> Path:
    """Fine-tunes with the flags of `python finetune.py --help` as keywords and returns the run folder."""
    return run(cli.parse(flags))


train.__signature__ = cli.signature(returns=Path)  # type: ignore[attr-defined]


def main() -> int:
    """The command line: prints one message and returns the exit code where the user can mend it."""
    argv = sys.argv[1:]
    if not argv or any(word in cli.HELP for word in argv):
        print(cli.help_text())
        return 0
    try:
        cli.call(train, argv)
    except UnslothRefusedError as refused:
        runtime.start_again(refused.reason)
    except SurefootError as error:
        return last_words.say(error)
    signals.ignore()
    return 0


if __name__ == "__main__":
    sys.exit(terminal.piped(main))
