"""The command line: four groups of arguments, parsed, checked and made ready for the machine."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from minicpm_tune import output_folder, processes
from minicpm_tune.settings.argument_groups import (
    DataArguments,
    LearningRates,
    LoraArguments,
    ModelArguments,
    RunOptions,
    TuningOptions,
)
from minicpm_tune.settings.checks import UsageError, check_arguments, raise_problems
from minicpm_tune.settings.deepspeed_setup import (
    drop_automatic_scheduler,
    read_deepspeed_config,
    start_on_cpu,
)
from minicpm_tune.settings.hardware import apply_settings, data_workers, has_accelerator
from minicpm_tune.settings.legacy_flags import LegacyFlagError, translate

__all__ = [
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "TrainingArguments",
    "UsageError",
    "parse_arguments",
]

logger = logging.getLogger(__name__)


@dataclass
class TrainingArguments(TuningOptions, RunOptions, transformers.TrainingArguments):
    """Everything of ``transformers.TrainingArguments``, with what trains and how the run is started.

    Differs from transformers: what ``RunOptions`` names; ``use_cpu`` is set on a machine without GPUs.
    """

    if TYPE_CHECKING:  # what the fields hold once they are settled, narrower than they are declared
        output_dir: str = ""
        do_train: bool = False
        dataloader_num_workers: int = 0
        deepspeed: dict[str, Any] | None = None
        activation_checkpointing_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Settle the device, DeepSpeed's file and the checkpoint to continue before transformers does."""
        if not has_accelerator():
            # Otherwise torchrun's processes would each train alone (transformers 5.23, accelerate 1.15).
            self.use_cpu = True
        elif not self.use_cpu:
            _note(apply_settings())
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a bar in a file is a line per step
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = data_workers(accelerator=not self.use_cpu)
        # torch refuses the one without workers, and warns of the other without a GPU
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0
        self.dataloader_pin_memory &= not self.use_cpu
        self.continues_last = (self.resume_from_checkpoint or "").lower() == "true"
        self.resume_from_checkpoint = self._checkpoint_to_continue()
        if isinstance(self.deepspeed, str):
            self._read_deepspeed(self.deepspeed)
        if self.ddp_find_unused_parameters is None:
            # Every trained parameter gets a gradient from every batch, so nothing need be looked for.
            self.ddp_find_unused_parameters = False
        # Trainer's filter hides losses that are not finite, and waits for the device after every batch to do so;
        # ResilientTrainer looks once per step, and does not apply such a step.
        self.logging_nan_inf_filter = False
        super().__post_init__()
        # What was asked for; speed_options takes it over from Trainer and clears the flag.
        self.checkpoints_llm = bool(self.gradient_checkpointing)
        if self.n_gpu > 1:
            # nn.DataParallel would split the batch's packed pixels in the wrong places.
            self._n_gpu = 1
            logger.warning(
                "One of several GPUs is used. To use all: torchrun --nproc_per_node gpu finetune.py ..., "
                "or the launchers finetune_ds.sh and finetune_lora.sh."
            )

    @property
    def weight_dtype(self) -> torch.dtype:
        """What weights are loaded in: the asked-for precision."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def computes_in(self) -> str:
        """The precision of the vision tower's output, for the key of kept features."""
        return f"{self.weight_dtype}, {'DeepSpeed' if self.deepspeed else 'autocast'}"

    @property
    def learning_rates(self) -> LearningRates:
        """``--learning_rate`` and the parts' own."""
        parts = {
            "vision": self.vision_lr,
            "resampler": self.resampler_lr,
            "llm": self.llm_lr,
            "embeddings": self.embed_lr,
        }
        return LearningRates(self.learning_rate, parts, self.lora_lr_ratio)

    def _checkpoint_to_continue(self) -> str | None:
        value = self.resume_from_checkpoint
        if value is None or value.lower() == "false":
            return None
        if value.lower() != "true":
            return os.path.expanduser(value)
        last = output_folder.find_earlier_run(
            os.path.expanduser(self.output_dir or "trainer_output")
        ).last_checkpoint
        return None if last is None else str(last)

    def _read_deepspeed(self, value: str) -> None:
        config = read_deepspeed_config(value)
        if drop_automatic_scheduler(config):
            _note(
                f"{value}: its scheduler section is left out, so that --lr_scheduler_type "
                f"{self.lr_scheduler_type} is what runs."
            )
        self.deepspeed = config
        if self.use_cpu:
            start_on_cpu()


class Arguments(NamedTuple):
    """The four groups of a command line."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments


class _Parser(HfArgumentParser):
    """Raises instead of printing the usage of two hundred flags and exiting."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into ours: without its list of spellings."""
        text = re.sub(r"argument (--[\w-]+)\S*:", r"\1:", message)
        raise UsageError(f"{text}. finetune.py --help lists every argument.")


def parse_arguments(argv: list[str]) -> Arguments:
    """Parse and check a command line.

    Args:
        argv: The words after the script's name; flags of the official guides included.

    Returns:
        The four groups. Making the third has joined the processes that torchrun started.

    Raises:
        UsageError: With every problem that can be seen without the model.
    """
    try:
        translation = translate(argv)
    except LegacyFlagError as error:
        raise UsageError(str(error)) from error
    # Full names only: with abbreviations a misspelt flag may be taken for another.
    groups: Any = [ModelArguments, DataArguments, TrainingArguments, LoraArguments]
    parser = _Parser(groups, add_help=False, allow_abbrev=False)
    values, unknown = parser.parse_known_args(translation.argv)
    raise_problems(_unknown_flags(unknown, _flag_names(parser)))
    model, data, lora = (_pick(group, values) for group in (ModelArguments, DataArguments, LoraArguments))
    check_arguments(model, data, Namespace(**_values_of(TrainingArguments, values)), lora)
    os.environ.update(translation.environment)
    for note in translation.notes:
        _note(note)
    if values.do_train is None:
        values.do_train = bool(data.data_path)
    return Arguments(model, data, _pick(TrainingArguments, values), lora)


def _note(text: str | None) -> None:
    if text is not None and processes.rank() == 0:
        logger.info(text)


def _values_of(group: type, values: Namespace) -> dict[str, Any]:
    return {item.name: getattr(values, item.name) for item in fields(group) if item.init}


def _pick(group: type, values: Namespace) -> Any:
    return group(**_values_of(group, values))


def _flag_names(parser: HfArgumentParser) -> list[str]:
    return [name for name in parser._option_string_actions if "_" in name or "-" not in name[2:]]


def _unknown_flags(words: list[str], known: list[str]) -> list[str]:
    """One problem per word that no argument took, with the nearest flag."""
    problems = []
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag in flags:
        near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
        advice = f"Did you mean {near[0]}?" if near else "finetune.py --help lists every argument."
        problems.append(f"unknown argument {flag}. {advice}")
    if not flags:
        problems = [f"{word!r} belongs to no argument. Arguments start with --." for word in words]
    return problems
