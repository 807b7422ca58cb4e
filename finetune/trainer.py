"""A step: batch -> loss -> update -> log -> checkpoint; what differs from transformers.Trainer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from minicpm_tune.batch import Provenance, Sample
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.data.sampling import EpochSampler, Order, PackingSampler, PaddedRows, grouped_by_length
from minicpm_tune.data.vision_cache import FeatureWriter
from minicpm_tune.files import give_umask_mode
from minicpm_tune.models.parameter_parts import count_parts
from minicpm_tune.training.resilient_trainer import ResilientTrainer, shard_on_cpus, split_by_rate
from minicpm_tune.training.run_record import write_model_card
from minicpm_tune.training.step_metrics import EvaluationSums, SourceLosses, ThroughputMeter


class CPMTrainer(ResilientTrainer):
    """Trains a MiniCPM-V or XComposer2 model.

    - Every process runs the same number of steps on an order without repeated rows.
    - The loss is the sum over supervised tokens divided by their number in the whole optimizer step, over all
      micro-batches and processes; the model's forward divides, see ``models/loss.py``. Where messages have weights,
      both are weighted.
    - Evaluation adds up counts; logits are never kept.

    Args:
        generation: The model's generation.
        padding_sample: A sample without supervised tokens, for ``sampling.PADDING``.
        after_save: Called on the saving process with every folder a model or adapter was saved to.
        feature_writer: Keeps what the vision tower gave, with ``--cache_vision_features``.
        **kwargs: As for ``ResilientTrainer``.
    """

    train_dataset: PaddedRows | None

    def __init__(
        self,
        *,
        generation: Generation,
        padding_sample: Sample,
        after_save: Callable[[Path], None] | None = None,
        feature_writer: FeatureWriter | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                kwargs[name] = PaddedRows(kwargs[name], padding_sample)
        super().__init__(**kwargs)
        self.generation = generation
        self.after_save = after_save
        self.feature_writer = feature_writer
        # Trainer guesses both from the model's signature, which an adapter hides (transformers 5.23).
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._throughput = ThroughputMeter()
        self.files = self.train_dataset.rows.mixture.names if self.train_dataset else []
        self._source_losses = SourceLosses(self.files)
        self._evaluation = EvaluationSums()
        self._parameters = sum(part.total for part in count_parts(self.model, generation).values())

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer; ``--fsdp`` divides the model on CPUs as well, and DDP keeps no second copy of the gradients."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.args.fsdp:
            shard_on_cpus(self)

    # The batch

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        padded: Any = train_dataset or self.train_dataset
        rows = padded.rows  # their lengths are known where they are used: the rows were checked
        seed = args.seed if args.data_seed is None else args.data_seed
        multiple = self._train_batch_size * args.world_size
        shuffle = args.train_sampling_strategy != "sequential"
        order: Order = partial(rows.mixture.epoch_order, seed=seed, shuffle=shuffle)
        if args.train_sampling_strategy == "group_by_length":
            order = grouped_by_length(order, rows.lengths, batch_size=multiple, seed=seed)
        if not args.packing:
            return EpochSampler(order, multiple=multiple)
        assert args.model_max_length is not None  # only predictions have no limit
        return PackingSampler(
            order,
            multiple=multiple,
            lengths=rows.lengths,
            capacity=args.model_max_length,
            window=args.packing_window,
            seed=seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        order = partial(eval_dataset.rows.mixture.epoch_order, seed=self.args.seed, shuffle=False)
        return EpochSampler(order, multiple=self.args.eval_batch_size * self.args.world_size)

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Take the provenance out, and leave the rest to Trainer and the model's forward."""
        inputs = dict(inputs)
        provenance: Provenance = inputs.pop("provenance")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._throughput.add(inputs, samples=sum(row is not None for row in provenance.rows))
        if len(self.files) > 1:
            self._source_losses.add(
                outputs["token_losses"], provenance.supervised_sources, inputs.get("loss_weights")
            )
        self._keep_features(outputs)
        return (loss, outputs) if return_outputs else loss

    def _keep_features(self, outputs: Any) -> None:
        if self.feature_writer is not None:
            self.feature_writer.keep(outputs.get("new_features"))

    # The update

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Trainer's optimizer, with the parts' own learning rates in it."""
        optimizer = super().create_optimizer(model)
        rates = self.args.learning_rates
        if rates.differ:
            split_by_rate(optimizer, self.model if model is None else model, self.generation, rates)
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x tokens x parameters; Trainer's own counts the parameters anew in every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    # The log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sources' losses, speed, shares and memory to every line that reports a training loss."""
        if "loss" in logs:
            logs |= self._source_losses.read(self.accelerator) | self._throughput.read(self.accelerator)
        super().log(logs, start_time)

    # The checkpoint

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            give_umask_mode(folder)
            if self.after_save is not None:
                self.after_save(folder)
            if isinstance(self.model, PeftModel) and self.train_dataset is not None:
                write_model_card(
                    folder,
                    config=self.model.active_peft_config,
                    training=self.args,
                    state=self.state,
                    data=self.train_dataset.rows.mixture,
                )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, and see what the vision tower gave on disk."""
        output = super().train(*args, **kwargs)
        if self.feature_writer is not None:
            self.feature_writer.close()
        return output

    # The evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate from summed counts; see ``EvaluationSums`` for the metrics."""
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, **kwargs)
        if self.feature_writer is not None:
            self.feature_writer.close()
        assert output.metrics is not None  # Trainer has put the loss there
        output.metrics.update(self._evaluation.read(self.accelerator, kwargs["metric_key_prefix"]))
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Add one batch to the evaluation's sums."""
        self.evaluates_batch(inputs)
        inputs = self._prepare_inputs(dict(inputs))
        del inputs["provenance"]
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        self._evaluation.add(output)
        self._keep_features(output)
        return output["loss"].detach(), None, None
