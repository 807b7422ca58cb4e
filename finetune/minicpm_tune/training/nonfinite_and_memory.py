"""Steps whose loss or gradients are not finite, and the message when memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicpm_tune import processes
from minicpm_tune.batch import Origin
from minicpm_tune.errors import UserError
from minicpm_tune.files import GIB
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.step_metrics import peak_memory_gib

logger = logging.getLogger(__name__)

STOP_AFTER = 3  # steps in a row that are not finite, with --on_nonfinite stop
_SHOWN_ROWS = 20
# torch's allocator on a GPU raises a class of its own; its allocator on the CPU, and CUDA's libraries, which
# allocate for themselves, say so in the text (torch 2.13).
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class NonFiniteError(UserError):
    """Several steps in a row had gradients that are not finite."""


class MemoryExhaustedError(UserError):
    """Memory ran out; the message says what would save the most."""


@dataclass
class MicroBatch:
    """What a message about one batch of a step needs.

    Attributes:
        rows: Where each sample comes from; None for padding samples.
        shape: [B, T] of its tokens.
        slices: Its slices of images.
        patches: Patches of all slices together.
        loss: Its share of the step's loss, on the device; None before it is known.
    """

    rows: tuple[Origin | None, ...]
    shape: tuple[int, int]
    slices: int
    patches: int
    loss: Tensor | None = None

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> MicroBatch:
        """Describe a batch; its tensors are not kept."""
        sizes, pixels = inputs.get("tgt_sizes"), inputs.get("pixel_values")
        return cls(
            rows=tuple(inputs["provenance"].rows),
            shape=tuple(inputs["input_ids"].shape),
            slices=0 if sizes is None else len(sizes),
            patches=0 if pixels is None else pixels.shape[-1] // max(1, pixels.shape[-2]),
        )

    def report(self, rank: int) -> dict[str, Any]:
        """What the other processes are told when something is wrong."""
        assert self.loss is not None  # it has been through the model
        return {"rank": rank, "rows": [row for row in self.rows if row is not None], "loss": float(self.loss)}


class NonFiniteSteps:
    """Counts steps that were not applied, and decides when it is enough.

    Args:
        policy: ``stop`` after ``STOP_AFTER`` in a row, or ``skip`` always.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.in_a_row = 0
        self.steps, self.skipped = 0, 0
        self._logged = (0, 0)

    def applied(self) -> None:
        """Count a step whose gradients were finite."""
        self.steps += 1
        self.in_a_row = 0

    def refused(
        self, step: int, norm: float, batches: Sequence[dict[str, Any]], files: Sequence[str]
    ) -> None:
        """Count a step whose gradients were not finite, and which was not applied.

        Args:
            step: Its number, from 1.
            norm: The gradient norm.
            batches: ``MicroBatch.report`` of every batch of the step, of all processes.
            files: Names of the data sources, by number.

        Raises:
            NonFiniteError: When it was one too many; on every process alike.
        """
        self.steps += 1
        self.skipped += 1
        self.in_a_row += 1
        text = f"step {step}: {_what_is_wrong(norm, batches, files)} The step was not applied"
        if self.policy == "skip" or self.in_a_row < STOP_AFTER:
            # Every process knows; one says it.
            level = logging.WARNING if processes.rank() == 0 else logging.INFO
            logger.log(level, "%s (%d in a row).", text, self.in_a_row)
            return
        raise NonFiniteError(
            f"{text}, nor were the {STOP_AFTER - 1} before it. The weights are still those of step "
            f"{step - STOP_AFTER}. Look at these rows; a lower --learning_rate, a longer warm-up (--warmup_steps) or "
            "bf16 instead of fp16 may help. To train on without such steps, add --on_nonfinite skip."
        )

    def correct(self, logs: dict[str, float]) -> None:
        """Turn means over all steps, where a skipped one counts as 0, into means over the applied ones.

        Args:
            logs: A log line; ``loss`` is since the last line, ``train_loss`` of the whole run.
        """
        steps, skipped = self.steps, self.skipped
        if "train_loss" in logs and skipped:
            logs["train_loss"] *= steps / (steps - skipped) if steps > skipped else math.nan
        if "loss" not in logs:
            return
        steps, skipped = steps - self._logged[0], skipped - self._logged[1]
        self._logged = (self.steps, self.skipped)
        if skipped:
            logs["loss"] *= steps / (steps - skipped) if steps > skipped else math.nan
            logs["skipped_steps"] = skipped


def _what_is_wrong(norm: float, batches: Sequence[dict[str, Any]], files: Sequence[str]) -> str:
    bad = [batch for batch in batches if not math.isfinite(batch["loss"])]
    if bad:
        losses = ", ".join(sorted({str(batch["loss"]) for batch in bad}))
        where = "; ".join(f"{_rows_text(batch['rows'], files)} (process {batch['rank']})" for batch in bad)
        return f"the loss is {losses} for {where}."
    rows = [row for batch in batches for row in batch["rows"]]
    return f"every loss is finite, but the gradient norm is {norm}, from {_rows_text(rows, files)}."


def _rows_text(rows: Sequence[Origin], files: Sequence[str]) -> str:
    """Rows by file: ``rows 4, 7 of train.json``."""
    by_file: dict[str, list[int]] = {}
    for source, row in rows[:_SHOWN_ROWS]:
        by_file.setdefault(files[source] if source < len(files) else f"source {source}", []).append(row)
    parts = [
        f"row{'s' * (len(found) > 1)} {', '.join(map(str, found))} of {file}"
        for file, found in by_file.items()
    ]
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return " and ".join(parts) + more if parts else "no row (padding of the last step)"


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for what torch raises when a GPU or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def memory_advice(
    error: RuntimeError, training: TrainingArguments, batch: MicroBatch | None, files: Sequence[str]
) -> str:
    """The message when memory runs out: how much was used, by what, and the three flags that save the most.

    Args:
        error: What torch raised.
        training: The arguments that the advice starts from.
        batch: The batch being worked on, if training had begun.
        files: Names of the data sources, by number.
    """
    size = "in this process"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        size = f"of {total / GIB:.1f} GiB on the GPU, of which {free / GIB:.1f} are free"
    text = f"Out of memory ({str(error).split(chr(10))[0][:200]}). Peak so far: {peak_memory_gib():.2f} GiB {size}."
    if batch is not None:
        rows = [row for row in batch.rows if row is not None]
        which = f": {_rows_text(rows, files)}" if rows else ""
        text += (
            f" The batch has {batch.shape[0]} x {batch.shape[1]} tokens and {batch.slices} image slices of "
            f"{batch.patches} patches in all{which}."
        )
    flags = "".join(f"\n  {number}. {flag}" for number, flag in enumerate(_savings(training)[:3], start=1))
    return f"{text} What would save the most here:{flags}"


def _savings(training: TrainingArguments) -> list[str]:
    """Flags that save memory and are not set yet, the most effective first.

    The order follows the parts of memory in a run with 7 billion parameters: activations that are not recomputed,
    then optimizer and gradients, then what grows with the batch, then with the row.
    """
    stage = (training.deepspeed or {}).get("zero_optimization", {})
    batch, several = training.per_device_train_batch_size, training.world_size > 1
    accumulation, offload = training.gradient_accumulation_steps * batch, 3 if several else 2
    length, slices = training.model_max_length or 0, training.max_slice_nums
    slices_now = "the checkpoint's" if slices is None else slices
    flags = [
        (not training.checkpoints_llm,
         "--activation_checkpointing true (computes activations twice instead of keeping them)"),
        (batch > 1,
         f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation} (the same run)"),
        (not training.use_lora,
         "--use_lora true --tune_llm false (no gradients and optimizer for the language model)"),
        (several and stage.get("stage", 0) < 3,
         "--deepspeed ds_config_zero3.json (divides weights, gradients and optimizer among the GPUs)"),
        ("offload_optimizer" not in stage,
         f"--deepspeed ds_config_zero{offload}_offload.json (keeps the optimizer in the CPU's memory)"),
        (length > 0, f"--model_max_length {max(256, length // 2)} (now {length})"),
        (slices is None or slices > 1,
         f"--max_slice_nums {max(1, (slices or 9) // 2)} (slices per image, now {slices_now})"),
    ]  # fmt: skip
    return [flag for saves, flag in flags if saves]
