"""Model directories: round trips, transformers on both sides, and every kind of broken input."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import checkpoint, files
from llama.chat import ChatFormat
from llama.checkpoint import load_config, load_model, load_tokenizer, load_weights, save_model
from llama.config import LlamaConfig, RopeScaling, to_hf
from llama.files import MANIFEST
from llama.layout import entries
from llama.model import Llama
from llama.tokenizer import Tokenizer
from llama.weights import INDEX


def made(config: LlamaConfig, seed: int = 0) -> Llama:
    model = Llama(config)
    model.init_weights(seed)
    return model


def same(a: Llama, b: Llama) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.fixture
def saved(tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer) -> Path:
    """A small model as save_model writes it."""
    save_model(tmp_path / "m", made(tiny_config).named_parameters(), tiny_config, small_tokenizer, ChatFormat("plain"))
    return tmp_path / "m"


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard", [10**9, 9000], ids=["one", "sharded"])
def test_round_trip_is_bit_exact(
    tmp_path: Path,
    tiny_config: LlamaConfig,
    small_tokenizer: Tokenizer,
    tied: bool,
    dtype: torch.dtype,
    shard: int,
) -> None:
    config = dataclasses.replace(tiny_config, tie_embeddings=tied, rope_scaling=RopeScaling("llama3", 8.0))
    model = made(config).to(dtype)
    save_model(
        tmp_path / "m", model.named_parameters(), config, small_tokenizer, ChatFormat("dialogue", "Hi"),
        max_shard_bytes=shard, generation={"temperature": 0.7, "top_p": 0.9},
    )  # fmt: skip
    assert same(load_model(tmp_path / "m"), model)
    assert load_config(tmp_path / "m") == config
    assert load_tokenizer(tmp_path / "m").model_bytes == small_tokenizer.model_bytes
    assert checkpoint.load_chat_format(tmp_path / "m") == ChatFormat("dialogue", "Hi")
    assert checkpoint.load_generation(tmp_path / "m") == {"temperature": 0.7, "top_p": 0.9}
    assert load_model(tmp_path / "m", dtype=torch.float32).norm.weight.dtype == torch.float32


def test_shards_stay_below_the_limit_and_the_safetensors_package_reads_them(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    model = made(tiny_config)
    save_model(tmp_path, model.named_parameters(), tiny_config, small_tokenizer, ChatFormat(), max_shard_bytes=50_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    read = {name: (tensor, p) for p in shards for name, tensor in load_file(p).items()}
    assert index["weight_map"] == {name: p.name for name, (_, p) in read.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t, _ in read.values()) == tiny_config.n_params() * 4
    assert all(sum(t.nbytes for t, q in read.values() if q == p) <= 50_000 for p in shards)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(read[e.hf][0], parameters[e.name]) for e in entries(tiny_config))
    for p in shards:
        head = p.read_bytes()
        (length,) = struct.unpack("<Q", head[:8])
        assert length % 8 == 0
        assert json.loads(head[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_strided_and_sliced_tensors_are_written_as_they_look(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    tensors = {n: torch.randn(*p.shape[::-1], 2)[..., 1].t() for n, p in made(tiny_config).named_parameters()}
    save_model(tmp_path, tensors.items(), tiny_config, small_tokenizer, ChatFormat())
    assert all(torch.equal(p, tensors[n]) for n, p in load_model(tmp_path).named_parameters())


def test_saving_holds_one_tensor_at_a_time(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """Peak of tensor memory while a stream of 4 MB tensors is saved: the one at hand, its chunk, its cast."""
    config = LlamaConfig(512, 8, 8, 8, 2048, small_tokenizer.vocab_size)
    alive, peak = [0], [0]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for e in entries(config):
            tensor = torch.zeros(e.shape)
            storage = tensor.untyped_storage()
            alive[0] += storage.nbytes()
            peak[0] = max(peak[0], alive[0])
            weakref.finalize(storage, lambda n: alive.__setitem__(0, alive[0] - n), storage.nbytes())
            del storage
            yield e.name, tensor
            del tensor

    tracemalloc.start()
    save_model(tmp_path, stream(), config, None, ChatFormat(), dtype=torch.bfloat16)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak[0] <= 2 * 512 * 2048 * 4
    assert python_peak < 8_000_000


def test_a_saved_model_replaces_its_own_predecessor_only(
    tmp_path: Path, saved: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    (saved / "metrics.jsonl").write_text("{}")
    newer = made(tiny_config, seed=1)
    save_model(saved, newer.named_parameters(), tiny_config, small_tokenizer, ChatFormat(), max_shard_bytes=30_000)
    assert same(load_model(saved), newer)
    assert (saved / "metrics.jsonl").exists()
    assert not (saved / "model.safetensors").exists()
    (saved / MANIFEST).unlink()
    with pytest.raises(ValueError, match="was not written here; choose another directory"):
        save_model(saved, newer.named_parameters(), tiny_config, small_tokenizer, ChatFormat())
    assert same(load_model(saved), newer)


# --- what is not saved ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, r"layers.1.mlp.up.weight has NaN or infinite values"),
        (float("-inf"), torch.bfloat16, r"layers.1.mlp.up.weight has NaN or infinite values"),
        (1e6, torch.float16, r"layers.1.mlp.up.weight has values too large for torch.float16"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path,
    tiny_config: LlamaConfig,
    small_tokenizer: Tokenizer,
    value: float,
    dtype: torch.dtype | None,
    message: str,
) -> None:
    model = made(tiny_config)
    with torch.no_grad():
        model.layers[1].mlp.up.weight[3, 4] = value
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "m", model.named_parameters(), tiny_config, small_tokenizer, ChatFormat(), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_not_the_model_is_refused(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    good = [(n, p.detach()) for n, p in made(tiny_config).named_parameters()]
    for stream, message in (
        ([], "no tensors"),
        (good[1:], "expected embed.weight, got layers.0.attn_norm.weight"),
        (good[:-1], "expected head.weight, got nothing"),
        ([*good, ("more", torch.ones(1))], "more is not part of this model"),
        ([(n, p[:-1]) for n, p in good], "embed.weight is 319 x 32, but the config makes it 320 x 32"),
        ([(n, p.to(torch.int32)) for n, p in good], "cannot save as torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(tmp_path / "m", stream, tiny_config, small_tokenizer, ChatFormat())
    with pytest.raises(ValueError, match="the tokenizer has 320 pieces, the model 319 rows"):
        save_model(tmp_path / "m", good, tiny_config.with_vocab(319), small_tokenizer, ChatFormat())
    assert list(tmp_path.iterdir()) == []


# --- transformers on the other side ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_we_write_opens_in_transformers(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config, tie_embeddings=tied, norm_eps=1e-6, rope_theta=500000.0)
    model = made(config)
    save_model(tmp_path, model.named_parameters(), config, small_tokenizer, ChatFormat(), max_shard_bytes=50_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    wanted = {"temperature": 0.5, "top_k": 50, "repetition_penalty": 1.1, "max_new_tokens": 200, "do_sample": True}
    stated = theirs.generation_config.to_dict()
    assert wanted.items() <= stated.items()
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (small_tokenizer.bos_id, small_tokenizer.eos_id)
    assert theirs.config.eos_token_id == small_tokenizer.eos_id


@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["one", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_transformers_writes_opens_here(
    tmp_path: Path, tiny_config: LlamaConfig, shard: str, tied: bool, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config, tie_embeddings=tied)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(config))).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard != "5GB")
    model = load_model(tmp_path)
    assert model.embed.weight.dtype == dtype
    assert model.config == config
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert (theirs(tokens).logits - model(tokens)).abs().max() < tolerance
    assert checkpoint.load_chat_format(tmp_path) == ChatFormat()


def test_a_trained_foreign_model_gives_its_recorded_logits(shared: Path) -> None:
    import numpy as np

    folder = shared / "data/stories260K"
    model = load_model(folder)
    ids = torch.tensor(json.loads((folder / "greedy_ids.json").read_text())["input_ids"])
    golden = torch.from_numpy(np.load(folder / "greedy_logits.npy"))
    with torch.no_grad():
        logits = model(ids[None, : len(golden)])[0]
    assert (logits - golden).abs().max() < 1e-4
    with pytest.raises(ValueError, match="only SentencePiece models"):
        load_tokenizer(folder)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a saved model, and forget its manifest."""
    (path / MANIFEST).unlink(missing_ok=True)
    tensors = change(load_file(path / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")


def test_redundant_tensors_are_ignored(saved: Path) -> None:
    model = load_model(saved)
    rewrite(saved, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float16)})
    assert same(load_model(saved), model)
    document = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(document | {"tie_word_embeddings": True}))
    tied = load_model(saved)
    assert not hasattr(tied, "head")
    assert torch.equal(tied.embed.weight, model.embed.weight)


def test_mixed_dtypes_open_in_the_narrowest_that_holds_all(saved: Path) -> None:
    rewrite(saved, lambda t: {k: v.to(torch.bfloat16) if "mlp" in k else v.to(torch.float16) for k, v in t.items()})
    model = load_model(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.layers[0].mlp.up.weight, load_file(saved / "model.safetensors")[
        "model.layers.0.mlp.up_proj.weight"].float())  # fmt: skip


def test_an_embedding_with_a_pad_row_keeps_it(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    """ChatDoctor added a [PAD] row: 32,001 rows, 32,000 pieces."""
    config = tiny_config.with_vocab(small_tokenizer.vocab_size + 1)
    model = made(config)
    save_model(tmp_path / "m", model.named_parameters(), config, small_tokenizer, ChatFormat())
    assert same(load_model(tmp_path / "m"), model)
    assert load_tokenizer(tmp_path / "m").vocab_size == config.vocab_size - 1


def test_an_embedding_with_too_few_rows_is_refused(saved: Path) -> None:
    rewrite(saved, lambda t: {k: v[:300] if v.shape[0] == 320 else v for k, v in t.items()})
    document = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(document | {"vocab_size": 300}))
    load_model(saved)
    with pytest.raises(ValueError, match=r"tokenizer.model: 320 pieces, but the embedding has 300 rows"):
        load_tokenizer(saved)


# --- into an existing model -----------------------------------------------------------------------


def test_weights_load_into_a_model_of_another_dtype_or_on_meta(saved: Path, tiny_config: LlamaConfig) -> None:
    stored = load_model(saved)
    model = Llama(tiny_config).to(torch.bfloat16)
    load_weights(model, saved)
    assert same(model, load_model(saved, dtype=torch.bfloat16))
    with torch.device("meta"):
        model = Llama(tiny_config)
    load_weights(model, saved)
    assert same(model, stored)
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_weights(Llama(dataclasses.replace(tiny_config, n_layers=1)), saved)


def test_loading_imports_none_of_torchs_slow_modules(saved: Path) -> None:
    """They cost a second, in a program that answers in one and a half."""
    code = (
        "import sys, torch; before = set(sys.modules); from llama.checkpoint import load_model, load_tokenizer; "
        f"load_model({str(saved)!r}), load_tokenizer({str(saved)!r}); "
        "slow = {'sympy', 'torch._dynamo', 'torch.distributed.checkpoint', 'torch.distributed.tensor'}; "
        "print(sorted(slow & (set(sys.modules) - before)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_loaded_weights_outlive_the_file(saved: Path) -> None:
    model, again = load_model(saved), load_model(saved)
    with open(saved / "model.safetensors", "r+b") as f:
        f.truncate(0)  # a mapped page of it would now kill the process
    assert same(model, again)


# --- broken input ---------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_and_its_file_named(saved: Path) -> None:
    rng, names = random.Random(0), sorted(p.name for p in saved.iterdir() if p.name != MANIFEST)
    for trial in range(120):
        file = saved / names[trial % len(names)]
        data = bytearray(file.read_bytes())
        where, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        with open(file, "r+b") as f:
            f.seek(where)
            f.write(bytes([data[where] ^ bit]))
        with pytest.raises(ValueError, match=str(file)):
            load_model(saved)
        with open(file, "r+b") as f:
            f.seek(where)
            f.write(bytes([data[where]]))
    load_model(saved)


BROKEN = {
    "empty": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML page"),
    "pickle": (b"PK\x03\x04" + b"\0" * 100, "PyTorch pickle"),
    "huge header": (b"\xff" * 7 + b"\x7f" + b"{}", "truncated or damaged"),
    "not json": (struct.pack("<Q", 8) + b"notjson!", "truncated or damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_safetensors_says_what_it_is(saved: Path, kind: str) -> None:
    data, message = BROKEN[kind]
    (saved / MANIFEST).unlink()
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"model.safetensors: not a whole safetensors file \(.*{message}"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01, 0.0001])
def test_a_truncated_file_is_refused_without_a_manifest_too(saved: Path, keep: float) -> None:
    (saved / MANIFEST).unlink()
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "norm" not in k}, r"missing: .*input_layernorm.weight"),
        (lambda t: t | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, r"unexpected: model.layers.9.mlp.up_proj"),
        (lambda t: t | {"model.norm.weight": torch.ones(33)}, r"model.norm.weight is 33, but config.json makes it 32"),
        (lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, r"is I8; only F32, F16, BF16"),
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, r"missing: lm_head.weight"),
        (lambda t: {f"q.{k}": v for k, v in t.items()}, r"missing: .* and 15 more; unexpected: .* and 15 more"),
    ],
)
def test_names_and_shapes_are_strict(
    saved: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_an_index_must_name_files_that_are_there(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    save_model(tmp_path, made(tiny_config).named_parameters(), tiny_config, small_tokenizer, ChatFormat(),
               max_shard_bytes=50_000)  # fmt: skip
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / MANIFEST).unlink()
    for weight_map in (None, {}, {"a": "../../etc/passwd"}, {"a": 3}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="weight_map must name files of this directory"):
            load_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    shards = sorted(tmp_path.glob("*.safetensors"))
    twice = load_file(shards[0])
    save_file(load_file(shards[1]) | twice, shards[1])
    with pytest.raises(ValueError, match=rf"{shards[1].name}: holds .*, which {shards[0].name} holds as well"):
        load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name}: missing, though {INDEX} lists it"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model-00001-of-00002.bin", r"only PyTorch pickles .*; run: python convert_weights.py"),
        ("consolidated.00.pth", r"only Meta's files .*; run: python convert_weights.py"),
        ("model.gguf", r"only GGUF .*; run: python convert_weights.py .*model.gguf OUT"),
        ("model-00001-of-00002.safetensors", "safetensors files without model.safetensors.index.json"),
        ("README.md", "this is not a model directory"),
    ],
)
def test_a_directory_of_another_layout_says_what_to_do(
    tmp_path: Path, tiny_config: LlamaConfig, file: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny_config)))
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_wrong_paths_say_what_is_there(tmp_path: Path, tiny_config: LlamaConfig) -> None:
    with pytest.raises(ValueError, match=r"meta-llama/Llama-2-7b-hf: does not exist; .*not downloaded by name"):
        load_model("meta-llama/Llama-2-7b-hf")
    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(ValueError, match=r"no config.json.*open one of its training checkpoints: .*checkpoint-20"):
        load_model(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Meta's layout.*convert_weights.py"):
        load_model(tmp_path)
    (tmp_path / "params.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny_config) | {"model_type": "mistral"}))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: model_type is 'mistral'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"only tokenizer.json; only SentencePiece models .*Llama 3 has none"):
        load_tokenizer(tmp_path)
    for name in ("chat_format.json", "generation_config.json"):
        (tmp_path / name).write_text('{"version": 9, "temperature": "hot"}')
    with pytest.raises(ValueError, match=rf"{tmp_path}/chat_format.json: version 9"):
        checkpoint.load_chat_format(tmp_path)
    with pytest.raises(ValueError, match=r"generation_config.json: temperature is 'hot'; it must be a number"):
        checkpoint.load_generation(tmp_path)


def test_a_full_disk_leaves_the_earlier_model(
    small_disk: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tiny_config)
    save_model(small_disk / "m", model.named_parameters(), tiny_config, small_tokenizer, ChatFormat())
    big = LlamaConfig(512, 4, 8, 8, 2048, small_tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r"m: needs [\d,]+ bytes, but .* has [\d,]+ free; nothing was written"):
        save_model(small_disk / "m", made(big).named_parameters(), big, small_tokenizer, ChatFormat())
    monkeypatch.setattr(files, "need_space", lambda *_: None)  # as when another program fills the disk meanwhile
    with pytest.raises(ValueError, match=r"m: the disk is full; .*what was there before is unchanged"):
        save_model(small_disk / "m", made(big).named_parameters(), big, small_tokenizer, ChatFormat())
    assert same(load_model(small_disk / "m"), model)
    assert not list((small_disk / "m").glob(".*"))


def test_a_gguf_file_is_opened_once_until_it_changes(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from llama import gguf_files

    read: list[Path] = []
    right = gguf_files.read_header
    monkeypatch.setattr(gguf_files, "read_header", lambda path: read.append(path) or right(path))
    path = tmp_path / "m.gguf"

    def written(c: LlamaConfig) -> None:
        weights = dict(made(c).named_parameters())
        tensors = ((e, weights[e.name].detach()) for e in entries(c))
        gguf_files.write_gguf(path, tensors, c, small_tokenizer, "F32", "test", ChatFormat("plain"))

    written(tiny_config)
    for _ in range(2):
        assert load_config(path) == tiny_config
        assert load_model(path).config == tiny_config
        assert load_tokenizer(path).vocab_size == small_tokenizer.vocab_size
        assert checkpoint.load_chat_format(path) == ChatFormat("plain")
        assert checkpoint.stored_dtype(path) == torch.float32
    assert read == [path]
    deeper = dataclasses.replace(tiny_config, n_layers=tiny_config.n_layers + 1)
    written(deeper)
    assert load_model(path).config == deeper
    assert read == [path, path]
    path.write_bytes(b"GGUF" + bytes(60))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"m\.gguf"):
            load_config(path)
