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

from minicpm_tune.errors import UserError

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

FOREIGN = {
    "adapter_name_or_path": "--lora_weight_path",
    "adapters": "--lora_weight_path",
    "additional_target": "--lora_modules_to_save",
    "aligner_lr": "--resampler_lr",
    "attn_impl": "--attn_implementation",
    "cutoff_len": "--model_max_length",
    "dataset": "--data_path",
    "dataset_dir": "--data_path, which takes paths",
    "dataset_num_proc": "--dataloader_num_workers",
    "early_stop_interval": "--early_stopping_patience",
    "early_stopping_steps": "--early_stopping_patience",
    "eval_dataset": "--eval_data_path",
    "finetuning_type": "--use_lora true --tune_llm false for LoRA, --tune_llm true for full tuning",
    "flash_attn": "--attn_implementation",
    "fps": "--video_fps",
    "freeze_aligner": "--tune_resampler, with the opposite value",
    "freeze_llm": "--tune_llm, with the opposite value",
    "freeze_multi_modal_projector": "--tune_resampler, with the opposite value",
    "freeze_vision_tower": "--tune_vision, with the opposite value",
    "freeze_vit": "--tune_vision, with the opposite value",
    "image_dir": "--image_folder",
    "image_max_pixels": "--max_slice_nums (slices of 448 x 448 pixels)",
    "init_weights": "--init_lora_weights",
    "lora_rank": "--lora_r",
    "lora_target": "--lora_target_modules",
    "loraplus_lr_ratio": "--lora_lr_ratio",
    "lorap_lr_ratio": "--lora_lr_ratio",
    "max_pixels": "--max_slice_nums (slices of 448 x 448 pixels)",
    "media_dir": "--image_folder",
    "model": "--model_name_or_path",
    "model_id_or_path": "--model_name_or_path",
    "modules_to_save": "--lora_modules_to_save",
    "neat_packing": "--packing",
    "preprocessing_num_workers": "--dataloader_num_workers",
    "quantization_bit": "--q_lora true --quant_bits",
    "resume_lora": "--lora_weight_path",
    "sft_type": "--use_lora true --tune_llm false for LoRA, --tune_llm true for full tuning",
    "split_dataset_ratio": "--eval_split",
    "system": "the system message of a row",
    "target_modules": "--lora_target_modules",
    "template": "not needed: the model folder says how conversations are written",
    "torch_dtype": "--bf16 true or --fp16 true",
    "train_type": "--use_lora true --tune_llm false for LoRA, --tune_llm true for full tuning",
    "tuner_type": "--use_lora true --tune_llm false for LoRA, --tune_llm true for full tuning",
    "val_dataset": "--eval_data_path",
    "val_size": "--eval_split",
    "video_fps_max_frames": "--max_num_frames",
    "video_maxlen": "--max_num_frames",
    "vit_lr": "--vision_lr",
}


class LegacyFlagError(UserError):
    """An old flag whose value has no counterpart."""


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

    def replace(self, flag: _Flag, new: str) -> None:
        """Write other flags in the place of one."""
        self.argv += new.split()
        self.notes.append(f"{flag.text} is now {new or 'the default'}.")


@dataclass(frozen=True)
class _Flag:
    name: str
    values: tuple[str, ...]

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
            raise LegacyFlagError(f"--{self.name} has {len(self.values)} values, expected one.")
        return self.values[0]


def translate(argv: list[str]) -> Translation:
    """Rewrite the old flags of a command line, in place, so that a later flag still wins.

    Args:
        argv: The words after the script's name.

    Returns:
        The new command line, the notes and the environment variables to set.

    Raises:
        LegacyFlagError: When an old flag's value has no counterpart.

    Example:
        >>> result = translate(["--evaluation_strategy", "steps", "--seed=1"])
        >>> result.argv
        ['--eval_strategy', 'steps', '--seed=1']
        >>> result.notes
        ['--evaluation_strategy steps is now --eval_strategy steps.']
    """
    flags = _split(argv)
    given = {flag.name for flag, _ in flags if flag}
    result = Translation()
    for flag, words in flags:
        if flag is None:
            result.argv += words
        elif flag.name in DROPPED:
            result.notes.append(f"{flag.text} is left out: {DROPPED[flag.name]}.")
        elif flag.name in RENAMED:
            result.argv += [f"--{RENAMED[flag.name]}", *flag.values]
            result.notes.append(f"{flag.text} is now {' '.join([f'--{RENAMED[flag.name]}', *flag.values])}.")
        elif flag.name in _SWITCHES:
            result.replace(flag, _SWITCHES[flag.name][not flag.is_true])
        elif (new := _VALUES.get((flag.name, " ".join(flag.values).lower()))) is not None:
            result.replace(flag, new)
        elif flag.name in _SPECIAL:
            _SPECIAL[flag.name](flag, given, result)
        else:
            result.argv += words
    return result


def _split(argv: list[str]) -> list[tuple[_Flag | None, list[str]]]:
    """Cut a command line into flags with their values; words before the first flag have none."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return [(_flag(words), words) for words in groups]


def _flag(words: list[str]) -> _Flag | None:
    if not words[0].startswith("--"):
        return None
    name, equals, value = words[0][2:].partition("=")
    return _Flag(name.replace("-", "_"), ((value,) if equals else ()) + tuple(words[1:]))


def _batch_size(flag: _Flag, given: set[str], result: Translation) -> None:
    """InternLM-XComposer2's, for training and evaluation at once."""
    new = f"--per_device_train_batch_size {flag.value}"
    if "per_device_eval_batch_size" not in given:
        new += f" --per_device_eval_batch_size {flag.value}"
    result.replace(flag, new)


def _warmup_ratio(flag: _Flag, given: set[str], result: Translation) -> None:
    try:
        ratio = float(flag.value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise LegacyFlagError(
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
        raise LegacyFlagError(
            f"{flag.text}: transformers 5 always writes safetensors. Remove the flag; "
            "merge_lora.py --safe_serialization false writes .bin files of a finished model."
        )
    result.replace(flag, "")


_SPECIAL: dict[str, Callable[[_Flag, set[str], Translation], None]] = {
    "batch_size": _batch_size,
    "warmup_ratio": _warmup_ratio,
    "logging_dir": _logging_dir,
    "save_safetensors": _save_safetensors,
}
REWRITTEN = (*_SWITCHES, *_SPECIAL)
