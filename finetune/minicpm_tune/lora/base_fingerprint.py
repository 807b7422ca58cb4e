"""Tells which base model an adapter was trained on by values of the base's own weights.

A path says little: folders are renamed and copied. ``base_model.json`` beside an adapter holds digests
of the base's norm weights and of the first row of every linear layer, both read from its files, so that
an adapter is not merged into another model of the same shapes. Quantized files keep the norms exact, and
are therefore recognized as the same base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import stored_tensors
from minicpm_tune.errors import UserError

FINGERPRINT_FILE = "base_model.json"


class FingerprintError(UserError):
    """A fingerprint file that can't be read."""


@dataclass(frozen=True)
class BaseFingerprint:
    """What identifies a base model.

    Attributes:
        generation: Its name in ``model_generations.GENERATIONS``.
        norms: Digest of the LLM's one-dimensional weights, rounded to bf16.
        linears: Digest of the first row of each of the LLM's matrices; None when they are quantized.
        quantization: How the base was held while the adapter was trained, such as ``4 bit``; or None.
        downsample_mode: That of the adapter's training, for 4.6 and 4.7.
        new_tokens: Token -> id of those that the training added to the base.
    """

    generation: str
    norms: str
    linears: str | None
    quantization: str | None = None
    downsample_mode: str | None = None
    new_tokens: dict[str, int] = field(default_factory=dict)

    def has_same_weights(self, other: BaseFingerprint) -> bool:
        """Whether both come from one model; linear layers are compared where both know them."""
        linears = self.linears is None or other.linears is None or self.linears == other.linears
        return self.norms == other.norms and linears


def fingerprint_of(base: Path, generation: Generation, *, quantization: str | None = None) -> BaseFingerprint:
    """Read a base model's fingerprint off its weight files; about 300 small reads for an 8B model."""
    norms, linears = hashlib.sha256(), hashlib.sha256()
    quantized = False
    for name, values in sorted(_first_rows(base, generation)):
        if not values.is_floating_point():
            quantized = True
            continue
        rounded = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        (norms if name.startswith("norm:") else linears).update(name.encode() + rounded)
    return BaseFingerprint(
        generation.name, norms.hexdigest(), None if quantized else linears.hexdigest(), quantization
    )


def _first_rows(base: Path, generation: Generation) -> Iterator[tuple[str, Tensor]]:
    prefix = generation.modules["llm"][0] + "."
    for tensor in stored_tensors(base):
        name = tensor.name
        if name.startswith(prefix) and ".layers." in name and name.endswith(".weight"):
            yield f"{'norm' if len(tensor.shape) == 1 else 'linear'}:{name}", tensor.read_first_row()


def write_fingerprint(folder: Path, fingerprint: BaseFingerprint) -> None:
    """Write a base model's fingerprint into an adapter's folder."""
    text = json.dumps(asdict(fingerprint), indent=2) + "\n"
    (folder / FINGERPRINT_FILE).write_text(text, encoding="utf-8")


def read_fingerprint(folder: Path) -> BaseFingerprint | None:
    """Read the fingerprint in an adapter's folder; None for an adapter of another tool.

    Raises:
        FingerprintError: When the file is damaged.
    """
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        return BaseFingerprint(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise FingerprintError(
            f"{path}: {error}, expected what a LoRA run writes. Copy the adapter again, or delete this file: "
            "the base model is then recognized by its name alone."
        ) from error
