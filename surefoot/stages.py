"""The upgrade stages (stable first, then fast): defaults that single flags override, and the version floors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage sets. The floors are facts, never the gate: torch 2.5.0 meets CUDA 12.4 and cuDNN 9.1 and is known bad.

    disable_cudnn_sdpa None: the attention canary decides. With torch 2.11 and cuDNN 9.19 the backward pass of cuDNN's kernel returns
    NaN for an explicit mask at length 704 and is right, and the fastest, without one (pytorch/pytorch#196678).
    """

    number: int
    attn_implementation: str
    disable_cudnn_sdpa: bool | None
    enable_torch_compile: bool
    cuda_floor: str
    cudnn_floor: str


STAGES = {
    1: Stage(number=1, attn_implementation="eager", disable_cudnn_sdpa=True, enable_torch_compile=False,
             cuda_floor="12.4", cudnn_floor="9.1"),
    2: Stage(number=2, attn_implementation="flash_attention_2", disable_cudnn_sdpa=None, enable_torch_compile=False,
             cuda_floor="12.8", cudnn_floor="9.10"),
    3: Stage(number=3, attn_implementation="flash_attention_2", disable_cudnn_sdpa=None, enable_torch_compile=True,
             cuda_floor="13.0", cudnn_floor="9.19"),
}  # fmt: skip
