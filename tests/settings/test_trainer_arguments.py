"""Every argument of transformers' TrainingArguments is decided: it acts, or is refused with the reason."""

import dataclasses
import importlib.util
import json
import re
from enum import Enum
from pathlib import Path

import pytest
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from minicpm_tune.answering.metrics import BOX_METRICS, ERROR_RATES, METRICS
from minicpm_tune.settings.arguments import TrainingArguments, parse_arguments
from minicpm_tune.settings.checks import UsageError
from minicpm_tune.settings.finetune_command import read_command_line
from minicpm_tune.settings.trainer_arguments import (
    LOG_LEVELS,
    OPTIMIZERS,
    REPORTERS,
    SCHEDULES,
    TRAINER_ARGUMENTS,
)
from minicpm_tune.settings.trainer_checks import ANSWER_METRICS

FIELDS = {item.name: item for item in dataclasses.fields(transformers.TrainingArguments) if item.init}
NEEDED = ("--model_name_or_path", "model", "--data_path", "rows.json", "--eval_data_path", "rows.json")


def parse(*words):
    return parse_arguments([*NEEDED, *words]).training


def test_the_table_has_every_field_of_the_installed_transformers():
    assert set(TRAINER_ARGUMENTS) == set(FIELDS)


def test_the_table_has_their_defaults():
    for name, argument in TRAINER_ARGUMENTS.items():
        item = FIELDS[name]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if name != "optim":  # depends on torch's version, and is ours
            assert argument.default == default, name


def test_the_table_has_their_choices():
    assert set(SCHEDULES) == {each.value for each in SchedulerType}
    assert set(OPTIMIZERS) == {each.value for each in OptimizerNames}
    assert set(LOG_LEVELS) == set(trainer_log_levels)
    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    assert set(ANSWER_METRICS) == {*METRICS, *BOX_METRICS, *ERROR_RATES} - {"box_count_error"}
    for name, argument in TRAINER_ARGUMENTS.items():
        choices = FIELDS[name].metadata.get("choices")
        if choices is not None:
            assert set(argument.kind) == set(choices), name
        for kind in getattr(FIELDS[name].type, "__args__", ()):
            if isinstance(kind, type) and issubclass(kind, Enum) and name not in ("optim", "debug"):
                assert set(argument.kind) == {each.value for each in kind}, name


def test_what_acts_is_read_by_transformers_or_by_this_project():
    """A field that its own class alone mentions would be accepted and ignored."""
    folder = importlib.util.find_spec("transformers").submodule_search_locations[0]
    files = (
        "trainer.py", "trainer_callback.py", "trainer_optimizer.py", "trainer_utils.py", "training_args.py",
        "integrations/integration_utils.py", "integrations/deepspeed.py",
    )  # fmt: skip
    text = "".join(Path(folder, name).read_text() for name in files)
    scripts = {"do_train", "do_eval", "resume_from_checkpoint", "local_rank", "prediction_loss_only"}
    scripts.add("gradient_checkpointing_kwargs")  # the old name of activation_checkpointing_kwargs
    for name, argument in TRAINER_ARGUMENTS.items():
        if not argument.refusal and name not in scripts:
            assert re.search(rf"(args|self|training)\.{name}\b", text), name


OTHER = {
    "optim_target_modules": "x", "torch_compile_backend": "inductor", "include_for_metrics": "inputs",
    "label_names": "x", "hub_strategy": "end", "length_column_name": "n", "hub_token": "x",
    "debug": "underflow_overflow",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, argument in TRAINER_ARGUMENTS.items() if argument.refusal])
def test_another_value_of_what_is_refused_says_why(name, place):
    argument = TRAINER_ARGUMENTS[name]
    other = OTHER.get(name) or {
        bool: str(not argument.default).lower(),
        float: "0.5",
        int: "3",
        dict: "{}",
    }.get(argument.kind, "x")
    if name in ("remove_unused_columns", "logging_nan_inf_filter"):
        other = "true"
    message = f"--{name} {other} is not supported: {argument.refusal}. Leave it out."
    with pytest.raises(UsageError, match=re.escape(message)):
        read_command_line([*NEEDED, f"--{name}", other])


EVALUATES = "--eval_strategy steps --eval_steps 3 --save_steps 6"
PROBLEMS = [
    ("--max_steps 0", "--max_steps is 0, expected at least 1."),
    ("--max_steps -5", "--max_steps is -5, expected at least 1."),
    ("--num_train_epochs 0", "--num_train_epochs is 0, expected more than 0."),
    ("--num_train_epochs -1", "--num_train_epochs is -1, expected more than 0."),
    ("--logging_steps 0", "--logging_steps is 0, expected a number of steps"),
    ("--logging_steps 2.5", "--logging_steps is 2.5, expected a number of steps"),
    ("--eval_strategy steps --eval_steps -1", "--eval_steps is -1, expected a number of steps"),
    ("--save_steps 0", "--save_steps is 0, expected a number of steps"),
    ("--save_total_limit 0", "--save_total_limit is 0, expected at least 1."),
    ("--ddp_timeout 0", "--ddp_timeout is 0, expected at least 1."),
    ("--torch_empty_cache_steps 0", "--torch_empty_cache_steps is 0, expected at least 1."),
    ("--lr_scheduler_type cosine_with_min_lr", "cosine_with_min_lr needs either min_lr or min_lr_rate"),
    (
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-9,"min_lr_rate":0.1}',
        "cosine_with_min_lr needs either min_lr or min_lr_rate",
    ),
    ("--lr_scheduler_type warmup_stable_decay", "needs the number of decay steps"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "polynomial ends at lr_end (1e-07)"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau follows the evaluations"),
    (f"--lr_scheduler_type greedy --deepspeed ds_config_zero2.json {EVALUATES}", "does not work under --deepspeed"),
    ("--lr_scheduler_kwargs min_lr=1", "--lr_scheduler_kwargs is 'min_lr=1', expected a JSON object"),
    ('--gradient_checkpointing_kwargs {"use_reentrant":true}', "use_reentrant true drops the gradients"),
    ('--activation_checkpointing_kwargs {"every":2}', "has 'every', expected use_reentrant"),
    ("--activation_checkpointing_kwargs [1]", "--activation_checkpointing_kwargs is '[1]', expected a JSON object"),
    ("--eval_on_start true", "--eval_on_start true needs --eval_strategy"),
    ("--train_sampling_strategy batch_rebalance", "batch_rebalance is not supported: it moves rows between processes"),
    ("--train_sampling_strategy sequential --packing true", "sequential and --packing true contradict each other"),
    ("--load_best_model_at_end true", "--load_best_model_at_end true compares evaluations"),
    ("--save_strategy best", "--save_strategy best compares evaluations"),
    ("--early_stopping_patience 2", "--early_stopping_patience compares evaluations"),
    (f"--early_stopping_patience 0 {EVALUATES}", "--early_stopping_patience is 0, expected at least 1 evaluation"),
    ("--early_stopping_threshold 0.1", "acts only together with --early_stopping_patience"),
    (
        f"--metric_for_best_model accuracy {EVALUATES}",
        "--metric_for_best_model is 'accuracy', expected eval_loss, eval_token_accuracy; with --predict_with_generate "
        "true also eval_exact_match, eval_anls, eval_rouge_l, eval_iou_50, eval_mean_iou, eval_wer, eval_cer.",
    ),
    (
        f"--metric_for_best_model eval_wer --predict_with_generate true {EVALUATES}",
        "--metric_for_best_model wer is best where it is smallest: add --greater_is_better false",
    ),
    (
        "--load_best_model_at_end true --eval_strategy steps --eval_steps 4 --save_steps 6",
        "--save_steps 6 is no multiple of --eval_steps 4",
    ),
    (
        "--load_best_model_at_end true --eval_strategy epoch",
        "--save_strategy is steps and --eval_strategy epoch. Make them equal",
    ),
    (
        f"--load_best_model_at_end true --save_only_model true --deepspeed ds_config_zero2.json {EVALUATES}",
        "--save_only_model true and --load_best_model_at_end true do not work together",
    ),
    ("--bf16_full_eval true --fp16_full_eval true", "--bf16_full_eval true and --fp16_full_eval true contradict"),
    ("--optim adam_w8bit", "no such optimizer. Did you mean adamw_8bit?"),
    ("--optim muon", "--optim muon: the installed transformers has no such optimizer."),
    ("--optim galore_adamw_8bit --optim_target_modules all-linear", "pip install galore-torch"),
    ("--optim galore_adamw", "--optim galore_adamw needs --optim_target_modules"),
    ("--optim adamw_torch_8bit", "pip install torchao"),
    ("--optim_args momentum=0.9", "--optim_args has no effect on --optim adamw_torch"),
    ("--optim sgd --optim_args momentum", "--optim_args is 'momentum', expected name=value"),
    ("--optim_target_modules q_proj", "--optim_target_modules is for the galore and apollo optimizers"),
    ("--report_to tensorbord", "--report_to is 'tensorbord', expected all, none, or some of"),
    ("--report_to neptune", "--report_to neptune needs the package neptune: pip install neptune"),
    ("--trackio_space_id me/x", "--trackio_space_id is for --report_to trackio"),
    ("--fsdp true --deepspeed ds_config_zero2.json", "--fsdp and --deepspeed both divide the model"),
    ("--fsdp_config {}", "--fsdp_config acts only together with --fsdp"),
    ("--fsdp true --fsdp_config nothing.json", "--fsdp_config: there is no file 'nothing.json'"),
    ("--fsdp", "--fsdp divides the model among several processes, and one was started"),
    ("--tf32 true --use_cpu", "--tf32 true needs a GPU"),
    ("--ddp_backend mpi", "--ddp_backend mpi does not work on this machine"),
    ("--dataloader_num_workers 0 --dataloader_prefetch_factor 2", "add --dataloader_num_workers 2"),
    ("--use_cpu --dataloader_num_workers 0 --dataloader_multiprocessing_context spawn", "add --dataloader_num_workers"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), PROBLEMS, ids=[words for words, _ in PROBLEMS])
def test_what_would_fail_late_or_be_ignored_is_refused_at_once(words, message, place):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--optim adamw_8bit", "--optim paged_adamw_8bit", "--optim adafactor", "--optim lion_8bit",
        "--optim sgd --optim_args momentum=0.9,nesterov=true", "--num_train_epochs 0.5", "--max_steps 3",
        "--save_steps 0.1 --logging_steps 0.5", "--report_to tensorboard", "--report_to none", "--no_tune_vision",
        f"--load_best_model_at_end true {EVALUATES}", f"--metric_for_best_model token_accuracy {EVALUATES}",
        f"--metric_for_best_model eval_anls --predict_with_generate true {EVALUATES}",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":5}',
        f"--lr_scheduler_type reduce_lr_on_plateau {EVALUATES}", "--logging_strategy no --logging_steps 0",
        f"--save_strategy best {EVALUATES}", f"--early_stopping_patience 3 --early_stopping_threshold 0.01 {EVALUATES}",
        "--include_num_input_tokens_seen true", "--activation_checkpointing --tf32 false --use_cpu true",
    ],
)  # fmt: skip
def test_what_acts_is_accepted(words, place):
    parse(*words.split())


def test_values_arrive_as_transformers_wants_them(place):
    training = parse("--report_to", "tensorboard,none", "--warmup_steps", "0.1", "--optim_args", "momentum=0.9",
                     "--optim", "sgd", "--lr_scheduler_kwargs", json.dumps({"num_cycles": 2}),
                     "--include_num_input_tokens_seen", "true")  # fmt: skip
    assert training.report_to == ["tensorboard", "none"]
    assert (training.warmup_steps, training.optim_args) == (0.1, "momentum=0.9")
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.include_num_input_tokens_seen == "all"


def test_stopping_early_compares_losses_unless_told_otherwise(place):
    training = parse("--early_stopping_patience", "2", *EVALUATES.split())
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)


def test_what_only_transformers_refuses_is_a_message(place, monkeypatch):
    def refuse(self):
        raise ValueError("a new rule")

    monkeypatch.setattr(TrainingArguments, "__post_init__", refuse)
    with pytest.raises(UsageError, match="transformers refuses these arguments: a new rule"):
        parse()


OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
FILES = [
    ({"train_micro_batch_size_per_gpu": 4}, "", "train_micro_batch_size_per_gpu is 4 in the file, but --per_device"),
    ({"gradient_clipping": 0.5}, "", "gradient_clipping is 0.5 in the file, but --max_grad_norm is 1.0"),
    ({"train_batch_size": 7}, "", "train_batch_size is 7 in the file, but processes x batch size"),
    ({"bf16": {"enabled": True}}, "", "bf16.enabled is true in the file, but --bf16 is false"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "--learning_rate 1e-5", "but --learning_rate is 1e-05"),
    ({"optimizer": OPTIMIZER}, "--vision_lr 1e-6", "one learning rate for all parts, so --vision_lr can't act"),
    ({"optimizer": OPTIMIZER}, "--optim sgd", "has an optimizer section, so --optim sgd can't act"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words", "message"), FILES, ids=[message for *_, message in FILES])
def test_a_deepspeed_file_that_the_command_line_contradicts_is_refused(config, words, message, place):
    (place / "own.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=re.escape(message)):
        parse("--deepspeed", "own.json", *words.split())


def test_precision_and_processes_are_the_launchers_to_choose_before_it_starts(place):
    (place / "own.json").write_text(json.dumps({"bf16": {"enabled": True}, "train_batch_size": 4}))
    read_command_line([*NEEDED, "--deepspeed", "own.json"])
