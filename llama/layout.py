"""Names, shapes and shard rules of a LLaMA's tensors: ours, Hugging Face's, Meta's and GGUF's, in one table.

Used by checkpoint.py and hf_files.py (Hugging Face), meta_files.py and gguf_files.py. Ours equal Hugging Face's in
layout (rotate-half q and k rows); Meta's and GGUF's q and k rows are interleaved and are permuted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llama.config import LlamaConfig


@dataclass(frozen=True)
class Entry:
    """One tensor: its four names, its full shape, and the dimension Meta splits over model-parallel shards.

    meta_split None means replicated in every shard. rope_heads > 0 marks q and k, whose rows Meta interleaves.
    """

    name: str
    hf: str
    meta: str
    gguf: str
    shape: tuple[int, ...]
    meta_split: int | None
    rope_heads: int = 0

    def part(self, shards: int) -> tuple[int, ...]:
        """Shape of the piece that one of Meta's shards holds. ValueError if it cannot be cut into equal pieces."""
        if self.meta_split is None:
            return self.shape
        whole = self.shape[self.meta_split]
        if whole % shards:
            rows = "rows" if self.meta_split == 0 else "columns"
            raise ValueError(f"{self.meta}: {whole} {rows} cannot be cut into {shards} equal shards")
        return tuple(n // shards if i == self.meta_split else n for i, n in enumerate(self.shape))


def entries(c: LlamaConfig, *, meta_vocab_parallel: bool = False) -> Iterator[Entry]:
    """Every tensor of the model in file order; the head is left out when tied.

    meta_vocab_parallel: Llama 3 splits the embedding over the vocabulary (VocabParallelEmbedding), LLaMA 1 and 2
    over its width (ParallelEmbedding).
    """
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    embed_split = 0 if meta_vocab_parallel else 1
    vocab = (c.vocab_size, c.dim)
    embed = "embed.weight", "model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"
    yield Entry(*embed, vocab, embed_split)
    for i in range(c.n_layers):
        for name, hf, meta, gguf, shape, split, heads in (
            ("attn_norm", "input_layernorm", "attention_norm", "attn_norm", (c.dim,), None, 0),
            ("attn.q", "self_attn.q_proj", "attention.wq", "attn_q", (q, c.dim), 0, c.n_heads),
            ("attn.k", "self_attn.k_proj", "attention.wk", "attn_k", (kv, c.dim), 0, c.n_kv_heads),
            ("attn.v", "self_attn.v_proj", "attention.wv", "attn_v", (kv, c.dim), 0, 0),
            ("attn.o", "self_attn.o_proj", "attention.wo", "attn_output", (c.dim, q), 1, 0),
            ("mlp_norm", "post_attention_layernorm", "ffn_norm", "ffn_norm", (c.dim,), None, 0),
            ("mlp.gate", "mlp.gate_proj", "feed_forward.w1", "ffn_gate", (c.ffn_dim, c.dim), 0, 0),
            ("mlp.up", "mlp.up_proj", "feed_forward.w3", "ffn_up", (c.ffn_dim, c.dim), 0, 0),
            ("mlp.down", "mlp.down_proj", "feed_forward.w2", "ffn_down", (c.dim, c.ffn_dim), 1, 0),
        ):
            names = f"layers.{i}.{name}", f"model.layers.{i}.{hf}", f"layers.{i}.{meta}", f"blk.{i}.{gguf}"
            yield Entry(*(f"{n}.weight" for n in names), shape, split, heads)
    yield Entry("norm.weight", "model.norm.weight", "norm.weight", "output_norm.weight", (c.dim,), None)
    if not c.tie_embeddings:
        yield Entry("head.weight", "lm_head.weight", "output.weight", "output.weight", vocab, 0)


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
