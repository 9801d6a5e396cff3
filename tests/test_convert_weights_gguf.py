"""convert_weights.py and generate.py on GGUF files: there and back, every mistake one line, any damage survived."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert_weights
import generate
from llama import checkpoint, provenance
from llama.chat import ChatFormat
from llama.config import LlamaConfig, RopeScaling
from llama.gguf_files import GGUF
from llama.layout import entries
from llama.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
SCALING = RopeScaling("llama3", 8.0, original_max_seq_len=64)


def save(
    path: Path,
    c: LlamaConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float16,
    chat_format: ChatFormat | None = None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [(e.name, torch.randn(e.shape, generator=generator).mul(0.3).to(dtype)) for e in entries(c)]
    checkpoint.save_model(path, weights, c, tokenizer, chat_format)


def convert(*argv: object) -> None:
    assert convert_weights.main([str(a) for a in argv]) == 0


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """A conversion that must fail: exit code 2, one line, no DST. The line."""
    capsys.readouterr()
    assert convert_weights.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1), err
    assert not Path(str(argv[1])).exists()
    return err


@pytest.fixture
def source(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    """A model directory in fp16: grouped queries, a row beyond the tokenizer, rows of no whole blocks."""
    config = LlamaConfig(64, 2, 4, 2, 80, small_tokenizer.vocab_size + 1, rope_theta=500000.0, rope_scaling=SCALING)
    save(tmp_path / "hf", config, small_tokenizer)
    return tmp_path / "hf"


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_model_survives_gguf(tmp_path: Path, small_tokenizer: Tokenizer, dtype: str, tied: bool) -> None:
    """Every byte of the weights and every file beside them, in the number type they had."""
    config = LlamaConfig(64, 2, 4, 2, 80, small_tokenizer.vocab_size + 1, tie_embeddings=tied)
    save(tmp_path / "hf", config, small_tokenizer, getattr(torch, dtype))
    convert(tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf")
    convert(tmp_path / "x.gguf", tmp_path / "back")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "special_tokens_map.json"):  # fmt: skip
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    assert checkpoint.load_chat_format(tmp_path / "back") == ChatFormat()
    tokenizer = checkpoint.load_tokenizer(tmp_path / "back")
    assert tokenizer.encode("I have pain  in the \u00e9") == small_tokenizer.encode("I have pain  in the \u00e9")


def test_the_prompt_format_comes_along(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """For us, and as the template of llama.cpp's chat."""
    chat_format = ChatFormat("dialogue", "Be brief.")
    config = LlamaConfig(64, 2, 4, 2, 96, small_tokenizer.vocab_size)
    save(tmp_path / "hf", config, small_tokenizer, chat_format=chat_format)
    convert(tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf")
    convert(tmp_path / "x.gguf", tmp_path / "back")
    for path in (tmp_path / "x.gguf", tmp_path / "back"):
        assert checkpoint.load_chat_format(path) == chat_format
    said = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["chat_template"]
    assert GGUF(tmp_path / "x.gguf").values["tokenizer.chat_template"].decode() == said
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(data.replace(b'"version": 1, "name"', b'"version": 2, "name"'))
    assert "chatdoctor.chat_format is none; damaged" in refused(capsys, tmp_path / "y.gguf", tmp_path / "dst")


def test_where_it_comes_from_comes_along(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through two GGUF files and out of them, a stage for each conversion; the gguf package reads it as text."""
    first = provenance.stage({"name": "tiny"}, [{"name": "caf\u00e9.json", "sha256": "0", "licence": "CC BY"}])
    (source / "provenance.json").write_bytes(provenance.file_of([first])["provenance.json"])
    (source / "manifest.json").unlink()
    convert(source, tmp_path / "x.gguf", "--to", "gguf")
    convert(tmp_path / "x.gguf", tmp_path / "y.gguf", "--to", "gguf", "--dtype", "q8_0")
    convert(tmp_path / "y.gguf", tmp_path / "back")
    stages = provenance.stages_of(tmp_path / "back")
    assert stages[0] == first
    assert [s["base"]["name"] for s in stages[1:]] == [str(source), str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf")]
    assert stages[2]["base"]["files"] == [{"name": "x.gguf", "sha256": provenance.sha256_of(tmp_path / "x.gguf")}]
    assert checkpoint.load_stages(tmp_path / "y.gguf") == stages[:3]
    field = gguf.GGUFReader(tmp_path / "y.gguf").fields["chatdoctor.provenance"]
    assert json.loads(field.contents()) == {"version": 1, "stages": stages[:3]}

    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "z.gguf").write_bytes(data.replace(b'"version": 1, "stages"', b'"version": 2, "stages"'))
    said = "z.gguf: its chatdoctor.provenance is none of version 1; damaged"
    assert said in refused(capsys, tmp_path / "z.gguf", tmp_path / "dst")


def test_q8_0(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed once, it stays as it is: unpacked in fp32 and packed again gives the same bytes."""
    convert(source, tmp_path / "x.gguf", "--to", "gguf", "--dtype", "q8_0")
    out = capsys.readouterr().out
    assert "wrote    GGUF, q8_0" in out
    size = (tmp_path / "x.gguf").stat().st_size
    assert size < (source / "model.safetensors").stat().st_size * 0.8
    convert(tmp_path / "x.gguf", tmp_path / "back")
    assert "read     GGUF F16/F32/Q8_0, float16" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "back/model.safetensors").values()} == {torch.float16}
    assert checkpoint.load_config(tmp_path / "back") == checkpoint.load_config(source)
    convert(tmp_path / "x.gguf", tmp_path / "whole", "--dtype", "float32")
    convert(tmp_path / "whole", tmp_path / "again.gguf", "--to", "gguf", "--dtype", "q8_0")
    convert(tmp_path / "x.gguf", tmp_path / "direct.gguf", "--to", "gguf", "--dtype", "q8_0")
    first, *others = (GGUF(tmp_path / f"{n}.gguf") for n in ("x", "again", "direct"))
    for other in others:
        assert all(torch.equal(first.read(e), other.read(e)) for e in entries(first.config))


def test_gguf_to_meta(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    save(tmp_path / "hf", LlamaConfig(64, 2, 4, 2, 96, small_tokenizer.vocab_size), small_tokenizer)
    convert(tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf")
    convert(tmp_path / "x.gguf", tmp_path / "meta", "--to", "meta", "--shards", 2)
    convert(tmp_path / "meta", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_another_tokenizer_keeps_the_weights(
    tmp_path: Path, source: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Llama 3's BPE: said, not read; BOS and EOS ids come along; --tokenizer gives one."""
    convert(source, tmp_path / "x.gguf", "--to", "gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    kind = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5)
    (tmp_path / "bpe.gguf").write_bytes(data.replace(kind + b"llama", kind + b"gpt-2"))
    capsys.readouterr()
    convert(tmp_path / "bpe.gguf", tmp_path / "bpe")
    assert "no SentencePiece tokenizer (its own is 'gpt-2'): generate.py cannot" in capsys.readouterr().out
    assert (tmp_path / "bpe/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (tmp_path / "bpe/tokenizer.model").exists()
    document = json.loads((tmp_path / "bpe/config.json").read_text())
    assert (document["bos_token_id"], document["eos_token_id"]) == (1, 2)
    (tmp_path / "t.model").write_bytes(small_tokenizer.model_bytes)
    convert(tmp_path / "bpe.gguf", tmp_path / "spm", "--tokenizer", tmp_path / "t.model")
    assert checkpoint.load_tokenizer(tmp_path / "spm").sha256 == small_tokenizer.sha256
    assert generate.main(["--checkpoint", str(tmp_path / "bpe.gguf"), "--prompt", "fever"]) == 2
    assert "its tokenizer is 'gpt-2'; only SentencePiece's" in capsys.readouterr().err


@torch.no_grad()
def test_a_gguf_file_answers_without_conversion(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "x.gguf", "--to", "gguf", "--dtype", "q8_0")
    convert(tmp_path / "x.gguf", tmp_path / "back")
    assert checkpoint.stored_dtype(tmp_path / "x.gguf") == torch.float16
    model, wanted = (checkpoint.load_model(p) for p in (tmp_path / "x.gguf", tmp_path / "back"))
    for (name, a), (_, b) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float16
        assert torch.equal(a, b), name
    answers = []
    for path in (tmp_path / "x.gguf", tmp_path / "back"):
        capsys.readouterr()
        flags = ["--prompt", "I have pain", "--max_new_tokens", "8", "--json", "--seed", "1", "--dtype", "float32"]
        assert generate.main(["--checkpoint", str(path), *flags]) == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1]


# --- what is wrong --------------------------------------------------------------------------------


def test_what_cannot_be(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "x.gguf", "--to", "gguf")
    data, dst = (tmp_path / "x.gguf").read_bytes(), tmp_path / "dst"
    assert "only --to gguf has it" in refused(capsys, source, dst, "--dtype", "q8_0")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/y.gguf").write_bytes(data)
    assert f"did you mean {tmp_path / 'dir/y.gguf'}" in refused(capsys, tmp_path / "dir", dst)
    (tmp_path / "text.gguf").write_bytes(b"<!DOCTYPE html>")
    assert "no GGUF" in refused(capsys, tmp_path / "text.gguf", dst)
    (tmp_path / "cut.gguf").write_bytes(data[:-7000])
    assert "truncated or damaged; fetch it again" in refused(capsys, tmp_path / "cut.gguf", dst)
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(data)
    assert "llama-gguf-split --merge" in refused(capsys, tmp_path / "x-00001-of-00002.gguf", dst)
    (tmp_path / "broken.gguf").write_bytes(data.replace(b"<0x41>", b"<0xZZ>"))
    assert "give the original with --tokenizer" in refused(capsys, tmp_path / "broken.gguf", dst)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(capsys, tmp_path / "x.gguf", dst)
    assert generate.main(["--checkpoint", str(tmp_path / "x.gguf"), "--prompt", "fever"]) == 2
    assert "pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_values_that_are_none(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    """A packed block whose scale is infinite or no number is as bad as such a value."""
    convert(source, tmp_path / "x.gguf", "--to", "gguf", "--dtype", dtype)
    stored = GGUF(tmp_path / "x.gguf")._stored["blk.1.attn_v.weight"]
    for half in (b"\x00\x7c", b"\x01\x7e"):
        with open(tmp_path / "x.gguf", "r+b") as f:
            f.seek(stored.offset)
            f.write(half)
        assert "blk.1.attn_v.weight has " in refused(capsys, tmp_path / "x.gguf", tmp_path / "dst")


def test_values_too_large_for_q8_0(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their scale is fp16: 127 * 65,504 is the largest."""
    config = LlamaConfig(64, 1, 4, 2, 96, small_tokenizer.vocab_size)
    weights = {e.name: torch.ones(e.shape) for e in entries(config)}
    weights["layers.0.mlp.up.weight"][5, 5] = 1e7
    checkpoint.save_model(tmp_path / "hf", weights.items(), config, small_tokenizer, None)
    flags = "--to", "gguf", "--dtype", "q8_0"
    assert "too large for q8_0" in refused(capsys, tmp_path / "hf", tmp_path / "x.gguf", *flags)


def test_a_wrong_bit_in_the_result_is_found(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = convert_weights.write_gguf

    def flipping(path: Path, *rest: object) -> None:
        write(path, *rest)  # type: ignore[arg-type]
        with open(path, "r+b") as f:
            f.seek(-200, os.SEEK_END)
            byte = f.read(1)[0]
            f.seek(-200, os.SEEK_END)
            f.write(bytes([byte ^ 1]))

    monkeypatch.setattr(convert_weights, "write_gguf", flipping)
    flags = "--to", "gguf", "--dtype", "q8_0"
    assert "other bits" in refused(capsys, source, tmp_path / "x.gguf", *flags)


def test_any_damage_is_survived(tmp_path: Path, small_tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    """400 files, bytes changed, numbers replaced, pieces cut out or doubled: a model, or one line and exit code 2."""
    config = LlamaConfig(32, 1, 2, 1, 32, small_tokenizer.vocab_size, rope_scaling=SCALING)
    save(tmp_path / "hf", config, small_tokenizer)
    convert(tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf", "--dtype", "q8_0")
    data = (tmp_path / "x.gguf").read_bytes()
    tensors = GGUF(tmp_path / "x.gguf")._stored.values()
    header = min(p.offset for p in tensors)
    random_ = random.Random(0)
    path, survived = tmp_path / "y.gguf", 0
    edges = [0, 1, 31, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 62, (1 << 64) - 1]
    for i in range(400):
        bad = bytearray(data)
        at = random_.randrange(4, header if i % 8 else len(data))
        kind = i % 5
        if kind == 0:
            bad[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            bad[at : at + 8] = struct.pack("<Q", random_.choice(edges))
        elif kind == 2:
            bad[at : at + 4] = random_.randbytes(4)
        elif kind == 3:
            del bad[at : at + random_.randrange(1, 64)]
        else:
            bad[at:at] = bad[at : at + random_.randrange(1, 64)]
        path.write_bytes(bad)
        capfd.readouterr()
        code = convert_weights.main([str(path), str(tmp_path / f"out{i}")])
        out, err = capfd.readouterr()
        assert (code, err) == (0, "") or (
            code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        )
        assert (tmp_path / f"out{i}").exists() == (code == 0)
        survived += code == 0
    assert 20 < survived < 300
