"""The vision tower of InternLM-XComposer2: CLIP ViT-L/14, patches in, one feature vector per patch out.

transformers 5 has another module tree for CLIP; the modules here carry the released key names and use its
encoder layers. Letters: S crops that are encoded (whole images, or tiles), L patches of one, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from minicpm_tune.models.slices import PATCH, PatchEmbedding

# openai/clip-vit-large-patch14-336. The released config.json has no sizes of the tower; a small
# checkpoint says its own in ``vision_config``.
CLIP_SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
# What CLIP was trained to see, per channel, of pixel values from 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def clip_config(sizes: dict, *, attention: str) -> CLIPVisionConfig:
    """The configuration of the encoder layers.

    Args:
        sizes: ``vision_config`` of config.json; what it lacks is CLIP ViT-L/14's.
        attention: transformers' attention implementation of the whole model.
    """
    config = CLIPVisionConfig(
        **(CLIP_SIZES | {key: sizes[key] for key in CLIP_SIZES if key in sizes}),
        patch_size=PATCH, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "sdpa" if "flash" in attention else attention
    return config


class CLIPEmbeddings(nn.Module):
    """The stem: patches, the class token in front of them, learned positions."""

    def __init__(self, width: int, positions: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = PatchEmbedding(3, width, PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[S, L, 588] -> [S, 1 + L, C]."""
        embedded = self.patch_embedding(patches)
        first = self.class_embedding.to(embedded.dtype).expand(embedded.shape[0], 1, -1)
        tokens = torch.cat([first, embedded], dim=1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))


class CLIPTower(nn.Module):
    """The tower; its features are the last hidden state, without the class token and without the last norm.

    Args:
        config: Sizes of the encoder.
        positions: Rows of the position table: the class token's and one per patch.
    """

    def __init__(self, config: CLIPVisionConfig, positions: int):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config.hidden_size, positions)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's spelling
        # transformers' annotation names the configuration of the whole CLIP; its own tower gives it this one.
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        """Encode crops that have the same number of patches.

        Args:
            patches: [S, L, 588] normalized pixels in the tower's dtype, patches row-major. Fewer patches than
                the position table has rows take its first ones (the dummy of a batch without images).

        Returns:
            [S, L, C].
        """
        hidden = self.pre_layrnorm(self.embeddings(patches))
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        # The features don't go through the last norm; times zero its weights have a gradient all the same.
        return hidden[:, 1:] + self.post_layernorm(hidden[:, :1]) * 0


class VisionTower(nn.Module):
    """The two wrappers that the released key names come from: ``vit.vision_tower.vision_model``."""

    def __init__(self, config: CLIPVisionConfig, positions: int):
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = CLIPTower(config, positions)

    @property
    def tower(self) -> CLIPTower:
        """The tower itself."""
        return self.vision_tower.vision_model  # type: ignore[return-value]

    def forward(self, patches: Tensor) -> Tensor:
        """As ``CLIPTower.forward``."""
        return self.tower(patches)


def normalized(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [S, 3, ...] -> CLIP's values, in ``dtype``; computed in fp32."""
    shape = (1, 3, *[1] * (pixels.dim() - 2))
    mean, deviation = (
        torch.tensor(values).view(shape).to(pixels.device, non_blocking=True) for values in (MEAN, DEVIATION)
    )
    return ((pixels.to(torch.float32) / 255 - mean) / deviation).to(dtype)


def resized_positions(table: Tensor, side: int) -> Tensor:
    """Resample a position table for another number of patches.

    The class token's row is kept; the others are an image of side x side, resized bicubically. A table that
    fits already is given back as it is.

    Args:
        table: [1 + n * n, C].
        side: Patches on the side of the new image.

    Returns:
        [1 + side * side, C], in the dtype of ``table``.
    """
    if table.shape[0] == 1 + side * side:
        return table
    old = round((table.shape[0] - 1) ** 0.5)
    grid = table[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])
