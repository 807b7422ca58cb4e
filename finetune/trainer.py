"""CPMTrainer: what differs from transformers.Trainer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from minicpm_tune.batch import Provenance, Sample
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.files.mixtures import Mixture
from minicpm_tune.data.sampling import EpochSampler, Order, PackingSampler, PaddedRows, grouped_by_length
from minicpm_tune.data.vision_cache import FeatureWriter
from minicpm_tune.models.parameter_parts import count_parts
from minicpm_tune.training.learning_rates import split_by_rate
from minicpm_tune.training.resilient_trainer import ResilientTrainer
from minicpm_tune.training.throughput import SourceLosses, ThroughputMeter


class CPMTrainer(ResilientTrainer):
    """Trains a MiniCPM-V model.

    - The loss is the sum over supervised tokens divided by their number in the whole optimizer
      step, over all micro-batches and processes; the model's forward divides, see ``models/loss.py``.
    - Every process runs the same number of steps on an order without repeated rows.
    - Evaluation adds up counts; logits are never kept.

    Args:
        generation: The model's generation.
        padding_sample: A sample without supervised tokens, for ``sampling.PADDING``.
        lengths: Tokens of every training row, wanted for ``--packing`` and ``--group_by_length``.
        after_save: Called on the saving process with every folder a model or adapter was saved to.
        feature_writer: Keeps what the vision tower gave, with ``--cache_vision_features``.
        **kwargs: As for ``ResilientTrainer``.
    """

    def __init__(
        self,
        *,
        generation: Generation,
        padding_sample: Sample,
        lengths: np.ndarray | None = None,
        after_save: Callable[[Path], None] | None = None,
        feature_writer: FeatureWriter | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                kwargs[name] = PaddedRows(kwargs[name], padding_sample)
        super().__init__(**kwargs)
        self.generation = generation
        self.lengths = lengths
        self.after_save = after_save
        self.feature_writer = feature_writer
        # Trainer guesses both from the model's signature, which an adapter hides (transformers 5.23).
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._meter = ThroughputMeter()
        self._source_losses = SourceLosses(
            self.train_dataset.rows.mixture.names if self.train_dataset else []
        )
        self._parameters = sum(part.total for part in count_parts(self.model, generation).values())
        self._eval_sums: Tensor | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        multiple = self._train_batch_size * args.world_size
        order = _order(
            (train_dataset or self.train_dataset).rows.mixture,
            seed=seed,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        if args.train_sampling_strategy == "group_by_length":
            order = grouped_by_length(order, self.lengths, batch_size=multiple, seed=seed)
        if not args.packing:
            return EpochSampler(order, multiple=multiple)
        return PackingSampler(
            order,
            multiple=multiple,
            lengths=self.lengths,
            capacity=args.model_max_length,
            window=args.packing_window,
            seed=seed,
        )

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

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        order = _order(eval_dataset.rows.mixture, seed=self.args.seed, shuffle=False)
        return EpochSampler(order, multiple=self.args.eval_batch_size * self.args.world_size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimizer, with the parts' own learning rates in it."""
        optimizer = super().create_optimizer(model)
        rates = self.args.learning_rates
        if rates.differ:
            split_by_rate(optimizer, self.model if model is None else model, self.generation, rates)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Count the batch, and leave the rest to Trainer and the model's forward."""
        inputs = dict(inputs)
        provenance: Provenance = inputs.pop("provenance")
        self._meter.add(inputs, samples=sum(row is not None for row in provenance.rows))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._keep_features(outputs)
        if len(self._source_losses.names) > 1:
            self._source_losses.add(outputs["token_losses"], provenance.supervised_sources)
        return (loss, outputs) if return_outputs else loss

    def _keep_features(self, outputs: Any) -> None:
        if self.feature_writer is not None:
            self.feature_writer.keep(outputs.get("new_features"))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, and see what the vision tower gave on disk."""
        output = super().train(*args, **kwargs)
        if self.feature_writer is not None:
            self.feature_writer.close()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sources' losses, speed, shares and memory to every line that reports a training loss."""
        if "loss" in logs:
            logs = {
                **logs,
                **self._source_losses.read(self.accelerator),
                **self._meter.read(self.accelerator),
            }
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.after_save is not None and self.args.should_save:
            self.after_save(Path(output_dir or self.args.output_dir))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x tokens x parameters; Trainer's own counts the parameters anew in every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate from summed counts.

        Trainer averages the losses of batches, which is wrong when they hold different numbers of
        supervised tokens.

        Returns:
            Metrics ``<prefix>_loss`` (mean over supervised tokens, nats), ``<prefix>_token_accuracy``
            and ``<prefix>_supervised_tokens``.
        """
        self._eval_sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.feature_writer is not None:
            self.feature_writer.close()
        loss_sum, tokens, correct = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / max(tokens, 1)
        output.metrics[f"{metric_key_prefix}_token_accuracy"] = correct / max(tokens, 1)
        output.metrics[f"{metric_key_prefix}_supervised_tokens"] = int(tokens)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Add one batch to the sums of the evaluation."""
        self.evaluates_batch(inputs)
        inputs = self._prepare_inputs(dict(inputs))
        del inputs["provenance"]
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        self._keep_features(output)
        found = (output["loss_sum"], output["token_count"], output["correct_count"])
        self._eval_sums += torch.stack([value.to(torch.float64) for value in found])
        return output["loss"].detach(), None, None


def _order(mixture: Mixture, *, seed: int, shuffle: bool) -> Order:
    return lambda epoch: mixture.epoch_order(seed=seed, epoch=epoch, shuffle=shuffle)
