"""What the benches run: ours and transformers' model with random or equal weights, a tokenizer for any vocabulary.

Knows no tables; nothing but the benches calls it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama import layout, quantize
from llama.config import LlamaConfig, to_hf
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme

if TYPE_CHECKING:  # needs sentencepiece, which the training bench does without
    from llama.tokenizer import StreamDecoder

SCHEMES = {"int8": Scheme(8, 0), "int4": Scheme(4, 64)}  # convert_weights.py's
EOS = 2
STD = 0.02  # of random weights


class Pieces:
    """Stands in for a tokenizer of any size: every id is a word."""

    bos_id, eos_id, unk_id = 1, EOS, 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._bytes = [f" w{i}".encode() for i in range(vocab_size)]

    def stream(self) -> StreamDecoder:
        from llama.tokenizer import StreamDecoder

        return StreamDecoder(self._bytes)


@torch.no_grad()
def random_decoder(config: LlamaConfig, kind: str, device: torch.device) -> Llama:
    """A model that is ready to decode and never says EOS, its random weights made where they will lie.

    kind: int8, int4 or the name of a number type.
    """
    from llama.generation import lay_out_for_decoding

    scheme = SCHEMES.get(kind)
    dtype = torch.bfloat16 if scheme else getattr(torch, kind)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    if scheme:
        quantize.replace(model.layers, lambda _, linear: quantize.empty(linear, scheme, "meta", dtype), scheme.bits)
    model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0.0, STD)
    for packed in (m for m in model.modules() if isinstance(m, QuantisedLinear)):
        packed.codes.random_(0, 256)
        packed.scales.fill_(STD * 12**0.5 / 2**packed.bits)  # codes are spread evenly
    (model.embed if config.tie_embeddings else model.head).weight[EOS] = 0
    lay_out_for_decoding(model)
    return model


def transformers_model(
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


def transformers_answers(model: Any, tokens: Tensor, new: int) -> tuple[float, float, Tensor]:
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
