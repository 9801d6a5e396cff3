"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): the loss of pairs of answers.

train.py hands a PairLoss to Llama.forward as `weigh`. The derivative of a pair's loss by the weights is a sum over the
answers' tokens of d loss / d log-probability times the derivative of the token's log-probability. So the head gives the
log-probabilities once without gradient, the factors follow from them, and the linear cross-entropy that all training
uses, its tokens weighted by the factors, has the exact gradient: no logits are kept, and one model is in memory. The
reference's log-probabilities are made from the starting weights before the first step, and kept in output_dir.
Knows tensors and batches, not files of dialogues.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llama import parallel
from llama.chat import IGNORE
from llama.together import on_first_rank

LOSSES = ("sigmoid", "ipo")
REPORTED = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
ROWS = 1024  # of logits at a time: 131 MB in fp32 with LLaMA's 32,000 tokens


@dataclass(frozen=True)
class Preference:
    """The loss of a pair; names and meanings are trl's.

    sigmoid: -log sigmoid(beta * delta), delta the difference of the answers' log-ratios to the reference; with
    label_smoothing e, (1 - e) of that and e of the loss of the pair turned round (cDPO). ipo: (delta - 1 / 2 beta)^2,
    delta of log-ratios per token (Azar et al. 2023, arXiv:2310.12036; the authors' own normalisation, as in trl).
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def losses(self, log_probs: Tensor, reference: Tensor, counts: Tensor) -> Tensor:
        """Loss of each pair (P,); all (P, 2), chosen and rejected: sums of log-probabilities, numbers of tokens."""
        ratios = log_probs - reference
        if self.loss_type == "ipo":
            ratios = ratios / counts.clamp(min=1)
            return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * self.beta)).square()
        z = self.beta * (ratios[:, 0] - ratios[:, 1])
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)


class AnswerSums:
    """A `weigh` that learns nothing: after the forward, sums (P, 2) holds the log-probability of each answer."""

    def __init__(self, pairs: Any) -> None:
        """pairs: a batch's, see data/loader.py."""
        self._answers, self._P = pairs.answers.view(-1), len(pairs.numbers)
        self.sums, self.counts = torch.zeros(self._P, 2, dtype=torch.float64), torch.zeros(0)

    @torch.no_grad()
    def __call__(self, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """Weight of each token's loss, (N,) fp32: here 0. x (N, D), head (V, D), targets (N,)."""
        # On the CPU in fp64: sums in a fixed order, and exact enough that their difference keeps its digits.
        each = target_log_probs(x, head, targets).cpu().double()
        self.sums = self._of_answers(each)
        self.counts = self._of_answers((targets != IGNORE).cpu().double())
        return torch.zeros_like(targets, dtype=torch.float32)

    def _of_answers(self, values: Tensor) -> Tensor:
        sums = torch.zeros(2 * self._P + 1, dtype=torch.float64).index_add_(0, self._answers, values)
        return sums[:-1].view(self._P, 2)


class PairLoss(AnswerSums):
    """The `weigh` of a micro-batch's preference loss.

    totals afterwards: sums over the pairs of the loss, 1, and what REPORTED names.
    """

    def __init__(self, preference: Preference, pairs: Any) -> None:
        super().__init__(pairs)
        self._preference, self._reference = preference, pairs.reference
        self.totals = torch.zeros(2 + len(REPORTED), dtype=torch.float64)

    def __call__(self, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        none = super().__call__(x, head, targets)
        with torch.enable_grad():
            log_probs = self.sums.requires_grad_()
            losses = self._preference.losses(log_probs, self._reference, self.counts)
            (factors,) = torch.autograd.grad(losses.sum(), log_probs)
        rewards = self._preference.beta * (self.sums.detach() - self._reference)
        margins = rewards[:, 0] - rewards[:, 1]
        each = (
            losses.detach(),
            torch.ones_like(margins),
            margins,
            (margins > 0).double(),
            rewards[:, 0],
            rewards[:, 1],
        )
        self.totals = torch.stack([e.sum() for e in each])
        if not torch.is_grad_enabled():
            return none
        # Cross-entropy is minus the log-probability; padding, the last "answer", weighs nothing.
        weights = torch.cat([-factors.view(-1), torch.zeros(1, dtype=torch.float64)])
        return weights[self._answers].float().to(x.device)


def target_log_probs(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target (N,), fp32; 0 where it is IGNORE. Softmax in fp32, as the loss has it."""
    found = torch.zeros(targets.shape, dtype=torch.float32, device=x.device)
    for rows in (targets != IGNORE).nonzero().squeeze(1).split(ROWS):
        logits = F.linear(x[rows], head).float()
        found[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(1)
    return found


# --- the reference --------------------------------------------------------------------------------


def identity_of(weights: Path | str, data: Iterable[str]) -> str:
    """What the reference's log-probabilities depend on: the starting weights and the data sets' identities.

    weights: a model's directory, or how they were made. Of a weight file 64 pieces spread over it are looked at: two
    models that differ, differ there.
    """
    h = hashlib.sha256(repr(sorted(data)).encode())
    if isinstance(weights, str):
        h.update(weights.encode())
        return h.hexdigest()
    for path in sorted(p for p in weights.iterdir() if p.suffix in (".safetensors", ".distcp")):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with path.open("rb") as f:
            for part in range(64):
                f.seek(size * part // 64)
                h.update(f.read(4096))
    return h.hexdigest()


@torch.no_grad()
def reference_of(batches: Iterable[Any], pairs: int, forward: Callable[[Any, AnswerSums], object]) -> Tensor:
    """(pairs, 2) log-probabilities of a whole data set, fp64, on all ranks; batches are this rank's share of it."""
    found = torch.zeros(pairs, 2, dtype=torch.float64)
    for batch in batches:
        answers = AnswerSums(batch.pairs)
        forward(batch, answers)
        found[batch.pairs.numbers] = answers.sums
    return parallel.all_reduce(found)


def kept(path: Path, identity: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file if it was made from the same; else make them, and write it. All ranks call it."""
    found = on_first_rank(lambda: _read(path, identity))
    if found is None:
        found = make()
        on_first_rank(lambda: _write(path, identity, found))
    return found


def _read(path: Path, identity: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as f:
            if (f.metadata() or {}).get("identity") == identity:
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass
    return None


def _write(path: Path, identity: str, tensors: dict[str, Tensor]) -> None:
    draft = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(save(tensors, {"identity": identity}))
        os.replace(draft, path)
    except OSError as e:
        raise ValueError(f"{path}: cannot write the reference's log-probabilities ({e.strerror})") from None
