"""No mask is passed in training, since none is needed: rows padded on the right under causal attention, their padding without labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from surefoot.data.rows import Collator
from tests.conftest import SMALL_MODEL

LENGTHS = (37, 5, 24)


def batch() -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    rows = [
        {"input_ids": ids, "labels": np.where(np.arange(len(ids)) < 3, -100, ids), "row": index}
        for index, ids in enumerate(draw.integers(10, 400, size=length).astype(np.int32) for length in LENGTHS)
    ]
    return Collator(pad_token_id=3)(rows)


def run(model: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batch_when_padded_without_a_mask_then_equals_the_masked_one(attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32, attn_implementation=attention)
    given = batch()
    ids, labels, lengths = given["input_ids"], given["labels"], given["lengths"]
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    bare_logits, bare = run(model, input_ids=ids, labels=labels)
    masked_logits, masked = run(model, input_ids=ids, labels=labels, attention_mask=real.long())
    assert "attention_mask" not in given
    assert not real.all()
    assert torch.allclose(bare_logits[real], masked_logits[real], atol=1e-5)
    assert all(torch.allclose(bare[name], masked[name], atol=1e-6) for name in bare)


def test_sdpa_when_no_mask_is_given_then_its_kernels_get_the_causal_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Any, **named: Any) -> torch.Tensor:
        seen.append((named["attn_mask"], named["is_causal"]))
        return real(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32, attn_implementation="sdpa")
    given = batch()
    run(model, input_ids=given["input_ids"], labels=given["labels"])
    assert set(seen) == {(None, True)}
