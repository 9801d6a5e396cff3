"""The preference loss: trl's numbers, the paper's formula, and the same gradient however the batch is split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.cache import TokenFile
from data.loader import Loader, PairDataset
from data.tokenise import ROW
from llama.config import LlamaConfig
from llama.model import Llama
from llama.preference import AnswerSums, PairLoss, Preference, identity_of, kept, reference_of

TRL = json.loads((Path(__file__).parent / "trl_dpo.json").read_text())


def model(seed: int) -> Llama:
    """make_trl_dpo.py's weights."""
    m = Llama(LlamaConfig(**TRL["sizes"]))
    m.init_weights(seed)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(TRL["scale"])
    return m


def pair_dataset(pairs: list[Any]) -> PairDataset:
    """Pairs of (prompt, chosen, rejected) ids as tokenised."""
    parts, rows, at = [], [], 0
    for i, (prompt, *answers) in enumerate(pairs, start=1):
        for answer in answers:
            ids = np.array([*prompt, *answer, TRL["eos"]], "<u2")
            ids[len(prompt) :] |= 1 << 15
            rows.append((i, i, at, ids.size, ids.size - len(prompt), ids.size))
            parts.append(ids)
            at += ids.size
    file = TokenFile("pairs", "key", np.concatenate(parts), np.array(rows, ROW), 0)
    return PairDataset([file], [np.arange(0, len(rows), 2)], [1.0])


def inputs(batch: Any) -> tuple[Any, ...]:
    return batch.tokens, batch.targets, (batch.start, batch.end)


def referenced(pairs: list[Any], seed: int) -> PairDataset:
    data, judge = pair_dataset(pairs), model(seed)
    batches = Loader(data, batch=2, max_len=64).all_batches(data)
    data.reference = reference_of(batches, len(data), lambda b, weigh: judge(*inputs(b), weigh=weigh)).numpy()
    return data


def gradient(m: Llama, data: PairDataset, choices: Preference, **geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Means reported, and the whole gradient, of one step over all pairs."""
    step = Loader(data, max_len=64, **geometry).step(0)
    assert step.divisor == step.pairs == len(data)
    totals = torch.zeros(6, dtype=torch.float64)
    m.zero_grad()
    for batch in step.micro_batches:
        pair_loss = PairLoss(choices, batch.pairs)
        weighted, _ = m(*inputs(batch), weigh=pair_loss)
        (weighted / step.divisor).backward()
        totals += pair_loss.totals
    return totals / step.divisor, torch.cat([p.grad.view(-1) for p in m.parameters()])


@pytest.mark.parametrize("case", TRL["results"], ids=lambda c: f"{c['loss_type']}-{c['beta']}")
def test_losses_rewards_and_gradient_are_trls(case: dict[str, Any]) -> None:
    choices, policy = Preference(case["loss_type"], case["beta"]), model(TRL["seeds"]["policy"])
    for pair, want in zip(TRL["pairs"], case["pairs"], strict=True):
        data = referenced([pair], TRL["seeds"]["reference"])
        (loss, _, margin, accuracy, chosen, rejected), _ = gradient(policy, data, choices, batch=1)
        assert loss == pytest.approx(want["loss"], abs=1e-5)
        assert (chosen, rejected) == pytest.approx((want["chosen"], want["rejected"]), abs=1e-5)
        assert margin == pytest.approx(want["chosen"] - want["rejected"], abs=1e-5)
        assert accuracy == (want["chosen"] > want["rejected"])
    means, grad = gradient(policy, referenced(TRL["pairs"], TRL["seeds"]["reference"]), choices, batch=4)
    assert means[0] == pytest.approx(case["loss"], abs=1e-5)
    assert grad.double().norm() == pytest.approx(case["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("choices", [Preference(), Preference("sigmoid", 0.3, 0.1), Preference("ipo", 0.2)], ids=str)
def test_gradient_is_that_of_the_formula_from_all_logits(choices: Preference) -> None:
    """Autograd through log_softmax of each sequence alone, written down anew."""
    policy, data = model(1), referenced(TRL["pairs"], 2)
    want = torch.zeros((), dtype=torch.float64)
    for i in range(len(data)):
        ratios = []
        for (ids, mask), reference in zip(data.parts(i), data.reference[i], strict=True):
            tokens = torch.from_numpy(ids)[None]
            each = policy(tokens)[0, :-1].double().log_softmax(1).gather(1, tokens[0, 1:, None]).squeeze(1)
            answer = each[torch.from_numpy(mask[1:])]
            ratio = answer.sum() - reference
            ratios.append(ratio / len(answer) if choices.loss_type == "ipo" else ratio)
        delta, e = ratios[0] - ratios[1], choices.label_smoothing
        if choices.loss_type == "ipo":
            want = want + (delta - 1 / (2 * choices.beta)) ** 2 / len(data)
        else:
            p = torch.sigmoid(choices.beta * delta)
            want = want - ((1 - e) * p.log() + e * (1 - p).log()) / len(data)
    want_grad = torch.cat([g.view(-1) for g in torch.autograd.grad(want, list(policy.parameters()))])
    means, grad = gradient(policy, data, choices, batch=4)
    assert means[0] == pytest.approx(want.item(), rel=1e-6)
    assert (grad - want_grad).abs().max() <= 5e-6 * want_grad.abs().max()


@pytest.mark.parametrize(
    "geometry",
    [
        {"batch": 1, "accumulation": 8, "packing": "none"},
        {"batch": 2, "accumulation": 4, "packing": "step"},
        {"batch": 8, "packing": "step", "fixed_shape": True},
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_the_split(geometry: dict[str, Any]) -> None:
    data = referenced([*TRL["pairs"], *TRL["pairs"][::-1]], 2)
    want_means, want = gradient(model(1), data, Preference(), batch=8, packing="none")
    means, grad = gradient(model(1), data, Preference(), **geometry)
    torch.testing.assert_close(means, want_means, rtol=0, atol=1e-6)
    assert (grad - want).abs().max() <= 2e-6 * want.abs().max()


def test_the_reference_itself_has_loss_log_2() -> None:
    means, grad = gradient(model(2), referenced(TRL["pairs"], 2), Preference(), batch=4)
    assert means[0] == pytest.approx(math.log(2), abs=1e-6)
    assert means[2].abs() <= 1e-6
    assert grad.norm() > 0


def test_a_batch_without_pairs_counts_nothing() -> None:
    """What a rank gets when there are fewer rows than ranks."""
    data, policy = referenced(TRL["pairs"], 2), model(1)
    empty = Loader(data, batch=1, max_len=64)._assemble(data, [np.zeros(0, np.int64)], 8)
    pair_loss = PairLoss(Preference(), empty.pairs)
    weighted, _ = policy(*inputs(empty), weigh=pair_loss)
    weighted.backward()
    assert not pair_loss.totals.any()
    assert all(not p.grad.any() for p in policy.parameters() if p.grad is not None)


def test_log_probabilities_are_those_of_the_logits_without_keeping_a_graph() -> None:
    data, policy = pair_dataset(TRL["pairs"]), model(1)
    (batch,) = Loader(data, batch=8, max_len=64).all_batches(data)
    answers = AnswerSums(batch.pairs)
    loss, _ = policy(*inputs(batch), weigh=answers)
    assert loss == 0
    assert not answers.sums.requires_grad
    assert answers.counts.sum() == data.supervised.sum()


def test_the_reference_is_kept_and_made_anew_when_it_must_be(tmp_path: Path) -> None:
    path, made = tmp_path / "out" / "reference.logprobs", []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"train": torch.full((2, 2), float(len(made)), dtype=torch.float64)}

    assert kept(path, "a", make)["train"][0, 0] == 1
    assert kept(path, "a", make)["train"][0, 0] == 1
    assert kept(path, "b", make)["train"][0, 0] == 2
    path.write_bytes(path.read_bytes()[:20])
    assert kept(path, "b", make)["train"][0, 0] == 3
    assert kept(path, "b", make)["train"][0, 0] == 3
    assert len(made) == 3


def test_identity_follows_weights_and_data(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1_000_000))
    one = identity_of(tmp_path, ["a", "b"])
    assert one == identity_of(tmp_path, ["a", "b"])
    assert one != identity_of(tmp_path, ["a", "c"])
    file.write_bytes(b"1" * 1_000_000)
    assert one != identity_of(tmp_path, ["a", "b"])
    assert identity_of("tiny, seed 1", []) != identity_of("tiny, seed 2", [])
