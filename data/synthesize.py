"""The table of conditions -> dialogues: patient questions and doctor answers, a pure function of a seed.

train.py trains its default model on sample(); `python -m data.synthesize --n 5000 --output F.jsonl` writes records in
Alpaca's shape. Held-out questions are never training questions in three ways: their sentence frames are apart, their
sets of symptoms are apart (by a hash of condition and symptoms), and in split "unseen_wordings" every symptom is said
in words that no training question uses. Not medical advice: the answers are templates over a small table.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from data.conditions import Condition, Table, listed, load_table
from llama.chat import DOCTOR_INSTRUCTION, Dialogue, Message

Split = Literal["train", "held_out", "unseen_wordings"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "unseen_wordings")

SIZES, SIZE_WEIGHTS = (2, 3, 4, 5), (2, 4, 3, 1)  # symptoms in a question, and how often
HELD_OUT_SHARE = 1 / 8  # of every condition's sets of symptoms


@dataclass(frozen=True)
class Example:
    """One question and answer, and what they are about: `symptoms` are the names behind the question's wordings."""

    condition: str
    symptoms: tuple[str, ...]
    question: str
    answer: str

    @property
    def dialogue(self) -> Dialogue:
        """Without an instruction: the prompt stays short, which a small model needs."""
        return Dialogue((Message("user", self.question), Message("assistant", self.answer)))


@dataclass(frozen=True)
class Frames:
    """The sentences around the symptoms of a question (often none), and the ways to string symptoms together."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    durations: tuple[str, ...]
    joints: tuple[tuple[str, str], ...]  # between symptoms, before the last one; a full stop starts a new sentence


# Many and varied: with a third of these, 95 % were named right in new questions with them and 67 % in held-out ones.
TRAIN_FRAMES = Frames(
    openings=(
        *[""] * 12,
        *["Doctor, "] * 4,
        "Hello doctor, ",
        "Hi, ",
        "Good morning, ",
        "Hello, ",
        "Dear doctor, ",
        "Good afternoon doctor, ",
        "Please help: ",
        "My problem is this: ",
        "Here is what I feel: ",
        "Since {n} days ago, ",
        "For {n} months now, ",
        "These days, ",
        "Hi doctor. ",
        "I have a question. ",
        "I am worried. ",
        "I need your advice, doctor. ",
        "Thanks for reading this. ",
        "I hope you can help me. ",
        "Sorry to disturb you. ",
        "I do not know what to do. ",
        "My wife told me to ask you. ",
        "I never had this before. ",
        "Can I ask you something? ",
        "May I describe my case? ",
        "I am {age} years old. ",
        "I am {age} and usually healthy. ",
        "Hello, I am {age}. ",
        "Age {age}. ",
        "I turned {age} this year. ",
        "I work in an office. ",
        "I live alone. ",
    ),
    closings=(
        *[""] * 16,
        " What could it be?",
        " What is wrong with me?",
        " What should I do?",
        " Is it serious?",
        " Is this dangerous?",
        " Do I need a test?",
        " Which tests do I need?",
        " What can I take for it?",
        " Is there a medicine for it?",
        " Can you help me?",
        " Please advise.",
        " Please tell me what you think.",
        " Should I be worried?",
        " Should I see a specialist?",
        " Do I need to see someone today?",
        " Can I wait until next week?",
        " What do I have?",
        " What is the cause?",
        " What would you suggest?",
        " Could it be something bad?",
        " How long will it last?",
        " Will it pass on its own?",
        " Am I very ill?",
        " I look forward to your answer.",
        " Many thanks.",
        " Thank you.",
    ),
    durations=(
        *[""] * 16,
        " It started {n} days ago.",
        " It started on Monday.",
        " This has been going on for {n} weeks.",
        " It has been like this for {n} months.",
        " That was {n} hours ago.",
        " It began yesterday.",
        " It began at work.",
        " I have had this for a while.",
        " I have never felt like this.",
        " It is getting worse.",
        " It gets a bit better and then worse again.",
        " Nothing helps.",
        " It comes and goes.",
        " It is there all day.",
        " I first noticed it {n} days ago.",
        " My friends tell me to see you.",
        " I am quite scared.",
        " I could not go to work today.",
        " I tried to rest, but it did not help.",
        " I take no medicines.",
        " Last year I was fine.",
    ),
    joints=(
        (", ", " and "),
        (", ", " and "),
        (" and ", " and "),
        (". ", ". "),
        (". Also, ", ". "),
        (", ", ", "),
        (". ", ". And "),
        (", and ", ", and "),
        (", plus ", ", plus "),
        (" - ", " - "),
        (". Then ", ". Lately, "),
        (". In addition, ", ". Now "),
        (". Moreover, ", ". Sometimes "),
        (", besides that ", ", and on top "),
        (", but also ", ", and now "),
    ),
)

HELD_OUT_FRAMES = Frames(
    openings=(
        "",
        "Good evening doctor, ",
        "Could you help me, doctor? ",
        "Excuse me, ",
        "Hey doc, ",
        "I would like your opinion. ",
        "At the age of {age}, this troubles me: ",
    ),
    closings=(
        "",
        " What might this be?",
        " Which illness is this?",
        " Any idea what I have got?",
        " How is this treated?",
        " Do I have to go to hospital?",
        " I am grateful for any advice.",
    ),
    durations=(
        "",
        " All this for about {n} days now.",
        " It has bothered me since last week.",
        " It will not go away.",
    ),
    joints=(("; ", "; and "), (", then ", " and also "), (". On top of that, ", ". Besides, "), (", also ", ", and ")),
)


# --- questions ------------------------------------------------------------------------------------


Sets = dict[int, list[tuple[str, ...]]]  # sets of symptoms by size


def symptom_sets(table: Table, condition: Condition) -> tuple[Sets, Sets]:
    """What may be asked about a condition: the sets of its symptoms for training, and those kept from it.

    A set counts if no other condition has all of it, so that every question has an answer. Kept are the eighth of the
    sets whose hashes are smallest: whatever the seed, a set is on one side for good.
    """
    every = [picked for size in SIZES for picked in combinations(condition.symptoms, size)]
    answerable = [p for p in every if len(frozenset.intersection(*(table.owners[s] for s in p))) == 1]
    answerable.sort(key=lambda p: zlib.crc32(f"{condition.name}: {'; '.join(sorted(p))}".encode()))
    kept = max(1, round(len(answerable) * HELD_OUT_SHARE))
    return _by_size(answerable[kept:]), _by_size(answerable[:kept])


def _by_size(sets: list[tuple[str, ...]]) -> Sets:
    return {size: some for size in SIZES if (some := [p for p in sets if len(p) == size])}


def pick_symptoms(rng: random.Random, sets: Sets) -> list[str]:
    """A set by the weights of its size, in random order."""
    weights = [w for size, w in zip(SIZES, SIZE_WEIGHTS, strict=True) if size in sets]
    picked = list(rng.choice(sets[rng.choices(list(sets), weights)[0]]))
    rng.shuffle(picked)
    return picked


def ask(rng: random.Random, frames: Frames, wordings: Sequence[str]) -> str:
    """A patient's question of these wordings (see symptoms.txt: noun phrases, or clauses marked or beginning so)."""
    between, last = rng.choice(frames.joints)
    text, phrase_open = "", False
    for i, wording in enumerate(wordings):
        joint = "" if i == 0 else last if i == len(wordings) - 1 else between
        new_sentence = "." in joint or i == 0
        said, is_phrase = _said(wording, phrase_open and not new_sentence)
        about_i = text.startswith("I ") and ". " not in text and said.startswith("I ")
        if joint == " and " and about_i and rng.random() < 0.5:
            said = said.removeprefix("I ")  # "I cough and feel hot"
        text += joint + (_capital(said) if joint.endswith(". ") else said)
        phrase_open = is_phrase
    opening = rng.choice(frames.openings).format(age=rng.randint(18, 80), n=rng.randint(2, 9))
    closing = rng.choice(frames.durations).format(n=rng.randint(2, 9)) + rng.choice(frames.closings)
    return opening + (text if opening.endswith((", ", ": ")) else _capital(text)) + "." + closing


_SUBJECTS = ("i", "i'm", "i've", "i'd", "my", "it", "there", "people", "everything", "food")


def _said(wording: str, after_phrase: bool) -> tuple[str, bool]:
    """The wording as part of a sentence, and whether it is a noun phrase; a second phrase needs no "I have"."""
    if wording.startswith("="):
        return wording[1:], False
    if wording.split(" ", 1)[0].lower() in _SUBJECTS:
        return wording, False
    return (wording if after_phrase else f"I have {wording}"), True


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- answers --------------------------------------------------------------------------------------

NAMINGS = ("This sounds like {}.", "You may have {}.", "Your symptoms suggest {}.")
EMERGENCY = " This is an emergency: go to an emergency department now."
SOON = " See a doctor soon."
DISCLAIMER = " This does not replace a visit to your doctor."


def answer(rng: random.Random, condition: Condition) -> str:
    """A doctor's answer: the name first, then how soon to see someone, then tests, treatment and red flags."""
    text = rng.choice(NAMINGS).format(condition.spoken)
    if condition.urgency == "emergency":
        text += EMERGENCY
    if condition.urgency == "urgent":
        text += SOON
    kind = rng.random()
    if kind < 0.75:
        text += f" Tests: {listed(condition.tests, 'and')}."
    if kind > 0.25:
        text += f" Treatment: {listed(condition.medications, 'and')}."
    if condition.urgency != "emergency" and rng.random() < 0.6:
        text += f" Go to an emergency department in case of {listed(condition.red_flags, 'or')}."
    elif rng.random() < 0.5:
        text += DISCLAIMER
    return text


# --- dialogues ------------------------------------------------------------------------------------


def examples(table: Table, seed: int, n: int, split: Split = "train") -> Iterator[Example]:
    """n examples, in shuffled rounds of all conditions; a training round has the common ones twice."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    frames = TRAIN_FRAMES if split == "train" else HELD_OUT_FRAMES
    sets = {c.name: symptom_sets(table, c)[split != "train"] for c in table.conditions}
    round_: list[Condition] = []
    for _ in range(n):
        if not round_:
            round_ = list(table.conditions)
            if split == "train":
                round_ += [c for c in table.conditions if c.common]
            rng.shuffle(round_)
        condition = round_.pop()
        picked = pick_symptoms(rng, sets[condition.name])
        said = [table.symptoms[name] for name in picked]
        wordings = [rng.choice(s.held_out if split == "unseen_wordings" else s.wordings) for s in said]
        yield Example(condition.name, tuple(picked), ask(rng, frames, wordings), answer(rng, condition))


@dataclass(frozen=True)
class Recipe:
    """The data of the embedded default: how much of it, and how it is written for the model."""

    n_train: int = 32_000  # questions, each asked once
    turns: tuple[float, ...] = (0.75, 0.17, 0.08)  # shares of dialogues of 1, 2, ... questions
    n_held_out: int = 636  # of either held-out split: two questions a condition
    seed: int = 0
    vocab_size: int = 2048
    max_len: int = 384  # three questions and answers
    chat_format: str = "dialogue"
    instruction: str = ""


RECIPE = Recipe()


@dataclass(frozen=True)
class Sample:
    """The embedded default's data. Dialogues only; held_out_examples say what each question is about."""

    table: Table
    train: list[Dialogue]
    held_out_examples: list[Example]
    unseen_wordings: list[Example]

    @property
    def held_out(self) -> list[Dialogue]:
        return [e.dialogue for e in self.held_out_examples]

    def texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: some thousand training dialogues hold every wording many times."""
        for dialogue in self.train[:8000]:
            yield from (m.content for m in dialogue.messages)


def in_turns(questions: Sequence[Example], shares: Sequence[float], seed: int) -> Iterator[Dialogue]:
    """Questions joined to dialogues of 1, 2, ... turns, each about something new.

    Trained on single questions alone, a small model answers the second one of a chat with nonsense.
    """
    rng = random.Random(f"turns {seed}")
    at = 0
    while at < len(questions):
        n = rng.choices(range(1, len(shares) + 1), shares)[0]
        yield Dialogue(tuple(m for e in questions[at : at + n] for m in e.dialogue.messages))
        at += n


def sample(recipe: Recipe = RECIPE) -> Sample:
    """The embedded default's data, made anew; takes seconds."""
    table = load_table()
    return Sample(
        table,
        list(in_turns(list(examples(table, recipe.seed, recipe.n_train)), recipe.turns, recipe.seed)),
        list(examples(table, recipe.seed, recipe.n_held_out, "held_out")),
        list(examples(table, recipe.seed, recipe.n_held_out, "unseen_wordings")),
    )


# --- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write records in Alpaca's shape to a file; exit status 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m data.synthesize", description="Make dialogues out of the table.")
    parser.add_argument("--n", type=int, default=5000, help="how many records")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same records")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which side of the held-out split")
    parser.add_argument("--table", default=None, help="folder with conditions.txt and symptoms.txt (the built-in one)")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    args = parser.parse_args(argv)
    try:
        if args.n < 1:
            raise ValueError(f"--n is {args.n}; it must be at least 1")
        table = load_table() if args.table is None else load_table(args.table)
        try:
            with Path(args.output).open("w", encoding="utf-8") as out:
                for e in examples(table, args.seed, args.n, args.split):
                    out.write(json.dumps(_alpaca(e)) + "\n")
        except OSError as e:
            raise ValueError(f"--output {args.output}: cannot write ({e.strerror}); choose another path") from None
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{args.n:,} records of {len(table.conditions)} conditions in {args.output}", file=sys.stderr)
    return 0


def _alpaca(e: Example) -> dict[str, Any]:
    return {"instruction": DOCTOR_INSTRUCTION, "input": e.question, "output": e.answer, "condition": e.condition}


if __name__ == "__main__":
    sys.exit(main())
