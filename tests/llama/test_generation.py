"""llama/generation.py: against llama2.c's output, the uncached model, itself alone; stop texts; the kept cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import layout
from llama.cache import KVCache
from llama.config import LlamaConfig, from_hf
from llama.generation import (
    CHUNK,
    Answer,
    Context,
    Doctor,
    Request,
    StopMatcher,
    lay_out_for_decoding,
    stream,
)
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Llama:
    """A random model with large weights: varied text, and greedy choices that are no close calls."""
    config = LlamaConfig(32, 2, 4, 2, 64, small_tokenizer.vocab_size + 3, max_seq_len=600)
    model = Llama(config)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 15)
    assert len(set(stream(model.eval(), [1, 7], GREEDY, 30))) > 10
    return model


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Llama, list[int], torch.Tensor]:
    """A trained model, llama2.c's greedy ids and the logits after each of them."""
    import numpy as np
    from safetensors.torch import load_file

    folder = shared / "data/stories260K"
    config = from_hf(json.loads((folder / "config.json").read_text()))
    model = Llama(config)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({e.name: tensors[e.hf] for e in layout.entries(config)})
    ids = json.loads((folder / "greedy_ids.json").read_text())["input_ids"]
    return model.eval(), ids, torch.from_numpy(np.load(folder / "greedy_logits.npy"))


def answers(model: Llama, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Answer]:
    """Each request answered alone."""
    made = [Answer(r, tokenizer) for r in requests]
    for answer in made:
        assert "".join(answer.stream(model)) == answer.text
    return made


# --- ids ---


@pytest.mark.parametrize("laid_out", [False, True])
def test_greedy_ids_and_logits_are_llama2cs(
    stories: tuple[Llama, list[int], torch.Tensor], laid_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, logits = stories
    if laid_out:
        monkeypatch.setattr("llama.few_rows.SMALLEST", 0)
        other = Llama(model.config)
        other.load_state_dict(model.state_dict())
        lay_out_for_decoding(other)
        model = other.eval()
    want = [*ids[1:], int(logits[-1].argmax())]
    assert list(stream(model, ids[:1], GREEDY, 256)) == want
    cache = KVCache(model.config, 1, 256)
    with torch.inference_mode():
        steps = [model(torch.tensor([[i]]), cache=cache)[0, 0] for i in ids]
        whole = model(torch.tensor([ids]))[0]
    assert (torch.stack(steps) - logits).abs().max() < 1e-4
    assert (whole - logits).abs().max() < 1e-4


def test_a_prompt_over_several_chunks_goes_on_like_the_uncached_model(model: Llama) -> None:
    prompt = torch.randint(3, 100, (2 * CHUNK + 7,), generator=torch.Generator().manual_seed(1)).tolist()
    got = list(stream(model, prompt, GREEDY, 8))
    ids = list(prompt)
    for token in got:
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_sampled_ids_repeat_with_the_seed(model: Llama) -> None:
    def sample(seed: int) -> list[int]:
        return list(stream(model, [1, 5, 9], SamplingParams(temperature=1.0, seed=seed), 30))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_a_stop_id_ends_the_stream_and_is_not_part_of_it(model: Llama) -> None:
    ids = list(stream(model, [1, 5], GREEDY, 20))
    stop = ids[7]
    assert list(stream(model, [1, 5], GREEDY, 20, (stop,))) == ids[: ids.index(stop)]


def test_banned_and_unknown_ids_never_come(model: Llama) -> None:
    hot = SamplingParams(temperature=50.0, top_k=0, repetition_penalty=1.0, seed=0)
    vocab = model.config.vocab_size - 3
    ids = set(stream(model, [1], hot, 500, banned=[0, 1], vocab_size=vocab))
    assert ids <= set(range(2, vocab))


def test_the_context_bounds_prompt_and_answer(model: Llama) -> None:
    limit = model.config.max_seq_len
    assert len(list(stream(model, [5] * (limit - 3), GREEDY, 50))) == 3
    with pytest.raises(ValueError, match=r"prompt is 600 tokens long.* context holds 600"):
        next(stream(model, [5] * limit, GREEDY, 50))
    with pytest.raises(ValueError, match="empty"):
        next(stream(model, [], GREEDY, 50))


def test_training_goes_on_after_decoding(tiny_config: LlamaConfig) -> None:
    """Tables that decoding leaves in the model must not be inference tensors."""
    model = Llama(tiny_config)
    model.init_weights(0)
    list(stream(model, [1, 2], GREEDY, 3))
    loss, _ = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss.backward()


# --- the kept cache ---


class Counting(Llama):
    """Counts the tokens that are run."""

    run = 0

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        self.run += tokens.shape[1]
        return super().forward(tokens, **kwargs)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_kept_cache_changes_nothing_but_the_work(data: st.DataObject) -> None:
    config = LlamaConfig(16, 2, 2, 1, 32, 20, max_seq_len=64)
    model = Counting(config)
    model.init_weights(1)
    context = Context(model)
    held: list[int] = []
    for _ in range(4):
        keep = data.draw(st.integers(0, len(held)))
        prompt = held[:keep] + data.draw(st.lists(st.integers(0, 19), min_size=0 if keep else 1, max_size=12))
        prompt = prompt[:50]
        want = list(stream(model, prompt, GREEDY, 6))
        model.run = 0
        tokens = stream(model, prompt, GREEDY, 6, context=context)
        got = [next(tokens) for _ in range(data.draw(st.integers(1, 6)))]  # a caller may break off
        assert got == want[: len(got)]
        assert model.run == len(prompt) - context.reused + len(got) - 1
        assert min(keep, len(prompt) - 1) - 1 <= context.reused < len(prompt)  # the last id yielded was not run yet
        held = prompt + got


def test_the_second_turn_runs_only_what_is_new(model: Llama, small_tokenizer: Tokenizer) -> None:
    context = Context(model)
    prompt = small_tokenizer.encode("fever and cough for two days")
    first = Answer(Request(prompt, GREEDY, 12), small_tokenizer)
    "".join(first.stream(model, context))
    assert first.reused_tokens == 0
    more = [*prompt, *first.token_ids, *small_tokenizer.encode("pain")]
    second = Answer(Request(more, GREEDY, 12), small_tokenizer)
    "".join(second.stream(model, context))
    assert second.reused_tokens >= len(prompt) + len(first.token_ids) - 1
    assert second.token_ids == answers(model, small_tokenizer, [second.request])[0].token_ids
    again = Answer(second.request, small_tokenizer)
    "".join(again.stream(model, context))
    assert again.reused_tokens == len(more) - 1  # one is always left to run
    assert again.token_ids == second.token_ids


# --- answers ---


def test_answer_ends_at_eos_stop_text_or_length(model: Llama, small_tokenizer: Tokenizer) -> None:
    prompt = [1, *small_tokenizer.encode("fever")]
    (whole,) = answers(model, small_tokenizer, [Request(prompt, GREEDY, 30)])
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 30
    stop = whole.text[5:7]
    (stopped,) = answers(model, small_tokenizer, [Request(prompt, GREEDY, 30, stop=(stop,))])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    result = stopped.to_json()
    assert set(result) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "finish_reason",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    }
    assert result["prompt_tokens"] == len(prompt)
    json.dumps(result, allow_nan=False)


class Scripted:
    """Stands in for a model: says the given ids."""

    def __init__(self, config: LlamaConfig, ids: Sequence[int]) -> None:
        self.config, self.ids = config, list(ids)
        self.embed = torch.nn.Embedding(1, 1)
        self.norm = torch.nn.LayerNorm(1)

    def __call__(self, tokens: torch.Tensor, cache: KVCache, last_only: bool) -> torch.Tensor:
        cache.advance(tokens.shape[1])
        logits = torch.full((1, 1, self.config.vocab_size), -9.0)
        logits[0, 0, self.ids.pop(0)] = 9.0
        return logits


def scripted_answer(model: Llama, tokenizer: Tokenizer, ids: Sequence[int], **request: object) -> Answer:
    answer = Answer(Request([1, 5], GREEDY, **{"max_new_tokens": len(ids), **request}), tokenizer)  # type: ignore[arg-type]
    pieces = list(answer.stream(Scripted(model.config, ids)))  # type: ignore[arg-type]
    assert "".join(pieces) == answer.text
    assert not any("\ufffd" in p for p in pieces[:-1])
    return answer


def test_eos_ends_and_is_no_part_of_the_answer(model: Llama, small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("rest and rest")
    answer = scripted_answer(model, small_tokenizer, [*ids, small_tokenizer.eos_id], max_new_tokens=50)
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("stop", ids, "rest and rest")


def test_eos_as_the_last_token_allowed_is_still_a_stop(model: Llama, small_tokenizer: Tokenizer) -> None:
    ids = [*small_tokenizer.encode("rest"), small_tokenizer.eos_id]
    assert scripted_answer(model, small_tokenizer, ids).finish_reason == "stop"


def test_leading_space_goes_unless_told_otherwise(model: Llama, small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("  \n rest ", continued=True)
    assert scripted_answer(model, small_tokenizer, ids).text == "rest "
    assert scripted_answer(model, small_tokenizer, ids, trim=False).text == "  \n rest "


def test_pieces_are_whole_characters(model: Llama, small_tokenizer: Tokenizer) -> None:
    text = "37.5°C 你好 👩‍⚕️"
    assert scripted_answer(model, small_tokenizer, small_tokenizer.encode(text)).text == text
    ids = small_tokenizer.encode("ok 👩", continued=True)[:-1]  # cut inside the character
    assert scripted_answer(model, small_tokenizer, ids).text == "ok \ufffd"


def test_an_answer_that_is_a_stop_text_alone_is_empty(model: Llama, small_tokenizer: Tokenizer) -> None:
    answer = scripted_answer(model, small_tokenizer, small_tokenizer.encode("cough", continued=True), stop=("cough",))
    assert (answer.text, answer.finish_reason) == ("", "stop")


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"stop": ("a", "")}])
def test_requests_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens is|stop text is empty"):
        Request([1], **bad)  # type: ignore[arg-type]


def test_doctor_asks_in_the_models_own_format(model: Llama, small_tokenizer: Tokenizer) -> None:
    from llama.chat import ChatFormat

    doctor = Doctor("m", model, small_tokenizer, ChatFormat("dialogue", "Be kind."), GREEDY, 5)
    asked = small_tokenizer.decode_continued(doctor.fit(doctor.question("I have pain"))[0])
    assert asked.strip() == "Be kind.\nPatient: I have pain\nDoctor:"
    assert doctor.raw_ids("I have pain") == [1, *small_tokenizer.encode("I have pain")]
    with pytest.raises(ValueError, match="prompt is empty"):
        doctor.question(" \n")


# --- stop texts ---


def naive(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop text to be complete ends the text, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_matcher_equals_the_naive_search_however_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    got, stopped = "", False
    for i, piece in enumerate(pieces):
        certain, stopped = matcher.feed(piece)
        got += certain
        if stopped:
            break
        text = "".join(pieces[: i + 1])
        held = text[len(got) :]
        assert text.startswith(got)
        assert not held or any(s.startswith(held) and s != held for s in stops), "holds back no more than it must"
    else:
        got += matcher.end()
    assert (got, stopped) == naive("".join(pieces), stops)


def test_stop_matcher_survives_false_starts() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.feed(c) for c in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]
