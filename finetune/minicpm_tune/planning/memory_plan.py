"""How much memory a training needs on each GPU, from config.json alone, with every row as large as allowed.

What a run holds throughout (weights, gradients, optimizer) is counted from the model's parameters and the rules of
ZeRO ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054; buffers as
deepspeed 0.19 allocates them). What comes and goes in a step is found by running the step on tensors without
contents, see ``planning/step_memory.py``. What neither sees (the CUDA context, NCCL, memory that the allocator
holds but can't use) is a surcharge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minicpm_tune.batch import IGNORE_INDEX, Sample
from minicpm_tune.checkpoints.model_folder import read_config, read_generation
from minicpm_tune.checkpoints.model_generations import Generation, TunedParts
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.errors import UserError
from minicpm_tune.files import GIB
from minicpm_tune.lora.build import add_adapter, set_frozen_copies_aside
from minicpm_tune.models.autocast import hold_activations_in_16_bit
from minicpm_tune.models.batch_layout import PATCH, Grid
from minicpm_tune.models.minicpmv.audio import MEL_BINS, Segment
from minicpm_tune.models.parameter_parts import check_parts, freeze, raise_precision_of_trained
from minicpm_tune.models.speed_options import Checkpointing, enable_checkpointing
from minicpm_tune.planning.step_memory import (
    LABELS,
    Attention,
    QuantizedShape,
    build_on_meta,
    checkpointing_options,
    fused_attention,
    measure_step,
    quantize_shapes,
)
from minicpm_tune.settings.argument_groups import LoraArguments
from minicpm_tune.settings.deepspeed_setup import read_deepspeed_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes of optimizer state per trained weight, its fp32 copy not included.
OPTIMIZERS = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2, "sgd": 0}
# The surcharge: CUDA's context with cuBLAS, NCCL where there are several GPUs, and what the caching allocator holds
# beside live tensors, as a share of what comes and goes, by ZeRO stage. All are assumed, but for stage 3, which
# makes and frees every layer's weights: its share is fitted to the official table.
CUDA_BYTES = NCCL_BYTES = 3 * GIB // 4
FRAGMENTATION = {0: 0.1, 2: 0.1, 3: 0.8}
_TAG_TOKENS = 2  # tokens around a placeholder
_MEL_PER_SECOND, _SEGMENT = 100, 3000  # frames of audio, and of the encoder's longest segment


class PlanError(UserError):
    """A training that can't be planned."""


@dataclass(frozen=True)
class Training:
    """What trains, and how; the names are those of the flags.

    Attributes:
        method: ``lora``, ``qlora`` or ``full``.
        gpus: Number of GPUs.
        zero: ZeRO stage: 0 (no DeepSpeed), 2 or 3.
        offload: What is kept in the CPU's memory: ``none``, ``optimizer`` (with gradients) or ``all`` (the weights
            too, ZeRO-3).
        model_max_length: Tokens of a row.
        batch_size: Rows per GPU.
        gradient_accumulation_steps: Micro-batches of an optimizer step.
        max_slice_nums: Most slices of a row's image, the overview not counted.
        audio_seconds: Seconds of audio of a row, for MiniCPM-o.
        downsample_mode: ``4x`` or ``16x`` for 4.6 and 4.7; None: the checkpoint's.
        tune_llm: Whether the language model trains, with ``full``.
        tune_vision: Whether the vision tower trains.
        tune_audio: Whether the audio encoder of MiniCPM-o trains.
        tune_resampler: Whether the resampler trains.
        gradient_checkpointing: Whether the backward computes activations again.
        checkpointing: The layers that it computes again, where it is not all or none.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        fp32_residual_connection: As the flag of ``finetune.py``.
        quant_bits: 4 or 8, with ``qlora``.
        optim: A key of ``OPTIMIZERS``.
        lora: The adapter's arguments.
    """

    method: str = "lora"
    gpus: int = 1
    zero: int = 2
    offload: str = "none"
    model_max_length: int = 2048
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_slice_nums: int = 9
    audio_seconds: int = 0
    downsample_mode: str | None = None
    tune_llm: bool = True
    tune_vision: bool = True
    tune_audio: bool = False
    tune_resampler: bool = True
    gradient_checkpointing: bool = True
    checkpointing: Checkpointing | None = None
    precision: str = "bf16"
    fp32_residual_connection: bool | None = None
    quant_bits: int = 4
    optim: str = "adamw_torch_fused"
    lora: LoraArguments = field(default_factory=LoraArguments)

    def __post_init__(self) -> None:
        """Refuse flags that can't be combined.

        Raises:
            PlanError: With the flag to change.
        """
        if self.offload != "none" and self.zero == 0:
            raise PlanError(
                f"--offload {self.offload} needs DeepSpeed, but --zero is 0. Set --zero to 2 or 3."
            )
        if self.offload == "all" and self.zero != 3:
            raise PlanError(
                f"--offload all moves the weights too, which needs ZeRO-3, but --zero is {self.zero}. Set --zero "
                "to 3, or --offload to optimizer."
            )
        counts = ("gpus", "model_max_length", "batch_size", "gradient_accumulation_steps", "max_slice_nums")
        for name in counts:
            if getattr(self, name) < 1:
                raise PlanError(f"--{name} is {getattr(self, name)}, expected at least 1. Raise it.")
        if self.audio_seconds < 0:
            raise PlanError(f"--audio_seconds is {self.audio_seconds}, expected 0 or more. Raise it.")

    @property
    def computed_again(self) -> Checkpointing:
        """The layers whose activations the backward computes again."""
        every = int(self.gradient_checkpointing)
        return Checkpointing(every, every) if self.checkpointing is None else self.checkpointing

    @property
    def tuned_around_llm(self) -> TunedParts:
        """Whether the parts before the language model train, as ``freeze`` and ``add_adapter`` take it."""
        return {"vision": self.tune_vision, "audio": self.tune_audio, "resampler": self.tune_resampler}

    @property
    def dtype(self) -> torch.dtype:
        """What ``precision`` names."""
        return DTYPES[self.precision]

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients come and go with every backward: without DeepSpeed, where a step has one."""
        return self.zero == 0 and self.gradient_accumulation_steps == 1

    @property
    def zero_settings(self) -> dict[str, Any]:
        """The settings of the DeepSpeed file that the launchers use for this stage."""
        return read_deepspeed_config(f"ds_config_zero{self.zero}.json")["zero_optimization"]


def training_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The loss of one step, as the trainer computes it."""
    return model(**batch).loss


def plan(
    folder: Path,
    training: Training,
    *,
    loss: Callable[[Any, dict[str, Any]], Tensor] = training_loss,
    attention: Attention = fused_attention,
) -> dict[str, int]:
    """Plan a training.

    Args:
        folder: A folder with a checkpoint's config.json; weights are not needed.
        training: What trains, and how.
        loss: The forward of the step.
        attention: How the step holds attention; the default as fused kernels do.

    Returns:
        Part -> bytes per GPU at the peak, in the order in which they are shown. They add up to the total.
    """
    config, generation = read_config(folder), read_generation(folder)
    model = prepared_model(folder, generation, training)
    held = _held(model, training, hidden=config.get("hidden_size") or config["text_config"]["hidden_size"])
    update = _optimizer_step(model, training)
    peak = step_peak(model, generation, training, loss=loss, attention=attention)
    passing = peak.total() - peak["gradients"] + held["gathered weights"]
    peak = max(peak, update, key=Counter.total)
    parts = {**held, **{label: held.get(label, 0) + peak[label] for label in (*LABELS, "optimizer step")}}
    fragmentation = round(FRAGMENTATION[training.zero] * passing)
    parts["surcharge"] = CUDA_BYTES + NCCL_BYTES * (training.gpus > 1) + fragmentation
    return {part: size for part, size in parts.items() if size}


def host_bytes(folder: Path, training: Training) -> int:
    """Bytes that ``--offload`` keeps in the CPU's memory, for all GPUs together."""
    if training.offload == "none":
        return 0
    model = prepared_model(folder, read_generation(folder), training)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    weights = sum(parameter.nbytes for parameter in model.parameters()) * (training.offload == "all")
    return (OPTIMIZERS[training.optim] + 4) * count + sum(parameter.nbytes for parameter in trained) + weights


def prepared_model(folder: Path, generation: Generation, training: Training) -> nn.Module:
    """The model on the meta device, with what trains marked."""
    check_parts(generation, audio=training.tune_audio)
    if training.audio_seconds and generation.hearing is None:
        raise PlanError(
            f"--audio_seconds {training.audio_seconds}: {generation.title} takes no audio, expected MiniCPM-o 2.6 or "
            "4.5. Leave the flag out."
        )
    model: Any = build_on_meta(folder, generation, downsample_mode=training.downsample_mode)
    model = model.to(training.dtype)
    if training.method == "qlora":
        quantize_shapes(model, generation, bits=training.quant_bits, dtype=training.dtype)
    if training.method == "full":
        freeze(model, generation, **training.tuned_around_llm, llm=training.tune_llm)
    else:
        with torch.device("meta"):
            model = add_adapter(model, generation, training.lora, **training.tuned_around_llm)
        if training.zero != 3:
            set_frozen_copies_aside(model)
    if training.zero == 0:
        raise_precision_of_trained(model)
        in_fp32 = training.fp32_residual_connection
        in_fp32 = training.precision == "fp16" if in_fp32 is None else in_fp32
        hold_activations_in_16_bit(model, residual=not in_fp32)
    else:
        model.to(training.dtype)  # DeepSpeed casts what adapters add
    return model.train()


def _held(model: nn.Module, training: Training, *, hidden: int) -> dict[str, int]:
    """What the run holds throughout, part -> bytes."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # bitsandbytes' scales are not parameters, so no stage of ZeRO divides them.
    scales = sum(module.scales.nbytes for module in model.modules() if isinstance(module, QuantizedShape))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    state = OPTIMIZERS[training.optim] * count
    if training.zero == 0:
        return {
            "weights": weights + scales,
            "gathered weights": 0,
            "gradients": 0 if training.keeps_gradients else 4 * count,
            "optimizer": state,
            # DistributedDataParallel keeps a second copy in its buckets.
            "communication": 4 * count * (training.gpus > 1),
        }
    share = 0 if training.offload != "none" else 1 / training.gpus
    settings = training.zero_settings
    largest = gathered = 0
    if training.zero == 2:
        # With offloaded gradients one buffer, as large as the largest gradient, stays on the GPU.
        largest = max(parameter.nbytes for parameter in trained) * (share == 0)
        bucket = settings["reduce_bucket_size"] * (2 if settings["overlap_comm"] else 1)
    else:
        bucket = hidden**2  # what "auto" stands for
        numel = sum(parameter.numel() for parameter in model.parameters())
        gathered = round(weights * min(1, settings["stage3_max_live_parameters"] / numel))
        weights = 0 if training.offload == "all" else round(weights / training.gpus)
    return {
        "weights": weights + scales,
        "gathered weights": gathered,
        "gradients": round(sum(parameter.nbytes for parameter in trained) * share) + largest,
        "optimizer": round((state + 4 * count) * share),
        "communication": bucket * trained[0].element_size(),
    }


def _optimizer_step(model: nn.Module, training: Training) -> Counter[str]:
    """What there is during the update: fp32 gradients (DeepSpeed), and the denominators of AdamW, unless fused."""
    if training.offload != "none":
        return Counter()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    passing = 4 * (training.optim == "adamw_torch")
    if training.zero == 0:
        return Counter({"gradients": 4 * count * training.keeps_gradients, "optimizer step": passing * count})
    count = -(-count // training.gpus)
    if training.zero == 3:
        count = min(count, training.zero_settings["sub_group_size"])
    return Counter({"optimizer step": (4 + passing) * count})


def step_peak(
    model: Any,
    generation: Generation,
    training: Training,
    *,
    loss: Callable[[Any, dict[str, Any]], Tensor] = training_loss,
    attention: Attention = fused_attention,
) -> Counter[str]:
    """What forward and backward make, label -> bytes at the peak; the model's tensors are replaced."""
    base = model if training.method == "full" else model.get_base_model()
    enable_checkpointing(base, generation, training.computed_again, **checkpointing_options(attention))
    return measure_step(
        model,
        generation,
        largest_batch(base, generation, training),
        loss,
        attention=attention,
        autocast=None if training.zero or training.precision == "fp32" else training.dtype,
        keep_gradients=training.keeps_gradients,
        # ZeRO-3 joins a gradient with others in one buffer before it sends their shares.
        copy_gradients=training.zero == 3,
    )


def largest_batch(model: PreTrainedModel, generation: Generation, training: Training) -> dict[str, Any]:
    """A batch of the largest samples, as arguments of the model's forward, on the CPU."""
    sample = largest_sample(
        model,
        generation,
        length=training.model_max_length,
        slices=training.max_slice_nums + 1,
        audio_seconds=training.audio_seconds,
    )
    batch: dict[str, Any] = {**data_collator([sample] * training.batch_size)}
    del batch["provenance"]
    return batch


def largest_sample(
    model: PreTrainedModel, generation: Generation, *, length: int, slices: int, audio_seconds: int = 0
) -> Sample:
    """A full row: one image of as many full slices as fit, behind the audio.

    Args:
        model: On the meta device; gives sizes and token ids.
        generation: Its generation.
        length: Tokens of the row.
        slices: Slices of its image, the overview included.
        audio_seconds: Seconds of audio, for models that hear.

    Returns:
        The sample. Every token that is not a placeholder is supervised.

    Raises:
        PlanError: When the audio does not fit into the row.
    """
    sample: Any = {"input_ids": torch.zeros(length, dtype=torch.int64), **_audio(model, audio_seconds)}
    heard = sample.get("audio_bound", torch.zeros(0, 2, dtype=torch.int64)).tolist()
    start = heard[-1][1] + _TAG_TOKENS if heard else 1
    if start > length:
        raise PlanError(
            f"--audio_seconds {audio_seconds}: the audio alone takes {start} tokens, more than the {length} of "
            "--model_max_length. Lower the one or raise the other."
        )
    sizes, bounds = [], []
    for size, tokens in _largest_image(model, generation, slices=slices, room=length - start):
        sizes.append(size)
        bounds.append((start, start + tokens))
        start += tokens + _TAG_TOKENS
    sample["tgt_sizes"] = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2)
    sample["image_bound"] = torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2)
    patches = sum(height * width for height, width in sizes)
    sample["pixel_values"] = torch.zeros((3, PATCH, PATCH * patches), dtype=torch.uint8)
    sample["labels"] = sample["input_ids"].clone()
    types = torch.zeros_like(sample["input_ids"])
    for first, end in [*bounds, *heard]:
        sample["input_ids"][first:end] = getattr(model.config, "image_token_id", 0)
        sample["labels"][first:end] = IGNORE_INDEX
        types[first:end] = 1
    if generation.token_types:
        sample["mm_token_type_ids"] = types
    return sample


def _largest_image(model: Any, generation: Generation, *, slices: int, room: int) -> list[tuple[Grid, int]]:
    """Of each slice of such an image its (rows, columns) in patches, and its tokens; [] when not even one fits."""
    tags = _TAG_TOKENS if generation.slice_tag else 0
    for count in range(slices, 0, -1):
        image = [(grid, model.slice_tokens(grid)) for grid in model.slice_grids(count)]
        if sum(tokens + tags for _, tokens in image) <= room:
            return image
    return []


def _audio(model: Any, seconds: int) -> dict[str, Tensor]:
    """The audio of a sample, in segments of 30 s, at its beginning."""
    if not seconds:
        return {}
    total = _MEL_PER_SECOND * seconds
    lengths = [min(_SEGMENT, total - start) for start in range(0, total, _SEGMENT)]
    longest = max(lengths)
    segments = torch.tensor(
        [(frames, longest, Segment(frames, longest).tokens(model.config.audio_pool)) for frames in lengths]
    )
    tokens = segments[:, 2]
    ends = tokens.cumsum(0)
    return {
        "audio_values": torch.zeros((MEL_BINS, total), dtype=torch.float32),
        "audio_segments": segments,
        "audio_bound": torch.stack([ends - tokens, ends], dim=1) + 1,
    }
