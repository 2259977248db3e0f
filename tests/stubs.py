"""A stand-in for the unsloth package, put before the real one on PYTHONPATH: it fails in one of the ways that were seen, or works."""

from __future__ import annotations

import os
from pathlib import Path

WORKS = """
DEVICE_TYPE = "cpu"
class FastLanguageModel:
    def from_pretrained(model_name, dtype=None, load_in_4bit=False, attn_implementation=None, **rest):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, attn_implementation=attn_implementation)
        if model.config.vocab_size > 512:  # the trial's tiny model has 512
            {refusal}
        return model, None
    def get_peft_model(model, use_gradient_checkpointing=None, random_state=None, **config):
        from peft import LoraConfig, get_peft_model
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
"""
LATE_REFUSAL = WORKS.replace("{refusal}", 'raise NotImplementedError("Unsloth: llama is not yet implemented!")')


def unsloth(folder: Path, code: str, *, requires: tuple[str, ...] = ("torch",), version: str = "2026.10.9") -> dict[str, str]:
    """Writes the packages unsloth and unsloth_zoo into the folder; returns the environment in which they are found and nothing is known."""
    (folder / "unsloth").mkdir(parents=True)
    (folder / "unsloth/__init__.py").write_text(code)
    for name in ("unsloth", "unsloth_zoo"):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), "SUREFOOT_CACHE": str(folder / "cache")}
