"""The whole command against a server on this machine: what it writes, kills, faults, money, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import prepare
from data.disease_sources import Row, Source
from data.diseases import build
from data.records import read_records
from tests.data.rows import ROWS
from tests.data.stub_endpoint import Stub, write_dialogue

ROOT = Path(__file__).resolve().parents[3]
FIELDS = ("name", "synonyms", "symptoms", "tests", "medications", "urgency")
ASKED = 10  # requests about ROWS with --subsets 2


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "d.db"
    rows = tuple(Row(place=e.source_row, line=i, **{f: getattr(e, f) for f in FIELDS}) for i, e in enumerate(ROWS))
    build([Source("made", "disease", "made.csv", "0" * 64, rows)], path)
    return path


@pytest.fixture
def command(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.setattr("data.asking.client.FIRST_WAIT", 0.01)

    def command(stub: Stub | str, *flags: str) -> list[str]:
        url = stub if isinstance(stub, str) else stub.url
        return [
            "generate",
            str(database),
            str(tmp_path / "out.jsonl"),
            "--endpoint",
            url,
            "--model",
            "m",
            "--subsets",
            "2",
            *flags,
        ]

    return command


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_end_to_end(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Stub() as stub:
        assert prepare.main(command(stub)) == 0
        assert set(stub.answered.values()) == {1}
        assert len(stub.asked) == ASKED
        assert stub.asked[0]["model"] == "m"
        assert len({body["seed"] for body in stub.asked}) == ASKED
    out = tmp_path / "out.jsonl"
    kept, rejected = lines(out), lines(tmp_path / "out.jsonl.rejected")
    assert len(kept) + len(rejected) == ASKED
    assert len(kept) > ASKED / 2
    assert {r["reason"] for r in rejected} <= {"near duplicate"}
    assert [r["pass"] for r in kept] == sorted(
        (r["pass"] for r in kept), key=["tests", "medications", "symptoms"].index
    )
    assert {"row", "source", "source_row", "condition", "symptoms", "model"} <= kept[0].keys()
    records = list(read_records(out))
    assert [r.dialogue.messages[2].content for r in records] == [r["output"] for r in kept]
    assert "10 requests: 10 answered, 0 set aside" in capsys.readouterr().err


def test_the_file_is_the_same_whatever_comes_first(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """And is made anew from the journal without asking."""
    out = tmp_path / "out.jsonl"
    with Stub() as stub:
        assert prepare.main(command(stub, "--concurrency", "1")) == 0
        one = out.read_bytes()
        for path in tmp_path.iterdir():
            path.unlink()
        assert prepare.main(command(stub, "--concurrency", "8")) == 0
        assert out.read_bytes() == one
        asked = len(stub.asked)
        assert prepare.main(command(stub)) == 0
        assert len(stub.asked) == asked
    assert out.read_bytes() == one


def test_faults_cost_nothing_but_time(command: Callable[..., list[str]], tmp_path: Path) -> None:
    faults = ["429 0.05", "500", "cut", "nonsense", "slow", "html", "", "502", "no usage", "error"]
    with Stub(faults) as stub:
        assert prepare.main(command(stub, "--timeout", "0.7")) == 0
        assert len(stub.answered) == ASKED
        assert set(stub.answered.values()) == {1}
    assert not [r for r in lines(tmp_path / "out.jsonl.rejected") if r["reason"] == "no reply"]


def test_what_fails_for_good_is_set_aside_and_asked_again(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stub(["nonsense"] * 3) as stub:
        assert prepare.main(command(stub, "--concurrency", "1")) == 0
        assert "9 answered, 1 set aside" in capsys.readouterr().err
        assert [r for r in lines(tmp_path / "out.jsonl.rejected") if r["reason"] == "no reply"]
        assert prepare.main(command(stub)) == 0
        assert "10 answered, 0 set aside" in capsys.readouterr().err
        assert set(stub.answered.values()) == {1}


@pytest.mark.parametrize(
    ("fault", "said"), [("401", "--key_env"), ("404", "path"), ("400", "HTTP 400"), ("403", "key")]
)
def test_what_cannot_succeed_stops_with_one_line(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    with Stub(["", "", "", fault] + [fault] * 9) as stub:
        assert prepare.main(command(stub, "--concurrency", "1")) == 2
        assert len(stub.asked) == 4
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert said in error[0]
    assert "3 replies are kept" in error[0]
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_that_is_down_ends_the_run(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with Stub(["500"] * 1000) as stub:
        assert prepare.main(command(stub, "--concurrency", "4")) == 2
    assert "5 requests in a row failed, the last: HTTP 500" in capsys.readouterr().err


# --- kills ----------------------------------------------------------------------------------------


def start(argv: list[str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "data.prepare", *argv]
    return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_and_started_again_nothing_that_was_kept_is_asked_twice(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    journal, out = tmp_path / "out.jsonl.journal", tmp_path / "out.jsonl"
    with Stub(delay=0.05) as stub:
        kept: set[str] = set()
        for n in (2, 5):
            run = start(command(stub, "--concurrency", "2"))
            wait_for(lambda n=n: journal.exists() and journal.read_bytes().count(b"\n") > n)  # type: ignore[misc]
            run.kill()
            run.communicate()
            kept = {json.loads(line)["key"] for line in journal.read_bytes().splitlines()[1:]}
            assert not out.exists()
        asked = len(stub.asked)
        assert prepare.main(command(stub)) == 0
        assert len(stub.asked) - asked == ASKED - len(kept)
        assert sum(stub.answered.values()) <= ASKED + 2 * 2  # those on their way when it was killed
    killed = out.read_bytes()
    for path in tmp_path.iterdir():
        path.unlink()
    with Stub() as stub:
        assert prepare.main(command(stub)) == 0
    assert out.read_bytes() == killed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_keeps_what_is_on_its_way(
    command: Callable[..., list[str]], tmp_path: Path, number: signal.Signals
) -> None:
    with Stub(delay=0.3) as stub:
        run = start(command(stub, "--concurrency", "2"))
        wait_for(lambda: len(stub.asked) >= 3)
        run.send_signal(number)
        _, said = run.communicate()
        assert run.returncode == 130
        assert "the same command goes on" in said
        assert "Traceback" not in said
        answered = stub.answered.total()
        assert len((tmp_path / "out.jsonl.journal").read_bytes().splitlines()) - 1 == answered < ASKED
        assert not (tmp_path / "out.jsonl").exists()
        assert prepare.main(command(stub)) == 0
        assert set(stub.answered.values()) == {1}


# --- money ----------------------------------------------------------------------------------------


def test_the_budget_is_not_passed(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--price_in", "1000000", "--price_out", "1000000", "--concurrency", "4"]  # a token costs 1
    with Stub() as stub:
        assert prepare.main(command(stub, *flags, "--budget", "2800")) == 0
        first = stub.answered.total()
        assert 1 < first < ASKED
        said = capsys.readouterr().err
        assert "raise it to go on" in said
        assert f"{first} answered, 0 set aside, {ASKED - first} not made" in said
        spent = sum(
            int(r["prompt_tokens"]) + int(r["completion_tokens"]) for r in lines(tmp_path / "out.jsonl.journal")[1:]
        )  # type: ignore[call-overload]
        assert spent <= 2800 < spent + 2800
        assert prepare.main(command(stub, *flags, "--budget", "2800")) == 0
        assert stub.answered.total() == first  # what was spent before counts
        assert prepare.main(command(stub, *flags, "--budget", "400000")) == 0
        assert set(stub.answered.values()) == {1}
        assert stub.answered.total() == ASKED


def test_lost_attempts_count_as_paid_for(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--price_in", "1000000", "--price_out", "1000000", "--concurrency", "1", "--budget", "3000"]
    with Stub(["nonsense"] * 50) as stub:
        assert prepare.main(command(stub, *flags)) == 0
        assert len(stub.asked) == 2  # each may have cost 1,300 or so
    assert "2 attempts lost" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status: object = prepare.main(argv)
    except SystemExit as e:
        status = e.code
    assert status == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--concurrency", "0"], "at least 1"),
        (["--timeout", "0"], "positive"),
        (["--temperature", "nan"], "positive"),
        (["--timeout", "inf"], "positive"),
        (["--budget", "3"], "--price_in"),
        (["--budget", "3", "--price_in", "1", "--body", '{"max_tokens": null}'], "limit of the reply"),
        (["--body", "[]"], "JSON object"),
        (["--body", "{"], "--body"),
        (["--body", '{"model": "x"}'], "JSON object"),
        (["--key_env", "NO_SUCH_VARIABLE"], "no such environment variable"),
    ],
)
def test_flags(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert said in fails(command("http://127.0.0.1:9/v1", *flags), capsys)


def test_places_that_cannot_be(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command("http://127.0.0.1:9/v1")
    assert "cannot be reached" in fails(argv, capsys)
    assert "cannot be written" in fails([*argv[:2], str(tmp_path / "no" / "out.jsonl"), *argv[3:]], capsys)
    assert "directory" in fails([*argv[:2], str(tmp_path), *argv[3:]], capsys)
    (tmp_path / "mine.jsonl").write_text("precious")
    assert "exists" in fails([*argv[:2], str(tmp_path / "mine.jsonl"), *argv[3:]], capsys)
    (tmp_path / "b.jsonl.rejected").write_text("precious")
    assert "b.jsonl.rejected: exists" in fails([*argv[:2], str(tmp_path / "b.jsonl"), *argv[3:]], capsys)
    assert (tmp_path / "mine.jsonl").read_text() == (tmp_path / "b.jsonl.rejected").read_text() == "precious"
    assert "nothing.db" in fails(["generate", str(tmp_path / "nothing.db"), *argv[2:]], capsys)


def test_a_result_that_cannot_be_written_loses_no_reply(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with Stub() as stub:
        with monkeypatch.context() as patch:
            patch.setattr("llama.files.os.replace", full)
            assert prepare.main(command(stub)) == 2
        assert "disk is full" in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()
        assert prepare.main(command(stub)) == 0
        assert set(stub.answered.values()) == {1}


def test_other_settings_are_not_mixed(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with Stub() as stub:
        assert prepare.main(command(stub)) == 0
        capsys.readouterr()
        assert "temperature 0.9, not 0.1" in fails(command(stub, "--temperature", "0.1"), capsys)


def test_the_key_is_sent_and_stored_nowhere(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUB_KEY", "sk-secret")
    with Stub(["500"]) as stub:
        stub.key = "sk-secret"
        assert prepare.main(command(stub, "--key_env", "STUB_KEY")) == 0
        monkeypatch.setenv("STUB_KEY", "sk-stale")
        argv = command(stub, "--key_env", "STUB_KEY", "--seed", "1")
        assert prepare.main([*argv[:2], str(tmp_path / "b.jsonl"), *argv[3:]]) == 2
    captured = capsys.readouterr()
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    for secret in ("sk-secret", "sk-stale"):
        assert secret not in captured.out + captured.err + written


def test_fields_of_the_request_can_be_added_and_left_out(command: Callable[..., list[str]]) -> None:
    with Stub() as stub:
        body = '{"top_p": 0.5, "max_tokens": null, "max_completion_tokens": 300, "seed": null}'
        assert prepare.main(command(stub, "--body", body)) == 0
        assert stub.asked[0].keys() == {"model", "messages", "temperature", "top_p", "max_completion_tokens"}


def test_a_dry_run_asks_nothing_and_writes_nothing(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stub() as stub:
        assert prepare.main(command(stub, "--dry_run", "--price_in", "1", "--price_out", "2")) == 0
        assert not stub.asked
    shown = capsys.readouterr().out
    assert shown.count("Facts:") == 6
    assert "10 requests about 3 rows (2 tests, 3 medications, 5 symptoms)" in shown
    assert "cost 0.00" in shown
    assert not list(tmp_path.iterdir())


def test_leaks_are_rejected_and_counted(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(prompt: str) -> str:
        said = write_dialogue(prompt)
        return said + " Patient: Thank you." if "which tests" in prompt else said

    with Stub(say=say) as stub:
        assert prepare.main(command(stub)) == 0
    assert "2  role leak" in capsys.readouterr().err
    assert "Thank you" not in (tmp_path / "out.jsonl").read_text()
