"""llama/provenance.py: where a model comes from, carried from stage to stage; damaged files are named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llama import provenance
from llama.files import MANIFEST


def written(folder: Path, stages: provenance.Stages) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in provenance.file_of(stages).items():
        (folder / name).write_bytes(data)
    return folder


def test_stages_come_back_and_grow(tmp_path: Path) -> None:
    first = provenance.stage({"name": "tiny", "seed": 1}, [{"name": "a.json", "sha256": "0"}], objective="sft")
    model = written(tmp_path / "model", [first])
    assert provenance.stages_of(model) == [first]
    both = provenance.converted(model, [first], None)
    assert both[0] == first
    assert both[1]["base"]["name"] == str(model)
    assert both[1]["data"] == []
    assert {"python", "torch"} <= both[1]["versions"].keys()


def test_a_model_without_one_has_no_stages(tmp_path: Path) -> None:
    assert provenance.stages_of(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"version": 2, "stages": []}',
        '{"version": 1, "stages": {}}',
        '{"version": 1, "stages": [{}]}',
        '{"version": 1, "stages": [{"data": [{"sha256": "0"}]}]}',
    ],
)
def test_damaged_ones_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / provenance.NAME).write_text(content)
    with pytest.raises(ValueError, match=provenance.NAME) as error:
        provenance.stages_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_base_is_told_by_its_manifest_or_its_weight_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert provenance.base_of(tmp_path)["files"] == [{"name": "model.safetensors", "sha256": digest}]
    asked: list[Path] = []
    provenance.base_of(tmp_path, lambda file: str(asked.append(file)))
    assert asked == [tmp_path / "model.safetensors"]
    (tmp_path / MANIFEST).write_bytes(b"listed")
    assert provenance.base_of(tmp_path)["manifest_sha256"] == hashlib.sha256(b"listed").hexdigest()
    file = tmp_path / "model.safetensors"
    assert provenance.base_of(file)["files"] == [{"name": "model.safetensors", "sha256": digest}]


def test_calibration_records_count_as_data(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_bytes(b"{}")
    (stage,) = provenance.converted(tmp_path, [], tmp_path / "few.jsonl")
    assert stage["data"] == [{"name": str(tmp_path / "few.jsonl"), "sha256": hashlib.sha256(b"{}").hexdigest()}]
