"""What test_lora.py runs on one and two ranks: python lora_ranks.py BASE DIRECTORY, RANK and
WORLD_SIZE in the environment. Prints JSON.

Three steps of SGD over a base in fp32 and one in 4 bits, blocks recomputed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama import checkpoint, lora, lora_files, nf4, parallel
from llama.lora_config import LoRAConfig
from llama.model import Llama


def scenario(base: Path, out: Path) -> dict[str, object]:
    world = parallel.init("cpu", sharded=True)
    rank, size = world.rank, world.size
    found: dict[str, object] = {}
    adapter = LoRAConfig(3, targets=("q", "v", "up"))  # a rank that two processes cannot share evenly
    tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    for bits in (16, 4):
        with torch.device("meta"):
            model = Llama(checkpoint.load_config(base))
        unsharded = None
        if bits == 4:
            nf4.replace(model.layers)
            unsharded = set(model.parameters())
        lora.apply(model, adapter)
        parallel.prepare(model, model.layers, world, bf16=False, recompute=True, unsharded=unsharded)
        model.to_empty(device="cpu")
        checkpoint.load_weights(model, base, nf4.assigner(model, checkpoint.copied))
        lora.init_weights(model, 0, lambda p, full: checkpoint.copied(p, parallel.part_of(full, p)))
        optimizer = torch.optim.SGD([p for _, p in lora.adapters(model)], lr=1.0)
        mine = tokens[rank::size]  # each rank its row, or one rank both
        for _ in range(3):
            loss, _ = model(mine, mine)
            (loss * size / 20).backward()
            optimizer.step()
            optimizer.zero_grad()
        lora_files.save_adapter(out / str(bits), model, adapter, base)
        found[f"merged {bits}"] = [float(p.double().sum()) for _, p in lora.merged_tensors(model)]
        found["names"] = [name for name, _ in lora.merged_tensors(model)]
    up = model.layers[0].mlp.up
    found["sharded"] = [isinstance(up.lora_A, DTensor), isinstance(up.weight, DTensor)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    print(json.dumps(scenario(Path(sys.argv[1]), Path(sys.argv[2]))))
    dist.barrier()
    dist.destroy_process_group()
