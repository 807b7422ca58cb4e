"""InternLM-XComposer2 (7b, vl-7b, 4khd-7b) as one class: CLIP tower, projector, InternLM2 with partial LoRA.

Key names, configuration and files are those of the released checkpoints; the code is ours and runs on
current transformers. The batch is the one of every other model here: an image is one slice and one
placeholder. Letters: B rows, T tokens, S images, M image tokens, N patches, C width of the tower, D width of
the LLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from minicpm_tune.batch import NewFeatures
from minicpm_tune.checkpoints.weight_files import has_weights, tensor_names
from minicpm_tune.checkpoints.xcomposer2_geometry import tile_tokens
from minicpm_tune.models.attention import keep_samples_apart, sample_arguments
from minicpm_tune.models.batch_layout import Grid, SampleLayout, VisionInput, replaced
from minicpm_tune.models.family_model import FamilyModel, LastHidden, keep_present_blocks, refuse_unknown
from minicpm_tune.models.loss import as_lm_head
from minicpm_tune.models.xcomposer2.configuration import XComposer2Config
from minicpm_tune.models.xcomposer2.internlm2 import ImageTokens, InternLM2Model, keep_partial
from minicpm_tune.models.xcomposer2.vision import (
    CLIPEmbeddings,
    VisionTower,
    check_bounds,
    clip_config,
    encode_dummy,
    encode_images,
    resized_positions,
)

# A released checkpoint may lack the tower's last norm, which nothing uses.
_UNUSED_NORM = "vit.vision_tower.vision_model.post_layernorm."
_UNKNOWN = "XComposer2.forward does not know the arguments"


class XComposer2(FamilyModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model of internlm-xcomposer2-7b, -vl-7b and -4khd-7b.

    Args:
        config: Made by ``XComposer2Config.from_pretrained``, or from the content of a released config.json.
    """

    config_class = XComposer2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    _input_embed_layer = "tok_embeddings"
    supports_gradient_checkpointing = True
    # transformers declares the three ClassVar below per instance, and reads them from the class all the same.
    _keys_to_ignore_on_load_missing: ClassVar = [r"\.post_layernorm\."]  # type: ignore[misc]
    # Buffers that transformers 4 stored, and that are computed here.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"rotary_emb\.", r"\.position_ids$"]  # type: ignore[misc]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["InternLM2Layer", "CLIPEncoderLayer"]  # type: ignore[misc]

    def __init__(self, config: XComposer2Config):
        super().__init__(config)
        attention = str(config._attn_implementation)
        config.text_config._attn_implementation = attention
        keep_samples_apart(config.text_config)
        self.model = InternLM2Model(config.text_config)
        self.output = as_lm_head(nn.Linear(config.hidden_size, config.text_config.vocab_size, bias=False))
        vision = clip_config(config.released.get("vision_config") or {}, attention=attention)
        self.vit = VisionTower(vision, config.stored_positions or 1 + config.side**2)
        width = vision.hidden_size * (4 if config.tiles else 1)
        self.vision_proj = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        if config.tiles:
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.post_init()
        keep_present_blocks(self)
        # transformers reads its old meaning, the longest text generated, into the checkpoint's longest row.
        self.generation_config.max_length = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; a position table of another size than ``img_size`` asks for is then resampled."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._fit_positions()
        return loaded

    def _fit_positions(self) -> None:
        table = self.vit.tower.embeddings.position_embedding
        rows = 1 + self.config.side**2
        stored = getattr(table.weight, "ds_shape", table.weight.shape)[0]
        if stored == rows:
            return
        if hasattr(table.weight, "ds_id"):
            raise ValueError(
                f"vision tower: {stored} positions are stored and img_size asks for {rows}; "
                "under ZeRO-3 they can't be resampled. Load and save the model once without DeepSpeed."
            )
        table.weight = nn.Parameter(resized_positions(table.weight.data, self.config.side))
        table.num_embeddings = rows

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPEmbeddings):
            width = module.class_embedding.shape[0]
            initialization.normal_(module.class_embedding, std=width**-0.5)
        elif module is self and self.config.tiles:
            initialization.normal_(self.plora_glb_GN, std=0.02)
            initialization.normal_(self.plora_sub_GN, std=0.02)

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """As torch's; a projection's partial LoRA stays where the projection is replaced (quantized)."""
        keep_partial(self.get_submodule(target), module)
        super().set_submodule(target, module, strict)

    def slice_grids(self, count: int) -> list[Grid]:
        """(rows, columns) in patches of an image; 4khd's as ``count`` - 1 tiles in a row, which need fewest tokens."""
        return [(self.config.side, self.config.side * (max(count - 1, 1) if self.config.tiles else 1))]

    def slice_tokens(self, grid: Grid) -> int:
        """Placeholder tokens of an image of ``grid`` patches."""
        return tile_tokens(grid, self.config.side) if self.config.tiles else grid[0] * grid[1]

    def embed(
        self, input_ids: Tensor, vision: VisionInput, *, dummy: bool = False
    ) -> tuple[Tensor, ImageTokens | None, NewFeatures | None]:
        """Token embeddings with the placeholders replaced by image embeddings.

        Args:
            input_ids: [B, T] int64.
            vision: What there is of the images.
            dummy: Run vision tower, projector and partial LoRA even without an image, so that every
                rank takes part in the same collectives and every trained parameter gets a gradient.

        Returns:
            [B, T, D], the places of the image tokens, and the vision tower's features to be cached.

        Raises:
            ValueError: When images, placeholders and tokens do not fit each other.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if vision.grids:
            check_bounds(vision, side=self.config.side, tiles=self.config.tiles)
            features, new = encode_images(self, vision)
            places = vision.places(input_ids.shape[1]).to(embeddings.device, non_blocking=True)
            return replaced(embeddings, places, features), ImageTokens(places), new
        if not dummy:
            return embeddings, None, None
        place = torch.zeros(1, dtype=torch.int64, device=embeddings.device)
        return embeddings + encode_dummy(self).to(embeddings.dtype), ImageTokens(place, real=False), None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_tokens: ImageTokens | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``FamilyModel``'s; with a cache, which only ``generate`` gives, the logits of the next token."""
        if past_key_values is None:
            assert input_ids is not None, "a batch has input_ids"
            return super().forward(input_ids, attention_mask, position_ids, labels=labels, **kwargs)
        refuse_unknown(kwargs, _UNKNOWN)
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.model(
            embeddings, image=image_tokens, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values,
        )  # fmt: skip
        return CausalLMOutputWithPast(logits=self.output(hidden[:, -1:]), past_key_values=past_key_values)

    def last_hidden(
        self, input_ids: Tensor, host: Tensor, vision: VisionInput, *, trains: bool, **own: Any
    ) -> LastHidden:
        """As ``FamilyModel``'s."""
        refuse_unknown(own, _UNKNOWN)
        embeddings, image, new = self.embed(input_ids, vision, dummy=trains)
        samples = SampleLayout.of_batch(host, device=input_ids.device)
        if image is not None:
            image = ImageTokens(samples.rank(image.places), image.real)
        arguments = sample_arguments(self.model.config, samples)
        hidden = self.model(
            samples.take(embeddings)[None], image=image, position_ids=samples.positions[None], **arguments
        )
        return LastHidden(samples.put(hidden[0]), new, samples)

    def new_tokens_for(self, input_ids: Tensor, vision: VisionInput, *, dummy: bool, **options: Any) -> Any:
        """transformers' ``generate``; image tokens are known as such in the first step, which reads the prompt."""
        embeddings, image, _ = self.embed(input_ids, vision, dummy=dummy)
        is_image = None
        if image is not None:
            # A mask, not places: beams repeat what is [B, T].
            is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            if image.real:
                is_image.view(-1)[image.places] = True
        return super(FamilyModel, self).generate(  # type: ignore[misc]
            inputs_embeds=embeddings, image_mask=is_image, **options
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # type: ignore[misc]
            {k: v for k, v in model_kwargs.items() if k != "image_mask"}
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, with the image tokens in the first step, which reads the prompt."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if image_mask is not None and inputs.get("inputs_embeds") is not None:
            places = image_mask.flatten().nonzero()[:, 0]
            real = bool(places.numel())
            inputs["image_tokens"] = ImageTokens(places if real else places.new_zeros(1), real)
        return inputs

    def tensors_to_save(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them; but for the tower's unused norm where the source checkpoint lacks it."""
        source = Path(self.config.name_or_path) if self.config.name_or_path else None
        if source is None or not has_weights(source):
            return tensors
        stored = tensor_names(source)
        return {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(_UNUSED_NORM) or name in stored
        }
