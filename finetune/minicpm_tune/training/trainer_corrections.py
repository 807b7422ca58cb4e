"""Where transformers' Trainer falls short of its own flags: early stopping of a continued run, FSDP on CPUs."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerState


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
