"""``generate`` for InternLM-XComposer2: the prompt's images are encoded once, and known as images in the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minicpm_tune.models.xcomposer2.internlm2 import ImageTokens


class XComposer2GenerateMixin:
    """Stands in front of transformers' classes in the order of bases."""

    embed: Any  # the model class brings it

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        dummy: bool = False,
        **options: Any,
    ) -> Any:
        """Generate from prompts with images.

        Args:
            input_ids: [B, T] int64, several prompts padded on the LEFT.
            attention_mask: [B, T], 1 at real tokens; needed when padded.
            pixel_values: As for ``embed``, as the two that follow.
            tgt_sizes: See ``embed``.
            image_bound: See ``embed``.
            dummy: Run the vision tower even without an image, so that no process waits for another.
            **options: For ``transformers.GenerationMixin.generate``.

        Returns:
            [B, new tokens] int64 without the prompt, or what ``return_dict_in_generate`` asks for.
        """
        embeddings, image = self.embed(
            input_ids, pixel_values=pixel_values, tgt_sizes=tgt_sizes, image_bound=image_bound, dummy=dummy
        )
        is_image = None
        if image is not None:
            is_image = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            if image.real:
                is_image.view(-1)[image.places] = True
        # A mask, not places: beams repeat what is [B, T].
        return super().generate(  # type: ignore[misc]
            inputs_embeds=embeddings, attention_mask=attention_mask, image_mask=is_image, **options
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # type: ignore[misc]
            {k: v for k, v in model_kwargs.items() if k != "image_mask"}
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
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
