"""A fine-tuning run: arguments -> model folder -> data -> model -> trainer -> save.

The launchers finetune_lora.sh and finetune_ds.sh start it on all GPUs; by itself it trains on one device:

    python finetune.py --model_name_or_path MODEL --data_path ROWS --output_dir FOLDER
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from minicpm_tune.logs import silence_libraries
from minicpm_tune.settings.finetune_command import answer_or_check
from minicpm_tune.training.process_lifecycle import end_at_interrupt

if __name__ == "__main__":
    # Before the imports below: torch and transformers take seconds, which --help and a mistake need not wait for and
    # in which Ctrl-C may come.
    end_at_interrupt()
    answer_or_check(sys.argv[1:])
    silence_libraries()

from transformers import PreTrainedModel, set_seed

from dataset import SupervisedDataset, data_collator
from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.answering.prediction_callback import PredictionCallback
from minicpm_tune.checkpoints.model_folder import check_llm_type, resolve_model_folder
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.quantized_files import check_training, stored_quantization
from minicpm_tune.data.bad_rows import FILE_NAME as BAD_ROWS_FILE
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.data.sampling import first_of_each_file, held_out_rows
from minicpm_tune.data.vision_cache import use_cache
from minicpm_tune.lora.adapter_folders import complete_adapter_folder, fit_to_original_base
from minicpm_tune.lora.build import add_adapter, log_adapted_modules, set_frozen_copies_aside
from minicpm_tune.lora.loading import adapter_to_continue, check_adapter, load_adapter, new_tokens_of_run
from minicpm_tune.models.autocast import hold_activations_in_16_bit
from minicpm_tune.models.loading import add_token_rows, load_model
from minicpm_tune.models.parameter_parts import (
    check_parts,
    count_parts,
    freeze,
    log_parts,
    raise_precision_of_trained,
)
from minicpm_tune.models.speed_options import Checkpointing, set_checkpointing, use_fast_kernels
from minicpm_tune.planning.fitting import choose_checkpointing
from minicpm_tune.settings.arguments import Arguments, TrainingArguments, parse_arguments
from minicpm_tune.settings.finetune_command import log_how_to_continue, log_what_comes_next
from minicpm_tune.training.process_lifecycle import ProcessLifecycle
from minicpm_tune.training.resilient_trainer import EarlyStopping, RunContext
from minicpm_tune.training.run_folder import RunFolder, write_failures_as_messages
from minicpm_tune.training.run_plan import check_continues, check_rates, log_plan, plan_run
from minicpm_tune.training.run_record import start_record
from minicpm_tune.training.run_report import RunReport
from minicpm_tune.training.step_metrics import LossCurve
from trainer import CPMTrainer

logger = logging.getLogger("minicpm_tune.finetune")

Datasets = tuple[SupervisedDataset | None, SupervisedDataset | None]


def main(argv: list[str]) -> int:
    """Run one fine-tuning. Returns the exit code: 0, or 1 after one message for a user's mistake."""
    process = ProcessLifecycle()
    with process.user_errors_as_messages():
        run(argv, process)
    return process.end()


def run(argv: list[str], process: ProcessLifecycle) -> None:
    """The phases of a run, in their order."""
    arguments = parse_arguments(argv)
    output = RunFolder(arguments.training)
    output.take()
    peers = process.begin(arguments.training)
    output.prepare()
    record = start_record(argv, arguments)

    folder, processing = read_model_folder(arguments)
    datasets = read_data(arguments, processing)
    record.add_rows(*datasets)
    checkpointing = plan_memory(arguments, folder, datasets[0])
    model = read_model(arguments, folder, processing)
    model = choose_what_trains(arguments, model, processing.generation, checkpointing)
    context = RunContext(peers=peers, owns_folder=output.owns_folder)
    trainer = build_trainer(arguments, model, folder, processing, datasets, context)

    outcome = train_and_save(trainer, argv)
    if outcome == "finished":
        log_bad_rows(datasets)
        if arguments.training.do_train:
            log_what_comes_next(arguments.training.output_dir, adapter=arguments.training.use_lora)
        output.close()
    record.end(outcome, step=trainer.state.global_step)
    write_report(trainer)


def read_model_folder(arguments: Arguments) -> tuple[Path, Processing]:
    """Find or download the model folder, and check that it can be trained as asked.

    Returns:
        The folder, and how it turns conversations, images and videos into tokens and patches.
    """
    model, data, training, lora = arguments
    with training.main_process_first(desc="model files"):
        folder = resolve_model_folder(model.model_name_or_path, cache_dir=training.cache_dir)
    tokens = new_tokens_of_run(model.new_tokens, lora if training.use_lora else None)
    processing = load_processing(folder, data, new_tokens=tokens)
    generation = processing.generation
    check_llm_type(generation, training.llm_type)
    check_parts(generation, **training.tuned_around_llm)
    check_training(
        stored_quantization(folder), generation, quant_bits=lora.held_bits, **training.tuned_around_llm
    )
    if training.use_lora:
        check_adapter(
            lora, folder, generation, **training.tuned_around_llm, adds_tokens=bool(processing.new_tokens),
            downsample_mode=processing.media.downsample_mode,
        )  # fmt: skip
    return folder, processing


def read_data(arguments: Arguments, processing: Processing) -> Datasets:
    """Read the training and evaluation rows and check all of them, before any weights are loaded.

    Returns:
        The training and the evaluation rows; None for what is not asked for.
    """
    _, data, training, _ = arguments

    def read(path: str | None, most: int | None) -> SupervisedDataset:
        assert path is not None  # check_arguments has seen to it
        with training.main_process_first(desc="index of the data files"):
            rows = SupervisedDataset(path, processing, max_samples=most)
        rows.bad_rows.path = Path(training.output_dir) / BAD_ROWS_FILE
        rows.lengths = check_rows(rows)
        return rows

    train_rows = eval_rows = None
    evaluates = training.do_eval or training.eval_strategy != "no"
    if evaluates and data.eval_split is not None:
        train_rows, eval_rows = hold_out(read(data.data_path, data.max_samples), data.eval_split, arguments)
    else:
        if training.do_train:
            train_rows = read(data.data_path, data.max_samples)
        if evaluates:
            eval_rows = read(data.eval_data_path, data.eval_max_samples)
    if train_rows is not None:
        if training.resume_from_checkpoint:
            check_continues(Path(training.resume_from_checkpoint), training, rows=len(train_rows))
        log_plan(plan_run(training, train_rows), training)
    return train_rows, eval_rows


def hold_out(rows: SupervisedDataset, share: float, arguments: Arguments) -> Datasets:
    """Divide the rows into those that train and those of the evaluation, as ``--eval_split`` says."""
    _, data, training, _ = arguments
    seed = training.seed if training.data_seed is None else training.data_seed
    held_out = held_out_rows(rows, share, seed=seed)
    evaluated = first_of_each_file(held_out, rows.mixture.ends, data.eval_max_samples)
    train_rows = rows.part(rows.mixture.part(~held_out)) if training.do_train else None
    return train_rows, rows.part(rows.mixture.part(evaluated, once=True))


def plan_memory(
    arguments: Arguments, folder: Path, train_rows: SupervisedDataset | None
) -> Checkpointing | None:
    """Say whether the run fits, before any weights are loaded, and choose what is computed again where that is free."""
    _, _, training, lora = arguments
    if train_rows is None or train_rows.lengths is None or not len(train_rows):
        return None
    assert training.model_max_length is not None  # only predictions have no limit
    length = training.model_max_length
    if not training.packing:
        length = min(length, int(train_rows.lengths.max()))
    return choose_checkpointing(training, lora, folder, length=length)


def read_model(arguments: Arguments, folder: Path, processing: Processing) -> PreTrainedModel:
    """Load the weights."""
    set_seed(arguments.training.seed)  # reading data has drawn random numbers; how many must not matter
    model = load_model(
        folder,
        dtype=arguments.training.weight_dtype,
        attention=arguments.model.attn_implementation,
        quant_bits=arguments.lora.held_bits,
        downsample_mode=processing.media.downsample_mode,
    )
    add_token_rows(model, processing.new_tokens)
    return model


def choose_what_trains(
    arguments: Arguments, model: Any, generation: Generation, checkpointing: Checkpointing | None
) -> PreTrainedModel:
    """Add or continue an adapter, or freeze parts of the model, and log what trains."""
    _, _, training, lora = arguments
    use_fast_kernels(model, training)
    set_checkpointing(model, generation, training, checkpointing)
    set_seed(training.seed)  # how weights are loaded must not decide what a new adapter starts from
    continued = adapter_to_continue(lora) if training.use_lora else None
    if continued is not None:
        model = load_adapter(model, continued, trainable=True)
    elif training.use_lora:
        model = add_adapter(model, generation, lora, **training.tuned_around_llm)
        log_adapted_modules(model)
    else:
        freeze(model, generation, **training.tuned_around_llm, llm=training.tune_llm)
    if training.use_lora:
        set_frozen_copies_aside(model)
    if not training.deepspeed:
        raise_precision_of_trained(model)
        hold_activations_in_16_bit(model, residual=not training.residual_in_fp32)
    counts = count_parts(model, generation)
    check_rates(training.learning_rates, counts)
    log_parts(counts, generation)
    return model


def build_trainer(
    arguments: Arguments,
    model: PreTrainedModel,
    folder: Path,
    processing: Processing,
    datasets: Datasets,
    context: RunContext,
) -> CPMTrainer:
    """Put model, rows and arguments together."""
    _, _, training, lora = arguments
    train_rows, eval_rows = datasets
    padding = processing.padding_sample()
    features = None
    if training.cache_vision_features is not None:
        cached = [rows for rows in datasets if rows is not None]
        features = use_cache(
            training.cache_vision_features, folder, model, cached, precision=training.computes_in
        )
    complete_adapter = partial(
        complete_adapter_folder,
        base=folder,
        generation=processing.generation,
        quant_bits=lora.held_bits,
        downsample_mode=processing.media.downsample_mode,
        new_tokens=processing.new_tokens,
    )
    trainer = CPMTrainer(
        model=model,
        args=training,
        generation=processing.generation,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=partial(
            data_collator, pad_token_id=int(padding["input_ids"][0]), packing=training.packing
        ),
        padding_sample=padding,
        run_context=context,
        feature_writer=features,
        after_save=complete_adapter if training.use_lora else None,
        callbacks=[LossCurve()],
    )
    add_callbacks(trainer, training, eval_rows)
    return trainer


def add_callbacks(
    trainer: CPMTrainer, training: TrainingArguments, eval_rows: SupervisedDataset | None
) -> None:
    """Add what acts at evaluations, where it is asked for, and the run's report."""
    if training.do_train and training.run_report:
        trainer.add_callback(RunReport(None if eval_rows is None else PredictionRows(eval_rows)))
    if training.predict_with_generate:
        assert eval_rows is not None  # check_arguments has seen to it
        trainer.add_callback(
            PredictionCallback(
                trainer,
                PredictionRows(eval_rows),
                samples=training.generation_samples,
                batch_size=training.per_device_eval_batch_size,
                max_new_tokens=training.generation_max_new_tokens,
            )
        )
    if (patience := training.early_stopping_patience) is not None:
        # Behind the answers, whose metrics it may look at.
        trainer.add_callback(EarlyStopping(patience, training.early_stopping_threshold))


def train_and_save(trainer: CPMTrainer, argv: list[str]) -> str:
    """Train, save the model or adapter, and evaluate.

    Returns:
        How the run ended: finished, or stopped by a signal.
    """
    training: Any = trainer.args
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if trainer.was_stopped:
            log_how_to_continue(argv, step=trainer.state.global_step, steps=trainer.state.max_steps)
            return "stopped"
        with write_failures_as_messages(Path(training.output_dir)):
            trainer.save_state()
            trainer.save_model()  # on every process: under ZeRO-3 it gathers
            if training.should_save:
                fit_to_original_base(trainer.model, Path(training.output_dir))
    if training.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    return "finished"


def write_report(trainer: CPMTrainer) -> None:
    """Write the page about the run, now that its record says how it ended."""
    report = trainer.pop_callback(RunReport)
    if isinstance(report, RunReport):
        report.write(trainer.args, trainer.state)


def log_bad_rows(datasets: Datasets) -> None:
    """Log how many rows were left out, and why; both data sets write to one list."""
    logger.info("%s", next(rows.bad_rows.summary() for rows in datasets if rows is not None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
