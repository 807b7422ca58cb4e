"""A Trainer that stops, saves and resumes safely; what it adds has nothing to do with the model.

- Steps whose gradients are not finite are not applied.
- SIGINT, SIGTERM and SIGHUP end training after the step, with a checkpoint.
- Checkpoints appear whole or not at all.
- When memory runs out, the message says what was being worked on.
- ``PeerMonitor`` is told every stage of the work.
- What Trainer's own flags lack: a rate for every part, early stopping of a continued run, FSDP on CPUs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from minicpm_tune import output_folder
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.files import allow_deepspeed_states, unreadable_files_as_messages
from minicpm_tune.logs import LOG_ONLY
from minicpm_tune.processes import gather
from minicpm_tune.settings.argument_groups import LearningRates
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.nonfinite_and_memory import (
    MemoryExhaustedError,
    MicroBatch,
    NonFiniteSteps,
    is_out_of_memory,
    memory_advice,
)
from minicpm_tune.training.peer_monitor import PeerMonitor
from minicpm_tune.training.process_lifecycle import StopSignals
from minicpm_tune.training.run_folder import CheckpointWriter
from minicpm_tune.training.run_plan import ResumeError, run_shape


@dataclass(frozen=True)
class RunContext:
    """What training needs to know of the run around it.

    Attributes:
        peers: The watch over the other processes.
        owns_folder: Whether this process moves checkpoints to their place and deletes old ones.
    """

    peers: PeerMonitor
    owns_folder: bool


class ResilientTrainer(Trainer):
    """Training that survives faults; see the module.

    Args:
        run_context: The run around it; by default there is nothing but this process.
        **kwargs: As for ``transformers.Trainer``.
    """

    # Narrower than Trainer's.
    args: TrainingArguments
    model: nn.Module
    model_wrapped: Any
    train_dataset: Any
    optimizer: Any  # accelerate's
    files: Sequence[str] = ()  # names of the training data's files, for messages that name rows

    def __init__(self, *, run_context: RunContext | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Without a bar, the numbers are lines on the screen; Trainer would print them there without their step.
        self.remove_callback(PrinterCallback)
        self._numbers_log = __name__ if self.args.disable_tqdm else LOG_ONLY
        self._is_library = run_context is None
        if run_context is None:
            peers = PeerMonitor(limit=self.args.ddp_timeout)
            run_context = RunContext(peers=peers, owns_folder=self.args.process_index == 0)
        self.peers, self.owns_folder = run_context.peers, run_context.owns_folder
        self.stop_signals = StopSignals()
        self.shape = run_shape(self.args, 0 if self.train_dataset is None else len(self.train_dataset))
        self.was_stopped = False
        self._non_finite = NonFiniteSteps(self.args.on_nonfinite)
        self._batches: list[MicroBatch] = []
        self._asked_to_stop = torch.zeros(())
        self._loss_before = torch.zeros(())
        self._writer: CheckpointWriter | None = None
        self.add_callback(_StopBetweenSteps(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; running out of memory and an unreadable checkpoint become messages."""
        self.stop_signals.listen()
        self.peers.mark("preparing to train")
        if self.is_deepspeed_enabled:
            allow_deepspeed_states()
        with (
            self._memory_errors_as_messages(),
            unreadable_files_as_messages(self.args.resume_from_checkpoint),
        ):
            output = super().train(*args, **kwargs)
        # Not after an error: torchrun sends signals then, and the message is still to be shown.
        self.stop_signals.promise = "training has ended, and what is left is finished"
        if self._is_library:
            self.stop_signals.stop_listening()
        return output

    def get_train_dataloader(self) -> DataLoader:
        """Make Trainer's loader, and let the epoch's number reach the sampler in a run that is continued.

        accelerate's loader passes the number on to the sampler of a batch sampler, or of one wrapped once.
        Beside other processes, and with the first batches of an epoch left out, ours is wrapped twice: the
        rows would come in the order of epoch 0 (accelerate 1.15, ``DataLoaderShard.set_epoch``).
        """
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.batch_sampler.sampler = loader.batch_sampler.batch_sampler.sampler
        return loader

    @contextmanager
    def _memory_errors_as_messages(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch = self._batches[-1] if self._batches else None
            raise MemoryExhaustedError(memory_advice(error, self.args, batch, self.files)) from error

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Tell the other processes that rows are being loaded."""
        self.peers.mark(f"loading the rows of step {self.state.global_step + 1}")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Count the step's supervised tokens over all processes and, in the same reduction, who was asked to stop.

        Where messages have weights, the tokens count by them. The sum is fp32 on every process, whatever its rows have.
        Nothing is read back here: the first goes to the model, the second is read at the end of the step.
        """
        self.peers.mark(f"waiting for the others to have the rows of step {self.state.global_step + 1}")
        self._batches.clear()
        self._loss_before = self._tr_loss.clone()
        values = (sum(map(_loss_weight, batch_samples)), int(self.stop_signals.signal is not None))
        found = torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])
        tokens, self._asked_to_stop = self.accelerator.reduce(found, reduction="sum").unbind()
        self.peers.mark(f"step {self.state.global_step + 1}: all have their rows")
        return tokens

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep what a message about this batch would need, and take Trainer's step."""
        self.peers.mark(
            f"step {self.state.global_step + 1}, batch {len(self._batches) + 1}: forward and backward"
        )
        self._batches.append(MicroBatch.of(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches[-1].loss = loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | None:
        """Check that the step's gradients are finite before they are applied.

        The norm is over all processes, so that all of them decide alike. Reading it is the step's one
        wait for the device: at the end of the backward, where DeepSpeed waits too, and a log line would.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = None if grad_norm is None else float(grad_norm)  # some DeepSpeed configurations have none
        if norm is None or math.isfinite(norm) or self._scaler_is_searching():
            self._non_finite.applied()
            self.optimizer._is_overflow = False
        else:
            self._refuse_step(model, norm)
        return norm

    def _scaler_is_searching(self) -> bool:
        """Whether fp16's loss scale is still above 1: then it is what is too large, and is halved now."""
        if self.is_deepspeed_enabled:
            optimizer = self.model_wrapped.optimizer
            return bool(getattr(optimizer, "dynamic_loss_scale", False)) and optimizer.loss_scale > 1
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _refuse_step(self, model: nn.Module, norm: float) -> None:
        # Optimizers pass over parameters without a gradient: no update, no decay, no count. DeepSpeed has
        # done as much by itself. Trainer then leaves the schedule where it is.
        model.zero_grad()
        self.optimizer._is_overflow = True
        self._tr_loss.copy_(self._loss_before)
        reports = gather([batch.report(self.args.process_index) for batch in self._batches])
        self._non_finite.refused(
            self.state.global_step + 1, norm, [batch for found in reports for batch in found], self.files
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average losses over the steps that were applied, and count those that were not."""
        self._non_finite.correct(logs)
        super().log(logs, start_time)
        shown = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in logs.items()
        }
        logging.getLogger(self._numbers_log).info("step %d: %s", self.state.global_step, shown)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; running out of memory becomes a message."""
        self.peers.mark("evaluating")
        with self._memory_errors_as_messages():
            return super().evaluate(*args, **kwargs)

    def evaluates_batch(self, inputs: dict[str, Any]) -> None:
        """Tell the other processes; keep what a message about this batch would need (its rows are of other files)."""
        self.peers.mark("evaluating a batch")
        self._batches[:] = [replace(MicroBatch.of(inputs), rows=())]

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writer is None else str(self._writer.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and move it into place when every process has written its part."""
        self.peers.mark(f"saving checkpoint-{self.state.global_step}")
        best = self.state.best_model_checkpoint
        self._writer = writer = CheckpointWriter(
            self.args.output_dir, self.state.global_step, owns_folder=self.owns_folder, shape=self.shape
        )
        try:
            with writer.writing():
                super()._save_checkpoint(model, trial)
                self.state.best_model_checkpoint = writer.best(self.state.best_global_step, best)
                if self.args.should_save:
                    self.state.save_to_json(str(writer.written / output_folder.STATE_FILE))
        finally:
            self._writer = None
        self.accelerator.wait_for_everyone()
        writer.move_into_place()
        if self.owns_folder:
            output_folder.remove_old_checkpoints(
                self.args.output_dir, keep=self.args.save_total_limit, best=self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights, which Trainer would only warn about."""
        parameters = dict(self.model.named_parameters())
        missing = [
            key for key in load_result.missing_keys if key in parameters and parameters[key].requires_grad
        ]
        if missing:
            raise ResumeError(
                f"the checkpoint lacks {len(missing)} of the weights that are trained, such as {missing[0]}. Give the "
                "model that the run was started with."
            )


def _loss_weight(batch: dict[str, Any]) -> float:
    """A batch's supervised tokens, each counted by its weight."""
    weights = batch.get("loss_weights")
    return len(batch["supervised"]) if weights is None else weights.sum(dtype=np.float64)


class _StopBetweenSteps(TrainerCallback):
    """Ends training after the step in which any process was asked to."""

    def __init__(self, trainer: ResilientTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if int(self.trainer._asked_to_stop) == 0 or state.global_step >= state.max_steps:
            return
        self.trainer.was_stopped = True
        control.should_training_stop = control.should_save = True
        control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.was_stopped:  # all is saved already
            control.should_save = control.should_evaluate = False


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
