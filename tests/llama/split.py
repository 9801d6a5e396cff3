"""What test_tensor_parallel.py runs on several ranks: python split.py FOLDER; RANK, WORLD_SIZE as torchrun sets them.

Loads every model of FOLDER split over the ranks and prints, as JSON, what it answers and what this rank holds of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama import checkpoint
from llama.generation import Context, lay_out_for_decoding, stream
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.weights import Weights

PROMPT = list(range(3, 30))
WAYS = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=0, top_p=0.9, seed=5))


def answers(model: Llama) -> dict[str, Any]:
    """Ids drawn in every way, in one context, and the logits after the prompt."""
    context = Context(model)
    ids = [list(stream(model, PROMPT, params, 24, context=context)) for params in WAYS]
    coded = Context(model, cache_dtype=torch.int8)
    from_codes = list(stream(model, PROMPT, WAYS[0], 24, context=coded))
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT]))[0, -1].float().tolist()
    assert context.cache is not None
    return {"ids": ids, "from_codes": from_codes, "logits": logits, "cache_heads": context.cache._kv.shape[2] // 2}


def main() -> None:
    from llama import parallel, tensor_parallel

    torch.set_num_threads(1)
    world = tensor_parallel.start("cpu")
    found: dict[str, Any] = {}
    read = 0
    whole = Weights.read

    def counted(self: Weights, name: str, where: tuple[slice, ...] = (slice(None),)) -> torch.Tensor:
        nonlocal read
        tensor = whole(self, name, where)
        read += tensor.numel() * tensor.element_size()
        return tensor

    Weights.read = counted  # type: ignore[method-assign]
    for path in sorted(Path(sys.argv[1]).iterdir()):
        read = 0
        try:
            model = tensor_parallel.load(path, world, None).eval()
        except ValueError as e:
            found[path.name] = {"error": str(e)}
            continue
        tensors = [*model.parameters(), *model.buffers()]
        held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())
        lay_out_for_decoding(model)
        tensor_parallel.join(model, world.rank, world.size)
        found[path.name] = {**answers(model), "held": held, "read": read}
    print(json.dumps(found), flush=True)
    parallel.leave(0)


def alone(path: Path) -> dict[str, Any]:
    """The same of the whole model in one process."""
    model = checkpoint.load_model(path).eval()
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    lay_out_for_decoding(model)
    return {**answers(model), "held": held}


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
