"""What was saved is what was trained: the same tensors, finite and equal, and an adapter that loads back to equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from surefoot.errors import BackendError

PROBE = 64  # tokens
RELOADED = "surefoot_reloaded"
SPLITS_BASE = ("pissa", "olora", "corda")  # loading such an adapter rewrites the base weights, so it is not loaded onto the live model


def check(model: Any, folder: Path, ids: Any) -> dict[str, Any]:
    """Compares the saved files with the model in memory; returns what was compared, for run.json.

    Args:
        model: not wrapped by an engine.
        ids: a row's token ids, of which the first 64 are the probe.

    Raises:
        BackendError: a tensor is missing, too many, of another shape, not finite or not equal; or the logits differ.
    """
    compared = check_tensors(model, folder)
    if not isinstance(model, PeftModel):
        return {"tensors": compared}
    init = str(model.peft_config[model.active_adapter].init_lora_weights).lower()
    if init.startswith(SPLITS_BASE):
        return {"tensors": compared, "logits": f"not compared: {init} splits the base weights"}
    return {"tensors": compared, "logits": check_logits(model, folder, torch.as_tensor(ids[:PROBE], dtype=torch.int64)[None])}


def check_tensors(model: Any, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> int:
    """The number of saved tensors, each equal to the one in memory. Tied weights may be saved once.

    Args:
        whole: an adapter's tensors, where an engine keeps the model's in pieces.
    """
    if isinstance(model, PeftModel):
        expected, may_lack = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False), set()
    else:
        expected, may_lack = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or ())
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise BackendError(f"{file} cannot be read back after saving: {error}. Is the disk full?") from None
    problems = [f"{name} is missing" for name in expected.keys() - found.keys() - may_lack]
    problems += [f"{name} is in the file only" for name in found.keys() - expected.keys()]
    problems += filter(None, (_difference(name, found[name], expected[name]) for name in found.keys() & expected.keys()))
    if problems or not found:
        first = sorted(problems)[0] if problems else "no tensor at all"
        raise BackendError(f"{folder}: what was saved is not what was trained ({len(problems)} of {len(expected)} tensors): {first}")
    return len(found)


def _difference(name: str, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"{name} has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        return f"{name} is not finite"
    return None if torch.equal(found, expected.detach().cpu()) else f"{name} differs from the trained one"


@torch.no_grad()
def check_logits(model: PeftModel, folder: Path, ids: torch.Tensor) -> str:
    """Loads the saved adapter beside the live one and compares their logits [1, tokens, vocabulary] on the probe.

    Both go through PEFT's own layers: whoever loads the files has those, and only the weights can then differ.
    """
    fused = [module for module in model.modules() if getattr(module, "is_fused", False)]
    live, was_training = model.active_adapter, model.training
    ids = ids.to(model.device)
    model.eval()
    for layer in fused:
        layer.is_fused = False
    try:
        with torch.compiler.set_stance("force_eager"):
            expected = model(input_ids=ids).logits.float()
            model.load_adapter(str(folder), adapter_name=RELOADED)
            model.set_adapter(RELOADED)
            reloaded = model(input_ids=ids).logits.float()
    finally:
        for layer in fused:
            layer.is_fused = True
        model.set_adapter(live)
        if RELOADED in model.peft_config:
            model.delete_adapter(RELOADED)
        model.train(was_training)
    error = float((reloaded - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= 1e-5:
        raise BackendError(f"{folder}: the saved adapter loads back to other logits (largest difference {error:.2g} of the largest logit)")
    return f"equal on {ids.shape[1]} tokens (largest difference {error:.1g} of the largest logit)"
