"""llama/quantised_files.py by way of convert_weights.py: any layout to int8 and int4, rounded or calibrated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import convert_weights
from llama import checkpoint, quantised_files
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.layout import entries
from llama.meta_files import all_entries, write_meta
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme, nearest
from llama.tokenizer import Tokenizer
from llama.weights import Weights

CONFIG = LlamaConfig(64, 2, 4, 2, 96, 330, max_seq_len=128, tie_embeddings=True)


def random_model(config: LlamaConfig = CONFIG) -> Llama:
    model = Llama(config)
    model.init_weights(0)
    return model.eval()


def save(path: Path, tokenizer: Tokenizer | None, config: LlamaConfig = CONFIG) -> Llama:
    model = random_model(config)
    tensors = model.state_dict()
    stored = ((e.name, tensors[e.name]) for e in entries(config))
    checkpoint.save_model(path, stored, config, tokenizer, ChatFormat("dialogue", ""))
    return model


def convert(*argv: object) -> None:
    assert convert_weights.main([str(a) for a in argv]) == 0


def dialogues(path: Path, n: int = 20) -> Path:
    lines = [
        {
            "instruction": "Answer.",
            "input": f"I have a fever for {i} days and a cough.",
            "output": "Rest, and drink water.",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("dtype", "scheme"), [("int8", Scheme(8, 0)), ("int4", Scheme(4, 32))])
def test_rounding_is_that_of_each_weight(
    tmp_path: Path, small_tokenizer: Tokenizer, dtype: str, scheme: Scheme, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "a", small_tokenizer)
    convert(tmp_path / "a", tmp_path / "b", "--dtype", dtype)
    assert f"Hugging Face, {dtype}" in capsys.readouterr().out
    made = checkpoint.load_model(tmp_path / "b")
    for name, m in made.named_modules():
        if isinstance(m, QuantisedLinear):
            wanted = nearest(model.get_submodule(name).weight, scheme)
            assert torch.equal(m.codes, wanted.codes)
            assert torch.equal(m.scales, wanted.scales)
    assert torch.equal(made.embed.weight, model.embed.weight.bfloat16())
    assert checkpoint.load_chat_format(tmp_path / "b") == ChatFormat("dialogue", "")
    assert checkpoint.load_tokenizer(tmp_path / "b").model_bytes == small_tokenizer.model_bytes


def test_meta_shards_are_quantised_alike(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    model = save(tmp_path / "a", small_tokenizer)
    (tmp_path / "m").mkdir()
    tensors = model.state_dict() | {"head.weight": model.embed.weight}
    write_meta(tmp_path / "m", ((e, tensors[e.name]) for e in all_entries(CONFIG)), CONFIG, 2)
    for name in "am":
        convert(tmp_path / name, tmp_path / f"{name}4", "--dtype", "int4", "--max_seq_len", 128)
    a, m = checkpoint.load_model(tmp_path / "a4").state_dict(), checkpoint.load_model(tmp_path / "m4").state_dict()
    assert a.keys() == m.keys()
    assert all(torch.equal(a[k], m[k]) for k in a)


@torch.no_grad()
def test_calibrated_weights_lose_less_on_such_dialogues(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    model = save(tmp_path / "a", small_tokenizer)
    file = dialogues(tmp_path / "d.jsonl")
    convert(tmp_path / "a", tmp_path / "near", "--dtype", "int4")
    convert(tmp_path / "a", tmp_path / "fit", "--dtype", "int4", "--calibration", file)
    tokens = torch.tensor([[1, *small_tokenizer.encode("I have a fever for 30 days and a cough. Rest, and drink.")]])
    exact = model(tokens)
    errors = [
        (checkpoint.load_model(tmp_path / name, dtype=torch.float32)(tokens) - exact).square().mean().item()
        for name in ("near", "fit")
    ]
    assert errors[1] < 0.7 * errors[0]


def test_big_models_are_cut_into_files(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    save(tmp_path / "a", small_tokenizer)
    convert(tmp_path / "a", tmp_path / "b", "--dtype", "int8", "--max_shard_size", "50KB")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "a", tmp_path / "c", "--dtype", "int8")
    b, c = (checkpoint.load_model(tmp_path / name).state_dict() for name in "bc")
    assert all(torch.equal(b[k], c[k]) for k in c)


def test_group_size_is_the_largest_that_fits_or_as_asked(tmp_path: Path) -> None:
    wide = LlamaConfig(128, 1, 4, 4, 256, 100, max_seq_len=64)
    for config, flags, group in ((wide, (), 64), (wide, ("--group_size", 128), 128), (CONFIG, (), 32)):
        name = f"{config.dim}-{group}"
        save(tmp_path / name, None, config)
        convert(tmp_path / name, tmp_path / f"{name}-4", "--dtype", "int4", *flags)
        assert checkpoint.load_scheme(tmp_path / f"{name}-4") == Scheme(4, group)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    before = sorted(p.name for p in folder.iterdir())
    capsys.readouterr()
    assert convert_weights.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == before
    return err


def test_what_cannot_be_asked_for(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", small_tokenizer)
    save(tmp_path / "odd", small_tokenizer, LlamaConfig(48, 1, 4, 4, 96, 330, max_seq_len=64))
    save(tmp_path / "none", None)
    (tmp_path / "empty.jsonl").touch()
    a, b, odd = tmp_path / "a", tmp_path / "b", tmp_path / "odd"
    no = (tmp_path, capsys)
    int4 = ("--dtype", "int4")
    assert "rows of 48 are no whole groups of 32; use --dtype int8" in refused(*no, odd, b, *int4)
    assert "no whole groups of 128; use --group_size" in refused(*no, a, b, *int4, "--group_size", 128)
    assert "groups of 48 are not to be had" in refused(*no, a, b, *int4, "--group_size", 48)
    assert "int8 has one scale for each row" in refused(*no, a, b, "--dtype", "int8", "--group_size", 32)
    assert "only --dtype int4 has it" in refused(*no, a, b, "--group_size", 32)
    assert "only --dtype int4 has it" in refused(*no, a, b, "--calibration", tmp_path / "empty.jsonl")
    assert "only --to hf can hold it" in refused(*no, a, b, *int4, "--to", "meta")
    assert "does not exist" in refused(*no, a, b, *int4, "--calibration", tmp_path / "x.jsonl")
    assert "the file is empty" in refused(*no, a, b, *int4, "--calibration", tmp_path / "empty.jsonl")
    assert "no SentencePiece tokenizer" in refused(
        *no, tmp_path / "none", b, *int4, "--calibration", tmp_path / "empty.jsonl"
    )
    (tmp_path / "bad.jsonl").write_text('{"instruction": 3}\n')
    assert "bad.jsonl" in refused(*no, a, b, *int4, "--calibration", tmp_path / "bad.jsonl")
    convert(a, tmp_path / "q", *int4)
    assert "quantised already" in refused(*no, tmp_path / "q", b)


def test_a_result_with_a_wrong_bit_is_not_kept(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", small_tokenizer)
    right = Weights.read_packed

    def wrong(self: Weights, name: str) -> object:
        packed = right(self, name)
        return packed._replace(codes=packed.codes ^ (name == "layers.1.mlp.up.weight"))

    monkeypatch.setattr(quantised_files.Weights, "read_packed", wrong)
    said = refused(tmp_path, capsys, tmp_path / "a", tmp_path / "b", "--dtype", "int8")
    assert "layers.1.mlp.up.weight: reading it back gives other bits" in said
