"""train.py's flags: ChatDoctor's and Stanford Alpaca's names and meanings, in one frozen dataclass.

Each field is a flag; its metadata is the flag's help. Standard library only. Values are checked here, once, so that
a run that cannot work ends before anything is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from llama.chat import DOCTOR_INSTRUCTION, FORMATS
from llama.command_line import Parser
from llama.config import PRESETS
from llama.lora_config import LoRAConfig, target_names

PACKINGS = ("none", "step", "epoch")
OBJECTIVES = ("sft", "dpo")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
STRATEGIES = ("no", "steps", "epoch")


def flag(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field with its flag's help and choices."""
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TrainArguments:
    """Everything train.py can be told."""

    # what
    model_name_or_path: str = flag(
        "tiny", f"checkpoint directory, or a preset to start from random weights ({', '.join(PRESETS)})"
    )
    data_path: tuple[str, ...] = flag(
        (), "JSON or JSONL files of dialogues or plain texts, .txt files; none: the built-in sample", nargs="+"
    )
    data_weights: tuple[float, ...] = flag((), "how often each file's records appear in an epoch (1 each)", nargs="+")
    data_licences: tuple[str, ...] = flag(
        (), "licence of each data file, noted in the model's provenance.json ('unknown' where it is)", nargs="+"
    )
    output_dir: str = flag("out/tiny", "where checkpoints, metrics and the finished model go")
    overwrite_output_dir: bool = flag(False, "train anew over a finished model or checkpoints in output_dir")
    tokenizer_path: str = flag("", "SentencePiece model for a preset; without one it is trained on the data")
    chat_format: str = flag("", "prompt format (the checkpoint's; else alpaca)", choices=FORMATS)
    instruction: str | None = flag(
        None, f"instruction of records that have none (the checkpoint's; else: {DOCTOR_INSTRUCTION})"
    )
    answer: str = flag(
        "answer_icliniq",
        "which answer of an iCliniq record to learn",
        choices=("answer_icliniq", "answer_chatgpt", "answer_chatdoctor"),
    )
    model_max_length: int = flag(512, "longest record in tokens, and the length of a packed row")
    packing: str = flag(
        "step",
        "none: a record a row, padded; step: the records of each step share rows (same steps and gradients, less "
        "work); epoch: rows are filled over the whole epoch",
        choices=PACKINGS,
    )
    eval_fraction: float = flag(0.0, "share of records held out by the hash of their content")
    skip_bad_records: bool = flag(False, "write bad records to <output_dir>/rejected.jsonl and go on")
    preview: int = flag(0, "print this many training samples with their supervised tokens marked, then stop")
    cache_dir: str = flag("", "where tokenised data is kept (default: .cache/tokens)")
    num_workers: int = flag(0, "tokenising processes (0: one per core)")

    # objective
    objective: str = flag(
        "sft",
        "sft: learn the answers, of plain text every token; dpo: learn from pairs {prompt, chosen, rejected}",
        choices=OBJECTIVES,
    )
    beta: float = flag(0.1, "dpo: how strongly the starting model holds the answers back")
    label_smoothing: float = flag(0.0, "dpo: share of pairs taken to be the wrong way round (sigmoid only)")
    loss_type: str = flag("sigmoid", "dpo: loss of a pair", choices=("sigmoid", "ipo"))

    # how long, how much
    num_train_epochs: float = flag(3.0, "epochs")
    max_steps: int = flag(-1, "optimizer steps; overrides epochs when positive")
    per_device_train_batch_size: int = flag(8, "records (packing none, step) or rows (epoch) per device and forward")
    per_device_eval_batch_size: int = flag(8, "rows per device in evaluation")
    gradient_accumulation_steps: int = flag(1, "forwards per optimizer step")

    # optimizer
    learning_rate: float = flag(5e-5, "peak learning rate")
    lr_scheduler_type: str = flag("cosine", "shape of the learning rate", choices=SCHEDULES)
    warmup_ratio: float = flag(0.0, "share of the steps that warm up")
    warmup_steps: int = flag(0, "steps that warm up; overrides warmup_ratio when positive")
    weight_decay: float = flag(0.0, "AdamW's decay, on matrices only")
    adam_beta1: float = flag(0.9, "AdamW's first beta")
    adam_beta2: float = flag(0.999, "AdamW's second beta")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0: never")
    optim: str = flag(
        "adamw_torch",
        "adamw_torch: fp32 weights, gradients, moments, 16 bytes a parameter; with --bf16, adamw_split: exact fp32 "
        "weights in two halves, bf16 gradients, 14 bytes; adamw_split_bf16: moments in bf16 too, 10 bytes",
        choices=("adamw_torch", "adamw_torch_fused", "adamw_split", "adamw_split_bf16"),
    )
    seed: int = flag(42, "seed of weights and data order")

    # adapters
    lora_r: int = flag(0, "rank of LoRA adapters to train instead of the weights, 8 for instance; 0: train the weights")
    lora_alpha: int = flag(16, "adapters count alpha / r times")
    lora_dropout: float = flag(0.05, "dropout of what goes into the adapters")
    lora_target_modules: tuple[str, ...] = flag(
        ("q_proj", "v_proj"),
        "projections that get adapters: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all",
        nargs="+",
    )
    base_bits: int = flag(
        16, "4: the blocks' weights under the adapters in NF4, 4 bits each, whole on every rank", choices=(4, 16)
    )

    # machine
    bf16: bool = flag(False, "compute in bfloat16; weights and optimizer stay fp32")
    fp16: bool = flag(False, "not supported: use --bf16")
    tf32: bool = flag(False, "let fp32 matrix products on GPU round their inputs to TF32")
    fsdp: str = flag(
        "full_shard",
        "full_shard (weights gathered again in backward), shard_grad_op (kept gathered), hybrid_shard (sharded within "
        "a node, copied between nodes); with offload: weights, gradients and optimizer in the CPU's memory",
    )
    fsdp_transformer_layer_cls_to_wrap: str = flag("", "accepted; blocks are always the unit that is sharded")
    gradient_checkpointing: bool | int | str = flag(
        False,
        "recompute blocks in backward instead of keeping their activations: True (each), a number from 2 (the first "
        "so many), auto (as few as fit the GPU's memory, by the plan; none on a CPU)",
    )
    torch_compile: bool = flag(False, "compile each block with torch.compile")
    device: str = flag("auto", "auto, cpu or cuda")
    rehearse: bool = flag(
        True, "before the first step: the longest batch that may come, a batch of evaluation, a small save"
    )
    plan: bool = flag(False, "print what a GPU's memory has to hold, what it fits and what to change, then stop")
    plan_gpus: int = flag(0, "GPUs that --plan plans for (0: as many as torchrun starts)")
    timeout: float = flag(
        600.0, "seconds a rank may keep the others waiting in the loop before it is named and the run ends (0: none)"
    )
    kernels: str = flag("auto", "auto (our Triton kernels where they can run, else PyTorch), triton, torch, ...")

    # saving, logging, evaluation
    save_strategy: str = flag("steps", "when to save a checkpoint", choices=STRATEGIES)
    save_steps: int = flag(500, "steps between checkpoints")
    async_save: bool = flag(True, "write checkpoints while training goes on, from a copy in the CPU's memory")
    save_total_limit: int = flag(0, "keep this many newest checkpoints (0: all)")
    save_dtype: str = flag(
        "auto",
        "number type of the finished model (auto: bfloat16 with --bf16, else float32)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    resume_from_checkpoint: str = flag(
        "", "auto (newest good checkpoint in output_dir, if any) or a checkpoint-<step> directory"
    )
    evaluation_strategy: str = flag("no", "when to evaluate on the held-out records", choices=STRATEGIES)
    eval_steps: int = flag(500, "steps between evaluations")
    logging_steps: int = flag(1, "steps between lines of metrics.jsonl")
    report_to: str = flag(
        "none",
        "tensorboard: also event files under <output_dir>/tensorboard; wandb: also a Weights & Biases run, offline "
        "unless WANDB_MODE says otherwise; both: tensorboard,wandb",
    )

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name} is {value}; it must be a number, 0 or more")
        for name in _ABOVE_ZERO:
            if getattr(self, name) == 0:
                raise ValueError(f"--{name} is 0; it must be above 0")
        if self.seed >= 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be below 2^63")
        if not self.output_dir:
            raise ValueError("--output_dir is empty; name a directory")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction is {self.eval_fraction}; it must be in [0, 1)")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.fp16:
            raise ValueError("--fp16 is not supported (its gradients overflow without loss scaling): use --bf16 True")
        if self.data_weights and len(self.data_weights) != len(self.data_path):
            raise ValueError(f"--data_weights has {len(self.data_weights)} numbers for {len(self.data_path)} files")
        if self.data_licences and len(self.data_licences) != len(self.data_path):
            raise ValueError(f"--data_licences has {len(self.data_licences)} names for {len(self.data_path)} files")
        if any(not (math.isfinite(w) and w > 0) for w in self.data_weights):
            raise ValueError(f"--data_weights {' '.join(map(str, self.data_weights))}: each must be above 0")
        if self.split_weights and not self.bf16:
            raise ValueError(f"--optim {self.optim} splits bf16 weights: it needs --bf16 True")
        self._check_adapters()
        if self.label_smoothing >= 0.5:
            raise ValueError(f"--label_smoothing is {self.label_smoothing}; it must be below 0.5")
        if self.objective == "dpo" and not self.data_path:
            raise ValueError("--objective dpo needs --data_path: JSON records with prompt, chosen and rejected")
        blocks = self.gradient_checkpointing
        if blocks != "auto" and not (isinstance(blocks, int) and blocks >= 0):
            raise ValueError(f"--gradient_checkpointing is {blocks!r}; it must be True, False, auto or a number from 2")
        unknown = set(self.fsdp.split()) - {"full_shard", "shard_grad_op", "hybrid_shard", "offload", "auto_wrap"}
        if unknown:
            raise ValueError(f"--fsdp {self.fsdp!r}: {', '.join(sorted(unknown))} is not supported")
        if set(self.report_to.split(",")) - {"none", "tensorboard", "wandb"}:
            raise ValueError(f"--report_to {self.report_to!r}: none, tensorboard and wandb are supported")
        if self.evaluation_strategy != "no" and self.eval_fraction == 0 and self.data_path:
            raise ValueError("--evaluation_strategy needs held-out records: give --eval_fraction, 0.02 for instance")

    def _check_adapters(self) -> None:
        target_names(self.lora_target_modules)
        if self.lora_r:
            LoRAConfig(self.lora_r, self.lora_alpha, self.lora_dropout)
            if self.split_weights:
                raise ValueError(f"--optim {self.optim} with --lora_r: adapters are few, use --optim adamw_torch")
            if self.base_bits == 4 and "offload" in self.fsdp:
                raise ValueError("--fsdp offload with --base_bits 4: 4-bit weights are not sharded; leave one out")
            return
        for f in dataclasses.fields(self):
            if (f.name.startswith("lora_") or f.name == "base_bits") and getattr(self, f.name) != f.default:
                raise ValueError(f"--{f.name} is about LoRA adapters: it needs --lora_r, 8 for instance")

    @property
    def lora(self) -> LoRAConfig:
        """The adapters that a run with lora_r trains."""
        return LoRAConfig(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)

    @property
    def pairs(self) -> bool:
        """The data is preference pairs."""
        return self.objective == "dpo"

    @property
    def row_length(self) -> int:
        """Tokens of a packed row: of a pair, both sequences."""
        return self.model_max_length * (2 if self.pairs else 1)

    @property
    def split_weights(self) -> bool:
        """Weights are bf16 halves of fp32 ones."""
        return self.optim.startswith("adamw_split")

    @property
    def sharded(self) -> bool:
        """Whether a single process needs fully_shard: bf16 over fp32 weights, fp32 sums of bf16 gradients, offload."""
        return "offload" in self.fsdp or (
            self.bf16 and not (self.split_weights and self.gradient_accumulation_steps == 1)
        )


_POSITIVE = (
    "model_max_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
    "eval_steps",
    "logging_steps",
)
_NOT_NEGATIVE = (
    "num_train_epochs",
    "learning_rate",
    "beta",
    "label_smoothing",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "timeout",
    "warmup_steps",
    "save_total_limit",
    "preview",
    "num_workers",
    "plan_gpus",
    "seed",
)
# An epsilon of 0 divides 0 by 0 at the embeddings of tokens that a step does not have.
_ABOVE_ZERO = ("num_train_epochs", "beta", "adam_epsilon")
# Names that other versions of the Hugging Face trainer use for the same thing.
_ALIASES = {"evaluation_strategy": ["eval_strategy"], "report_to": ["report-to"]}

_OF_A_CALL = ("resume_from_checkpoint", "overwrite_output_dir", "output_dir", "preview", "plan_gpus")  # not of a run


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


def _blocks(text: str) -> bool | int | str:
    """True, False (1 and 0 too, as in every flag that takes these), auto, or a number of blocks."""
    if text == "auto":
        return text
    return int(text) if text.isdecimal() and int(text) > 1 else _boolean(text)


def parse(argv: list[str], builtin: dict[str, Any]) -> TrainArguments:
    """Flags of a command line. `builtin` holds the defaults of a run on the built-in sample (no --data_path).

    Exits with 2 and one line on a flag that cannot be used; ValueError for a value.
    """
    sample = " ".join(f"--{name} {value}" for name, value in builtin.items() if value not in ("", None))
    about = f"Defaults stand in brackets; those of a run without --data_path are: {sample}"
    what = "Fine-tune a LLaMA on dialogues. With no flags: train the tiny model on the built-in sample."
    parser = Parser("train.py", f"{textwrap.fill(what, 79)}\n\n{textwrap.fill(about, 79, break_on_hyphens=False)}")
    parser.usage = "train.py [--flag value ...]"
    for f in dataclasses.fields(TrainArguments):
        names = [f"--{n}" for n in (f.name, *_ALIASES.get(f.name, ()))]
        shown = "" if f.default is False or f.default in ("", (), None) else f" [{_words(f.default)}]"
        options: dict[str, Any] = {"default": None, "help": (f.metadata["help"] + shown).replace("%", "%%")}
        options["dest"] = f.name
        if isinstance(f.default, bool):
            kind = _blocks if f.name == "gradient_checkpointing" else _boolean
            options |= {"type": kind, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif "nargs" in f.metadata:
            options |= {"type": float if f.name == "data_weights" else str, "nargs": "+"}
        else:
            options["type"] = str if f.default is None else type(f.default)
        if "choices" in f.metadata:
            options["choices"] = f.metadata["choices"]
        parser.add_argument(*names, **options)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for name in ("data_path", "data_weights", "data_licences", "lora_target_modules"):
        if name in given:
            given[name] = tuple(given[name])
    own = "data_path" in given or ("plan" in given and "model_name_or_path" in given)  # a plan needs no data
    defaults = {} if own else builtin
    return TrainArguments(**{**defaults, **given})


def changed_flags(before: dict[str, Any], now: TrainArguments) -> list[str]:
    """What differs between a checkpoint's arguments, as its JSON has them, and a run's: "--flag old -> new"."""
    lines = []
    for name, value in dataclasses.asdict(now).items():
        value = list(value) if isinstance(value, tuple) else value
        old = before.get(name, value)
        if old != value and name not in _OF_A_CALL:
            lines.append(f"--{name} {_words(old)} -> {_words(value)}")
    return lines


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) or '""'
