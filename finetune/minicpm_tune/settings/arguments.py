"""The arguments of a run: the command line's groups, checked and made ready for this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from minicpm_tune import output_folder, processes
from minicpm_tune.settings.argument_groups import (
    LearningRates,
    LoraArguments,
    ModelArguments,
    RunOptions,
    TuningOptions,
)
from minicpm_tune.settings.checks import UsageError, raise_problems
from minicpm_tune.settings.command_flags import switch
from minicpm_tune.settings.data_arguments import DataArguments
from minicpm_tune.settings.deepspeed_setup import (
    contradictions,
    drop_automatic_scheduler,
    read_deepspeed_config,
    start_on_cpu,
)
from minicpm_tune.settings.finetune_command import read_command_line
from minicpm_tune.settings.hardware import accelerator_count, apply_settings, data_workers, has_accelerator

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
        optim: Any = None
        use_liger_kernel: bool = False
        fsdp: Any = None
        activation_checkpointing: Any = None
        activation_checkpointing_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Settle the device, DeepSpeed's file and the checkpoint to continue before transformers does."""
        processes.check_restart()
        if not has_accelerator():
            # Otherwise torchrun's processes would each train alone (transformers 5.23, accelerate 1.15).
            self.use_cpu = True
        elif not self.use_cpu:
            _note(apply_settings())
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a bar in a file is a line per step
        self.set_loading_defaults()
        self.continues_last = (self.resume_from_checkpoint or "").lower() == "true"
        self.resume_from_checkpoint = self._checkpoint_to_continue()
        if self.metric_for_best_model is None and (
            self.early_stopping_patience is not None or self.save_strategy == "best"
        ):
            self.metric_for_best_model = "loss"
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false", ""):
            self.fsdp = self.fsdp.lower() == "true"
        if isinstance(self.deepspeed, str):
            self._read_deepspeed(self.deepspeed)
        if self.optim is None:
            self.optim = self.default_optimizer()
        if self.ddp_find_unused_parameters is None:
            # Every trained parameter gets a gradient from every batch, so nothing need be looked for.
            self.ddp_find_unused_parameters = False
        self._read_checkpointing()
        super().__post_init__()
        self.checkpoints_llm = bool(self.gradient_checkpointing)
        if self.n_gpu > 1:
            # nn.DataParallel would split the batch's packed pixels in the wrong places.
            self._n_gpu = 1
            logger.warning(
                "One of several GPUs is used. To use all: torchrun --nproc_per_node gpu finetune.py ..., "
                "or the launchers finetune_ds.sh and finetune_lora.sh."
            )

    def _read_checkpointing(self) -> None:
        value = self.activation_checkpointing
        self.chooses_checkpointing = value == "auto"  # planning/fitting.py chooses
        if isinstance(value, str):
            self.activation_checkpointing = value != "auto" and switch(value)

    @property
    def weight_dtype(self) -> torch.dtype:
        """What weights are loaded in: the asked-for precision."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def residual_in_fp32(self) -> bool:
        """``--fp32_residual_connection``, or what the precision asks for."""
        return self.fp16 if self.fp32_residual_connection is None else self.fp32_residual_connection

    @property
    def computes_in(self) -> str:
        """The precision of the vision tower's output, for the key of kept features."""
        return f"{self.weight_dtype}, {'DeepSpeed' if self.deepspeed else 'autocast'}"

    @property
    def learning_rates(self) -> LearningRates:
        """``--learning_rate`` and the parts' own."""
        own = {"vision": self.vision_lr, "audio": self.audio_lr, "resampler": self.resampler_lr}
        own |= {"llm": self.llm_lr, "embeddings": self.embed_lr}
        return LearningRates(self.learning_rate, own, self.lora_lr_ratio)

    def set_loading_defaults(self) -> None:
        """Choose the workers, and what goes with them, where the flags leave it open."""
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = data_workers(accelerator=not self.use_cpu)
        # torch refuses the one without workers, and warns of the other without a GPU
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0
        self.dataloader_pin_memory &= not self.use_cpu
        if self.dataloader_pin_memory:
            # Batches are copied while the GPU computes.
            self.accelerator_config = {"non_blocking": True}

    def default_optimizer(self) -> str:
        """AdamW in the form that suits the machine; on a GPU it is logged.

        The fused form updates all weights in one kernel, without the temporaries of the others. Where DeepSpeed keeps
        the states on the CPU it runs there, ten times as fast as the plain form. It also applies steps that fp16's
        loss scale discards, as steps of zero, by which accelerate (1.15) no longer sees them, and the schedule goes on.
        """
        if self.use_cpu or not torch.cuda.is_available() or (self.fp16 and not self.deepspeed):
            return "adamw_torch"
        config = self.deepspeed or {}
        if "optimizer" in config:
            return "adamw_torch"  # DeepSpeed makes what the file says
        offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        where = "the GPU" if offload == "none" else "the CPU, where its states are"
        _note(f"--optim adamw_torch_fused is used, on {where}.")
        return "adamw_torch_fused"

    def _checkpoint_to_continue(self) -> str | None:
        value = self.resume_from_checkpoint
        if value is None or value.lower() == "false":
            return None
        if value.lower() != "true":
            return os.path.expanduser(value)
        folder = os.path.expanduser(self.output_dir or "trainer_output")
        last = output_folder.find_earlier_run(folder).last_checkpoint
        return None if last is None else str(last)

    def _read_deepspeed(self, value: str) -> None:
        config = read_deepspeed_config(value)
        if drop_automatic_scheduler(config):
            _note(
                f"{value}: its scheduler section is ignored, so that --lr_scheduler_type {self.lr_scheduler_type} acts."
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


def parse_arguments(argv: list[str]) -> Arguments:
    """Read and check a command line.

    Args:
        argv: The words after the script's name; flags of the official guides included.

    Returns:
        The four groups. Making the third has joined the processes that torchrun started.

    Raises:
        UsageError: With every problem that can be seen without the model.
    """
    line = read_command_line(argv)
    raise_problems(_hardware_problems(line.model, line.training))
    os.environ.update(line.environment)
    for note in line.notes:
        _note(note)
    if line.training.do_train is None:
        line.training.do_train = bool(line.data.data_path)
    try:
        training = TrainingArguments(**vars(line.training))
    except ValueError as error:  # what the checks above don't know of
        raise UsageError(f"transformers refuses these arguments: {error}") from error
    return Arguments(line.model, line.data, training, line.lora)


def _hardware_problems(model: ModelArguments, training: Namespace) -> Iterator[str]:
    """What is wrong with a command line on this machine."""
    accelerators = 0 if training.use_cpu else accelerator_count()
    started = processes.local_world_size()
    if accelerators and started > accelerators:
        yield (
            f"{started} processes were started, but this machine has {accelerators} GPUs. "
            f"Set GPUS_PER_NODE={accelerators} (or less)."
        )
    for flag in ("fp16", "fp16_full_eval", "tf32"):
        if getattr(training, flag) and not accelerators:
            yield f"--{flag} true needs a GPU, and none is used. Use --{flag} false."
    if training.fp32_residual_connection is False and not (training.bf16 or training.fp16):
        yield "--fp32_residual_connection false needs --bf16 true or --fp16 true: in fp32 everything is fp32."
    if training.ddp_backend not in (None, "gloo", "nccl" if accelerators else None):
        yield f"--ddp_backend {training.ddp_backend} does not work on this machine. Leave it out."
    yield from _process_problems(training, accelerators)
    if model.attn_implementation == "flash_attention_2":
        if not accelerators:
            yield "--attn_implementation flash_attention_2 needs a GPU. Use sdpa, the default."
        elif importlib.util.find_spec("flash_attn") is None:
            yield (
                "--attn_implementation flash_attention_2 needs the flash-attn package: "
                "pip install flash-attn, or use sdpa, the default."
            )


def _process_problems(training: Namespace, accelerators: int) -> Iterator[str]:
    """The same for what depends on the number of processes."""
    if training.fsdp not in (None, "", "false") and processes.world_size() < 2:
        yield "--fsdp divides the model among several processes, and one was started. Leave it out, or start more."
    if training.deepspeed:
        config = read_deepspeed_config(training.deepspeed)
        yield from contradictions(config, training, processes=processes.world_size())
    workers = training.dataloader_num_workers
    if workers is None:
        workers = data_workers(accelerator=bool(accelerators))
    if workers == 0:
        for flag in ("dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
            if getattr(training, flag) is not None:
                yield f"--{flag} is about processes that load data, and there are none: add --dataloader_num_workers 2."


def _note(text: str | None) -> None:
    if text is not None and processes.rank() == 0:
        logger.info(text)
