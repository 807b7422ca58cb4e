"""The configuration of V-2 to V-4.5: the released config.json, kept word for word.

transformers' classes want sub-configurations of their own; they are derived here. What is written
back is the dictionary that was read, so that a saved checkpoint has the released keys.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig

from minicpm_tune.checkpoints.model_folder import detect_generation
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.released_format import ReleasedConfig

# Top-level keys of the released config.json that belong to the LLM.
_LLM_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "mlp_bias",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip
# Vision settings that transformers' SigLIP configuration takes over from vision_config.
_VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class MiniCPMVConfig(ReleasedConfig):
    """Configuration of a MiniCPM-V checkpoint.

    Attributes:
        text_config: What the LLM's transformers class needs.
        vision_config: What the SigLIP tower needs; None in V-2.
        query_num: Q, tokens per placeholder.
        hears: Whether the model has the audio encoder: only MiniCPM-o, and not when ``init_audio`` is false.
        audio_pool: Encoder frames that become one audio token.
    """

    model_type = "minicpmv"

    def __init__(self, released: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(released, **kwargs)
        self.query_num = self.released.get("query_num", 64)
        self.audio_pool = self.released.get("audio_pool_step", 2)
        self.hears = False
        if self.released:
            self.hears = self.generation.hearing is not None and bool(self.released.get("init_audio", True))
            self.text_config = _llm_config(self.released, self.generation)
            self.vision_config = _vision_config(self.released, self.generation)

    @property
    def generation(self) -> Generation:
        return detect_generation(self.released)


def _llm_config(released: dict[str, Any], generation: Generation) -> PreTrainedConfig:
    content = {key: released[key] for key in _LLM_KEYS if key in released}
    if generation.llm == "granite":
        # MiniCPM-2B in Granite's terms; its scale_emb is applied before the scatter, see forward().
        heads = released["num_attention_heads"]
        content |= {
            "embedding_multiplier": 1.0,
            "residual_multiplier": released["scale_depth"] / released["num_hidden_layers"] ** 0.5,
            "attention_multiplier": (released["hidden_size"] // heads) ** -0.5,
            "logits_scaling": released["hidden_size"] / released["dim_model_base"],
        }
    return CONFIG_MAPPING[generation.llm](**content)


def _vision_config(released: dict[str, Any], generation: Generation) -> SiglipVisionConfig | None:
    if generation.vision == "timm":
        return None
    content = released["vision_config"]
    return SiglipVisionConfig(
        **{key: content[key] for key in _VISION_KEYS if key in content},
        image_size=980,
        patch_size=14,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=content.get("layer_norm_eps", 1e-6),
        attention_dropout=content.get("attention_dropout", 0.0),
    )
