"""transformers' LLaMA as the peer of a bench: built with our weights or random ones, and timed while it answers.

Imports little of ours, so that the memory of a process which runs it is transformers' own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama import layout
from llama.config import LlamaConfig, to_hf


def model_of(
    config: LlamaConfig,
    weights: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Any:
    """transformers' LlamaForCausalLM of these sizes with our weights, by our names; None: with random ones."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.configuration_llama import LlamaConfig as HFConfig

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not .to(dtype), which would need both at once and round the rotary frequencies
    try:
        with torch.device(device):
            model = LlamaForCausalLM(HFConfig.from_dict({**to_hf(config), "pad_token_id": 0, **settings}))
    finally:
        torch.set_default_dtype(usual)
    if weights is not None:
        theirs = {e.hf: weights[e.name] for e in layout.entries(config)}
        model.load_state_dict(theirs, strict=not config.tie_embeddings)
        model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


def answers(model: Any, tokens: Tensor, new: int) -> tuple[float, float, Tensor]:
    """Seconds to the first of `new` greedy tokens behind tokens (B, T), seconds for the others, and all of them."""
    from transformers.generation.streamers import BaseStreamer

    times: list[float] = []

    class Clock(BaseStreamer):
        """Read whenever tokens arrive on the CPU; the prompt is the first to come."""

        def put(self, value: Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None: ...

    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            streamer=Clock(),
        )
    return times[1] - start, times[-1] - times[1], out[:, tokens.shape[1] :]
