"""Older names of our flags, and the flags of the scripts we replace that we refuse, each with its way out."""

from __future__ import annotations

from typing import Any

ALIASES = {
    "micro_batch_size": "per_device_train_batch_size",
    "evaluation_strategy": "eval_strategy",
    "eval_steps": "eval_step",
    "save_steps": "save_step",
    "lora_target_modules": "target_modules",
    "load_in_4bit": "load_4bit",
    "load_in_8bit": "load_8bit",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "max_seq_length": "cutoff_len",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "random_state": "seed",
    "lr": "learning_rate",
    "model": "base_model",
    "model_name_or_path": "base_model",
    "wandb_run_name": "run_name",
    "resume_from": "resume_from_checkpoint",
    "dataset_text_field": "text_field",
    "torch_compile": "enable_torch_compile",
}

_BOTTLENECK = "bottleneck adapters are not built here; train --adapter_name=lora or dora, which merge into the weights"
_PREFIX = "prefix tuning is not built here; use PEFT's PrefixTuningConfig, or --adapter_name=lora"
_GRPO = "this trains on given answers (SFT) only; use trl's GRPOTrainer for reinforcement learning"

# name -> (values that switched nothing on in the old scripts and are accepted with a note, why it is refused)
RETIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bottleneck_size": ((256,), _BOTTLENECK),
    "non_linearity": (("tanh",), _BOTTLENECK),
    "adapter_dropout": ((0, 0.0), _BOTTLENECK),
    "use_parallel_adapter": ((False,), _BOTTLENECK),
    "use_adapterp": ((False,), _BOTTLENECK),
    "scaling": ((1, 1.0), _BOTTLENECK + ". The scale of LoRA and DoRA is lora_alpha / lora_r"),
    "num_virtual_tokens": ((30,), _PREFIX),
    "dora_simple": (
        (True,),
        "the gradient through the weight norm (dora_simple=False) is not built: the DoRA paper (section 4.3) and PEFT "
        "hold the norm constant, which costs 0.2 points or nothing; drop the flag",
    ),
    "Wdecompose_target_modules": (
        ("", None),
        "training a magnitude without its LoRA pair has no PEFT file format; list these modules in --target_modules",
    ),
    "use_sr_trainer": ((False,), "it belonged to a research fork; the Trainer here has no such mode"),
    "timestamp": (("", None), "name the run with --run_name, or its folder with --output_dir"),
    "local_rank": (tuple(range(-1, 1024)), "ranks come from the environment that accelerate or torchrun sets"),
    "deepspeed": (("", None), "start it as: accelerate launch --config_file profiles/ds_zero2.yaml --num_processes N finetune.py ..."),
    "num_generations": ((), _GRPO),
    "max_prompt_length": ((), _GRPO),
    "max_completion_length": ((), _GRPO),
    "gpu_memory_utilization": ((), _GRPO + "; vLLM is not started here"),
    "fast_inference": ((False,), _GRPO + "; vLLM is not started here"),
    "device_map": (("", None), "every process trains on its own device (device_map=None); several GPUs are used through a profile"),
    "loftq_config": (("", None), "use --init_lora_weights=loftq"),
    "bias": (("none",), "biases stay frozen: PEFT's other modes change the base model's outputs with the adapter off"),
}

# adapter_name values of the older scripts
RETIRED_ADAPTERS = {
    "bottleneck": _BOTTLENECK,
    "prefix-tuning": _PREFIX,
    "qalora": "QA-LoRA is not built here; --adapter_name=lora --load_4bit=True (QLoRA) is the kept-up equivalent",
    "qlora": "say --adapter_name=lora --load_4bit=True",
    "qdora": "say --adapter_name=dora --load_4bit=True",
}
