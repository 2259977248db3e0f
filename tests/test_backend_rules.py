"""Which backend runs, decided in the plan: asked for, measured, in conflict or out of order; and what a resumed run must share."""

from __future__ import annotations

import pytest

from surefoot import cli
from surefoot.config import Config
from surefoot.detection import Answer, Case
from surefoot.errors import BackendError, PlanError, UsageError
from surefoot.inputs import RunFolder
from surefoot.machine import Machine
from surefoot.plan import Plan, make_plan, unsloth_to_try
from surefoot.rules import backend, speeds
from surefoot.rules.desk import Desk
from surefoot.rules.speeds import Speed
from tests.conftest import H200, ROOT, VERSIONS, inputs, machine

WITH_UNSLOTH = VERSIONS | {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "trl": "1.14.2"}
WORKS = Answer(kind="works", reason="Unsloth 2026.10.9 trained a tiny llama with dora", origin="tried today")
HERE = machine(gpus=(H200,), versions=WITH_UNSLOTH)
CHECKPOINT = "o/checkpoint-5"


def plan(answer: Answer | None = WORKS, *, on: Machine = HERE, stamp: dict[str, object] | None = None, **flags: object) -> Plan:
    folder = RunFolder(status="unfinished", checkpoints=(CHECKPOINT,)) if stamp is not None else RunFolder(status="absent")
    config = Config.parse({"base_model": "org/model", **flags, **({"resume": True} if stamp is not None else {})})
    return make_plan(config, on, inputs(model_config={"model_type": "llama"}, run_folder=folder, resume_stamp=stamp), None, answer)


def reason(made: Plan, name: str = "backend") -> str:
    return next(choice.reason for choice in made.choices if choice.name == name)


def test_unsloth_when_it_works_then_is_used_its_own_way() -> None:
    made = plan(backend="unsloth", adapter_name="dora")
    assert made.backend == "unsloth"
    assert "Unsloth import successful" in reason(made)
    assert "Unsloth backend will be used" in reason(made)
    assert (made.model.attn_implementation, made.model.use_gradient_checkpointing, made.model.recompute_layers) == ("sdpa", "unsloth", 0)
    assert (made.model.fused_adapters, made.model.fused_loss, made.model.enable_torch_compile) == (False, False, False)
    assert (made.train.packing, made.adapter.lora_dropout) == ("off", 0.0)
    assert plan(backend="unsloth", stage=3, lora_dropout=0.1).adapter.lora_dropout == 0.1
    assert plan(backend="unsloth", stage=3).model.enable_torch_compile is False


def test_unsloth_when_older_guides_switches_are_set_then_says_what_has_their_effect() -> None:
    on = machine(gpus=(H200,), versions=WITH_UNSLOTH, unsloth_switches=("UNSLOTH_ENABLE_LOGGING=1", "XFORMERS_DISABLED=1"))
    notes = plan(on=on, backend="unsloth").notes
    assert any(note.startswith("XFORMERS_DISABLED=1: read by nothing") for note in notes)


@pytest.mark.parametrize(
    ("answer", "on", "says"),
    [
        (None, machine(gpus=(H200,)), "Unsloth not available (ImportError): No module named 'unsloth'. Install Unsloth with: pip install"),
        (Answer(kind="attention conflict", reason="xformers: no operator", origin=""), HERE, "Unsloth failed to initialize (XFormers or flash-attn conflict)"),
        (Answer(kind="no GPU", reason="You need a GPU", origin=""), HERE, "Unsloth failed to initialize (no GPU): You need a GPU"),
        (WORKS, machine(gpus=(H200,), versions=WITH_UNSLOTH, unsloth_refused="llama is not implemented"), "gave up when the run was first started: llama is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("flags", "name", "words"), [({}, "hf", "transformers"), ({"load_4bit": True}, "bnb", "BitsAndBytes")])
def test_unsloth_when_it_cannot_run_then_falls_back_with_the_reason_or_fails_strictly(
    answer: Answer | None, on: Machine, says: str, flags: dict[str, object], name: str, words: str
) -> None:
    made = plan(answer, on=on, backend="unsloth", **flags)
    assert made.backend == name
    assert any(says in note and f"Falling back to {words} backend" in note for note in made.notes)
    assert made.model.attn_implementation == "eager"
    with pytest.raises(BackendError) as caught:
        plan(answer, on=on, backend="unsloth", strict_backend=True, **flags)
    assert says in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("flags", "changes", "says"),
    [
        ({}, {"world_size": 2, "engine": "ddp"}, "accelerate launch --config_file profiles/ddp.yaml"), ({}, {"engine": "deepspeed"}, "no deepspeed profile"),
        ({"adapter_name": "full"}, {}, "--adapter_name=full"), ({"load_8bit": True}, {}, "Use --load_4bit=True"), ({"init_lora_weights": "pissa"}, {}, "pissa"),
        ({"attn_implementation": "eager"}, {}, "Use --attn_implementation=sdpa"), ({"packing": True}, {}, "Use --packing=False"),
        ({"use_gradient_checkpointing": "selective"}, {}, "every layer or none"),
        ({"use_gradient_checkpointing": "offload"}, {}, "by its own recompute"), ({"enable_torch_compile": True}, {}, "Drop --enable_torch_compile"),
        ({"bf16": False}, {}, "Use --bf16=True"), ({"bf16": True}, {"gpus": ()}, "whether a CPU uses bf16"),
    ],
)  # fmt: skip
def test_unsloth_when_flags_or_launcher_contradict_it_then_is_refused_with_the_way_out(
    flags: dict[str, object], changes: dict[str, object], says: str
) -> None:
    on = machine(**{"gpus": (H200, H200), "versions": WITH_UNSLOTH, **changes})
    with pytest.raises(PlanError) as caught:
        plan(None, on=on, backend="unsloth", **flags)
    assert "--backend=unsloth" in str(caught.value)
    assert says in str(caught.value)
    assert unsloth_to_try(Config.parse({"base_model": "m", "backend": "unsloth", **flags}), on, inputs()) is None


def test_trial_when_unsloth_is_in_question_then_asks_for_the_runs_own_case() -> None:
    found = inputs(model_config={"model_type": "qwen3"})
    asked = Config.parse({"base_model": "m", "backend": "unsloth", "adapter_name": "dora", "load_4bit": True})
    assert unsloth_to_try(asked, HERE, found) == Case(model_type="qwen3", method="dora", quantization="nf4", dtype="bf16")
    assert unsloth_to_try(Config.parse({"base_model": "m"}), HERE, found) is None
    assert unsloth_to_try(asked, machine(gpus=(H200,)), found) is None


@pytest.mark.parametrize("measured", speeds.SPEEDS, ids=lambda known: f"{known.method}-{known.quantization}")
def test_auto_when_both_can_run_then_takes_the_faster_one_and_gives_the_figures(measured: Speed) -> None:
    made = plan(adapter_name=measured.method, load_4bit=measured.quantization == "nf4")
    ours = {"none": "hf", "nf4": "bnb"}[measured.quantization]
    assert made.backend == ("unsloth" if measured.unsloth > measured.ours else ours)
    assert f"{measured.ours:,} tokens/s" in reason(made)
    assert f"{measured.unsloth:,}" in reason(made)


@pytest.mark.parametrize(("unsloth_speed", "chosen"), [(200, "unsloth"), (100, "hf"), (50, "hf")])
def test_auto_when_unsloth_was_measured_faster_then_takes_it_unless_a_flag_forbids(unsloth_speed: int, chosen: str) -> None:
    def choose(**flags: object) -> str:
        config = Config.parse({"base_model": "m", **flags})
        desk = Desk(
            config=config,
            machine=HERE,
            inputs=inputs(),
            unsloth=WORKS,
            speeds=(Speed("lora", "none", 100, unsloth_speed, "a test"),),
            problems=[],
            notes=[],
        )
        return str(backend.backend(desk, "none").value)

    assert choose() == chosen
    assert choose(packing=True) == "hf"
    assert choose(adapter_name="dora") == "hf"


def test_auto_when_unsloth_is_not_there_then_says_nothing_of_it() -> None:
    assert "Unsloth" not in reason(plan(None, on=machine(gpus=(H200,))))
    assert "Unsloth" not in reason(plan(None, on=machine(versions=WITH_UNSLOTH)))


@pytest.mark.parametrize(("name", "flags", "cure"), [("bnb", {}, "give --load_4bit=True"), ("hf", {"load_4bit": True}, "drop --load_4bit")])
def test_backend_when_the_weights_contradict_it_then_the_other_is_named_or_fails_strictly(
    name: str, flags: dict[str, object], cure: str
) -> None:
    assert f"--backend={name} was asked for" in reason(plan(backend=name, **flags))
    with pytest.raises(BackendError, match=cure):
        plan(backend=name, strict_backend=True, **flags)


def test_run_files_when_read_then_give_each_backend_its_own() -> None:
    bnb, unsloth = (cli.parse({"config": str(ROOT / f"configs/run_{name}.yaml")}) for name in ("bnb", "unsloth"))
    assert (bnb.backend, bnb.load_4bit, bnb.lora_r, bnb.lora_alpha, bnb.lora_dropout) == ("bnb", True, 32, 64.0, 0.05)
    assert (unsloth.backend, unsloth.load_4bit, unsloth.lora_r, unsloth.lora_alpha, unsloth.lora_dropout) == (
        "unsloth",
        True,
        32,
        32.0,
        0.0,
    )
    assert (unsloth.use_gradient_checkpointing, unsloth.eval_step, unsloth.save_step) == ("unsloth", 1, 10)
    for config in (bnb, unsloth):
        made = make_plan(config, HERE, inputs(), None, WORKS)
        assert (made.backend, made.model.quantization, made.train.precision) == (config.backend, "nf4", "bf16")
        assert made.train.load_best_model_at_end


@pytest.mark.parametrize(("alpha", "value"), [("r", 8.0), ("2r", 16.0), ("32", 32.0)])
def test_alpha_when_given_as_a_rule_then_follows_the_rank(alpha: str, value: float) -> None:
    assert plan(lora_alpha=alpha, lora_r=8).adapter.lora_alpha == value


@pytest.mark.parametrize("alpha", ["3r", "0"])
def test_alpha_when_it_is_neither_rule_nor_positive_number_then_is_refused(alpha: str) -> None:
    with pytest.raises(UsageError, match="--lora_alpha"):
        plan(lora_alpha=alpha)


@pytest.mark.parametrize(
    ("before", "flags", "says"),
    [
        ({"backend": "unsloth", "attn_impl": "sdpa"}, {}, "run this command with --backend=unsloth --attn_implementation=sdpa"),
        ({"quantization": "nf4", "backend": "bnb"}, {}, "--backend=bnb --load_4bit=True"), ({"dtype": "fp16"}, {}, "--fp16=True"),
        ({"world_size": 2, "engine": "ddp"}, {}, "under accelerate launch --config_file profiles/ddp.yaml --num_processes 2"),
        ({"engine": "zero2"}, {}, "under accelerate launch --config_file profiles/ds_zero2.yaml --num_processes 1"),
        ({"engine": "zero3", "offloads": True, "world_size": 4}, {}, "profiles/ds_zero3_offload.yaml --num_processes 4"),
        ({"base_model": "org/other"}, {}, "--base_model=org/other"),
        ({"revision": "abc"}, {}, "--revision=abc"), ({"revision": None}, {"revision": "abc"}, "with no --revision"),
    ],
)  # fmt: skip
def test_resume_when_the_stamp_differs_then_gives_the_command_that_would_be_right(
    before: dict[str, object], flags: dict[str, object], says: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(None, stamp={**plan(**flags).stamp(), **before}, **flags)
    assert says in str(caught.value)


def test_resume_when_the_adapter_differs_then_names_its_flags() -> None:
    stamp = plan(adapter_name="dora", lora_r=4, target_modules="q_proj,v_proj").stamp()
    with pytest.raises(PlanError) as caught:
        plan(stamp=stamp, adapter_name="lora", lora_r=8)
    assert "adapter method dora -> lora, adapter r 4 -> 8" in str(caught.value)
    assert "--adapter_name=dora --lora_r=4 --target_modules q_proj v_proj" in str(caught.value)


def test_resume_when_unsloth_is_gone_then_says_why_its_run_cannot_go_on() -> None:
    stamp = plan(backend="unsloth").stamp()
    with pytest.raises(PlanError, match="No module named 'unsloth'"):
        plan(None, on=machine(gpus=(H200,)), stamp=stamp, backend="unsloth")


def test_resume_when_versions_moved_then_names_them_and_goes_on() -> None:
    made = plan(stamp={**plan().stamp(), "versions": {**WITH_UNSLOTH, "torch": "2.11.0", "fire": "0.1"}})
    assert any("torch 2.11.0 -> 2.13.0" in note and "fire" not in note for note in made.notes)
    assert not any("other versions" in note for note in plan(stamp={**plan().stamp(), "versions": WITH_UNSLOTH}).notes)
