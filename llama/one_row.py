"""A step of one token of one row on the CPU, in as few operations as it can be said in.

A step of a small model is hundreds of operations on a few KB each, and calling them takes longer than what they do:
15M parameters in int8 take 1.3 ms by model.py's modules and 0.8 ms so, 110M in int4 5.3 and 4.2 (2 threads of an EPYC,
Zen 4). The arithmetic is model.py's, on weights that few_rows.py has laid out; generation.py chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import KVCache
from llama.fixed_step import has_hooks
from llama.model import Llama


def takes(model: Llama, cache: KVCache) -> bool:
    """Whether a step of this model can be a OneRow: joined products, one plain row in the cache, no hooks between."""
    if not (cache.is_plain_row() and hasattr(model, "head")):
        return False
    joined = all(hasattr(part, "joined") for layer in model.layers for part in (layer.attn, layer.mlp))
    return joined and not has_hooks(model)


class OneRow:
    """model(tokens (1, 1)) behind what `cache` holds -> logits (1, 1, V)."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        c = model.config
        self.cache = cache
        self._embed, self._head = model.embed.forward, model.head.forward
        self._norm, self._eps = model.norm.weight, c.norm_eps
        # The methods themselves: nn.Module's way to them takes 1 us.
        self._layers = [
            (
                layer.attn_norm.weight,
                layer.attn.joined.forward,
                layer.attn.o.forward,
                layer.mlp_norm.weight,
                layer.mlp.joined.forward,
                layer.mlp.down.forward,
            )
            for layer in model.layers
        ]
        self._heads, self._groups, self._size = c.n_heads // c.ranks, c.n_kv_heads // c.ranks, c.head_dim
        # rope(x) = x * cos + swapped(x) * sin, where swapped(a, b) is (b, a) and the first half of sin is negative.
        cos, sin = model.rotation(cache.max_len, torch.device("cpu"))
        self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self._swapped = torch.arange(c.head_dim).roll(c.head_dim // 2)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """One more token. ValueError where the cache is full."""
        H, G, K = self._heads, self._groups, self._size
        position = self.cache.length
        places, keys, values = self.cache.next_position()
        cos, sin = self._cos[position], self._sin[position]
        x = self._embed(tokens).view(-1)
        for i, (attn_norm, joined, o, mlp_norm, gate_up, down) in enumerate(self._layers):
            heads = joined(self._rms_norm(x, attn_norm)).view(H + 2 * G, K)
            turned = heads[: H + G]
            swapped = turned.index_select(1, self._swapped)
            turned.mul_(cos).addcmul_(swapped, sin)
            places[i].copy_(heads[H:])
            seen = F.scaled_dot_product_attention(heads[:H].view(1, G, H // G, K), keys[i], values[i])
            x = o(seen.view(-1)).add_(x)
            gate, up = gate_up(self._rms_norm(x, mlp_norm)).chunk(2)
            x = down(F.silu(gate, inplace=True).mul_(up)).add_(x)
        self.cache.advance(1)
        return self._head(self._rms_norm(x, self._norm)).view(1, 1, -1)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """F.rms_norm of x (D,): 8 operations, 15 us."""
        scale = (torch.dot(x, x).item() / len(x) + self._eps) ** -0.5
        return (x * weight).mul_(scale)
