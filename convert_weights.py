"""Weights from one layout to another: Meta, Hugging Face or GGUF in and out; quantised if asked.

    python convert_weights.py SRC DST [--to hf|meta|gguf] [--dtype bfloat16|int8|int4|...]

SRC is a directory or a GGUF file, told apart by content. Tensors go through one at a time; every one is read back from
the result and compared with the source before DST appears. Nothing in SRC is trusted, and nothing is guessed or
skipped: one line says what is wrong, and no DST is left behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from data.calibration import calibration_tokens
from llama import checkpoint, files, provenance, quantised_files
from llama.chat import ChatFormat
from llama.command_line import Parser
from llama.config import LlamaConfig
from llama.gguf_files import GGUF, LARGEST_Q8_0, as_stored, bytes_in_gguf, dtype_in_gguf, write_gguf
from llama.gguf_format import FLOAT_KINDS, is_gguf, package
from llama.hf_files import HuggingFace
from llama.layout import Entry, entries
from llama.meta_files import Meta, all_entries, check_shards, write_meta
from llama.quantize import Scheme, to_json
from llama.tokenizer import Tokenizer
from llama.torch_files import DTYPES, same_bits
from llama.weights import is_quantised, stored_bytes, write_weights

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
QUANTISED = {"int8": 8, "int4": 4}  # what --dtype calls them, and their bits
_PACKED = "q8_0"  # the --dtype that only GGUF has
_SLACK = 32 << 20  # bytes for everything but the tensors, when free space is checked
_LLAMA3_VOCABULARY, _LLAMA3_IDS = 128256, {"bos_token_id": 128000, "eos_token_id": 128001}


class Source(Protocol):
    """Where tensors come from: Meta, HuggingFace or GGUF."""

    kind: str
    label: str
    path: Path
    config: LlamaConfig
    files: list[Any]
    ignored: list[str]

    def dtype(self, e: Entry) -> torch.dtype:
        """Number type in which the tensor is stored."""
        ...

    def read(self, e: Entry) -> Tensor:
        """One whole tensor in our layout; not to be written into."""
        ...

    def check_unchanged(self) -> None:
        """ValueError if any file is not as it was when opened."""
        ...


class Reader(Protocol):
    """What the comparison needs of a result."""

    def read(self, e: Entry) -> Tensor:
        """One whole tensor in our layout."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion, checked: from `source` into `to`, as `config` in `dtype`. packed: --to gguf makes Q8_0 of it."""

    source: Source
    to: str
    config: LlamaConfig
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    shards: int
    max_shard: int
    scheme: Scheme | None = None
    packed: bool = False

    @property
    def gguf_kind(self) -> str:
        """The type of a whole GGUF file, as GGUF calls it."""
        return "Q8_0" if self.packed else FLOAT_KINDS[self.dtype]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        convert(args)
    except ValueError as e:
        return _fail(str(e))
    except OSError as e:
        return _fail(f"{e.filename or args.dst}: {e.strerror or e}")
    except MemoryError:
        return _fail(f"{args.src}: out of memory")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written")
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def interrupt(signum: int, frame: object) -> None:
    """What a stop signal does: end as Ctrl-C does, leaving nothing behind."""
    raise KeyboardInterrupt


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    p = Parser("convert_weights.py", (__doc__ or "").split("\n")[0])
    p.add_argument("src", type=Path, help="directory of Meta's or Hugging Face's files, or a GGUF file")
    p.add_argument("dst", type=Path, help="directory to make; for gguf a file")
    p.add_argument("--to", choices=("hf", "meta", "gguf"), default="hf", help="layout to write (default: hf)")
    kinds = (*DTYPES.values(), *QUANTISED, _PACKED)
    about = f"number type to write (default: as in SRC); {', '.join(QUANTISED)}: Hugging Face, {_PACKED}: GGUF"
    p.add_argument("--dtype", choices=kinds, help=about)
    p.add_argument("--group_size", type=int, help="weights that share a scale, with int4: 32, 64 or 128 (default: 64)")
    p.add_argument(
        "--calibration", type=Path, metavar="FILE", help="dialogues, in any shape train.py reads, to round int4 well by"
    )
    p.add_argument("--shards", type=int, default=1, help="model-parallel shards of --to meta (default: 1)")
    p.add_argument("--max_seq_len", type=int, help="context length, where SRC's is unknown or wrong")
    p.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: tokenizer.model in SRC or above it)")
    p.add_argument("--max_shard_size", default="5GB", help="largest file of --to hf (default: 5GB)")
    p.add_argument("--no_mmap", action="store_true", help="read SRC without mapping it (it lies on a failing network)")
    return p.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Do it: open and check the source, write beside DST, read back and compare, put it in place, say what was done."""
    _check_destination(args)
    if args.to == "gguf":
        package()
    job = plan(args)
    if job.scheme is not None:
        size = stored_bytes(job.config, job.dtype, job.scheme)
    else:
        size = sum(_bytes(e, job) for e in _entries(job))
    if args.to == "gguf":
        with files.atomic_file(args.dst, size + _SLACK) as file:
            named = args.src.resolve().stem, _chat_format(job.source)
            stream, stages = _stream(job, size), _stages(args, job.source)
            write_gguf(file, stream, job.config, _required(job.tokenizer), job.gguf_kind, *named, stages)
            result = GGUF(file)
            _compare_config(job, result.config)
            _compare(job, result, size)
            job.source.check_unchanged()
    else:
        with files.atomic_directory(args.dst, size + _SLACK) as directory:
            for name, data in provenance.file_of(_stages(args, job.source)).items():
                (directory / name).write_bytes(data)
            if job.scheme is not None:
                _write_quantised(job, job.scheme, directory, args.calibration)
            else:
                _write_directory(job, directory, size)
                written = (HuggingFace if args.to == "hf" else Meta)(directory, mmap=False)
                _compare_config(job, written.config)
                _compare(job, written, size)
            job.source.check_unchanged()
    _summarise(job, args.dst, size)


# --- what to do -----------------------------------------------------------------------------------


def _check_destination(args: argparse.Namespace) -> None:
    src, dst = args.src.resolve(), args.dst.resolve()
    if dst == src or src in dst.parents:
        raise ValueError(f"{args.dst}: lies inside {args.src}; choose a place outside it")
    if os.path.lexists(args.dst):
        raise ValueError(f"{args.dst}: exists already; nothing is overwritten, choose another name")
    if (args.to == "gguf") != (dst.suffix == ".gguf"):
        raise ValueError(f"{args.dst}: --to gguf writes one file, named *.gguf; the others write a directory")
    if args.shards != 1 and args.to != "meta":
        raise ValueError(f"--shards {args.shards}: only --to meta has model-parallel shards (see --max_shard_size)")
    if args.shards < 1:
        raise ValueError(f"--shards {args.shards}: must be at least 1")


def plan(args: argparse.Namespace) -> Job:
    """Open the source and settle everything that can be wrong before a byte is written."""
    source = open_source(args.src, not args.no_mmap)
    config = source.config
    if args.max_seq_len is not None:
        config = dataclasses.replace(config, max_seq_len=args.max_seq_len)
    kinds = {source.dtype(e) for e in entries(config)}
    packed = args.dtype == _PACKED
    if packed and args.to != "gguf":
        raise ValueError(f"--dtype {_PACKED}: only --to gguf has it")
    named = {name: d for d, name in DTYPES.items()} | {_PACKED: torch.float32}
    if args.to == "meta":
        check_shards(config, args.shards)
    own = isinstance(source, GGUF) and args.tokenizer is None
    tokenizer = source.tokenizer() if own else find_tokenizer(args.src, args.tokenizer)
    if tokenizer is None and args.to == "gguf":
        raise ValueError(f"{args.src}: has no SentencePiece tokenizer, which GGUF needs; give --tokenizer FILE")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        rows = f"the embedding has {config.vocab_size:,} rows"
        raise ValueError(f"{args.src}: the tokenizer has {tokenizer.vocab_size:,} pieces, but {rows}; give --tokenizer")
    scheme = find_scheme(args, config, tokenizer)
    dtype = quantised_files.DTYPE if scheme else named[args.dtype] if args.dtype else _widest(kinds)
    return Job(source, args.to, config, dtype, tokenizer, args.shards, parse_size(args.max_shard_size), scheme, packed)


def find_scheme(args: argparse.Namespace, config: LlamaConfig, tokenizer: Tokenizer | None) -> Scheme | None:
    """How --dtype and --group_size quantise; None: not at all."""
    if args.dtype not in QUANTISED:
        for flag in ("group_size", "calibration"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} {getattr(args, flag)}: only --dtype int4 has it")
        return None
    if args.to != "hf":
        raise ValueError(f"--dtype {args.dtype}: only --to hf can hold it (for GGUF see --dtype {_PACKED})")
    if args.calibration is not None and tokenizer is None:
        raise ValueError(f"--calibration {args.calibration}: SRC has no SentencePiece tokenizer to read it with")
    if args.calibration is not None and not args.calibration.is_file():
        what = "is no file" if args.calibration.exists() else "does not exist"
        raise ValueError(f"--calibration {args.calibration}: {what}")
    return quantised_files.scheme_for(config, QUANTISED[args.dtype], args.group_size)


def open_source(path: Path, mmap: bool) -> Source:
    """The source in a directory, told apart by its files, or a GGUF file. ValueError when there is none."""
    if is_gguf(path):
        return GGUF(path)
    if not path.is_dir():
        what = "is a file, and no GGUF; give the directory it is in" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {what}")
    if (path / files.MANIFEST).exists():
        files.verify(path)
    names = {p.name for p in path.iterdir()}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if names & {single, f"{single}.index.json"}:
            return HuggingFace(path, mmap)
    for pattern, index in (
        (r"model-\d+-of-\d+\.safetensors", "model.safetensors.index.json"),
        (r"pytorch_model-\d+-of-\d+\.bin", "pytorch_model.bin.index.json"),
    ):
        if any(re.fullmatch(pattern, n) for n in names):
            raise ValueError(f"{path / index}: missing, though files that it lists are there; fetch it")
    if any(re.fullmatch(r"consolidated\.\d+\.pth", n) for n in names):
        return Meta(path, mmap)
    if ".metadata" in names:
        raise ValueError(f"{path}: training state, not a model; convert the finished model beside it")
    if "params.json" in names:
        raise ValueError(f"{path / 'consolidated.00.pth'}: missing; fetch it")
    inner = sorted(p.name for p in path.iterdir() if p.is_dir() and (p / "params.json").exists())
    inner = inner or sorted(n for n in names if n.endswith(".gguf"))
    hint = f"; did you mean {path / inner[0]}?" if inner else ""
    raise ValueError(f"{path}: no model.safetensors, pytorch_model.bin or consolidated.00.pth in it{hint}")


def find_tokenizer(src: Path, given: Path | None) -> Tokenizer | None:
    """The SentencePiece tokenizer; None when the source has none (Llama 3's is another kind)."""
    if given is not None:
        return Tokenizer.load(given)
    for file in (src / "tokenizer.model", src.resolve().parent / "tokenizer.model"):  # above: as LLaMA 1 came
        if file.exists():
            first = file.read_bytes()[:200].split(b"\n")[0].split()
            tiktoken = len(first) == 2 and first[1].isdigit()
            return None if tiktoken else Tokenizer(files.read_bytes(file), str(file))
    return None


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number (powers of ten, as transformers counts)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)?", text.strip(), re.IGNORECASE)
    scale = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    size = int(float(found[1]) * scale[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(f"--max_shard_size {text!r}: give a size such as 5GB or 200MB")
    return size


def _widest(kinds: set[torch.dtype]) -> torch.dtype:
    """The narrowest number type that holds all of these exactly; nearly always there is only one."""
    widest, *others = sorted(kinds, key=str)
    for kind in others:
        widest = torch.promote_types(widest, kind)
    return widest


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    assert tokenizer is not None
    return tokenizer


# --- doing it -------------------------------------------------------------------------------------


def _entries(job: Job) -> Iterable[Entry]:
    return all_entries(job.config) if job.to == "meta" else entries(job.config)


def _source_entry(job: Job, e: Entry) -> Entry:
    """Where the source keeps it: Meta's files hold a tied head as well, which is the embedding."""
    return next(entries(job.config)) if job.config.tie_embeddings and e.name == "head.weight" else e


def _dtype(job: Job, e: Entry) -> torch.dtype:
    return dtype_in_gguf(e, job.gguf_kind) if job.to == "gguf" else job.dtype


def _bytes(e: Entry, job: Job) -> int:
    if job.to == "gguf":
        return bytes_in_gguf(e, job.gguf_kind)
    n = job.dtype.itemsize
    for d in e.shape:
        n *= d
    return n


def _read(job: Job, e: Entry) -> Tensor:
    """A tensor of the source in the number type to write, all of it finite; as it is if it is going to be quantised."""
    t = job.source.read(_source_entry(job, e))
    stored = f"{job.source.path}: {getattr(e, job.source.kind)}"
    if bad := _not_finite(t):
        raise ValueError(f"{stored} has {bad:,} NaN or infinite values; the weights are damaged")
    if job.scheme is not None and is_quantised(e):
        return t
    out = t.to(_dtype(job, e))
    if out.dtype != t.dtype and (bad := _not_finite(out)):
        raise ValueError(f"{stored} has {bad:,} values too large for {DTYPES[out.dtype]}; use bfloat16 or float32")
    if job.packed and max(map(abs, torch.aminmax(out))) > LARGEST_Q8_0:
        raise ValueError(f"{stored} has values too large for {_PACKED}; use bfloat16 or float32")
    return out


def _not_finite(t: Tensor) -> int:
    """How many values are NaN or infinite. aminmax passes NaN on, and makes no mask of the tensor's size."""
    least, most = torch.aminmax(t)
    return 0 if torch.isfinite(least) and torch.isfinite(most) else int((~torch.isfinite(t)).sum())


def _bar(text: str, size: int) -> tqdm[Any]:
    return tqdm(total=size, desc=text, unit="B", unit_scale=True, disable=None)  # None: only on a terminal


def _stream(job: Job, size: int) -> Iterator[tuple[Entry, Tensor]]:
    with _bar("writing", size) as bar:
        for e in _entries(job):
            yield e, _read(job, e)
            bar.update(_bytes(e, job))


def _compare(job: Job, result: Reader, size: int) -> None:
    """Every tensor of the result against the source, bit for bit."""
    with _bar("reading back", size) as bar:
        for e in _entries(job):
            wrote = job.source.read(_source_entry(job, e)).to(_dtype(job, e))
            if isinstance(result, GGUF):
                same = result.holds(e, wrote, job.gguf_kind)
            else:
                same = same_bits(wrote, result.read(_source_entry(job, e)))
            if not same:
                raise ValueError(f"{e.name}: reading it back gives other bits than were written; is the disk failing?")
            del wrote
            bar.update(_bytes(e, job))


def _compare_config(job: Job, result: LlamaConfig) -> None:
    """The sizes as they come back. A head that happens to equal the embedding comes back from Meta's files as tied."""
    config = as_stored(job.config) if job.to == "gguf" else job.config
    if dataclasses.replace(result, tie_embeddings=config.tie_embeddings) != config:
        pairs = ((f.name, getattr(config, f.name), getattr(result, f.name)) for f in dataclasses.fields(result))
        name, was, comes = next(p for p in pairs if p[1] != p[2] and p[0] != "tie_embeddings")
        raise ValueError(f"--to {job.to}: that layout cannot say {name} {was} (it would be read as {comes})")


def _write_directory(job: Job, directory: Path, size: int) -> None:
    if job.to == "hf":
        _write_texts(job, directory, {})
        # A generator expression would hold on to a tensor while the next one is made.
        named = map(lambda pair: (pair[0].name, pair[1]), _stream(job, size))  # noqa: C417
        write_weights(directory, named, job.config, job.dtype, job.max_shard)
    else:
        _copy_prompting(directory, *_prompting(job))
        if job.tokenizer is not None:
            (directory / "tokenizer.model").write_bytes(job.tokenizer.model_bytes)
        write_meta(directory, _stream(job, size), job.config, job.shards)
        _copy_tokenizer(job, directory)


def _prompting(job: Job) -> tuple[ChatFormat | None, dict[str, Any]]:
    src = job.source.path
    return _chat_format(job.source), checkpoint.load_generation(src) if src.is_dir() else {}


def _write_texts(job: Job, directory: Path, extra: dict[str, Any]) -> None:
    """Every file of a Hugging Face directory but the weights; extra: further keys of config.json."""
    chat_format, generation = _prompting(job)
    ids = _LLAMA3_IDS if job.tokenizer is None and job.config.vocab_size == _LLAMA3_VOCABULARY else _ids(job)
    sampling = generation if job.source.kind == "hf" else generation or None  # None: ChatDoctor's
    texts = checkpoint.model_files(job.config, job.tokenizer, chat_format, sampling, job.dtype, ids | extra)
    for name, data in texts.items():
        (directory / name).write_bytes(data)
    _copy_tokenizer(job, directory)


def _copy_tokenizer(job: Job, directory: Path) -> None:
    """Where no SentencePiece model was found, what there is."""
    if job.tokenizer is None:
        for name in _TOKENIZER_FILES:
            if (job.source.path / name).is_file():
                (directory / name).write_bytes(files.read_bytes(job.source.path / name))


def _write_quantised(job: Job, scheme: Scheme, directory: Path, calibration: Path | None) -> None:
    """A Hugging Face directory of quantised weights."""

    _write_texts(job, directory, {"quantization_config": to_json(scheme)})
    count = sum(map(is_quantised, entries(job.config)))
    with tqdm(total=count, desc="rounding", unit=" weights", disable=None) as bar:
        where = (functools.partial(_read, job), job.config, scheme, lambda: bar.update())
        if calibration is None:
            stream = quantised_files.by_rounding(*where)
        else:
            chat_format = _chat_format(job.source) or ChatFormat()
            tokens = calibration_tokens(calibration, chat_format, _required(job.tokenizer))
            stream = quantised_files.by_calibration(*where, map(torch.tensor, tokens))
        quantised_files.write(directory, stream, job.config, scheme, job.max_shard)


def _chat_format(source: Source) -> ChatFormat | None:
    """The prompt format that the source states."""
    if isinstance(source, GGUF):
        return source.chat_format()
    return checkpoint.load_chat_format(source.path) if (source.path / "chat_format.json").exists() else None


def _stages(args: argparse.Namespace, source: Source) -> provenance.Stages:
    """Where the result comes from: the source's stages, and this conversion."""
    before = source.stages() if isinstance(source, GGUF) else provenance.stages_of(source.path)
    return provenance.converted(args.src, before, args.calibration)


def _copy_prompting(directory: Path, chat_format: ChatFormat | None, generation: dict[str, Any]) -> None:
    """Meta's layout has no place for these; kept beside it, they survive the way back."""
    if chat_format is not None:
        (directory / "chat_format.json").write_text(json.dumps(chat_format.to_json(), indent=2) + "\n")
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _ids(job: Job) -> dict[str, Any]:
    """BOS and EOS ids of a source whose tokenizer is not SentencePiece's, as its config.json or metadata says."""
    if job.tokenizer is not None or job.source.kind == "meta":
        return {}
    if isinstance(job.source, GGUF):
        return job.source.ids()
    stated = files.read_json(job.source.path / "config.json")
    return {k: stated[k] for k in ("bos_token_id", "eos_token_id") if isinstance(stated.get(k), (int, list))}


def _summarise(job: Job, dst: Path, size: int) -> None:
    c, s = job.config, job.source
    count = sum(1 for _ in _entries(job))
    kinds = sorted({DTYPES[s.dtype(e)] for e in entries(c)})
    wrote = _PACKED if job.packed else DTYPES[job.dtype]
    if job.scheme is not None:
        groups = f", a scale for each {job.scheme.group}" if job.scheme.group else ""
        wrote = f"int{job.scheme.bits}{groups} (embedding{'' if c.tie_embeddings else ', head'} and norms {wrote})"
    print(f"read     {s.label}, {'/'.join(kinds)}: {s.path}")
    print(
        f"model    {c.n_params():,} parameters: {c.n_layers} layers, dim {c.dim}, {c.n_heads} heads, {c.n_kv_heads} "
        f"key/value heads, mlp {c.ffn_dim}, vocabulary {c.vocab_size}, context {c.max_seq_len}"
        f"{', head tied to the embedding' if c.tie_embeddings else ''}"
    )
    if s.ignored:
        say = "says" if len(s.ignored) == 1 else "say"
        print(f"ignored  {len(s.ignored)} that {say} nothing new: {', '.join(s.ignored[:3])}")
    if job.tokenizer is None:
        kind = f" (its own is {s.tokenizer_kind()!r})" if isinstance(s, GGUF) else ""
        print(f"note     no SentencePiece tokenizer{kind}: generate.py cannot talk to this model")
    elif (rows := c.vocab_size - job.tokenizer.vocab_size) > 0:
        what = "1 row of the embedding is" if rows == 1 else f"{rows} rows of the embedding are"
        print(f"note     {what} beyond the tokenizer's {job.tokenizer.vocab_size} pieces; kept")
    name = {"hf": "Hugging Face", "meta": f"Meta, {job.shards} shard{'s' * (job.shards > 1)}", "gguf": "GGUF"}[job.to]
    print(f"wrote    {name}, {wrote}: {dst} ({_size(size)}, {count} tensors, all read back equal)")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # a stopped job cleans up as an interrupted one does
    sys.exit(main())
