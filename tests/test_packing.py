"""A model over packed rows: it gives what it gives for the rows apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from surefoot.attention import packed as packed_attention
from surefoot.data.rows import Collator
from surefoot.errors import BackendError
from surefoot.training import bad_steps, leak
from surefoot.training.guard import MicroBatch, random_state
from tests.packed import LENGTHS, PAD, collated, distance, rows_of, small_model, trained_on


def worst(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """The largest relative distance of logits, loss and every gradient."""
    gradients = [distance(one[2][name], other[2][name]) for name in other[2]]
    return max(distance(one[0], other[0]), abs(one[1] - other[1]) / other[1], *gradients)


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
