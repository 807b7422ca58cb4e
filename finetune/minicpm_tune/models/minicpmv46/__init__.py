"""MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR: transformers' own classes, behind this project's batches.

modeling     the two classes: training forward, generation, saving
vision       placeholders of slices; tower and merger, run once on all slices of a batch
delta_net    the recurrent layer, with packed samples kept apart
"""

from typing import Any

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.minicpmv46 import modeling

_CLASSES = {
    "v4_6": modeling.MiniCPMV4_6ForConditionalGeneration,
    "v4_6_thinking": modeling.MiniCPMV4_6ForConditionalGeneration,
    "v4_7": modeling.MiniCPMV4_7ForConditionalGeneration,
    "v4_7_moe": modeling.MiniCPMV4_7ForConditionalGeneration,
    "ocr_1": modeling.MiniCPMOcrForConditionalGeneration,
}


def model_class(generation: Generation) -> Any:
    """The model class of a generation of this family."""
    return _CLASSES[generation.name]
