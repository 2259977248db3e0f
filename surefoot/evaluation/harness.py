"""lm-eval (EleutherAI's harness) on a model that is already open, through its own API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surefoot.errors import BackendError, UsageError


def run(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, folder: str | None, batch_size: int, limit: int | None
) -> dict[str, dict[str, float]]:
    """By task its metrics and their standard errors, as the harness names them.

    Args:
        folder: of the user's own task files (YAML), besides those that the harness holds.

    Raises:
        BackendError: lm-eval is not installed, or a task's data cannot be had. UsageError: no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise BackendError(f"--lm_eval needs {error.name}, which is not installed. Use pip install 'lm-eval[hf]'") from None
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"--lm_eval={','.join(tasks)}: lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}. List them with lm-eval ls tasks"
        )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )
    except (OSError, ConnectionError) as error:
        raise BackendError(f"--lm_eval={','.join(tasks)}: its data cannot be loaded: {str(error).splitlines()[0]}") from error
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
