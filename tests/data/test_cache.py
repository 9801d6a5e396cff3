"""The token cache: used when nothing changed, made anew when anything did, never half, never damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import cache
from data.cache import Recipe, TokenFile, content_hash, tokenise_file
from data.records import BadRecord
from llama.chat import ChatFormat
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(small_tokenizer: Tokenizer) -> Recipe:
    return Recipe(small_tokenizer, ChatFormat("dialogue"), 48, "answer_icliniq")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": f"pain {i}", "output": "rest " * (i + 1)} for i in range(20)]))
    return path


def make(path: Path, recipe: Recipe, **kw: Any) -> TokenFile:
    options: dict[str, Any] = {"cache_dir": path.parent / "cache", "on_bad": None, "workers": 1, "progress": False}
    return tokenise_file(path, recipe, **{**options, **kw})


def same(a: TokenFile, b: TokenFile) -> bool:
    return bool((np.asarray(a.tokens) == np.asarray(b.tokens)).all() and (a.rows == b.rows).all())


@pytest.fixture
def count_makes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real = cache._make
    monkeypatch.setattr(cache, "_make", lambda name, *a: (made.append(name), real(name, *a))[1])
    return made


def test_a_second_run_reads_the_cache(path: Path, recipe: Recipe, count_makes: list[str]) -> None:
    first, second = make(path, recipe), make(path, recipe)
    assert len(count_makes) == 1
    assert same(first, second)
    assert isinstance(second.tokens.base, np.memmap)
    assert same(first, make(path, recipe, cache_dir=None)), "in memory the same"


def test_the_cache_follows_content_not_name_or_time(path: Path, recipe: Recipe, count_makes: list[str]) -> None:
    make(path, recipe)
    os.utime(path, (1, 1))
    moved = path.parent / "sub" / "d.json"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    make(path, recipe)
    got = make(moved, recipe, cache_dir=path.parent / "cache")
    assert len(count_makes) == 1
    assert got.name == str(moved)


def test_what_decides_the_tokens_decides_the_cache(
    path: Path, recipe: Recipe, small_tokenizer: Tokenizer, count_makes: list[str]
) -> None:
    other = Tokenizer(small_tokenizer.model_bytes + b"\x1a\x02\x18\x01")  # another sha256
    recipes = [
        recipe,
        Recipe(other, recipe.chat_format, 48, recipe.answer),
        Recipe(small_tokenizer, ChatFormat("plain"), 48, recipe.answer),
        Recipe(small_tokenizer, ChatFormat("dialogue", "Be kind."), 48, recipe.answer),
        Recipe(small_tokenizer, recipe.chat_format, 32, recipe.answer),
        Recipe(small_tokenizer, recipe.chat_format, 48, "answer_chatgpt"),
    ]
    keys = [make(path, r).key for r in recipes]
    assert len(set(keys)) == len(count_makes) == len(recipes)
    path.write_text(path.read_text().replace("pain", "ache"))  # same size
    assert make(path, recipe).key not in keys


def test_hashing_is_left_out_while_the_file_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir = path.parent / "cache"
    digest = content_hash(path, cache_dir)
    assert not list(cache_dir.glob("stat-*")), "changed just now: its times do not yet tell it from the next change"
    monkeypatch.setattr(cache.time, "time", lambda: path.stat().st_mtime + 10)
    assert content_hash(path, cache_dir) == digest
    with monkeypatch.context() as patch:
        patch.delattr(cache.hashlib, "file_digest")
        assert content_hash(path, cache_dir) == digest
    (note,) = cache_dir.glob("stat-*")
    for damage in (b"", b"[]", b'{"stat": 1}', b"\xff"):
        note.write_bytes(damage)
        assert content_hash(path, cache_dir) == digest


@pytest.mark.parametrize(
    "damage",
    ["flip tokens", "flip rows", "cut tokens", "no tokens", "no meta", "bad meta", "empty meta", "meta without files"],
)
def test_a_damaged_cache_is_made_anew(
    path: Path, recipe: Recipe, damage: str, capsys: pytest.CaptureFixture[str], count_makes: list[str]
) -> None:
    good = make(path, recipe, cache_dir=None)
    make(path, recipe)
    (place,) = (path.parent / "cache").glob("d-*")
    file = place / {"tokens": "tokens.bin", "rows": "rows.npy"}.get(damage.split()[1], "meta.json")
    content = bytearray(file.read_bytes())
    if damage.startswith("flip"):
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage.startswith("no "):
        file.unlink()
    else:
        file.write_bytes({"cut": bytes(content[:-1]), "bad": b"\xff{", "empty": b"", "meta": b"{}"}[damage.split()[0]])
    capsys.readouterr()
    assert same(make(path, recipe), good)
    assert len(count_makes) == 3
    assert "the token cache is damaged" in capsys.readouterr().err
    assert same(make(path, recipe), good)
    assert len(count_makes) == 3, "whole again"
    assert not list((path.parent / "cache").glob("*.tmp-*"))


def test_rejected_records_are_told_of_again(path: Path, recipe: Recipe, count_makes: list[str]) -> None:
    path.write_text('[{"text": "rest"}, {"text": 3}, {"text": "\\ud800"}, {"text": "fever"}]')
    with pytest.raises(BadRecord, match="record 2"):
        make(path, recipe)
    assert not list((path.parent / "cache").glob("d-*")), "nothing half is left"
    told: list[tuple[str, bytes]] = []
    for _ in range(2):
        made = make(path, recipe, on_bad=lambda bad, raw: told.append((str(bad), raw)))
        assert (made.rows.size, made.rejected) == (2, 2)
    assert told[:2] == told[2:]
    assert told[0][1] == b'{"text": 3}'
    with pytest.raises(BadRecord) as e:
        make(path, recipe)
    assert str(e.value) == told[0][0]
    assert len(count_makes) == 2


def test_a_file_that_changes_while_it_is_read(path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.read_records

    def grows(p: Path, **kw: Any) -> Any:
        yield from real(p, **kw)
        p.write_text(p.read_text() + " ")

    monkeypatch.setattr(cache, "read_records", grows)
    with pytest.raises(ValueError, match="was changed while it was read"):
        make(path, recipe)
    assert not list((path.parent / "cache").glob("d-*"))


def test_a_directory_that_cannot_be_written(path: Path, recipe: Recipe) -> None:
    (path.parent / "file").write_text("")
    with pytest.raises(ValueError, match="token cache"):
        make(path, recipe, cache_dir=path.parent / "file" / "cache")


def test_a_full_disk(path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(ValueError, match=r"cannot write the token cache \(No space left on device\)"):
        make(path, recipe)
    assert not list((path.parent / "cache").glob("*.tmp-*"))


def test_old_leftovers_of_killed_runs_are_swept(path: Path, recipe: Recipe) -> None:
    make(path, recipe)
    (place,) = (path.parent / "cache").glob("d-*")
    old, fresh = place.with_name(place.name + ".tmp-old"), place.with_name(place.name + ".tmp-new")
    for p in (old, fresh):
        p.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    (place / "meta.json").unlink()
    make(path, recipe)
    assert (old.exists(), fresh.exists()) == (False, True)


MAKE = """
import sys, time
from pathlib import Path
from data import cache
from llama.chat import ChatFormat
from llama.tokenizer import Tokenizer
path, model = map(Path, sys.argv[1:3])
recipe = cache.Recipe(Tokenizer.load(model), ChatFormat("dialogue"), 48, "answer_icliniq")
print("ready", flush=True)
made = cache.tokenise_file(path, recipe, cache_dir=path.parent / "cache", on_bad=None, workers=1, progress=False)
print(int(made.tokens.astype(int).sum()), flush=True)
"""


def start(path: Path, model: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKE, path, model], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_while_writing_and_two_at_a_time(path: Path, recipe: Recipe, small_tokenizer: Tokenizer) -> None:
    model = path.parent / "t.model"
    model.write_bytes(small_tokenizer.model_bytes)
    path.write_text(
        json.dumps([{"instruction": f"pain {i}", "output": "rest " * (i % 9) + "."} for i in range(20_000)])
    )
    for delay in (0.05, 0.3, 0.6):
        with start(path, model) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
    with start(path, model) as a, start(path, model) as b:
        sums = [p.communicate(timeout=100)[0].split()[1] for p in (a, b)]
    assert sums[0] == sums[1] == str(int(make(path, recipe, cache_dir=None).tokens.astype(int).sum()))
    assert len([p for p in (path.parent / "cache").glob("d-*") if ".tmp-" not in p.name]) == 1
