"""The configuration of InternLM-XComposer2: the released config.json, and what the weights say beside it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from minicpm_tune.checkpoints.model_folder import detect_generation
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.released_format import ReleasedConfig
from minicpm_tune.checkpoints.weight_files import has_weights, tensor_names
from minicpm_tune.checkpoints.xcomposer2_geometry import position_rows, square_side

_LLM_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_ROPE_THETA = 1_000_000


class XComposer2Config(ReleasedConfig):
    """Configuration of an InternLM-XComposer2 checkpoint.

    Attributes:
        text_config: What transformers' parts of the LLM need (rotary embedding, norms, masks, cache); and
            ``plora_rank``, the rank of the partial LoRA, 256 in the released models, and ``plora_dropout``, its
            dropout in training, 0.05 in the released code.
        side: Patches on the side of the square that the vision tower sees.
        stored_positions: Rows of the position table in the files; None: as ``side`` says.
    """

    model_type = "internlmxcomposer2"

    def __init__(
        self,
        released: dict[str, Any] | None = None,
        *,
        tensors: Collection[str] = (),
        stored_positions: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(released, **kwargs)
        self._tensors = frozenset(tensors)
        self.stored_positions = stored_positions
        if self.released:
            self.side = square_side(self.released, tiles=self.tiles, positions=stored_positions)
            self.text_config = _llm_config(self.released)

    @property
    def generation(self) -> Generation:
        return detect_generation(self.released, tensors=self._tensors)

    @property
    def tiles(self) -> bool:
        """Whether images are cut into tiles (4khd)."""
        return self.generation.slicing == "tiles"

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json, and the names and shapes of the weights where there are any."""
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if has_weights(folder):
            content |= {"tensors": tensor_names(folder), "stored_positions": position_rows(folder)}
        return content, unused


def _llm_config(released: dict[str, Any]) -> Any:
    content = {key: released[key] for key in _LLM_KEYS if key in released}
    rope = {"rope_type": "default", "rope_theta": released.get("rope_theta", _ROPE_THETA)}
    config: Any = LlamaConfig(**content, rope_parameters=rope, tie_word_embeddings=False)
    config.plora_rank = released.get("plora_rank", 256)
    config.plora_dropout = released.get("plora_dropout", 0.05)
    return config
