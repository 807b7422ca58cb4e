"""Generation of 4.6 and 4.7 for prompts of this project's form: transformers' own, with our image embeddings.

Letters: B prompts, T tokens, N patches of all slices, S slices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minicpm_tune.models.minicpmv46.placeholder_runs import VisualRuns
from minicpm_tune.models.minicpmv46.vision import encode_slices
from minicpm_tune.models.tower_features import VisionInput

# What transformers calls the kinds of slices, see ``VisualRuns``.
_KINDS = ((1, "image", "target_sizes"), (2, "video", "target_sizes_videos"))


class NativeGenerateMixin:
    """``generate``; stands before transformers' class in the order of bases."""

    # What the model class brings.
    config: Any
    model: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        dummy: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, for prompts of this project's form too.

        Several prompts are padded on the LEFT; leave ``position_ids`` out.

        Args:
            inputs: [B, T] int64, or ``input_ids`` by name, with ``attention_mask`` when padded.
            pixel_values: [3, 14, 14 * N] uint8 with ``tgt_sizes``; or transformers' own form.
            tgt_sizes: [S, 2] (rows, columns) in patches, of images and video frames.
            image_bound: Not needed, as in ``forward``.
            dummy: Run the vision tower even without a slice, so that no process waits for another.
            **kwargs: As for transformers.

        Raises:
            ValueError: When a prompt is padded on the right.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "generate: found a prompt padded on the right, expected padding on the left. "
                "New tokens go behind the last one, which must be a real one."
            )
        input_ids = kwargs.get("input_ids", inputs)
        kwargs |= self.own_arguments(kwargs.get("mm_token_type_ids"), input_ids=input_ids)
        if tgt_sizes is None:
            kwargs["pixel_values"] = pixel_values
        elif len(tgt_sizes) or dummy:
            kwargs |= self._encoded(input_ids, pixel_values, tgt_sizes)
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def _encoded(self, input_ids: Any, pixel_values: Any, tgt_sizes: Any) -> dict[str, Any]:
        """Image embeddings of a batch of prompts, in the form that transformers' ``generate`` takes.

        Given pixels it would encode them itself, and repeat them for every beam in the wrong order (5.23).
        """
        kinds = self.kinds_of(input_ids.cpu())
        grids = [(rows, columns) for rows, columns in torch.as_tensor(tgt_sizes).tolist()]
        runs = VisualRuns.of(kinds, grids, mode=self.config.downsample_mode)
        with torch.no_grad():
            features = encode_slices(self.model, VisionInput(pixel_values), runs.grids).split(
                list(runs.lengths)
            )
        outputs: dict[str, Any] = {}
        sizes: dict[str, Tensor] = {}
        for kind, name, size_name in _KINDS:
            own = [part for part, found in zip(features, runs.run_kinds, strict=True) if found == kind]
            if own:
                # A list, as ``forward`` wants it; transformers' annotation knows one tensor only.
                outputs[name] = BaseModelOutputWithPooling(pooler_output=own)  # type: ignore[arg-type]
                sizes[size_name] = runs.sizes_of(kind)
        return {"mm_encoder_outputs": outputs, **sizes}

    def kinds_of(self, ids: Tensor) -> Tensor:
        """[B, T] 0 text, 1 image, 2 video frame."""
        return (ids == self.config.image_token_id).long() + 2 * (ids == self.config.video_token_id).long()

    def own_arguments(
        self, mm_token_type_ids: Tensor | None, input_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Arguments of transformers' forward and generate that only one generation has."""
        return {}
