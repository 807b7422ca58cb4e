"""The steps of ``finetune.py`` between arguments and training."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dataset import SupervisedDataset, data_collator, padding_sample
from minicpm_tune.answering.prediction_callback import PredictionCallback
from minicpm_tune.answering.prediction_rows import PredictionRows
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.quantized_files import check_training, stored_quantization
from minicpm_tune.data.bad_rows import FILE_NAME as BAD_ROWS_FILE
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.data.vision_cache import FeatureWriter, check_tower_is_frozen, open_cache
from minicpm_tune.lora.continuing import check_continued
from minicpm_tune.lora.saving import complete_adapter_folder, fit_to_original_base
from minicpm_tune.models.parameter_parts import count_parts, parts_table, raise_precision_of_trained
from minicpm_tune.settings.argument_groups import DataArguments, LoraArguments
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training.checkpointing import check_continues, run_shape
from minicpm_tune.training.learning_rates import check_rates
from minicpm_tune.training.loss_curve import LossCurve
from minicpm_tune.training.peer_monitor import PeerMonitor
from minicpm_tune.training.process_lifecycle import StepLog
from minicpm_tune.training.resilient_trainer import RunContext
from minicpm_tune.training.stop_signals import command_to_continue
from trainer import CPMTrainer

logger = logging.getLogger(__name__)


def load_data_rules(data: DataArguments, training: TrainingArguments, folder: Path) -> Processing:
    """Read from the checkpoint how conversations, images and videos become tokens and patches."""
    return load_processing(
        folder,
        max_slice_nums=training.max_slice_nums,
        **data.processing_options(),
    )


def check_start(
    folder: Path, generation: Generation, training: TrainingArguments, lora: LoraArguments
) -> None:
    """See that the checkpoint, and the adapter to go on with, can train as asked, before anything large is read."""
    parts = {"vision": training.tune_vision, "resampler": training.tune_resampler}
    quant_bits = lora.quant_bits if lora.q_lora else None
    check_training(stored_quantization(folder), generation, quant_bits=quant_bits, **parts)
    if training.use_lora:
        check_continued(lora, folder, generation, **parts)


def load_datasets(
    data: DataArguments, training: TrainingArguments, processing: Processing
) -> tuple[SupervisedDataset | None, SupervisedDataset | None]:
    """Read and check the training and the evaluation rows; None for what is not asked for."""
    options = data.data_options(training.model_max_length)

    def load(path: str | None) -> SupervisedDataset:
        assert path is not None  # check_arguments has seen to it
        with training.main_process_first(desc="index of the data files"):
            rows = SupervisedDataset(path, processing, options)
        rows.bad_rows.path = Path(training.output_dir) / BAD_ROWS_FILE
        rows.check_rows()
        return rows

    train = load(data.data_path) if training.do_train else None
    evaluates = training.do_eval or training.eval_strategy != "no"
    return train, load(data.eval_data_path) if evaluates else None


def settle_training_arguments(training: TrainingArguments) -> None:
    """Set what follows from how this model trains, where the user left it open."""
    if training.ddp_find_unused_parameters is None:
        # Every trained parameter gets a gradient from every batch, so nothing need be looked for.
        training.ddp_find_unused_parameters = False
    # Trainer's filter hides losses that are not finite, and waits for the device after every batch to do so;
    # ResilientTrainer looks once per step, and does not apply such a step.
    training.logging_nan_inf_filter = False


def load_dtype(training: TrainingArguments) -> torch.dtype:
    """The dtype in which weights are loaded: that of the asked-for precision."""
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def log_what_trains(model: PreTrainedModel, generation: Generation, training: TrainingArguments) -> None:
    """Log the table of parts, and the totals as the official script prints them."""
    if not training.deepspeed:
        raise_precision_of_trained(model)
    counts = count_parts(model, generation)
    check_rates(training.learning_rates, counts)
    total = sum(count.total for count in counts.values())
    trainable = sum(count.trainable for count in counts.values())
    logger.info("%s", parts_table(counts))
    logger.info("%s", {"Total": total, "Trainable": trainable})
    logger.info("llm_type=%s", generation.llm_type)


def use_vision_cache(
    model: PreTrainedModel,
    training: TrainingArguments,
    folder: Path,
    *datasets: SupervisedDataset | None,
) -> FeatureWriter | None:
    """With ``--cache_vision_features``: have the data sets look features up; give what keeps new ones."""
    if training.cache_vision_features is None:
        return None
    read = [rows for rows in datasets if rows is not None]
    generation = read[0].processing.generation
    check_tower_is_frozen(model, generation)
    precision = f"{load_dtype(training)}, {'DeepSpeed' if training.deepspeed else 'autocast'}"
    cache = open_cache(training.cache_vision_features, folder, generation, precision=precision)
    for rows in read:
        rows.processing = replace(rows.processing, vision_cache=cache)
    logger.info("Vision features are kept in %s", cache.folder)
    return FeatureWriter(cache)


def make_trainer(
    model: PreTrainedModel,
    training: TrainingArguments,
    processing: Processing,
    *,
    train_rows: SupervisedDataset | None,
    eval_rows: SupervisedDataset | None,
    watch: PeerMonitor,
    moves: bool,
    after_save: Callable[[Path], None] | None,
    feature_writer: FeatureWriter | None,
) -> CPMTrainer:
    """Put everything together."""
    needs_lengths = training.do_train and (
        training.packing or training.train_sampling_strategy == "group_by_length"
    )
    padding = padding_sample(processing)
    trainer = CPMTrainer(
        generation=processing.generation,
        padding_sample=padding,
        lengths=train_rows.lengths() if train_rows is not None and needs_lengths else None,
        run_context=RunContext(
            watch=watch, moves=moves, files=[] if train_rows is None else train_rows.source_names
        ),
        after_save=after_save,
        feature_writer=feature_writer,
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=partial(
            data_collator,
            pad_token_id=int(padding["input_ids"][0]),
            packing=training.packing,
            cpu_copies=processing.generation.native,
        ),
    )
    trainer.add_callback(StepLog())
    trainer.add_callback(LossCurve())
    return trainer


def answer_while_training(trainer: CPMTrainer, data: DataArguments, processing: Processing) -> None:
    """With ``--predict_with_generate true``: have evaluation rows answered at every evaluation."""
    training: Any = trainer.args
    if not training.predict_with_generate:
        return
    assert data.eval_data_path is not None  # check_arguments has seen to it
    rows = PredictionRows(SupervisedDataset(data.eval_data_path, processing, data.data_options(None)))
    trainer.add_callback(
        PredictionCallback(
            trainer,
            rows,
            samples=training.generation_samples,
            batch_size=training.per_device_eval_batch_size,
            max_new_tokens=training.generation_max_new_tokens,
        )
    )


def base_recorder(
    folder: Path, generation: Generation, training: TrainingArguments, *, quant_bits: int | None
) -> Callable[[Path], None] | None:
    """What keeps beside every saved adapter which base it was trained on; None where no adapter is saved."""
    if not training.use_lora:
        return None
    return partial(complete_adapter_folder, base=folder, generation=generation, quant_bits=quant_bits)


def check_resume(training: TrainingArguments, train_rows: SupervisedDataset | None) -> None:
    """See that the checkpoint to continue from was written by a run of this shape, before weights are loaded."""
    if training.do_train and training.resume_from_checkpoint:
        assert train_rows is not None  # load_datasets has read them
        shape = run_shape(training, len(train_rows))
        check_continues(Path(training.resume_from_checkpoint), shape, skips_data=training.ignore_data_skip)


def say_bad_rows(*datasets: SupervisedDataset | None) -> None:
    """Say how many rows were left out, and why; both data sets write to one list."""
    read = [rows for rows in datasets if rows is not None]
    logger.info("%s", read[0].bad_rows.summary())


def say_how_to_continue(trainer: CPMTrainer, argv: list[str]) -> None:
    """After a signal: what was saved, and the command that goes on from it."""
    logger.info(
        "Stopped after step %d of %d; checkpoint-%d holds everything. To continue, in %s:\n\n    %s\n",
        trainer.state.global_step, trainer.state.max_steps, trainer.state.global_step, os.getcwd(),
        command_to_continue(argv, script=sys.argv[0]),
    )  # fmt: skip


def finish_adapter(trainer: CPMTrainer) -> None:
    """Make a saved adapter fit the original base weights."""
    if trainer.args.should_save:
        fit_to_original_base(trainer.model, Path(trainer.args.output_dir))
