"""What the model classes of all families have in common: one training forward, one form of ``generate``, and ``chat``.

Letters: B rows, T tokens, N patches of all slices, S slices, P placeholders, D width of the LLM, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minicpm_tune.batch import IGNORE_INDEX, NewFeatures, SliceSources
from minicpm_tune.checkpoints.released_format import ReleasedModel
from minicpm_tune.models.batch_layout import FULL_SLICE, Grid, SampleLayout, VisionInput
from minicpm_tune.models.loss import MiniCPMVOutput, supervised_loss


class LastHidden(NamedTuple):
    """What a family's LLM gave for a batch.

    Attributes:
        states: [B, T, D] last hidden states, zero at the padding.
        new_features: The vision tower's features that are to be cached.
        samples: The samples of the batch.
        router_logits: Every layer's [tokens of all samples, experts]; empty where nothing asks for them.
    """

    states: Tensor
    new_features: NewFeatures | None
    samples: SampleLayout
    router_logits: tuple[Tensor, ...] = ()


class FamilyModel(ReleasedModel):
    """What is added to transformers' classes; comes before them among a class's bases.

    Attributes:
        processing: The checkpoint's ``Processing``, once ``chat`` has loaded it.
    """

    accepts_loss_kwargs = True
    processing: Any = None
    # Provided by the model class.
    get_input_embeddings: Any
    get_output_embeddings: Any
    new_tokens_for: Any  # (input_ids, vision, *, dummy, **options) -> what ``generate`` returns

    def slice_grids(self, count: int) -> list[Grid]:
        """(rows, columns) in patches of a large image that is cut into ``count`` slices, overview included."""
        return [FULL_SLICE] * count

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: Any = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        supervised: Any = None,
        loss_weights: Any = None,
        on_cpu: Any = None,
        slice_sources: SliceSources | None = None,
        known_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MiniCPMVOutput:
        """Give the loss (with labels) or the logits (without).

        Rows are padded on the right. The LLM runs on the real tokens of all rows as one row, see ``SampleLayout``.
        With labels the vision tower runs even where the batch has no image, so that every rank takes part in the
        same collectives and every trained parameter gets a gradient.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 1 at real tokens; None: there is no padding.
            position_ids: [B, T], restarting at 0 for each packed sample; None: a row is a sample.
            pixel_values: [3, 14, 14 * N] uint8, patches of all slices in the order of their tokens.
            tgt_sizes: [S, 2] (rows, columns) in patches; tensor or array, best on the CPU.
            image_bound: [P, 3] (row, start, end) of each run of placeholder tokens; 4.6 and 4.7 need none.
            temporal_ids: [S, 2] (placeholder, time or -1); V-4.5 alone takes more than None.
            labels: [B, T] int64, token id or -100; not shifted.
            num_items_in_batch: What the summed loss is divided by: the supervised tokens of the whole optimizer step,
                or the sum of their weights; by default this batch's.
            supervised: See ``places`` of ``loss.supervised_loss``.
            loss_weights: See ``weights`` of ``loss.supervised_loss``.
            on_cpu: The first three arguments once more, [2 or 3, B, T] numpy int64. Without it they are fetched, and
                the program waits for the device.
            slice_sources: Which slices' features are cached.
            known_features: Those features.
            **kwargs: A family's own keys of ``batch.Batch``; others must be None or False (adapters pass their
                library's usual arguments).

        Returns:
            A ``MiniCPMVOutput``.

        Raises:
            ValueError: When slices, placeholders and tokens do not fit each other.
            TypeError: When an argument is unknown.
        """
        if on_cpu is None:
            host = _fetched(input_ids, attention_mask, position_ids)
        else:
            host = torch.from_numpy(on_cpu)
        vision = VisionInput(
            pixel_values, tgt_sizes, image_bound, temporal_ids, slice_sources, known_features
        )
        found = self.last_hidden(input_ids, host, vision, trains=labels is not None, **kwargs)
        head = self.get_output_embeddings()
        if labels is None:
            return MiniCPMVOutput(logits=head(found.states))
        if position_ids is not None and supervised is None:
            # A sample's first token has nothing in front of it to be predicted from.
            labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)
        loss = supervised_loss(head, found.states, labels, supervised, loss_weights)
        balance = self.balance_loss(found, labels, supervised, loss_weights)
        return MiniCPMVOutput.of(loss, num_items_in_batch, found.new_features, balance=balance)

    def last_hidden(
        self, input_ids: Tensor, host: Tensor, vision: VisionInput, *, trains: bool, **own: Any
    ) -> LastHidden:
        """Run tower and LLM on a batch; every sample as if it were alone.

        Args:
            input_ids: [B, T] int64.
            host: [2 or 3, B, T] ids, mask and positions on the CPU.
            vision: What there is of the slices.
            trains: Whether there are labels.
            **own: The family's own arguments, and unknown ones, which ``refuse_unknown`` sees to.
        """
        raise NotImplementedError

    def balance_loss(
        self, found: LastHidden, labels: Tensor, supervised: Any, loss_weights: Any
    ) -> Tensor | None:
        """What ``loss`` holds beside the cross entropies, see ``MiniCPMVOutput.of``."""
        return None

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
        """Generate from prompts with images, which are encoded once.

        Args:
            input_ids: [B, T] int64, several prompts padded on the LEFT.
            attention_mask: [B, T], 1 at real tokens; needed when padded.
            pixel_values: As in ``forward``, as the three that follow.
            tgt_sizes: See ``forward``.
            image_bound: See ``forward``.
            temporal_ids: See ``forward``.
            dummy: Run the vision tower even without an image, so that no process waits for another.
            **options: The family's own keys of ``batch.Batch``, and what transformers' ``generate`` takes.

        Returns:
            [B, new tokens] int64 without the prompt, or what ``return_dict_in_generate`` asks for.
        """
        vision = VisionInput(pixel_values, tgt_sizes, image_bound, temporal_ids)
        return self.new_tokens_for(input_ids, vision, dummy=dummy, attention_mask=attention_mask, **options)

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a conversation; see ``minicpm_tune.answering.chat.chat`` for the arguments."""
        # The one import of a higher room: users call ``chat`` on the model, but prompts are the data side's.
        from minicpm_tune.answering.chat import chat

        return chat(self, *args, **kwargs)


def _fetched(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Fetch ids, mask and positions in one copy: every further wait for the device costs time."""
    parts = [input_ids, torch.ones_like(input_ids) if mask is None else mask.to(input_ids)]
    parts += [] if positions is None else [positions.to(input_ids)]
    return torch.stack(parts).cpu()


def refuse_unknown(arguments: dict[str, Any], message: str) -> None:
    """Refuse what a forward does not know, but for None and False.

    Raises:
        TypeError: With ``message`` and the names.
    """
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    unknown = [name for name in given if name not in ("return_dict", "use_cache")]
    if unknown:
        raise TypeError(f"{message} {', '.join(unknown)}.")


def keep_present_blocks(model: Any) -> None:
    """Let a model name only blocks that it has as its units (``_no_split_modules``).

    transformers' classes list those of all their variants. FSDP refuses a name without a module (accelerate 1.15).
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = present & set(model._no_split_modules or ())
