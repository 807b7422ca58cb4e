"""``README.md`` beside a saved adapter: what it was trained on, how, and how to load it; PEFT writes an empty form."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from transformers import SchedulerType, TrainerState

from minicpm_tune.data.files.mixtures import Mixture
from minicpm_tune.settings.arguments import TrainingArguments

CARD_FILE = "README.md"
_CARD = """---
{base_model}library_name: peft
pipeline_tag: image-text-to-text
tags:
- lora
---

# LoRA adapter of {name}

Trained for {steps} steps ({epochs:.2f} epochs) on

| data file | rows | samples in an epoch |
|---|---|---|
{files}

| | |
|---|---|
{values}

Load it with PEFT on {name}, or with the scripts that trained it:

    python chat.py --adapter FOLDER --image PICTURE --question "What is this?"
    python merge_lora.py --adapter FOLDER --output_dir MERGED
"""


def write_model_card(
    folder: Path, *, config: LoraConfig, training: TrainingArguments, state: TrainerState, data: Mixture
) -> None:
    """Write the card of an adapter.

    Args:
        folder: The adapter's folder.
        config: The adapter's configuration.
        training: The arguments of its run.
        state: How far the run is.
        data: Its training data.
    """
    base = config.base_model_name_or_path or ""
    is_folder = Path(
        base
    ).is_dir()  # a name on the hub is a link there; a path on this machine is no one's concern
    name = Path(base).name if is_folder else base
    files = [f"| {Path(file.rows.path).name} | {len(file.rows)} | {file.samples} |" for file in data.files]
    values = [f"| {what} | {value} |" for what, value in _values(config, training, state).items()]
    text = _CARD.format(
        base_model="" if is_folder else f"base_model: {base}\n",
        name=name,
        steps=state.global_step,
        epochs=state.epoch or 0.0,
        files="\n".join(files),
        values="\n".join(values),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _values(config: LoraConfig, training: TrainingArguments, state: TrainerState) -> dict[str, object]:
    per_process = training.per_device_train_batch_size * training.gradient_accumulation_steps
    values: dict[str, object] = {
        "rank, alpha, dropout": f"{config.r}, {config.lora_alpha:g}, {config.lora_dropout:g}",
        "also trained in full": ", ".join(sorted(config.modules_to_save or ())) or "nothing",
        "learning rate": f"{training.learning_rate:g}, {SchedulerType(training.lr_scheduler_type).value}",
        "rows in a step": per_process * training.world_size,
        "longest row": f"{training.model_max_length} tokens",
        "precision": str(training.weight_dtype).removeprefix("torch."),
        "seed": training.seed,
    }
    for key, what in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        found = [line for line in state.log_history if key in line]
        if found:
            values[what] = f"{found[-1][key]:.4g} (step {found[-1]['step']})"
    return values
