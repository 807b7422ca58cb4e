"""Adapter folders: what they hold, and whether they belong to a base model. Needs no peft."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.lora.base_fingerprint import BaseFingerprint, fingerprint_of, read_fingerprint

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# The early official scripts kept the modules trained in full in a file of their own.
LEGACY_FILE = "vpm_resampler_embedtokens.pt"


class AdapterError(UserError):
    """An adapter that can't be built, or does not fit the model."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        path: Its folder.
        config: Its adapter_config.json.
        fingerprint: That of its base model; None for an adapter of another tool.
    """

    path: Path
    config: dict[str, Any]
    fingerprint: BaseFingerprint | None

    @property
    def base_name(self) -> str:
        """The base model's path or hub id in adapter_config.json; may be empty."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def new_tokens(self) -> dict[str, int]:
        """Token -> id of those that its training added to the base."""
        return self.fingerprint.new_tokens if self.fingerprint else {}

    @property
    def downsample_mode(self) -> str | None:
        """That of its training, for 4.6 and 4.7; None where it is not known."""
        return self.fingerprint.downsample_mode if self.fingerprint else None

    @property
    def weights(self) -> Path:
        """The file with its weights."""
        return next(self.path / name for name in WEIGHT_FILES if (self.path / name).is_file())

    @property
    def is_legacy(self) -> bool:
        """Whether the early official scripts wrote it."""
        return (self.path / LEGACY_FILE).is_file()


def read_adapter_folder(name: str | Path, *, flag: str = "--adapter") -> AdapterFolder:
    """Look at an adapter's folder.

    Args:
        name: The folder.
        flag: The command-line flag that names it.

    Raises:
        AdapterError: When it holds no adapter, or only part of one.
    """
    path = Path(name).expanduser()
    file = path / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            f"{flag} {name}: found no {CONFIG_FILE}, expected the folder that a LoRA run wrote. Check the path."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file}: not readable as JSON ({error}). Copy the adapter again.") from error
    if not any((path / weights).is_file() for weights in WEIGHT_FILES):
        raise AdapterError(
            f"{path}: found {CONFIG_FILE} but no {WEIGHT_FILES[0]}, expected both. Copy the whole folder."
        )
    return AdapterFolder(path.resolve(), config, read_fingerprint(path))


def check_base(
    adapter: AdapterFolder, base: Path, generation: Generation, *, allow_other_base: bool = False
) -> None:
    """Refuse to put an adapter on a model that it was not trained on.

    An adapter of this project is compared by the weights themselves. Another one is compared by the name
    of its base, and by weights where that base is available.

    Args:
        adapter: The adapter.
        base: The folder of the model to put it on.
        generation: That model's generation.
        allow_other_base: Accept other weights of the same shapes.

    Raises:
        AdapterError: When it belongs to another model, or nothing shows that it belongs to this one.
    """
    named = f" ({adapter.base_name})" if adapter.base_name else ""
    if adapter.fingerprint is not None and adapter.fingerprint.generation != generation.name:
        raise AdapterError(
            f"{adapter.path}: an adapter of generation {adapter.fingerprint.generation}, but {base} is "
            f"{generation.title}. Give the base model it was trained on{named}."
        )
    problem = None if allow_other_base else _mismatch(adapter, base, generation)
    if problem:
        raise AdapterError(
            f"{adapter.path}: {problem} Give the base model it was trained on{named}. If you know that the two "
            "belong together, add --allow_other_base true."
        )


def _mismatch(adapter: AdapterFolder, base: Path, generation: Generation) -> str | None:
    """Why the adapter may belong to another model; None when it belongs to this one."""
    named = adapter.base_name
    if adapter.fingerprint is not None:
        if adapter.fingerprint.has_same_weights(fingerprint_of(base, generation)):
            return None
        return f"it was not trained on the weights of {base}."
    if not named:
        logger.warning("%s names no base model; only the shapes show that it fits.", adapter.path)
        return None
    folder = Path(named).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        same = folder.resolve() == base.resolve() or fingerprint_of(folder, generation).has_same_weights(
            fingerprint_of(base, generation)
        )
        return None if same else f"it was trained on {named}, whose weights differ from those of {base}."
    if folder.name.lower() in (base.name.lower(), _hub_name(base)):
        return None
    return f"it was trained on {named}, which is not available to compare with {base}."


def _hub_name(base: Path) -> str:
    """The repository's name of a folder in the hub's cache (models--owner--name/snapshots/commit)."""
    repository = base.parent.parent.name
    return repository.rpartition("--")[2].lower() if repository.startswith("models--") else ""
