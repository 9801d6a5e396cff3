"""convert_weights.py: every layout into every other, bit for bit; and one clear line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import convert_weights
from llama import checkpoint, torch_files
from llama.chat import ChatFormat
from llama.config import LlamaConfig, to_hf
from llama.layout import entries
from llama.meta_files import all_entries, write_meta
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = LlamaConfig(32, 2, 4, 2, 48, 64, max_seq_len=4096)


def weights_of(c: LlamaConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {e.name: torch.randn(e.shape, generator=generator).mul(0.3).to(dtype) for e in all_entries(c)}
    if c.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def save_meta(path: Path, c: LlamaConfig = CONFIG, shards: int = 2, dtype: torch.dtype = torch.float32) -> None:
    path.mkdir(parents=True)
    weights = weights_of(c, dtype)
    write_meta(path, ((e, weights[e.name]) for e in all_entries(c)), c, shards)


def save_hf(path: Path, c: LlamaConfig, tokenizer: Tokenizer | None, dtype: torch.dtype = torch.float32) -> None:
    weights = weights_of(c, dtype)
    checkpoint.save_model(path, [(e.name, weights[e.name]) for e in entries(c)], c, tokenizer, ChatFormat("dialogue"))


def convert(*argv: object) -> None:
    assert convert_weights.main([str(a) for a in argv]) == 0


def tensors_of(path: Path) -> list[dict[str, Tensor]]:
    """What each shard of a Meta directory holds, as torch itself reads it."""
    return [torch.load(p, weights_only=True) for p in sorted(path.glob("consolidated.*.pth"))]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


# --- round trips ----------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> tuple[LlamaConfig, int, torch.dtype]:
    """A model, a number of shards that it can be cut into, and a number type."""
    shards = draw(st.sampled_from((1, 2, 3, 4)))
    kv = shards * draw(st.integers(1, 2))
    heads = kv * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((2, 6, 8)))
    ffn = shards * draw(st.integers(1, 30))
    vocab = shards * draw(st.integers(3, 20))
    theta = draw(st.sampled_from((10000.0, 500000.0)))
    tied = draw(st.booleans())
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    layers = draw(st.integers(1, 2))
    c = LlamaConfig(heads * head_dim, layers, heads, kv, ffn, vocab, rope_theta=theta, tie_embeddings=tied)
    return c, shards, dtype


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models())
def test_any_model_survives_meta_to_hf_to_meta(tmp_path: Path, model: tuple[LlamaConfig, int, torch.dtype]) -> None:
    config, shards, dtype = model
    shutil.rmtree(tmp_path)
    save_meta(tmp_path / "a", config, shards, dtype)
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", "--to", "meta", "--shards", shards)
    for before, after in zip(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"), strict=True):
        assert same_bits(before, after)
    assert checkpoint.load_config(tmp_path / "b") == config
    params = [json.loads((tmp_path / d / "params.json").read_text()) for d in ("a", "c")]
    assert params[0] == params[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hf_survives_two_meta_shards(tmp_path: Path, tiny_config: LlamaConfig, dtype: torch.dtype) -> None:
    save_hf(tmp_path / "a", tiny_config, None, dtype)
    convert(tmp_path / "a", tmp_path / "b", "--to", "meta", "--shards", 2)
    convert(tmp_path / "b", tmp_path / "c", "--no-mmap")
    before, after = (tmp_path / d / "model.safetensors" for d in ("a", "c"))
    assert before.read_bytes() == after.read_bytes()
    assert checkpoint.load_config(tmp_path / "c") == tiny_config


def test_everything_that_belongs_to_a_model_comes_along(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer
) -> None:
    save_hf(tmp_path / "a", tiny_config, small_tokenizer)
    convert(tmp_path / "a", tmp_path / "b", "--to", "meta")
    convert(tmp_path / "b", tmp_path / "c")
    for path in (tmp_path / "b", tmp_path / "c"):
        assert (path / "tokenizer.model").read_bytes() == small_tokenizer.model_bytes
        assert checkpoint.load_chat_format(path) == ChatFormat("dialogue")
        assert checkpoint.load_generation(path) == checkpoint.load_generation(tmp_path / "a")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted([*names, "provenance.json"])
    for name in set(names) - {"manifest.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_files_are_cut_at_the_size_asked_for(tmp_path: Path) -> None:
    save_meta(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "--max_shard_size", "20KB")
    parts = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(parts) > 1
    weights = weights_of(CONFIG)
    stored = {k: v for p in parts for k, v in load_file(p).items()}
    assert all(torch.equal(stored[e.hf], weights[e.name]) for e in entries(CONFIG))
    convert(tmp_path / "b", tmp_path / "c", "--to", "meta", "--shards", 2)
    assert all(same_bits(x, y) for x, y in zip(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"), strict=True))


def test_number_types(tmp_path: Path) -> None:
    weights = weights_of(CONFIG, torch.bfloat16)
    weights["norm.weight"] = weights["norm.weight"].half()  # float32 is the narrowest that holds both exactly
    (tmp_path / "a").mkdir()
    write_meta(tmp_path / "a", ((e, weights[e.name]) for e in all_entries(CONFIG)), CONFIG, 1)
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "a", tmp_path / "c", "--dtype", "float16")
    for path, dtype in ((tmp_path / "b", torch.float32), (tmp_path / "c", torch.float16)):
        stored = load_file(path / "model.safetensors")
        assert all(torch.equal(stored[e.hf], weights[e.name].to(dtype)) for e in entries(CONFIG))
        assert {t.dtype for t in stored.values()} == {dtype}


# --- beside transformers --------------------------------------------------------------------------


def peer(c: LlamaConfig, seed: int = 0) -> Any:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(Config(**{k: v for k, v in to_hf(c).items() if k != "architectures"}))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded bin"])
def test_a_model_of_transformers_comes_in_and_goes_back(tmp_path: Path, small_tokenizer: Tokenizer, kind: str) -> None:
    from transformers import LlamaForCausalLM

    config = LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size + 1, max_seq_len=64)  # one row for [PAD]
    theirs = peer(config)
    theirs.save_pretrained(tmp_path / "a")
    (tmp_path / "a/tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    if kind != "safetensors":
        state = theirs.state_dict()
        (tmp_path / "a/model.safetensors").unlink()
        if kind == "bin":
            torch.save(state, tmp_path / "a/pytorch_model.bin")
        else:
            where = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(state)}
            for file in set(where.values()):
                torch.save({n: t for n, t in state.items() if where[n] == file}, tmp_path / "a" / file)
            (tmp_path / "a/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    convert(tmp_path / "a", tmp_path / "b", "--to", "meta", "--shards", 1)
    convert(tmp_path / "b", tmp_path / "c")
    tokens = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = theirs(tokens).logits
    assert (checkpoint.load_model(tmp_path / "c")(tokens) - wanted).abs().max() <= 1e-4
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "c")(tokens).logits, wanted)


@torch.no_grad()
def test_a_really_trained_model_through_meta_and_back(shared: Path, tmp_path: Path) -> None:
    """stories260K through two Meta shards still writes llama2.c's story."""
    convert(shared / "data/stories260K", tmp_path / "b", "--to", "meta", "--shards", 2)
    convert(tmp_path / "b", tmp_path / "c")
    ids = json.loads((shared / "data/stories260K/greedy_ids.json").read_text())["input_ids"]
    logits = checkpoint.load_model(tmp_path / "c")(torch.tensor([ids[:-1]]))
    assert logits[0].argmax(-1).tolist() == ids[1:]


def test_gguf_is_written_and_read_back(
    tmp_path: Path, tiny_config: LlamaConfig, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    save_hf(tmp_path / "a", tiny_config, small_tokenizer)
    convert(tmp_path / "a", tmp_path / "m.gguf", "--to", "gguf", "--dtype", "float16")
    assert len(gguf.GGUFReader(tmp_path / "m.gguf").tensors) == len(list(entries(tiny_config)))
    assert "GGUF, float16" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m.gguf"]


# --- tokenizers and rows --------------------------------------------------------------------------


def test_tokenizer_above_the_weights_and_rows_beyond_it(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA 1 came as tokenizer.model beside 7B/; ChatDoctor added one row to the embedding."""
    config = CONFIG.with_vocab(small_tokenizer.vocab_size + 1)
    save_meta(tmp_path / "llama/7B", config, 1)
    (tmp_path / "llama/tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    convert(tmp_path / "llama/7B", tmp_path / "b")
    assert "note     1 row of the embedding is beyond the tokenizer's 320 pieces; kept" in capsys.readouterr().out
    assert checkpoint.load_config(tmp_path / "b").vocab_size == 321
    assert checkpoint.load_tokenizer(tmp_path / "b").vocab_size == 320
    convert(tmp_path / "b", tmp_path / "c", "--to", "meta")
    assert same_bits(tensors_of(tmp_path / "llama/7B")[0], tensors_of(tmp_path / "c")[0])


def test_a_tiktoken_file_is_copied_and_said_to_be_unusable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_meta(tmp_path / "a", dataclasses.replace(CONFIG, rope_theta=500000.0, max_seq_len=8192))
    (tmp_path / "a/tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    convert(tmp_path / "a", tmp_path / "b")
    assert "no SentencePiece tokenizer" in capsys.readouterr().out
    assert (tmp_path / "b/tokenizer.model").read_bytes() == b"IQ== 0\nIg== 1\n"
    with pytest.raises(ValueError, match="tiktoken"):
        checkpoint.load_tokenizer(tmp_path / "b")


def test_summary_says_what_was_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_meta(tmp_path / "a", dtype=torch.bfloat16)
    for i in (0, 1):
        change(tmp_path / "a", i, {"rope.freqs": torch.ones(4)})
    convert(tmp_path / "a", tmp_path / "b")
    out, err = capsys.readouterr()
    assert "read     Meta, 2 shards, bfloat16" in out
    assert "2 layers, dim 32, 4 heads, 2 key/value heads, mlp 48, vocabulary 64, context 4096" in out
    assert "ignored  1 that says nothing new: rope.freqs" in out
    assert "wrote    Hugging Face, bfloat16" in out
    assert "all read back equal" in out
    assert err == ""


# --- what is wrong --------------------------------------------------------------------------------


class Evil:
    """Unpickles by running a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def change(path: Path, index: int, new: dict[str, Any]) -> None:
    file = path / f"consolidated.{index:02d}.pth"
    tensors = torch.load(file, weights_only=True) | new
    torch.save({k: v for k, v in tensors.items() if v is not None}, file)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as z:
        records = [(i.filename, z.read(i)) for i in z.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in records:
            z.writestr(name, data)


def nan_in(value: float) -> Callable[[Path], None]:
    w = torch.ones(32)
    w[7] = value
    return lambda src: [change(src, i, {"norm.weight": w}) for i in (0, 1)] and None


SHARD = "consolidated.01.pth"
WQ = "layers.0.attention.wq.weight"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in half": (lambda s: os.truncate(s / SHARD, (s / SHARD).stat().st_size // 2), f"{SHARD}: truncated"),
    "cut by one byte": (lambda s: os.truncate(s / SHARD, (s / SHARD).stat().st_size - 1), f"{SHARD}: .*damaged"),
    "empty": (lambda s: (s / SHARD).write_bytes(b""), f"{SHARD}: the file is empty"),
    "git lfs": (lambda s: (s / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "html": (lambda s: (s / SHARD).write_text("<!DOCTYPE html>\n<html>"), "HTML page"),
    "wrong shape": (lambda s: change(s, 1, {WQ: torch.ones(15, 32)}), f"{WQ} is 15x32; it must be 16x32"),
    "rows that would join": (lambda s: change(s, 1, {"output.weight": torch.ones(31, 32)}), "output.weight is 31x32"),
    "missing shard": (lambda s: (s / SHARD).unlink(), "looks like one of 2 shards"),
    "missing first shard": (lambda s: (s / "consolidated.00.pth").unlink(), "consolidated.00.pth: missing"),
    "missing tensor": (lambda s: change(s, 1, {WQ: None}), f"1 missing .'{WQ}'"),
    "extra tensor": (lambda s: change(s, 1, {"extra": torch.ones(1)}), "1 unknown .'extra'"),
    "extra tensor in all": (lambda s: [change(s, i, {"extra": torch.ones(1)}) for i in (0, 1)], "1 unknown .'extra'"),
    "NaN": (nan_in(math.nan), "norm.weight has 1 NaN or infinite"),
    "infinity": (nan_in(-math.inf), "norm.weight has 1 NaN or infinite"),
    "norms differ": (lambda s: change(s, 1, {"norm.weight": torch.ones(32)}), "norm.weight differs"),
    "compressed": (lambda s: compress(s / SHARD), "compressed"),
    "stride 0": (lambda s: change(s, 1, {WQ: torch.ones(1).expand(16, 32)}), "not contiguous"),
    "evil zip": (lambda s: torch.save({"a": Evil(s / "code-ran")}, s / SHARD), "could run code"),
    "evil raw": (lambda s: (s / SHARD).write_bytes(pickle.dumps(Evil(s / "code-ran"))), "bare pickle"),
    "params missing": (lambda s: (s / "params.json").unlink(), "params.json: missing"),
    "params nonsense": (lambda s: (s / "params.json").write_text('{"dim": "big"}'), "dim is 'big'"),
    "params of another": (
        lambda s: (s / "params.json").write_text('{"dim": 32, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-5}'),
        "missing",
    ),
    "params absurd": (
        lambda s: (s / "params.json").write_text('{"dim": 32, "n_layers": 999, "n_heads": 4, "norm_eps": 1e-5}'),
        "999 layers",
    ),
    "tokenizer html": (lambda s: (s / "tokenizer.model").write_text("<html>"), "tokenizer.model: .*HTML"),
    "nothing": (lambda s: [p.unlink() for p in s.iterdir()], "no model.safetensors, pytorch_model.bin or"),
}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a conversion that must fail: exit code 2, one line, and the folder as it was. The line."""
    before = sorted(p.name for p in folder.iterdir())
    capsys.readouterr()
    assert convert_weights.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(p.name for p in folder.iterdir()) == before, "something was left behind"
    return err


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_sources_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    damage, reason = HOSTILE[case]
    src = tmp_path / "src"
    save_meta(src)
    damage(src)
    for mode in ([], ["--no-mmap"]):
        line = refused(tmp_path, capsys, src, tmp_path / "dst", *mode)
        assert re.search(reason, line), line
    assert not (src / "code-ran").exists()


def test_destinations_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    save_meta(src)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for dst in (tmp_path / "there", tmp_path / "link"):
        assert "exists already" in refused(tmp_path, capsys, src, dst)
    for dst in (src, src / "inner", src / "a/b", tmp_path / "there/../src/inner"):
        assert "lies inside" in refused(tmp_path, capsys, src, dst)
    assert "*.gguf" in refused(tmp_path, capsys, src, tmp_path / "dst", "--to", "gguf")
    assert "*.gguf" in refused(tmp_path, capsys, src, tmp_path / "dst.gguf")
    (tmp_path / "file").touch()
    assert "error" in refused(tmp_path, capsys, src, tmp_path / "file/dst")


def test_sources_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "dst"
    assert "does not exist" in refused(tmp_path, capsys, tmp_path / "none", dst)
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path, capsys, tmp_path / "file", dst)
    save_meta(tmp_path / "llama/7B")
    assert f"did you mean {tmp_path / 'llama/7B'}" in refused(tmp_path, capsys, tmp_path / "llama", dst)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/.metadata").touch()
    assert "training state" in refused(tmp_path, capsys, tmp_path / "state", dst)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/model-00001-of-00002.safetensors").touch()
    assert "index.json: missing" in refused(tmp_path, capsys, tmp_path / "parts", dst)


def test_flags_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_meta(src)
    (tmp_path / "t.model").write_bytes(small_tokenizer.model_bytes)
    assert "cannot be cut into 3" in refused(tmp_path, capsys, src, dst, "--to", "meta", "--shards", 3)
    assert "key/value heads" in refused(tmp_path, capsys, src, dst, "--to", "meta", "--shards", 4)
    assert "at least 1" in refused(tmp_path, capsys, src, dst, "--to", "meta", "--shards", 0)
    assert "only --to meta" in refused(tmp_path, capsys, src, dst, "--shards", 2)
    assert "5GB" in refused(tmp_path, capsys, src, dst, "--max_shard_size", "big")
    assert "max_seq_len is 0" in refused(tmp_path, capsys, src, dst, "--max_seq_len", 0)
    assert "320 pieces" in refused(tmp_path, capsys, src, dst, "--tokenizer", tmp_path / "t.model")
    assert "cannot read" in refused(tmp_path, capsys, src, dst, "--tokenizer", tmp_path / "none")
    assert "give --tokenizer" in refused(tmp_path, capsys, src, tmp_path / "x.gguf", "--to", "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(tmp_path, capsys, src, tmp_path / "x.gguf", "--to", "gguf")
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([str(src), str(dst), "--to", "onnx"])
    assert stop.value.code == 2


def test_context_can_be_set(tmp_path: Path) -> None:
    save_meta(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", "--max_seq_len", 1000)
    assert checkpoint.load_config(tmp_path / "dst").max_seq_len == 1000
    convert(tmp_path / "dst", tmp_path / "back", "--to", "meta")
    assert json.loads((tmp_path / "back/params.json").read_text())["max_seq_len"] == 1000


def test_values_too_large_for_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    save_meta(src, shards=1)
    change(src, 0, {"norm.weight": torch.full((32,), 1e5)})
    assert "32 values too large for float16" in refused(tmp_path, capsys, src, tmp_path / "d", "--dtype", "float16")


def test_a_manifest_in_the_source_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path / "src", CONFIG, None)
    file = tmp_path / "src/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "differs from what was written" in refused(tmp_path, capsys, tmp_path / "src", tmp_path / "dst")


def test_a_layout_that_cannot_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = dataclasses.replace(CONFIG, head_dim=16)
    save_hf(tmp_path / "src", wide, None)
    assert "head_dim" in refused(tmp_path, capsys, tmp_path / "src", tmp_path / "dst", "--to", "meta")


# --- what goes wrong on the way -------------------------------------------------------------------


def test_free_space_is_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for argv in (["dst"], ["dst", "--to", "meta"]):
        assert "1,000 free" in refused(tmp_path, capsys, tmp_path / "src", tmp_path / argv[0], *argv[1:])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_half_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save_meta(tmp_path / "src")
    add, count = torch_files.TorchFileWriter.add, iter(range(1000))

    def failing(self: torch_files.TorchFileWriter, name: str, t: Tensor) -> None:
        if next(count) == 5:
            raise OSError(code, os.strerror(code))
        add(self, name, t)

    monkeypatch.setattr(torch_files.TorchFileWriter, "add", failing)
    line = refused(tmp_path, capsys, tmp_path / "src", tmp_path / "dst", "--to", "meta")
    assert ("disk is full" if code == errno.ENOSPC else "Input/output error") in line


def test_a_result_with_a_wrong_bit_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "src")
    write = convert_weights.write_weights

    def flipping(directory: Path, *rest: Any) -> None:
        write(directory, *rest)
        with open(directory / "model.safetensors", "r+b") as f:
            f.seek(-100, os.SEEK_END)
            byte = f.read(1)[0]
            f.seek(-100, os.SEEK_END)
            f.write(bytes([byte ^ 1]))

    monkeypatch.setattr(convert_weights, "write_weights", flipping)
    assert "other bits" in refused(tmp_path, capsys, tmp_path / "src", tmp_path / "dst")


def test_a_source_that_changes_is_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "src")
    compare = convert_weights._compare

    def touching(*args: Any) -> None:
        compare(*args)
        os.utime(tmp_path / "src/consolidated.01.pth", ns=(0, 0))

    monkeypatch.setattr(convert_weights, "_compare", touching)
    assert "changed while" in refused(tmp_path, capsys, tmp_path / "src", tmp_path / "dst")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_conversion_leaves_nothing_by_the_name(tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes while the result is being written; after SIGKILL the next run clears what was staged."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    save_meta(src, LlamaConfig(512, 4, 8, 8, 1536, 16000, max_seq_len=4096), 2)
    script = [sys.executable, str(ROOT / "convert_weights.py"), str(src), str(dst)]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any((p / "model.safetensors").exists() for p in tmp_path.glob(".dst.staged-*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not dst.exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        convert(src, dst)
        checkpoint.load_model(dst)
    else:
        assert (process.returncode, err) == (2, "error: interrupted; nothing was written\n")
    assert not list(tmp_path.glob(".*"))


def test_command_line(tmp_path: Path) -> None:
    """As a user types it: help in a moment, an error in one line."""
    script = str(ROOT / "convert_weights.py")
    done = subprocess.run([sys.executable, script, str(tmp_path / "none"), str(tmp_path / "dst")], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"error: {tmp_path / 'none'}: does not exist\n"
