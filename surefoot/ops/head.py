"""use_head_loss(): a causal language model whose loss comes from head_loss(), so that no batch's logits ever exist as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutput

from surefoot.ops.loss import head_loss, loss_and_gradient, trained_positions


def use_head_loss(model: Any, *, compiled: bool) -> None:
    """Lets `model`, called with labels, return the loss and no logits; called without, it answers as before.

    Args:
        model: a causal language model of transformers or a PeftModel of one, whose logits are its frozen head's product and nothing else.
        compiled: torch.compile makes one kernel of the softmax and its gradient.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    plain_forward, decoder, head = causal.forward, causal.get_decoder(), causal.get_output_embeddings()
    step = torch.compile(loss_and_gradient) if compiled else loss_and_gradient

    def forward(
        input_ids: Tensor | None = None, labels: Tensor | None = None, positions: Tensor | None = None, num_items_in_batch: Any = None,
        **named: Any,
    ) -> Any:  # fmt: skip
        if labels is None:
            return plain_forward(input_ids=input_ids, **named)
        if positions is None:
            positions = trained_positions(labels)  # asks the GPU for a number: before the layers, not behind them
        given = {name: value for name, value in named.items() if value is not None}
        hidden = decoder(input_ids=input_ids, **given).last_hidden_state
        scale = None if num_items_in_batch is None else 1.0 / num_items_in_batch
        if isinstance(head, FSDPModule):
            head(hidden.detach()[:, :1])  # its hooks gather the weight, which stays whole until the backward pass; ZeRO-3 gathers on access
        return CausalLMOutput(loss=head_loss(hidden, head.weight, labels, positions, scale, step))

    causal.forward = forward


class WithPositions:
    """A collator whose batches name their trained positions, so that the GPU need not be asked for their number."""

    def __init__(self, collator: Callable[[Any], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self.collator(rows)
        return {**batch, "positions": trained_positions(batch["labels"])}
