"""Packed rows: what lies together, the tensors of a packed row, and a model that gives what it gives for the rows apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from surefoot import adapters
from surefoot.attention import packed as packed_attention
from surefoot.backends import hf
from surefoot.config import Config
from surefoot.data import packing
from surefoot.data.masking import Encoded
from surefoot.data.packing import PackedCollator, PackedRows, Recipe, best_fit
from surefoot.data.rows import Collator, Places, Rows, flat
from surefoot.errors import BackendError
from surefoot.plan import make_plan
from surefoot.training import bad_steps, leak
from surefoot.training.guard import MicroBatch, random_state
from tests.conftest import SMALL_MODEL, inputs, machine

PAD = 3


def commonsense_lengths(rows: int) -> np.ndarray:
    """Tokens of rows like the commonsense file's: 137 in the mean, 256 at most."""
    lengths = np.random.default_rng(0).lognormal(np.log(136), 0.33, rows * 2).round().astype(np.int64)
    return lengths[(lengths >= 24) & (lengths <= 256)][:rows]


def rows_of(*lengths: int) -> Rows:
    draw = np.random.default_rng(1)
    encoded = [Encoded(draw.integers(10, 400, size=n).astype(np.int32), np.arange(n) >= n // 3, 0) for n in lengths]
    count = len(lengths)
    return flat(encoded, Places(("rows.jsonl",), np.zeros(count, dtype=np.int32), np.arange(1, count + 1, dtype=np.int32)))


def collated(rows: Rows, together: list[list[int]], slots: int) -> tuple[PackedRows, PackedCollator]:
    packed = PackedRows(rows, [np.array(indices) for indices in together], slots)
    collator = PackedCollator(separate=Collator(pad_token_id=PAD), slots=slots, longest=packed.longest, segments=packed.segments)
    return packed, collator


@pytest.mark.parametrize(("slots", "least"), [(1024, 0.97), (2048, 0.985), (8192, 0.99)])
def test_packed_rows_when_rows_are_short_then_are_filled_and_hold_each_row_once(slots: int, least: float) -> None:
    lengths = commonsense_lengths(20_000)
    packed = best_fit(lengths, slots, seed=42)
    assert abs(lengths.mean() - 137) < 3
    assert lengths.sum() / (len(packed) * slots) >= least
    assert max(lengths[rows].sum() for rows in packed) <= slots
    assert np.array_equal(np.sort(np.concatenate(packed)), np.arange(len(lengths)))


def test_packed_rows_when_made_again_then_are_the_same_and_another_seed_makes_others() -> None:
    lengths = commonsense_lengths(2_000)
    first, again, other = (PackedRows(rows_of(*lengths), best_fit(lengths, 1024, seed), 1024).digest() for seed in (42, 42, 43))
    assert first == again
    assert first != other


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_packed_rows_when_processes_share_them_then_are_equally_many_for_each(processes: int) -> None:
    lengths = commonsense_lengths(500)
    packed = best_fit(lengths, 1024, 42, processes)
    assert len(packed) % processes == 0
    assert np.array_equal(np.sort(np.concatenate(packed)), np.arange(500))
    assert len(best_fit(np.full(3, 500), 512, 42, processes)) == 3  # a row each: there is nothing to split


@pytest.mark.parametrize(
    ("mean", "longest", "batch_size", "processes", "budget", "pack_len", "made"),
    [
        (137, 256, 128, 1, 1024, None, Recipe(1024, 17)),
        (137, 256, 128, 1, 32768, None, Recipe(17920, 1)),
        (137, 256, 128, 1, 1024, 8192, Recipe(8192, 2)),
        (137, 256, 128, 4, 1024, None, Recipe(896, 5)),
        (137, 256, 2, 1, 1024, None, Recipe(320, 1)),
        (137, 250, 1, 1, 250, None, Recipe(256, 1)),
        (137, 256, 16, 1, 256, None, Recipe(256, 9)),
        (137, 256, 8, 8, 1024, 2048, Recipe(2048, 1)),
    ],
)
def test_recipe_when_chosen_then_a_step_holds_about_batch_size_rows_within_the_budget(
    mean: int, longest: int, batch_size: int, processes: int, budget: int, pack_len: int | None, made: Recipe
) -> None:
    lengths = np.array([mean] * 998 + [longest, 2 * mean - longest])
    assert packing.recipe(lengths, batch_size, processes, budget, pack_len) == made


def test_packed_row_when_collated_then_is_its_rows_end_to_end_with_restarting_positions() -> None:
    rows = rows_of(5, 9, 1, 7)
    packed, collator = collated(rows, [[3, 0], [1, 2]], slots=32)
    batch = collator([packed[0]])
    ids = np.concatenate([rows[3]["input_ids"], rows[0]["input_ids"], np.full(20, PAD)])
    assert batch["input_ids"].tolist() == [ids.tolist()]
    labels = np.concatenate([rows[3]["labels"], rows[0]["labels"], np.full(20, -100)])
    labels[[0, 7]] = -100
    assert batch["labels"].tolist() == [labels.tolist()]
    assert batch["position_ids"].tolist() == [[*range(7), *range(5), *range(9), *range(9), 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 7, 12, 21, 30, 32]
    assert (batch["max_length_q"], batch["max_length_k"]) == (9, 9)
    assert batch["lengths"].tolist() == [7, 5]
    assert [packed.where(row) for row in batch["rows"].tolist()] == ["rows.jsonl:4", "rows.jsonl:1"]
    assert "attention_mask" not in batch


def test_packed_rows_when_collated_then_all_have_one_shape_and_rows_to_evaluate_keep_theirs() -> None:
    lengths = commonsense_lengths(60)
    rows = rows_of(*lengths)
    packed, collator = collated(rows, [piece.tolist() for piece in best_fit(lengths, 1024, 42)], slots=1024)
    batches = [collator([packed[index]]) for index in range(len(packed))]
    shapes = {tuple((name, tuple(value.shape)) for name, value in batch.items() if torch.is_tensor(value))[:5] for batch in batches}
    assert len(batches) > 5
    assert len(shapes) == 1
    assert len({batch["max_length_q"] for batch in batches}) == 1
    assert all(int(batch["cu_seq_lens_q"].diff().max()) <= batch["max_length_q"] for batch in batches)
    assert all(int(batch["cu_seq_lens_q"].diff().min()) >= 0 for batch in batches)
    separate = Collator(pad_token_id=PAD)([rows[0], rows[1]])
    assert all(torch.equal(value, separate[name]) for name, value in collator([rows[0], rows[1]]).items())


def small_model(attention: str = "eager", dtype: Any = torch.float32, method: str = "dora") -> Any:
    """The shipped model with an adapter on it, ready for gradients that are not zero."""
    config = Config.parse({"base_model": str(SMALL_MODEL), "adapter_name": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0})
    plan = make_plan(config, machine(), inputs(model_path=str(SMALL_MODEL)))
    model = adapters.attach(hf.load_model(plan.model, 1, None), plan.adapter, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.get_base_model().set_attn_implementation(attention)
    return model.to(dtype)


def trained_on(model: Any, batches: list[dict[str, Any]], **more: Any) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """The logits [tokens, vocabulary] of the real tokens in the order of rows 0, 1, ..., the loss, the gradients; tokens weigh the same."""
    model.train()
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    logits: dict[int, torch.Tensor] = {}
    loss = 0.0
    for batch in batches:
        given = {name: value for name, value in batch.items() if name not in ("lengths", "rows")}
        out = model(**given, **more, num_items_in_batch=tokens)
        out.loss.backward()
        loss += out.loss.item()
        real = out.logits[0, : int(batch["lengths"].sum())].detach()
        for row, piece in zip(batch["rows"].tolist(), real.split(batch["lengths"].tolist()), strict=True):
            logits[row] = piece
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return torch.cat([logits[row] for row in sorted(logits)]), loss, gradients


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def worst(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """The largest relative distance of logits, loss and every gradient."""
    gradients = [distance(one[2][name], other[2][name]) for name in other[2]]
    return max(distance(one[0], other[0]), abs(one[1] - other[1]) / other[1], *gradients)


LENGTHS = (37, 5, 24, 1, 30, 12, 2)


def batches_of(slots: int = 64) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = rows_of(*LENGTHS)
    packed, collator = collated(rows, [[0, 2, 3], [4, 1, 5, 6]], slots)
    return [collator([packed[0]]), collator([packed[1]])], [Collator(pad_token_id=PAD)([rows[index]]) for index in range(len(rows))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_model_when_rows_are_packed_then_gives_logits_loss_and_gradients_as_apart(attention: str, recompute: bool) -> None:
    model = small_model(attention)
    together, apart = batches_of()
    expected = trained_on(model, apart)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert worst(trained_on(model, together), expected) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("leak_through", [{"use_cache": True}, {"attention_mask": torch.ones(1, 64, dtype=torch.int64)}])
def test_model_when_given_a_cache_or_a_mask_then_lets_rows_see_each_other(attention: str, leak_through: dict[str, Any]) -> None:
    """Why a packed row has no mask and the model no cache, and that the test above can fail."""
    model = small_model(attention)
    together, apart = batches_of()
    assert worst(trained_on(model, together, **leak_through), trained_on(model, apart)) > 1e-2


def test_first_label_of_a_row_when_kept_then_changes_the_loss() -> None:
    """It would be predicted from the row before."""
    model = small_model("sdpa")
    rows = rows_of(*LENGTHS)
    rows.trained[:] = True
    packed, collator = collated(rows, [list(range(len(LENGTHS)))], 128)
    batch = collator([packed[0]])
    apart = [Collator(pad_token_id=PAD)([rows[index]]) for index in range(len(rows))]
    expected = trained_on(model, apart)
    assert worst(trained_on(model, [batch]), expected) < 1e-5
    kept = batch | {"labels": torch.cat([torch.from_numpy(rows.ids.astype(np.int64)), torch.full((17,), -100)])[None]}
    assert abs(trained_on(model, [kept])[1] - expected[1]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_leak_when_looked_for_then_is_none_and_with_a_cache_ends_the_run(attention: str, dtype: torch.dtype) -> None:
    model = small_model(attention, dtype)
    ids = rows_of(40)[0]["input_ids"]
    assert leak.check(model, ids, contextlib.nullcontext) == 0.0
    model.get_base_model().config.use_cache = True
    with pytest.raises(BackendError, match=r"rows of a packed row see each other.*Use --packing=False"):
        leak.check(model, ids, contextlib.nullcontext)


def plain_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, _: torch.Tensor, longest: int, __: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """torch's varlen_attn, which has no CPU kernel, from plain operations on [tokens, heads, head_dim]."""
    assert window_size == (-1, 0)
    assert enable_gqa or key.shape[1] == query.shape[1]
    place = torch.arange(query.shape[0])
    stretch = torch.searchsorted(ends.long(), place, right=True)
    seen = (stretch[:, None] == stretch[None]) & (place[:, None] >= place[None])
    given = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return scaled_dot_product_attention(*given, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The small model attending through packed.attention, over the plain kernel of a torch that knows groups of heads, or does not."""

    def make(knows_groups: bool, method: str = "dora") -> Any:
        monkeypatch.setattr(packed_attention, "varlen_attn", plain_varlen)
        monkeypatch.setattr(packed_attention, "KNOWS_GROUPS", knows_groups)
        model = small_model("sdpa", method=method)
        packed_attention.use_varlen(model)
        return model

    return make


@pytest.mark.parametrize("knows_groups", [True, False])
def test_varlen_when_rows_are_packed_then_gives_what_they_give_apart_and_takes_both_kinds_of_batch(
    varlen: Callable[..., Any], knows_groups: bool
) -> None:
    together, apart = batches_of()
    expected = trained_on(small_model("eager"), apart)
    model = varlen(knows_groups)
    assert worst(trained_on(model, together), expected) < 1e-5
    assert worst(trained_on(model, apart), expected) < 1e-5  # sdpa's way


def test_varlen_when_layers_are_compiled_then_their_graphs_serve_all_packed_rows(varlen: Callable[..., Any]) -> None:
    """LoRA's layers: PEFT's DoRA layers break the graph."""
    model = varlen(True, method="lora")
    together, apart = batches_of()
    expected = trained_on(model, apart)
    seen = []

    def counted(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.get_base_model().get_decoder().layers:
        layer.compile(backend=counted, fullgraph=True)
    trained_on(model, together[:1])
    graphs = len(seen)  # the first layer's input has no gradient, so it has a graph of its own
    found = trained_on(model, together)
    assert len(seen) == graphs <= 2
    assert worst(found, expected) < 1e-5


def test_varlen_when_the_model_drops_attention_out_then_refuses(varlen: Callable[..., Any]) -> None:
    model = varlen(True)
    for layer in model.get_base_model().get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"no dropout, and the model asks for 0\.1"):
        trained_on(model, batches_of()[0])


def test_packed_batch_when_kept_as_files_then_comes_back_with_its_numbers() -> None:
    (batch, _), _ = batches_of()
    rows = batch.pop("rows")
    del batch["lengths"]
    kept = MicroBatch(batch, rows, torch.tensor(1.0), random_state())
    back = bad_steps.from_files(bad_steps.as_files(kept), torch.device("cpu"))
    assert back.inputs.keys() == batch.keys()
    assert back.inputs["max_length_q"] == 37
    assert isinstance(back.inputs["max_length_q"], int)
    assert all(torch.equal(back.inputs[name], value) for name, value in batch.items() if torch.is_tensor(value))
