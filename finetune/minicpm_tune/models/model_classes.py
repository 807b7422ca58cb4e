"""Which class and which configuration a checkpoint needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from minicpm_tune.checkpoints.model_generations import Generation


def class_and_config(folder: Path, generation: Generation) -> tuple[Any, Any]:
    """Give the model class of a generation, and the configuration of a folder for it.

    Classes are imported when they are asked for: each family brings its own part of transformers.

    Args:
        folder: The checkpoint.
        generation: Its generation.
    """
    if generation.native:
        from minicpm_tune.models.minicpmv46.modeling import native_class

        return native_class(generation), AutoConfig.from_pretrained(folder)
    if generation.family == "xcomposer2":
        from minicpm_tune.models.xcomposer2.configuration import XComposer2Config
        from minicpm_tune.models.xcomposer2.modeling import XComposer2

        return XComposer2, XComposer2Config.from_folder(folder)
    from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
    from minicpm_tune.models.minicpmv.modeling import MiniCPMV

    return MiniCPMV, MiniCPMVConfig.from_folder(folder)
