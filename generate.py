#!/usr/bin/env python
"""Ask a trained model: one question (--prompt), a file of them (--input), or a chat in the terminal.

Terminal and files are here; what makes an answer is llama/generation.py. stdout carries answers, stderr the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import secrets
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llama.chat import Dialogue, Message
from llama.command_line import LATEST, Parser, latest
from llama.screen import Screen, show

if TYPE_CHECKING:  # torch takes seconds to import: --help and wrong flags must not wait for it
    import torch

    from llama.attendant import Attendant
    from llama.generation import Answer, Doctor
    from llama.speculative import Drafter
    from llama.tokenizer import Tokenizer

LAUNCHED = "RANK" in os.environ  # by torchrun, which splits the model over its processes


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    p = Parser("generate.py", __doc__)
    add = p.add_argument
    add("--checkpoint", metavar="DIR", help=f"model directory or GGUF file; default: the one named in {LATEST}")
    add(
        "--adapter",
        metavar="DIR",
        help="LoRA adapters (PEFT's layout) for --checkpoint; alone: over the base they name",
    )
    add("--prompt", metavar="TEXT", help="answer this one question; - reads it from stdin")
    add("--input", metavar="F.jsonl", help='answer every line: {"prompt"}, {"instruction", "input"} or {"messages"}')
    add("--output", metavar="F.jsonl", help="where the answers to --input go; run again to go on after a break")
    add("--batch_size", type=int, default=32, metavar="N", help="lines of --input answered side by side (32)")
    add("--raw", action="store_true", help="pass the text as it is, without the checkpoint's prompt format")
    add("--json", action="store_true", help="print one JSON object per answer")
    add("--max_new_tokens", type=int, metavar="N", help="longest answer")
    add("--temperature", type=float, metavar="X", help="0 always takes the likeliest token")
    add("--top_k", type=int, metavar="N", help="choose among the N likeliest tokens; 0: all")
    add("--top_p", type=float, metavar="X", help="choose among the likeliest tokens that hold X of the probability")
    add("--min_p", type=float, metavar="X", help="drop tokens less than X times as likely as the likeliest")
    add("--repetition_penalty", type=float, metavar="X", help="over 1 makes tokens of the answer less likely to recur")
    add("--seed", type=int, metavar="N", help="same seed, same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeatable")
    add(
        "--speculate",
        choices=["lookup", "off"],
        help="lookup: guess what followed the same words before and check several guesses at once, where that is "
        "faster; in float32 the text stays the same. Not for --input (off)",
    )
    add("--draft", metavar="DIR", help="let this smaller model, of the same tokenizer, make the guesses")
    add(
        "--on_overflow",
        choices=["drop", "refuse"],
        default="drop",
        help="when a dialogue outgrows the context: leave out its oldest turns (drop), or refuse the question",
    )
    add(
        "--offload",
        nargs="?",
        const="auto",
        metavar="N",
        help="keep N of the model's blocks in the CPU's memory and have them travel to the GPU for every token; "
        "without N: as few as must",
    )
    add(
        "--triage",
        choices=["on", "off"],
        default="on",
        help="say at once, before any model answers, what the rules in data/rules/ find urgent (on); not with --raw",
    )
    add(
        "--patient",
        metavar="CARD.json",
        help="age, sex, pregnancy, allergies, conditions, medications of who asks; /patient edits it in the chat",
    )
    add(
        "--feedback",
        metavar="FILE.db",
        help="in the chat, /good, /bad and /correct rate an answer and keep it here, once you have agreed",
    )
    add(
        "--diseases",
        metavar="FILE.db",
        help="answer from rows of this disease database (python -m data.prepare diseases), with citations; say what "
        "in an answer no cited row holds. Unless flags say otherwise, the likeliest tokens, which copy best",
    )
    add(
        "--kv_cache",
        choices=["full", "int8"],
        default="full",
        help="int8: what was read is remembered in 8 bits, a quarter of its memory on a CPU and half on a GPU (full)",
    )
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the weights are stored")
    add("--compile", action="store_true", help="single steps by torch.compile, 10-20 s at first use; slower on 2 cores")
    add("--kernels", default="auto", metavar="K", help="auto (our Triton kernels on a GPU), triton, torch, ...")
    add(
        "--verbose",
        action="store_true",
        help="say on stderr what was loaded and which kernels run (on a GPU it always does)",
    )
    args = p.parse_args(argv)
    if args.prompt is not None and args.input is not None:
        p.error("--prompt and --input exclude each other")
    if (args.input is None) != (args.output is None):
        p.error("--input and --output need each other")
    if args.prompt is None and args.input is None and (args.raw or args.json):
        p.error(f"{'--raw' if args.raw else '--json'} needs --prompt or --input")
    if args.feedback is not None and (args.raw or args.prompt is not None or args.input is not None):
        p.error("--feedback rates the answers of a chat: leave out --raw, --prompt and --input")
    if args.raw and (args.patient or args.diseases):
        p.error(f"--raw passes the text as it is: {'--patient' if args.patient else '--diseases'} has no place in it")
    if args.speculate and args.draft is not None:
        p.error("--speculate and --draft exclude each other")
    if args.input is not None and (args.speculate == "lookup" or args.draft is not None):
        p.error("--speculate and --draft are for one answer at a time; --input has --batch_size")
    if args.batch_size < 1:
        p.error(f"--batch_size is {args.batch_size}; it must be 1 or more")
    if args.offload not in (None, "auto"):
        if not args.offload.isdecimal() or int(args.offload) == 0:
            p.error(f"--offload is {args.offload}; it must be a number of blocks, 1 or more, or stand alone")
        args.offload = int(args.offload)
    if args.compile and (args.input is not None or LAUNCHED or args.offload):
        p.error("--compile is for one answer at a time on one device: not with --input, --offload or torchrun")
    if LAUNCHED and (args.speculate == "lookup" or args.draft is not None):
        p.error("--speculate and --draft go by the clock, which the ranks of torchrun do not share: leave them out")
    if LAUNCHED and (args.offload or args.adapter):
        p.error(
            "under torchrun there is no "
            + ("--offload: start more ranks" if args.offload else "--adapter: give the merged model")
        )
    return args


# --- what answers ---------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> Doctor:
    """Model, tokenizer, format and settings that the flags ask for. ValueError names what is wrong and the remedy."""
    from llama import checkpoint, placement

    path, adapter = Path(args.checkpoint or "."), args.adapter and Path(args.adapter)
    if adapter:
        from llama import lora_files

        lora_files.load_config(adapter)
        path = path if args.checkpoint is not None else lora_files.base_of(adapter)
        if other := lora_files.other_base(adapter, path):
            print(f"warning: {adapter} was made for {other}, whose weights are not those of {path}", file=sys.stderr)
    elif args.checkpoint is None:
        path = latest()

    params, max_new_tokens = placement.settings(path, vars(args))
    import torch

    import kernels
    from llama.generation import Doctor, stream

    dtype = args.dtype and getattr(torch, args.dtype)
    cache_dtype = torch.int8 if args.kv_cache == "int8" else None
    if LAUNCHED:
        model, device, rank, ranks = placement.over_ranks(path, args.device, dtype, args.kernels)
    else:
        device, rank, ranks = placement.found(args.device), 0, 1
        model = placement.on_device(path, device, dtype, args.kernels, adapter, args.offload)
    tokenizer = checkpoint.load_tokenizer(path)
    doctor = Doctor(
        name=f"{path} with {adapter}" if adapter else str(path),
        model=model,
        tokenizer=tokenizer,
        chat_format=checkpoint.load_chat_format(
            adapter if adapter and (adapter / "chat_format.json").exists() else path
        ),
        params=params,
        max_new_tokens=max_new_tokens,
        stop=tuple(args.stop),
        weights=f"int{scheme.bits}" if (scheme := checkpoint.load_scheme(path)) else "",
        drafter=_drafter(args, tokenizer, device, cache_dtype),
        on_overflow=args.on_overflow,
        rank=rank,
        ranks=ranks,
        compiled=args.compile,
        cache_dtype=cache_dtype,
    )
    doctor = dataclasses.replace(doctor, attendants=() if args.raw else _attendants(doctor, args))
    if ranks > 1 and args.seed is None:  # all must draw the same
        seed = doctor.shared(lambda: secrets.randbits(62))
        doctor = dataclasses.replace(doctor, params=dataclasses.replace(params, seed=seed))
    doctor.request([doctor.tokenizer.bos_id])  # checks the rest of the settings
    if args.compile:
        began = time.perf_counter()
        list(itertools.islice(stream(model, [tokenizer.bos_id], params, 3, context=doctor.context()), 3))
        print(f"compiled in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if args.verbose:
        print(doctor.describe(), file=sys.stderr)
    if args.verbose or args.kernels != "auto" or device != "cpu":  # on a CPU there is nothing to choose from
        print(kernels.describe(device), file=sys.stderr)
    return doctor


def _attendants(doctor: Doctor, args: argparse.Namespace) -> tuple[Attendant, ...]:
    """Who stands beside the model, as the flags ask. Rank 0's are asked, so they alone read files."""
    found: list[Attendant] = []

    def begin() -> None:
        from data.patient import Patient
        from data.person import Person
        from data.triage import Triage

        patient = None
        if args.patient is not None:
            patient = Patient(Path(args.patient).expanduser(), begin=args.prompt is None and args.input is None)
            found.append(patient)
        if args.feedback is not None:
            from data.feedback import Feedback, Rater

            found.append(Rater(Feedback(Path(args.feedback).expanduser()), doctor.name))
        if args.triage == "on":
            found.insert(0, Triage(patient.person if patient else Person))
        if args.diseases is not None:
            from data import grounding

            path = Path(args.diseases).expanduser()
            found.append(grounding.beside(path, doctor.tokenizer, doctor.chat_format, doctor.place()))

    doctor.shared(begin)
    return tuple(found)


def _drafter(
    args: argparse.Namespace, tokenizer: Tokenizer, device: str, cache_dtype: torch.dtype | None
) -> Drafter | None:
    if args.draft is None and args.speculate != "lookup":
        return None
    from llama.speculative import Drafter, DraftModel, Lookup

    if args.draft is None:
        return Drafter(Lookup())
    import torch

    from llama import checkpoint
    from llama.generation import lay_out_for_decoding

    path = Path(args.draft)
    other = checkpoint.load_tokenizer(path)
    if other.sha256 != tokenizer.sha256:
        raise ValueError(
            f"--draft {path}: its tokenizer ({other.vocab_size:,} pieces) is another than that of the model which "
            f"answers ({tokenizer.vocab_size:,}); a draft model needs the same tokenizer.model"
        )
    model = checkpoint.load_model(path, device, args.dtype and getattr(torch, args.dtype)).eval()
    lay_out_for_decoding(model)
    return Drafter(DraftModel(model, cache_dtype))


# --- one question ---------------------------------------------------------------------------------


def answer_one(doctor: Doctor, args: argparse.Namespace) -> None:
    """Answer --prompt on stdout."""
    from llama.generation import Answer

    text = doctor.shared(_read_stdin) if args.prompt == "-" else args.prompt
    dialogue = None if args.raw else doctor.question(text)
    before = doctor.before(dialogue) if dialogue else []
    for said in before:  # at once, and on stdout: it belongs to the answer, whoever reads that
        show(said, sys.stderr if args.json else sys.stdout)
    ids = doctor.fit(dialogue)[0] if dialogue else doctor.raw_ids(text)
    answer = Answer(doctor.request(ids, args.raw), doctor.tokenizer)
    screen = Screen(sys.stdout)
    try:
        for piece in answer.stream(doctor.model, doctor.context(), drafter=doctor.drafter):
            if not args.json:
                screen.write(piece)
    finally:  # also after Ctrl-C, which under torchrun ends the ranks where they stand: none asks the others then
        asked = dialogue if answer.finish_reason or doctor.ranks == 1 else None
        after = doctor.after(asked, answer.text) if asked else []
        if args.json:
            print(_line({**_notices(doctor, asked, before, after, answer), **answer.to_json()}), flush=True)
        else:
            screen.end()
            for said in after:
                show(said, sys.stdout)


def _notices(
    doctor: Doctor, dialogue: Dialogue | None, before: list[str], after: list[str], answer: Answer
) -> dict[str, Any]:
    """The fields of an answer for what attendants said, where there are attendants."""
    # Asked on every rank, also where only rank 0 has attendants; on none that another may not come to any more.
    fields = doctor.fields(dialogue, answer.text) if dialogue else {}
    return {"before": before, "after": after, **fields} if doctor.attendants else {}


def _line(value: Any) -> str:
    """One line of JSON in UTF-8; escaped where the text is not valid Unicode and could not be written otherwise."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(value)
    return line


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"stdin is not valid UTF-8 at byte {e.start}") from None


# --- a file of questions --------------------------------------------------------------------------


def answer_file(doctor: Doctor, args: argparse.Namespace) -> int:
    """Answer every line of --input into --output; the number of lines that could not be answered.

    One line of output per line of input: the record, its line number, and the answer or the error. They are written as
    they end, and put into the order of the input when all are there. Lines that an earlier run answered are kept and
    not run again.
    """
    from tqdm import tqdm

    from llama.batching import Batch

    source, target = Path(args.input), Path(args.output)
    records, answered = doctor.shared(lambda: _begin(source, target))
    todo = deque(r for r in records if r[0] not in answered)
    batch = Batch(doctor.model, doctor.tokenizer, args.batch_size, cache_dtype=doctor.cache_dtype)
    open_lines: dict[Answer, tuple[int, Any, Dialogue | None, list[str]]] = {}
    rejected, tokens, began = 0, 0, time.perf_counter()
    with (
        (target if doctor.rank == 0 else Path(os.devnull)).open("a", encoding="utf-8") as out,
        tqdm(total=len(records), initial=len(answered), unit=" answers", disable=None, file=sys.stderr) as bar,
    ):

        def write(line: int, record: Any, result: dict[str, Any]) -> None:
            out.write(_line({"line": line, "record": record, **result}) + "\n")
            out.flush()
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tok/s", refresh=False)
            bar.update()

        while todo or batch:
            while todo and len(batch) < 2 * args.batch_size:  # enough that wait for the next free rows
                line, record, error = todo.popleft()
                before: list[str] = []
                try:
                    if error:
                        raise ValueError(error)
                    asked = _question(doctor, record, args.raw)
                    dialogue = asked if isinstance(asked, Dialogue) else None
                    before = doctor.before(dialogue) if dialogue else []
                    ids, left_out = _fitted(doctor, asked)
                    if left_out:
                        bar.write(f"{source} line {line}: the oldest {left_out} turns are left out", file=sys.stderr)
                    open_lines[batch.submit(doctor.request(ids, args.raw))] = line, record, dialogue, before
                except ValueError as e:
                    rejected += 1
                    bar.write(f"error: {source} line {line}: {e}", file=sys.stderr)
                    write(line, record, {**({"before": before} if before else {}), "error": str(e)})
            for answer, *_ in batch.step():
                tokens += 1
                if answer.failure:
                    line, record, _, before = open_lines.pop(answer)
                    rejected += 1
                    bar.write(f"error: {source} line {line}: {answer.failure}", file=sys.stderr)
                    write(line, record, {**({"before": before} if before else {}), "error": answer.failure})
                elif answer.finish_reason:
                    line, record, dialogue, before = open_lines.pop(answer)
                    after = doctor.after(dialogue, answer.text) if dialogue else []
                    write(line, record, {**_notices(doctor, dialogue, before, after, answer), **answer.to_json()})
    if doctor.rank == 0:
        _rewrite(target, dict(_numbered(target.read_bytes())))
    done = len(records) - rejected
    print(f"{target}: {done:,} of {len(records):,} lines answered, {rejected:,} rejected", file=sys.stderr)
    return rejected


def _begin(source: Path, target: Path) -> tuple[list[tuple[int, Any, str | None]], set[int]]:
    """The records of source, and those of their lines that target answers already."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--input and --output are both {target}")
    records = list(_read_records(source))
    return records, _resume(target, {line: record for line, record, _ in records})


def _numbered(lines: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of an output file with the numbers of the input's lines that they answer."""
    for line in lines.splitlines():
        yield json.loads(line)["line"], line


def _rewrite(path: Path, lines: dict[int, bytes]) -> None:
    """Put these lines into the file in the order of their numbers, or change nothing."""
    whole = path.with_name(path.name + ".tmp")
    whole.write_bytes(b"".join(lines[n] + b"\n" for n in sorted(lines)))
    os.replace(whole, path)


def _read_records(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(line number, record, what is wrong with it) of every line that is not empty."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line), None
        except UnicodeDecodeError as e:
            yield number, None, f"not valid UTF-8 at byte {e.start}"
        except (ValueError, RecursionError) as e:
            yield number, None, f"not JSON ({getattr(e, 'msg', 'nested too deeply')})"


def _question(doctor: Doctor, record: Any, raw: bool) -> Dialogue | str:
    """What one record asks, raw: its text alone. ValueError says what it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, this is {type(record).__name__}")
    if "messages" in record and not raw:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise ValueError("messages must be a list of objects with role and content")
        dialogue = Dialogue(tuple(Message(m["role"], m["content"]) for m in messages))
        if dialogue.messages[0].role != "system":
            dialogue = Dialogue((*doctor.chat_format.opening(), *dialogue.messages))
        if dialogue.messages[-1].role != "user":
            raise ValueError("messages must end with the user's turn")
        return dialogue
    key = "prompt" if "prompt" in record else "input"
    text, instruction = record.get(key), record.get("instruction")
    if not isinstance(text, str):
        raise ValueError(f"no text under prompt, input{'' if raw else ' or messages'}")
    if key == "input" and isinstance(instruction, str) and not raw:
        turns = (Message("system", instruction), Message("user", text)) if text else (Message("user", instruction),)
        return Dialogue(turns)
    return text if raw else doctor.question(text)


def _fitted(doctor: Doctor, asked: Dialogue | str) -> tuple[list[int], int]:
    """Prompt ids of what a record asks, and how many of its oldest turns had to be left out."""
    if isinstance(asked, Dialogue):
        return doctor.fit(asked)
    from llama.generation import room_for

    ids = doctor.raw_ids(asked)
    room_for(doctor.model, ids, 1)
    return ids, 0


_HEAD = b'{"line": '  # how every line of --output begins


def _resume(path: Path, records: dict[int, Any]) -> set[int]:
    """Lines answered by an earlier run; the file is left with those alone. ValueError if it is not such a run's."""
    if not path.exists():
        try:
            path.touch()
        except OSError as e:
            raise ValueError(f"{path}: cannot be written ({e.strerror})") from None
        return set()
    kept: dict[int, bytes] = {}
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
            # A rejected line may have been put right since.
            same = "error" in answer or answer["record"] == records[answer["line"]]
        except (ValueError, KeyError, TypeError):
            if i == len(lines) - 1 and line[: len(_HEAD)] == _HEAD[: len(line)]:
                continue  # torn by a kill in the middle of a write
            same = False
        if not same:
            raise ValueError(f"{path} exists and line {i + 1} is no answer to this --input; choose another --output")
        if "error" not in answer:
            kept[answer["line"]] = line
    _rewrite(path, kept)
    return set(kept)


# --- which of them --------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    args = parse(argv)
    doctor = load(args)
    if args.prompt is not None:
        answer_one(doctor, args)
    elif args.input is not None:
        return 2 if answer_file(doctor, args) else 0
    else:
        from llama.terminal import Chat

        Chat(doctor).run()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except RuntimeError as e:
        from llama import planner

        if planner.is_out_of_memory(e):
            spare = "take --dtype bfloat16 or a quantised model" if "CPU" in str(e) else "free memory with --offload"
            print(f"error: {planner.first_line(e)}; shorten the dialogue, or {spare}", file=sys.stderr)
            return 2
        if LAUNCHED:
            from llama.elastic import lost_peer

            if lost_peer(e):  # the other rank has said why, or was told to end
                return 1
        raise
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our answers has gone; nothing is left to say, and no more to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def fall_silent() -> None:
    """Rank 0 alone reads and writes; the others, which do the same, only say what a bug does to them."""
    sys.stdin, sys.stdout = open(os.devnull), open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stdout
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def leave(status: int) -> NoReturn:
    """End a rank, as all ranks do."""
    from llama import parallel

    parallel.leave(status)


if __name__ == "__main__":
    if LAUNCHED and os.environ["RANK"] != "0":
        fall_silent()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that cannot show a letter
    if not LAUNCHED:
        sys.exit(main())
    try:
        leave(main())
    except SystemExit as e:  # a wrong flag, or Ctrl-C, which may also come on the way out
        leave(int(e.code or 0))
    except KeyboardInterrupt:  # once more
        leave(130)
