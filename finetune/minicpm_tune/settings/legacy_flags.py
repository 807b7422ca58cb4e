"""Flags of older guides, mapped to what transformers 5 and this project call them.

The official guides were written for transformers 4. What it renamed is renamed here, what it dropped is
taken out, and each change gives one note for the log. InternLM-XComposer2's guide has names of its own for
three of the flags that MiniCPM-V's has.

Source: transformers 5.23.0, training_args.py, compared with 4.56.
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
        return not self.values or self.values[0].lower() in ("true", "yes", "t", "y", "1")


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
        if flag is None or not _is_old(flag):
            result.argv += words
        elif flag.name in DROPPED:
            result.notes.append(f"{flag.text} was dropped by transformers: {DROPPED[flag.name]}.")
        elif flag.name in RENAMED:
            _rename(flag, RENAMED[flag.name], result)
        else:
            REWRITTEN[flag.name](flag, given, result)
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


def _is_old(flag: _Flag) -> bool:
    if flag.name == "optim":
        return flag.values == ("adamw_hf",)
    return flag.name in RENAMED or flag.name in DROPPED or flag.name in REWRITTEN


def _rename(flag: _Flag, name: str, result: Translation) -> None:
    new = [f"--{name}", *flag.values]
    result.argv += new
    result.notes.append(f"{flag.text} is now {' '.join(new)}.")


def _one_value(flag: _Flag) -> str:
    if len(flag.values) != 1:
        raise LegacyFlagError(f"--{flag.name} takes one value, got {len(flag.values)}.")
    return flag.values[0]


def _batch_size(flag: _Flag, given: set[str], result: Translation) -> None:
    value = _one_value(flag)
    new = ["--per_device_train_batch_size", value]
    if "per_device_eval_batch_size" not in given:
        new += ["--per_device_eval_batch_size", value]
    result.argv += new
    result.notes.append(f"{flag.text} is now {' '.join(new)}.")


def _warmup_ratio(flag: _Flag, given: set[str], result: Translation) -> None:
    value = _one_value(flag)
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise LegacyFlagError(
            f"--warmup_ratio is {value!r}, expected a share of all steps from 0 to below 1 (for a number of "
            "steps use --warmup_steps)."
        )
    if "warmup_steps" in given:
        result.notes.append(f"{flag.text} is left out: --warmup_steps is given as well, and takes its place.")
        return
    result.argv += ["--warmup_steps", value]
    result.notes.append(f"{flag.text} is now --warmup_steps {value} (below 1 it is a share of all steps).")


def _logging_dir(flag: _Flag, given: set[str], result: Translation) -> None:
    value = _one_value(flag)
    result.environment["TENSORBOARD_LOGGING_DIR"] = value
    result.notes.append(f"{flag.text} is now the environment variable TENSORBOARD_LOGGING_DIR={value}.")


def _group_by_length(flag: _Flag, given: set[str], result: Translation) -> None:
    new = ["--train_sampling_strategy", "group_by_length"] if flag.is_true else []
    result.argv += new
    result.notes.append(f"{flag.text} is now {' '.join(new) or 'the default'}.")


def _include_inputs(flag: _Flag, given: set[str], result: Translation) -> None:
    new = ["--include_for_metrics", "inputs"] if flag.is_true else []
    result.argv += new
    result.notes.append(f"{flag.text} is now {' '.join(new) or 'the default'}.")


def _max_length(flag: _Flag, given: set[str], result: Translation) -> None:
    """InternLM-XComposer2's name for the longest row."""
    _rename(flag, "model_max_length", result)


def _fixed(part: str) -> Callable[[_Flag, set[str], Translation], None]:
    """InternLM-XComposer2's way to say which part does not train."""

    def rewrite(flag: _Flag, given: set[str], result: Translation) -> None:
        new = [f"--tune_{part}", "false" if flag.is_true else "true"]
        result.argv += new
        result.notes.append(f"{flag.text} is now {' '.join(new)}.")

    return rewrite


def _adafactor(flag: _Flag, given: set[str], result: Translation) -> None:
    new = ["--optim", "adafactor"] if flag.is_true else []
    result.argv += new
    result.notes.append(f"{flag.text} is now {' '.join(new) or 'the default'}.")


def _optim(flag: _Flag, given: set[str], result: Translation) -> None:
    result.argv += ["--optim", "adamw_torch"]
    result.notes.append(f"{flag.text} is now --optim adamw_torch (transformers dropped its own AdamW).")


def _save_safetensors(flag: _Flag, given: set[str], result: Translation) -> None:
    if not flag.is_true:
        raise LegacyFlagError(
            f"{flag.text}: transformers 5 always writes safetensors. Remove the flag; "
            "merge_lora.py --safe_serialization false writes .bin files of a finished model."
        )
    result.notes.append(f"{flag.text} is what transformers always does now.")


def _trust_remote_code(flag: _Flag, given: set[str], result: Translation) -> None:
    result.notes.append(f"{flag.text} is left out: no code of a checkpoint is needed here, and none is run.")


REWRITTEN: dict[str, Callable[[_Flag, set[str], Translation], None]] = {
    "batch_size": _batch_size,
    "warmup_ratio": _warmup_ratio,
    "logging_dir": _logging_dir,
    "group_by_length": _group_by_length,
    "include_inputs_for_metrics": _include_inputs,
    "adafactor": _adafactor,
    "max_length": _max_length,
    "fix_vit": _fixed("vision"),
    "fix_sampler": _fixed("resampler"),
    "optim": _optim,
    "save_safetensors": _save_safetensors,
    "trust_remote_code": _trust_remote_code,
}
