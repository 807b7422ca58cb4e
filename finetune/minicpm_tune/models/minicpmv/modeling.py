"""MiniCPM-V from V-2 to V-4.5 as one class: vision tower, resampler, LLM.

Key names, configuration and files are those of the released checkpoints; the code is ours and runs
on current transformers. What differs between generations comes from ``checkpoints.model_generations``.
Letters: B rows, T tokens, N patches of all slices, S slices, P placeholders, Q tokens per placeholder, C width of
the tower, D width of the LLM, K audio tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization

from minicpm_tune.batch import NewFeatures
from minicpm_tune.models.attention import keep_samples_apart, sample_arguments
from minicpm_tune.models.autocast import to_autocast_dtype
from minicpm_tune.models.batch_layout import (
    PATCH,
    Grid,
    SampleLayout,
    SliceLayout,
    VisionInput,
    recorded_if_trained,
    replaced,
    tower_features,
)
from minicpm_tune.models.family_model import FamilyModel, LastHidden, keep_present_blocks, refuse_unknown
from minicpm_tune.models.loss import as_lm_head
from minicpm_tune.models.minicpmv.audio import AudioEncoder, AudioInput, AudioProjection, pooled
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.vision import NaViTTower, Resampler, TimmTower, check_bounds, grid_table

DUMMY_GRID = (2, 2)  # the slice that stands in when a batch has no image, in patches


class MiniCPMV(FamilyModel, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model of V-2, 2.5, 2.6, V-4 and V-4.5, and of o-2.6 and o-4.5, whose speech output is kept and not run.

    Args:
        config: Made by ``MiniCPMVConfig.from_pretrained``, or from the content of a released config.json.
    """

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
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

    def slice_tokens(self, grid: Grid) -> int:
        """Placeholder tokens of a slice of ``grid`` patches."""
        return self.config.query_num

    def encode_slices(self, vision: VisionInput, *, samples: list[int]) -> tuple[Tensor, NewFeatures | None]:
        """Run vision tower and resampler once, on all slices of the batch.

        Args:
            vision: What there is of the slices.
            samples: [S] the sample each slice belongs to (the 2.5 tower looks at it).

        Returns:
            [P, Q, D] embeddings in the order of the placeholders, and the tower's features to be cached.
        """
        layout = SliceLayout.of(vision.grids, samples)
        features, new = tower_features(self._run_tower, vision, layout, tower=self.vpm)
        return self.resampler(features, layout, vision.temporal_ids), new

    def _run_tower(self, pixel_values: Tensor | None, layout: SliceLayout) -> Tensor:
        """[N, C] features in the layout's order; for None those of a dummy slice."""
        table = next(self.vpm.parameters())
        if pixel_values is None:
            layout, size = SliceLayout.of([DUMMY_GRID]), PATCH * DUMMY_GRID[0] * DUMMY_GRID[1]
            pixel_values = torch.zeros((3, PATCH, size), dtype=torch.uint8, device=table.device)
        patches = pixel_values.unflatten(-1, (-1, PATCH)).permute(2, 0, 1, 3).flatten(1)
        patches = ((patches.to(torch.float32) / 255 - 0.5) / 0.5).to(table.dtype)
        with recorded_if_trained(self.vpm):
            return to_autocast_dtype(self.vpm(layout.arrange(patches), layout))

    def encode_audio(self, audio: AudioInput) -> Tensor:
        """[K, D] embeddings of all audio tokens of the batch, in their order; encoder and projection run once."""
        with recorded_if_trained(self.apm):
            features = self.apm(audio.mel, audio.segments)
        features = self.audio_projection_layer(to_autocast_dtype(features))
        return pooled(features, audio.segments, self.config.audio_pool)

    def embed(
        self,
        input_ids: Tensor,
        vision: VisionInput,
        *,
        audio: AudioInput | None = None,
        position_ids: Tensor | None = None,
        dummy: bool = False,
    ) -> tuple[Tensor, NewFeatures | None]:
        """Token embeddings with the placeholders replaced by the embeddings of images and audio.

        Args:
            input_ids: [B, T] int64.
            vision: What there is to see.
            audio: What there is to hear; None: nothing.
            position_ids: [B, T], given when rows are packed; best on the CPU.
            dummy: Run the towers on a dummy when the batch has no image or audio, so that every rank takes part in
                the same collectives and every trained parameter gets a gradient.

        Returns:
            [B, T, D], and the vision tower's features to be cached.

        Raises:
            ValueError: When slices, placeholders and tokens do not fit each other.
        """
        embeddings = self.get_input_embeddings()(input_ids) * self.embedding_scale
        if self.config.hears and (audio is not None or dummy):
            embeddings = self._with_audio(embeddings, audio)
        if vision.grids:
            check_bounds(vision, queries=self.config.query_num)
            features, new = self.encode_slices(vision, samples=self._samples(vision, position_ids))
            return replaced(embeddings, vision.places(input_ids.shape[1]), features.flatten(0, 1)), new
        if dummy:
            features, _ = self.encode_slices(VisionInput(None, torch.tensor([DUMMY_GRID])), samples=[0])
            embeddings = embeddings + features.sum().to(embeddings.dtype) * 0
        return embeddings, None

    def _with_audio(self, embeddings: Tensor, audio: AudioInput | None) -> Tensor:
        if audio is None:
            nothing = AudioInput.dummy(embeddings.device)
            return embeddings + self.encode_audio(nothing).sum().to(embeddings.dtype) * 0
        heard = audio.placed(self.encode_audio(audio), self.config.audio_pool)
        return replaced(embeddings, audio.places(embeddings.shape[1]), heard)

    def _samples(self, vision: VisionInput, position_ids: Tensor | None) -> list[int]:
        """[S] the sample of each slice: its row, or its segment of a packed row (needed in 2.5 alone)."""
        first = [tuple(vision.bounds[placeholder][:2]) for placeholder in vision.placeholders]
        if position_ids is None or self.config.generation.positions != "one_row":
            return [row for row, _ in first]
        segments = (position_ids == 0).flatten().cumsum(0).view_as(position_ids).cpu()
        return [int(segments[place]) for place in first]

    def last_hidden(
        self, input_ids: Tensor, host: Tensor, vision: VisionInput, *, trains: bool, **own: Any
    ) -> LastHidden:
        """As ``FamilyModel``'s, with the audio of a ``batch.Batch``."""
        audio = AudioInput.taken_from(own)
        refuse_unknown(own, "MiniCPMV.forward does not know the arguments")
        positions = host[2] if len(host) == 3 else None
        embeddings, new = self.embed(input_ids, vision, audio=audio, position_ids=positions, dummy=trains)
        samples = SampleLayout.of_batch(host, device=input_ids.device)
        output = self.llm.model(
            inputs_embeds=samples.take(embeddings)[None],
            position_ids=samples.positions[None],
            use_cache=False,  # with a cache transformers would not keep packed samples apart
            **sample_arguments(self.llm.config, samples),
        )
        return LastHidden(samples.put(output.last_hidden_state[0]) * self.output_scale, new, samples)

    def new_tokens_for(self, input_ids: Tensor, vision: VisionInput, *, dummy: bool, **options: Any) -> Any:
        """The prompt's embeddings go into the LLM's own ``generate``."""
        audio = AudioInput.taken_from(options)
        embeddings, _ = self.embed(input_ids, vision, audio=audio, dummy=dummy)
        # V-2: the embeddings of generated tokens are scaled too; the prompt's are in ``embed``.
        scale = self.embedding_scale
        hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1] * scale)
        try:
            return self.llm.generate(inputs_embeds=embeddings, **options)
        finally:
            hook.remove()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The LLM's own; adapters look for it on the whole model."""
        return self.llm.prepare_inputs_for_generation(*args, **kwargs)
