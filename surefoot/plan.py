"""Plan: everything decided, each choice with its reason. make_plan() is pure, so that every rank makes the same plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from surefoot import decide
from surefoot.config import FLAGS, Config
from surefoot.detection import Answer, Case
from surefoot.errors import BackendError, PlanError, joined
from surefoot.inputs import Inputs
from surefoot.machine import Machine
from surefoot.memory import Estimate
from surefoot.rules import attention, backend, launch, resume, stamp
from surefoot.rules.desk import Choice, Desk
from surefoot.verdicts import Shape, Verdicts


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """How the base model is loaded. quantization is none, nf4 or int8; compute_dtype names the dtype of the quantized products.

    frozen_dtype is what frozen linear layers and embeddings are stored in, bf16 or fp32 (fp16 through Unsloth).
    """

    path: str
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str
    quantization: str
    compute_dtype: str
    frozen_dtype: str
    loads_on_gpu: bool
    cutoff_len: int
    use_gradient_checkpointing: bool | str  # read by Unsloth, which recomputes by itself
    enable_torch_compile: bool
    fused_adapters: bool
    fused_loss: bool
    recompute_layers: int  # the first so many decoder layers; -1: all of them
    offload_inputs: bool  # the inputs of recomputing layers wait in host memory
    spares_down: bool = False  # recomputing layers leave out down_proj; a default, since records of older runs lack it


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What is trained. method is lora, dora or full; target_modules None means every linear layer but the head."""

    method: str
    use_rslora: bool
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | None
    init_lora_weights: bool | str


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Which rows are read, how they become tokens, and which tokens are trained on."""

    data_path: tuple[str, ...]
    data_split: str
    val_data_path: tuple[str, ...] | None
    val_set_size: int | float  # rows, or a fraction below 1
    val_set_size_is_default: bool
    cutoff_len: int
    overlong: str
    prompt_style: str
    text_field: str
    train_on_inputs: bool
    audit: str
    cache_dir: str | None  # None: nothing is kept
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The optimizer's side. warmup below 1 is a fraction of all steps, else steps."""

    batch_size: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    num_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    optim: str
    precision: str
    group_by_length: bool
    packing: str  # on, off, or auto until the rows are read
    pack_len: int | None  # slots of a packed row; None: chosen when the rows are read
    packed_attention: str  # eager, sdpa, flash_attention_2, or varlen where sdpa gives packed rows to it
    dataloader_num_workers: int
    eval_strategy: str
    eval_step: int
    save_strategy: str
    save_step: int
    save_total_limit: int | None
    load_best_model_at_end: bool
    max_bad_steps: int
    loss_spike: str
    logging_steps: int
    report_to: tuple[str, ...]
    run_name: str | None
    grace_s: float
    hang_timeout_s: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """Process-wide state that runtime.apply() writes."""

    seed: int
    deterministic: bool
    gpu: int | None  # this process's; what says just "cuda" means it
    fsdp_on_cpu: bool  # accelerate would silently run DDP
    sdpa_kernels: tuple[str, ...]  # of cudnn, flash, efficient, math
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    folder: str
    clears_earlier_run: bool
    resume_from: str | None
    is_finished: bool  # the same command has run to its end


@dataclass(frozen=True, kw_only=True)
class Plan:
    backend: str
    model: ModelPlan
    adapter: AdapterPlan
    data: DataPlan
    train: TrainPlan
    process: ProcessPlan
    output: OutputPlan
    machine: Machine
    attention: Verdicts | None
    memory: Estimate | None
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]

    def stamp(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues (backend.json)."""
        return decide.stamp(self)


T = TypeVar("T")


def _pick(kind: type[T], config: Config, **decided: Any) -> T:
    """A `kind` from what was decided; its other fields are the config's fields of the same name."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    same = {name: getattr(config, name) for name in names & FLAGS.keys()}
    return kind(**{**same, **{name: value for name, value in decided.items() if name in names}})


def attention_to_check(config: Config, machine: Machine, inputs: Inputs, unsloth: Answer | None = None) -> Shape | None:
    """What the attention canary must try before make_plan(); None where nothing but eager attention, or no GPU, is in question."""
    desk = Desk(config=config, machine=machine, inputs=inputs, unsloth=unsloth, problems=[], notes=[])
    launch.processes(desk)
    return None if desk.problems else attention.to_check(desk)  # a process without a GPU has none to try them on


def unsloth_to_try(config: Config, machine: Machine, inputs: Inputs) -> Case | None:
    """What a trial of Unsloth must answer before make_plan(); None where Unsloth is not in question."""
    return backend.question(Desk(config=config, machine=machine, inputs=inputs, problems=[], notes=[]))


def make_plan(config: Config, machine: Machine, inputs: Inputs, verdicts: Verdicts | None = None, unsloth: Answer | None = None) -> Plan:
    """All cross-field rules and every automatic choice.

    Args:
        verdicts: of the attention canary on this machine; None: nothing was checked.
        unsloth: what a trial of Unsloth said; None: nobody asked.

    Raises:
        PlanError: every contradiction and every wrong path at once, each with its way out.
        BackendError: --strict_backend and the backend asked for cannot run.
    """
    desk = Desk(
        config=config, machine=machine, inputs=inputs, verdicts=verdicts, unsloth=unsloth,
        problems=list(inputs.problems), notes=list(config.notes),
    )  # fmt: skip
    decided = decide.decisions(desk)
    choices = tuple(decided.values()) + tuple(
        Choice(name, getattr(config, name), config.source(name), "")
        for name in FLAGS
        if name not in decided and name not in decide.NOT_SETTINGS
    )
    if desk.problems:
        raise PlanError(joined(desk.problems))
    if desk.obstacle and config.strict_backend:
        raise BackendError(f"--backend={config.backend} --strict_backend: {desk.obstacle}. Without --strict_backend the run falls back")
    values = {name: choice.value for name, choice in decided.items()}
    plan = Plan(
        backend=values["backend"],
        model=_pick(ModelPlan, config, path=inputs.model_path, **values),
        adapter=_pick(AdapterPlan, config, **values),
        data=_pick(
            DataPlan,
            config,
            val_set_size_is_default=not config.given("val_set_size"),
            cache_dir=machine.cache_dir if config.data_cache else None,
        ),
        train=_pick(TrainPlan, config, **values),
        process=_pick(
            ProcessPlan,
            config,
            gpu=machine.local_rank if machine.gpus else None,
            fsdp_on_cpu=machine.engine == "fsdp" and not machine.gpus,
            **values,
        ),
        output=OutputPlan(
            folder=config.output_dir,
            clears_earlier_run=config.overwrite,
            resume_from=values["resume_from"],
            is_finished=resume.is_finished(desk),
        ),
        machine=machine,
        attention=verdicts,
        memory=desk.estimate,
        choices=choices,
        notes=tuple(desk.notes),
    )
    return _check_stamp(plan, inputs, desk.obstacle)


def _check_stamp(plan: Plan, inputs: Inputs, obstacle: str | None) -> Plan:
    """A resumed run must be the same training (its stamp); other versions of the libraries are a note."""
    before = inputs.resume_stamp
    if plan.output.resume_from is None or before is None:
        return plan
    refusal = stamp.refusal(plan.output.resume_from, before, plan.stamp())
    if refusal:
        raise PlanError(refusal + (f". Now: {obstacle}" if obstacle else ""))
    drift = stamp.drift(before["versions"], plan.machine.versions) if isinstance(before.get("versions"), dict) else ""
    return dataclasses.replace(plan, notes=(*plan.notes, drift)) if drift else plan
