"""Settings of LoRA adapters (Hu et al. 2021, arXiv:2106.09685), and how PEFT's adapter_config.json writes them down.

arguments.py makes one from train.py's flags, lora.py acts by it, lora_files.py stores it. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # PEFT adds _proj to each

# Of adapter_config.json: what does not change what an adapter computes, and what this reads. Any other key that is set
# asks for something that is not done here.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "init_lora_weights"}


@dataclass(frozen=True)
class LoRAConfig:
    """y = W x + scale B A dropout(x) at the projections in targets; A is (r, in), B (out, r).

    scale: alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    rslora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"LoRA: r is {self.r!r}; it must be a whole number, 1 or more")
        for name, low, high in (("alpha", 0.0, math.inf), ("dropout", -1e-9, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < high:
                bounds = "in [0, 1)" if name == "dropout" else "above 0"
                raise ValueError(f"LoRA: {name} is {value!r}; it must be a number {bounds}")
        object.__setattr__(self, "targets", target_names(self.targets))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def target_names(names: Iterable[str]) -> tuple[str, ...]:
    """Our names of projections, in their order in a block, of ours or PEFT's (`q`, `q_proj`), or of all of them.

    Lists written as one word are taken apart, as ChatDoctor's command line gives them: '["q_proj", "v_proj"]'.
    """
    words = re.findall(r"[^\s\[\]\"',]+", " ".join(names))
    if any(w in ("all", "all-linear") for w in words):
        return PROJECTIONS
    wanted = {w.removesuffix("_proj") for w in words}
    unknown = [w for w in words if w.removesuffix("_proj") not in PROJECTIONS]
    if unknown or not wanted:
        what = f"{unknown[0]!r} is no projection" if unknown else "no projections are named"
        raise ValueError(f"LoRA: {what}; there are {', '.join(f'{p}_proj' for p in PROJECTIONS)}, and all")
    return tuple(p for p in PROJECTIONS if p in wanted)


def to_peft(c: LoRAConfig, base: str) -> dict[str, Any]:
    """adapter_config.json; base: the directory of the model that the adapters belong to."""
    alpha = int(c.alpha) if float(c.alpha).is_integer() else c.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.r,
        "lora_alpha": alpha,
        "lora_dropout": c.dropout,
        "target_modules": [f"{name}_proj" for name in c.targets],
        "use_rslora": c.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def from_peft(d: dict[str, Any]) -> LoRAConfig:
    """LoRAConfig of an adapter_config.json. ValueError names the key and value that cannot be used."""

    def refuse(key: str, why: str) -> ValueError:
        return ValueError(f"adapter_config.json: {key} is {d.get(key)!r}; {why}")

    if d.get("peft_type") != "LORA":
        raise refuse("peft_type", "only LORA adapters open here")
    for key, value in d.items():
        if value and key not in _IGNORED | _READ:
            raise refuse(key, "adapters that use it do not open here; merge it with peft and open the merged model")
    if d.get("bias", "none") != "none":
        raise refuse("bias", "only none is supported: a LLaMA's projections have no biases")
    if d.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise refuse("init_lora_weights", "it changes the base weights; convert it with peft to a plain LoRA")
    targets = d.get("target_modules")
    if not isinstance(targets, list) and targets != "all-linear":
        raise refuse("target_modules", "a list of projections is needed")
    try:
        return LoRAConfig(
            d.get("r"),  # type: ignore[arg-type]
            d.get("lora_alpha", 8),
            d.get("lora_dropout", 0.0),
            tuple(map(str, [targets] if isinstance(targets, str) else targets)),
            bool(d.get("use_rslora", False)),
        )
    except ValueError as e:
        raise ValueError(f"adapter_config.json: {str(e).removeprefix('LoRA: ')}") from None
