"""One directory <-> a model: the Hugging Face LLaMA layout, strict, atomic, streamed. A GGUF file opens as well.

train.py, generate.py, convert_weights.py, evaluate.py and serve.py open and save models here and nowhere else.
Reading trusts nothing: a manifest is checked first when there is one, then names and shapes, and a failed load never
goes on. What is saved opens in transformers, vLLM and llama.cpp's converter with nothing in between. Training state
is training_state.py's; load_model opens the weights of a `checkpoint-<step>/` too.

An embedding with more rows than the tokenizer has pieces (ChatDoctor's 32,001: a [PAD] row was added) keeps them, so
that what is loaded is what was stored; whoever samples must leave out ids from `tokenizer.vocab_size` on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llama import provenance
from llama.chat import ChatFormat
from llama.config import LlamaConfig, from_hf, to_hf
from llama.files import MANIFEST, atomic_directory, read_bytes, read_json, settle, verify
from llama.gguf_files import GGUF
from llama.gguf_format import is_gguf
from llama.hf_tokenizer import tokenizer_files
from llama.layout import entries
from llama.model import Llama
from llama.quantize import Packed, QuantisedLinear, Scheme, empty, from_json, replace, to_json
from llama.together import ranks, together, verify_together
from llama.tokenizer import Tokenizer
from llama.weights import Weights, stored_bytes, write_weights

# ChatDoctor's chat.py: how its answers are sampled unless the user says otherwise.
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "max_new_tokens": 200,
}
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ADAPTER_CONFIG = "adapter_config.json"  # beside a training state: it holds adapters only, see lora_files.py
MAX_SHARD_BYTES = 5_000_000_000  # what transformers calls 5 GB


# --- reading --------------------------------------------------------------------------------------


def _directory(path: str | Path) -> Path:
    path = Path(path)
    if is_gguf(path):
        return path
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {what}; give the directory of a model (models are not downloaded by name)")
    settle(path)
    return path


def _gguf(path: Path) -> GGUF:
    """A GGUF file, opened once: all that is loaded asks for it, and a header with 32,000 pieces takes 20 ms."""
    s = path.stat()
    return _opened(path, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))


@functools.lru_cache(maxsize=2)  # the model that answers, and one that drafts
def _opened(path: Path, _: tuple[int, ...]) -> GGUF:
    return GGUF(path)


def load_config(path: str | Path) -> LlamaConfig:
    """Sizes of the model in a directory or GGUF file."""
    path = _directory(path)
    if is_gguf(path):
        return _gguf(path).config
    if not (path / "config.json").exists():
        if (path / "params.json").exists():
            raise ValueError(f"{path}: Meta's layout (params.json); run: python convert_weights.py {path} OUT")
        inner = sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        remedy = f"; open one of its training checkpoints: {inner[-1]}" if inner else ""
        raise ValueError(f"{path}: has no config.json, so it is not a model directory{remedy}")
    try:
        return from_hf(read_json(path / "config.json"))
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(path)) else f"{path}/{e}") from None


def load_scheme(path: str | Path) -> Scheme | None:
    """How the weights in a directory are quantised; None: not at all."""
    path = _directory(path)
    if is_gguf(path):
        return None
    file = path / "config.json"
    stated = read_json(file).get("quantization_config")
    try:
        return None if stated is None else from_json(stated)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The SentencePiece tokenizer of a directory; it must not have more pieces than the embedding has rows."""
    path = _directory(path)
    if is_gguf(path):
        return _gguf_tokenizer(_gguf(path))
    file = path / "tokenizer.model"
    if not file.exists():
        found = "only tokenizer.json" if (path / "tokenizer.json").exists() else "no tokenizer"
        raise ValueError(
            f"{path}: {found}; only SentencePiece models (tokenizer.model) open here, and Llama 3 has none"
        )
    tokenizer = Tokenizer(read_bytes(file), str(file))
    if (path / "config.json").exists() and tokenizer.vocab_size > (rows := load_config(path).vocab_size):
        raise ValueError(f"{file}: {tokenizer.vocab_size:,} pieces, but the embedding has {rows:,} rows")
    return tokenizer


def _gguf_tokenizer(source: GGUF) -> Tokenizer:
    tokenizer, rows = source.tokenizer(), source.config.vocab_size
    if tokenizer is None:
        kind = source.tokenizer_kind()
        raise ValueError(f"{source.path}: its tokenizer is {kind!r}; only SentencePiece's ('llama') open here")
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{source.path}: {tokenizer.vocab_size:,} tokens, but the embedding has {rows:,} rows")
    return tokenizer


def load_stages(path: str | Path) -> provenance.Stages:
    """Where the model in a directory or GGUF file comes from; no stages where that does not say."""
    path = _directory(path)
    return _gguf(path).stages() if is_gguf(path) else provenance.stages_of(path)


def load_chat_format(path: str | Path) -> ChatFormat:
    """The prompt format a model was trained with; ChatDoctor's when the directory does not say."""
    path = _directory(path)
    if is_gguf(path):
        return _gguf(path).chat_format() or ChatFormat()
    file = path / "chat_format.json"
    if not file.exists():
        return ChatFormat()
    try:
        return ChatFormat.from_json(read_json(file))
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(file)) else f"{file.parent}/{e}") from None


def load_generation(path: str | Path) -> dict[str, Any]:
    """The sampling defaults in a directory's generation_config.json, under its own names; {} when there are none."""
    file = _directory(path) / "generation_config.json"
    if not file.exists():
        return {}
    values = {k: v for k, v in read_json(file).items() if k in _SAMPLING and v is not None}
    for k, v in values.items():
        if not isinstance(v, bool if k == "do_sample" else (int, float)) or (isinstance(v, bool) and k != "do_sample"):
            raise ValueError(f"{file}: {k} is {v!r}; it must be {'true or false' if k == 'do_sample' else 'a number'}")
    return values


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    split: Callable[[Llama], object] | None = None,
) -> Llama:
    """The model in a Hugging Face directory, in a `checkpoint-<step>/` of a training run, or in a GGUF file.

    dtype None: as stored (packed numbers: float16). split(model): makes DTensors of what is still on meta; every rank
    then reads only its slices, and checks its part of the files. ValueError, one line, for anything that is not exactly
    the model that config.json or the GGUF file describes.
    """
    path = _directory(path)
    config = load_config(path)
    _check(path, shared=split is not None)
    if _is_training_state(path) and (path / ADAPTER_CONFIG).exists():
        if split is not None:
            raise ValueError(f"{path}: holds adapters only, which are not split over ranks; give a finished model")
        from llama import lora_files

        return lora_files.load_training_state(path, config, device, dtype)
    weights = None if _is_training_state(path) else _weights(path, config)
    with torch.device("meta"), _NoInit():
        model = Llama(config)
    dtype = dtype or (weights.dtype() if weights else torch.float32)
    if (scheme := load_scheme(path)) is not None:
        replace(model.layers, lambda _, linear: empty(linear, scheme, "meta", dtype), scheme.bits)
    if split is not None:
        split(model)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(_memory_of(p, dtype, device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _memory_of(buffer, buffer.dtype, device))
    _fill(model, path, weights)
    return model


def _memory_of(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor like one on meta, with memory; empty_like() of one that is no DTensor would import sympy (0.5 s)."""
    if hasattr(tensor, "device_mesh"):
        return torch.empty_like(tensor, dtype=dtype, device=device)
    return torch.empty(tensor.shape, dtype=dtype, device=device)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The number type that load_model() gives a model by itself."""
    path = _directory(path)
    return torch.float32 if _is_training_state(path) else _weights(path, load_config(path)).dtype()


class _FromGGUF:
    """The tensors of a GGUF file by our names, as weights.Weights has those of a directory."""

    def __init__(self, source: GGUF) -> None:
        self._source = source
        self._entries = {e.name: e for e in entries(source.config)}

    def dtype(self) -> torch.dtype:
        """The narrowest dtype for all of it, by what the file says of each."""
        first, *others = {self._source.dtype(e) for e in self._entries.values()}
        return functools.reduce(torch.promote_types, others, first)

    def read(self, name: str, where: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A tensor, or a part of it (of which the whole is read)."""
        return self._source.read(self._entries[name])[where]


def _weights(path: Path, config: LlamaConfig) -> Weights | _FromGGUF:
    return _FromGGUF(_gguf(path)) if is_gguf(path) else Weights(path, config, load_scheme(path))


def sizes(path: str | Path, dtype: torch.dtype | None, positions: int) -> tuple[int, int, int]:
    """Bytes that the model in a directory takes once loaded: a block, the rest, and a KV cache of so many positions."""
    config, scheme, dtype = load_config(path), load_scheme(path), dtype or stored_dtype(path)
    one, two = (stored_bytes(dataclasses.replace(config, n_layers=n), dtype, scheme) for n in (1, 2))
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * min(positions, config.max_seq_len)
    return two - one, 2 * one - two, cache * dtype.itemsize


class _NoInit(TorchFunctionMode):
    """Modules made under it leave their parameters as they are: drawing random numbers on meta imports torch._dynamo,
    0.8 s of the 1.1 s that loading a small model took."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def copied(parameter: Tensor, values: Tensor) -> None:
    """Store this rank's part of a weight, rounded to the parameter's number type."""
    (parameter.to_local() if hasattr(parameter, "to_local") else parameter).copy_(values)


def load_weights(model: Llama, path: str | Path, assign: Callable[[nn.Parameter, Tensor], object] = copied) -> None:
    """Fill a model in place, in its own dtype. Sharded parameters (DTensor): every rank reads only its slice. Adapters
    (lora.py) are left as they are.

    assign(parameter, values): stores this rank's part of a weight, with all the bits that the file has.
    Parameters on meta are given memory first (of their mesh's device, or the CPU's). In a process group all ranks
    call it, and all raise when one fails.
    """
    path = _directory(path)
    if load_scheme(path) is not None:
        raise ValueError(f"{path}: quantised weights do not train; start from the model that they were made of")
    if _is_training_state(path):
        packed = any(not p.is_floating_point() for p in model.parameters())  # nf4.py's
        if packed or (path / ADAPTER_CONFIG).exists():
            why = "4-bit weights are not read from a training state" if packed else "it holds adapters only"
            raise ValueError(f"{path}: {why}; start from a finished model, or go on with --resume_from_checkpoint")
    if any(p.is_meta for p in model.parameters()):
        mesh = getattr(next(model.parameters()), "device_mesh", None)
        model.to_empty(device="cpu" if mesh is None else mesh.device_type)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if (path / MANIFEST).exists():
            verify_together(path)
        together(lambda: _fill(model, path, None, assign))
        return
    _check(path)
    _fill(model, path, None, assign)


def _check(path: Path, shared: bool = False) -> None:
    if (path / MANIFEST).exists():
        verify(path, *((int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE")) if shared else ()))


def _is_training_state(path: Path) -> bool:
    return (path / ".metadata").exists()


@torch.no_grad()
def _fill(
    model: Llama,
    path: Path,
    weights: Weights | _FromGGUF | None,
    assign: Callable[[nn.Parameter, Tensor], object] = copied,
) -> None:
    stored = {e.name for e in entries(model.config)}
    parameters = [(name, p) for name, p in model.named_parameters() if name in stored]
    if _is_training_state(path):
        from llama.training_state import read_tensors  # torch.distributed.checkpoint takes 0.7 s to import

        read_tensors(path, {f"model.{name}": p for name, p in parameters}, partial=True)
        return
    weights = weights or _weights(path, model.config)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            packed = weights.read_packed(f"{name}.weight")
            for buffer, values in ((module.codes, packed.codes), (module.scales, packed.scales)):
                copied(buffer, values[_part(buffer)])
    for name, p in parameters:
        where = _part(p)
        if all(s == slice(None) or s.start < s.stop for s in where):
            assign(p, weights.read(name, where))


def _part(tensor: Tensor) -> tuple[slice, ...]:
    """What this rank holds of a tensor that may be sharded."""
    if not hasattr(tensor, "device_mesh"):
        return (slice(None),)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


# --- writing --------------------------------------------------------------------------------------


def model_files(
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    chat_format: ChatFormat | None,
    generation: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Every file of a model directory but the weights. generation None: ChatDoctor's sampling; extra: further keys of
    config.json (they win). Without a tokenizer, bos and eos ids are what extra says."""
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} pieces, the model {config.vocab_size:,} rows")
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    document = to_hf(config) | ids | {"torch_dtype": _DTYPE_NAMES[dtype]} | (extra or {})
    stops = {k: document[k] for k in ("bos_token_id", "eos_token_id") if document.get(k) is not None}
    sampling = SAMPLING if generation is None else generation
    files = {"config.json": _json(document), "generation_config.json": _json(stops | sampling)}
    if chat_format is not None:
        files["chat_format.json"] = _json(chat_format.to_json())
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, chat_format or ChatFormat(), config.max_seq_len)
    return files


def _json(d: dict[str, Any]) -> bytes:
    return (json.dumps(d, indent=2, allow_nan=False) + "\n").encode()


def save_model(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor | Packed]],
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    chat_format: ChatFormat | None,
    generation: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: dict[str, Any] | None = None,
    scheme: Scheme | None = None,
    beside: dict[str, bytes] | None = None,
) -> None:
    """Write a model directory, whole or not at all; an earlier model at `path` is replaced only if it was saved here.

    tensors: (our name, tensor) in layout.entries order, taken one by one, never held together. dtype None: that of
    the first tensor; all are cast to it. Tensors that are not finite after the cast are a ValueError. generation,
    extra: see model_files. scheme: of a quantised model, whose blocks' linears come packed. beside: further files. In a
    process group only one rank calls it (all: save_sharded_model).
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{path}: there are no tensors to save")
    dtype = dtype or first[1].dtype  # the embedding's
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"{path}: cannot save as {dtype}; choose float32, bfloat16 or float16")
    if scheme is not None:
        extra = {**(extra or {}), "quantization_config": to_json(scheme)}
    files = model_files(config, tokenizer, chat_format, generation, dtype, extra) | (beside or {})

    def whole() -> Iterable[tuple[str, Tensor | Packed]]:
        nonlocal first
        assert first is not None
        yield first
        first = None
        yield from stream

    needed = stored_bytes(config, dtype, scheme) + sum(map(len, files.values())) + (1 << 20)
    with atomic_directory(path, needed) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        write_weights(directory, whole(), config, dtype, max_shard_bytes, scheme)


def save_sharded_model(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    chat_format: ChatFormat | None,
    generation: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: dict[str, bytes] | None = None,
) -> None:
    """save_model, called by all ranks with a stream that they must drain together; rank 0 writes.

    Holds one whole tensor at a time. An error on rank 0 is raised on all, after the stream has ended.
    """
    stream = iter(tensors)

    def work() -> None:
        try:
            if ranks()[0] == 0:
                choices = (config, tokenizer, chat_format, generation, dtype, max_shard_bytes)
                save_model(path, stream, *choices, beside=beside)
        finally:
            for _ in stream:  # gathering is collective: a rank that stops early would leave the others waiting
                pass

    together(work)
