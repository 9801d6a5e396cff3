"""What does guessing ahead win, and what does it cost where it cannot win? And what does a pass of several rows cost?

    python bench/bench_speculative.py [--dtypes bfloat16 int8 int4 float32] [--checkpoint out/tiny] [--passes 7]

Random weights of a preset, whose passes are real and whose logits then say a given text: one that copies the prompt,
one that does so half the time, in stretches of 16 ids, and one that never repeats; a smaller preset as the draft model
is made to be right as often as asked. And the embedded default (`python train.py`), as it answers: its held-out
questions, and each of them asked a second time. Both ways in turn, greedy, batch 1; medians of the passes and of their
ratios. Every answer begins with nothing learnt about what pays. Writes bench/results/speculative_cpu.json. Run it at
high priority where the machine is shared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from report import RESULTS, write

from data import synthesize
from llama import checkpoint, quantize
from llama.cache import KVCache
from llama.chat import Dialogue, Message, render
from llama.config import PRESETS
from llama.generation import Context, lay_out_for_decoding, stream
from llama.model import Llama
from llama.quantize import Scheme
from llama.sampling import SamplingParams
from llama.speculative import LENGTHS, Drafter, DraftModel, Lookup

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)
SCHEMES = {"int8": Scheme(8, 0), "int4": Scheme(4, 32)}
PROMPT, NEW = 128, 128  # ids


def build(shape: str, dtype: str) -> Llama:
    """A preset with random weights, as decoding has it."""
    model = Llama(PRESETS[shape])
    model.init_weights(0)
    if dtype != "float32":
        model = model.bfloat16()
    if scheme := SCHEMES.get(dtype):
        quantize.replace(model.layers, lambda _, linear: quantize.nearest(linear.weight, scheme), scheme.bits)
    lay_out_for_decoding(model)
    return model.eval()


class Told:
    """A model whose passes are real, and whose logits say a given text."""

    def __init__(self, model: Llama, text: list[int]) -> None:
        self.model, self.text = model, torch.tensor([*text, *[3] * 64])
        self.config, self.embed, self.norm = model.config, model.embed, model.norm

    def __call__(self, tokens: torch.Tensor, cache: KVCache, last_only: bool) -> torch.Tensor:
        logits = self.model(tokens, cache=cache, last_only=last_only)
        T = logits.shape[1]
        return logits.scatter(2, self.text[cache.length - T : cache.length].view(1, T, 1), 1e4)


def texts(vocab: int) -> dict[str, list[int]]:
    """Prompts and the answers to them, by what the answers are like. Told's text is one id ahead: no BOS."""
    rng = random.Random(0)
    ids = rng.sample(range(3, vocab), PROMPT + NEW)
    prompt, fresh = ids[:PROMPT], ids[PROMPT:]
    half = [token for i in range(0, NEW, 16) for token in (prompt if i // 16 % 2 else fresh)[i : i + 16]]
    return {"copies the prompt": prompt + prompt[:NEW], "half of it": prompt + half, "never repeats": prompt + fresh}


def seconds(run: Callable[[], Iterable[Any]]) -> tuple[float, list[Any]]:
    """From the first of what `run` yields to the last; and all of it."""
    produced = iter(run())
    out = [next(produced)]
    start = time.perf_counter()
    out += produced
    return time.perf_counter() - start, out


def compare(
    plain: Callable[[], Iterable[Any]], drafted: Callable[[Drafter], Iterable[Any]], make: Any, passes: int
) -> Any:
    """Tokens per second both ways, in turn."""
    runs = []
    for _ in range(passes):
        a, want = seconds(plain)
        drafter = make()
        b, got = seconds(lambda drafter=drafter: drafted(drafter))
        runs.append((a, b, len(want) - 1, drafter.drafts, want == got))
    drafts = runs[-1][3]
    return {
        "plain_tokens_per_s": round(statistics.median(n / a for a, _, n, *_ in runs), 1),
        "drafted_tokens_per_s": round(statistics.median(n / b for _, b, n, *_ in runs), 1),
        "ratio": round(statistics.median(a / b for a, b, *_ in runs), 2),
        "slowest_ratio": round(min(a / b for a, b, *_ in runs), 2),
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "same_ids": all(run[-1] for run in runs),
    }


@torch.inference_mode()
def pass_costs(model: Llama, passes: int) -> dict[str, float]:
    """Milliseconds of a pass of one row behind PROMPT others; of passes of more rows, in passes of one."""
    rows = (1, 2, *(n + 1 for n in LENGTHS))
    cache = KVCache(model.config, 1, 2 * PROMPT, dtype=model.norm.weight.dtype)
    model(torch.randint(3, model.config.vocab_size, (1, PROMPT)), cache=cache)
    times: dict[int, list[float]] = {r: [] for r in rows}
    for _ in range(passes * 6):
        for r in rows:
            tokens = torch.randint(3, model.config.vocab_size, (1, r))
            start = time.perf_counter()
            model(tokens, cache=cache)
            times[r].append(time.perf_counter() - start)
            cache.truncate(PROMPT)
    one = statistics.median(times[1])
    costs = {f"{r}_rows": round(statistics.median(t) / one, 2) for r, t in times.items() if r > 1}
    return {"1_row_ms": round(one * 1000, 2), **costs}


def bench_random(shape: str, draft_shape: str, dtype: str, passes: int) -> dict[str, Any]:
    model, draft = build(shape, dtype), build(draft_shape, dtype)
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "pass": pass_costs(model, passes), "lookup": {}}

    def both(text: list[int], make: Callable[[], Drafter]) -> dict[str, Any]:
        told, prompt = Told(model, text[1:]), text[:PROMPT]
        return compare(
            lambda: stream(told, prompt, GREEDY, NEW),  # type: ignore[arg-type]
            lambda drafter: stream(told, prompt, GREEDY, NEW, drafter=drafter),  # type: ignore[arg-type]
            make,
            passes,
        )

    for name, text in texts(model.config.vocab_size).items():
        result["lookup"][name] = both(text, lambda: Drafter(Lookup()))
    result["draft"] = {"shape": draft_shape}
    fresh = texts(model.config.vocab_size)["never repeats"]
    for right in (0.9, 0.7, 0.5, 0.0):
        rng = random.Random(1)
        said = [token if rng.random() < right else 3 for token in fresh[1:]]
        made = Told(draft, said)
        result["draft"][f"{right:.0%} right"] = both(fresh, lambda made=made: Drafter(DraftModel(made)))  # type: ignore[misc]
    return result


def bench_trained(path: Path, questions: int, passes: int) -> dict[str, Any]:
    """Answers of a trained model to held-out questions, and to each of them asked again in the same chat."""
    model, tokenizer = checkpoint.load_model(path, "cpu").eval(), checkpoint.load_tokenizer(path)
    chat_format = checkpoint.load_chat_format(path)
    lay_out_for_decoding(model)
    asked = [Message("user", e.question) for e in synthesize.sample().held_out_examples[:questions]]
    alone = [(*chat_format.opening(), m) for m in asked]

    def ids(turns: tuple[Message, ...]) -> list[int]:
        return render(Dialogue(turns), chat_format, tokenizer)[0]

    def say(prompt: list[int], drafter: Drafter | None = None, context: Context | None = None) -> Iterable[int]:
        return stream(model, prompt, GREEDY, 120, (tokenizer.eos_id,), context=context, drafter=drafter)

    answers = [tokenizer.decode(say(ids(turns))).strip() for turns in alone]
    again = [(*t, Message("assistant", a), m) for t, a, m in zip(alone, answers, asked, strict=True)]
    result: dict[str, Any] = {"questions": questions}
    for name, dialogues in (("asked once", alone), ("asked again", again)):
        prompts = [ids(turns) for turns in dialogues]
        contexts = [Context(model) for _ in prompts]  # read before, so that answering is what is timed
        for prompt, context in zip(prompts, contexts, strict=True):
            next(iter(say(prompt, context=context)))

        def everything(drafter: Drafter | None = None, pairs: Any = (prompts, contexts)) -> Iterable[int]:
            for prompt, context in zip(*pairs, strict=True):
                yield from say(prompt, drafter, context)

        result[name] = compare(everything, everything, lambda: Drafter(Lookup()), passes)
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="110m", choices=sorted(PRESETS))
    p.add_argument("--draft_shape", default="15m", choices=sorted(PRESETS))
    p.add_argument("--dtypes", nargs="*", default=["bfloat16", "int8", "int4", "float32"])
    p.add_argument("--checkpoint", type=Path, default=ROOT / "out/tiny")
    p.add_argument("--questions", type=int, default=20)
    p.add_argument("--passes", type=int, default=7)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output", type=Path, default=RESULTS / "speculative_cpu.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    trained = bench_trained(args.checkpoint, args.questions, args.passes)
    print(trained, flush=True)
    results = []
    for dtype in args.dtypes:
        results.append(bench_random(args.shape, args.draft_shape, dtype, args.passes))
        print(results[-1], flush=True)
    facts = {"prompt_tokens": PROMPT, "new_tokens": NEW, "passes": args.passes}
    write(args.output, results, one_line_each=True, trained=trained, **facts)


if __name__ == "__main__":
    main()
