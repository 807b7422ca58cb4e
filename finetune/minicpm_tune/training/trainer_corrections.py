"""Where transformers' Trainer falls short of the flags.

Learning rates of single parts, early stopping in a continued run, FSDP on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerState

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.models.parameter_parts import PartCount
from minicpm_tune.settings.argument_groups import LearningRates


class LearningRateError(UserError):
    """A learning rate that would have no effect."""


def check_rates(rates: LearningRates, counts: dict[str, PartCount]) -> None:
    """Refuse a learning rate for a part that doesn't train: with adapters that depends on what they save.

    Args:
        rates: The rates that were asked for.
        counts: What trains, from ``parameter_parts.count_parts``.

    Raises:
        LearningRateError: With the flag that would have no effect.
    """
    flags = {
        "vision": "vision_lr",
        "audio": "audio_lr",
        "resampler": "resampler_lr",
        "llm": "llm_lr",
        "embeddings": "embed_lr",
    }
    for part, flag in flags.items():
        if rates.parts.get(part) is not None and not (part in counts and counts[part].trainable):
            raise LearningRateError(
                f"--{flag} is given, but nothing of that part trains. Leave it out, or let the part train "
                "(--lora_modules_to_save with adapters)."
            )


def split_by_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, generation: Generation, rates: LearningRates
) -> None:
    """Split an optimizer's groups so that all parameters of a group have one rate.

    Call before the scheduler is made, which takes each group's rate as the one to scale.
    """
    rate_of = {
        id(value): rates.of(name, generation.part_of(name)) for name, value in model.named_parameters()
    }
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of[id(parameter)], []).append(parameter)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups[:] = groups


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which continues its count when the run is continued.

    transformers 5.23 only does so with ``--restore_callback_states_from_checkpoint``, which restores the control
    state of the interrupted run as well.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the count over from the checkpoint."""
        callbacks: Any = state.stateful_callbacks  # by name, as a checkpoint has them
        saved = callbacks.get(type(self).__name__)
        if saved is not None:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        if args.load_best_model_at_end:  # its warning that the last model is kept is what the help text says
            super().on_train_begin(args, state, control, **kwargs)


def shard_on_cpus(trainer: Any) -> None:
    """Let FSDP act on CPUs too; accelerate (1.15) runs plain data parallelism there, without a word.

    Args:
        trainer: A Trainer whose accelerator was just made.
    """
    state = trainer.accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # what every further accelerator state is made of
    trainer.is_fsdp_enabled = True
