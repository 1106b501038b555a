"""What keys are called in sentence-transformers and transformers, and what they are in a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A key of a recipe that stands for another library's setting."""

    key: str
    """As `f2llm recipe explain` takes it."""
    note: str = ""
    """How the two differ."""


_STEP = "stages.NAME."
_BATCH = Alias(f"{_STEP}global_batch", "rows over all workers, which are each other's negatives")
_EPOCHS = Alias(f"{_STEP}epochs")
_LENGTH = Alias("data.max_tokens", "in tokens; longer texts are cut")
_WARMUP = Alias(f"{_STEP}warmup_steps", "in steps, not as a share")
_EVERY = Alias(f"{_STEP}checkpoint_every", "held-out rows are measured at each checkpoint")
_PRECISION = Alias(f"{_STEP}engine.precision", "fp32 or bf16; bf16 needs GPUs, and there is no fp16")
_PATH = Alias("backbone.path", "a folder or a name on the hub; with `tokenizer: {train_vocab: null}`")
_SETS = Alias("evaluation.sets")

ALIASES: dict[str, Alias] = {
    "learning_rate": Alias(f"{_STEP}lr"),
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "mini_batch_size": Alias(f"{_STEP}engine.tokens_per_chunk", "counted in tokens, not in rows"),
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "max_seq_length": _LENGTH,
    "max_length": _LENGTH,
    "warmup": _WARMUP,
    "warmup_ratio": _WARMUP,
    "gradient_accumulation_steps": Alias(
        f"{_STEP}accumulate", "global batches per step; for larger batches in little memory see tokens_per_chunk"
    ),
    "scale": Alias(f"{_STEP}temperature", "1 / scale: a scale of 20 is a temperature of 0.05"),
    "matryoshka_dims": Alias(
        f"{_STEP}matryoshka_min_dim", "the dims are its doublings; only the smallest is said"
    ),
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_dtype": _PRECISION,
    "max_grad_norm": Alias(f"{_STEP}clip"),
    "adam_beta1": Alias(f"{_STEP}betas"),
    "adam_beta2": Alias(f"{_STEP}betas"),
    "save_steps": _EVERY,
    "eval_steps": _EVERY,
    "evaluation_steps": _EVERY,
    "save_total_limit": Alias(f"{_STEP}keep_checkpoints"),
    "load_best_model_at_end": Alias(f"{_STEP}keep_best"),
    "metric_for_best_model": Alias(f"{_STEP}best_by"),
    "deepspeed": Alias(f"{_STEP}engine.zero_stage"),
    "peft_config": Alias(f"{_STEP}lora"),
    "lora_config": Alias(f"{_STEP}lora"),
    "lora_r": Alias(f"{_STEP}lora.rank"),
    "lora_alpha": Alias(f"{_STEP}lora.alpha"),
    "target_modules": Alias(f"{_STEP}lora.targets", "all-linear, or a list of ends of names"),
    "pooling_mode": Alias("backbone.pooling"),
    "model_name": _PATH,
    "model_name_or_path": _PATH,
    "train_dataset": Alias("sources"),
    "eval_dataset": _SETS,
    "evaluator": _SETS,
    "report_to": Alias("tracking"),
}
"""By their names there."""

_HELD_OUT = Alias("evaluation.sets", "what is only measured on; `data.validation` holds out rows of the sources")

TOPICS: dict[str, Alias] = {
    "loss": Alias(
        f"{_STEP}in_batch_weight",
        "the loss is contrastive, a sum of terms; the weight of each is a key of its own",
    ),
    "heldout": _HELD_OUT,
    "held_out": _HELD_OUT,
    "dataset": Alias("sources"),
    "optimizer": Alias(f"{_STEP}lr", "it is AdamW, with `betas`, `weight_decay` and `clip`"),
    "threads": Alias("compute.threads_per_worker"),
}
"""Words that are no keys, and the key to look at."""
