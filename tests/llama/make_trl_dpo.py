"""Makes trl_dpo.json: what trl computes for a few preference pairs. Not run by the tests, which hold us against it.

In an environment of its own: pip install trl transformers torch sentencepiece safetensors numpy, then from the
repository's root `PYTHONPATH=. python tests/llama/make_trl_dpo.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llama import checkpoint
from llama.config import LlamaConfig
from llama.model import Llama

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64}
EOS = 2
# prompt, chosen, rejected; EOS follows each answer
PAIRS = [
    ([5, 9, 3], [11, 12, 13, 14], [21]),
    ([40, 41, 42, 43, 44, 45, 46], [7, 8], [50, 51, 52, 53, 54, 55]),
    ([6], [30, 31, 32], [33, 34, 32]),
    ([60, 10, 10, 61], [16], [17, 18, 19, 20]),
]
CASES = [
    {"loss_type": "sigmoid", "beta": 0.1},
    {"loss_type": "sigmoid", "beta": 0.5},
    {"loss_type": "ipo", "beta": 0.3},
]
SEEDS, SCALE = {"policy": 1, "reference": 2}, 3.0


def model(seed: int) -> Llama:
    """Random weights by name and seed, large enough to prefer something."""
    m = Llama(LlamaConfig(**SIZES))
    m.init_weights(seed)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(SCALE)
    return m


def theirs(seed: int, folder: Path) -> Any:
    """The same weights as transformers opens them."""
    ours = model(seed)
    checkpoint.save_model(folder, ours.named_parameters(), ours.config, None, None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def tokenizer() -> PreTrainedTokenizerFast:
    """Id 5 is the word t5."""
    words = {f"t{i}": i for i in range(SIZES["vocab_size"])}
    words["</s>"] = words.pop(f"t{EOS}")
    raw = Tokenizer(models.WordLevel(words, "t0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="t0", unk_token="t0")


def text(ids: list[int]) -> str:
    return "".join(f" t{i}" for i in ids)


def main() -> None:
    rows = [{"prompt": text(p), "chosen": text(c) + " ", "rejected": text(r) + " "} for p, c, r in PAIRS]
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            policy, reference = (theirs(s, Path(folder) / name) for name, s in SEEDS.items())
            args = trl.DPOConfig(folder, report_to="none", use_cpu=True, bf16=False, disable_dropout=True, **case)
            trainer = trl.DPOTrainer(
                policy, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
            )
            tokens = [trainer.train_dataset[i] for i in range(len(PAIRS))]
            want = [(p, [*c, EOS], [*r, EOS]) for p, c, r in PAIRS]
            assert [(t["prompt_ids"], t["chosen_ids"], t["rejected_ids"]) for t in tokens] == want, tokens
            policy.train()
            pairs = []
            for one in tokens:
                trainer._metrics["train"].clear()
                loss = trainer.compute_loss(policy, trainer.data_collator([one]))
                metrics = trainer._metrics["train"]
                pairs.append(
                    {
                        "loss": loss.item(),
                        "chosen": metrics["rewards/chosen"][0],
                        "rejected": metrics["rewards/rejected"][0],
                    }
                )
            policy.zero_grad()
            loss = trainer.compute_loss(policy, trainer.data_collator(tokens))
            loss.backward()
            norm = torch.stack([p.grad.double().norm() for p in policy.parameters()]).norm().item()
            results.append({**case, "pairs": pairs, "loss": loss.item(), "grad_norm": norm})
    versions = {m.__name__: m.__version__ for m in (trl, transformers, torch)}
    document = {
        "made_by": "tests/llama/make_trl_dpo.py",
        "versions": versions,
        "sizes": SIZES,
        "seeds": SEEDS,
        "scale": SCALE,
    }
    document |= {"eos": EOS, "pairs": PAIRS, "results": results}
    lists = {name: ",\n  ".join(map(json.dumps, document.pop(name))) for name in ("pairs", "results")}
    fields = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in document.items()]
    fields += [f'"{name}": [\n  {lines}\n ]' for name, lines in lists.items()]
    (Path(__file__).parent / "trl_dpo.json").write_text("{\n " + ",\n ".join(fields) + "\n}\n")


if __name__ == "__main__":
    main()
