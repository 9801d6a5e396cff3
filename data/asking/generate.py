"""The disease database -> dialogues, through any OpenAI-compatible endpoint: the run, its file and its command line.

    python -m data.prepare generate diseases.db dialogues.jsonl --endpoint http://localhost:8000/v1 --model NAME

What is asked: prompts.py. What is kept: filter.py. Every reply is on the disk (OUT.journal) before
its thread asks again; the same command goes on from there, and what was answered is not asked, or paid, twice. OUT is
made of the journal: the same replies give the same file, in whatever order they came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.asking.client import Endpoint, SetAside, Stopped
from data.asking.filter import Lexicon, Seen, judge
from data.asking.journal import Journal
from data.asking.prompts import PASSES, Request, requests
from data.asking.spending import Budget, Prices, Tokens
from data.diseases import Entry, open_database
from llama.chat import DOCTOR_INSTRUCTION
from llama.command_line import Parser
from llama.files import atomic_file

# LLaMA's tokenizer over every 50th prompt of format_dataset.csv, and over every 20th dialogue of ChatDoctor's 5k set.
CHARACTERS_A_TOKEN, TOKENS_A_DIALOGUE = 3.45, 100
OVERHEAD = 64  # tokens that a server's chat template may add to a prompt
ROWS_SHOWN = 2  # by --dry_run


class Run:
    """All that the threads share: who is asked, what was answered, what it may cost."""

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint, journal: Journal) -> None:
        self.model, self.seed, self.concurrency = args.model, args.seed, args.concurrency
        self.endpoint, self.journal = endpoint, journal
        self.options = options(args)
        self.prices = Prices(args.price_in, args.price_out)
        self.budget = Budget(args.budget, self.prices.cost(journal.spent))
        self.set_aside: dict[str, str] = {}  # key -> why

    def most(self, request: Request) -> Tokens:
        """The most tokens that an attempt can take: no tokenizer makes more tokens than there are bytes."""
        read = sum(len(m["content"].encode()) for m in request.messages) + OVERHEAD
        return Tokens(read, reply_limit(self.options))

    def answer(self, request: Request) -> bool:
        """Ask, and keep what comes; whether anything came. The caller has set aside what an attempt can cost."""
        key, most = request.key(self.model, self.seed), self.most(request)
        cost = self.prices.cost(most)
        held, paid = cost, 0.0

        def lost(reason: str) -> bool:
            nonlocal held
            self.budget.settle(held, cost)
            room = self.budget.set_aside(cost)
            held = cost if room else 0.0
            self.journal.attempt_lost(key, reason, most)
            return room

        body = {"model": self.model, "messages": request.messages, "seed": int(key[:7], 16), **self.options}
        try:
            reply = self.endpoint.ask({k: v for k, v in body.items() if v is not None}, lost)
            used = reply.used or most
            paid = self.prices.cost(used)
            self.journal.reply(key, reply, used)
        except SetAside as e:
            self.set_aside[key] = str(e)
            return False
        finally:
            self.budget.settle(held, paid)
        return True


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What a request says besides model, messages and seed; null leaves a field out."""
    return {"temperature": args.temperature, "max_tokens": args.max_tokens, **args.body}


def reply_limit(options: dict[str, Any]) -> int:
    """Tokens that a reply has at most, by either of the names that servers know it by; 0 for no limit."""
    limit = options.get("max_tokens") or options.get("max_completion_tokens")
    return limit if type(limit) is int and limit > 0 else 0


def ask_all(run: Run, todo: Sequence[Request], bar: tqdm[Any]) -> str:
    """Ask for all of these; "" when each was asked, else why not: "stopped" or "budget".

    ValueError: the endpoint takes none of them, or so many in a row failed that it must be down.
    """
    waiting, running = deque(todo), dict[Future[bool], Request]()
    end, failures, error = "", 0, None
    with ThreadPoolExecutor(run.concurrency) as pool:
        while waiting or running:
            while waiting and len(running) < run.concurrency:
                if run.endpoint.stop.is_set() or not run.budget.set_aside(run.prices.cost(run.most(waiting[0]))):
                    break
                request = waiting.popleft()
                running[pool.submit(run.answer, request)] = request
            if not running:
                end = "stopped" if run.endpoint.stop.is_set() else "budget"
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                try:
                    failures = 0 if future.result() else failures + 1
                except Stopped:
                    end = "stopped"
                    continue
                except ValueError as e:  # the others, on their way, still bring what was paid for
                    error = error or e
                    run.endpoint.stop.set()
                    continue
                bar.update()
                bar.set_postfix_str(_spent(run.journal.spent, run.prices), refresh=False)
                if failures == max(5, run.concurrency) and error is None:
                    why = list(run.set_aside.values())[-1]
                    error = ValueError(f"{run.endpoint.url}: {failures} requests in a row failed, the last: {why}")
                    run.endpoint.stop.set()
    if error is not None:
        kept = len(run.journal.replies)
        raise ValueError(f"{error}{f'; {kept:,} replies are kept in {run.journal.path}' * (kept > 0)}")
    return end


def _spent(tokens: Tokens, prices: Prices) -> str:
    text = f"{tokens.prompt:,} + {tokens.completion:,} tokens"
    return text + (f", cost {prices.cost(tokens):,.4f}" if prices != Prices() else "")


@contextlib.contextmanager
def _signals(endpoint: Endpoint) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sends nothing more and waits for what is on its way; the second ends at once."""

    def handler(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        endpoint.stop.set()
        tqdm.write("stopping: waiting for the replies on their way (once more ends at once)", file=sys.stderr)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --- the result -----------------------------------------------------------------------------------


def write_out(out: Path, run: Run, asked: Sequence[Request], lexicon: Lexicon) -> tuple[int, Counter[str]]:
    """Write the dialogues, and beside them what was refused; how many were kept, and why others were not."""
    answered = [(r, run.journal.replies[k]) for r in asked if (k := r.key(run.model, run.seed)) in run.journal.replies]
    kept, refused, reasons = [], [], Counter[str]()
    bar = tqdm(judge(answered, lexicon), "reading replies", len(answered), delay=0.5, disable=None, file=sys.stderr)
    for (request, question, answer, reason), (_, reply) in zip(bar, answered, strict=True):
        of = {"condition": request.entry.name, "pass": request.about, "symptoms": list(request.symptoms)}
        of |= {"row": request.entry.id, "source": request.entry.source, "source_row": request.entry.source_row}
        if reason:
            reasons[reason.partition(":")[0]] += 1
            refused.append({"reason": reason, "reply": reply.text, **of})
        else:
            record = {"instruction": DOCTOR_INSTRUCTION, "input": question, "output": answer}
            kept.append({**record, **of, "model": run.model})
    for key, why in run.set_aside.items():
        refused.append({"reason": "no reply", "why": why, "key": key})
    _write_lines(beside(out, "rejected"), refused)
    _write_lines(out, kept)
    return len(kept), reasons


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as file:
        file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def beside(out: Path, kind: str) -> Path:
    return out.with_name(f"{out.name}.{kind}")


def report(out: Path, run: Run, asked: Sequence[Request], kept: int, reasons: Counter[str], end: str) -> str:
    """What was asked, what it cost, what was kept and why not more."""
    answered = sum(r.key(run.model, run.seed) in run.journal.replies for r in asked)
    lines = [
        f"{len(asked):,} requests: {answered:,} answered, {len(run.set_aside):,} set aside, "
        f"{len(asked) - answered - len(run.set_aside):,} not made",
        f"  {_spent(run.journal.spent, run.prices)}; {run.journal.lost:,} attempts lost that may have been paid for",
        f"{kept:,} dialogues in {out}; {answered - kept:,} rejected, see {beside(out, 'rejected')}",
        *(f"  {n:7,}  {reason}" for reason, n in reasons.most_common()),
    ]
    if end == "budget":
        lines.append(f"the budget of {run.budget.limit:g} has no room for another request; raise it to go on")
    if run.set_aside:
        lines.append("the same command asks once more for what was set aside")
    return "\n".join(lines)


# --- command line ---------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m data.prepare generate", __doc__)
    parser.add_argument("src", metavar="DB", help="disease database, made by python -m data.prepare diseases")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="dialogues; OUT.jsonl.journal keeps the replies")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="as the endpoint calls it")
    parser.add_argument("--key_env", metavar="VAR", help="environment variable that holds the API key (none is sent)")
    parser.add_argument("--seed", type=int, default=0, help="draws symptoms and manners; a seed, a set of dialogues")
    parser.add_argument("--subsets", type=int, default=5, metavar="N", help="symptom questions a disease (5)")
    parser.add_argument("--rows", type=int, metavar="N", help="only the first N rows, for a taste")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests on their way at a time (8)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for a whole reply (120)")
    parser.add_argument("--temperature", type=float, default=0.9, help="of the model (0.9)")
    parser.add_argument("--max_tokens", type=int, default=400, metavar="N", help="a reply at most (400)")
    extra = "fields to add to every request; null leaves one out"
    parser.add_argument("--body", type=json.loads, default={}, metavar="JSON", help=extra)
    parser.add_argument("--price_in", type=float, default=0.0, metavar="X", help="price of a million tokens of prompt")
    parser.add_argument("--price_out", type=float, default=0.0, metavar="X", help="price of a million tokens written")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="X", help="stop before this much is spent")
    parser.add_argument("--dry_run", action="store_true", help="show some prompts and what to expect; ask nothing")
    args = parser.parse_args(argv)
    for name, least in (("subsets", 0), ("rows", 1), ("concurrency", 1), ("max_tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    for name in ("timeout", "temperature", "price_in", "price_out", "budget"):
        value = getattr(args, name)
        endless = value == math.inf and name != "budget"
        if math.isnan(value) or endless or value < 0 or (value == 0 and name in ("timeout", "budget")):
            parser.error(f"--{name} is {value:g}; it must be a positive number")
    if not isinstance(args.body, dict) or args.body.keys() & {"model", "messages", "stream", "n"}:
        parser.error("--body is a JSON object such as '{\"top_p\": 0.9}', without model, messages, stream and n")
    if args.budget < math.inf and not args.price_in + args.price_out:
        parser.error("--budget needs --price_in and --price_out, what a million tokens cost")
    if args.budget < math.inf and not reply_limit(options(args)):
        parser.error("--budget needs a limit of the reply: max_tokens or max_completion_tokens")
    return args


def generate(args: argparse.Namespace) -> int:
    """Ask, keep, filter, write. ValueError for what is wrong; the exit code, 130 when stopped before the end."""
    entries = open_database(args.src).diseases()
    asked = list(requests(entries[: args.rows], args.seed, args.subsets))
    if not asked:
        raise ValueError(f"{args.src}: its rows have no tests, medications or symptoms to ask about")
    if args.dry_run:
        print(preview(args, asked))
        return 0
    return _run(args, entries, asked)


def _run(args: argparse.Namespace, entries: Sequence[Entry], asked: Sequence[Request]) -> int:
    key = os.environ.get(args.key_env, "") if args.key_env else ""
    if args.key_env and not key:
        raise ValueError(f"--key_env {args.key_env}: there is no such environment variable, or it is empty")
    Seen()  # what is missing for the filter is said before anything is paid for
    settings = {"model": args.model, "seed": args.seed, **options(args)}
    endpoint = Endpoint(args.endpoint, key=key, connections=args.concurrency, timeout=args.timeout)
    try:
        journal = _open_journal(args.out, settings)
        with journal, _signals(endpoint):
            run = Run(args, endpoint, journal)
            todo = [r for r in asked if r.key(args.model, args.seed) not in journal.replies]
            counted = tqdm(total=len(asked), initial=len(asked) - len(todo), unit=" dialogues", disable=None)
            with counted as bar:
                end = ask_all(run, todo, bar)
            if end == "stopped":
                print(f"stopped: {len(journal.replies):,} replies are in {journal.path}; the same command goes on from "
                      f"there and then writes {args.out}", file=sys.stderr)  # fmt: skip
                return 130
            kept, reasons = write_out(args.out, run, asked, Lexicon(entries))
            print(report(args.out, run, asked, kept, reasons, end), file=sys.stderr)
    except OSError as e:
        where = beside(args.out, "journal")
        raise ValueError(f"{args.out}: cannot be written ({e.strerror}); the replies are in {where}") from None
    finally:
        endpoint.close()
    return 0


def _open_journal(out: Path, settings: dict[str, Any]) -> Journal:
    path = beside(out, "journal")
    if out.is_dir():
        raise ValueError(f"{out}: is a directory; name a file")
    for file in (out, beside(out, "rejected")):
        if file.exists() and not path.exists():
            raise ValueError(f"{file}: exists, and no {path.name} says that it was made here; choose another OUT")
    return Journal(path, settings)


def preview(args: argparse.Namespace, asked: Sequence[Request]) -> str:
    """Prompts of a few rows, and about how much there would be to ask and to pay."""
    shown = list(dict.fromkeys(r.entry.id for r in asked))[:ROWS_SHOWN]
    first = {(r.entry.id, r.about): r for r in reversed(asked)}
    wanted = [(id_, about) for id_ in shown for about in PASSES if (id_, about) in first]
    parts = [f"--- row {id_}, {about}\n{first[id_, about].prompt}" for id_, about in wanted]
    characters = sum(len(m["content"]) for r in asked for m in r.messages)
    tokens = Tokens(round(characters / CHARACTERS_A_TOKEN), TOKENS_A_DIALOGUE * len(asked))
    counts = Counter(r.about for r in asked)
    parts.append(
        f"--- {len(asked):,} requests about {len({r.entry.id for r in asked}):,} rows "
        f"({', '.join(f'{n:,} {about}' for about, n in counts.items())}); "
        f"about {_spent(tokens, Prices(args.price_in, args.price_out))}, at most {args.max_tokens:,} a reply"
    )
    return "\n\n".join(parts)
