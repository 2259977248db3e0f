"""What is due at the end of a step: log, evaluation, save, in this order, so that a checkpoint holds all that its step brought."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Schedule(TrainerCallback):  # type: ignore[misc]
    """In place of transformers' DefaultFlowCallback, which saves an epoch's last step before that epoch's evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        ends_epoch = is_last or float(state.epoch).is_integer()
        control.should_log |= step == 1 or step % args.logging_steps == 0
        control.should_evaluate |= _is_due(args.eval_strategy, args.eval_steps, step, is_last, ends_epoch)
        control.should_save |= _is_due(args.save_strategy, args.save_steps, step, is_last, ends_epoch)
        control.should_training_stop |= is_last


def _is_due(strategy: str, every: float, step: int, is_last: bool, ends_epoch: bool) -> bool:
    if strategy == "steps":
        return is_last or step % every == 0
    return strategy == "epoch" and ends_epoch
