"""Fine-tune a MiniCPM-V model: arguments -> model folder -> data -> model -> trainer -> save.

Started by ``finetune_ds.sh`` and ``finetune_lora.sh`` through torchrun, or by itself on one device:

    python finetune.py --model_name_or_path ... --data_path ... --output_dir ...
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from minicpm_tune.logs import silence
from minicpm_tune.settings.help_page import show_help_when_asked

if TYPE_CHECKING:
    from minicpm_tune.training.process_lifecycle import ProcessLifecycle


def main(argv: list[str]) -> int:
    """Run one fine-tuning, and give the exit code: 0, or 1 with one message for a mistake of the user's."""
    show_help_when_asked(argv)
    silence()
    # Imported here: torch and transformers take seconds that --help need not wait for.
    from minicpm_tune.training.process_lifecycle import ProcessLifecycle

    control = ProcessLifecycle()
    with control.user_errors_as_messages():
        run(argv, control)
    return control.end()


def run(argv: list[str], control: ProcessLifecycle) -> None:
    """The steps of a fine-tuning, in their order."""
    from transformers import set_seed

    from minicpm_tune.checkpoints.model_generations import check_llm_type
    from minicpm_tune.lora.continuing import new_or_continued_adapter
    from minicpm_tune.models.loading import load_model, resolve_model_folder
    from minicpm_tune.models.parameter_parts import freeze
    from minicpm_tune.models.speed_options import apply_liger, set_checkpointing
    from minicpm_tune.settings.arguments import parse_arguments
    from minicpm_tune.training.checkpointing import write_failures_told
    from minicpm_tune.training.preparation import (
        answer_while_training,
        base_recorder,
        check_resume,
        check_start,
        finish_adapter,
        load_data_rules,
        load_datasets,
        load_dtype,
        log_what_trains,
        make_trainer,
        say_bad_rows,
        say_how_to_continue,
        settle_training_arguments,
        use_vision_cache,
    )
    from minicpm_tune.training.run_folder import RunFolder
    from minicpm_tune.training.run_record import start_record

    model_args, data_args, training, lora = parse_arguments(argv)
    run_folder = RunFolder(training)
    run_folder.take()
    watch = control.begin(training)
    run_folder.prepare()
    record = start_record(argv, model_args, data_args, training, lora)

    with training.main_process_first(desc="checkpoint files"):
        folder = resolve_model_folder(model_args.model_name_or_path, cache_dir=training.cache_dir)
    processing = load_data_rules(data_args, training, folder)
    generation = processing.generation
    check_llm_type(generation, training.llm_type)
    quant_bits = lora.quant_bits if lora.q_lora else None
    check_start(folder, generation, training, lora)
    train_rows, eval_rows = load_datasets(data_args, training, processing)
    settle_training_arguments(training)
    check_resume(training, train_rows)
    record.add_rows(train_rows, eval_rows)

    set_seed(
        training.seed
    )  # reading data has drawn random numbers; a new adapter must not depend on how many
    model: Any = load_model(
        folder,
        generation,
        dtype=load_dtype(training),
        attention=model_args.attn_implementation,
        quant_bits=quant_bits,
    )
    apply_liger(model, training)
    set_checkpointing(model, generation, training)
    set_seed(training.seed)  # here: how weights are loaded must not decide what adapters start from
    if training.use_lora:
        model = new_or_continued_adapter(
            model, generation, lora, vision=training.tune_vision, resampler=training.tune_resampler
        )
    else:
        freeze(
            model,
            generation,
            vision=training.tune_vision,
            resampler=training.tune_resampler,
            llm=training.tune_llm,
        )
    log_what_trains(model, generation, training)

    trainer = make_trainer(
        model,
        training,
        processing,
        train_rows=train_rows,
        eval_rows=eval_rows,
        watch=watch,
        moves=run_folder.moves,
        feature_writer=use_vision_cache(model, training, folder, train_rows, eval_rows),
        after_save=base_recorder(folder, generation, training, quant_bits=quant_bits),
    )
    answer_while_training(trainer, data_args, processing)
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if trainer.was_stopped:
            say_how_to_continue(trainer, argv)
            record.end("stopped", step=trainer.state.global_step)
            return
        with write_failures_told(run_folder.path):
            trainer.save_state()
            trainer.save_model()  # on every process: under ZeRO-3 it gathers
            finish_adapter(trainer)
    if training.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    say_bad_rows(train_rows, eval_rows)
    record.end("finished", step=trainer.state.global_step)
    run_folder.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
