"""finetune.py: fine-tunes a causal language model. `python finetune.py --help`, or `from finetune import train`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from surefoot import cli, last_words, runtime, signals
from surefoot.config import FLAGS, Config
from surefoot.errors import SurefootError, UnslothRefusedError
from surefoot.run import run


def train(**flags: Any) -> Path:
    """Fine-tunes with the flags of `python finetune.py --help` as keywords and returns the run folder."""
    return run(cli.parse(flags))


_flags = [parameter for name, parameter in inspect.signature(Config).parameters.items() if name in FLAGS]
train.__signature__ = inspect.Signature(_flags, return_annotation=Path)  # type: ignore[attr-defined]


def main() -> int:
    """The command line: prints one message and returns the exit code where the user can mend it."""
    argv = sys.argv[1:]
    if not argv or any(word in cli.HELP for word in argv):
        print(cli.help_text())
        return 0
    try:
        import fire

        fire.Fire(lambda **flags: train(**flags), command=cli.tidy(argv), serialize=lambda _: None)
    except UnslothRefusedError as refused:
        runtime.start_again(refused.reason)
    except SurefootError as error:
        return last_words.say(error)
    signals.ignore()
    return 0


if __name__ == "__main__":
    sys.exit(main())
