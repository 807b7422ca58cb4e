"""Flags of older guides and of other trainers, and what they are called here.

The official guides were written for transformers 4. What transformers renamed is renamed here, what it dropped is
left out, and each change gives one note for the log. InternLM-XComposer2's guide has names of its own for a few
flags that MiniCPM-V's has too. Flags of ms-swift and LLaMA-Factory are refused with the name they have here: their
values often mean something else.

Source: transformers 5.23.0, training_args.py, compared with 4.56; ms-swift 3.9 and LLaMA-Factory 0.9, argument files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from minicpm_tune.settings.checks import UsageError

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "no_cuda": "use_cpu",
    "xpu_backend": "ddp_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "max_length": "model_max_length",  # InternLM-XComposer2
}

DROPPED = {
    "half_precision_backend": "torch's own mixed precision is always used",
    "fp16_backend": "torch's own mixed precision is always used",
    "fp16_opt_level": "it belonged to apex, which is no longer used",
    "past_index": "it was for models with a memory, which these are not",
    "use_legacy_prediction_loop": "there is one evaluation loop",
    "mp_parameters": "it was for SageMaker",
    "ray_scope": "it was for hyperparameter search with ray",
    "tpu_num_cores": "it was for TPUs",
    "include_tokens_per_second": "tokens per second are always logged",
    "trust_remote_code": "no code of a model folder is needed here, and none is run",
}

# Switch -> what it means when true, and when false.
_SWITCHES = {
    "group_by_length": ("--train_sampling_strategy group_by_length", ""),
    "include_inputs_for_metrics": ("--include_for_metrics inputs", ""),
    "adafactor": ("--optim adafactor", ""),
    "fix_vit": ("--tune_vision false", "--tune_vision true"),  # InternLM-XComposer2
    "fix_sampler": ("--tune_resampler false", "--tune_resampler true"),  # InternLM-XComposer2
}

# Single values that were renamed.
_VALUES = {
    ("optim", "adamw_hf"): "--optim adamw_torch",
    ("include_num_input_tokens_seen", "true"): "--include_num_input_tokens_seen all",
    ("include_num_input_tokens_seen", "false"): "--include_num_input_tokens_seen no",
}

# What to use here -> what ms-swift and LLaMA-Factory call it.
_ELSEWHERE = {
    "--attn_implementation": "attn_impl flash_attn",
    "--bf16 true or --fp16 true": "torch_dtype",
    "--data_path": "dataset",
    "--data_path, which takes paths": "dataset_dir",
    "--dataloader_num_workers": "dataset_num_proc preprocessing_num_workers",
    "--early_stopping_patience": "early_stop_interval early_stopping_steps",
    "--eval_data_path": "eval_dataset val_dataset",
    "--eval_split": "split_dataset_ratio val_size",
    "--image_folder": "image_dir media_dir",
    "--init_lora_weights": "init_weights",
    "--lora_lr_ratio": "loraplus_lr_ratio lorap_lr_ratio",
    "--lora_modules_to_save": "additional_target modules_to_save",
    "--lora_r": "lora_rank",
    "--lora_target_modules": "lora_target target_modules",
    "--lora_weight_path": "adapter_name_or_path adapters resume_lora",
    "--max_num_frames": "video_fps_max_frames video_maxlen",
    "--max_slice_nums (slices of 448 x 448 pixels)": "image_max_pixels max_pixels",
    "--model_max_length": "cutoff_len",
    "--model_name_or_path": "model model_id_or_path",
    "--packing": "neat_packing",
    "--q_lora true --quant_bits": "quantization_bit",
    "--resampler_lr": "aligner_lr",
    "--tune_llm, with the opposite value": "freeze_llm",
    "--tune_resampler, with the opposite value": "freeze_aligner freeze_multi_modal_projector",
    "--tune_vision, with the opposite value": "freeze_vision_tower freeze_vit",
    "--use_lora true --tune_llm false for LoRA, --tune_llm true for full tuning": (
        "finetuning_type sft_type train_type tuner_type"
    ),
    "--video_fps": "fps",
    "--vision_lr": "vit_lr",
    "not needed: the model folder says how conversations are written": "template",
    "the system message of a row": "system",
}
FOREIGN = {old: new for new, olds in _ELSEWHERE.items() for old in olds.split()}


@dataclass
class Translation:
    """What became of a command line.

    Attributes:
        argv: The command line for today's parser.
        notes: One sentence for each old flag.
        environment: Variables that took the place of flags.
    """

    argv: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def replace(self, flag: _Flag, *words: str) -> None:
        """Write other words in the place of a flag."""
        self.argv += words
        self.notes.append(f"{flag.text} is now {' '.join(words) or 'the default'}.")


@dataclass(frozen=True)
class _Flag:
    name: str
    values: tuple[str, ...]
    words: tuple[str, ...]  # as they were given, but for underscores in the name

    @property
    def text(self) -> str:
        return " ".join([f"--{self.name}", *self.values])

    @property
    def is_true(self) -> bool:
        """How the parser reads a switch: without a value it is on."""
        return not self.values or self.values[0].lower() in ("true", "yes", "1")

    @property
    def value(self) -> str:
        if len(self.values) != 1:
            raise UsageError(f"--{self.name} has {len(self.values)} values, expected one.")
        return self.values[0]


def translate(argv: list[str]) -> Translation:
    """Rewrite the old flags of a command line, in place, so that a later flag still wins.

    All flags are written as their fields are called: ``--learning-rate=1`` becomes ``--learning_rate=1``.

    Args:
        argv: The words after the script's name.

    Returns:
        The new command line, the notes and the environment variables to set.

    Raises:
        UsageError: When an old flag's value has no counterpart.

    Example:
        >>> result = translate(["--evaluation_strategy", "steps", "--seed=1"])
        >>> result.argv
        ['--eval_strategy', 'steps', '--seed=1']
        >>> result.notes
        ['--evaluation_strategy steps is now --eval_strategy steps.']
    """
    starts = [place for place, word in enumerate(argv) if word.startswith("--")]
    ends = [*starts, len(argv)]
    flags = [_flag(*argv[start:end]) for start, end in pairwise(ends)]
    given = {flag.name for flag in flags}
    result = Translation(argv[: ends[0]])
    for flag in flags:
        if flag.name in DROPPED:
            result.notes.append(f"{flag.text} is left out: {DROPPED[flag.name]}.")
        elif flag.name in RENAMED:
            result.replace(flag, f"--{RENAMED[flag.name]}", *flag.values)
        elif flag.name in _SWITCHES:
            result.replace(flag, *_SWITCHES[flag.name][not flag.is_true].split())
        elif (new := _VALUES.get((flag.name, " ".join(flag.values).lower()))) is not None:
            result.replace(flag, *new.split())
        elif flag.name in _SPECIAL:
            _SPECIAL[flag.name](flag, given, result)
        else:
            result.argv += flag.words
    return result


def _flag(word: str, *values: str) -> _Flag:
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return _Flag(name, ((value,) if equals else ()) + values, (f"--{name}{equals}{value}", *values))


def _batch_size(flag: _Flag, given: set[str], result: Translation) -> None:
    """InternLM-XComposer2's, for training and evaluation at once."""
    new = f"--per_device_train_batch_size {flag.value}"
    if "per_device_eval_batch_size" not in given:
        new += f" --per_device_eval_batch_size {flag.value}"
    result.replace(flag, *new.split())


def _warmup_ratio(flag: _Flag, given: set[str], result: Translation) -> None:
    try:
        ratio = float(flag.value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(
            f"--warmup_ratio is {flag.value!r}, expected a share of all steps from 0 to below 1. For a number of "
            "steps use --warmup_steps."
        )
    if "warmup_steps" in given:
        result.notes.append(f"{flag.text} is left out: --warmup_steps is given as well and takes its place.")
        return
    result.argv += ["--warmup_steps", flag.value]
    result.notes.append(
        f"{flag.text} is now --warmup_steps {flag.value} (below 1 it is a share of all steps)."
    )


def _logging_dir(flag: _Flag, given: set[str], result: Translation) -> None:
    result.environment["TENSORBOARD_LOGGING_DIR"] = flag.value
    result.notes.append(f"{flag.text} is now the environment variable TENSORBOARD_LOGGING_DIR={flag.value}.")


def _save_safetensors(flag: _Flag, given: set[str], result: Translation) -> None:
    if not flag.is_true:
        raise UsageError(
            f"{flag.text}: transformers 5 always writes safetensors. Remove the flag; "
            "merge_lora.py --safe_serialization false writes .bin files of a finished model."
        )
    result.replace(flag)


_SPECIAL: dict[str, Callable[[_Flag, set[str], Translation], None]] = {
    "batch_size": _batch_size,
    "warmup_ratio": _warmup_ratio,
    "logging_dir": _logging_dir,
    "save_safetensors": _save_safetensors,
}
REWRITTEN = (*_SWITCHES, *_SPECIAL)
