"""evaluate.py from the outside: a made-up examination end to end, going on after a break, and bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import evaluate
from data.evaluation.questions import MMLU_SUBJECTS
from data.evaluation.safety import CATEGORIES
from data.evaluation.suite import PARTS
from llama.chat import ChatFormat
from llama.checkpoint import save_model
from llama.config import LlamaConfig
from llama.model import Llama
from llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    config = LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=256)
    model = Llama(config)
    model.init_weights(0)
    save_model(path, model.state_dict().items(), config, small_tokenizer, ChatFormat("dialogue", ""))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up files in the shapes of the public sets."""
    path = tmp_path_factory.mktemp("sets")
    options = {"A": "rest", "B": "fever", "C": "cough", "D": "pain"}
    lines = [
        {"question": f"pain in the chest {i}", "options": options, "answer": "cough", "answer_idx": "C"}
        for i in range(6)
    ]
    (path / "medqa_us_4opt_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [
        {"id": str(i), "question": f"fever {i}", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1 + i % 4}
        for i in range(6)
    ]
    (path / "medmcqa_dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "pubmedqa_pqal.json").write_text(
        json.dumps({str(i): {"QUESTION": f"cough {i}?", "CONTEXTS": ["a", "b"]} for i in range(6)})
    )
    (path / "pubmedqa_test_ground_truth.json").write_text(
        json.dumps({str(i): "yes" if i % 2 else "no" for i in range(6)})
    )
    (path / "mmlu_med").mkdir()
    for subject in MMLU_SUBJECTS:
        with (path / "mmlu_med" / f"{subject}_test.csv").open("w", newline="") as f:
            csv.writer(f).writerows([f"head, {i}", "w", "x", "y", "z", "ABCD"[i]] for i in range(2))
    (path / "med_safety").mkdir()
    for c in CATEGORIES:
        (path / "med_safety" / f"gpt4_category_{c}.csv").write_text(
            f",harmful_medical_request,safe_response\n0,Do harm {c},Sorry. No.\n"
        )
    vignettes = [{"urgency_level": u, "case_description": f"pain {u}"} for u in ("em", "ne", "sc")]
    (path / "semigran_vignettes.jsonl").write_text("\n".join(map(json.dumps, vignettes)))
    return path


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "held.json"
    rows = [
        {"input": f"I have pain in the back for {i} days", "output": "You may have a slipped disc."} for i in range(5)
    ]
    path.write_text(json.dumps(rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, str, str]:
    status = evaluate.main([str(f) for f in flags])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_one_command_from_checkpoint_to_card(
    checkpoint: Path, sets: Path, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint", checkpoint, "--out", tmp_path / "card", "--eval_data", sets, "--held_out", dialogues)
    flags = (*flags, "--train_files", dialogues, "--limit", 4, "--device", "cpu")
    status, out, err = run(capsys, *flags)
    assert status == 0, err
    assert "floor to beat" in out
    results: dict[str, Any] = json.loads((tmp_path / "card/results.json").read_text())
    assert {p["name"] for p in results["parts"]} == PARTS.keys() - {"poison"}
    assert [item["part"] for item in results["left_out"]] == ["poison"]
    for part in results["parts"]:
        for f in part["figures"]:
            assert f["interval"][0] <= f["value"] <= f["interval"][1] + 1e-12, f["name"]
            assert f["floors"], f["name"]
            assert f["n"] > 0
            assert f["protocol"] == part["protocol_hash"]
            assert f["contaminated"] is not None
            assert f["indistinguishable_from_floor"] == (f["standing"] == "indistinguishable from floor")
        items = (tmp_path / f"card/items/{part['name']}.jsonl").read_text().splitlines()
        assert len(items) >= max(f["n"] for f in part["figures"])
    by_name = {p["name"]: p for p in results["parts"]}
    assert by_name["fit"]["figures"][0]["contaminated"] == 4  # trained on what it is examined with
    assert by_name["medqa"]["figures"][0]["contaminated"] == 0
    assert results["throughput"]["ratio"] > 0
    assert "MedQA" in (tmp_path / "card/card.md").read_text()
    assert (tmp_path / "card/card.html").read_text().startswith("<!doctype html>")

    (tmp_path / "card/parts/mmlu.json").write_text("{torn")
    before = json.loads((tmp_path / "card/parts/medqa.json").read_text())
    status, _, err = run(capsys, *flags)
    assert status == 0
    assert "mmlu: kept" not in err
    assert err.count("kept from an earlier run") == len(results["parts"]) - 1
    assert json.loads((tmp_path / "card/parts/medqa.json").read_text()) == before
    again = json.loads((tmp_path / "card/results.json").read_text())
    assert [p["figures"] for p in again["parts"]] == [p["figures"] for p in results["parts"]]

    status, _, err = run(capsys, *flags[:-4], "--limit", 3, "--suite", "medqa,fit")
    assert status == 0
    assert "kept" not in err  # another protocol


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--suite", "medqa,nonsense"], "there is no 'nonsense'; known are quick, full, fit"),
        (["--suite", ","], "there is no 'part'"),
        (["--suite", "medqa"], "--suite medqa: needs --eval_data"),
        (["--suite", "poison"], "needs --diseases"),
        (["--eval_data", "/nowhere"], "--eval_data /nowhere: is not there"),
        (["--train_files", "/nowhere.json"], "--train_files /nowhere.json: no such file"),
        (["--held_out", "/nowhere.json", "--suite", "fit"], "/nowhere.json"),
        (["--encoder", "/nowhere"], "--encoder /nowhere: no such directory"),
        (["--device", "cuda:99", "--suite", "tests", "--limit", "1"], "--device cuda:99 is not to be had here"),
        (["--checkpoint", "/nowhere"], "--checkpoint /nowhere: no such directory"),
        (["--diseases", __file__, "--suite", "recall"], "test_evaluate.py"),
    ],
)
def test_bad_input_ends_with_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    status, out, err = run(capsys, "--checkpoint", checkpoint, "--out", tmp_path / "card", *flags)
    assert status == 2
    assert complaint in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


def test_a_set_that_is_missing_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--out", tmp_path / "card", "--eval_data", tmp_path)
    assert status == 2
    assert "medqa_us_4opt_test.jsonl: cannot be read" in err


def test_a_checkpoint_without_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    status, _, err = run(capsys, "--checkpoint", bare, "--out", tmp_path / "card", "--suite", "tests", "--limit", 1)
    assert status == 2
    assert "tokenizer" in err


def test_another_checkpoint_s_results_stay(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"checkpoint": {"fingerprint": "other"}}')
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--out", tmp_path)
    assert status == 2
    assert "another checkpoint" in err
    assert json.loads((tmp_path / "results.json").read_text())["checkpoint"]["fingerprint"] == "other"


def test_an_out_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--out", tmp_path / "file")
    assert status == 2
    assert "choose another directory" in err


def test_wrong_flags() -> None:
    for flags in ([], ["--out", "x", "--limit", "0"], ["--out", "x", "--frob"]):
        with pytest.raises(SystemExit) as e:
            evaluate.parse(flags)
        assert e.value.code == 2


def test_training_files_that_are_gone_or_changed_are_said(
    checkpoint: Path, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that names its data in provenance.json."""
    model = tmp_path / "m"
    model.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("manifest.json", "provenance.json"):
            (model / file.name).write_bytes(file.read_bytes())
    data = [
        {"name": str(dialogues), "sha256": "0" * 64},
        {"name": "/gone.json", "sha256": "1"},
        {"name": "built-in sample"},
    ]
    (model / "provenance.json").write_text(json.dumps({"version": 1, "stages": [{"data": data}]}))
    status, _, err = run(capsys, "--checkpoint", model, "--out", tmp_path / "card", "--suite", "recall", "--limit", 2)
    assert status == 0, err
    results = json.loads((tmp_path / "card/results.json").read_text())
    assert [s["state"] for s in results["training_files"]] == ["changed since training", "not there any more", "read"]
    assert [item["part"] for item in results["left_out"]] == [f"training file {dialogues}", "training file /gone.json"]
    seen = next(f for f in results["parts"][0]["figures"] if f["name"] == "recall.seen.top1")
    assert seen["contaminated"] == 2  # questions that the sample trains on
