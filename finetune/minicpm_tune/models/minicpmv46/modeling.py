"""MiniCPM-V 4.6 and 4.7 and MiniCPM-OCR: transformers' own classes behind the batch form of this project.

Loading, saving, key names, configuration and generation stay transformers' own; the classes here carry
the same names, so that what they save is what transformers saves. What is added is the training
forward: one vision run per batch, packed rows, and a loss that never makes all logits.

``downsample_mode`` (config.json) decides how many patches become one token. ``16x``: the tower's inner
merger joins 2 x 2 patches behind layer ``insert_layer_id``, the merger in front of the LLM 2 x 2 of
those. ``4x``: the inner merger is skipped, so an image has four times as many tokens and the inner
merger's weights are not used. The data side counts placeholders by the same field.

Letters: B rows, T tokens, N patches of all slices, S slices, D width of the LLM, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpm_ocr import modeling_minicpm_ocr
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6
from transformers.models.minicpmv4_7 import modeling_minicpmv4_7

from minicpm_tune.batch import IGNORE_INDEX, NewFeatures, SliceSources
from minicpm_tune.checkpoints.model_generations import DOWNSAMPLING
from minicpm_tune.checkpoints.released_format import ReleasedModel
from minicpm_tune.models.attention import keep_samples_apart, sample_arguments
from minicpm_tune.models.batch_layout import FULL_SLICE, Grid, VisionInput
from minicpm_tune.models.chat_interface import ChatMixin
from minicpm_tune.models.loading import keep_present_blocks
from minicpm_tune.models.loss import (
    MiniCPMVOutput,
    as_lm_head,
    balance_losses,
    sample_weights,
    supervised_loss,
)
from minicpm_tune.models.minicpmv46.delta_net import SpreadLayout, use_packed_delta_nets
from minicpm_tune.models.minicpmv46.vision import PlaceholderRuns, encode_slices, use_slice_modules

# What transformers calls the kinds of slices, see ``PlaceholderRuns``.
_KINDS = ((1, "image", "target_sizes"), (2, "video", "target_sizes_videos"))


class _LlmOutput(NamedTuple):
    """What the LLM gave for a batch.

    Attributes:
        hidden: [B, T, D] last hidden states.
        samples: The samples of the batch.
        router_logits: Every layer's [tokens of all samples, experts]; empty where nothing asks for them.
        new_features: The vision tower's features that are to be cached.
    """

    hidden: Tensor
    samples: SpreadLayout
    router_logits: tuple[Tensor, ...]
    new_features: NewFeatures | None


class _TrainingForward(ReleasedModel, ChatMixin):
    """What is added to transformers' classes; stands before transformers' class in the order of bases."""

    accepts_loss_kwargs = True
    # Made by transformers' class.
    config: Any
    model: Any
    lm_head: Any
    get_input_embeddings: Any

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head = as_lm_head(self.lm_head)
        use_slice_modules(self.model)
        use_packed_delta_nets(self.model.language_model)
        keep_samples_apart(self.config.text_config)
        keep_present_blocks(self)

    def slice_grids(self, count: int) -> list[Grid]:
        """(rows, columns) in patches of a large image that is cut into ``count`` slices, overview included."""
        return [FULL_SLICE] * count

    def slice_tokens(self, grid: Grid) -> int:
        """Placeholder tokens of a slice of ``grid`` patches."""
        return grid[0] * grid[1] // DOWNSAMPLING[self.config.downsample_mode].patches_per_token

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        mm_token_type_ids: Tensor | None = None,
        supervised: Any = None,
        loss_weights: Any = None,
        on_cpu: Any = None,
        slice_sources: SliceSources | None = None,
        known_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Give the loss (with labels) or the logits (without) of a batch of this project's form.

        Without ``labels`` and ``tgt_sizes`` it is transformers' own forward (``generate`` calls it so).

        Args:
            input_ids: [B, T] int64, padded on the right.
            attention_mask: [B, T], 1 at real tokens; None: there is no padding.
            position_ids: [B, T], restarting at 0 for each packed sample; None: a row is a sample.
            pixel_values: [3, 14, 14 * N] uint8, patches of all slices in the order of their tokens.
            tgt_sizes: [S, 2] (rows, columns) in patches; best on the CPU.
            image_bound: Not needed: the placeholder tokens themselves say where they are.
            temporal_ids: Must be None; these generations have one placeholder per frame.
            labels: [B, T] int64, token id or -100; not shifted.
            num_items_in_batch: What the summed loss is divided by: the supervised tokens of the whole optimizer step,
                or the sum of their weights; by default this batch's.
            mm_token_type_ids: Not needed here: the token ids tell text, image and video.
            supervised: See ``places`` of ``loss.supervised_loss``.
            loss_weights: See ``weights`` of ``loss.supervised_loss``.
            on_cpu: [2 or 3, B, T] numpy int64: ``input_ids``, ``attention_mask`` and, with packing,
                ``position_ids`` once more. Without it they are fetched, and the program waits for the device.
            slice_sources: Which slices' features are cached.
            known_features: Those features.
            **kwargs: transformers' own arguments; here they must be None or False.

        Returns:
            A ``MiniCPMVOutput``, or what transformers' forward returns.
        """
        if labels is None and tgt_sizes is None:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                pixel_values=pixel_values, **self.own_arguments(mm_token_type_ids), **kwargs,
            )  # fmt: skip
        _refuse_unknown(kwargs | {"temporal_ids": temporal_ids})
        assert input_ids is not None, "a batch has input_ids"
        host = (
            _on_cpu(input_ids, attention_mask, position_ids) if on_cpu is None else torch.from_numpy(on_cpu)
        )
        vision = VisionInput(pixel_values, slice_sources, known_features)
        balances = labels is not None and getattr(self.config.text_config, "output_router_logits", False)
        output = self._last_hidden(input_ids, host, vision, tgt_sizes, router_logits=balances)
        if labels is None:
            return MiniCPMVOutput(logits=self.lm_head(output.hidden))
        if position_ids is not None and supervised is None:
            # A sample's first token has nothing in front of it to be predicted from.
            labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)
        found = supervised_loss(self.lm_head, output.hidden, labels, supervised, loss_weights)
        balance = None
        if balances:
            weights = sample_weights(labels, output.samples, supervised, loss_weights)
            balance = self._balance_loss(output, weights)
        return MiniCPMVOutput.of(found, num_items_in_batch, output.new_features, balance=balance)

    def _balance_loss(self, output: _LlmOutput, weights: Tensor) -> Tensor:
        """The loss of the experts' use; ``weights`` are those of the samples' cross entropies."""
        config = self.config.text_config
        losses = balance_losses(output.router_logits, output.samples, per_token=config.num_experts_per_tok)
        return config.router_aux_loss_coef * (losses * weights).sum()

    def _last_hidden(
        self, input_ids: Tensor, host: Tensor, vision: VisionInput, tgt_sizes: Any, *, router_logits: bool
    ) -> _LlmOutput:
        """Run tower and LLM on a batch.

        Args:
            input_ids: As in ``forward``, like ``vision`` and ``tgt_sizes``.
            host: [2 or 3, B, T] ids, mask and positions on the CPU.
            vision: What there is of the slices.
            tgt_sizes: See ``forward``.
            router_logits: Whether they are asked for.
        """
        config = self.config
        ids, mask, *positions = host
        gap = config.text_config.linear_conv_kernel_dim
        samples = SpreadLayout.of(positions[0] if positions else None, mask, gap=gap, device=input_ids.device)
        kinds = self.kinds_of(ids)
        grids = [] if tgt_sizes is None else [(rows, columns) for rows, columns in tgt_sizes.tolist()]
        runs = PlaceholderRuns.of(kinds, grids, mode=config.downsample_mode)
        embeddings, new = self._embed(input_ids, vision, runs)
        rope = self._rope(ids, mask, samples, runs)
        hidden, logits = self._run_llm(embeddings, samples, rope, router_logits=router_logits)
        return _LlmOutput(hidden, samples, logits, new)

    def _embed(
        self, input_ids: Tensor, vision: VisionInput, runs: PlaceholderRuns
    ) -> tuple[Tensor, NewFeatures | None]:
        """[B, T, D] token embeddings with the placeholders replaced by image embeddings."""
        embeddings = self.get_input_embeddings()(input_ids)
        features, new = encode_slices(self.model, vision, runs.grids)
        places = runs.places(input_ids.shape[1]).to(embeddings.device, non_blocking=True)
        flat = embeddings.flatten(0, 1).index_copy(0, places, features.to(embeddings.dtype))
        return flat.view_as(embeddings), new

    def _run_llm(
        self, embeddings: Tensor, samples: SpreadLayout, rope: Tensor | None, *, router_logits: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, T, D] embeddings -> [B, T, D] last hidden states; every sample as if it were alone.

        Args:
            embeddings: [B, T, D].
            samples: The samples of the rows.
            rope: [3, tokens of all samples] rotary positions (time, row, column), or None for plain ones.
            router_logits: Whether each layer's [tokens of all samples, experts] are given too.
        """
        plain = samples.positions.expand(3, -1) if rope is None else rope
        # The first of the four rows is what transformers tells packed samples by.
        positions = torch.cat([samples.positions[None], plain])[:, None]
        arguments = sample_arguments(self.config.text_config, samples)
        given = arguments["attention_mask"]
        if given is not None:  # by kind of layer; the delta nets know the samples by themselves
            arguments["attention_mask"] = {"full_attention": given, "linear_attention": None}
        if router_logits:
            arguments["output_router_logits"] = True
        output = self.model.language_model(
            inputs_embeds=samples.take(embeddings)[None],
            position_ids=positions,
            use_cache=False,  # with a cache transformers would not keep packed samples apart
            samples=samples,
            **arguments,
        )
        return samples.put(output.last_hidden_state[0]), output.router_logits if router_logits else ()

    def _rope(self, ids: Tensor, mask: Tensor, samples: SpreadLayout, runs: PlaceholderRuns) -> Tensor | None:
        return None

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
        """transformers' ``generate``, also for prompts in this project's form.

        Several prompts are padded on the LEFT; leave ``position_ids`` out.

        Args:
            inputs: [B, T] int64, or ``input_ids`` by name, with ``attention_mask`` when padded.
            pixel_values: [3, 14, 14 * N] uint8 with ``tgt_sizes``; or transformers' own form.
            tgt_sizes: [S, 2] (rows, columns) in patches, of images and video frames; given, even if empty,
                it says that the prompts are in this project's form.
            image_bound: Not needed, as in ``forward``.
            dummy: Run the vision tower even without a slice, so that no process waits for another.
            **kwargs: As for transformers.

        Returns:
            [B, new tokens] int64 without the prompt, as the other families give; for prompts in transformers'
            form what transformers gives, prompt included.

        Raises:
            ValueError: When a prompt is padded on the right.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "generate: found a prompt padded on the right, expected padding on the left. "
                "New tokens go behind the last one, which must be a real one."
            )
        input_ids: Any = kwargs.get("input_ids", inputs)
        kwargs |= self.own_arguments(kwargs.get("mm_token_type_ids"), input_ids=input_ids)
        generate = super().generate  # type: ignore[misc]
        if tgt_sizes is None:
            return generate(inputs, pixel_values=pixel_values, **kwargs)
        if len(tgt_sizes) or dummy:
            kwargs |= self._encoded(input_ids, pixel_values, tgt_sizes)
        found = generate(inputs, **kwargs)
        if isinstance(found, Tensor):
            return found[:, input_ids.shape[1] :]
        found.sequences = found.sequences[:, input_ids.shape[1] :]
        return found

    def _encoded(self, input_ids: Any, pixel_values: Any, tgt_sizes: Any) -> dict[str, Any]:
        """Image embeddings of a batch of prompts, in the form that transformers' ``generate`` takes.

        Given pixels it would encode them itself, and repeat them for every beam in the wrong order (5.23).
        """
        kinds = self.kinds_of(input_ids.cpu())
        grids = [(rows, columns) for rows, columns in torch.as_tensor(tgt_sizes).tolist()]
        runs = PlaceholderRuns.of(kinds, grids, mode=self.config.downsample_mode)
        with torch.no_grad():
            encoded, _ = encode_slices(self.model, VisionInput(pixel_values), runs.grids)
        features = encoded.split(list(runs.lengths))
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


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    unknown = [name for name in given if name not in ("return_dict", "use_cache")]
    if unknown:
        raise TypeError(f"The training forward of the family minicpmv46 does not know {', '.join(unknown)}.")


def _on_cpu(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Fetch ids, mask and positions in one copy: every further wait for the device costs time."""
    parts = [input_ids, torch.ones_like(input_ids) if mask is None else mask.to(input_ids)]
    parts += [] if positions is None else [positions.to(input_ids)]
    return torch.stack(parts).cpu()


class MiniCPMV4_6ForConditionalGeneration(  # type: ignore[misc]  # noqa: N801, the name in config.json
    _TrainingForward, modeling_minicpmv4_6.MiniCPMV4_6ForConditionalGeneration
):
    """MiniCPM-V 4.6."""


class MiniCPMOcrForConditionalGeneration(  # type: ignore[misc]
    _TrainingForward, modeling_minicpm_ocr.MiniCPMOcrForConditionalGeneration
):
    """MiniCPM-OCR 1.0: 4.6 under other names."""


class MiniCPMV4_7ForConditionalGeneration(  # type: ignore[misc]  # noqa: N801
    _TrainingForward, modeling_minicpmv4_7.MiniCPMV4_7ForConditionalGeneration
):
    """MiniCPM-V 4.7: 4.6 with rotary positions that lay an image's slices out on one canvas."""

    def _rope(self, ids: Tensor, mask: Tensor, samples: SpreadLayout, runs: PlaceholderRuns) -> Tensor:
        """[3, tokens of all samples] canvas positions, each sample's computed alone, on the CPU."""
        real = mask.bool()
        rows = [
            pad_sequence(part[real].split(samples.samples), batch_first=True) for part in (ids, runs.kinds)
        ]
        lengths = torch.tensor(samples.samples)
        own = torch.arange(rows[0].shape[1]) < lengths[:, None]
        image, video = (runs.sizes_of(kind) for kind in (1, 2))
        positions, _ = self.model.get_rope_index(
            rows[0], mm_token_type_ids=rows[1], target_sizes=image, target_sizes_videos=video,
            attention_mask=own, downsample_mode=self.config.downsample_mode,
        )  # fmt: skip
        return positions[:, own].to(samples.device, non_blocking=True)

    def own_arguments(
        self, mm_token_type_ids: Tensor | None, input_ids: Tensor | None = None
    ) -> dict[str, Any]:
        if input_ids is None:
            return {"mm_token_type_ids": mm_token_type_ids}
        # The rotary offset of an earlier prompt must not reach this one.
        self.model.rope_deltas = None
        return {"mm_token_type_ids": self.kinds_of(input_ids).int()}
