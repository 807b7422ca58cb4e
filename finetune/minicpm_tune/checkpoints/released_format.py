"""Saving models in their released form: the same keys in config.json, the same tensors, the same files beside them.

The configuration is for the families whose classes are our own; 4.6 and 4.7 have transformers'.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from minicpm_tune.checkpoints.model_folder import resolve_model_folder
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.vocabulary import write_added_tokens
from minicpm_tune.checkpoints.weight_files import copy_model_files, untouched_tensors, weight_files
from minicpm_tune.files import write_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class ReleasedConfig(PreTrainedConfig):
    """A configuration that is saved with the keys of the config.json it was read from.

    Attributes:
        released: The config.json as read.
        text_config: The LLM's configuration for transformers' classes; made by the subclass.
    """

    def __init__(self, released: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.released = copy.deepcopy(released or {})
        self.hidden_size = self.released.get("hidden_size", 0)
        self.tie_word_embeddings = bool(self.released.get("tie_word_embeddings", False))
        if self.released:
            self.architectures = self.released.get("architectures")

    @property
    def generation(self) -> Generation:
        """The model's row of ``model_generations``."""
        raise NotImplementedError

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``from_pretrained`` makes the configuration of: the content of config.json in one piece."""
        released, unused = super().get_config_dict(*args, **kwargs)
        return {"released": released}, unused

    def get_text_config(self, *_: Any, **__: Any) -> PreTrainedConfig:
        return getattr(self, "text_config", self)

    def to_dict(self) -> dict[str, Any]:
        """The released keys, with the ``torch_dtype`` and ``quantization_config`` of the weights as they are."""
        content = copy.deepcopy(self.released)
        quantization = getattr(self, "quantization_config", None)
        if quantization is None:
            content.pop("quantization_config", None)
        elif "quantization_config" not in content:
            content["quantization_config"] = quantization.to_dict()
        if getattr(self, "dtype", None) is not None:
            content["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, *_: Any, **__: Any) -> None:
        """Write config.json with the released keys only."""
        write_json(Path(save_directory) / "config.json", self.to_dict())


class ReleasedModel:
    """Loads and saves the released form; comes before ``PreTrainedModel`` among a class's bases."""

    # Provided by the model class.
    config: Any
    state_dict: Any
    all_tied_weights_keys: dict[str, str]
    # Token -> id of those that ``models.new_tokens`` added to the ones of the source folder.
    new_tokens: Mapping[str, int] = MappingProxyType({})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers. All files of a hub id are downloaded, so that a save can carry them along.

        ``minicpm_tune.load_model`` finds the class by itself, and also loads weights in 4 or 8 bit.
        """
        if pretrained_model_name_or_path is not None:
            name = str(pretrained_model_name_or_path)
            pretrained_model_name_or_path = resolve_model_folder(name, cache_dir=kwargs.get("cache_dir"))
            weight_files(pretrained_model_name_or_path)  # complete, and all of them in this folder
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Saving reverses how names were converted in loading. Under ZeRO-3 transformers also remembers conversions
        # that matched nothing, and saved 4.6's names with a prefix too many (5.23).
        conversions = getattr(model, "_weight_conversions", ())
        model._weight_conversions = [each for each in conversions if each.was_used()]
        return loaded

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model with everything else of the folder it was loaded from.

        Tensors that the class does not use (o-2.6's speech parts) are copied from there, as are tokenizer,
        processor, generation settings and *.py files.
        """
        source = Path(self.config.name_or_path) if self.config.name_or_path else None
        if is_main_process:
            state_dict = self._without_tied_copies(self.state_dict() if state_dict is None else state_dict)
            state_dict = self.tensors_to_save(state_dict)
            state_dict |= untouched_tensors(source, known=state_dict.keys())
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if is_main_process:
            folder = Path(save_directory)
            copy_model_files(source, folder)
            write_added_tokens(folder, self.new_tokens)
            if hasattr(self.config, "downsample_mode"):  # 4.6 and 4.7, whose processor must have the model's
                set_downsample_mode(folder, self.config.downsample_mode)

    def _without_tied_copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out each tensor that is tied to another, as the released files do.

        transformers recognizes ties by shared memory, which DeepSpeed's copies do not have (5.23).
        """
        tied = self.all_tied_weights_keys
        return {
            name: tensor
            for name, tensor in tensors.items()
            if tied.get(name) not in tensors or not torch.equal(tensor, tensors[tied[name]])
        }

    def tensors_to_save(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose which of the model's tensors are written: all of them, unless a class overrides this."""
        return tensors


def set_downsample_mode(folder: Path, mode: str) -> None:
    """Write the family's ``downsample_mode`` into a folder's processor settings, which go before config.json's."""
    for path in (folder / name for name in PROCESSOR_FILES if (folder / name).is_file()):
        settings = json.loads(path.read_text(encoding="utf-8"))
        named = [
            part
            for part in (settings, *settings.values())
            if isinstance(part, dict) and "downsample_mode" in part
        ]
        for part in named:
            part["downsample_mode"] = mode
        if named:
            write_json(path, settings)
