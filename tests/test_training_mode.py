"""train() and zero_grad() of a run's model, which must not walk all of it at every pass and still do what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
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


class Engine(torch.nn.Module):
    """As DeepSpeed's: it stays in training mode and sets that of its module alone, with train() and eval() of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Sequential(torch.nn.Dropout(0.5))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        self.module.train(mode)

    def eval(self) -> None:  # type: ignore[override]
        self.module.train(False)


@pytest.mark.parametrize(
    "evaluates", [lambda engine: engine.eval(), lambda engine: engine.module.eval(), lambda engine: engine.train(False)]
)
def test_mode_when_an_engine_keeps_its_own_then_its_module_goes_to_eval_and_back(evaluates: Callable[[Engine], object]) -> None:
    engine = Engine()
    spare_walks(engine, engine.module, [])
    for _ in range(2):
        evaluates(engine)
        assert not any(part.training for part in engine.module.modules())
        engine.module.append(torch.nn.Dropout(0.5))
        engine.train()
        assert all(part.training for part in engine.module.modules())


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
