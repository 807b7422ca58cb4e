"""Every argument of ``transformers.TrainingArguments``: how it is read, and whether it acts here.

The table lets a command line be read and checked without importing transformers, which takes seconds. A test
holds it against the installed class, so that a field that is new there must be decided here.

Source: transformers 5.23.0, training_args.py, trainer.py and trainer_optimizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
)  # fmt: skip
# Where ``--report_to`` can send the log -> the module that has to be installed.
REPORTERS = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "kubeflow", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


@dataclass(frozen=True)
class TrainerArgument:
    """One argument.

    Attributes:
        kind: How its value is read: ``bool``, ``int``, ``float``, ``str``, ``list``, ``dict`` (JSON), or a
            tuple of the values it takes.
        default: Its default in transformers.
        refusal: Why another value than the default is refused; empty for an argument that acts.
        optional: Whether the value may be left out, which means true.
    """

    kind: Any
    default: Any = None
    refusal: str = ""
    optional: bool = False


_ACTS = _REFUSED = TrainerArgument
_HUB = "this script does not upload. When the run is finished: hf upload OWNER/NAME FOLDER"
_COUNTS = "evaluation adds up counts and keeps no predictions"
_ORDER = "the order of rows and their division among processes must be the same on every start"
_COMPILE = (
    "batches differ in tokens, slices and supervised tokens, and every new shape would be compiled anew (minutes for "
    "the first step of a two-layer model). The liger-kernel package fuses the LLM's small operations on a GPU"
)

TRAINER_ARGUMENTS: dict[str, TrainerArgument] = {
    "output_dir": _ACTS(str),
    # Length and batches
    "per_device_train_batch_size": _ACTS(int, 8),
    "num_train_epochs": _ACTS(float, 3.0),
    "max_steps": _ACTS(int, -1),
    "gradient_accumulation_steps": _ACTS(int, 1),
    "auto_find_batch_size": _REFUSED(
        bool, False, "a step's rows must be the same on every start. plan_memory.py says what fits"
    ),
    # Learning rate and schedule
    "learning_rate": _ACTS(float, 5e-5),
    "lr_scheduler_type": _ACTS(SCHEDULES, "linear"),
    "lr_scheduler_kwargs": _ACTS(dict),
    "warmup_steps": _ACTS(float, 0),
    # Optimizer
    "optim": _ACTS(OPTIMIZERS, "adamw_torch_fused"),
    "optim_args": _ACTS(str),
    "optim_target_modules": _ACTS(list),
    "weight_decay": _ACTS(float, 0.0),
    "adam_beta1": _ACTS(float, 0.9),
    "adam_beta2": _ACTS(float, 0.999),
    "adam_epsilon": _ACTS(float, 1e-8),
    "max_grad_norm": _ACTS(float, 1.0),
    # Loss
    "average_tokens_across_devices": _REFUSED(
        bool, True, "the loss is a mean over the supervised tokens of all processes"
    ),
    "label_smoothing_factor": _REFUSED(float, 0.0, "the loss never builds all logits"),
    "neftune_noise_alpha": _ACTS(float),
    # Precision
    "bf16": _ACTS(bool, False),
    "fp16": _ACTS(bool, False),
    "bf16_full_eval": _ACTS(bool, False),
    "fp16_full_eval": _ACTS(bool, False),
    "tf32": _ACTS(bool),
    # Memory and speed
    "activation_checkpointing": _ACTS(bool, None, optional=True),
    "activation_checkpointing_kwargs": _ACTS(dict),
    "gradient_checkpointing": _ACTS(bool, None, optional=True),
    "gradient_checkpointing_kwargs": _ACTS(dict),
    "torch_compile": _REFUSED(bool, False, _COMPILE),
    "torch_compile_backend": _REFUSED(str, None, _COMPILE),
    "torch_compile_mode": _REFUSED(str, None, _COMPILE),
    "use_liger_kernel": _ACTS(bool, False),
    "liger_kernel_config": _REFUSED(
        dict, None, "the kernels are chosen here: RMSNorm, rotary embedding and MLP"
    ),
    "use_cache": _REFUSED(bool, False, "training computes whole rows and never reads a cache"),
    "torch_empty_cache_steps": _ACTS(int),
    # Log
    "logging_strategy": _ACTS(("no", "steps", "epoch"), "steps"),
    "logging_steps": _ACTS(float, 500),
    "logging_first_step": _ACTS(bool, False),
    "log_on_each_node": _ACTS(bool, True),
    "logging_nan_inf_filter": _REFUSED(
        bool, True, "losses that are not finite are never hidden, and --on_nonfinite decides what they do"
    ),
    "include_num_input_tokens_seen": _ACTS(("no", "all", "non_padding", "true", "false"), "no"),
    "log_level": _ACTS(LOG_LEVELS, "passive"),
    "log_level_replica": _ACTS(LOG_LEVELS, "warning"),
    "disable_tqdm": _ACTS(bool),
    "report_to": _ACTS(list, "none"),
    "run_name": _ACTS(str),
    "project": _ACTS(str, "huggingface"),
    "trackio_space_id": _ACTS(str),
    "trackio_bucket_id": _ACTS(str),
    "trackio_static_space_id": _ACTS(str),
    # Evaluation
    "eval_strategy": _ACTS(("no", "steps", "epoch"), "no"),
    "eval_steps": _ACTS(float),
    "eval_delay": _ACTS(float, 0),
    "per_device_eval_batch_size": _ACTS(int, 8),
    # Either way no predictions are kept; the official launchers name it.
    "prediction_loss_only": _ACTS(bool, False),
    "eval_on_start": _ACTS(bool, False),
    "eval_do_concat_batches": _REFUSED(bool, True, _COUNTS),
    "eval_use_gather_object": _REFUSED(bool, False, _COUNTS),
    "eval_accumulation_steps": _REFUSED(int, None, _COUNTS),
    "include_for_metrics": _REFUSED(list, [], _COUNTS),
    "batch_eval_metrics": _REFUSED(bool, False, _COUNTS),
    # Checkpoints
    "save_only_model": _ACTS(bool, False),
    "save_strategy": _ACTS(("no", "steps", "epoch", "best"), "steps"),
    "save_steps": _ACTS(float, 500),
    "save_on_each_node": _REFUSED(
        bool,
        False,
        "whether the machines share the output folder is found out, and each one without it saves its own",
    ),
    "save_total_limit": _ACTS(int),
    "enable_jit_checkpoint": _REFUSED(bool, False, "SIGTERM always ends a run with a checkpoint"),
    "load_best_model_at_end": _ACTS(bool, False),
    "metric_for_best_model": _ACTS(str),
    "greater_is_better": _ACTS(bool),
    "ignore_data_skip": _ACTS(bool, False),
    "restore_callback_states_from_checkpoint": _REFUSED(
        bool, False, "what has a state (--early_stopping_patience) always continues from it"
    ),
    "resume_from_checkpoint": _ACTS(str),
    # Upload
    "push_to_hub": _REFUSED(bool, False, _HUB),
    "hub_token": _REFUSED(str, None, _HUB),
    "hub_private_repo": _REFUSED(bool, None, _HUB),
    "hub_model_id": _REFUSED(str, None, _HUB),
    "hub_strategy": _REFUSED(("end", "every_save", "checkpoint", "all_checkpoints"), "every_save", _HUB),
    "hub_always_push": _REFUSED(bool, False, _HUB),
    "hub_revision": _REFUSED(str, None, _HUB),
    # Random numbers
    "full_determinism": _ACTS(bool, False),
    "seed": _ACTS(int, 42),
    "data_seed": _ACTS(int),
    # Rows
    "train_sampling_strategy": _ACTS(
        ("random", "sequential", "group_by_length", "batch_rebalance"), "random"
    ),
    "length_column_name": _REFUSED(str, "length", "lengths are counted by the check of the rows"),
    "remove_unused_columns": _REFUSED(bool, True, "rows hold more than the model's text"),
    "label_names": _REFUSED(list, None, "a row's labels are called labels"),
    "dataloader_drop_last": _REFUSED(
        bool, False, "every row trains: the last batch is filled with empty samples"
    ),
    "dataloader_num_workers": _ACTS(int, 0),
    "dataloader_pin_memory": _ACTS(bool, True),
    "dataloader_persistent_workers": _ACTS(bool, False),
    "dataloader_prefetch_factor": _ACTS(int),
    "dataloader_multiprocessing_context": _ACTS(("fork", "spawn", "forkserver")),
    "dataloader_in_order": _REFUSED(bool, True, _ORDER),
    # Hardware and processes
    "use_cpu": _ACTS(bool, False),
    "accelerator_config": _REFUSED(dict, None, _ORDER),
    "parallelism_config": _REFUSED(
        str, None, "the model is not divided. Use --deepspeed or --fsdp for large models"
    ),
    "ddp_find_unused_parameters": _ACTS(bool),
    "ddp_bucket_cap_mb": _ACTS(int),
    "ddp_broadcast_buffers": _ACTS(bool),
    "ddp_static_graph": _ACTS(bool),
    "ddp_backend": _ACTS(("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")),
    "ddp_timeout": _ACTS(int, 1800),
    "fsdp": _ACTS(str, None, optional=True),
    "fsdp_config": _ACTS(dict),
    "deepspeed": _ACTS(str),
    # torch.distributed.launch passes it; the variable LOCAL_RANK is what counts.
    "local_rank": _ACTS(int, -1),
    # Debugging
    "debug": _REFUSED(
        str, "", "steps whose gradients are not finite are reported with their rows, see --on_nonfinite"
    ),
    "skip_memory_metrics": _ACTS(bool, True),
    # What the script does
    "do_train": _ACTS(bool, False),
    "do_eval": _ACTS(bool, False),
    "do_predict": _REFUSED(bool, False, "predict.py answers the rows of a file"),
}
