"""Prompt ids -> an answer: prefill, decode, stop, stream.

generate.py, evaluation and serving call stream() for ids or Answer for text; many at a time are batching.py's. A
Context carries the KV cache from one turn of a dialogue to the next. Knows no terminals, files or prompt formats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from llama import few_rows, row_step
from llama.attendant import Attendant, Command
from llama.cache import KVCache
from llama.chat import ChatFormat, Dialogue, Message, fit
from llama.fixed_step import FixedStep, can_capture
from llama.model import Llama
from llama.quantize import QuantisedLinear, Scheme, nearest
from llama.row_step import RowStep
from llama.sampling import Sampler, SamplingParams
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama.speculative import Drafter

Result = TypeVar("Result")
COMPILED_ROOM = 512  # positions of a cache whose steps are compiled, doubled as needed: each size is compiled anew
CHUNK = 256  # prompt tokens per prefill pass: bounds the memory of activations, long enough to keep a CPU busy


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: from which ids, how sampled, how long, ended early by which texts.

    trim takes white space off the front of the answer.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    trim: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number, 1 or more")
        if "" in self.stop:
            raise ValueError("a stop text is empty; it would end every answer at once")


@dataclass(frozen=True)
class Doctor:
    """A model with everything that an answer needs: tokenizer, prompt format, settings.

    ranks: processes that share the model and all do the same (tensor_parallel.py); this is number `rank` of them.
    """

    name: str
    model: Llama
    tokenizer: Tokenizer
    chat_format: ChatFormat
    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    weights: str = ""  # their number type, where it is not the embedding's
    drafter: Drafter | None = None  # guesses ahead where answers come one at a time
    on_overflow: Literal["drop", "refuse"] = "drop"  # what becomes of a dialogue that outgrows the context
    rank: int = 0
    ranks: int = 1
    compiled: bool = False  # steps of one token by torch.compile
    attendants: tuple[Attendant, ...] = ()  # asked on rank 0 alone; the others hear what they say
    cache_dtype: torch.dtype | None = None  # of the KV cache; None: as what lies between two products

    def context(self) -> Context:
        """For a new conversation."""
        return Context(self.model, self.compiled, self.cache_dtype)

    def shared(self, work: Callable[[], Result]) -> Result:
        """What work returns; it runs on rank 0 alone. For all that comes from outside: terminal, files, chance."""
        if self.ranks == 1:
            return work()
        from llama.together import on_first_rank

        return on_first_rank(work)

    def question(self, text: str) -> Dialogue:
        """A new chat's first question."""
        if not text.strip():
            raise ValueError("the prompt is empty")
        return Dialogue((*self.chat_format.opening(), Message("user", text)))

    def raw_ids(self, text: str) -> list[int]:
        """Prompt ids of BOS and the text as it is; no attendant sees it."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def before(self, dialogue: Dialogue) -> list[str]:
        """The attendants' notices to be shown before its answer is begun."""
        return self.shared(lambda: [said for a in self.attendants if (said := a.before(dialogue))])

    def after(self, dialogue: Dialogue, answer: str) -> list[str]:
        """Their notices to be shown after it."""
        return self.shared(lambda: [said for a in self.attendants if (said := a.after(dialogue, answer))])

    def fields(self, dialogue: Dialogue, answer: str) -> dict[str, Any]:
        """What they have to say of it to programs."""
        return self.shared(lambda: {k: v for a in self.attendants for k, v in a.fields(dialogue, answer).items()})

    def command(self, name: str, rest: str) -> str | None:
        """What is said to one of the attendants' commands; None if it is none of theirs."""

        def run() -> str | None:
            command = self.commands().get(name)
            return None if command is None else command.run(rest)

        return self.shared(run)

    def commands(self) -> dict[str, Command]:
        """The attendants' commands by name."""
        return {name: command for a in self.attendants for name, command in a.commands.items()}

    def _prepared(self, dialogue: Dialogue) -> Dialogue:
        for attendant in self.attendants:
            dialogue = attendant.prepare(dialogue)
        return dialogue

    def place(self) -> int:
        """Tokens that a prompt may have, so that an answer has room behind it."""
        context = self.model.config.max_seq_len
        return context - min(self.max_new_tokens, context // 2)

    def fit(self, dialogue: Dialogue, kept: float = 1.0) -> tuple[list[int], int]:
        """Prompt ids of a dialogue, as the attendants prepare it, with room for an answer; and how many of its oldest
        turns were left out for that.

        kept: the share of that place which may stay taken when turns must go. ValueError if the last question alone
        does not fit, or turns would have to go and must not.
        """
        context, place = self.model.config.max_seq_len, self.place()
        shown = self.shared(lambda: self._prepared(dialogue))
        ids, dropped = fit(shown, self.chat_format, self.tokenizer, place, int(kept * place))
        if dropped and self.on_overflow == "refuse":
            raise ValueError(
                f"the dialogue has outgrown the context of {context:,} tokens (an answer takes up to "
                f"{context - place:,} of them); begin a new one, or give up its oldest turns with --on_overflow drop"
            )
        room_for(self.model, ids, 1)
        return ids, dropped

    def request(self, ids: Sequence[int], raw: bool = False, params: SamplingParams | None = None) -> Request:
        return Request(ids, params or self.params, self.max_new_tokens, self.stop, trim=not raw)

    def describe(self) -> str:
        """One line: which model, how large, where."""
        n, weight = self.model.config.n_params(), self.model.embed.weight
        ranks = f", split over {self.ranks} ranks" if self.ranks > 1 else ""
        size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n:,}"
        kind = self.weights or str(weight.dtype).removeprefix("torch.")
        cache = "" if self.cache_dtype is None else f", KV cache {str(self.cache_dtype).removeprefix('torch.')}"
        return f"{self.name}: {size} parameters, {kind} on {weight.device}{ranks}{cache}"


class Context:
    """What a model has read in one conversation: the ids and their KV cache, which grows as needed.

    Single tokens run as a CUDA graph or a RowStep where that is possible, or compiled where that is asked for.
    """

    def __init__(self, model: Llama, compiled: bool = False, cache_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.compiled = compiled
        self.cache_dtype = cache_dtype
        self._step: FixedStep | RowStep | None = None
        self.ids: list[int] = []
        self.cache: KVCache | None = None
        self.reused = 0  # ids of the latest prompt that did not have to be run

    def rewind(self, prompt: Sequence[int], room: int) -> list[int]:
        """Keep what is shared with the prompt, make place for `room` positions, return the ids still to be run.

        Ids are compared, not text: the same text may tokenise differently inside a longer one. At least one id is
        left to run, for its logits.
        """
        held = 0 if self.cache is None else min(len(self.ids), self.cache.length)
        shared = 0
        for a, b in zip(self.ids[:held], prompt[: len(prompt) - 1], strict=False):
            if a != b:
                break
            shared += 1
        if self.compiled:
            room = min(max(COMPILED_ROOM, 1 << (room - 1).bit_length()), self.model.config.max_seq_len)
        if self.cache is None:
            self.cache = new_cache(self.model, 1, room, self.cache_dtype)
        elif self.cache.max_len < room:
            # By doubling: a conversation copies its cache a few times, and never holds a context it does not use.
            self.cache = self.cache.grown(min(max(room, 2 * self.cache.max_len), self.model.config.max_seq_len))
        self.cache.truncate(shared)
        self.ids, self.reused = list(prompt), shared
        return self.ids[shared:]

    def step(self) -> Callable[[Tensor], Tensor]:
        """From tokens (1, 1) behind what was read to logits (1, 1, V)."""
        cache = self.cache
        assert cache is not None
        if self._step is not None and self._step.cache is cache:
            return self._step
        if self.compiled or can_capture(self.model):
            self._step = FixedStep(self.model, cache, self.compiled)
        elif row_step.takes(self.model, cache):
            self._step = RowStep(self.model, cache)
        else:
            return lambda tokens: self.model(tokens, cache=cache, last_only=True)
        return self._step


def new_cache(model: Llama, rows: int, room: int, dtype: torch.dtype | None = None) -> KVCache:
    """A KV cache where the model is; dtype None: as what lies between two products."""
    weight = model.norm.weight
    return KVCache(model.config, rows, room, weight.device, dtype or weight.dtype)


def room_for(model: Llama, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many new tokens fit behind the prompt, at most max_new_tokens. ValueError if there is no room for one."""
    limit = model.config.max_seq_len
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to go on from")
    if len(prompt) >= limit:
        raise ValueError(
            f"the prompt is {len(prompt):,} tokens long and the model's context holds {limit:,} "
            "with the answer; shorten the prompt"
        )
    return min(max_new_tokens, limit - len(prompt))


@dataclass
class Drafts:
    """Tokens that were guessed for an answer, and how many of them it then held."""

    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def prefill(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Run tokens (B, T), 1 or more; the logits (B, 1, V) after the last."""
    for i in range(0, tokens.shape[1], CHUNK):
        logits = model(tokens[:, i : i + CHUNK], cache=cache, last_only=True)
    return logits


@torch.inference_mode()
def _steps(context: Context, tokens: Tensor, sampler: Sampler) -> Iterator[list[int]]:
    """Run tokens (1, T), then yield the next token for as long as the caller asks."""
    assert context.cache is not None
    logits = prefill(context.model, tokens, context.cache)
    step = None
    while True:
        new = sampler(logits[:, -1])
        yield new.tolist()
        step = step or context.step()  # not for an answer of one token
        logits = step(new[:, None])


def stream(
    model: Llama,
    prompt: Sequence[int],
    params: SamplingParams,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    *,
    banned: Sequence[int] = (),
    vocab_size: int | None = None,
    context: Context | None = None,
    drafter: Drafter | None = None,
) -> Iterator[int]:
    """The ids of one answer, as they come; a stop id ends it and is not yielded.

    Ends after max_new_tokens or when the model's context is full. Ids in `banned` and from vocab_size on are never
    chosen. With a context, what it shares with the prompt is not run again, and it remembers what is yielded, also
    when the caller breaks off. A drafter makes it faster where answers repeat what was said. ValueError for a prompt
    that does not fit.
    """
    room = room_for(model, prompt, max_new_tokens)
    context = context or Context(model)
    device = model.embed.weight.device
    new = context.rewind(prompt, len(prompt) + room)
    sampler = Sampler([params], [prompt], device, vocab_size, banned)
    tokens = torch.tensor([new], device=device)
    if drafter is None:
        steps = _steps(context, tokens, sampler)
    else:
        steps = drafter.steps(model, tokens, context, sampler, room)
    for _ in range(room):
        (token,) = next(steps)
        if token in stop_ids:
            return
        context.ids.append(token)
        yield token


class Answer:
    """One answer: text and ids so far, and at the end why it ended and how fast it came."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None  # "stop": EOS or a stop text; "length"; None: broken off
        self.failure: str | None = None  # what went wrong, where the model could not go on
        self.reused_tokens = 0
        self.drafts: Drafts | None = None  # None: nobody drafts
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(request.stop)
        self._begun = False
        self._start = self._first = self._last = time.perf_counter()

    def stream(self, model: Llama, context: Context | None = None, drafter: Drafter | None = None) -> Iterator[str]:
        """Pieces of text as they become certain. Breaking off leaves the answer as far as it came."""
        context = context or Context(model)
        within = limits(self._tokenizer)
        request = self.request
        tokens = stream(
            model, request.prompt, request.params, request.max_new_tokens, context=context, drafter=drafter, **within
        )
        if drafter is not None:
            self.drafts = drafter.drafts = Drafts()
        self.start_clock()
        for token in tokens:
            if not self.token_ids:
                self.reused_tokens = context.reused
            piece = self.feed(token)
            if piece:
                yield piece
            if self.finish_reason:
                return
        ended = len(self.token_ids) < room_for(model, request.prompt, request.max_new_tokens)
        yield self.finish("stop" if ended else "length")

    def start_clock(self) -> None:
        """Its prompt is being read from now on."""
        self._start = time.perf_counter()

    def feed(self, token: int) -> str:
        """Take in the next id; the text that is certain now. A stop text sets finish_reason."""
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first = self._last
        self.token_ids.append(token)
        return self._take(self._decoder.feed(token))

    def finish(self, reason: str | None) -> str:
        """End the answer; the text that was still held back."""
        self.finish_reason = reason
        piece = self._take(self._decoder.end())
        if self.finish_reason == reason:
            held = self._matcher.end()
            self.text += held
            piece += held
        return piece

    def _take(self, piece: str) -> str:
        """The text that is certain once `piece` has come. Space at the front is none that a stop text could match."""
        if self.request.trim and not self._begun:
            piece = piece.lstrip()
            self._begun = piece != ""
        piece, stopped = self._matcher.feed(piece)
        if stopped:
            self.finish_reason = "stop"
        self.text += piece
        return piece

    @property
    def prefill_tokens_per_s(self) -> float | None:
        seconds = self._first - self._start
        return (len(self.request.prompt) - self.reused_tokens) / seconds if self.token_ids and seconds > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """From the second token on; the first comes with the prefill."""
        seconds = self._last - self._first
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        prefill, decode, drafts = self.prefill_tokens_per_s, self.decode_tokens_per_s, self.drafts
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": len(self.request.prompt),
            "finish_reason": self.finish_reason,
            "prefill_tokens_per_s": None if prefill is None else round(prefill, 1),
            "decode_tokens_per_s": None if decode is None else round(decode, 1),
            **({} if drafts is None else {"drafted_tokens": drafts.drafted, "accepted_tokens": drafts.accepted}),
        }


def limits(tokenizer: Tokenizer) -> dict[str, Any]:
    """What may come out of a model with this tokenizer: a checkpoint may have rows that the tokenizer lacks."""
    return {
        "stop_ids": (tokenizer.eos_id,),
        "banned": [i for i in (tokenizer.bos_id, tokenizer.unk_id) if i >= 0],
        "vocab_size": tokenizer.vocab_size,
    }


class StopMatcher:
    """Finds stop texts in text that comes in pieces, holding back what could be the start of one.

    The match that is complete first wins, the longest of those that end together, however the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop text ended it); after that, feed no more."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        n = self._start_of_a_stop(text)
        self._held = text[len(text) - n :]
        return text[: len(text) - n], False

    def _start_of_a_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def end(self) -> str:
        """What is still held back when no more text comes."""
        held, self._held = self._held, ""
        return held


def lay_out_for_decoding(model: Llama) -> None:
    """Change how weights are stored, in place, so that single rows multiply fast. For models that only decode.

    A tied head gets a module of its own. In fp32 it shares the embedding's memory, transposed: looking up 64 rows then
    takes 0.2 ms instead of 0.02 (32000 x 768), where a copy would cost 98 MB. In bf16 it is a copy in oneDNN's order.
    The head of a quantised model becomes int8: of all its weights it is the largest, and in 8 bits it loses nothing
    that can be measured. On a CPU everything between two products is fp32 (few_rows.py).
    """
    weight = model.embed.weight
    if model.config.tie_embeddings:
        model.head = few_rows.linear(weight)
    if any(isinstance(m, QuantisedLinear) for m in model.modules()):
        model.head = QuantisedLinear(nearest(model.head.weight, Scheme(8, 0)), 8)
    for layer in model.layers:
        few_rows.join(layer.attn, ("q", "k", "v"))
        few_rows.join(layer.mlp, ("gate", "up"))
    few_rows.lay_out(model)
    if isinstance(model.head, few_rows.SplitLinear) and model.config.tie_embeddings:
        model.embed.weight = model.head.weight
    if weight.device.type == "cpu" and weight.dtype in few_rows.NARROW:
        model.embed = few_rows.FloatEmbedding(weight)
