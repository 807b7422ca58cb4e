"""MiniCPM-V 4.6 and 4.7: transformers' own classes behind the batch form of this project.

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

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6
from transformers.models.minicpmv4_7 import modeling_minicpmv4_7

from answering import ChatMixin
from generations import Generation
from loss import IGNORE_INDEX, as_lm_head, supervised_loss
from modeling_minicpmv import MiniCPMVOutput
from native_delta_net import use_packed_delta_nets
from native_runs import VisualRuns
from native_samples import SampleLayout
from native_vision import normalised, use_slice_modules
from slice_attention import SliceLayout
from weights import copy_carried_files


class _NativeMiniCPMV(ChatMixin):
    """What 4.6 and 4.7 share; stands before transformers' class in the order of bases."""

    accepts_loss_kwargs = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.lm_head = as_lm_head(self.lm_head)
        use_slice_modules(self.model.vision_tower, self.model.merger)
        use_packed_delta_nets(self.model.language_model)

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
            num_items_in_batch: Supervised tokens of the whole optimizer step; by default this batch's.
            mm_token_type_ids: Not needed here: the token ids tell text, image and video.
            supervised: See ``places`` of ``loss.supervised_loss``.
            **kwargs: transformers' own arguments; here they must be None or False.

        Returns:
            A ``MiniCPMVOutput``, or what transformers' forward returns.
        """
        if labels is None and tgt_sizes is None:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                pixel_values=pixel_values, **self._own_arguments(mm_token_type_ids), **kwargs,
            )  # fmt: skip
        kwargs["temporal_ids"] = temporal_ids
        unknown = [name for name, value in kwargs.items() if value is not None and value is not False]
        unknown = [name for name in unknown if name not in ("return_dict", "use_cache")]
        if unknown:
            raise TypeError(f"The training forward of {type(self).__name__} does not know {', '.join(unknown)}.")
        ids, mask, positions = _on_cpu(input_ids, attention_mask, position_ids)
        samples = SampleLayout.of(
            positions, mask, gap=self.config.text_config.linear_conv_kernel_dim, device=input_ids.device
        )
        runs = self._visual_runs(ids, [] if tgt_sizes is None else tgt_sizes.tolist())
        hidden = self._run_llm(self._embed(input_ids, pixel_values, runs), samples, self._rope(ids, mask, samples, runs))
        if labels is None:
            return MiniCPMVOutput(logits=self.lm_head(hidden))
        if position_ids is not None:
            # A sample's first token has nothing in front of it to be predicted from.
            labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)
        found = supervised_loss(self.lm_head, hidden, labels, supervised)
        count = found.token_count if num_items_in_batch is None else num_items_in_batch
        return MiniCPMVOutput(
            loss=found.loss_sum / torch.as_tensor(count, device=hidden.device).clamp(min=1),
            loss_sum=found.loss_sum,
            token_count=found.token_count,
            correct_count=found.correct_count,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, for prompts of this project's form too.

        Several prompts are padded on the LEFT; leave ``position_ids`` out.

        Args:
            inputs: [B, T] int64, or ``input_ids`` by name, with ``attention_mask`` when padded.
            pixel_values: [3, 14, 14 * N] uint8 with ``tgt_sizes``; or transformers' own form.
            tgt_sizes: [S, 2] (rows, columns) in patches.
            image_bound: Not needed, as in ``forward``.
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
        if tgt_sizes is not None and len(tgt_sizes):
            kwargs["target_sizes"] = torch.as_tensor(tgt_sizes)
            pixel_values = normalised(pixel_values, self.model.vision_tower.dtype)
        if tgt_sizes is None or len(tgt_sizes):
            kwargs["pixel_values"] = pixel_values
        input_ids = kwargs.get("input_ids", inputs)
        kwargs |= self._own_arguments(kwargs.get("mm_token_type_ids"), input_ids=input_ids)
        return super().generate(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save as transformers does, with the tokenizer and processor files of the source checkpoint."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self.config.name_or_path:
            copy_carried_files(Path(self.config.name_or_path), Path(save_directory))

    def _visual_runs(self, ids: Tensor, grids: list[list[int]]) -> VisualRuns:
        """The batch's placeholders, each with its slice; see ``VisualRuns.of``."""
        config = self.config
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        return VisualRuns.of(kinds, [(rows, columns) for rows, columns in grids], mode=config.downsample_mode)

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None, runs: VisualRuns) -> Tensor:
        """[B, T, D] token embeddings with the placeholders replaced.

        A batch without images runs the tower on a dummy slice and takes none of its features: every
        rank has the same collectives, and every trained parameter a gradient (of zeros).
        """
        embeddings = self.get_input_embeddings()(input_ids)
        grids = list(runs.grids)
        if not grids:
            grids = [self._smallest_grid()]
            pixel_values = input_ids.new_zeros((3, 14, 14 * grids[0][0] * grids[0][1]), dtype=torch.uint8)
        layout = SliceLayout.of(grids)
        pixels = normalised(pixel_values, self.model.vision_tower.dtype, layout)
        found = self.model.get_image_features(pixels, torch.tensor(layout.grids), layout=layout)
        features = [feature for _, feature in sorted(zip(layout.order, found.pooler_output, strict=True), key=_first)]
        places = runs.places(input_ids.shape[1]).to(embeddings.device, non_blocking=True)
        features = torch.cat(features)[: places.shape[0]].to(embeddings.dtype)
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, features).view_as(embeddings)
        return embeddings + self._skipped_merger().to(embeddings.dtype)

    def _smallest_grid(self) -> tuple[int, int]:
        """The smallest slice that the mergers can join, in patches."""
        config = self.config
        window = (1, 1) if config.downsample_mode == "4x" else config.vision_config.window_kernel_size
        rows, columns = (side**config.merger_times for side in config.merge_kernel_size)
        return rows * window[0], columns * window[1]

    def _skipped_merger(self) -> Tensor:
        """A zero that gives the inner merger its gradient of zeros in mode 4x, where nothing uses it."""
        merger = self.model.vision_tower.vit_merger
        weight = merger.linear_2.weight
        if self.config.downsample_mode != "4x" or not any(p.requires_grad for p in merger.parameters()):
            return weight.new_zeros(())
        rows, columns = merger.window_kernel_size
        window = weight.new_zeros((1, rows * columns, merger.embed_dim))
        return merger(window, torch.tensor([[rows, columns]]))[:0].sum()

    def _run_llm(self, embeddings: Tensor, samples: SampleLayout, rope: Tensor | None) -> Tensor:
        """[B, T, D] embeddings -> [B, T, D] last hidden states; every sample as if it were alone.

        Args:
            embeddings: [B, T, D].
            samples: The samples of the rows.
            rope: [3, tokens of all samples] rotary positions (time, row, column), or None for plain ones.
        """
        placed, seen, flash = samples, embeddings, {}
        if self._one_row():
            # The variable-length kernels take the samples of all rows as one row.
            placed, seen = samples.as_one_row(), samples.take(embeddings)[None]
            longest = max(samples.samples)
            flash = {"cu_seq_lens_q": samples.ends, "cu_seq_lens_k": samples.ends}
            flash |= {"max_length_q": longest, "max_length_k": longest}
        positions = None
        if placed.packed:
            plain = placed.positions.expand(3, -1) if rope is None else rope
            # The first of the four rows is what transformers tells packed samples by.
            rows = torch.cat([placed.positions[None], plain])
            positions = torch.stack([placed.put(row) for row in rows])
        elif rope is not None:
            positions = torch.stack([placed.put(row) for row in rope])
        # use_cache=False: with a cache the isolation of packed samples is silently dropped.
        hidden = self.model.language_model(
            inputs_embeds=seen, position_ids=positions, use_cache=False, samples=placed, **flash
        ).last_hidden_state
        return samples.put(hidden[0]) if flash else hidden

    def _one_row(self) -> bool:
        return "flash" in str(self.config.text_config._attn_implementation)

    def _rope(self, ids: Tensor, mask: Tensor, samples: SampleLayout, runs: VisualRuns) -> Tensor | None:
        return None

    def _own_arguments(self, mm_token_type_ids: Tensor | None, input_ids: Tensor | None = None) -> dict[str, Any]:
        """Arguments of transformers' forward and generate that only one generation has."""
        return {}


def _first(pair: tuple[int, Tensor]) -> int:
    return pair[0]


def _on_cpu(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fetch ids, mask and positions in one copy: every further wait for the device costs time."""
    parts = [input_ids, torch.ones_like(input_ids) if mask is None else mask.to(input_ids)]
    parts += [] if positions is None else [positions.to(input_ids)]
    ids, real, *rest = torch.stack(parts).cpu()
    return ids, real, rest[0] if rest else None


class MiniCPMV4_6ForConditionalGeneration(  # noqa: N801, the name that config.json's architectures has
    _NativeMiniCPMV, modeling_minicpmv4_6.MiniCPMV4_6ForConditionalGeneration
):
    """MiniCPM-V 4.6."""


class MiniCPMV4_7ForConditionalGeneration(  # noqa: N801
    _NativeMiniCPMV, modeling_minicpmv4_7.MiniCPMV4_7ForConditionalGeneration
):
    """MiniCPM-V 4.7: 4.6 with rotary positions that lay an image's slices out on one canvas."""

    def _rope(self, ids: Tensor, mask: Tensor, samples: SampleLayout, runs: VisualRuns) -> Tensor:
        """[3, tokens of all samples] canvas positions, each sample's computed alone, on the CPU."""
        real = mask.bool()
        rows = [pad_sequence(part[real].split(samples.samples), batch_first=True) for part in (ids, runs.kinds)]
        lengths = torch.tensor(samples.samples)
        own = torch.arange(rows[0].shape[1]) < lengths[:, None]
        image, video = (runs.sizes_of(kind) for kind in (1, 2))
        positions, _ = self.model.get_rope_index(
            rows[0], mm_token_type_ids=rows[1], target_sizes=image, target_sizes_videos=video,
            attention_mask=own, downsample_mode=self.config.downsample_mode,
        )  # fmt: skip
        return positions[:, own].to(samples.device, non_blocking=True)

    def _own_arguments(self, mm_token_type_ids: Tensor | None, input_ids: Tensor | None = None) -> dict[str, Any]:
        if input_ids is None:
            return {"mm_token_type_ids": mm_token_type_ids}
        # The rotary offset of an earlier prompt must not reach this one.
        self.model.rope_deltas = None
        image, video = self.config.image_token_id, self.config.video_token_id
        return {"mm_token_type_ids": (input_ids == image).int() + 2 * (input_ids == video).int()}


_CLASSES: dict[str, type[nn.Module]] = {
    "v4_6": MiniCPMV4_6ForConditionalGeneration,
    "v4_7": MiniCPMV4_7ForConditionalGeneration,
}


def native_class(generation: Generation) -> Any:
    """Give the class of a generation that transformers itself has.

    Raises:
        KeyError: For a generation that is not native.
    """
    return _CLASSES[generation.name]
