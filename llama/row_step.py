"""A step of one token in each of a few rows on the CPU, in as few operations as it can be said in.

A step of a small model is hundreds of operations on a few KB each, and calling them takes longer than what they do:
15M parameters in int8 take 1.3 ms by model.py's modules and 0.8 ms so, 110M in int4 5.3 and 4.2 (one row, 2 threads of
an EPYC, Zen 4). The arithmetic is model.py's, on weights that few_rows.py has laid out; generation.py and batching.py
choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import KVCache, Seen
from llama.fixed_step import has_hooks
from llama.model import Llama


def takes(model: Llama, cache: KVCache) -> bool:
    """Whether a step of this model can be a RowStep: joined products, plain numbers in the cache, no hooks between."""
    if not (cache.is_plain() and hasattr(model, "head")):
        return False
    joined = all(hasattr(part, "joined") for layer in model.layers for part in (layer.attn, layer.mlp))
    return joined and not has_hooks(model)


class RowStep:
    """model(tokens (B, 1)) behind what `cache` holds -> logits (B, 1, V)."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        c = model.config
        self.cache = cache
        self._model = model
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
        self._swapped = torch.arange(c.head_dim).roll(c.head_dim // 2)
        self._cos = self._sin = torch.empty(0)  # of the positions so far, and some more

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, common: int = 0) -> Tensor:
        """One more token in every row. ValueError where the cache is full.

        common: positions that all rows begin with alike, to be read once for all.
        """
        H, G, K, B = self._heads, self._groups, self._size, len(tokens)
        places, rows, shared = self.cache.next_positions(common)
        cos, sin = self._turns([common + row.length - 1 for row in rows])
        x = self._embed(tokens)
        if B == 1:
            x, norm, attend = x.view(-1), self._norm_of_one, _of_one(rows[0], G, K)
        else:
            x, norm, attend = x.view(B, -1), self._norm_of_rows, _Attention(rows, shared, G, H // G, K)
        for i, (attn_norm, joined, o, mlp_norm, gate_up, down) in enumerate(self._layers):
            heads = joined(norm(x, attn_norm)).view(B, H + 2 * G, K)
            turned = heads[:, : H + G]
            swapped = turned.index_select(2, self._swapped)
            turned.mul_(cos).addcmul_(swapped, sin)
            places[i].copy_(heads[:, H:])
            x = o(attend(i, heads[:, :H])).add_(x)
            gate, up = gate_up(norm(x, mlp_norm)).chunk(2, -1)
            x = down(F.silu(gate, inplace=True).mul_(up)).add_(x)
        self.cache.advance(1)
        return self._head(norm(x, self._norm)).view(B, 1, -1)

    def _turns(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, K): rope(x) = x * cos + swapped(x) * sin, where swapped(a, b) is (b, a)."""
        if max(positions) >= len(self._cos):
            cos, sin = self._model.rotation(max(positions) + 1, torch.device("cpu"))
            self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if len(positions) == 1:
            return self._cos[positions[0]], self._sin[positions[0]]
        at = torch.tensor(positions)
        return self._cos[at][:, None], self._sin[at][:, None]

    def _norm_of_one(self, x: Tensor, weight: Tensor) -> Tensor:
        """F.rms_norm of x (D,): 8 operations, 15 us."""
        scale = (torch.dot(x, x).item() / len(x) + self._eps) ** -0.5
        return (x * weight).mul_(scale)

    def _norm_of_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """F.rms_norm of x (B, D)."""
        scale = (x * x).mean(-1, keepdim=True).add_(self._eps).rsqrt_()
        return (x * scale).mul_(weight)


# A layer's number and its queries (B, H, K) -> (B, H * K), of one row (H * K,).
Attend = Callable[[int, Tensor], Tensor]


def _of_one(row: Seen, G: int, K: int) -> Attend:
    """Attention of one query over all that its row holds."""
    keys, values = (t.unsqueeze(1).unbind() for t in row)

    def attend(layer: int, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.view(1, G, -1, K), keys[layer], values[layer]).view(-1)

    return attend


class _Attention:
    """Attend: one query a row over all that several rows hold, in all layers of one step.

    Two small products for each row read no more than the row. What the rows share is read once for all: with 16 rows
    keys and values are more bytes than a cache of the CPU holds, and reading them is what takes the time.
    """

    def __init__(self, rows: list[Seen], shared: Seen | None, G: int, R: int, K: int) -> None:
        """shared: what stands before what is in rows. R: query heads to one head of keys and values."""
        self._queries, self._scale = (len(rows), G, R, K), K**-0.5
        self._rows = [_by_layer(row) for row in rows]
        self._shared = _by_layer(shared) if shared else None
        common = shared.length if shared else 0
        width = common + max(row.length for row in rows)
        self._scores = torch.full((len(rows), G, R, width), -math.inf)  # shared ones, nothing, the row's own
        self._first = slice(0, common)
        self._own = [slice(width - row.length, width) for row in rows]
        self._own_scores = [s[..., own] for s, own in zip(self._scores, self._own, strict=True)]

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        B, G, R, K = self._queries
        q = (q * self._scale).view(B, G, R, K)
        if self._shared:
            scores = torch.bmm(q.transpose(0, 1).reshape(G, B * R, K), self._shared[0][layer])
            self._scores[..., self._first] = scores.view(G, B, R, -1).transpose(0, 1)
        for (keys, _), row_q, scores in zip(self._rows, q.unbind(), self._own_scores, strict=True):
            scores.copy_(torch.bmm(row_q, keys[layer]))  # out=scores would multiply head by head
        shares = self._scores.softmax(-1)
        seen = torch.empty_like(q)
        for (_, values), row_shares, own, out in zip(
            self._rows, shares.unbind(), self._own, seen.unbind(), strict=True
        ):
            torch.bmm(row_shares[..., own], values[layer], out=out)
        if self._shared:
            of_all = shares[..., self._first].transpose(0, 1).reshape(G, B * R, -1)
            seen += torch.bmm(of_all, self._shared[1][layer]).view(G, B, R, K).transpose(0, 1)
        return seen.view(B, -1)


def _by_layer(seen: Seen) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys (G, K, n) and values (G, n, K) of each layer."""
    return seen.keys.mT.unbind(), seen.values.unbind()
