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

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpm_ocr import modeling_minicpm_ocr
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6
from transformers.models.minicpmv4_7 import modeling_minicpmv4_7

from minicpm_tune.checkpoints.model_generations import DOWNSAMPLING
from minicpm_tune.models.attention import keep_samples_apart, sample_arguments
from minicpm_tune.models.batch_layout import Grid, VisionInput, replaced
from minicpm_tune.models.family_model import FamilyModel, LastHidden, keep_present_blocks, refuse_unknown
from minicpm_tune.models.loss import as_lm_head, balance_losses, sample_weights
from minicpm_tune.models.minicpmv46.delta_net import SpreadLayout, use_packed_delta_nets
from minicpm_tune.models.minicpmv46.vision import PlaceholderRuns, encode_slices, use_slice_modules

# What transformers calls the kinds of slices, see ``PlaceholderRuns``.
_KINDS = ((1, "image", "target_sizes"), (2, "video", "target_sizes_videos"))


class _TrainingForward(FamilyModel):
    """What is added to transformers' classes; stands before transformers' class in the order of bases."""

    # Made by transformers' class.
    config: Any
    model: Any
    lm_head: Any

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head = as_lm_head(self.lm_head)
        use_slice_modules(self.model)
        use_packed_delta_nets(self.model.language_model)
        keep_samples_apart(self.config.text_config)
        keep_present_blocks(self)

    def slice_tokens(self, grid: Grid) -> int:
        """Placeholder tokens of a slice of ``grid`` patches."""
        return grid[0] * grid[1] // DOWNSAMPLING[self.config.downsample_mode].patches_per_token

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        tgt_sizes: Any = None,
        labels: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``FamilyModel``'s; without ``labels`` and ``tgt_sizes`` transformers' own (``generate`` calls it so)."""
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if labels is None and tgt_sizes is None:
            own = self.own_arguments(mm_token_type_ids)
            return super(FamilyModel, self).forward(input_ids=input_ids, **own, **kwargs)  # type: ignore[misc]
        assert input_ids is not None, "a batch has input_ids"
        # The token ids themselves tell text, image and video: mm_token_type_ids is not needed.
        return super().forward(input_ids, tgt_sizes=tgt_sizes, labels=labels, **kwargs)

    def last_hidden(
        self, input_ids: Tensor, host: Tensor, vision: VisionInput, *, trains: bool, **own: Any
    ) -> LastHidden:
        """As ``FamilyModel``'s."""
        refuse_unknown(
            own | {"temporal_ids": vision.temporal_ids},  # one placeholder per frame
            "The training forward of the family minicpmv46 does not know",
        )
        config = self.config
        gap = config.text_config.linear_conv_kernel_dim
        samples = SpreadLayout.of_batch(host, gap=gap, device=input_ids.device)
        runs = PlaceholderRuns.of(self.kinds_of(host[0]), vision.grids, mode=config.downsample_mode)
        embeddings = self.get_input_embeddings()(input_ids)
        features, new = encode_slices(self.model, vision)
        embeddings = replaced(embeddings, runs.places(input_ids.shape[1]), features)
        rope = self._rope(host[0], host[1], samples, runs)
        balances = trains and getattr(config.text_config, "output_router_logits", False)
        states, logits = self._run_llm(embeddings, samples, rope, router_logits=balances)
        return LastHidden(states, new, samples, logits)

    def balance_loss(
        self, found: LastHidden, labels: Tensor, supervised: Any, loss_weights: Any
    ) -> Tensor | None:
        """The loss of the experts' use, each sample's weighted as its cross entropy is."""
        if not found.router_logits:
            return None
        config = self.config.text_config
        weights = sample_weights(labels, found.samples, supervised, loss_weights)
        losses = balance_losses(found.router_logits, found.samples, per_token=config.num_experts_per_tok)
        return config.router_aux_loss_coef * (losses * weights).sum()

    def _run_llm(
        self, embeddings: Tensor, samples: SpreadLayout, rope: Tensor | None, *, router_logits: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, T, D] embeddings -> [B, T, D] last hidden states; every sample as if it were alone.

        ``rope``: [3, tokens of all samples] rotary positions (time, row, column), or None for plain ones.
        ``router_logits``: Whether each layer's [tokens of all samples, experts] are given too.
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

    def generate(  # type: ignore[override]
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
        generate = super(FamilyModel, self).generate  # type: ignore[misc]  # transformers' own
        if tgt_sizes is None:
            return generate(inputs, pixel_values=pixel_values, **kwargs)
        if len(tgt_sizes) or dummy:
            kwargs |= self._encoded(input_ids, VisionInput(pixel_values, torch.as_tensor(tgt_sizes)))
        found = generate(inputs, **kwargs)
        if isinstance(found, Tensor):
            return found[:, input_ids.shape[1] :]
        found.sequences = found.sequences[:, input_ids.shape[1] :]
        return found

    def _encoded(self, input_ids: Tensor, vision: VisionInput) -> dict[str, Any]:
        """Image embeddings of a batch of prompts, in the form that transformers' ``generate`` takes.

        Given pixels it would encode them itself, and repeat them for every beam in the wrong order (5.23).
        """
        kinds = self.kinds_of(input_ids.cpu())
        runs = PlaceholderRuns.of(kinds, vision.grids, mode=self.config.downsample_mode)
        with torch.no_grad():
            encoded, _ = encode_slices(self.model, vision)
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
