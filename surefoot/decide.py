"""The rules: each method of Desk settles one question and says why, or writes down the problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from surefoot.config import Config
from surefoot.inputs import Inputs
from surefoot.machine import Machine
from surefoot.stages import STAGES, Stage

if TYPE_CHECKING:
    from surefoot.plan import Plan

NOT_SETTINGS = ("config", "dry_run", "plan_json", "resume", "overwrite", "strict_backend", "local_dir")
DEFAULT_WARMUP = 0.06
TRACKERS = ("wandb", "trackio", "mlflow")


class Choice(NamedTuple):
    """One effective value, where it came from (flag, file, stage, default, auto), and why."""

    name: str
    value: Any
    source: str
    reason: str


@dataclass(kw_only=True)
class Desk:
    """The papers on the table while the plan is made; `problems` and `notes` fill up on the way."""

    config: Config
    machine: Machine
    inputs: Inputs
    problems: list[str]
    notes: list[str]
    obstacle: str | None = field(default=None)

    def all(self) -> dict[str, Choice]:
        """Every decided value by name, in the order of the printed table."""
        return {choice.name: choice for choice in self._decisions()}

    def _decisions(self) -> Iterator[Choice]:
        quantization = self.quantization()
        precision = self.precision()
        yield self.backend(quantization.value)
        yield quantization
        yield precision
        yield self.compute_dtype(quantization.value, precision.value)
        yield from self.method()
        yield self.targets()
        yield self.initial_weights(quantization.value)
        attention = self.attention()
        yield attention
        yield from self.sdpa(attention.value)
        yield self.compiling()
        yield self.checkpointing()
        yield from self.batch()
        yield self.warmup()
        yield self.optimizer()
        yield from self.evaluation()
        yield self.trackers()
        yield self.resume_from()
        yield self.environment()
        self.steps()
        self.processes()
        self.floors()

    def _as_given(self, name: str, reason: str = "") -> Choice:
        return Choice(name, getattr(self.config, name), self.config.source(name), reason)

    @property
    def _stage(self) -> Stage:
        return STAGES[self.config.stage]

    # model

    def quantization(self) -> Choice:
        c, m = self.config, self.machine
        kind = "nf4" if c.load_4bit else "int8" if c.load_8bit else "none"
        flag = "load_4bit" if c.load_4bit else "load_8bit"
        if c.load_4bit and c.load_8bit:
            self.problems.append("--load_4bit=True and --load_8bit=True exclude each other. Give one of them")
        elif kind != "none" and not m.has("bitsandbytes"):
            self.problems.append(f"--{flag}=True needs bitsandbytes, which is not installed: pip install 'surefoot[bnb]'")
        if kind != "none" and c.adapter_name == "full":
            self.problems.append(f"--adapter_name=full cannot train quantized weights: drop --{flag}, or use --adapter_name=dora")
        if kind == "int8" and c.adapter_name == "dora" and not m.gpus:
            self.problems.append(
                "--load_8bit=True with --adapter_name=dora fails on a CPU (bitsandbytes 0.50 has no weight gradient there). "
                "Use --load_4bit=True, or --adapter_name=lora"
            )
        if kind == "nf4" and c.adapter_name == "dora" and m.zero_stage == 3:
            self.problems.append(
                "QDoRA (--load_4bit=True --adapter_name=dora) fails under ZeRO-3: DeepSpeed 0.19 cannot partition Params4bit. "
                "Use profiles/ddp.yaml, or --adapter_name=lora"
            )
        reason = "NF4, double quantization" if kind == "nf4" else "frozen weights keep their precision" if kind == "none" else ""
        return Choice("quantization", kind, c.source(flag) if kind != "none" else "default", reason)

    def backend(self, quantization: str) -> Choice:
        c = self.config
        name = "hf" if quantization == "none" else "bnb"
        why = "frozen weights are not quantized" if name == "hf" else "quantized weights are bitsandbytes'"
        if c.backend == "unsloth":
            self.obstacle = "this version does not drive Unsloth yet"
            reason = f"unsloth was asked for, but {self.obstacle}: falling back to {name} ({why})"
            self.notes.append(reason)
            return Choice("backend", name, "auto", reason)
        if c.backend in ("auto", name):
            return Choice("backend", name, c.source("backend") if c.backend != "auto" else "auto", why)
        return Choice("backend", name, "auto", f"--backend={c.backend} was asked for, but {why}")

    def precision(self) -> Choice:
        c, m = self.config, self.machine
        if c.bf16 and c.fp16:
            self.problems.append("--bf16=True and --fp16=True exclude each other. Give one of them, or neither to have it chosen")
        if c.fp16 and not m.gpus:
            self.problems.append(
                "--fp16=True has no effect on a CPU: the libraries ignore it silently. Use --bf16=True, or neither for fp32"
            )
        if c.bf16 and m.gpu and m.gpu.capability < (8, 0):
            self.problems.append(f"--bf16=True needs compute capability 8.0; {m.gpu.name} has {_version(m.gpu)}. Use --fp16=True")
        asked = "bf16" if c.bf16 else "fp16" if c.fp16 else "fp32" if c.bf16 is False or c.fp16 is False else None
        if m.launcher_precision in ("bf16", "fp16") and asked not in (None, m.launcher_precision):
            self.problems.append(
                f"the launcher's profile says mixed_precision: {m.launcher_precision}, the flags say {asked}. "
                "Change one of them, or set mixed_precision: 'no' in the profile and let the flags decide"
            )
        if (c.bf16 is False and c.fp16 is None) or (c.fp16 is False and c.bf16 is None):
            return Choice("precision", "fp32", c.source("bf16" if c.bf16 is False else "fp16"), "autocast switched off")
        if asked:
            return Choice("precision", asked, c.source("bf16" if c.bf16 else "fp16"), "autocast over fp32 master weights")
        if m.launcher_precision in ("bf16", "fp16"):
            return Choice("precision", m.launcher_precision, "profile", "mixed_precision of the launcher's profile")
        if m.gpu is None:
            return Choice("precision", "fp32", "auto", "no GPU")
        if m.gpu.capability >= (8, 0):
            return Choice("precision", "bf16", "auto", f"{m.gpu.name} has bf16 (compute capability {_version(m.gpu)})")
        return Choice("precision", "fp16", "auto", f"{m.gpu.name} has no bf16 (compute capability {_version(m.gpu)} < 8.0)")

    def compute_dtype(self, quantization: str, precision: str) -> Choice:
        if quantization == "none":
            return Choice("compute_dtype", precision, "auto", "as precision")
        if precision == "fp16" or (precision == "fp32" and self.config.given("bf16")):
            return Choice("compute_dtype", precision, "auto", "as precision")
        return Choice("compute_dtype", "bf16", "auto", "products of quantized weights")

    # adapter

    def method(self) -> Iterator[Choice]:
        c = self.config
        source = c.source("adapter_name")
        method = "lora" if c.adapter_name == "rslora" else c.adapter_name
        is_rslora = c.use_rslora or c.adapter_name == "rslora"
        if method == "full":
            named = [name for name in ("lora_r", "lora_alpha", "target_modules", "init_lora_weights", "use_rslora") if c.given(name)]
            if named:
                self.notes.append(f"--adapter_name=full trains every weight: --{', --'.join(named)} have no effect")
        if method == "dora" and c.lora_dropout > 0:
            self.notes.append(f"DoRA with lora_dropout={c.lora_dropout:g} computes each base product twice; --lora_dropout=0 is faster")
        if c.lora_dropout >= 1:
            self.problems.append(f"--lora_dropout={c.lora_dropout:g} must be below 1")
        yield Choice("method", method, source, "")
        root = "alpha / sqrt(r)" if is_rslora else "alpha / r"
        scale = c.lora_alpha / (c.lora_r**0.5 if is_rslora else c.lora_r)
        yield Choice("use_rslora", is_rslora, c.source("use_rslora") if c.use_rslora else source, f"scale {root} = {scale:g}")

    def initial_weights(self, quantization: str) -> Choice:
        c = self.config
        init = c.init_lora_weights
        kind = init if isinstance(init, str) else ""
        if kind == "eva":
            self.problems.append(
                "--init_lora_weights=eva takes its directions from training rows before the run, which is not built. Use pissa"
            )
        if kind == "loftq":
            self.problems.append(
                "--init_lora_weights=loftq makes its own quantized base, which is not built. Use --load_4bit=True with True"
            )
        if kind.startswith(("pissa", "olora")) and quantization != "none":
            self.problems.append(
                f"--init_lora_weights={init} splits the base weights and needs the unquantized weights. Drop --load_4bit/--load_8bit"
            )
        return self._as_given("init_lora_weights")

    def targets(self) -> Choice:
        if self.config.target_modules:
            return self._as_given("target_modules")
        return Choice("target_modules", None, "auto", "every linear layer but the head")

    # attention

    def attention(self) -> Choice:
        c, m = self.config, self.machine
        fallback = None
        if not m.gpus:
            fallback = "needs a CUDA GPU"
        elif not m.has("flash-attn"):
            fallback = "is not installed (pip install flash-attn --no-build-isolation)"
        if c.attn_implementation is not None:
            if c.attn_implementation == "flash_attention_2" and fallback:
                self.problems.append(f"--attn_implementation=flash_attention_2 {fallback}. Use --attn_implementation=sdpa, or eager")
            return self._as_given("attn_implementation")
        wanted = self._stage.attn_implementation
        if wanted == "flash_attention_2" and fallback:
            return Choice("attn_implementation", "sdpa", f"stage {c.stage}", f"flash_attention_2 {fallback}")
        return Choice("attn_implementation", wanted, f"stage {c.stage}", "")

    def sdpa(self, attention: str) -> Iterator[Choice]:
        c = self.config
        has_effect = attention == "sdpa" and bool(self.machine.gpus)
        idle = "" if has_effect else "no effect: only sdpa attention on a GPU reads it"
        given = c.disable_cudnn_sdpa
        off = self._stage.disable_cudnn_sdpa if given is None else given
        source = c.source("disable_cudnn_sdpa") if given is not None else f"stage {c.stage}"
        if has_effect and not off:
            self.notes.append(
                "cuDNN attention is on and nothing has checked it on this machine: with torch 2.11 to 2.14 its gradients are NaN "
                "for some lengths when a mask is passed (pytorch/pytorch#196678)"
            )
        reason = "" if given is not None else "until a check of this machine clears cuDNN's kernels"
        yield Choice("disable_cudnn_sdpa", off, source, idle or reason)
        yield Choice("disable_flash_sdpa", c.disable_flash_sdpa, c.source("disable_flash_sdpa"), idle)

    def compiling(self) -> Choice:
        c = self.config
        if c.enable_torch_compile is not None:
            return self._as_given("enable_torch_compile", "one decoder layer at a time" if c.enable_torch_compile else "")
        return Choice("enable_torch_compile", self._stage.enable_torch_compile, f"stage {c.stage}", "")

    def checkpointing(self) -> Choice:
        asked = self.config.use_gradient_checkpointing
        reason = "unsloth's recompute needs the unsloth backend; the plain one is used" if asked == "unsloth" else ""
        return Choice("use_gradient_checkpointing", bool(asked), self.config.source("use_gradient_checkpointing"), reason)

    # training

    def batch(self) -> Iterator[Choice]:
        c, world = self.config, self.machine.world_size
        micro, batch = c.per_device_train_batch_size, c.batch_size
        micro_source, batch_source, why_micro, why_batch = c.source("per_device_train_batch_size"), c.source("batch_size"), "", ""
        if c.gradient_accumulation_steps and not c.given("batch_size"):
            batch, batch_source = micro * world * c.gradient_accumulation_steps, "auto"
            why_batch = f"{micro} per device x {world} processes x {c.gradient_accumulation_steps} accumulated"
        elif not c.given("per_device_train_batch_size") and batch % world == 0 and (batch // world) % micro:
            micro, micro_source = max(size for size in range(1, micro + 1) if (batch // world) % size == 0), "auto"
            why_micro = f"largest size up to {c.per_device_train_batch_size} that divides batch_size / {world} processes"
        elif not c.given("batch_size") and batch % (micro * world):
            batch, batch_source = max(1, batch // (micro * world)) * micro * world, "auto"
            why_batch = f"nearest to {c.batch_size} that {micro} per device x {world} processes divides"
        unit = micro * world
        if batch % unit:
            below, above = batch // unit * unit, -(-batch // unit) * unit
            ways = f"{below} or {above}" if below else f"{above}"
            self.problems.append(
                f"--batch_size={batch} cannot be split: per_device_train_batch_size={micro} x {world} processes = {unit}. Use {ways}"
            )
        accumulation = max(1, batch // unit)
        if c.gradient_accumulation_steps and c.gradient_accumulation_steps != accumulation:
            self.problems.append(
                f"--gradient_accumulation_steps={c.gradient_accumulation_steps} contradicts --batch_size={batch}: "
                f"{batch} / ({micro} x {world} processes) = {accumulation}. Drop one of them"
            )
        yield Choice("batch_size", batch, batch_source, why_batch or "rows per optimizer step, all processes together")
        yield Choice("per_device_train_batch_size", micro, micro_source, why_micro)
        given = c.given("gradient_accumulation_steps")
        source = c.source("gradient_accumulation_steps") if given else "auto"
        yield Choice("gradient_accumulation_steps", accumulation, source, f"{batch} / ({micro} per device x {world} processes)")
        evaluated = c.per_device_eval_batch_size
        yield Choice(
            "per_device_eval_batch_size", evaluated or micro, c.source("per_device_eval_batch_size") if evaluated else "auto",
            "" if evaluated else "as in training",
        )  # fmt: skip

    def warmup(self) -> Choice:
        c = self.config
        if c.warmup_steps is not None and c.warmup_ratio is not None:
            self.problems.append(
                f"--warmup_steps={c.warmup_steps} and --warmup_ratio={c.warmup_ratio:g} exclude each other. Give one of them"
            )
        if c.warmup_ratio is not None and c.warmup_ratio >= 1:
            self.problems.append(
                f"--warmup_ratio={c.warmup_ratio:g} is a fraction of all steps and must be below 1. For steps use --warmup_steps"
            )
        if c.lr_scheduler_type == "constant":
            if c.warmup_steps or c.warmup_ratio:
                self.notes.append("--lr_scheduler_type=constant has no warm-up; constant_with_warmup has")
            return Choice("warmup", 0.0, "auto", "a constant schedule has none")
        if c.warmup_steps is not None:
            return Choice("warmup", float(c.warmup_steps), c.source("warmup_steps"), "steps")
        if c.warmup_ratio is not None:
            return Choice("warmup", c.warmup_ratio, c.source("warmup_ratio"), "fraction of all steps")
        return Choice("warmup", DEFAULT_WARMUP, "default", "fraction of all steps")

    def optimizer(self) -> Choice:
        c, m = self.config, self.machine
        if c.optim == "auto":
            fused = bool(m.gpus)
            return Choice(
                "optim", "adamw_torch_fused" if fused else "adamw_torch", "auto", "fp32 state" + (", one kernel a step" if fused else "")
            )
        if c.optim.endswith("8bit"):
            if not m.gpus:
                self.problems.append(f"--optim={c.optim} needs a GPU. Use --optim=auto")
            elif not m.has("bitsandbytes"):
                self.problems.append(f"--optim={c.optim} needs bitsandbytes: pip install 'surefoot[bnb]'")
            self.notes.append(f"--optim={c.optim} keeps Adam's state in 8 bits, where the default keeps fp32")
        return self._as_given("optim")

    def steps(self) -> None:
        c = self.config
        if c.max_steps == 0 or (c.max_steps < 0 and c.num_epochs == 0):
            self.problems.append("nothing to train: --max_steps is 0, or --num_epochs is 0 and --max_steps is not given")
        if c.learning_rate == 0:
            self.problems.append("--learning_rate=0 would learn nothing. The default is 3e-4")
        if c.max_steps > 0 and c.given("num_epochs"):
            self.notes.append(f"--max_steps={c.max_steps} decides the length; --num_epochs={c.num_epochs:g} has no effect")

    def evaluation(self) -> Iterator[Choice]:
        c = self.config
        has_rows = bool(c.val_data_path) or c.val_set_size > 0
        if c.val_data_path and c.given("val_set_size"):
            self.notes.append(f"--val_data_path gives the evaluation rows; --val_set_size={c.val_set_size} has no effect")
        if has_rows:
            yield self._as_given("eval_strategy")
        else:
            yield Choice("eval_strategy", "no", "auto", "val_set_size is 0: no evaluation rows")
        evaluates = has_rows and c.eval_strategy != "no"
        obstacle = None
        if not evaluates:
            obstacle, cure = "there is no evaluation during training", "set --val_set_size and --eval_strategy"
        elif c.eval_strategy != c.save_strategy:
            obstacle = f"eval_strategy={c.eval_strategy} and save_strategy={c.save_strategy} differ"
            cure = f"use --save_strategy={c.eval_strategy}"
        elif c.eval_strategy == "steps" and c.save_step % c.eval_step:
            obstacle = f"save_step={c.save_step} is no multiple of eval_step={c.eval_step}"
            cure = f"use --save_step={max(1, c.save_step // c.eval_step) * c.eval_step}"
        name = "load_best_model_at_end"
        if obstacle and c.load_best_model_at_end:
            self.problems.append(f"--{name}=True cannot work: {obstacle}. Way out: {cure}")
        if c.load_best_model_at_end is not None:
            yield self._as_given(name)
        elif obstacle:
            yield Choice(name, False, "auto", obstacle)
        else:
            yield Choice(name, True, "auto", "evaluations and checkpoints coincide; lowest eval_loss wins")

    def trackers(self) -> Choice:
        c, m = self.config, self.machine
        asked = c.report_to
        if asked is None and c.wandb_project:
            asked = ("tensorboard", "wandb") if m.has("tensorboard") else ("wandb",)
        elif asked and c.wandb_project and "wandb" not in asked:
            self.notes.append(f"--report_to={','.join(asked)} leaves wandb out: --wandb_project={c.wandb_project} has no effect")
        if asked is None:
            if m.has("tensorboard"):
                return Choice("report_to", ("tensorboard",), "default", "metrics.jsonl is always written")
            return Choice("report_to", (), "auto", "tensorboard is not installed; metrics.jsonl is always written")
        if "none" in asked and len(asked) > 1:
            self.problems.append(f"--report_to={','.join(asked)}: none stands alone")
        for name in asked:
            if name != "none" and not m.has(name):
                self.problems.append(f"--report_to={name} needs {name}: pip install {name}")
        source = c.source("report_to") if c.report_to else c.source("wandb_project")
        return Choice("report_to", tuple(name for name in asked if name != "none"), source, "")

    # run folder

    def resume_from(self) -> Choice:
        c, folder = self.config, self.inputs.run_folder
        asked = c.resume or bool(c.resume_from_checkpoint)
        source = c.source("resume" if c.resume else "resume_from_checkpoint")
        if asked and c.overwrite:
            self.problems.append("--overwrite and --resume exclude each other. Give one of them")
        if isinstance(c.resume_from_checkpoint, str):
            return Choice("resume_from", c.resume_from_checkpoint, source, "")
        if asked and folder.status == "unfinished" and folder.checkpoints:
            return Choice("resume_from", folder.checkpoints[-1], source, f"newest of {len(folder.checkpoints)} checkpoints")
        if asked and folder.status == "finished":
            self.problems.append(
                f"--resume: the run in {c.output_dir} is finished. To train it further give "
                f"--resume_from_checkpoint={folder.checkpoints[-1] if folder.checkpoints else 'CHECKPOINT'}; to start anew, --overwrite"
            )
        elif not asked and not c.overwrite:
            self._refuse_overwriting()
        elif c.overwrite and folder.status == "foreign" and folder.clash:
            self.problems.append(
                f"--overwrite: {c.output_dir} holds {folder.clash} but no run.json, so it is no run of this program and stays as it is. "
                "Choose another --output_dir"
            )
        return Choice("resume_from", None, source if asked else "default", "no checkpoint to continue from" if asked else "")

    def _refuse_overwriting(self) -> None:
        folder, name = self.inputs.run_folder, self.config.output_dir
        if folder.status == "finished":
            self.problems.append(f"--output_dir={name} holds a finished run. Choose another folder, or --overwrite it")
        elif folder.status == "unfinished" and folder.checkpoints:
            self.problems.append(f"--output_dir={name} holds an unfinished run. --resume continues it, --overwrite starts anew")
        elif folder.status == "foreign" and folder.clash:
            self.problems.append(f"--output_dir={name} holds {folder.clash}, which this run would replace. Choose another folder")

    # process

    def environment(self) -> Choice:
        """Variables for programs that read them: W&B, mlflow and trackio take their project there, CUDA its debugging switches."""
        c, env = self.config, {}
        if c.wandb_project:
            env["WANDB_PROJECT"] = c.wandb_project
        if c.wandb_watch:
            env["WANDB_WATCH"] = c.wandb_watch
        if c.wandb_log_model:
            env["WANDB_LOG_MODEL"] = c.wandb_log_model
        if not c.wandb_online:
            env["WANDB_MODE"] = "offline"
        if c.debug:
            env |= {"CUDA_LAUNCH_BLOCKING": "1", "TORCH_USE_CUDA_DSA": "1"}
        if c.deterministic:
            env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS keeps one result per shape only with a fixed workspace
        return Choice("environment", env, "auto", "")

    def processes(self) -> None:
        m = self.machine
        if m.gpus and m.local_rank >= len(m.gpus):
            self.problems.append(f"process {m.rank} has no GPU: {len(m.gpus)} visible. Use --num_processes {len(m.gpus)}")
        if len(m.gpus) > 1 and m.world_size == 1:
            self.notes.append(
                f"1 process uses 1 of {len(m.gpus)} GPUs. For all: "
                f"accelerate launch --config_file profiles/ddp.yaml --num_processes {len(m.gpus)} finetune.py ..."
            )

    def floors(self) -> None:
        """The stage's version floors beside what is loaded: facts for the reader, no gate."""
        m, stage = self.machine, self._stage
        for name, loaded, floor in (("CUDA", m.cuda, stage.cuda_floor), ("cuDNN", m.cudnn, stage.cudnn_floor)):
            if m.gpus and loaded and _numbers(loaded) < _numbers(floor):
                self.notes.append(f"stage {stage.number} was set up for {name} {floor} or newer; torch has {name} {loaded}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _version(gpu: Any) -> str:
    return ".".join(str(part) for part in gpu.capability)


def stamp(plan: Plan) -> dict[str, Any]:
    """The part of a plan that a resumed run must share with its first half."""
    adapter = plan.adapter
    return {
        "backend": plan.backend,
        "dtype": plan.train.precision,
        "attn_impl": plan.model.attn_implementation,
        "quantization": plan.model.quantization,
        "base_model": plan.model.path,
        "revision": plan.model.revision,
        "adapter": {
            "method": adapter.method,
            "r": adapter.lora_r,
            "alpha": adapter.lora_alpha,
            "rslora": adapter.use_rslora,
            "target_modules": list(adapter.target_modules) if adapter.target_modules else None,
        },
        "world_size": plan.machine.world_size,
    }
