"""The tensors of a Hugging Face model directory: safetensors files, read by slices and written as a stream.

Used by checkpoint.py; knows names, shapes and bytes, never what a model computes. The safetensors package reads (its
parser refuses every malformed header); writing is done here, because its writer wants all tensors at once: the format
is eight bytes of header length, a JSON header, and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.config import LlamaConfig
from llama.files import is_plain, looks_like, read_json
from llama.layout import Entry, entries
from llama.quantize import Packed, Scheme

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22  # elements cast, checked and written at a time: 16 MiB of fp32


# --- reading --------------------------------------------------------------------------------------


class Weights:
    """The tensors of a directory by our names; opening it checks names, shapes and dtypes against the config."""

    def __init__(self, path: Path, config: LlamaConfig, scheme: Scheme | None = None) -> None:
        """ValueError lists what is missing, unexpected or of another shape. Nothing is read yet but headers."""
        self.path = path
        self._config, self._scheme = config, scheme
        self._where: dict[str, Any] = {}
        seen: dict[str, tuple[Any, Path]] = {}
        for file in _files(path):
            for name, opened in _open(file):
                if name in seen:
                    raise ValueError(f"{file}: holds {name}, which {seen[name][1].name} holds as well")
                seen[name] = (opened, file)
        wanted = {t.hf: t for e in entries(config) for t in _tensors(e, scheme)}
        missing = [name for name in wanted if name not in seen]
        unexpected = [name for name in seen if name not in wanted and not _is_redundant(name, config)]
        if missing or unexpected:
            raise ValueError(
                f"{path}: the weights do not fit config.json{_list('missing', missing)}"
                f"{_list('unexpected', unexpected)}"
            )
        for name, t in wanted.items():
            opened, file = seen[name]
            part = opened.get_slice(name)
            if tuple(part.get_shape()) != t.shape:
                raise ValueError(f"{file}: {name} is {_by(part.get_shape())}, but config.json makes it {_by(t.shape)}")
            if part.get_dtype() not in t.kinds:
                raise ValueError(f"{file}: {name} is {part.get_dtype()}; only {', '.join(t.kinds)} is read")
            self._where[t.name] = part

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly; of nearly every checkpoint, the one it is in."""
        widest = None
        for part in self._where.values():
            if part.get_dtype() not in DTYPES:
                continue
            dtype = DTYPES[part.get_dtype()]
            widest = dtype if widest is None else torch.promote_types(widest, dtype)
        assert widest is not None
        return widest

    def read(self, name: str, where: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A tensor, or a part of it. It may be a view of the file: copy it."""
        try:
            return self._where[name][where]
        except (SafetensorError, OSError, RuntimeError) as e:
            raise ValueError(f"{self.path}: {name} cannot be read ({e})") from None

    def read_packed(self, name: str) -> Packed:
        """A quantised weight. ValueError if it says another shape, or has scales that are not finite."""
        shape = self.read(f"{name}_shape").tolist()
        wanted = next(list(e.shape) for e in entries(self._config) if e.name == name)
        if shape != wanted:
            raise ValueError(f"{self.path}: {name}_shape says {_by(shape)}, but config.json makes it {_by(wanted)}")
        scales = self.read(f"{name}_scale")
        if not _finite(scales):
            raise ValueError(f"{self.path}: {name}_scale has NaN or infinite values; the weights are damaged")
        return Packed(self.read(f"{name}_packed").contiguous().view(torch.uint8), scales)


class _Tensor(NamedTuple):
    """One tensor of a file: ours and Hugging Face's name, shape, and the number types that it may have."""

    name: str
    hf: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(DTYPES)


def is_quantised(e: Entry) -> bool:
    """Whether a quantised model stores this weight packed: the linears of the blocks."""
    return len(e.shape) == 2 and e.name.startswith("layers.")


def _tensors(e: Entry, scheme: Scheme | None) -> list[_Tensor]:
    """The tensors in which a weight is stored: itself, or what compressed-tensors makes of a linear in a block."""
    if scheme is None or not is_quantised(e):
        return [_Tensor(e.name, e.hf, e.shape)]
    out, width = e.shape
    scheme.check(e.hf, width)
    parts = (
        ("packed", (out, width * scheme.bits // 32), ("I32",)),
        ("scale", (out, scheme.groups(width)), tuple(DTYPES)),
        ("shape", (2,), ("I64",)),
    )
    return [_Tensor(f"{e.name}_{part}", f"{e.hf}_{part}", *rest) for part, *rest in parts]


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Tensors that say nothing new: rotary frequencies, and a tied head (transformers ignores both as well)."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"; {what}: {', '.join(names[:6])}{more}" if names else ""


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model, or what is there in their place."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if (path / INDEX).exists():
        names = read_json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(is_plain(v) for v in names.values()):
            raise ValueError(f"{path / INDEX}: weight_map must name files of this directory")
        files = sorted({path / name for name in names.values()})
        for file in files:
            if not file.exists():
                raise ValueError(f"{file}: missing, though {INDEX} lists it")
        return files
    for pattern, what in (
        ("pytorch_model*.bin", "PyTorch pickles"),
        ("consolidated.*.pth", "Meta's files"),
        ("*.gguf", "GGUF"),
        ("*.safetensors", f"safetensors files without {INDEX}"),
    ):
        if found := sorted(path.glob(pattern)):
            source = found[0] if pattern == "*.gguf" else path
            remedy = "" if pattern == "*.safetensors" else f"; run: python convert_weights.py {source} OUT"
            raise ValueError(f"{path}: no {SINGLE}, only {what} ({found[0].name}){remedy}")
    if checkpoints := sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime):
        raise ValueError(f"{path}: no {SINGLE}, but training checkpoints; open one of them: {checkpoints[-1]}")
    raise ValueError(f"{path}: no {SINGLE}; this is not a model directory")


def _open(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open(file, "rb") as f:
            head = f.read(64)
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        reason = looks_like(head[:64]) if not isinstance(e, OSError) else e.strerror
        raise ValueError(f"{file}: not a whole safetensors file ({reason or f'truncated or damaged: {e}'})") from None
    for name in opened.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
        yield name, opened


# --- writing --------------------------------------------------------------------------------------


def stored_bytes(config: LlamaConfig, dtype: torch.dtype, scheme: Scheme | None = None) -> int:
    """Bytes that all tensors of a model take in this dtype, its blocks' linears quantised by a scheme."""
    return sum(_size(t, dtype) for e in entries(config) for t in _tensors(e, scheme))


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor | Packed]],
    config: LlamaConfig,
    dtype: torch.dtype,
    max_shard: int,
    scheme: Scheme | None = None,
) -> None:
    """Write a stream of tensors (our names, in layout.entries order) as safetensors, in files of max_shard bytes.

    Each is cast to dtype; what the scheme quantises comes packed. Holds one chunk of a tensor at a time beside what
    the stream holds. ValueError for a tensor that is out of order, of another shape, or not finite after the cast.
    """
    assert dtype in _NAMES, f"{dtype} cannot be stored"
    stream = iter(tensors)
    shards = _plan(config, dtype, max_shard, scheme)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with open(directory / name, "wb") as f:
            f.write(_header([t for e in shard for t in _tensors(e, scheme)], dtype))
            for e in shard:
                given, tensor = next(stream, ("nothing", None))
                if tensor is None or given != e.name:
                    raise ValueError(f"weights: expected {e.name}, got {given}")
                for t, part in zip(_tensors(e, scheme), _parts(e, tensor), strict=True):
                    if tuple(part.shape) != t.shape:
                        raise ValueError(
                            f"weights: {t.name} is {_by(part.shape)}, but the config makes it {_by(t.shape)}"
                        )
                    for piece in _pieces(t.name, part, dtype):
                        f.write(piece)
                    weight_map[t.hf] = name
                del tensor, part  # or it would live on while the stream makes the next one
    if (more := next(stream, None)) is not None:
        raise ValueError(f"weights: {more[0]} is not part of this model")
    if len(shards) > 1:
        index = {"metadata": {"total_size": stored_bytes(config, dtype, scheme)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _parts(e: Entry, tensor: Tensor | Packed) -> list[Tensor]:
    """What is stored of a weight, in the order of _tensors()."""
    if isinstance(tensor, Tensor):
        return [tensor]
    return [tensor.codes.contiguous().view(torch.int32), tensor.scales, torch.tensor(e.shape)]


def _plan(config: LlamaConfig, dtype: torch.dtype, max_shard: int, scheme: Scheme | None) -> list[list[Entry]]:
    """Tensors in file order, cut where a file would pass max_shard bytes."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for e in entries(config):
        n = sum(_size(t, dtype) for t in _tensors(e, scheme))
        if shards[-1] and size + n > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(e)
        size += n
    return shards


def _kind(t: _Tensor, dtype: torch.dtype) -> str:
    """The number type in which a tensor is written."""
    return _NAMES[dtype] if _NAMES[dtype] in t.kinds else t.kinds[0]


def _size(t: _Tensor, dtype: torch.dtype) -> int:
    return math.prod(t.shape) * int(_kind(t, dtype).lstrip("IBF")) // 8


def _header(tensors: list[_Tensor], dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        end = offset + _size(t, dtype)
        header[t.hf] = {"dtype": _kind(t, dtype), "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _pieces(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor, floating-point numbers in dtype, a chunk at a time."""
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        piece = chunk.to("cpu", dtype if chunk.is_floating_point() else None).contiguous()
        if piece.is_floating_point() and not _finite(piece):
            if _finite(chunk):
                raise ValueError(f"weights: {name} has values too large for {dtype}; save in float32 or bfloat16")
            raise ValueError(f"weights: {name} has NaN or infinite values; they are not saved")
        yield memoryview(piece.view(torch.uint8).numpy())


def _finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # Both ends show it, for NaN spreads; 7 GB/s where isfinite(x).all() reads 0.5 (fp32, one EPYC thread, Nov 2026).
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())
