"""Which base model an adapter was trained on, told by values of the base's own weights.

A path says little: folders are renamed and copied. ``base_model.json`` beside an adapter holds digests
of the base's norm weights and of a row of every linear layer, both taken from its files, so that an
adapter is not merged into another model of the same shapes. Quantised files keep the norms exact, so they
are recognised as the same base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import stored_tensors
from minicpm_tune.errors import UserError

RECORD_NAME = "base_model.json"


class BaseRecordError(UserError):
    """A record that can't be read."""


@dataclass(frozen=True)
class BaseRecord:
    """What is kept of a base model.

    Attributes:
        generation: Its name in ``generations.GENERATIONS``.
        norms: Digest of the LLM's one-dimensional weights, rounded to bf16.
        linears: Digest of the first row of each of the LLM's matrices; None when they are quantised.
        quantization: How the base was held while the adapter was trained, such as ``4 bit``; or None.
    """

    generation: str
    norms: str
    linears: str | None
    quantization: str | None = None

    def same_weights(self, other: BaseRecord) -> bool:
        """Whether both are records of one model; what one of them does not know is not compared."""
        linears = self.linears is None or other.linears is None or self.linears == other.linears
        return self.norms == other.norms and linears


def record_of(base: Path, generation: Generation, *, quantization: str | None = None) -> BaseRecord:
    """Read a base model's record off its weight files; about 300 small reads for an 8B model."""
    norms, linears = hashlib.sha256(), hashlib.sha256()
    quantised = False
    for name, values in sorted(_first_rows(base, generation)):
        if not values.is_floating_point():
            quantised = True
            continue
        rounded = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        (norms if name.startswith("norm:") else linears).update(name.encode() + rounded)
    return BaseRecord(
        generation.name, norms.hexdigest(), None if quantised else linears.hexdigest(), quantization
    )


def _first_rows(base: Path, generation: Generation) -> Iterator[tuple[str, Tensor]]:
    prefix = generation.modules["llm"][0] + "."
    for tensor in stored_tensors(base):
        name = tensor.name
        if name.startswith(prefix) and ".layers." in name and name.endswith(".weight"):
            yield f"{'norm' if len(tensor.shape) == 1 else 'linear'}:{name}", tensor.read_first_row()


def write_base_record(
    adapter: Path, base: Path, generation: Generation, *, quantization: str | None = None
) -> None:
    """Keep the base's record beside an adapter.

    Args:
        adapter: The folder that the adapter was saved to.
        base: The folder of its base model.
        generation: The base's generation.
        quantization: How the base was held in training, such as ``4 bit``; None for full precision.
    """
    content = asdict(record_of(base, generation, quantization=quantization))
    (adapter / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_base_record(adapter: Path) -> BaseRecord | None:
    """The record beside an adapter; None for an adapter of another tool.

    Raises:
        BaseRecordError: When it is damaged.
    """
    path = adapter / RECORD_NAME
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return BaseRecord(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise BaseRecordError(
            f"{path}: not what a LoRA run writes ({error}). Copy the adapter again, or delete this file: the base is "
            "then known by its name alone."
        ) from error
