"""Living under torchrun: joining again after a restart, being asked to stop, a rank that hangs, a launcher that dies.

Called by parallel.init() and train.py. Knows torch.distributed and Linux, no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

HUNG = 3  # exit status of a run that a rank kept waiting
_ROOT = Path(__file__).resolve().parent.parent


# --- joining --------------------------------------------------------------------------------------


def die_with_launcher() -> None:
    """Have the kernel send SIGTERM when torchrun dies: kill -9 of it left ranks that trained on for ever."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def _connect(size: int, *, master: bool) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, size, is_master=master, wait_for_workers=False, timeout=timedelta(minutes=5))


def _of_agent() -> bool:
    """Whether the store is torchrun's own, which outlives the ranks (TORCH_DISABLE_SHARE_RDZV_TCP_STORE: it is not)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> int:
    """How often torchrun on this node has started its ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def store_of_run(rank: int, size: int) -> dist.Store:
    """The store that torchrun's variables name."""
    return _connect(size, master=rank == 0 and not _of_agent())


def of_attempt(store: dist.Store) -> dist.Store:
    """A part of the store for this attempt alone.

    torchrun keeps one store over all restarts, in which new ranks read the addresses of the dead ones: 2 of 6 first
    restarts failed to connect for good, none with a prefix. Restarts are counted by node, so for one node only;
    several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, a new store each time.
    """
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.PrefixStore(f"attempt{attempt()}" if one_node and _of_agent() else "run", store)


def has_begun(store: dist.Store) -> bool:
    """Whether an earlier attempt came as far as begin(); asked of all ranks, before any of this attempt calls that."""
    begun = store.check(["begun"]) if _of_agent() else attempt() > 0
    answers = torch.tensor(float(begun))
    dist.all_reduce(answers)
    return answers.item() > 0


def begin(store: dist.Store | None) -> None:
    """From here on this run may leave checkpoints that a restart goes on from. Called by rank 0."""
    if store is not None:
        store.set("begun", "1")


def lost_peer(e: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    said = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "Socket closed")
    return any(s in str(e) for s in said)


# --- being asked to stop --------------------------------------------------------------------------


class Stop:
    """Notes SIGINT, SIGTERM and SIGUSR1 in `signal`, so that the loop can save at the next step border and end.

    A second SIGINT or SIGTERM ends the process at once, also while it waits in a collective, where Python's own
    handlers do not run: a thread reads the signals. SIGTERM twice within a second is one request: systemd and SLURM
    signal every process of a job, and torchrun passes on what it gets.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = 0
        self.command = resume_command()  # while the launcher lives

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.NUMBERS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)

    def _listen(self) -> None:
        first: dict[int, float] = {}
        while byte := os.read(self._read, 1):
            number, now = byte[0], time.monotonic()
            if number not in self.NUMBERS:
                continue
            if not self.signal and os.environ.get("RANK", "0") == "0":
                again = " (Ctrl-C once more ends at once, unsaved)" if number == signal.SIGINT else ""
                tqdm.write(f"stopping: this step is finished, then saved{again}", file=sys.stderr)
            self.signal = self.signal or number
            earlier = first.setdefault(number, now)
            patience = {signal.SIGINT: 0.0, signal.SIGTERM: 1.0}.get(signal.Signals(number), float("inf"))
            if now - earlier > patience:
                os._exit(128 + number)
        os.close(self._read)


def resume_command() -> str:
    """The command line that started this run, torchrun's where it did, changed to go on from the newest checkpoint."""
    words = list(sys.orig_argv)
    if "RANK" in os.environ:
        with contextlib.suppress(OSError):
            started = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            words = started if sys.argv[0] in started else words
            if len(words) > 1 and Path(words[1]).name == "torchrun":
                words = words[1:]
    launcher = words[: words.index(sys.argv[0])] if sys.argv[0] in words else ["python"]
    kept: list[str] = []
    given = iter(sys.argv[1:])
    dropped = ("--resume_from_checkpoint", "--overwrite_output_dir")
    word = next(given, None)
    while word is not None:
        name = word.split("=", 1)[0].replace("-", "_").replace("__", "--", 1)
        following = next(given, None)
        if name not in dropped:
            kept.append(word)
        elif "=" not in word and following is not None and not following.startswith("--"):
            following = next(given, None)
        word = following
    return shlex.join([*launcher, sys.argv[0], *kept, "--resume_from_checkpoint", "auto"])


# --- a rank that hangs ----------------------------------------------------------------------------


class Watch:
    """Ends the run with status HUNG when collectives stand still for `seconds`, and says which rank the others await.

    A thread of every rank writes into the store how many collectives it has begun and where its main thread is. Who
    has begun fewer than others has not arrived; who no longer writes is stopped or gone. Without a store, alone, or
    with 0 seconds it does nothing.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int, seconds: float) -> None:
        self._rank, self._size, self._seconds = rank, size, seconds
        self._tick = min(2.0, seconds / 8)
        self._wanted = store is not None and size > 1 and seconds > 0
        self._done = threading.Event()
        self._beats = 0

    def __enter__(self) -> Watch:
        if self._wanted:
            # A connection of its own: on the other a request may be waiting.
            self._store = dist.PrefixStore("watch", of_attempt(_connect(self._size, master=False)))
            self._store.set_timeout(timedelta(seconds=10))
            self._write()
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _run(self) -> None:
        begun, since = -1, time.monotonic()
        while not self._done.wait(self._tick):
            self._write()
            if (count := _collectives()) != begun:
                begun, since = count, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._end()

    def _write(self) -> None:
        self._beats += 1
        mine = {
            "beats": self._beats,
            "begun": _collectives(),
            "place": _place(),
            "process": f"{socket.gethostname()}, process {os.getpid()}",
        }
        with contextlib.suppress(RuntimeError):  # torchrun is gone
            self._store.set(str(self._rank), json.dumps(mine))

    def _all(self) -> dict[int, dict[str, Any]]:
        found = {}
        with contextlib.suppress(RuntimeError, ValueError):
            for rank in range(self._size):
                if self._store.check([str(rank)]):
                    found[rank] = json.loads(self._store.get(str(rank)))
        return found

    def _end(self) -> None:
        before = self._all()
        for _ in range(3):
            time.sleep(self._tick)
            self._write()
        after = self._all()
        alive = {r: a for r, a in after.items() if r == self._rank or a["beats"] > before.get(r, a)["beats"]}
        furthest = max((a["begun"] for a in alive.values()), default=0)
        late = [r for r in range(self._size) if r not in alive or alive[r]["begun"] < furthest]
        speaker = min((r for r in alive if r not in late), default=self._rank)
        if self._done.is_set():
            return
        if self._rank == speaker:
            names = ", ".join(self._describe(r, after, alive) for r in late)
            if not names:
                names = "all ranks stand still: " + ", ".join(f"{r} in {a['place']}" for r, a in alive.items())
            print(
                f"error: {names}; waited for {self._seconds:g} s (--timeout). This run ends; "
                "torchrun --max-restarts=N starts it again from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        if self._rank in late:  # its end would be an error on the others, before one of them has spoken
            time.sleep(3 * self._tick + 2)
        os._exit(HUNG)

    def _describe(self, rank: int, after: dict[int, dict[str, Any]], alive: dict[int, dict[str, Any]]) -> str:
        if rank not in after:
            return f"rank {rank} cannot be asked (torchrun's store does not answer)"
        what = f"rank {rank} ({after[rank]['process']})"
        if rank not in alive:
            return f"{what} does not answer any more; it was last in {after[rank]['place']}"
        return f"{what} did not arrive: it is in {after[rank]['place']}"


def _collectives() -> int:
    """How many collectives this process has begun, over all its groups."""
    return sum(group._get_sequence_number_for_group() for group in list(dist.distributed_c10d._world.pg_map))


def _place() -> str:
    """Where the main thread is, in this repository's files."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "code that is not ours"
