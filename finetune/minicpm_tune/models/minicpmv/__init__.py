"""MiniCPM-V 2.0 to 4.5, and what MiniCPM-o 2.6 sees and reads, as one class that holds released checkpoints.

modeling         the class: batch -> embeddings -> LLM -> loss; generation
configuration    the released config.json, and what transformers' classes need of it
vision           the two SigLIP towers (V-2's; the one of 2.5 and later), and the resampler
audio            the encoder half of Whisper (MiniCPM-o)
"""

from typing import Any

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.modeling import MiniCPMV

__all__ = ["MiniCPMV", "MiniCPMVConfig", "model_class"]


def model_class(generation: Generation) -> Any:
    """The model class of a generation of this family: the same for all."""
    return MiniCPMV
