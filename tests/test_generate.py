"""generate.py: one question, files, the chat in pipes and on a real terminal, and what it says to mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import checkpoint, layout
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.model import Llama
from llama.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
Generate = Callable[..., tuple[int, str, str]]


def save(path: Path, tokenizer: Tokenizer, max_seq_len: int, chat_format: ChatFormat) -> Path:
    """A random model in a directory: varied text that does not end by itself."""
    config = LlamaConfig(32, 2, 4, 2, 64, tokenizer.vocab_size + 1, max_seq_len=max_seq_len)
    model = Llama(config)
    model.init_weights(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
        model.head.weight[tokenizer.eos_id] = 0
    tensors = model.state_dict()
    checkpoint.save_model(
        path, ((e.name, tensors[e.name]) for e in layout.entries(config)), config, tokenizer, chat_format
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny", small_tokenizer, 128, ChatFormat("dialogue", ""))


@pytest.fixture
def generate(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Generate:
    """main() in this process, in an empty directory: (exit status, stdout, stderr)."""
    sys.path.insert(0, str(ROOT))
    try:
        import generate as script
    finally:
        sys.path.remove(str(ROOT))
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, stdin: bytes = b"", checkpoint: bool = True) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = script.main([*(["--checkpoint", str(folder)] if checkpoint else []), *argv])
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


# --- one question ---


def test_one_question(generate: Generate) -> None:
    code, out, err = generate("--prompt", "I have pain", "--seed", "1")
    assert (code, err) == (0, "")
    assert out.strip()
    assert generate("--prompt", "I have pain", "--seed", "1")[1] == out
    assert generate("--prompt=I have pain", "--seed", "2")[1] != out
    assert generate("--prompt", "-", "--seed", "1", stdin=b"I have pain\n")[1] == out


def test_json_is_one_object(generate: Generate, small_tokenizer: Tokenizer) -> None:
    code, out, _ = generate("--prompt", "I have pain", "--json", "--max-new-tokens", "9", "--temperature=0")
    answer = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert (answer["before"], answer["after"]) == ([], [])
    assert list(answer) == [
        "before",
        "after",
        "text",
        "token_ids",
        "prompt_tokens",
        "finish_reason",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    ]
    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 9)
    assert answer["text"] == small_tokenizer.decode_continued(answer["token_ids"]).lstrip()
    whole = small_tokenizer.encode("Patient: I have pain\nDoctor:")
    assert answer["prompt_tokens"] == 1 + len(whole)


def test_guessing_ahead_changes_speed_alone(generate: Generate, folder: Path) -> None:
    def ask(*flags: str) -> dict[str, Any]:
        return json.loads(generate("--prompt", "I have pain", "--json", "--seed", "1", *flags)[1])

    plain = ask()
    for flags in (["--speculate", "lookup"], ["--draft", str(folder)]):
        answer = ask(*flags)
        assert answer["text"] == plain["text"]
        assert list(answer) == [*plain, "drafted_tokens", "accepted_tokens"]
        assert 0 <= answer["accepted_tokens"] <= answer["drafted_tokens"]
    assert list(ask("--speculate", "off")) == list(plain)
    stdin = b"I cough\n/stats\n"
    assert "guessed ahead" not in generate("--seed", "1", stdin=stdin)[2]
    code, _, err = generate("--seed", "1", "--speculate", "lookup", stdin=stdin)
    assert code == 0
    assert re.search(r"^guessed ahead: [\d,]+ tokens, [\d,]+ of them right$", err, re.M)


def test_an_int8_cache_however_it_is_asked(generate: Generate, folder: Path, tmp_path: Path) -> None:
    def ask(*flags: str) -> str:
        code, out, _ = generate("--prompt", "I have pain", "--json", *greedy, *flags)
        assert code == 0
        return json.loads(out)["text"]

    greedy = ("--temperature", "0", "--max_new_tokens", "30")
    coded = ("--kv_cache", "int8")
    assert ask("--kv_cache", "full") == ask()
    text = ask(*coded)
    assert text != ask()  # so large are this model's weights
    for flags in (["--speculate", "lookup"], ["--draft", str(folder)]):
        assert ask(*coded, *flags) == text
    (tmp_path / "in").write_text('{"prompt": "I have pain"}\n')
    assert generate("--input", "in", "--output", "out", *greedy, *coded)[0] == 0
    assert json.loads((tmp_path / "out").read_text())["text"] == text
    code, out, err = generate(*greedy, *coded, "--verbose", stdin=b"I have pain\nAnd fever\n")
    assert code == 0
    assert text in out
    assert "parameters, float32 on cpu, KV cache int8" in err


def test_a_draft_model_of_another_tokenizer_is_refused(
    generate: Generate, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    other = train_tokenizer([f"pain {i} in the back and fever {i * 37}" for i in range(200)], 300)
    path = save(tmp_path / "other", other, 128, ChatFormat("dialogue", ""))
    code, out, err = generate("--prompt", "x", "--draft", str(path))
    assert (code, out) == (2, "")
    assert err == (
        f"error: --draft {path}: its tokenizer ({other.vocab_size} pieces) is another than that of the model which "
        f"answers ({small_tokenizer.vocab_size}); a draft model needs the same tokenizer.model\n"
    )


def test_raw_is_bos_and_the_text(generate: Generate, small_tokenizer: Tokenizer) -> None:
    _, out, _ = generate("--prompt", "I have pain", "--json", "--raw")
    assert json.loads(out)["prompt_tokens"] == 1 + len(small_tokenizer.encode("I have pain"))


def test_stop_text(generate: Generate) -> None:
    whole = json.loads(generate("--prompt", "fever", "--json", "--temperature", "0")[1])["text"]
    answer = json.loads(generate("--prompt", "fever", "--json", "--temperature", "0", "--stop", whole[10:13])[1])
    assert answer["text"] == whole[: whole.index(whole[10:13])]
    assert answer["finish_reason"] == "stop"


def test_settings_come_from_flags_then_the_checkpoint_then_chatdoctor(
    generate: Generate, folder: Path, tmp_path: Path
) -> None:
    import shutil

    def length(config: dict[str, Any] | None, *flags: str) -> int:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "manifest.json").unlink()
        (copy / "generation_config.json").unlink()
        if config is not None:
            (copy / "generation_config.json").write_text(json.dumps(config))
        code, out, err = generate("--checkpoint", str(copy), "--prompt", "x", "--json", *flags, checkpoint=False)
        assert code == 0, err
        return len(json.loads(out)["token_ids"])

    assert length(None) > 50  # ChatDoctor's 200, bounded by the context
    assert length({"max_new_tokens": 7, "do_sample": False, "temperature": 0.9, "top_p": None}) == 7
    assert length({"max_new_tokens": 7}, "--max_new_tokens", "5") == 5


def test_the_last_trained_model_is_the_default(generate: Generate, folder: Path, tmp_path: Path) -> None:
    code, out, err = generate("--prompt", "x", checkpoint=False)
    assert (code, out) == (2, "")
    assert "python train.py" in err
    assert "make demo" in err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/latest").write_text(f"{folder}\n")
    assert generate("--prompt", "x", checkpoint=False)[0] == 0
    (tmp_path / "out/latest").write_text(f"{tmp_path}/gone\n")
    code, _, err = generate("--prompt", "x", checkpoint=False)
    assert code == 2
    assert f"{tmp_path}/gone" in err


def test_kernels_that_were_asked_for_are_named(generate: Generate) -> None:
    code, _, err = generate("--prompt", "x", "--kernels", "torch")
    assert code == 0
    assert "kernels: torch" in err
    assert "(asked for)" in err


def test_verbose_says_which_kernels_run(generate: Generate) -> None:
    _, _, err = generate("--prompt", "x", "--verbose")
    assert "kernels: " in err
    assert "parameters, float32 on cpu" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", "x", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "x", "--top_p", "0"], "top_p is 0.0"),
        (["--prompt", "x", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "x", "--stop", ""], "stop text is empty"),
        (["--prompt", "x", "--dtype", "int3"], "--dtype"),
        (["--prompt", "x", "--device", "cuda:99"], "--device cuda:99"),
        (["--prompt", "x", "--device", "toaster"], "--device toaster"),
        (["--prompt", "x", "--device", "meta"], "--device meta"),
        (["--prompt", "x", "--kernels", "triton"], "triton was asked for, but the tensors are on cpu"),
        (["--prompt", "x", "--kernels", "metal"], "no backend 'metal'; there are auto, triton"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a\udcffb"], "not valid Unicode"),
        (["--prompt", "pain " * 300], "tokens long and the model's context holds 128"),
        (["--prompt", "x", "--bogus"], "--bogus"),
        (["--prompt", "x", "--input", "y", "--output", "z"], "exclude each other"),
        (["--input", "y"], "need each other"),
        (["--json"], "--json needs --prompt"),
        (["--input", "nowhere.jsonl", "--output", "z"], "nowhere.jsonl: cannot be read"),
        (["--prompt", "x", "--checkpoint", "nowhere"], "nowhere: does not exist"),
        (["--prompt", "x", "--draft", "nowhere"], "nowhere"),
        (["--prompt", "x", "--draft", "nowhere", "--speculate", "lookup"], "exclude each other"),
        (["--prompt", "x", "--speculate", "often"], "--speculate"),
        (["--prompt", "x", "--kv_cache", "int4"], "--kv_cache: invalid choice: 'int4' (choose from"),
        (["--input", "y", "--output", "z", "--speculate", "lookup"], "one answer at a time; --input has --batch_size"),
        (["--input", "y", "--output", "z", "--draft", "d"], "one answer at a time; --input has --batch_size"),
        (["--prompt", "x", "--offload"], "--offload spares a GPU's memory, and --device is cpu"),
        (["--prompt", "x", "--offload", "0"], "--offload is 0; it must be a number of blocks"),
        (["--prompt", "x", "--offload", "all"], "--offload is all; it must be a number of blocks"),
        (["--on_overflow", "shrink"], "--on_overflow"),
        (["--prompt", "x", "--triage", "maybe"], "--triage"),
        (["--prompt", "x", "--raw", "--patient", "c.json"], "--raw passes the text as it is"),
        (["--prompt", "x", "--raw", "--diseases", "d.db"], "--diseases has no place in it"),
        (["--prompt", "x", "--diseases", "nowhere.db"], "nowhere.db: cannot be read"),
        (["--prompt", "x", "--diseases", __file__], "is not a disease database"),
        (["--prompt", "x", "--patient", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_mistakes_get_one_line_and_exit_2(generate: Generate, argv: list[str], says: str) -> None:
    code, out, err = generate(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA", "free memory with --offload"),
        ("Triton Error [CUDA]: out of memory", "free memory with --offload"),
        (
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
            "a quantised model",
        ),
    ],
)
def test_lack_of_memory_is_one_line(
    said: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(argv: list[str]) -> int:
        raise RuntimeError(said)

    import generate as script

    monkeypatch.setattr(script, "run", short)
    assert script.main([]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {said.splitlines()[0]}; shorten the dialogue, or {err.partition(', or ')[2]}"
    assert remedy in err


def test_stdin_that_is_no_utf8(generate: Generate) -> None:
    code, _, err = generate("--prompt", "-", stdin=b"caf\xe9")
    assert (code, err) == (2, "error: stdin is not valid UTF-8 at byte 3\n")


def test_a_damaged_checkpoint_is_one_line(generate: Generate, folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = generate("--checkpoint", str(copy), "--prompt", "x", checkpoint=False)
    assert code == 2
    assert "model.safetensors" in err
    assert err.count("\n") == 1


# --- triage and the patient card ---

EMERGENCY = "fever, stiff neck and light hurts my eyes"


def test_an_emergency_is_said_before_the_answer(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed before the model runs, on stdout; with --json on stderr at once, and in the object."""
    from llama.generation import Answer

    seen: list[str] = []
    stream = Answer.stream

    def watched(self: Answer, *args: Any, **named: Any) -> Any:
        seen.append(sys.stdout.getvalue() + sys.stderr.getvalue())  # type: ignore[union-attr]
        return stream(self, *args, **named)

    monkeypatch.setattr(Answer, "stream", watched)
    for flags in ([], ["--json"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            patch.setattr(sys, "stderr", io.StringIO())
            generate("--prompt", EMERGENCY, "--max_new_tokens", "4", *flags)
            out, err = sys.stdout.getvalue(), sys.stderr.getvalue()  # type: ignore[union-attr]
        assert seen.pop().startswith("EMERGENCY (rule meningitis). ")
        assert (err if flags else out).startswith("EMERGENCY (rule meningitis). ")
    (said,) = json.loads(out)["before"]
    assert err == said + "\n"
    for flags in (["--triage", "off"], ["--raw"]):
        assert "EMERGENCY" not in generate("--prompt", EMERGENCY, "--max_new_tokens", "4", *flags)[1]


def test_a_file_has_the_notices_of_each_line(generate: Generate, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt": EMERGENCY}, {"prompt": "head"}, {"prompt": f"{EMERGENCY} {'pain ' * 300}"}, {"prompt": 3}]
    source.write_text("\n".join(json.dumps(r) for r in records))
    generate("--input", str(source), "--output", str(target), "--max_new_tokens", "4")
    first, second, too_long, broken = lines_of(target)
    assert first["before"][0].startswith("EMERGENCY (rule meningitis)")
    assert (second["before"], second["after"]) == ([], [])
    assert too_long["before"] == first["before"]
    assert "tokens long" in too_long["error"]
    assert list(broken) == ["line", "record", "error"]


def test_the_card_is_kept_and_an_allergy_flagged(generate: Generate, tmp_path: Path) -> None:
    card, saved = tmp_path / "card.json", tmp_path / "chat.json"
    lines = ["/patient", "/patient age 34", "/patient allergies + pain", "/patient age old", "I have pain", "/help"]
    stdin = "\n".join([*lines, f"/save {saved}"]).encode()
    code, out, err = generate("--patient", str(card), "--max_new_tokens", "60", "--seed", "1", stdin=stdin)
    assert code == 0
    assert "The card is empty" in err
    assert "About the patient: 34 years old; allergies: pain." in err
    assert "error: age is 'old'" not in err
    assert "/patient: age is 'old'" in err
    assert "/patient erase" in err
    assert "pain (your card: allergy to pain)" in out
    assert json.loads(card.read_text()) == {"age": 34, "allergies": ["pain"]}
    assert card.stat().st_mode & 0o777 == 0o600
    assert "34" not in saved.read_text()
    assert generate("--patient", str(card), stdin=b"/patient erase\n")[0] == 0
    assert not card.exists()


# --- answers from the disease database ---


@pytest.fixture(scope="module")
def diseases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data import prepare

    path = tmp_path_factory.mktemp("diseases") / "d.db"
    assert prepare.main(["diseases", "sample", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> str:
    """A model whose context has room for rows."""
    return str(save(tmp_path_factory.mktemp("roomy") / "m", small_tokenizer, 2048, ChatFormat("dialogue", "")))


def test_rows_are_read_and_said_to_be_cited_or_not(generate: Generate, diseases: Path, roomy: str) -> None:
    flags = ["--checkpoint", roomy, "--diseases", str(diseases), "--max_new_tokens", "8"]
    ask = ["--prompt", EMERGENCY, *flags]
    found = json.loads(generate(*ask, "--json", checkpoint=False)[1])
    bare = json.loads(generate("--prompt", EMERGENCY, *flags[:2], *flags[4:], "--json", checkpoint=False)[1])
    assert found["before"][0].startswith("EMERGENCY (rule meningitis)")
    assert len(found["given"]) == 3
    assert found["prompt_tokens"] > bare["prompt_tokens"] + 100
    assert (found["cited"], found["invented"]) == ([], [])
    out = generate(*ask, checkpoint=False)[1]
    assert out.startswith("EMERGENCY")
    assert "rests on none of the rows that it was given ([DB " in out
    assert out == generate(*ask, checkpoint=False)[1]  # nothing is drawn


def test_a_chat_and_a_file_say_when_there_is_no_entry(
    generate: Generate, diseases: Path, roomy: str, tmp_path: Path
) -> None:
    flags = ["--checkpoint", roomy, "--diseases", str(diseases), "--max_new_tokens", "8"]
    code, out, _ = generate(*flags, stdin=b"head of state\n", checkpoint=False)
    assert code == 0
    assert out.startswith("No entry in the disease database")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in ("head of state", EMERGENCY, "pain " * 200_000)))
    generate(*flags, "--input", str(source), "--output", str(target), checkpoint=False)
    none, found, too_long = lines_of(target)
    assert none["before"][0].startswith("No entry")
    assert none["given"] == []
    assert len(found["given"]) == 3
    assert "tokens long" in too_long["error"]


# --- files ---

RECORDS: list[Any] = [
    {"prompt": "I have pain in the chest"},
    {"instruction": "Be kind", "input": "fever", "id": 7},
    {"messages": [{"role": "user", "content": "cough"}]},
    {"input": "head"},
    {"instruction": "pain", "input": ""},
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_line_by_line(generate: Generate, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(r) for r in RECORDS))
    code, out, err = generate("--input", str(source), "--output", str(target), "--temperature", "0", "--batch_size=2")
    assert (code, out) == (0, "")
    assert "5 of 5 lines answered, 0 rejected" in err
    answers = lines_of(target)
    assert [a["line"] for a in answers] == [1, 3, 5, 7, 9]
    assert [a["record"] for a in answers] == RECORDS
    alone = json.loads(generate("--prompt", RECORDS[0]["prompt"], "--temperature", "0", "--json")[1])
    assert answers[0]["token_ids"] == alone["token_ids"]
    assert answers[3]["prompt_tokens"] < answers[0]["prompt_tokens"]


def test_broken_lines_are_named_and_lose_nothing(generate: Generate, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        b"{",
        b'{"prompt": "caf\xe9"}',
        b"[1]",
        b'{"question": "x"}',
        b'{"prompt": 3}',
        b'{"prompt": " "}',
        b'{"prompt": "\\ud800"}',
        b'{"messages": []}',
        b'{"messages": [{"role": "nurse", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        b'{"messages": "x"}',
        json.dumps({"prompt": "pain " * 300}).encode(),
        b"[" * 100_000,
    ]
    good = json.dumps(RECORDS[0]).encode()
    source.write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    code, _, err = generate("--input", str(source), "--output", str(target), "--max_new_tokens", "4")
    assert code == 2
    assert "2 of 15 lines answered, 13 rejected" in err
    for n in range(len(bad)):
        assert f"error: {source} line {n + 2}: " in err
    answers = lines_of(target)
    assert [a["line"] for a in answers] == list(range(1, 16))
    assert ["error" in a for a in answers] == [False, *[True] * len(bad), False]

    # Put right, run again: what was answered stays as it is, the rest is done.
    before = [line for line in target.read_text().splitlines() if '"error"' not in line]
    source.write_bytes(b"\n".join([good] * 15))
    code, _, err = generate("--input", str(source), "--output", str(target), "--max_new_tokens", "4")
    assert code == 0
    assert [a["line"] for a in lines_of(target)] == list(range(1, 16))
    assert set(before) <= set(target.read_text().splitlines())


def test_a_run_that_was_killed_goes_on(generate: Generate, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in RECORDS))
    argv = ("--input", str(source), "--output", str(target), "--temperature", "0", "--max_new_tokens", "6")
    assert generate(*argv)[0] == 0
    whole = [(a["line"], a["text"]) for a in lines_of(target)]
    target.write_bytes(target.read_bytes()[:-40])  # torn in the last line
    assert generate(*argv)[0] == 0
    assert [(a["line"], a["text"]) for a in lines_of(target)] == whole


def test_a_record_that_outgrows_the_context_loses_its_oldest_turns(generate: Generate, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    question, answer = (
        {"role": "user", "content": "pain in the chest"},
        {"role": "assistant", "content": "rest in the back"},
    )
    long = {"messages": [{"role": "system", "content": "I cough"}, *[question, answer] * 9, question]}
    short = {"messages": [long["messages"][0], *[question, answer] * 3, question]}
    source.write_text(json.dumps(long) + "\n" + json.dumps(short) + "\n")
    flags = ["--input", str(source), "--temperature", "0", "--max_new_tokens", "9", "--output"]
    code, _, err = generate(*flags, str(tmp_path / "out.jsonl"))
    assert code == 0
    left_out = int(re.search(r"in.jsonl line 1: the oldest (\d+) turns are left out", err)[1])  # type: ignore[index]
    assert "line 2: the oldest" not in err
    kept = {"messages": [long["messages"][0], *[question, answer] * (9 - left_out), question]}
    source.write_text(json.dumps(kept) + "\n")
    assert generate(*flags, str(tmp_path / "kept.jsonl"))[0] == 0
    (whole, _), (cut,) = lines_of(tmp_path / "out.jsonl"), lines_of(tmp_path / "kept.jsonl")
    assert whole["token_ids"] == cut["token_ids"]
    assert whole["prompt_tokens"] == cut["prompt_tokens"] > 80
    source.write_text(json.dumps(long) + "\n")
    code, _, err = generate(*flags, str(tmp_path / "refused.jsonl"), "--on_overflow", "refuse")
    assert code == 2
    assert "line 1: the dialogue has outgrown the context of 128 tokens" in err


def test_answers_are_written_as_they_end(generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies loses the answers in flight, and goes on with the rest; at the end all are in order."""
    from llama.batching import Batch

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["pain " * n for n in (1, 20, 1, 20, 1, 20)]  # the context ends the answers to the long ones first
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    argv = ("--input", str(source), "--output", str(target), "--temperature", "0", "--batch_size", "2")
    step = Batch.step

    def dies(self: Batch) -> list[Any]:
        if len(lines_of(target)) >= 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Batch, "step", dies)
    assert generate(*argv)[0] == 130
    first = lines_of(target)
    assert 3 <= len(first) < 6
    assert first[0]["line"] == 2
    monkeypatch.setattr(Batch, "step", step)
    code, _, err = generate(*argv)
    assert code == 0
    assert "6 of 6 lines answered, 0 rejected" in err
    whole = lines_of(target)
    assert [a["line"] for a in whole] == [1, 2, 3, 4, 5, 6]
    assert all(a in whole for a in first)


def test_a_line_that_the_model_fails_on_is_named_and_the_others_are_answered(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama import batching

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": p}) for p in ("cough", "pain " * 30, "fever")))
    finite = batching._finite
    monkeypatch.setattr(batching, "_finite", lambda part: part[0].shape[2] < 25 and finite(part))
    code, _, err = generate("--input", str(source), "--output", str(target))
    assert code == 2
    assert "line 2: the model's logits are not finite" in err
    assert "2 of 3 lines answered, 1 rejected" in err
    assert [("error" in line, "text" in line) for line in lines_of(target)] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_somebody_elses_file_is_not_touched(generate: Generate, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(RECORDS[0]))
    for content in ("my notes", "my notes\nmore", '{"line": 1, "record": {"prompt": "another"}, "text": "x"}\n'):
        target.write_text(content)
        code, _, err = generate("--input", str(source), "--output", str(target))
        assert code == 2
        assert "out.jsonl exists and line 1 is no answer" in err
        assert target.read_text() == content
    assert generate("--input", str(source), "--output", str(tmp_path / "no/where.jsonl"))[0] == 2
    assert generate("--input", str(source), "--output", str(source))[0] == 2
    assert json.loads(source.read_text()) == RECORDS[0]


# --- the chat, piped ---


def test_piped_questions_are_answered(generate: Generate) -> None:
    code, out, err = generate("--max_new_tokens", "5", stdin=b"I cough\n\nmy head\n")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert "not medical advice" in err


def test_commands(generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save = f"/save {path}"
    lines = [save, "/retry", "I cough", save, save, "/save", "/save no/where/x", "/stats", "/nope", "/help", "/quit"]
    stdin = "\n".join([*lines, "never asked"]).encode()
    code, out, err = generate("--max_new_tokens", "5", "--temperature", "0", "--triage", "off", stdin=stdin)
    assert code == 0
    assert "nothing to save yet" in err
    assert "no question yet" in err
    assert "saved 2 messages" in err
    assert "exists already; nothing was saved" in err
    assert "/save needs a file name" in err
    assert "no/where/x cannot be written" in err
    assert "kernels: " in err
    assert "of 128 tokens" in err
    assert "/nope is not a command" in err
    assert "/retry" in err
    saved = json.loads(path.read_text())
    assert saved["messages"][0] == {"role": "user", "content": "I cough"}
    assert saved["messages"][1]["role"] == "assistant"
    assert saved["messages"][1]["content"] == out.strip()
    assert not list(path.parent.glob(".*"))


def test_saved_dialogues_are_training_data(generate: Generate, tmp_path: Path) -> None:
    records = pytest.importorskip("data.records")
    path = tmp_path / "chat.json"
    generate("--max_new_tokens", "5", "--temperature", "0", stdin=f"I cough\nand now\n/save {path}\n".encode())
    (record,) = records.read_records(path, instruction="")
    assert [m.role for m in record.dialogue.messages] == ["user", "assistant"] * 2


def test_retry_and_reset(generate: Generate) -> None:
    flags = ["--max_new_tokens", "12", "--temperature", "1", "--seed", "1", "--triage", "off"]
    _, out, _ = generate(*flags, stdin=b"I cough\n/retry\n/reset\nI cough\n/stats\n")
    first, again, fresh = out.removesuffix("\n").split("\n")
    assert first != again != fresh
    assert generate(*flags, stdin=b"I cough\n/retry\n")[1] == f"{first}\n{again}\n"


def test_the_oldest_turns_go_when_the_context_is_full(generate: Generate) -> None:
    stdin = b"I have pain in the chest and cough\n" * 8 + b"/stats\n"
    code, _, err = generate("--max_new_tokens", "20", "--temperature", "0", stdin=stdin)
    assert code == 0
    said = re.findall(r"\(the context of 128 tokens is full: the oldest (\d) turns are left out from here on\)", err)
    assert 0 < len(said) <= 3  # several at once, so that the next turns fit again
    assert said == sorted(said)
    assert "dialogue: 8 turns" in err
    assert "error" not in err


def test_refused_on_overflow_the_dialogue_stays(generate: Generate, tmp_path: Path) -> None:
    stdin = b"I have pain in the chest and cough\n" * 6 + f"/save {tmp_path}/chat.json\n/retry\n".encode()
    code, out, err = generate("--max_new_tokens", "20", "--on_overflow", "refuse", stdin=stdin)
    assert code == 0
    refused = err.count("error: the dialogue has outgrown the context of 128 tokens (an answer takes up to 20 of them)")
    assert 0 < refused < 6
    assert "left out" not in err
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 2 * (6 - refused)
    assert len(out.splitlines()) >= 6 - refused + 1  # and /retry answers the last question that was answered


def test_a_question_that_does_not_fit_is_refused_and_the_chat_goes_on(generate: Generate) -> None:
    code, out, err = generate("--max_new_tokens", "5", stdin=b"pain " * 300 + b"\nI cough\n\xff\xfe\n/stats\n")
    assert code == 0
    assert "error: the prompt is" in err
    assert "not valid UTF-8" in err
    assert "dialogue: 1 turns" in err
    assert out.strip()


# --- the chat on a terminal ---

HUNG = 900  # seconds without a sign of life; on a machine with other work a start alone has taken over 60


class Terminal:
    """A child with a pseudo-terminal of its own."""

    def __init__(self, argv: list[str], home: Path) -> None:
        import pty

        self.master, slave = pty.openpty()
        # The child makes the terminal its controlling one, so that Ctrl-C is a signal.
        become = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", become, sys.executable, str(ROOT / "generate.py"), *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=env,
            cwd=ROOT,
        )
        os.close(slave)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the prompt. One between its showing and readline's wait for a key would be seen at the next key
        only, so it is sent when the child sleeps."""
        stat = Path(f"/proc/{self.child.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert self.child.poll() is None
            time.sleep(0.01)
        self.send("\x03")

    def until(self, text: str) -> str:
        """What is shown up to and with the text, which may take its time as long as the child lives."""
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], HUNG)
            assert ready, f"{text!r} did not come; shown: {self.seen!r}"
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
            except OSError:  # the child has closed the terminal
                raise AssertionError(f"ended before {text!r}; shown: {self.seen!r}") from None
        at = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.master)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = save(tmp_path / "long", small_tokenizer, 60_000, ChatFormat("dialogue", ""))
    settings = ["--max_new_tokens", "50000", "--temperature", "1", "--repetition_penalty", "1", "--seed", "1"]
    terminal = Terminal(["--checkpoint", str(path), *settings], tmp_path / "state")
    try:
        assert "not medical advice" in terminal.until("You: ")
        terminal.send("I cough\n")
        terminal.until("Doctor: ")
        terminal.until(" ")  # a word has come
        terminal.send("\x03")
        terminal.until("(stopped)")
        terminal.until("You: ")
        terminal.interrupt()
        terminal.until("/quit or Ctrl-D leaves")
        terminal.until("You: ")
        terminal.send(f"/save {tmp_path}/chat.json\n")
        terminal.until("saved 2 messages")
        terminal.until("You: ")
        terminal.send("\x04")
        assert terminal.child.wait(HUNG) == 0
    finally:
        terminal.close()
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert messages[0]["content"] == "I cough"
    assert messages[1]["content"]
    history = tmp_path / "state/chatdoctor/history"
    if history.exists():  # a Python without readline keeps none
        assert "I cough" in history.read_text()
        assert history.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_the_notice_comes_first_and_the_card_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    terminal = Terminal(["--checkpoint", str(folder), "--patient", str(card), "--seed", "1"], tmp_path / "state")
    try:
        terminal.until("You: ")
        terminal.send("/patient allergies + penicillin\n")
        terminal.until("allergies: penicillin.")
        terminal.until("You: ")
        terminal.send(f"{EMERGENCY}\n")
        assert "EMERGENCY (rule meningitis)" in terminal.until("Doctor: ")
        terminal.until("You: ")
        terminal.send("\x04")
        assert terminal.child.wait(HUNG) == 0
    finally:
        terminal.close()
    history = tmp_path / "state/chatdoctor/history"
    if history.exists():
        assert EMERGENCY in history.read_text()
        assert "penicillin" not in history.read_text()


# --- as a process ---


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(folder), "--prompt", "x", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert err == b""


def test_one_answer_loads_nothing_that_it_does_not_need(folder: Path) -> None:
    """Start-up is imports: each of these costs 0.3 to 5 s. Seconds themselves are bench/bench_decode.py's."""
    code = (
        "import sys, generate\n"
        f"generate.main(['--checkpoint', {str(folder)!r}, '--prompt', 'x', '--seed', '1'])\n"
        "heavy = ('transformers', 'torch._dynamo', 'torch.distributed.fsdp', 'sympy', 'pandas', 'matplotlib')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.stderr == ""
    assert run.stdout.splitlines()[-1] == "[]"
    flags = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, generate; generate.parse(['--prompt', 'x']); print('torch' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert flags.stdout == "False\n"
