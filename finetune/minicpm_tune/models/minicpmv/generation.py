"""``generate`` for V-2 to V-4.5: image embeddings go into the LLM's own ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class GenerateMixin:
    """Gives the model class ``generate`` for prompts with images."""

    # What the model class brings.
    llm: Any
    embed: Any
    embedding_scale: float
    get_input_embeddings: Any

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: Any = None,
        dummy: bool = False,
        **options: Any,
    ) -> Any:
        """Generate from prompts with images.

        Args:
            input_ids: [B, T] int64, several prompts padded on the LEFT.
            attention_mask: [B, T], 1 at real tokens; needed when padded.
            pixel_values: As for ``embed``, as the three that follow.
            tgt_sizes: See ``embed``.
            image_bound: See ``embed``.
            temporal_ids: See ``embed``.
            dummy: Run the vision tower even without an image, so that no process waits for another.
            **options: For ``transformers.GenerationMixin.generate``.

        Returns:
            [B, new tokens] int64 without the prompt, or what ``return_dict_in_generate`` asks for.
        """
        embeddings = self.embed(
            input_ids, pixel_values=pixel_values, tgt_sizes=tgt_sizes, image_bound=image_bound,
            temporal_ids=temporal_ids, dummy=dummy,
        )  # fmt: skip
        with self._new_tokens_scaled():
            return self.llm.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    @contextmanager
    def _new_tokens_scaled(self) -> Iterator[None]:
        """V-2: scale the embeddings of generated tokens too; the prompt's are scaled in ``embed``."""
        if self.embedding_scale == 1:
            yield
            return
        scale = self.embedding_scale
        hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1] * scale)
        try:
            yield
        finally:
            hook.remove()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The LLM's own; adapters look for it on the whole model."""
        return self.llm.prepare_inputs_for_generation(*args, **kwargs)
