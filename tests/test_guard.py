"""The guard, by breaking the thing on purpose: a bf16 magnitude, a gradient that is not finite, an optimizer that moves nothing."""

from __future__ import annotations

import pytest
import torch

from surefoot import adapters
from surefoot.backends import hf
from surefoot.errors import BackendError, NumericsError
from surefoot.training.guard import Masters, Movement, check_gradient
from tests.test_adapters import adapter_plan, model_plan


@pytest.fixture
def model() -> torch.nn.Module:
    return adapters.attach(hf.load_model(model_plan(), 0, None), adapter_plan(), seed=1)


def test_masters_when_the_engine_cast_a_magnitude_then_stop_the_run(model: torch.nn.Module) -> None:
    Masters().on_train_begin(None, None, None, model=model)
    name, magnitude = next((name, parameter) for name, parameter in model.named_parameters() if "magnitude" in name)
    magnitude.data = magnitude.data.to(torch.bfloat16)
    with pytest.raises(BackendError) as caught:
        Masters().on_train_begin(None, None, None, model=model)
    assert f"{name} (bfloat16)" in str(caught.value)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_gradient_when_not_finite_then_stops_before_the_step(norm: float) -> None:
    check_gradient(1.0, 5)
    with pytest.raises(NumericsError, match="left as after step 4"):
        check_gradient(norm, 5)


def test_movement_when_some_or_no_tensor_moved_then_names_or_refuses(model: torch.nn.Module) -> None:
    movement = Movement(model)
    with pytest.raises(NumericsError, match="nothing was learned"):
        movement.check(model)
    name, parameter = next((name, parameter) for name, parameter in model.named_parameters() if "lora_B" in name)
    parameter.data += 1e-3
    assert name not in movement.check(model)
    assert len(movement.check(model)) == len(movement.before) - 1
