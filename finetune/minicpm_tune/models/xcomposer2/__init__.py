"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b) as one class that holds released checkpoints.

modeling         the class: batch -> embeddings -> LLM -> loss; generation
configuration    the released config.json, and what the weight files say beside it
vision           images through tower (CLIP ViT-L/14) and projector; 4khd's tiles
internlm2        the LLM with its partial LoRA
"""

from typing import Any

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.xcomposer2.configuration import XComposer2Config
from minicpm_tune.models.xcomposer2.modeling import XComposer2

__all__ = ["XComposer2", "XComposer2Config", "model_class"]


def model_class(generation: Generation) -> Any:
    """The model class of a generation of this family: the same for all."""
    return XComposer2
