"""train() and zero_grad() of a run's model, which must not walk all of it at every pass and still do what they say."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune import train
from surefoot.training.pace import spare_walks
from tests.runs import logs, quick


class Wrapped(torch.nn.Module):
    """As DDP: a module around the model, which keeps its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
        self.module[0].weight.requires_grad_(False)
        self.module.eval()


def made() -> Wrapped:
    model = Wrapped()
    spare_walks(model, model.module, [model.module[0].bias])
    return model


def test_mode_when_the_model_came_or_was_put_into_eval_then_train_reaches_every_module() -> None:
    model = made()
    assert all(part.training for part in model.modules())
    model.module.eval()
    assert model.train() is model
    assert all(part.training for part in model.modules())
    model.eval()
    model.module.append(torch.nn.Dropout(0.5))
    model.eval()
    assert not any(part.training for part in model.modules())


def test_zero_grad_when_called_then_no_gradient_is_left() -> None:
    model = made()
    model.module(torch.ones(1, 2)).sum().backward()
    assert model.module[0].bias.grad is not None
    model.zero_grad()
    assert model.module[0].bias.grad is None


def test_run_when_evaluated_in_between_then_drops_as_if_it_was_not(rows: Path, tmp_path: Path) -> None:
    flags = quick(data_path=rows, lora_dropout=0.3, max_steps=6, val_set_size=8)
    train(output_dir=tmp_path / "plain", **flags | {"eval_strategy": "no"})
    train(output_dir=tmp_path / "evaluated", **flags | {"eval_strategy": "steps", "eval_step": 2})
    assert logs(tmp_path / "evaluated", "eval_loss")
    assert logs(tmp_path / "evaluated", "loss") == logs(tmp_path / "plain", "loss")
