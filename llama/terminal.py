"""Chat: a dialogue with the doctor in the terminal, or of lines piped in. generate.py runs it.

Answers go to stdout, everything else to stderr. The prompt format is the checkpoint's (llama/chat.py), the KV cache
goes on from turn to turn (llama/generation.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kernels
from llama.chat import Dialogue, Message
from llama.generation import Answer, Doctor
from llama.screen import Screen, show

DISCLAIMER = (
    "A research model, not a doctor: its answers are not medical advice and may be\n"
    "wrong. In an emergency, call your local emergency number."
)
PROMPT, LABEL = "You: ", "Doctor: "
# Of the place for a dialogue, when it is full: so many turns go that those to come have room, for a drop has all read
# anew. ChatDoctor's 5k set as one chat of 300 turns, 2,048 tokens: dropping as few as must, 0.75, 0.5 and 0.25 read
# 1,380, 348, 151 and 76 tokens a turn, and hold 1,727, 1,506, 1,288 and 1,049 of the dialogue.
KEPT = 0.5
HELP = """\
/reset      start a new dialogue
/retry      answer the last question anew
/save FILE  store the dialogue as JSON, in the shape that train.py reads
/stats      model, context and speed
/help       this list
/quit       leave; so does Ctrl-D
Ctrl-C stops an answer. Everything else is a question."""


class Chat:
    """One dialogue: its messages, what the model has read of it, and the commands."""

    def __init__(self, doctor: Doctor) -> None:
        self.doctor = doctor
        self.interactive = sys.stdin.isatty()
        # Every answer draws anew, also without --seed, and the whole chat is the same again with one.
        seed = doctor.params.seed
        self._next_seed = secrets.randbits(62) if seed is None else seed
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": self._stats,
            "/help": lambda _: notice(self._help()),
        }
        self._start()

    def _start(self) -> None:
        self.turns: list[Message] = []  # question and answer in turn
        self.left_out = 0  # of them, oldest questions with their answers that no longer fit into the context
        self.context = self.doctor.context()
        self.asked: str | None = None
        self.last: Answer | None = None

    def run(self) -> None:
        """Read questions and commands until /quit or the end of the input."""
        history = History() if self.interactive else None
        notice(self.doctor.describe())
        notice(DISCLAIMER)
        if self.interactive:
            notice("Describe your complaint, or type /help.\n")
        while (line := self.doctor.shared(self._read)) is not None:
            text = line.strip()
            if text == "/quit":
                break
            if text.startswith("/"):
                if history and text.partition(" ")[0] in self.doctor.commands():
                    history.forget()
                self._command(text)
            elif text:
                if history:
                    history.save()
                self._ask(text)

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        try:
            if self.interactive:
                return input(PROMPT)
            return sys.stdin.buffer.readline().decode() or None
        except EOFError:
            notice("")
            return None
        except KeyboardInterrupt:
            notice("\n(/quit or Ctrl-D leaves)")
            return ""
        except UnicodeDecodeError as e:
            notice(f"error: the line is not valid UTF-8 at byte {e.start}")
            return ""

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name in self.commands:
            self.commands[name](rest.strip())
        else:
            notice(self.doctor.command(name, rest.strip()) or f"{name} is not a command; /help lists them")

    # --- answers ---

    def _ask(self, question: str) -> None:
        """Answer the question; both join the dialogue unless there is no answer."""
        doctor = self.doctor
        opening = doctor.chat_format.opening()
        dialogue = Dialogue((*opening, *self.turns[2 * self.left_out :], Message("user", question)))
        for said in doctor.before(dialogue):
            show(said, sys.stdout)
        try:
            ids, dropped = doctor.fit(dialogue, KEPT)
        except ValueError as e:
            notice(f"error: {e}")
            return
        self.asked = question
        if dropped:
            self.left_out += dropped
            limit = doctor.model.config.max_seq_len
            turns = "turn is" if self.left_out == 1 else f"{self.left_out} turns are"
            notice(f"(the context of {limit:,} tokens is full: the oldest {turns} left out from here on)")
        params = dataclasses.replace(doctor.params, seed=self._next_seed)
        self._next_seed = (self._next_seed + 1) % 2**62
        answer = self._show(Answer(doctor.request(ids, params=params), doctor.tokenizer))
        for said in doctor.after(dialogue, answer.text):
            show(said, sys.stdout)
        if self.interactive:
            notice("")
        if answer.text.strip():
            self.turns += [Message("user", question), Message("assistant", answer.text.rstrip())]
        else:
            notice("(no answer; the question stays out of the dialogue)")

    def _show(self, answer: Answer) -> Answer:
        """Stream the answer to stdout until it ends or Ctrl-C ends it."""
        label = LABEL if self.interactive and sys.stdout.isatty() else ""
        print(label, end="", flush=True)
        screen = Screen(sys.stdout, len(label))
        try:
            with silent_keys() if self.interactive else contextlib.nullcontext():
                for piece in answer.stream(self.doctor.model, self.context, self.doctor.drafter):
                    screen.write(piece)
            ending = f"(cut off at {len(answer.token_ids):,} tokens)" if answer.finish_reason == "length" else ""
        except KeyboardInterrupt:
            screen.write(answer.finish(None))
            ending = "(stopped)"
        screen.end()
        if ending:
            notice(ending)
        self.last = answer
        return answer

    # --- commands ---

    def _help(self) -> str:
        """The list of commands, those of the attendants before the last two lines."""
        lines = HELP.splitlines()
        return "\n".join([*lines[:-2], *(command.help for command in self.doctor.commands().values()), *lines[-2:]])

    def _reset(self, _: str) -> None:
        self._start()
        notice("(a new dialogue)")

    def _retry(self, _: str) -> None:
        if self.asked is None:
            notice("there is no question yet to answer anew")
            return
        if self.turns and self.turns[-2].content == self.asked:
            del self.turns[-2:]
            self.left_out = min(self.left_out, len(self.turns) // 2)
        self._ask(self.asked)

    def _save(self, name: str) -> None:
        """One line of JSON, so that it is at once a JSON file and a line of a JSONL file."""
        if not name:
            notice("/save needs a file name")
            return
        if not self.turns:
            notice("there is nothing to save yet")
            return
        self.doctor.shared(lambda: self._write(Path(name).expanduser()))

    def _write(self, path: Path) -> None:
        messages = [dataclasses.asdict(m) for m in (*self.doctor.chat_format.opening(), *self.turns)]
        try:
            write_new(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            notice(f"{path} exists already; nothing was saved. Choose another name")
        except (OSError, ValueError) as e:
            notice(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}")
        else:
            notice(f"saved {len(self.turns)} messages to {path}")

    def _stats(self, _: str) -> None:
        notice(f"{self.doctor.describe()}\n{kernels.describe(self.doctor.model.embed.weight.device)}")
        used, limit = len(self.context.ids), self.doctor.model.config.max_seq_len
        notice(f"dialogue: {len(self.turns) // 2} turns; context: {used:,} of {limit:,} tokens")
        a = self.last
        if a is None or not a.token_ids:
            return
        prompt = f"prompt of {len(a.request.prompt):,} tokens ({a.reused_tokens:,} of them read before)"
        notice(f"last answer: {prompt}, {len(a.token_ids):,} tokens, {a.finish_reason or 'stopped by you'}")
        speeds = (("reading", a.prefill_tokens_per_s), ("writing", a.decode_tokens_per_s))
        notice(", ".join(f"{what} {speed:,.0f} tokens/s" for what, speed in speeds if speed is not None))
        if a.drafts is not None:
            notice(f"guessed ahead: {a.drafts.drafted:,} tokens, {a.drafts.accepted:,} of them right")


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Do not echo what is typed during an answer into the middle of it; the next prompt shows it."""
    try:
        import termios
    except ImportError:  # not on Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class History:
    """Line editing and the lines of earlier chats; does without either where it cannot be had."""

    def __init__(self) -> None:
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self.path = Path(state).expanduser() / "chatdoctor" / "history"
        try:
            import readline
        except ImportError:  # not in every build of Python
            self._readline = None
            return
        self._readline = readline
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            readline.read_history_file(self.path)

    def forget(self) -> None:
        """Let go of the latest line."""
        if self._readline is not None and (n := self._readline.get_current_history_length()):
            self._readline.remove_history_item(n - 1)

    def save(self) -> None:
        """Store the lines, for their owner's eyes only: they are about someone's health."""
        if self._readline is not None:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.touch(mode=0o600)
                self._readline.write_history_file(self.path)


def write_new(path: Path, text: str) -> None:
    """Write a file whole or not at all. FileExistsError if it is there already."""
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with whole.open("x", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.link(whole, path)  # unlike a rename, it never replaces
    finally:
        whole.unlink(missing_ok=True)


def notice(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)
