"""The command line before Fire: tidy() makes every value an exact literal, so that nothing is guessed, swallowed or ignored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surefoot import config as configs
from surefoot import terminal
from surefoot.config import FLAGS, Config
from surefoot.errors import UsageError

HELP = ("-h", "--help", "help")
USAGE = """\
python finetune.py --base_model MODEL --data_path FILE --output_dir FOLDER [--name=value | --name value | --name] ...
accelerate launch --config_file profiles/ddp.yaml --num_processes N finetune.py ...

Fine-tunes a causal language model with LoRA, DoRA, their 4-bit forms, or in full. --dry_run prints what it would do, and why.
Lists are written --target_modules q_proj k_proj.
Exit codes: 0 done; 2 usage or plan; 3 data; 4 numerics; 5 backend; 75 stopped by a signal after a checkpoint (--resume goes on)."""


def call(function: Callable[..., Any], argv: Sequence[str]) -> None:
    """Calls `function` with the flags of a command line as keywords.

    Raises:
        UsageError: what tidy() says.
    """
    import fire

    fire.Fire(lambda **flags: function(**flags), command=tidy(argv), serialize=lambda _: None)


def signature(returns: type) -> inspect.Signature:
    """Of a function that takes every flag as a keyword."""
    flags = [parameter for name, parameter in inspect.signature(Config).parameters.items() if name in FLAGS]
    return inspect.Signature(flags, return_annotation=returns)


def tidy(argv: Sequence[str]) -> list[str]:
    """argv as Fire commands `--name='text'`, list flags folded. Bare Fire turns `--target_modules q_proj k_proj` into other flags' values.

    Raises:
        UsageError: stray words, flags without a value, and every other wrong flag of the line, together.
    """
    flags, problems = _collect(argv)
    if problems:
        Config.parse(flags, extra=problems)
    return [f"--{name}={value!r}" for name, value in flags.items()]


def _collect(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    flags: dict[str, Any] = {}
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if _is_flag(word) and configs.canonical(word[1:].partition("=")[0]) in FLAGS:
            problems.append(f"{word} begins with one hyphen. Did you mean -{word}?")
            if "=" not in word:
                _value(configs.canonical(word[1:]), words)
            continue
        if not word.startswith("--") or word == "--":
            problems.append(f"stray word {word!r}: flags begin with --, and values with spaces or $ need quotes in the shell")
            continue
        name, equals, text = word[2:].partition("=")
        value: Any = text if equals else _value(configs.canonical(name), words)
        if value is None:
            problems.append(f"--{name} needs a value")
        else:
            flags[name] = value
    return flags, problems


def _value(name: str, words: list[str]) -> Any:
    """Takes the flag's value off the front of `words`: a list for a list flag, True for a bare switch, None when there is none."""
    if configs.takes_list(name):
        taken = []
        while words and not _is_flag(words[0]):
            taken.append(words.pop(0))
        return (taken if len(taken) > 1 else taken[0]) if taken else None
    if words and not _is_flag(words[0]):
        return words.pop(0)
    return True if name not in FLAGS or configs.takes_bool(name) else None


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and len(word) > 1 and word[1].isalpha())


def help_text() -> str:
    """Every flag in its group with type, default and meaning, read off Config."""
    lines = [terminal.text(USAGE)]
    group = ""
    for name, flag in FLAGS.items():
        if flag.metadata["group"] != group:
            group = flag.metadata["group"]
            lines.append(f"\n{group}")
        lines += terminal.flag(f"--{name}={_shown(flag.default)}", flag.metadata["doc"], tuple(map(str, flag.metadata["choices"])))
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def parse(flags: Mapping[str, Any]) -> Config:
    """Flags (and the run file they name) to a Config.

    Raises:
        UsageError: every wrong flag or key, with its way out.
    """
    path = flags.get("config")
    if not path:
        return Config.parse(flags)
    from surefoot import run_file

    if not isinstance(path, str):
        raise UsageError(f"--config={path} must be the path of a YAML file")
    return Config.parse(flags, file_values=run_file.read(path))
