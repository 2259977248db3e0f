"""The only writer of process-wide state: environment, SDPA switches, determinism, seeds."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from surefoot.errors import BackendError
from surefoot.machine import UNSLOTH_REFUSED
from surefoot.plan import Plan, ProcessPlan


def debug_switches() -> None:
    """CUDA reads these when it starts, so they are set before the machine is probed. They serialise every kernel: --debug only."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["TORCH_USE_CUDA_DSA"] = "1"


def before_imports(plan: Plan) -> None:
    """Sets Unsloth's environment, where the plan is to import it next.

    Raises:
        BackendError: this process has imported what Unsloth must come before, or Unsloth where the plan is another backend's.
    """
    if plan.backend != "unsloth":
        if "unsloth" in sys.modules:
            raise BackendError(f"--backend={plan.backend}: this process has imported Unsloth, which patched transformers. Start a new one")
        return
    early = [name for name in ("transformers", "peft", "trl") if name in sys.modules]
    if early and "unsloth" not in sys.modules:
        raise BackendError(
            f"--backend=unsloth: this process imported {', '.join(early)} before Unsloth, which patches them as they are imported. "
            "Start it as python finetune.py, or import unsloth first"
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would report each run to the Hub
    # else it makes ./unsloth_compiled_cache
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(plan.machine.cache_dir, "unsloth_compiled"))


def start_again(reason: str) -> NoReturn:
    """Puts a new process, with the same command, in this one's place; machine.probe() finds there why Unsloth was given up."""
    print(f"{reason}. Starting again without Unsloth", flush=True)
    os.environ[UNSLOTH_REFUSED] = reason
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def apply(plan: ProcessPlan) -> None:
    """Sets what the plan decided, before a model is loaded."""
    os.environ.update(plan.environment)
    # tokenizers (Rust) forks badly after its threads have started; its own warning names this variable
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch
    import transformers

    quiet()
    if plan.gpu is not None:
        torch.cuda.set_device(plan.gpu)  # else every process would load its model onto the first GPU
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in plan.sdpa_kernels)
    torch.backends.cuda.enable_flash_sdp("flash" in plan.sdpa_kernels)
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in plan.sdpa_kernels)
    torch.backends.cuda.enable_math_sdp("math" in plan.sdpa_kernels)
    if plan.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    transformers.set_seed(plan.seed)
    if plan.fsdp_on_cpu:
        _fsdp_on_cpu()


def _fsdp_on_cpu() -> None:
    """accelerate 1.15 makes FSDP of a group of GPUs only, and DDP, or processes of their own, of one of CPUs, without a word."""
    from accelerate import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def _speaks_of_more_than_the_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")


def quiet() -> None:
    """transformers says nothing below an error, and draws bars only on a terminal; DeepSpeed does not say that there is no GPU."""
    import transformers

    logging.getLogger("DeepSpeed").addFilter(_speaks_of_more_than_the_cpu)  # accelerate imports it wherever it is installed
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
