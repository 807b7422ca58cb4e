"""DeepSpeed's configuration file, and its process group on a machine without a GPU."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_tune.errors import UserError

# What the file calls it -> the flag that must say the same.
_SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}


class DeepSpeedConfigError(UserError):
    """A DeepSpeed configuration that can't be found or read."""


def read_deepspeed_config(value: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Args:
        value: JSON text that starts with ``{``, or the path of a JSON file: from here, or from finetune.py's folder,
            where the official commands are run.

    Raises:
        DeepSpeedConfigError: When the file is missing or is not a JSON object.
    """
    where, text = "--deepspeed", value
    if not value.lstrip().startswith("{"):
        own = Path(__file__).parents[2]
        path = next((path for path in (Path(value).expanduser(), own / value) if path.is_file()), None)
        if path is None:
            shipped = ", ".join(sorted(file.name for file in own.glob("ds_config_*.json")))
            raise DeepSpeedConfigError(
                f"--deepspeed: no file {value!r} here or in {own}. Give the path of a DeepSpeed JSON file, or one of "
                f"these: {shipped}."
            )
        where, text = str(path), path.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(
            f"{where}, line {error.lineno}: {error.msg}. Expected a JSON object (double quotes, no comments, "
            "no comma before a closing bracket)."
        ) from error
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f"{where}: found a {type(config).__name__}, expected a JSON object.")
    return config


def contradictions(
    config: dict[str, Any], training: Namespace, *, processes: int | None = None
) -> Iterator[str]:
    """What of a configuration the command line contradicts; transformers says so after the weights are loaded.

    Args:
        config: The configuration.
        training: A value for every field of ``TrainingArguments``.
        processes: Processes of the run. None leaves out what depends on them and on the precision, which a launcher
            chooses by the hardware.
    """
    same = {name: (f"--{flag}", getattr(training, flag)) for name, flag in _SAME.items()}
    betas = [training.adam_beta1, training.adam_beta2]
    same["optimizer.params.betas"] = ("--adam_beta1 and --adam_beta2", betas)
    if processes is not None:
        rows = processes * training.per_device_train_batch_size * training.gradient_accumulation_steps
        same |= {
            "train_batch_size": ("processes x batch size x accumulation steps", rows),
            "fp16.enabled": ("--fp16", training.fp16 or training.fp16_full_eval),
            "bf16.enabled": ("--bf16", training.bf16 or training.bf16_full_eval),
        }
    for name, (flag, value) in same.items():
        found = _value(config, name)
        if found not in (None, "auto", value):
            yield (
                f"--deepspeed: {name} is {json.dumps(found)} in the file, but {flag} is {json.dumps(value)}. Write "
                '"auto" in the file, or make the two equal.'
            )
    if processes is None and "optimizer" in config:
        yield from _optimizer_section(training)


def _value(config: Any, name: str) -> Any:
    """The value at a dotted name; None where there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _optimizer_section(training: Namespace) -> Iterator[str]:
    """DeepSpeed makes this optimizer itself, with one learning rate."""
    for flag in ("vision_lr", "audio_lr", "resampler_lr", "llm_lr", "embed_lr", "lora_lr_ratio"):
        if getattr(training, flag) is not None:
            yield (
                f"--deepspeed: the file's optimizer section has one learning rate for all parts, so --{flag} can't "
                "act. Remove the section; --optim then chooses the optimizer."
            )
    if training.optim not in (None, "adamw_torch"):
        yield (
            f"--deepspeed: the file has an optimizer section, so --optim {training.optim} can't act. Remove the "
            "section, or leave --optim out."
        )


def drop_automatic_scheduler(config: dict[str, Any]) -> bool:
    """Remove a scheduler section that would be filled from the command line anyway.

    DeepSpeed runs the section's own schedule and ignores ``--lr_scheduler_type``: with the official WarmupLR
    section the rate stays flat after the warm-up and never follows a cosine. A section with numbers of its own
    is a choice and stays.

    Returns:
        True when a section was removed.

    Example:
        >>> drop_automatic_scheduler({"scheduler": {"params": {"warmup_num_steps": "auto"}}})
        True
    """
    params = config.get("scheduler", {}).get("params", {})
    if not params or any(value != "auto" for value in params.values()):
        return False
    del config["scheduler"]
    return True


def start_on_cpu() -> None:
    """Start DeepSpeed's process group over gloo; call before ``TrainingArguments`` looks for devices.

    Without torchrun's variables DeepSpeed would look for MPI, and it would compile a shared-memory helper for half
    a minute (deepspeed 0.19). Neither is needed here.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; unset, it warns that it found no GPU
    import deepspeed  # takes seconds, and only runs under DeepSpeed need it

    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
