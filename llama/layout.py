"""Names, shapes and shard rules of a LLaMA's tensors: ours, Hugging Face's and Meta's, in one table.

Used by checkpoint.py (Hugging Face files) and convert_weights.py (Meta's). Ours equal Hugging Face's in layout
(rotate-half q and k rows); Meta's q and k rows are interleaved and are permuted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llama.config import LlamaConfig


@dataclass(frozen=True)
class Entry:
    """One tensor: its three names, its full shape, and the dimension Meta splits over model-parallel shards.

    meta_split None means replicated in every shard. rope_heads > 0 marks q and k, whose rows Meta interleaves.
    """

    name: str
    hf: str
    meta: str
    shape: tuple[int, ...]
    meta_split: int | None
    rope_heads: int = 0


def entries(c: LlamaConfig, *, meta_vocab_parallel: bool = False) -> Iterator[Entry]:
    """Every tensor of the model in file order; the head is left out when tied.

    meta_vocab_parallel: Llama 3 splits the embedding over the vocabulary (VocabParallelEmbedding), LLaMA 1 and 2
    over its width (ParallelEmbedding).
    """
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    embed_split = 0 if meta_vocab_parallel else 1
    yield Entry(
        "embed.weight", "model.embed_tokens.weight", "tok_embeddings.weight", (c.vocab_size, c.dim), embed_split
    )
    for i in range(c.n_layers):
        ours, hf, meta = f"layers.{i}.", f"model.layers.{i}.", f"layers.{i}."
        for name, hf_name, meta_name, shape, split, heads in (
            ("attn_norm", "input_layernorm", "attention_norm", (c.dim,), None, 0),
            ("attn.q", "self_attn.q_proj", "attention.wq", (q, c.dim), 0, c.n_heads),
            ("attn.k", "self_attn.k_proj", "attention.wk", (kv, c.dim), 0, c.n_kv_heads),
            ("attn.v", "self_attn.v_proj", "attention.wv", (kv, c.dim), 0, 0),
            ("attn.o", "self_attn.o_proj", "attention.wo", (c.dim, q), 1, 0),
            ("mlp_norm", "post_attention_layernorm", "ffn_norm", (c.dim,), None, 0),
            ("mlp.gate", "mlp.gate_proj", "feed_forward.w1", (c.ffn_dim, c.dim), 0, 0),
            ("mlp.up", "mlp.up_proj", "feed_forward.w3", (c.ffn_dim, c.dim), 0, 0),
            ("mlp.down", "mlp.down_proj", "feed_forward.w2", (c.dim, c.ffn_dim), 1, 0),
        ):
            yield Entry(
                f"{ours}{name}.weight", f"{hf}{hf_name}.weight", f"{meta}{meta_name}.weight", shape, split, heads
            )
    yield Entry("norm.weight", "model.norm.weight", "norm.weight", (c.dim,), None)
    if not c.tie_embeddings:
        yield Entry("head.weight", "lm_head.weight", "output.weight", (c.vocab_size, c.dim), 0)


def interleave(w: Tensor, heads: int) -> Tensor:
    """Rows of a q or k weight (heads * K, D) from rotate-half order to Meta's interleaved order."""
    N, D = w.shape
    K = N // heads
    return w.view(heads, 2, K // 2, D).transpose(1, 2).reshape(N, D)


def deinterleave(w: Tensor, heads: int) -> Tensor:
    """Rows of a q or k weight (heads * K, D) from Meta's interleaved order to rotate-half order."""
    N, D = w.shape
    K = N // heads
    return w.view(heads, K // 2, 2, D).transpose(1, 2).reshape(N, D)
