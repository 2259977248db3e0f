"""Run files: YAML with our flags' names, flat or in the groups that older SFT projects use, to flat values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surefoot.errors import UsageError, joined

GROUPS = ("model", "tuning", "tuning.lora", "train", "data", "logging")

# Dotted names whose flag is called otherwise. Any other `group.name` means the flag `name`.
GROUPED = {
    "model.name": "base_model",
    "model.max_seq_len": "cutoff_len",
    "tuning.lora.r": "lora_r",
    "tuning.lora.alpha": "lora_alpha",
    "tuning.lora.dropout": "lora_dropout",
    "tuning.lora.target_modules": "target_modules",
    "train.grad_accum": "gradient_accumulation_steps",
    "train.steps": "max_steps",
    "data.train_path": "data_path",
    "data.val_path": "val_data_path",
    "data.template_path": "prompt_style",
    "logging.backend": "report_to",
    "logging.log_interval": "logging_steps",
}

# Dotted name -> the values that need nothing from a training run (None: any value, another program reads it).
ELSEWHERE: dict[str, tuple[Any, ...] | None] = {
    "gen": None,
    "data.test_path": None,
    "data.split": None,
    "data.cache_dir": None,
    "data.format": ("chat",),
    "mode": ("sft",),
    "task_mode": ("sft",),
    "model.type": ("causal",),
    "train.metric_for_best_model": ("eval_loss",),
    "train.greater_is_better": (False,),
}
TUNING_MODES: dict[Any, dict[str, Any]] = {"lora": {}, "qlora": {"load_4bit": True}, "full": {"adapter_name": "full"}}


def read(path: str) -> dict[str, Any]:
    """The file's values under our flags' names; an `include:` file lies under them.

    Raises:
        UsageError: the file is missing, is no YAML mapping, or holds keys that training cannot honour.
    """
    problems: list[str] = []
    flat = _flatten(_load(Path(path), seen=()), problems, path)
    if problems:
        raise UsageError(joined(problems))
    return flat


def dotted(path: str) -> dict[str, Any]:
    """Every value of the file under its dotted name (data.split.val_ratio), for the programs beside training. Raises as read() does."""
    return dict(_leaves(_load(Path(path), seen=()), whole=()))


def _load(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    import yaml

    if path.resolve() in seen:
        raise UsageError(f"--config: {path} includes itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config={path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        place, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{place.line + 1}:{place.column + 1}" if place else str(path)
        raise UsageError(f"--config={where} is not valid YAML: {what or ' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"--config={path} must hold `name: value` lines")
    below = content.pop("include", None)
    if below is None:
        return content
    return _merged(_load(path.parent / str(below), (*seen, path.resolve())), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _flatten(content: Mapping[str, Any], problems: list[str], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for dotted, value in _leaves(content):
        if _is_elsewhere(dotted, value, problems, path) or value == "auto":
            continue
        if dotted == "tuning.mode":
            if value not in TUNING_MODES:
                problems.append(f"--config={path}: tuning.mode={value} is not one of {', '.join(TUNING_MODES)}")
            flat.update(TUNING_MODES.get(value, {}))
        elif dotted == "train.batch_size" and "grad_accum" in content["train"]:
            flat["per_device_train_batch_size"] = value  # beside grad_accum it is one process's batch, as in SFT-Play
        else:
            group, _, name = dotted.rpartition(".")
            flat[GROUPED.get(dotted, name if group in ("", *GROUPS) else dotted)] = value
    return flat


def _leaves(content: Mapping[str, Any], prefix: str = "", whole: Iterable[str] = ELSEWHERE) -> list[tuple[str, Any]]:
    """(dotted name, value) of each value; mappings named in `whole` are values."""
    leaves: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        leaves += _leaves(value, f"{name}.", whole) if isinstance(value, dict) and name not in whole else [(name, value)]
    return leaves


def _is_elsewhere(dotted: str, value: Any, problems: list[str], path: str) -> bool:
    if dotted not in ELSEWHERE:
        return False
    allowed = ELSEWHERE[dotted]
    if allowed is not None and value not in allowed:
        problems.append(f"--config={path}: {dotted}={value} is not supported; training here takes {allowed[0]}")
    return True


def generation(path: str) -> dict[str, Any]:
    """The file's `gen` group, which inference reads; empty where it has none.

    Raises:
        UsageError: the file is missing, is no YAML mapping, or its gen is none.
    """
    found = _load(Path(path), seen=()).get("gen") or {}
    if not isinstance(found, dict):
        raise UsageError(f"{path}: gen must hold names such as max_new_tokens, temperature and top_p")
    return found
