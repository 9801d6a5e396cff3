"""Request bodies -> what is asked: OpenAI's fields, ours beside them, each with its limits.

app.py calls chat(), completion() and rating(); openapi.py describes the same tables. Fields of OpenAI's that this
server cannot honour are refused unless they ask for nothing; those that change no answer are taken and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.patient import KEYS, LISTS, LONGEST, MOST, SEXES, Card
from data.patient import from_json as card_from_json
from llama.chat import ChatFormat, Dialogue, Message
from llama.sampling import SamplingParams
from web.fields import Anything, Choice, Flag, FlagOr, Kind, ListOf, Number, OneOrMany, Record, Text, Whole
from web.limits import Limits
from web.refusal import Refusal, wrong

IGNORED = ("user", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Asked:
    """What a request wants."""

    model: str | None
    dialogue: Dialogue | None  # None: the prompts are texts to go on from
    prompts: tuple[str, ...]
    params: SamplingParams
    max_new_tokens: int | None
    stop: tuple[str, ...]
    choices: int  # of each prompt
    stream: bool
    include_usage: bool
    card: Card = field(default_factory=Card)
    grounded: bool | None = None  # None: as the server does


@dataclass(frozen=True)
class Rating:
    """A rated answer that its user wants to be kept."""

    messages: tuple[Message, ...]
    answer: str
    rating: Any
    reason: str
    correction: str


# --- tables ---------------------------------------------------------------------------------------


def _sampling(limits: Limits, context: int) -> dict[str, Kind]:
    stop = Text(limits.stop_length, 1)
    return {
        "model": Text(256),
        "stream": Flag(),
        "stream_options": Record({"include_usage": Flag(), "include_obfuscation": Flag()}),
        "max_tokens": Whole(1, context),
        "temperature": Number(0, 2),
        "top_p": Number(0, 1, above=True),
        "top_k": Whole(-1, 2**31 - 1),
        "min_p": Number(0, 1),
        "presence_penalty": Number(-2, 2),
        "frequency_penalty": Number(-2, 2),
        "repetition_penalty": Number(0, 10, above=True),
        "seed": Whole(-(2**63), 2**63 - 1),
        "n": Whole(1, limits.choices),
        "stop": OneOrMany(stop, ListOf(stop, limits.stops)),
        "logit_bias": Record({}),
        **{name: Anything() for name in IGNORED},
    }


def chat_body(limits: Limits, context: int) -> Record:
    """POST /v1/chat/completions."""
    text = Text(limits.text)
    part = Record({"type": Choice(("text",)), "text": text}, ("type", "text"))
    nothing = Choice(([],))
    message = Record(
        {
            "role": Choice(("system", "developer", "user", "assistant")),
            "content": OneOrMany(text, ListOf(part, limits.messages, 1)),
            "name": Text(64),
            "tool_calls": nothing,
            "annotations": nothing,
            "refusal": Choice(("",)),
            "function_call": Record({}),
            "audio": Record({}),
        },
        ("role", "content"),
    )
    entry, fact = Text(LONGEST, 1), {"age": Number(0, 130), "sex": Choice(SEXES), "pregnancy": FlagOr(Whole(1, 45))}
    card = {key: ListOf(entry, MOST) if key in LISTS else fact[key] for key in KEYS}
    fields = {
        "messages": ListOf(message, limits.messages, 1),
        **_sampling(limits, context),
        "max_completion_tokens": Whole(1, context),
        "logprobs": Flag(),
        "top_logprobs": Whole(0, limits.top_logprobs),
        "patient": Record(card),
        "grounded": Flag(),
        "tools": nothing,
        "functions": nothing,
        "tool_choice": Choice(("none", "auto")),
        "function_call": Choice(("none", "auto")),
        "response_format": Record({"type": Choice(("text",))}, ("type",)),
        "modalities": Choice((["text"],)),
        "store": Choice((False,)),
    }
    return Record(fields, ("messages",))


def completion_body(limits: Limits, context: int) -> Record:
    """POST /v1/completions."""
    text = Text(limits.text, 1)
    fields = {
        "prompt": OneOrMany(text, ListOf(text, limits.choices, 1)),
        **_sampling(limits, context),
        "logprobs": Whole(0, min(5, limits.top_logprobs)),
        "best_of": Whole(1, limits.choices),
        "echo": Choice((False,)),
        "suffix": Choice(("",)),
    }
    return Record(fields, ("prompt",))


def rating_body(limits: Limits) -> Record:
    """POST /api/feedback."""
    text = Text(limits.text)
    message = Record({"role": Choice(("system", "user", "assistant")), "content": text}, ("role", "content"))
    fields = {
        "consent": Choice((True,)),
        "messages": ListOf(message, limits.messages, 1),
        "answer": text,
        "rating": Choice(("good", "bad")),
        "reason": text,
        "correction": text,
    }
    return Record(fields, ("consent", "messages", "answer", "rating"))


# --- meaning --------------------------------------------------------------------------------------


def chat(body: Any, table: Record, limits: Limits, defaults: SamplingParams, chat_format: ChatFormat) -> Asked:
    """A chat request, checked. Refusal says what is wrong with it."""
    value = table.check(body, "")
    dialogue = _dialogue(value["messages"], chat_format)
    if sum(len(m.content) for m in dialogue.messages) > limits.text:
        message = f"the messages have more than {limits.text:,} characters together"
        raise wrong("messages", message, "string_above_max_length")
    logprobs = value.get("logprobs", False)
    if "top_logprobs" in value and not logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    try:
        card = card_from_json(value.get("patient", {}), "patient")
    except ValueError as e:
        raise wrong("patient", str(e)) from None
    params = replace(defaults, logprobs=logprobs, top_logprobs=value.get("top_logprobs", 0))
    return replace(
        _asked(value, limits, params, dialogue, ()),
        max_new_tokens=value.get("max_completion_tokens", value.get("max_tokens")),
        card=card,
        grounded=value.get("grounded"),
    )


def completion(body: Any, table: Record, limits: Limits, defaults: SamplingParams) -> Asked:
    """A completion request, checked. Refusal says what is wrong with it."""
    value = table.check(body, "")
    prompts = value["prompt"] if isinstance(value["prompt"], list) else [value["prompt"]]
    if value.get("best_of", 1) not in (1, value.get("n", 1)):
        raise wrong("best_of", "best_of must be n: this server keeps every answer that it makes")
    if sum(map(len, prompts)) > limits.text:
        message = f"the prompts have more than {limits.text:,} characters together"
        raise wrong("prompt", message, "string_above_max_length")
    params = replace(defaults, logprobs="logprobs" in value, top_logprobs=value.get("logprobs", 0))
    return _asked(value, limits, params, None, tuple(prompts))


def rating(body: Any, table: Record) -> Rating:
    """A rated answer, checked. Refusal says what is wrong with it."""
    value = table.check(body, "")
    messages = tuple(Message(m["role"], m["content"]) for m in value["messages"])
    if messages[-1].role != "user":
        raise wrong("messages", "the last message must be the question that was answered")
    return Rating(messages, value["answer"], value["rating"], value.get("reason", ""), value.get("correction", ""))


def _asked(
    value: Mapping[str, Any],
    limits: Limits,
    defaults: SamplingParams,
    dialogue: Dialogue | None,
    prompts: tuple[str, ...],
) -> Asked:
    """The part that both kinds share."""
    stream = value.get("stream", False)
    if "stream_options" in value and not stream:
        raise wrong("stream_options", "stream_options needs stream to be true")
    choices = value.get("n", 1)
    if choices * max(1, len(prompts)) > limits.choices:
        raise wrong("n", f"{choices} answers to each of {len(prompts)} prompts are over {limits.choices}")
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    sampling: dict[str, Any] = {name: value[name] for name in names if name in value}
    if "top_k" in value:
        sampling["top_k"] = max(0, value["top_k"])  # -1 is vLLM's word for all
    if "seed" in value:
        sampling["seed"] = value["seed"] % 2**63
    stop = value.get("stop", ())
    return Asked(
        model=value.get("model"),
        dialogue=dialogue,
        prompts=prompts,
        params=replace(defaults, **sampling),
        max_new_tokens=value.get("max_tokens"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        choices=choices,
        stream=stream,
        include_usage=value.get("stream_options", {}).get("include_usage", False),
    )


def _dialogue(messages: list[dict[str, Any]], chat_format: ChatFormat) -> Dialogue:
    """The dialogue that messages are. Neighbours of one role become one; without an instruction, the format's comes."""
    merged: list[Message] = []
    for m in messages:
        role = "system" if m["role"] == "developer" else m["role"]
        content = m["content"] if isinstance(m["content"], str) else "".join(part["text"] for part in m["content"])
        if merged and merged[-1].role == role:
            content = f"{merged.pop().content}\n\n{content}"
        merged.append(Message(role, content))
    if merged[0].role != "system":
        merged = [*chat_format.opening(), *merged]
    if merged[-1].role != "user" or not merged[-1].content.strip():
        raise wrong("messages", "the last message must be the user's, and say something")
    try:
        return Dialogue(tuple(merged))
    except ValueError as e:
        raise wrong("messages", f"messages: {e}") from None


def of_this_server(asked: Asked, model: str) -> None:
    """Refusal if another model is asked for."""
    if asked.model not in (None, model):
        shown = (asked.model or "")[:80]
        raise Refusal(404, f"there is no model {shown!r} here, only {model!r}", param="model", code="model_not_found")
