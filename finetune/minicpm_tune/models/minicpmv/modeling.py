"""MiniCPM-V from V-2 to V-4.5 as one class: vision tower, resampler, LLM.

Key names, configuration and files are those of the released checkpoints; the code is ours and runs
on current transformers. What differs between generations comes from ``checkpoints.model_generations``.
Letters: B rows, T tokens, S slices, P placeholders, Q tokens per placeholder, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization

from minicpm_tune.batch import NewFeatures, SliceSources
from minicpm_tune.checkpoints.released_format import ReleasedModel
from minicpm_tune.models.attention import keep_samples_apart, sample_arguments
from minicpm_tune.models.autocast import to_autocast_dtype
from minicpm_tune.models.batch_layout import (
    FULL_SLICE,
    PATCH,
    Grid,
    SampleLayout,
    SliceLayout,
    VisionInput,
    tower_features,
)
from minicpm_tune.models.chat_interface import ChatMixin
from minicpm_tune.models.loading import keep_present_blocks
from minicpm_tune.models.loss import MiniCPMVOutput, as_lm_head, supervised_loss
from minicpm_tune.models.minicpmv.audio import AudioEncoder, AudioInput, AudioProjection, pooled
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.vision import (
    FramePacks,
    NaViTTower,
    Resampler,
    TimmTower,
    check_bounds,
    grid_table,
)

DUMMY_GRID = (2, 2)  # the slice that stands in when a batch has no image, in patches


class MiniCPMV(ChatMixin, ReleasedModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model of V-2, 2.5, 2.6, V-4 and V-4.5, and of o-2.6 and o-4.5, whose speech output is kept and not run.

    Args:
        config: Made by ``MiniCPMVConfig.from_pretrained``, or from the content of a released config.json.
    """

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # transformers declares the three ClassVar below per instance, and reads them from the class all the same.
    # Speech output, and what hears in a checkpoint whose config.json leaves it out: not run here, saved unchanged.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^apm\.", r"^audio_projection_layer\.", r"^tts\."]  # type: ignore[misc]
    # V-2's query positions are a fixed table; a checkpoint may leave it out.
    _keys_to_ignore_on_load_missing: ClassVar = [r"^resampler\.pos_embed$"]  # type: ignore[misc]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The towers' blocks; transformers adds the LLM's.
    _no_split_modules: ClassVar = ["SiglipEncoderLayer", "TimmBlock", "AudioEncoderLayer"]  # type: ignore[misc]

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        released, row = config.released, config.generation
        config.text_config._attn_implementation = config._attn_implementation
        keep_samples_apart(config.text_config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.llm.lm_head = as_lm_head(self.llm.lm_head)
        drop_last = released.get("drop_vision_last_layer", True)
        if row.vision == "timm":
            self.vpm: TimmTower | NaViTTower = TimmTower(
                released["vision_encoder"], drop_last_layer=drop_last
            )
            vision_width = self.vpm.width
        else:
            assert config.vision_config is not None  # None in V-2 only
            self.vpm = NaViTTower(config.vision_config, drop_last_layer=drop_last, positions=row.positions)
            vision_width = config.vision_config.hidden_size
        self.resampler = Resampler(
            queries=config.query_num,
            width=config.hidden_size,
            vision_width=vision_width,
            query_positions=row.vision == "timm",
        )
        if config.hears:
            self.apm = AudioEncoder(
                released["audio_config"], chunk_seconds=released.get("audio_chunk_length", 1.0)
            )
            self.audio_projection_layer = AudioProjection(
                released["audio_config"]["encoder_ffn_dim"] // 4, config.hidden_size
            )
        self.embedding_scale = released.get("scale_emb", 1)
        # MiniCPM-2B divides the last hidden state by hidden / dim_model_base before the output layer.
        self.output_scale = 1 / getattr(config.text_config, "logits_scaling", 1)
        self.post_init()
        keep_present_blocks(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            initialization.normal_(module.query, std=0.02)
            initialization.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
            initialization.normal_(module.attn.in_proj_weight, std=module.proj.shape[0] ** -0.5)
            initialization.zeros_(module.attn.in_proj_bias)
            if module.pos_embed is not None:
                side = round(module.query.shape[0] ** 0.5)
                table = grid_table([(side, side)], module.proj.shape[0], torch.device("cpu"))
                initialization.copy_(module.pos_embed, table)
        elif isinstance(module, TimmTower):
            initialization.normal_(module.pos_embed, std=0.02)

    def slice_grids(self, count: int) -> list[Grid]:
        """(rows, columns) in patches of a large image that is cut into ``count`` slices, overview included."""
        return [FULL_SLICE] * count

    def slice_tokens(self, grid: Grid) -> int:
        """Placeholder tokens of a slice of ``grid`` patches."""
        return self.config.query_num

    def encode_slices(
        self,
        vision: VisionInput,
        grids: list[Grid],
        *,
        samples: list[int],
        packs: FramePacks | None,
    ) -> tuple[Tensor, NewFeatures | None]:
        """Run vision tower and resampler once, on all slices of the batch.

        Args:
            vision: What there is of the slices.
            grids: [S] (rows, columns) of each slice, in patches.
            samples: [S] the sample each slice belongs to (the 2.5 tower looks at it).
            packs: Frames that share a placeholder (V-4.5 video); None otherwise.

        Returns:
            [P, Q, D] embeddings in the order of the placeholders, and the tower's features to be cached.
        """
        layout = SliceLayout.of(grids, samples)
        features, new = tower_features(self._run_tower, vision, layout, tower=self.vpm)
        return self.resampler(features, layout, packs), new

    def _run_tower(self, pixel_values: Tensor | None, layout: SliceLayout) -> Tensor:
        """[N, C] features in the layout's order; for None those of a dummy slice."""
        if pixel_values is None:
            layout, size = SliceLayout.of([DUMMY_GRID]), PATCH * DUMMY_GRID[0] * DUMMY_GRID[1]
            device = next(self.vpm.parameters()).device
            pixel_values = torch.zeros((3, PATCH, size), dtype=torch.uint8, device=device)
        patches = pixel_values.unflatten(-1, (-1, PATCH)).permute(2, 0, 1, 3).flatten(1)
        patches = (patches.to(torch.float32) / 255 - 0.5) / 0.5
        patches = layout.arrange(patches.to(next(self.vpm.parameters()).dtype))
        vision_trains = any(parameter.requires_grad for parameter in self.vpm.parameters())
        with nullcontext() if vision_trains else torch.no_grad():
            features = self.vpm(patches, layout)
        return to_autocast_dtype(features)

    def encode_audio(self, audio: AudioInput) -> Tensor:
        """[K, D] embeddings of all audio tokens of the batch, in their order; encoder and projection run once."""
        trains = any(parameter.requires_grad for parameter in self.apm.parameters())
        with nullcontext() if trains else torch.no_grad():
            features = self.apm(audio.mel, audio.segments)
        features = self.audio_projection_layer(to_autocast_dtype(features))
        return pooled(features, audio.segments, self.config.audio_pool)

    def embed(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: Any = None,
        position_ids: Tensor | None = None,
        dummy: bool = False,
        slice_sources: SliceSources | None = None,
        known_features: Tensor | None = None,
        audio: AudioInput | None = None,
    ) -> tuple[Tensor, NewFeatures | None]:
        """Token embeddings with the placeholders replaced by the embeddings of images and audio.

        Args:
            input_ids: [B, T] int64.
            pixel_values: [3, 14, 14 * N] uint8, or None.
            tgt_sizes: [S, 2] (rows, columns) in patches; tensor or array, best on the CPU.
            image_bound: [P, 3] (row, start, end) of each run of Q placeholder tokens.
            temporal_ids: [S, 2] (placeholder, time or -1), or None when every slice has its own.
            position_ids: [B, T], given when rows are packed; best on the CPU.
            dummy: Run the vision tower on a dummy slice when the batch has no image, so that
                every rank takes part in the same collectives and every trained parameter gets a gradient.
            slice_sources: Which slices' features are cached.
            known_features: Those features.
            audio: What there is to hear; None: nothing.

        Returns:
            [B, T, D], and the vision tower's features to be cached.

        Raises:
            ValueError: When slices, placeholders and tokens do not fit each other.
        """
        embeddings = self.get_input_embeddings()(input_ids) * self.embedding_scale
        if self.config.hears and (audio is not None or dummy):
            embeddings = self._with_audio(embeddings, audio)
        grids = [] if tgt_sizes is None else [(rows, columns) for rows, columns in tgt_sizes.tolist()]
        if not grids:
            if not dummy:
                return embeddings, None
            features, _ = self.encode_slices(VisionInput(None), [DUMMY_GRID], samples=[0], packs=None)
            return embeddings + features.sum().to(embeddings.dtype) * 0, None
        bounds = image_bound.tolist()
        packs = None if temporal_ids is None else FramePacks.of(temporal_ids)
        placeholder_of = range(len(grids)) if packs is None else [int(p) for p in temporal_ids[:, 0].tolist()]
        check_bounds(bounds, len(grids) if packs is None else len(packs.sizes), queries=self.config.query_num)
        sample_of = self._samples(bounds, position_ids)
        features, new = self.encode_slices(
            VisionInput(pixel_values, slice_sources, known_features),
            grids,
            samples=[sample_of[index] for index in placeholder_of],
            packs=packs,
        )
        starts = torch.tensor([row * input_ids.shape[1] + start for row, start, _ in bounds])
        index = (starts[:, None] + torch.arange(self.config.query_num)).flatten()
        index = index.to(embeddings.device, non_blocking=True)
        flat = embeddings.flatten(0, 1).index_copy(0, index, features.flatten(0, 1).to(embeddings.dtype))
        return flat.view_as(embeddings), new

    def _with_audio(self, embeddings: Tensor, audio: AudioInput | None) -> Tensor:
        if audio is None:
            nothing = AudioInput.dummy(embeddings.device)
            return embeddings + self.encode_audio(nothing).sum().to(embeddings.dtype) * 0
        heard = audio.placed(self.encode_audio(audio), self.config.audio_pool).to(embeddings.dtype)
        places = audio.places(embeddings.shape[1]).to(embeddings.device, non_blocking=True)
        return embeddings.flatten(0, 1).index_copy(0, places, heard).view_as(embeddings)

    def _samples(self, bounds: list[list[int]], position_ids: Tensor | None) -> list[int]:
        """The sample of each placeholder: its row, or its segment of a packed row (needed in 2.5 alone)."""
        if position_ids is None or self.config.generation.positions != "one_row":
            return [row for row, _, _ in bounds]
        segments = (position_ids == 0).flatten().cumsum(0).view_as(position_ids).cpu()
        return [int(segments[row, start]) for row, start, _ in bounds]

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
        audio_values: Tensor | None = None,
        audio_segments: Any = None,
        audio_bound: Any = None,
        **kwargs: Any,
    ) -> MiniCPMVOutput:
        """Give the loss (with labels) or the logits (without).

        Rows are padded on the right. The LLM runs on the real tokens of all rows as one row, see ``SampleLayout``.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 1 at real tokens.
            position_ids: [B, T], restarting at 0 for each packed sample; None for unpacked rows.
            pixel_values: See ``embed``, as the three that follow.
            tgt_sizes: See ``embed``.
            image_bound: See ``embed``.
            temporal_ids: See ``embed``.
            labels: [B, T] int64, token id or -100; not shifted.
            num_items_in_batch: What the summed loss is divided by: the supervised tokens of the whole optimizer step,
                or the sum of their weights; by default this batch's.
            supervised: See ``places`` of ``loss.supervised_loss``.
            loss_weights: See ``weights`` of ``loss.supervised_loss``.
            on_cpu: The first three arguments once more, see ``batch.Batch``; without it they are fetched.
            slice_sources: See ``embed``, as the next.
            known_features: See ``embed``.
            audio_values: See ``batch.Batch``, as the two that follow.
            audio_segments: See ``batch.Batch``.
            audio_bound: See ``batch.Batch``.
            **kwargs: Must be None or False (adapters pass their library's usual arguments).

        Returns:
            A ``MiniCPMVOutput``.
        """
        unknown = [
            name for name, value in kwargs.items() if value and name not in ("return_dict", "use_cache")
        ]
        if unknown:
            raise TypeError(f"MiniCPMV.forward does not know the arguments {', '.join(unknown)}.")
        positions = position_ids if on_cpu is None or position_ids is None else torch.from_numpy(on_cpu[2])
        embeddings, new = self.embed(
            input_ids, pixel_values=pixel_values, tgt_sizes=tgt_sizes, image_bound=image_bound,
            temporal_ids=temporal_ids, position_ids=positions, dummy=labels is not None,
            slice_sources=slice_sources, known_features=known_features,
            audio=AudioInput.of(audio_values, audio_segments, audio_bound),
        )  # fmt: skip
        samples = SampleLayout.of_batch(input_ids, attention_mask, position_ids, on_cpu)
        hidden = self._run_llm(embeddings, samples) * self.output_scale
        if labels is None:
            return MiniCPMVOutput(logits=self.llm.lm_head(hidden))
        found = supervised_loss(self.llm.lm_head, hidden, labels, supervised, loss_weights)
        return MiniCPMVOutput.of(found, num_items_in_batch, new)

    def _run_llm(self, embeddings: Tensor, samples: SampleLayout) -> Tensor:
        """[B, T, D] -> [B, T, D] last hidden states, zero at the padding; every sample as if it were alone."""
        output = self.llm.model(
            inputs_embeds=samples.take(embeddings)[None],
            position_ids=samples.positions[None],
            use_cache=False,  # with a cache transformers would not keep packed samples apart
            **sample_arguments(self.llm.config, samples),
        )
        return samples.put(output.last_hidden_state[0])

    def generate(  # type: ignore[override]  # input_ids come first, as in forward
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        tgt_sizes: Any = None,
        image_bound: Any = None,
        temporal_ids: Any = None,
        audio_values: Tensor | None = None,
        audio_segments: Any = None,
        audio_bound: Any = None,
        dummy: bool = False,
        **options: Any,
    ) -> Any:
        """Generate from prompts with images: their embeddings go into the LLM's own ``generate``.

        Args:
            input_ids: [B, T] int64, several prompts padded on the LEFT.
            attention_mask: [B, T], 1 at real tokens; needed when padded.
            pixel_values: As for ``embed``, as the three that follow.
            tgt_sizes: See ``embed``.
            image_bound: See ``embed``.
            temporal_ids: See ``embed``.
            audio_values: See ``batch.Batch``, as the two that follow.
            audio_segments: See ``batch.Batch``.
            audio_bound: See ``batch.Batch``.
            dummy: Run the vision tower even without an image, so that no process waits for another.
            **options: For ``transformers.GenerationMixin.generate``.

        Returns:
            [B, new tokens] int64 without the prompt, or what ``return_dict_in_generate`` asks for.
        """
        embeddings, _ = self.embed(
            input_ids, pixel_values=pixel_values, tgt_sizes=tgt_sizes, image_bound=image_bound,
            temporal_ids=temporal_ids, dummy=dummy,
            audio=AudioInput.of(audio_values, audio_segments, audio_bound),
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
