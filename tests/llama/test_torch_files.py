"""Torch zip files: what is written opens in torch, and nothing hostile is opened."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.torch_files import TorchFile, TorchFileWriter, what_is

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.linspace(-1, 1, 10).bfloat16(),
    "c.weight": torch.full((2, 2), 0.5, dtype=torch.float16),
}


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], compress: int = zipfile.ZIP_STORED) -> None:
    """Write the zip anew with each record's bytes changed; None drops the record."""
    with zipfile.ZipFile(path) as z:
        records = [(i.filename, z.read(i)) for i in z.infolist()]
    with zipfile.ZipFile(path, "w", compress) as z:
        for name, data in records:
            if (new := change(name, data)) is not None:
                z.writestr(name, new)


class Evil:
    """Unpickles by running a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.pth"
    torch.save(TENSORS, path)
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_reads_what_torch_saves(saved: Path, mmap: bool) -> None:
    file = TorchFile(saved, mmap)
    assert file.stored.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert torch.equal(file.read(name), t)
        assert file.read(name).dtype == t.dtype
    file.unchanged.check()


@pytest.mark.parametrize("mmap", [True, False])
def test_reads_views_that_share_a_storage(tmp_path: Path, mmap: bool) -> None:
    whole = torch.randn(8, 4)
    torch.save({"first": whole[:3], "rest": whole[3:], "all": torch.nn.Parameter(whole)}, tmp_path / "x.pth")
    file = TorchFile(tmp_path / "x.pth", mmap)
    assert torch.equal(torch.cat([file.read("first"), file.read("rest")]), file.read("all"))
    assert torch.equal(file.read("all"), whole)


def test_writes_what_torch_loads(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    writer = TorchFileWriter(path)
    big = torch.randn(64, 64)
    for name, t in TENSORS.items():
        writer.add(name, t)
    writer.add("view", big[:2])
    writer.add("columns", big[:, :3])
    writer.close()
    for mmap in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == [*TENSORS, "view", "columns"]
        assert all(torch.equal(loaded[name], t) for name, t in TENSORS.items())
        assert torch.equal(loaded["view"], big[:2])
        assert torch.equal(loaded["columns"], big[:, :3])
        assert loaded["columns"].is_contiguous()
    assert path.stat().st_size < 4096, "a view is saved as what it shows, not as its storage"
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None, "checksums are right"
    assert all(s.offset % 64 == 0 for s in TorchFile(path).stored.values())


def test_writer_gives_the_same_bytes_for_the_same_tensors(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        writer = TorchFileWriter(tmp_path / name / "x.pth")
        for key, t in TENSORS.items():
            writer.add(key, t)
        writer.close()
    assert (tmp_path / "one/x.pth").read_bytes() == (tmp_path / "two/x.pth").read_bytes()


def cut(n: int) -> Callable[[Path, Path], None]:
    def damage(path: Path, marker: Path) -> None:
        path.write_bytes(path.read_bytes()[:n])

    return damage


def write(data: bytes) -> Callable[[Path, Path], None]:
    def damage(path: Path, marker: Path) -> None:
        path.write_bytes(data)

    return damage


def evil_zip(path: Path, marker: Path) -> None:
    torch.save({"a.weight": Evil(marker)}, path)


def evil_legacy(path: Path, marker: Path) -> None:
    torch.save({"a.weight": Evil(marker)}, path, _use_new_zipfile_serialization=False)


def evil_raw(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(marker)))


def legacy(path: Path, marker: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


def compressed(path: Path, marker: Path) -> None:
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def stride_zero(path: Path, marker: Path) -> None:
    torch.save({"bomb": torch.zeros(4).as_strided((1000, 1000, 1000), (0, 0, 0))}, path)


def short_storage(path: Path, marker: Path) -> None:
    rewrite(path, lambda name, data: data[:-4] if name.endswith("data/0") else data)


def long_storage(path: Path, marker: Path) -> None:
    rewrite(path, lambda name, data: data + b"1234" if name.endswith("data/0") else data)


def no_storage(path: Path, marker: Path) -> None:
    rewrite(path, lambda name, data: None if name.endswith("data/1") else data)


def unused_storage(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("x/data/77", b"12345678")


def twice(path: Path, marker: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as z:
        z.writestr("x/data/0", b"\0" * 48)


def big_endian(path: Path, marker: Path) -> None:
    rewrite(path, lambda name, data: b"big" if name.endswith("byteorder") else data)


def claims_more(path: Path, marker: Path) -> None:
    """The pickle says 3x4 + 100 elements; under mmap torch would read on into the records behind."""
    rewrite(path, lambda name, data: data.replace(b"cpuq\x06K\x0c", b"cpuq\x06K\x70") if name.endswith("pkl") else data)


def overlapping(path: Path, marker: Path) -> None:
    """The directory points two records at the same bytes."""
    data = bytearray(path.read_bytes())
    entries = [i for i in range(len(data) - 4) if data[i : i + 4] == b"PK\x01\x02"]
    data[entries[5] + 42 : entries[5] + 46] = data[entries[4] + 42 : entries[4] + 46]
    path.write_bytes(data)


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "empty": (write(b""), "empty"),
    "one byte": (write(b"\x80"), "bare pickle"),
    "three zeros": (write(b"\0\0\0"), "zeros"),
    "git lfs": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"), "git lfs pull"),
    "html": (write(b"<!DOCTYPE html><html><body>Sign in</body></html>"), "HTML page"),
    "json": (write(b'{"error": "not found"}'), "JSON"),
    "gguf": (write(b"GGUF\3\0\0\0"), "GGUF"),
    "text": (write(b"hello"), "neither torch's zip"),
    "safetensors": (write(struct.pack("<Q", 2) + b"{}"), "safetensors"),
    "cut to 100 bytes": (cut(100), "truncated or damaged"),
    "cut in half": (lambda p, m: cut(p.stat().st_size // 2)(p, m), "truncated or damaged"),
    "cut by one byte": (cut(-1), "damaged|truncated"),
    "evil zip": (evil_zip, "refused.*could run code"),
    "evil legacy": (evil_legacy, "bare pickle"),
    "evil raw": (evil_raw, "bare pickle"),
    "legacy": (legacy, "bare pickle.*torch.save"),
    "compressed": (compressed, "compressed"),
    "stride 0": (stride_zero, "not contiguous"),
    "storage too short": (short_storage, "storages do not match|torch cannot load"),
    "storage too long": (long_storage, "storages do not match"),
    "storage missing": (no_storage, "torch cannot load"),
    "storage unused": (unused_storage, "storages do not match"),
    "record twice": (twice, "twice"),
    "big endian": (big_endian, "big-endian"),
    "pickle claims more": (claims_more, "storages do not match|torch cannot load"),
    "overlapping records": (overlapping, "overlap"),
    "another zip": (lambda p, m: zipfile.ZipFile(p, "w").writestr("hello.txt", "x"), "not one of torch.save's"),
    "a list": (lambda p, m: torch.save([torch.ones(2)], p), "holds a list"),
    "a number in it": (lambda p, m: torch.save({"a": torch.ones(2), "lr": 0.1}, p), "'lr' is a float"),
    "nested": (lambda p, m: torch.save({"model": {"a": torch.ones(2)}}, p), "'model' is a dict"),
    "empty tensor": (lambda p, m: torch.save({"a": torch.ones(0)}, p), "empty"),
    "sparse": (lambda p, m: torch.save({"a": torch.ones(2, 2).to_sparse()}, p), "not a plain dense tensor"),
    "nothing": (lambda p, m: torch.save({}, p), "not a dictionary of tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the files made here
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are:UserWarning")  # torch 2.11, as it loads such a tensor
def test_hostile_files_are_refused_in_one_line(saved: Path, tmp_path: Path, case: str) -> None:
    damage, reason = HOSTILE[case]
    marker = tmp_path / "code-ran"
    damage(saved, marker)
    with pytest.raises(ValueError, match=reason) as error:
        TorchFile(saved)
    assert str(error.value).startswith(str(saved))
    assert "\n" not in str(error.value)
    assert not marker.exists(), "code ran"


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        TorchFile(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="not a regular file"):
        TorchFile(tmp_path)


def test_a_file_that_changes_is_noticed(saved: Path) -> None:
    file = TorchFile(saved, mmap=False)
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(ValueError, match="changed while"):
        file.unchanged.check()
    saved.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="ended while"):
        file.read("a.weight")


@pytest.mark.parametrize("writer", ["torch", "ours"])
def test_mutated_files_load_or_are_refused(tmp_path: Path, writer: str) -> None:
    """250 files each with a few bytes changed, mostly in pickle and zip directory: a load or one line, no third way."""
    path = tmp_path / "x.pth"
    if writer == "torch":
        torch.save(TENSORS, path)
    else:
        ours = TorchFileWriter(path)
        for name, t in TENSORS.items():
            ours.add(name, t)
        ours.close()
    good = path.read_bytes()
    rng = random.Random(0)
    interesting = [i for i in range(len(good)) if good[i] != ord("Z") and good[i]]
    loaded, complaints = 0, []
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.choice(interesting)] = rng.randrange(256)
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        try:
            file = TorchFile(path)
            for name, s in file.stored.items():
                assert file.read(name).shape == s.shape
            loaded += 1
        except ValueError as e:
            complaints.append(str(e))
    assert loaded
    assert complaints
    assert all(c.startswith(str(path)) and "\n" not in c for c in complaints)


def test_what_is_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in what_is(tmp_path / "x")
