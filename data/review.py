"""Rated answers -> decisions of a reviewer -> records that train.py reads, without what identifies a person.

`python -m data.prepare review FILE.db` asks about one rating after the other; `python -m data.prepare feedback FILE.db
OUT.jsonl` writes what was approved: good answers and corrections to learn from, and OUT.pairs.jsonl, where each
correction is preferred to the answer that it corrects, for --objective dpo. `--erase N ...` erases instead.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.clean import clean
from data.feedback import Feedback, Rated
from llama.chat import Message
from llama.files import atomic_file

Scrub = Callable[[str], str]  # a text without what identifies a person
CHOICES = "a approve, e edit the answer, r reject, d delete, s skip, q quit"


# --- reviewing ------------------------------------------------------------------------------------


def show(rated: Rated, width: int = 79) -> str:
    """A rating as a reviewer sees it."""
    lines = [f"--- rating {rated.id}, {rated.made}, {rated.rating}, model {rated.model} ---"]
    texts = [(m.role, m.content) for m in rated.messages]
    texts += [("answer", rated.answer), ("reason", rated.reason), ("correction", rated.correction)]
    for label, text in texts:
        for i, paragraph in enumerate(text.split("\n") if text else []):
            first = f"{label}: " if i == 0 else "  "
            lines.append(textwrap.fill(paragraph, width, initial_indent=first, subsequent_indent="  "))
    return "\n".join(lines)


def review(feedback: Feedback, reviewer: str, ask: Callable[[str], str], tell: Callable[[str], None]) -> int:
    """Put every new rating before a reviewer; how many were decided. ask(prompt) raises EOFError at the end of input.

    Each decision is stored at once, so breaking off loses nothing.
    """
    waiting = feedback.ratings("new")
    decided = 0
    for at, rated in enumerate(waiting, 1):
        tell(f"\n{show(rated)}\n({at} of {len(waiting)}: {CHOICES})")
        try:
            while True:
                answer = ask("> ").strip().lower()
                if answer == "q":
                    return decided
                if answer == "s":
                    break
                if _decide(feedback, rated, answer, reviewer, ask, tell):
                    decided += 1
                    break
        except EOFError:
            return decided
    return decided


def _decide(
    feedback: Feedback,
    rated: Rated,
    choice: str,
    reviewer: str,
    ask: Callable[[str], str],
    tell: Callable[[str], None],
) -> bool:
    if choice == "a":
        if rated.rating == "bad" and not rated.correction:
            tell("a bad answer without a correction teaches nothing: e gives one, r puts it aside")
            return False
        feedback.decide(rated.id, "approved", reviewer)
    elif choice == "e":
        text = ask("the answer should be: ").strip()
        if not text:
            tell("nothing was changed")
            return False
        feedback.decide(rated.id, "approved", reviewer, text)
    elif choice == "r":
        feedback.decide(rated.id, "rejected", reviewer)
    elif choice == "d":
        feedback.erase(rated.id)
    else:
        tell(CHOICES)
        return False
    return True


def at_terminal(source: str, reviewer: str) -> None:
    """review(), asking whoever sits at stdin."""
    feedback = Feedback(source, create=False)
    try:
        decided = review(feedback, reviewer, input, print)
    except KeyboardInterrupt:  # every decision is stored already
        decided = None
    left = len(feedback.ratings("new"))
    done = "stopped" if decided is None else f"{decided} decided"
    print(f"\n{done}, {left} left; export with: python -m data.prepare feedback {source} learn.jsonl")


# --- exporting ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """Lines of the two files, and ratings that are not in them, by the reason."""

    records: list[str]
    pairs: list[str]
    left_out: dict[str, int]


def export(ratings: Iterable[Rated], scrub: Scrub) -> Exported:
    """What was approved, each text scrubbed, as `{messages}` and `{prompt, chosen, rejected}` records.

    The same conversation with the same answer is taken once. Model and number go along, for whoever asks later.
    """
    records: dict[str, str] = {}
    pairs: dict[str, str] = {}
    left_out = {"not reviewed": 0, "rejected": 0, "twice": 0}
    for rated in ratings:
        if rated.status != "approved":
            left_out["not reviewed" if rated.status == "new" else "rejected"] += 1
            continue
        messages = _scrubbed(rated.messages, scrub)
        chosen, before = scrub(rated.correction or rated.answer), scrub(rated.answer)
        source = {"source": {"rating": rated.id, "model": rated.model, "reviewer": rated.reviewer}}
        key = json.dumps([messages, chosen])
        if key in records:
            left_out["twice"] += 1
            continue
        records[key] = _line({"messages": [*messages, _answer(chosen)], **source})
        if rated.correction and before != chosen:
            pair = {"prompt": messages, "chosen": [_answer(chosen)], "rejected": [_answer(before)]}
            pairs[key] = _line(pair | source)
    return Exported(list(records.values()), list(pairs.values()), left_out)


def _scrubbed(messages: Sequence[Message], scrub: Scrub) -> list[dict[str, str]]:
    return [{"role": m.role, "content": scrub(m.content)} for m in messages]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_export(source: str, target: str) -> None:
    """export() of a file of ratings into `target` and the pairs beside it; says how many. ValueError if there is none.

    Names, addresses and the like become placeholders, as `python -m data.prepare clean` makes them.
    """
    out = Path(target)
    if out.resolve() == Path(source).resolve():
        raise ValueError(f"{target}: is the file of ratings itself; choose another name")
    found = export(Feedback(source, create=False).ratings(), clean)
    counts = ", ".join(f"{n} {reason}" for reason, n in found.left_out.items() if n) or "none"
    if not found.records:
        raise ValueError(f"{source}: nothing is approved ({counts}); `python -m data.prepare review {source}`")
    for file, lines in ((out, found.records), (pairs_file(out), found.pairs)):
        with atomic_file(file, sum(map(len, lines)) * 4) as staged:
            staged.write_text("".join(lines), encoding="utf-8")
    print(f"{len(found.records)} records in {out}, {len(found.pairs)} pairs in {pairs_file(out)}; left out: {counts}")


def pairs_file(out: Path) -> Path:
    """Where the pairs go beside the records of an export."""
    return out.with_suffix(".pairs.jsonl")


# --- erasing --------------------------------------------------------------------------------------


def erase(source: str, numbers: Sequence[int] | None) -> None:
    """Overwrite those ratings, or all of them and the consent; says how many. ValueError if one is not there."""
    feedback = Feedback(source, create=False)
    if numbers is None:
        erased = feedback.withdraw()
    else:
        missing = sorted(set(numbers) - {r.id for r in feedback.ratings()})
        if missing:
            raise ValueError(f"{source}: there is no rating {missing[0]}; nothing was erased")
        erased = sum(feedback.erase(n) for n in set(numbers))
    print(f"{source}: ratings erased: {erased}; what was exported before still holds them")
