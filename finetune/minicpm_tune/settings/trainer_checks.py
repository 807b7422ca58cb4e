"""Checks of transformers' own arguments: what ``TrainingArguments`` or ``Trainer`` would refuse late, or ignore.

Both raise their ``ValueError`` after processes have joined or weights are loaded, and some values they accept
fail in the first evaluation, hours later.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_tune.settings.argument_groups import RunOptions
from minicpm_tune.settings.command_flags import switch
from minicpm_tune.settings.trainer_arguments import OPTIMIZERS, REPORTERS, TRAINER_ARGUMENTS

# What an evaluation measures; the second with --predict_with_generate true.
EVAL_METRICS = ("loss", "token_accuracy")
ANSWER_METRICS = ("exact_match", "anls", "rouge_l", "iou_50", "mean_iou", "wer", "cer")
ERROR_RATES = ("wer", "cer")  # of rows with audio; the smaller the better

_OWN_DEFAULTS = vars(RunOptions())


def trainer_problems(training: Namespace) -> Iterator[str]:
    """What is wrong with transformers' arguments, as far as the hardware does not matter.

    Args:
        training: A value for every field of ``TrainingArguments``.
    """
    yield from _refused(training)
    yield from _json_values(training)
    for kind in ("", "_full_eval"):
        if getattr(training, f"bf16{kind}") and getattr(training, f"fp16{kind}"):
            yield f"--bf16{kind} true and --fp16{kind} true contradict each other. Keep one."
    yield from _checkpointing(training)
    yield from _steps(training)
    yield from _schedule(training)
    yield from _evaluation(training)
    yield from _best_model(training)
    yield from _optimizer(training)
    yield from _reporters(training)
    yield from _fsdp(training)


def _refused(training: Namespace) -> Iterator[str]:
    for name, argument in TRAINER_ARGUMENTS.items():
        if not argument.refusal:
            continue
        value = getattr(training, name)
        if value != _OWN_DEFAULTS.get(name, argument.default):
            yield f"--{name} {_shown(value)} is not supported: {argument.refusal}. Leave it out."


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _json_values(training: Namespace) -> Iterator[str]:
    for name, argument in TRAINER_ARGUMENTS.items():
        value = getattr(training, name)
        if argument.kind is not dict or argument.refusal or value is None:
            continue
        if name == "fsdp_config" and not value.lstrip().startswith("{"):
            if not Path(value).expanduser().is_file():
                yield f"--fsdp_config: there is no file {value!r}. Give a JSON file, or JSON text."
            continue
        if _read_json(value) is None:
            yield f"--{name} is {value!r}, expected a JSON object such as '{{\"min_lr\": 1e-7}}'."


def _read_json(text: str | None) -> dict[str, Any] | None:
    """A JSON object's content; None where there is none, which is reported with the other JSON values."""
    try:
        value = json.loads("{}" if text is None else text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _checkpointing(training: Namespace) -> Iterator[str]:
    value = training.activation_checkpointing
    if value not in (None, "auto"):
        try:
            switch(value)
        except ArgumentTypeError:
            yield f"--activation_checkpointing is {value!r}, expected true, false or auto."
    if training.memory_gib is not None and not training.memory_gib > 0:
        yield f"--memory_gib is {training.memory_gib:g}, expected more than 0."
    options = _read_json(training.activation_checkpointing_kwargs) or {}
    known = ("use_reentrant", "preserve_rng_state", "determinism_check", "every_n_layers", "offload")
    for name in sorted(set(options) - set(known)):
        yield f"--activation_checkpointing_kwargs has {name!r}, expected {', '.join(known)}. Remove it."
    if value == "auto" and "every_n_layers" in options:
        yield (
            "--activation_checkpointing_kwargs: every_n_layers contradicts --activation_checkpointing auto, which "
            "chooses the layers itself. Add --activation_checkpointing true, or leave every_n_layers out."
        )
    if options.get("use_reentrant"):
        yield (
            "--activation_checkpointing_kwargs: use_reentrant true drops the gradients of layers whose inputs need "
            "none (adapters on a frozen model). Use false, the default."
        )


def _steps(training: Namespace) -> Iterator[str]:
    """How long it trains, and when it logs, evaluates and saves."""
    if training.max_steps != -1 and training.max_steps < 1:
        yield (
            f"--max_steps is {training.max_steps}, expected at least 1. To train for whole epochs, leave it out and "
            "give --num_train_epochs."
        )
    if training.max_steps < 1 and not (
        math.isfinite(training.num_train_epochs) and training.num_train_epochs > 0
    ):
        yield (
            f"--num_train_epochs is {training.num_train_epochs:g}, expected more than 0. To evaluate without training, "
            "use --do_train false --do_eval."
        )
    for what in ("logging", "eval", "save"):
        steps = getattr(training, f"{what}_steps")
        if getattr(training, f"{what}_strategy") != "steps" or steps is None:
            continue
        if not (math.isfinite(steps) and steps > 0) or (steps > 1 and steps != int(steps)):
            yield (
                f"--{what}_steps is {steps:g}, expected a number of steps (or a share of all steps, below 1). "
                f"--{what}_strategy no switches it off."
            )
    for name in ("save_total_limit", "torch_empty_cache_steps", "ddp_timeout", "dataloader_prefetch_factor"):
        value = getattr(training, name)
        if value is not None and value < 1:
            yield f"--{name} is {value}, expected at least 1."


def _schedule(training: Namespace) -> Iterator[str]:
    kind = training.lr_scheduler_type
    if (options := _read_json(training.lr_scheduler_kwargs)) is None:
        return
    one_of_two = len({"min_lr", "min_lr_rate"} & set(options)) == 1
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not one_of_two:
        yield (
            f"--lr_scheduler_type {kind} needs either min_lr or min_lr_rate: add "
            "--lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'."
        )
    if kind == "warmup_stable_decay" and "num_decay_steps" not in options:
        yield (
            "--lr_scheduler_type warmup_stable_decay needs the number of decay steps: add "
            "--lr_scheduler_kwargs '{\"num_decay_steps\": 100}'."
        )
    if kind == "polynomial" and not training.learning_rate > options.get("lr_end", 1e-7):
        yield (
            f"--lr_scheduler_type polynomial ends at lr_end ({options.get('lr_end', 1e-7):g}), which is not below "
            f"--learning_rate ({training.learning_rate:g}). Set a lower lr_end in --lr_scheduler_kwargs."
        )
    if kind in ("reduce_lr_on_plateau", "greedy"):
        if training.eval_strategy == "no":
            yield f"--lr_scheduler_type {kind} follows the evaluations: add --eval_strategy steps (or epoch)."
        if training.deepspeed:
            yield f"--lr_scheduler_type {kind} does not work under --deepspeed, which steps the schedule itself."


def _evaluation(training: Namespace) -> Iterator[str]:
    if training.eval_on_start and training.eval_strategy == "no":
        yield "--eval_on_start true needs --eval_strategy steps (or epoch) and --eval_data_path."
    if training.train_sampling_strategy == "sequential" and training.packing:
        yield "--train_sampling_strategy sequential and --packing true contradict each other: packed rows are shuffled."
    if training.train_sampling_strategy == "batch_rebalance":
        yield (
            "--train_sampling_strategy batch_rebalance is not supported: it moves rows between processes. "
            "--packing true fills all rows alike; group_by_length pads less."
        )


def _metric(training: Namespace) -> Iterator[str]:
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    known = EVAL_METRICS + (ANSWER_METRICS if training.predict_with_generate else ())
    if metric not in known:
        more = ", ".join(f"eval_{name}" for name in ANSWER_METRICS)
        more = "" if training.predict_with_generate else f"; with --predict_with_generate true also {more}"
        names = ", ".join(f"eval_{name}" for name in known)
        yield f"--metric_for_best_model is {training.metric_for_best_model!r}, expected {names}{more}."
    elif metric in ERROR_RATES and training.greater_is_better is not False:
        yield f"--metric_for_best_model {metric} is best where it is smallest: add --greater_is_better false."


def _best_model(training: Namespace) -> Iterator[str]:
    """What choosing the best checkpoint needs; a wrong metric would only show in the first evaluation."""
    wants_best = {
        "--load_best_model_at_end true": training.load_best_model_at_end,
        "--save_strategy best": training.save_strategy == "best",
        "--early_stopping_patience": training.early_stopping_patience is not None,
    }
    flag = next((flag for flag, wanted in wants_best.items() if wanted), None)
    if flag is not None and training.eval_strategy == "no":
        yield f"{flag} compares evaluations: add --eval_strategy steps (or epoch) and --eval_data_path."
    yield from _metric(training)
    if training.early_stopping_patience is not None and training.early_stopping_patience < 1:
        yield f"--early_stopping_patience is {training.early_stopping_patience}, expected at least 1 evaluation."
    if training.early_stopping_threshold and training.early_stopping_patience is None:
        yield "--early_stopping_threshold acts only together with --early_stopping_patience: add it."
    if not training.load_best_model_at_end or training.save_strategy == "best":
        return
    if training.save_strategy != training.eval_strategy:
        yield (
            f"--load_best_model_at_end true needs a checkpoint for every evaluation: --save_strategy is "
            f"{training.save_strategy} and --eval_strategy {training.eval_strategy}. Make them equal, or use "
            "--save_strategy best."
        )
    elif training.eval_strategy == "steps":
        evaluates, saves = training.eval_steps or training.logging_steps, training.save_steps
        if evaluates > 0 and not math.isclose(saves / evaluates, max(1, round(saves / evaluates))):
            yield (
                f"--load_best_model_at_end true: --save_steps {saves:g} is no multiple of --eval_steps {evaluates:g}. "
                "Make it one, or use --save_strategy best."
            )
    if training.save_only_model and (training.deepspeed or training.fsdp):
        yield "--save_only_model true and --load_best_model_at_end true do not work together under DeepSpeed or FSDP."


# How names of optimizers begin, the module they need, and its package (transformers 5.23).
_NEEDS = (
    (r"galore_", "galore_torch", "galore-torch"),
    (r"apollo_", "apollo_torch", "apollo-torch"),
    (r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    (r"grokadamw$", "grokadamw", "grokadamw"),
    (r"schedule_free_", "schedulefree", "schedulefree"),
    (r"stable_adamw$", "optimi", "torch-optimi"),
    (r"adamw_torch_[48]bit$", "torchao", "torchao"),
    (r"adamw_anyprecision$", "torchdistx", "torchdistx"),
    (r"adamw_torch_xla$", "torch_xla", "torch-xla"),
    (r"adamw_torch_npu_fused$", "torch_npu", "torch-npu"),
    (r".*(bnb|8bit|paged_|lion|ademamix)", "bitsandbytes", "bitsandbytes"),
)
# Optimizers whose options are the Adam flags alone.
_WITHOUT_ARGS = (
    r"adamw_torch(_fused|_xla|_npu_fused)?$|adafactor$|(ada)?lomo$|.*(adamw_bnb|adamw_8bit|paged_adamw|lion)"
)
_LOW_RANK = r"galore_|apollo_"


def _optimizer(training: Namespace) -> Iterator[str]:
    """What is wrong with ``--optim`` and its options."""
    name = "adamw_torch" if training.optim is None else training.optim
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(OPTIMIZERS)}."
        yield f"--optim {name}: the installed transformers has no such optimizer. {advice}"
        return
    for pattern, module, package in _NEEDS:
        if re.match(pattern, name):
            if importlib.util.find_spec(module) is None:
                yield f"--optim {name} needs the package {package}: pip install {package}, or choose another optimizer."
            break
    if training.optim_args:
        if re.match(_WITHOUT_ARGS, name):
            yield f"--optim_args has no effect on --optim {name}: use --adam_beta1 and the like, or leave it out."
        elif not all(re.fullmatch(r"\s*\w+\s*=\s*[^=]+", part) for part in training.optim_args.split(",")):
            yield f"--optim_args is {training.optim_args!r}, expected name=value, separated by commas."
    if training.optim_target_modules and not re.match(_LOW_RANK, name):
        yield "--optim_target_modules is for the galore and apollo optimizers. Leave it out."
    elif re.match(_LOW_RANK, name) and not training.optim_target_modules:
        yield f"--optim {name} needs --optim_target_modules: the names of the linear layers, or all-linear."


def _reporters(training: Namespace) -> Iterator[str]:
    names = [training.report_to] if isinstance(training.report_to, str) else training.report_to
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in REPORTERS:
            yield f"--report_to is {name!r}, expected all, none, or some of {', '.join(REPORTERS)}."
        elif importlib.util.find_spec(REPORTERS[name]) is None and not (
            name == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            package = REPORTERS[name].replace("_", "-")
            yield f"--report_to {name} needs the package {package}: pip install {package}, or use --report_to none."
    for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if getattr(training, name) != TRAINER_ARGUMENTS[name].default and not {"trackio", "all"} & set(names):
            yield f"--{name} is for --report_to trackio. Add that, or leave it out."


def _fsdp(training: Namespace) -> Iterator[str]:
    if training.fsdp in (None, "", "false", False):
        if training.fsdp_config:
            yield "--fsdp_config acts only together with --fsdp: add --fsdp true."
        return
    if training.deepspeed:
        yield "--fsdp and --deepspeed both divide the model among the processes. Keep one; the launchers take FSDP=..."
