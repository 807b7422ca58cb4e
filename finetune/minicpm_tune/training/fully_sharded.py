"""FSDP (``--fsdp``) on CPUs, where accelerate leaves it out."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


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
