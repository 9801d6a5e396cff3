"""A LLaMA: token ids -> logits, or (loss sum, token count) when targets are given.

Knows token ids, not text; one device's arithmetic, not sharding; no training, no sampling. Every operation with a
choice of implementation goes through the kernels seam. Layout is (B, T, heads, K) throughout. The letters:

  B batch    T new tokens    S attended positions (cache + T)    D model width    L layers    V vocabulary
  H query heads    G key/value heads    K size of one head    F MLP width    N = B * T rows
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

import kernels
from llama.cache import Held, KVCache
from llama.chat import IGNORE
from llama.config import LlamaConfig, RopeScaling


class RMSNorm(nn.Module):
    """RMSNorm with a learnt weight (D,)."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual, their sum and its norm."""
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries (H query heads share G key/value heads)."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: kernels.Documents | None,
        memory: Memory | None,
        only: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))
        q, k = kernels.rope(q, k, *rotation)
        length, scales = None, None
        if memory is not None:
            k, v, length, scales = memory(k, v)
        if only is not None and not len(only):  # the cache has what it wanted
            return x.new_empty(0, x.shape[-1])
        y = kernels.attention(q, k, v, documents, length, scales).reshape(B, T, -1)
        return self.o(y if only is None else y.flatten(0, 1)[only])


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.up = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.down = nn.Linear(c.ffn_dim, c.dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate(x), self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu(*self.project(x)))


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the stream and added back to it."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: kernels.Documents | None = None,
        memory: Memory | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """The stream (B, T, D) after this block, or only these (n,) of its rows, (n, D)."""
        y = self.attn(self.attn_norm(x), rotation, documents, memory, only)
        x, y = self.mlp_norm(y, x if only is None else x.flatten(0, 1)[only])
        return x + self.mlp(y)


# What a cached layer calls with its new k and v to get all of them, where only the device knows, how many they are, and
# where they are codes, their scales.
Memory = Callable[[Tensor, Tensor], Held]
# What makes the weights of the tokens' losses from the last hidden states, the head and the targets.
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


class Llama(nn.Module):
    """The whole model. `with torch.device("meta"): Llama(config)` builds any size without memory."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Not a buffer: buffers would be cast with the weights (ChatDoctor's saved frequencies are 16-bit for that
        # reason) and would live on meta after a meta-device construction.
        self._rotation: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def init_weights(self, seed: int, assign: Callable[[nn.Parameter, Tensor], object] | None = None) -> None:
        """Fill every parameter from its name and the seed, so that the values do not depend on how it is sharded.

        Norms are 1; the rest normal(0, sqrt(2 / 5D)) (Nguyen and Salazar 2019, arXiv:1910.05895: 0.02 at D = 1000; a
        fixed 0.02 starts a model of D = 128 late), the two projections back into the stream (o, down) divided by
        sqrt(2 L) as in GPT-2. assign(parameter, full fp32 tensor) stores a value; by default it is copied.
        """
        inner = math.sqrt(2 / (5 * self.config.dim))
        outer = inner / math.sqrt(2 * self.config.n_layers)
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                value = torch.ones(p.shape)
            else:
                std = outer if name.endswith((".o.weight", ".down.weight")) else inner
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                value = torch.empty(p.shape).normal_(0.0, std, generator=generator)
            p.copy_(value) if assign is None else assign(p, value)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: kernels.Documents | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        only: Tensor | None = None,
        weigh: Weigh | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the summed loss (fp32) and its token count (int64).

        Targets of IGNORE carry no loss. documents: (start, end) int32 (B, T) of a packed batch: a token sees its own
        document, and positions restart in each; where it branches, (start, end, fork, own) as kernels.attention takes
        them, and in each branch positions go on from the fork. cache: the tokens follow what it holds, and it grows by
        them; with documents as well, these are (B, S), of what it holds and of the tokens.
        last_only: logits (B, 1, V) of the last token only, all that decoding needs of a prompt. only: logits (n, V) of
        the tokens with these numbers (n,) among all B * T, all that scoring an answer needs; where there are none, the
        head is not read. weigh(x (N, D), head (V, D), targets (N,)): with targets, gives how much each token's loss
        counts, fp32 (N,), without gradient.
        """
        B, T = tokens.shape
        x = self.embed(tokens)
        past = 0 if cache is None else cache.length
        if cache is not None and documents is None and (starts := cache.starts(T)) is not None:
            documents = (starts, torch.full_like(starts, past + T))
        if cache is not None and cache.place is not None:
            rotation = tuple(table[cache.place] for table in self.rotation(cache.max_len, x.device))
        else:
            rotation = self._rotation_at(past, T, documents, x.device)
        for i, layer in enumerate(self.layers):
            memory = None if cache is None else _memory_of(cache, i)
            x = layer(x, rotation, documents, memory, only if i == len(self.layers) - 1 else None)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x[:, -1:] if last_only else x)
        if targets is None:
            # A tied model has a head only where one was given to it to decode faster.
            return self.head(x) if hasattr(self, "head") else nn.functional.linear(x, self.embed.weight)
        head = self.embed.weight if self.config.tie_embeddings else self.head.weight
        N, D = B * T, x.shape[-1]
        weights = None if weigh is None else weigh(x.detach().view(N, D), head, targets.view(N))
        loss = kernels.linear_cross_entropy(x.view(N, D), head, targets.view(N), IGNORE, weights)
        return loss, (targets != IGNORE).sum()

    def _rotation_at(
        self, past: int, T: int, documents: kernels.Documents | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the T new positions: (T, K/2), or (B, T, K/2) where rows or documents restart."""
        needed = past + T
        cos, sin = self.rotation(needed, device)
        if documents is None:
            return cos[past:needed], sin[past:needed]
        positions = torch.arange(past, needed, device=device) - documents[0][:, past:]
        if len(documents) > 2:
            fork, own = documents[2:]
            positions -= (own - fork)[:, past:]
        return cos[positions], sin[positions]

    def rotation(self, needed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions below `needed`, and some more, fp32 (positions, K/2)."""
        if self._rotation is None or self._rotation[0].shape[0] < needed or self._rotation[0].device != device:
            with torch.inference_mode(False):  # decoding may come first, and training must still be able to use it
                self._rotation = rotation_table(self.config, max(512, 2 ** math.ceil(math.log2(needed))), device)
        return self._rotation


def _memory_of(cache: KVCache, layer: int) -> Memory:
    return lambda k, v: cache.append(layer, k, v)


def rotation_table(c: LlamaConfig, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of every position below length, fp32 (length, K/2)."""
    angles = torch.outer(torch.arange(length, device="cpu").float(), rotation_frequencies(c))
    return angles.cos().to(device), angles.sin().to(device)


def rotation_frequencies(c: LlamaConfig) -> Tensor:
    """Angle by which each pair of a head turns per position, fp32 (K/2,).

    Made in fp32 on the CPU, so that every device rotates by the same angles.
    """
    K = c.head_dim
    frequencies = 1.0 / (c.rope_theta ** (torch.arange(0, K, 2, device="cpu").float() / K))
    return frequencies if c.rope_scaling is None else _scaled(frequencies, c.rope_scaling)


def _scaled(frequencies: Tensor, s: RopeScaling) -> Tensor:
    """Frequencies stretched by s. "llama3" after Meta's llama-models (apply_scaling)."""
    if s.kind == "linear":
        return frequencies / s.factor
    wavelengths = 2 * math.pi / frequencies
    low, high = s.original_max_seq_len / s.low_freq_factor, s.original_max_seq_len / s.high_freq_factor
    smooth = (s.original_max_seq_len / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blended = (1 - smooth) * frequencies / s.factor + smooth * frequencies
    return torch.where(wavelengths > low, frequencies / s.factor, torch.where(wavelengths < high, frequencies, blended))
