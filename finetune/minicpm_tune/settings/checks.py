"""Every check of the command line that needs no model.

All problems are collected and raised once, before weights are loaded or processes are joined.
"""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from minicpm_tune import output_folder
from minicpm_tune.errors import UserError
from minicpm_tune.settings.argument_groups import LoraArguments, ModelArguments
from minicpm_tune.settings.data_arguments import DataArguments, missing_sources
from minicpm_tune.settings.deepspeed_setup import DeepSpeedConfigError, contradictions, read_deepspeed_config
from minicpm_tune.settings.trainer_checks import trainer_problems

_AT_LEAST_ONE = (
    "model_max_length", "max_slice_nums", "packing_window", "generation_samples", "generation_max_new_tokens",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "vision_lr", "audio_lr", "resampler_lr", "llm_lr", "embed_lr", "lora_lr_ratio", "weight_decay",
    "warmup_steps", "max_grad_norm", "dataloader_num_workers",
)  # fmt: skip


class UsageError(UserError):
    """A command line, folder or file that can't be used; the message says what to change."""


def check_arguments(
    model: ModelArguments, data: DataArguments, training: Namespace, lora: LoraArguments
) -> None:
    """Collect everything that is wrong with a command line.

    Args:
        model: The model's arguments.
        data: The data's arguments.
        training: Values of all fields of ``TrainingArguments``, not yet made into one, because making one
            joins the processes.
        lora: The adapter's arguments.

    Raises:
        UsageError: When anything is wrong; one line per problem.
    """
    found = (
        _what_trains(training, lora), _numbers(training, lora), _model_folder(model), _new_tokens(model, training),
        _data_files(data, training), _vision_cache(training), trainer_problems(training), _deepspeed(training),
        _output_folder(training),
    )  # fmt: skip
    raise_problems(chain(*found))


def raise_problems(found: Iterable[str]) -> None:
    """Raise all problems as one error; nothing when there is none."""
    problems = list(found)
    if len(problems) == 1:
        raise UsageError(problems[0])
    if problems:
        listed = "\n".join(f"  {number}. {text}" for number, text in enumerate(problems, start=1))
        raise UsageError(f"{len(problems)} problems with the command line:\n{listed}")


def _what_trains(training: Namespace, lora: LoraArguments) -> Iterator[str]:
    if training.use_lora and training.tune_llm:
        yield (
            "The model cannot simultaneously adjust LLM parameters and apply LoRA. "
            "Add --tune_llm false for LoRA, or --use_lora false to train all of the LLM's weights."
        )
    parts = (training.tune_vision, training.tune_audio, training.tune_resampler, training.tune_llm)
    if not any(parts) and not training.use_lora:
        yield (
            "Nothing would be trained: --tune_vision, --tune_resampler, --tune_llm and --use_lora are all "
            "false. Set at least one to true."
        )
    if lora.q_lora and not training.use_lora:
        yield "--q_lora true needs --use_lora true: quantized weights can only be trained through adapters."
    if lora.q_lora and lora.quant_bits == 8 and training.fsdp not in (None, "", "false", False):
        yield "--quant_bits 8 can't be divided by --fsdp. Use --quant_bits 4, or leave --fsdp out."
    if lora.lora_weight_path:
        yield from _lora_weight_path(training, lora)
    if lora.lora_layers_pattern and lora.lora_layers_to_transform is None:
        yield "--lora_layers_pattern acts only together with --lora_layers_to_transform: add it, or leave both out."
    yield from _rates(training)
    yield from _adapter_start(training, lora)
    try:
        lora.layer_replication  # noqa: B018  (reading it parses it)
    except ValueError as error:
        yield str(error)


def _new_tokens(model: ModelArguments, training: Namespace) -> Iterator[str]:
    if model.new_tokens is None:
        return
    if not Path(model.new_tokens).expanduser().is_file():
        yield f"--new_tokens {model.new_tokens}: no such file. Give a text file with a token in each line."
    if not (training.tune_llm or training.use_lora):
        yield "--new_tokens is given, but the embeddings don't train: they do with --tune_llm or --use_lora."


def _rates(training: Namespace) -> Iterator[str]:
    """Learning rates of parts that don't train would have no effect."""
    switches = {
        "vision_lr": training.tune_vision,
        "audio_lr": training.tune_audio,
        "resampler_lr": training.tune_resampler,
        "llm_lr": training.tune_llm,
        "lora_lr_ratio": training.use_lora,
    }
    for flag, trains in switches.items():
        if getattr(training, flag) is not None and not trains:
            switch = "use_lora" if flag == "lora_lr_ratio" else f"tune_{flag.removesuffix('_lr')}"
            yield f"--{flag} is given, but --{switch} is false: set it to true, or leave --{flag} out."
    if training.embed_lr is not None and not (training.tune_llm or training.use_lora):
        yield "--embed_lr is given, but the embeddings don't train: they do with --tune_llm or --use_lora."


def _adapter_start(training: Namespace, lora: LoraArguments) -> Iterator[str]:
    start = lora.init_lora_weights
    if not re.fullmatch(r"true|gaussian|pissa|pissa_niter_\d+|olora", start):
        yield f"--init_lora_weights is {start!r}, expected true, gaussian, pissa, pissa_niter_<n> or olora."
    elif start.startswith(("pissa", "olora")):
        if lora.q_lora:
            yield f"--init_lora_weights {start} needs the exact weights: use true with --q_lora true."
        if lora.lora_weight_path:
            yield f"--init_lora_weights {start} is for a new adapter: leave it out with --lora_weight_path."


def _lora_weight_path(training: Namespace, lora: LoraArguments) -> Iterator[str]:
    if not training.use_lora:
        yield "--lora_weight_path is given, but --use_lora is false: add --use_lora true --tune_llm false."
    if not (Path(lora.lora_weight_path).expanduser() / "adapter_config.json").is_file():
        yield (
            f"--lora_weight_path: no adapter_config.json in {lora.lora_weight_path!r}. Give the folder that a LoRA run "
            "wrote."
        )


def _numbers(training: Namespace, lora: LoraArguments) -> Iterator[str]:
    values = {**vars(training), **vars(lora)}
    for name in _AT_LEAST_ONE:
        if values[name] is not None and values[name] < 1:
            yield f"--{name} is {values[name]}, expected at least 1."
    for name in _NOT_NEGATIVE:
        if values[name] is not None and not (math.isfinite(values[name]) and values[name] >= 0):
            yield f"--{name} is {values[name]}, expected 0 or more."
    if not 0 <= lora.lora_dropout < 1:
        yield f"--lora_dropout is {lora.lora_dropout}, expected a share from 0 to below 1."


def _model_folder(model: ModelArguments) -> Iterator[str]:
    name = model.model_name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return
        if (folder / "adapter_config.json").is_file():
            yield (
                f"--model_name_or_path {name!r} is an adapter, not a model. Give its base model here, and "
                "the adapter as --lora_weight_path."
            )
        else:
            yield f"--model_name_or_path {name!r} is a folder without config.json. Give a model's folder."
    elif folder.is_file():
        yield f"--model_name_or_path {name!r} is a file, expected a folder. Give the folder that holds config.json."
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        yield (
            f"--model_name_or_path: there is no folder {name!r}, and it is not a Hub id (owner/name). Check the path."
        )


def _data_files(data: DataArguments, training: Namespace) -> Iterator[str]:
    wants_to_train = training.do_train or (training.do_train is None and not training.do_eval)
    if wants_to_train and not data.data_path:
        yield "--data_path is missing. Give the file with the training rows."
    if training.do_train is False and not training.do_eval:
        yield "--do_train false without --do_eval leaves nothing to do. Add --do_eval, or train."
    for flag in ("data_path", "eval_data_path"):
        value = getattr(data, flag)
        for missing in missing_sources(value) if value else ():
            yield f"--{flag}: there is no file '{missing}'. Check the path (relative to {os.getcwd()!r})."
    yield from _evaluation_rows(data, training)
    if data.image_folder and not Path(data.image_folder).expanduser().is_dir():
        is_file = Path(data.image_folder).expanduser().is_file()
        found = "is a file, expected a folder" if is_file else "does not exist"
        yield f"--image_folder: {data.image_folder!r} {found}. Check the path."


def _evaluation_rows(data: DataArguments, training: Namespace) -> Iterator[str]:
    evaluates = training.do_eval or training.eval_strategy != "no"
    split = data.eval_split
    if split is not None and not (0 < split < 1 or (1 <= split < math.inf and split == int(split))):
        yield f"--eval_split is {split:g}, expected a fraction such as 0.01, or a whole number of rows."
    if split is not None and data.eval_data_path:
        yield "--eval_split and --eval_data_path both name the evaluation rows. Keep one of them."
    elif split is not None and not evaluates:
        yield (
            f"--eval_split {split:g} would hold rows out of training that nothing evaluates. Add "
            "--eval_strategy steps (or epoch), or --do_eval, or leave it out."
        )
    elif split is not None and not data.data_path:
        yield "--eval_split takes its rows from --data_path, which is missing. Give it."
    elif split is None and not data.eval_data_path:
        if training.do_eval:
            yield "--do_eval needs --eval_data_path (or --eval_split). Give the file with the evaluation rows."
        elif evaluates:
            yield (
                f"--eval_strategy {training.eval_strategy} needs --eval_data_path or --eval_split (or --eval_strategy "
                "no)."
            )
        if training.predict_with_generate:
            yield "--predict_with_generate true needs --eval_data_path: give the file with the evaluation rows."
        if data.eval_max_samples is not None:
            yield "--eval_max_samples is given, but there are no evaluation rows: add --eval_data_path or --eval_split."


def _vision_cache(training: Namespace) -> Iterator[str]:
    if training.cache_vision_features is None:
        return
    if training.tune_vision:
        yield (
            "--cache_vision_features is given, but --tune_vision is true: features of a tower that trains change with "
            "every step. Add --tune_vision false, or leave --cache_vision_features out."
        )
    for flag in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(training, flag):
            yield f"--cache_vision_features: --{flag} true would compute other features in evaluation. Use false."


def _deepspeed(training: Namespace) -> Iterator[str]:
    if not training.deepspeed:
        return
    try:
        yield from contradictions(read_deepspeed_config(training.deepspeed), training)
    except DeepSpeedConfigError as error:
        yield str(error)
    if training.fp32_residual_connection is not None:
        yield (
            "--fp32_residual_connection: --deepspeed holds the model itself in 16 bit, and the sums between its layers "
            "with it. Leave the flag out."
        )
    if os.environ.get("ACCELERATE_USE_CPU"):
        yield "ACCELERATE_USE_CPU is set, which would silently switch --deepspeed off. Unset it."


def _output_folder(training: Namespace) -> Iterator[str]:
    folder = Path(training.output_dir or "trainer_output").expanduser()
    if folder.exists() and not folder.is_dir():
        yield f"--output_dir {str(folder)!r} is a file. Give a folder, or a name that does not exist yet."
        return
    resume = training.resume_from_checkpoint or "false"
    if training.overwrite_output_dir and resume.lower() != "false":
        yield "--overwrite_output_dir true and --resume_from_checkpoint contradict each other. Keep one."
        return
    if resume.lower() not in ("true", "false"):
        if not output_folder.is_checkpoint(Path(resume).expanduser()):
            yield (
                f"--resume_from_checkpoint: {resume!r} is not a complete checkpoint (no trainer_state.json). Give a "
                "checkpoint-<step> folder, or true for the last one in --output_dir."
            )
        return
    earlier = output_folder.find_earlier_run(folder)
    if training.do_train is False or training.overwrite_output_dir or resume.lower() == "true" or not earlier:
        return
    if (user := output_folder.find_user(folder)) is not None:
        yield output_folder.in_use(folder, user)
        return
    last = earlier.last_checkpoint
    state = "a finished run" if earlier.finished or last is None else f"an unfinished run ({last.name})"
    yield (
        f"--output_dir {str(folder)!r} holds {state}. Give another folder, continue that run with "
        "--resume_from_checkpoint true, or start over with --overwrite_output_dir true, which deletes it."
    )
