"""Adapter folders: what they say of their base model, and loading them only onto that one."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.lora.base_fingerprint import BaseRecord, read_base_record, record_of
from minicpm_tune.lora.build import AdapterError, load_adapter
from minicpm_tune.lora.legacy_format import LEGACY_NAME, load_legacy_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        path: Its folder.
        config: Its adapter_config.json.
        record: What was kept of its base model; None for an adapter of another tool.
    """

    path: Path
    config: dict[str, Any]
    record: BaseRecord | None

    @property
    def base_name(self) -> str:
        """The base model's path or hub id, as the adapter has it; may be empty."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def is_legacy(self) -> bool:
        """Whether the early official scripts wrote it, with a file of its own for what trained in full."""
        return (self.path / LEGACY_NAME).is_file()


def read_adapter_folder(name: str | Path, *, flag: str = "--adapter") -> AdapterFolder:
    """Look at an adapter's folder.

    Args:
        name: The folder.
        flag: How the command line calls it.

    Raises:
        AdapterError: When it holds no adapter, or part of one.
    """
    path = Path(name).expanduser()
    file = path / "adapter_config.json"
    if not file.is_file():
        raise AdapterError(
            f"{flag} {name}: no adapter_config.json there, expected the folder that a LoRA run wrote. "
            "Check the path."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{file}: not readable as JSON ({error}). Copy the adapter again.") from error
    if not any((path / weights).is_file() for weights in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise AdapterError(
            f"{path}: it has an adapter_config.json, but no {SAFETENSORS_WEIGHTS_NAME}. Copy the whole folder."
        )
    return AdapterFolder(path.resolve(), config, read_base_record(path))


def check_base(
    adapter: AdapterFolder, base: Path, generation: Generation, *, allow_other_base: bool = False
) -> None:
    """Refuse to put an adapter on a model that it was not trained on.

    An adapter of this project is compared by the weights themselves. Another is compared by the name
    of its base, and by weights where that base is at hand.

    Args:
        adapter: The adapter.
        base: The folder of the model it is to be put on.
        generation: That model's generation.
        allow_other_base: Go on where the weights differ or can't be compared; shapes must fit all the same.

    Raises:
        AdapterError: When it belongs to another model, or nothing tells that it belongs to this one.
    """
    if adapter.record is not None and adapter.record.generation != generation.name:
        raise AdapterError(
            f"{adapter.path}: an adapter of generation {adapter.record.generation}, but {base} is "
            f"{generation.title}. Give the base model it was trained on{_said(adapter)}."
        )
    problem = None if allow_other_base else _doubt(adapter, base, generation)
    if problem:
        raise AdapterError(
            f"{adapter.path}: {problem} Give the base model it was trained on{_said(adapter)}; or add "
            "--allow_other_base true if you know that the two belong together."
        )


def _said(adapter: AdapterFolder) -> str:
    return f" ({adapter.base_name})" if adapter.base_name else ""


def _doubt(adapter: AdapterFolder, base: Path, generation: Generation) -> str | None:
    """Why the adapter may belong to another model; None when it belongs to this one."""
    said = adapter.base_name
    if adapter.record is not None:
        if adapter.record.same_weights(record_of(base, generation)):
            return None
        return f"the weights of {base} are not those that this adapter was trained on."
    if not said:
        logger.warning("%s names no base model; only the shapes tell that it fits.", adapter.path)
        return None
    folder = Path(said).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        same = folder.resolve() == base.resolve() or record_of(folder, generation).same_weights(
            record_of(base, generation)
        )
        return None if same else f"it was trained on {said}, whose weights are not those of {base}."
    if folder.name.lower() == base.name.lower() or _hub_name(base) == folder.name.lower():
        return None
    return f"it was trained on {said}, which is not here to compare with {base}."


def _hub_name(base: Path) -> str:
    """The repository's name of a folder in the hub's cache (models--owner--name/snapshots/commit)."""
    repository = base.parent.parent.name
    return repository.rpartition("--")[2].lower() if repository.startswith("models--") else ""


def load_onto(model: PreTrainedModel, adapter: AdapterFolder) -> PeftModel:
    """Put an adapter on its base model, for inference or merging.

    Args:
        model: The base model; see ``check_base``.
        adapter: The adapter, of any age.

    Returns:
        The wrapped model, in eval mode.

    Raises:
        AdapterError: When its tensors are not exactly those that the model has places for.
    """
    wrapped = load_checked(model, adapter, trainable=False)
    if adapter.is_legacy:
        load_legacy_tensors(wrapped, adapter.path / LEGACY_NAME)
    return wrapped.eval()


def load_checked(model: PreTrainedModel, adapter: AdapterFolder, *, trainable: bool) -> PeftModel:
    """Put an adapter on its base model, and see that every tensor of the file found its place.

    Raises:
        AdapterError: When its tensors are not exactly those that the model has places for.
    """
    wrapped = load_adapter(model, adapter.path, trainable=trainable)
    stored = set(load_peft_weights(str(adapter.path), device="cpu"))
    known = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    unknown, missing = sorted(stored - known), sorted(known - stored)
    if unknown or missing:
        raise AdapterError(
            f"{adapter.path}: {len(unknown)} tensors have no place in this model and {len(missing)} are "
            f"missing (the first is {[*unknown, *missing][0]}), expected an adapter of this model. Give the "
            "base model it was trained on."
        )
    return wrapped
