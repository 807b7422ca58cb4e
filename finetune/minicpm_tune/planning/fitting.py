"""What fits: how much checkpointing a run needs, and, for the launchers, which flags make it fit a card.

    python -m minicpm_tune.planning.fitting PROCESSES FLAGS...

prints the flags that ``MEMORY=auto`` adds to those of a launcher. In a run ``choose_checkpointing`` decides before the
weights are loaded; every process then does the same.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from minicpm_tune import processes
from minicpm_tune.checkpoints.model_folder import read_generation, resolve_model_folder
from minicpm_tune.errors import UserError
from minicpm_tune.files import GIB
from minicpm_tune.models.speed_options import Checkpointing
from minicpm_tune.planning.memory_plan import (
    CUDA_BYTES,
    NCCL_BYTES,
    OPTIMIZERS,
    Training,
    host_bytes,
    plan,
    prepared_model,
)
from minicpm_tune.settings.argument_groups import LoraArguments
from minicpm_tune.settings.deepspeed_setup import read_deepspeed_config
from minicpm_tune.settings.finetune_command import read_command_line
from minicpm_tune.settings.hardware import free_memory, has_accelerator

logger = logging.getLogger(__name__)

# A plan fits when it leaves this share: what it was compared with differs from it by up to so much.
_SPARE = 0.05
_PATCHES_OF_SLICE = 1024
# Four times the bytes that layers keep per number that their matrix products take and give; for ``_at_most``.
_BYTES_PER_NUMBER = 24
_EVERY = 1
_SECOND = 2
# The DeepSpeed files that belong together, from the one that costs least time.
_WITH_OFFLOAD = ("ds_config_zero2.json", "ds_config_zero2_offload.json", "ds_config_zero3_offload.json")


class Room(NamedTuple):
    """What a process may fill: its size in bytes, and whether it is RAM."""

    size: int
    on_cpu: bool

    @classmethod
    def of(cls, training: Any) -> Room:
        """What ``--memory_gib`` says, or what is free."""
        on_cpu = bool(training.use_cpu) or not has_accelerator()
        if training.memory_gib is not None:
            return cls(round(training.memory_gib * GIB), on_cpu)
        return cls(free_memory(on_cpu=on_cpu), on_cpu)

    def need(self, folder: Path, training: Training) -> int:
        """Bytes that a run will take of it: the plan without what is taken already, or is not there."""
        planned = sum(plan(folder, training).values()) - CUDA_BYTES
        return planned - NCCL_BYTES * (training.gpus > 1) if self.on_cpu else planned

    def fits(self, need: int) -> bool:
        """Whether so many bytes fit."""
        return need <= (1 - _SPARE) * self.size

    def __str__(self) -> str:
        return f"{_gib(self.size)} GiB of {'RAM' if self.on_cpu else 'the GPU'}"


def training_of(
    training: Any, lora: LoraArguments, *, gpus: int, length: int | None = None
) -> Training | None:
    """What a run's arguments say about its memory.

    Args:
        training: A value for every field of ``TrainingArguments``.
        lora: The adapter's arguments.
        gpus: Processes of the run.
        length: Tokens of its longest row; None: as long as allowed.

    Returns:
        The training, or None for what can't be planned: FSDP.
    """
    if training.fsdp not in (None, "", "false", False, []):
        return None
    config = training.deepspeed or {}
    zero = (read_deepspeed_config(config) if isinstance(config, str) else config).get("zero_optimization", {})
    stage = {0: 0, 1: 2, 2: 2, 3: 3}[zero.get("stage", 0)]
    offloads = ["offload_optimizer" in zero, "offload_param" in zero]
    optim = str(getattr(training.optim, "value", training.optim))
    kind = "adamw_8bit" if "8bit" in optim else optim if optim in OPTIMIZERS else "adamw_torch_fused"
    method = ("qlora" if lora.q_lora else "lora") if training.use_lora else "full"
    return Training(
        method=method,
        gpus=gpus,
        zero=stage,
        offload="all" if all(offloads) and stage == 3 else "optimizer" if offloads[0] and stage else "none",
        model_max_length=length or training.model_max_length,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_slice_nums=training.max_slice_nums or 9,
        tune_llm=training.tune_llm,
        tune_vision=training.tune_vision,
        tune_audio=training.tune_audio,
        tune_resampler=training.tune_resampler,
        precision="bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        fp32_residual_connection=training.fp32_residual_connection,
        quant_bits=lora.quant_bits,
        optim=kind,
        lora=lora,
    )


def choose_checkpointing(
    training: Any, lora: LoraArguments, folder: Path, *, length: int
) -> Checkpointing | None:
    """Compare the plan of a run with its memory, and log what it came to; all processes must call it.

    Args:
        training: ``TrainingArguments``.
        lora: The adapter's arguments.
        folder: The model folder.
        length: Tokens of the longest row.

    Returns:
        With ``--activation_checkpointing auto`` the layers to compute again, the same on every process; else None.
    """
    rooms = processes.gather(Room.of(training))
    chosen = None
    if processes.rank() == 0:
        room = min(rooms, key=lambda room: room.size)
        chosen = _choose(training, lora, folder, room, gpus=len(rooms), length=length)
    return processes.gather(chosen)[0]


def _choose(
    training: Any, lora: LoraArguments, folder: Path, room: Room, *, gpus: int, length: int
) -> Checkpointing | None:
    automatic = training.chooses_checkpointing
    asked = None if automatic else Checkpointing.asked_for(training)
    try:
        planned = training_of(training, lora, gpus=gpus, length=length)
        if planned is None:
            raise UserError("--fsdp is not planned.")
        vision = training.vision_gradient_checkpointing
        with _without_division(training):
            found, text = fitting(folder, planned, room, asked=asked, vision=vision)
    except Exception as error:  # noqa: BLE001  the run can do without a plan, whatever is wrong with it
        logger.info(
            "Memory is not planned (%s: %s)%s",
            type(error).__name__, error, "; every layer is computed again." if automatic else "",
        )  # fmt: skip
        return Checkpointing(_EVERY, _EVERY) if automatic else None
    logger.info("%s", text)
    return found if automatic else None


@contextmanager
def _without_division(training: Any) -> Iterator[None]:
    """Under ZeRO-3 transformers divides every new model among the processes, of which only one makes a plan."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed:
            set_hf_deepspeed_config(training.hf_deepspeed_config)


def fitting(
    folder: Path,
    training: Training,
    room: Room,
    *,
    asked: Checkpointing | None = None,
    vision: bool | None = None,
) -> tuple[Checkpointing, str]:
    """The least checkpointing that fits, or the one asked for.

    Args:
        folder: The model folder.
        training: What is planned.
        room: Where it must fit.
        asked: The only one to plan; None: choose.
        vision: ``--vision_gradient_checkpointing``, which decides for the tower.

    Returns:
        The checkpointing, and a sentence with the numbers.
    """
    choices = [asked] if asked else list(_choices(training, vision))
    first, *others = choices
    bound = _at_most(folder, training)
    if room.fits(bound):
        return first, f"Memory: at most {_gib(bound)} of {room} are needed. Computed again: {first}."

    @cache
    def need(choice: Checkpointing) -> int:
        return room.need(folder, replace(training, checkpointing=choice))

    found = first
    if others and not room.fits(need(first)):
        # Each choice needs less memory and more time than the one before it: the first that fits, or the last.
        place = bisect_left(others[:-1], True, key=lambda choice: room.fits(need(choice)))
        found = others[place]
    verdict = "which fits" if room.fits(need(found)) else f"which does not fit: {_remedy(training)}"
    text = f"Memory: {_gib(need(found))} GiB are planned of {room}, {verdict}. Computed again: {found}"
    return found, text + (f" (without it {_gib(need(first))} GiB)." if found != first else ".")


def _choices(training: Training, vision: bool | None) -> Iterator[Checkpointing]:
    """From nothing to everything. The tower comes first: it keeps several times more for an operation saved."""
    tower = 0 if vision is None else int(vision)
    yield Checkpointing(0, tower)
    if vision is None and (training.tune_vision or training.tune_audio):
        yield Checkpointing(0, _SECOND)
        yield Checkpointing(0, _EVERY)
        tower = _EVERY
    yield Checkpointing(_SECOND, tower)
    yield Checkpointing(_EVERY, tower)


def _at_most(folder: Path, training: Training) -> int:
    """More than a run can need, from the widths of its layers: small models need no plan."""
    generation = read_generation(folder)
    model = prepared_model(folder, generation, training)
    towers = tuple(
        f"{name}." for part in ("vision", "resampler", "audio") for name in generation.modules.get(part, ())
    )
    numbers = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            seen = name.removeprefix("base_model.model.").startswith(towers)
            rows = _PATCHES_OF_SLICE * (training.max_slice_nums + 1) if seen else training.model_max_length
            numbers += training.batch_size * rows * (module.in_features + module.out_features)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return 24 * weights + _BYTES_PER_NUMBER * numbers + GIB


def _remedy(training: Training) -> str:
    """What to do about a run that does not fit."""
    if training.offload != "none":
        return "lower --per_device_train_batch_size, --model_max_length or --max_slice_nums"
    return "start the launcher with MEMORY=auto, which adds what makes it fit"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


# For the launchers


def flags_that_fit(argv: list[str], *, gpus: int) -> tuple[list[str], str]:
    """What ``MEMORY=auto`` adds to a launcher's flags.

    Args:
        argv: The flags.
        gpus: Processes of the run.

    Returns:
        The flags to add, and what to say.

    Raises:
        UserError: When nothing makes it fit, or the run can't be planned.
    """
    line = read_command_line(argv)
    room = Room.of(line.training)
    folder = resolve_model_folder(
        line.model.model_name_or_path, cache_dir=line.training.cache_dir, weights=False
    )
    tried: list[int] = []
    for added, training in _ladder(line.training, line.lora, argv, gpus):
        checkpointing, _ = fitting(folder, training, room, vision=line.training.vision_gradient_checkpointing)
        training = replace(training, checkpointing=checkpointing)
        need = room.need(folder, training)
        words = " ".join(added) or "no further flag"
        host = host_bytes(folder, training)
        if room.fits(need) and host <= free_memory(on_cpu=True):
            first = f" As asked, {_gib(tried[0])} GiB were planned." if tried else ""
            ram = f" and {_gib(host)} GiB of RAM" if host else ""
            return added, f"MEMORY=auto: {room}.{first} With {words}, {_gib(need)} GiB{ram} are planned."
        tried.append(need)
    raise UserError(
        f"MEMORY=auto: {room}, and the least that can be planned is {_gib(min(tried))} GiB. "
        "Lower --model_max_length or --max_slice_nums, train less (LoRA, --q_lora true, --tune_vision false, "
        "--lora_modules_to_save none), or use more GPUs."
    )


def _ladder(
    training: Namespace, lora: LoraArguments, argv: list[str], gpus: int
) -> Iterator[tuple[list[str], Training]]:
    """Flags to add and what is then trained, from the one that costs least time. What was given is never changed."""
    given = {word.partition("=")[0] for word in argv}
    file = Path(training.deepspeed or "").name

    def with_flags(**values: Any) -> tuple[list[str], Training]:
        planned = training_of(Namespace(**{**vars(training), **values}), lora, gpus=gpus)
        if planned is None:
            raise UserError("MEMORY=auto: --fsdp is not planned. Leave MEMORY or FSDP out.")
        return [word for name, value in values.items() for word in (f"--{name}", value)], planned

    yield with_flags()
    small = "--optim" not in given and importlib.util.find_spec("bitsandbytes") and not training.use_cpu
    if small and has_accelerator():
        yield with_flags(optim="adamw_8bit")
    if file == _WITH_OFFLOAD[0]:
        yield with_flags(deepspeed=_WITH_OFFLOAD[1])
        if not lora.q_lora:
            yield with_flags(deepspeed=_WITH_OFFLOAD[2])


def main(argv: list[str]) -> int:
    """Answer a launcher. Returns the exit code."""
    try:
        added, text = flags_that_fit(argv[1:], gpus=int(argv[0]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"{text}\n")
    sys.stdout.write(" ".join(added) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
