"""What is merged into what: the adapter's folder, its run's records and the base model, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot import checkpoint, inputs
from surefoot.errors import UsageError, joined
from surefoot.json_file import read_json

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the base weights stay what they were
SPLIT_INITS = ("pissa", "olora")  # a fixed decomposition of the base weights, which is made again
# fields of adapter_config.json that say nothing of the merged weights, or that PEFT's own layer follows when it merges
UNDERSTOOD = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r "
    "rank_pattern revision runtime_config target_modules task_type use_dora use_rslora".split()
)
ONTO = ("seen", "16bit", "nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter with its base. `seen` is the quantization of the base it was trained on, `onto` of the base it is merged into:
    none, nf4 or int8. `record` is run.json's plan and identity, {} for an adapter that no run of ours left.
    """

    adapter: Path
    config: dict[str, Any]
    base: Path
    base_name: str
    base_config: dict[str, Any]
    seen: str
    onto: str
    tokenizer: Path
    record: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def method(self) -> str:
        return ("Q" if self.seen != "none" else "") + ("DoRA" if self.config.get("use_dora") else "LoRA")

    @property
    def trusts_remote_code(self) -> bool:
        return bool(self.record.get("plan", {}).get("model", {}).get("trust_remote_code", False))


def read(adapter: str, base_model: str = "", onto: str = "seen") -> Source:
    """The adapter of a run folder, of one of its checkpoints, or of any PEFT LoRA folder.

    Args:
        base_model: where the base lies on this machine, if not where the run found it.
        onto: seen (the base as the adapter saw it), 16bit (the unquantized one), or nf4/int8 for an adapter without backend.json.

    Raises:
        UsageError: everything that is missing or contradicts itself, together.
    """
    folder = Path(adapter)
    config = _adapter_config(folder)
    root = checkpoint.home(folder)
    stamp, record = read_json(root / "backend.json"), read_json(root / "run.json")
    problems, notes = _config_problems(config), []
    problems += _stamp_problems(stamp, config, folder)
    inputs.check_weights("adapter", folder, problems)
    if onto not in ONTO:
        problems.append(f"--onto={onto} must be one of {', '.join(ONTO)}")
    seen = stamp.get("quantization") or (onto if onto in ("nf4", "int8") else "none")
    if stamp and onto in ("nf4", "int8") and onto != seen:
        problems.append(
            f"--onto={onto}: backend.json says that the adapter saw the base with quantization {seen}. Give --onto=seen or 16bit"
        )
    if not stamp:
        notes.append(f"no backend.json beside the adapter: its base is taken as {'unquantized' if seen == 'none' else seen}")
    if record and record.get("status") != "done":
        notes.append(f"run.json says that the run is {record.get('status')}: this adapter is not its end")
    if seen != "none" and onto == "16bit":
        notes.append(
            f"merged into the unquantized base as asked: the adapter was trained on the {seen} base, so the result is another model"
        )
    if problems:
        raise UsageError(joined(problems))
    name, base = _base(base_model, stamp, config, notes)
    inputs.check_weights("base_model", base, problems)
    if problems:
        raise UsageError(joined(problems))
    return Source(
        adapter=folder,
        config=config,
        base=base,
        base_name=name,
        base_config=_base_config(base),
        seen=seen,
        onto="none" if onto == "16bit" else seen,
        tokenizer=next((place for place in (folder, root, base) if (place / "tokenizer_config.json").is_file()), base),
        record=record,
        notes=tuple(notes),
    )


def check_model(folder: Path) -> None:
    """Raises UsageError: there is no such model."""
    if not (folder / "config.json").is_file():
        hint = f"it is an adapter: give --adapter={folder}" if (folder / "adapter_config.json").is_file() else "it has no config.json"
        raise UsageError(f"--model={folder} is no model folder: {hint}")
    problems: list[str] = []
    inputs.check_weights("model", folder, problems)
    if problems:
        raise UsageError(joined(problems))


def _adapter_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    if config and (folder / "adapter_model.safetensors").is_file():
        return config
    if not folder.is_dir():
        raise UsageError(f"--adapter={folder} does not exist: give a run folder, one of its checkpoint-N, or a PEFT adapter")
    if config:
        raise UsageError(f"--adapter={folder} has adapter_config.json but no adapter_model.safetensors: the run did not save it whole")
    if (folder / "config.json").is_file():
        raise UsageError(f"--adapter={folder} is a whole model, there is nothing to merge: scripts/export.py --model={folder} exports it")
    found = sorted(folder.glob("checkpoint-*/adapter_config.json"), key=lambda file: file.stat().st_mtime)
    hint = f"give its checkpoint --adapter={found[-1].parent}" if found else "the run has saved none"
    raise UsageError(f"--adapter={folder} holds no adapter (adapter_config.json): {hint}")


def _config_problems(config: dict[str, Any]) -> list[str]:
    """What in adapter_config.json cannot be merged here."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type={config.get('peft_type')}: only LoRA and DoRA adapters can be merged"]
    strange = {name: value for name, value in config.items() if name not in UNDERSTOOD and value}
    problems = [f"adapter_config.json: {name}={value} is not merged by this program" for name, value in strange.items()]
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS + SPLIT_INITS:
        why = "its start cannot be made again, so that the base the adapter saw is lost"
        problems.append(
            f"init_lora_weights={init} changed the base weights, and {why}. Save the changed base beside the adapter when training"
        )
    return problems


def _stamp_problems(stamp: dict[str, Any], config: dict[str, Any], folder: Path) -> list[str]:
    """Where backend.json contradicts the adapter beside it, or names a base that this program cannot make again."""
    if not stamp:
        return []
    problems = []
    if stamp.get("backend") not in ("hf", "bnb"):
        problems.append(
            f"backend.json: backend {stamp.get('backend')} loads the base in its own way, and the result would not be what it saw"
        )
    if stamp.get("quantization") not in ("none", "nf4", "int8"):
        problems.append(f"backend.json: quantization {stamp.get('quantization')} is not known (none, nf4, int8)")
    made = stamp.get("adapter", {})
    pairs = {
        "method": (made.get("method"), "dora" if config.get("use_dora") else "lora"),
        "r": (made.get("r"), config.get("r")),
        "alpha": (made.get("alpha"), config.get("lora_alpha")),
        "rslora": (made.get("rslora"), config.get("use_rslora", False)),
    }
    other = [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]
    if other:
        problems.append(
            f"{folder}: backend.json and adapter_config.json are of two runs ({'; '.join(other)}). Restore the one that was replaced"
        )
    return problems


def _base(base_model: str, stamp: dict[str, Any], config: dict[str, Any], notes: list[str]) -> tuple[str, Path]:
    """The base's name in the records, and its folder here."""
    named = str(stamp.get("base_model") or config.get("base_model_name_or_path") or "")
    if not (named or base_model):
        raise UsageError("neither backend.json nor adapter_config.json names the base model: give --base_model")
    if base_model and named and Path(named).is_dir() and Path(base_model).resolve() != Path(named).resolve():
        raise UsageError(f"--base_model={base_model}: the adapter was trained on {named}, which is here. Drop --base_model")
    if base_model and base_model != named:
        notes.append(f"the base is taken from {base_model}; the records name {named or 'none'}")
    path = base_model or named
    if Path(path).is_dir():
        return named or path, Path(path)
    return named or path, _from_hub(path, stamp.get("revision") or config.get("revision"))


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.py", "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the base model {name} is no folder here, and the Hub could not give it ({first}). Give --base_model=FOLDER"
        ) from None


def _base_config(base: Path) -> dict[str, Any]:
    config = read_json(base / "config.json")
    if not config:
        raise UsageError(f"the base model {base} has no config.json: it is not a model folder")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "unknown")
        raise UsageError(f"the base model {base} is itself stored quantized ({kind}): give the unquantized model with --base_model")
    return config
