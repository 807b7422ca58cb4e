"""What differs between the MiniCPM-V generations, and the models of InternLM-XComposer2, as data.

One row per generation. Code elsewhere asks the row for a property (``generation.image_ids``) and
never compares versions, so that adding a generation is adding a row.

Source: the released config.json, modeling and processing files of each checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypedDict

# What adapters and data-parallel training put around a parameter's own name.
_WRAPPERS = re.compile(
    r"^(?:module\.)*(?:base_model\.model\.)?|modules_to_save\.\w+\.|original_module\.|base_layer\."
)
LLM_TYPES = ("auto", "minicpm", "llama", "llama3", "qwen", "qwen2", "internlm2")


# The parts of a model, in the order in which they are told apart.
_RELEASED_MODULES: dict[str, tuple[str, ...]] = {
    "vision": ("vpm",),
    "resampler": ("resampler",),
    "embeddings": ("llm.model.embed_tokens",),
    "llm": ("llm",),
}
_OMNI_MODULES = {
    "vision": ("vpm",),
    "audio": ("apm",),
    **_RELEASED_MODULES,
    "resampler": ("resampler", "audio_projection_layer"),
}
_MINICPMV46_MODULES = {
    "vision": ("model.vision_tower",),
    "resampler": ("model.merger",),
    "embeddings": ("model.language_model.embed_tokens",),
    "llm": ("model.language_model", "lm_head"),
}
# 4khd's separators, parameters of the model itself; they go into the projector.
_XCOMPOSER2_SEPARATORS = ("plora_glb_GN", "plora_sub_GN")
_XCOMPOSER2_MODULES = {
    "vision": ("vit",),
    "resampler": ("vision_proj", *_XCOMPOSER2_SEPARATORS),
    "embeddings": ("model.tok_embeddings",),
    "llm": ("model", "output"),
}
# InternLM2's ChatML with its own tokens; the released tokenizer has no template, its texts are stripped.
_XCOMPOSER2_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[UNUSED_TOKEN_146]' + message['role'] + '\\n' + message['content'] | trim + '[UNUSED_TOKEN_145]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[UNUSED_TOKEN_146]assistant\\n' }}{% endif %}"
)


class TunedParts(TypedDict, total=False):
    """Which parts around the LLM train in full, as the flags ask; what is left out stays frozen.

    Keys:
        vision: ``--tune_vision``: the vision tower.
        resampler: ``--tune_resampler``: the resampler, 4.6's and 4.7's merger, and the projection of audio.
        audio: ``--tune_audio``: the audio encoder.
    """

    vision: bool
    resampler: bool
    audio: bool


@dataclass(frozen=True)
class Downsampling:
    """What a ``downsample_mode`` of 4.6 and 4.7 joins.

    Attributes:
        patches_per_feature: Patches that the vision tower joins into one feature.
        patches_per_token: Patches that one placeholder token stands for, behind the merger.
    """

    patches_per_feature: int
    patches_per_token: int


@dataclass(frozen=True)
class Hearing:
    """How a generation is told about audio, as its released ``chat`` does it.

    Attributes:
        per_second: Whether every second of audio has a placeholder of its own, or a whole audio has one.
        prompt_end: What follows the header of the answer when the conversation holds audio.
        chat_template: The template of conversations with audio, where it is not the checkpoint's own.
        merges: Whether the audios of one message are joined to one waveform.
        unit: What stands in front of every frame of a video with its sound, which is then cut into units of a second;
            empty: frames and the sound behind each.
    """

    per_second: bool
    prompt_end: str
    chat_template: str | None = None
    merges: bool = True
    unit: str = ""


# ChatML without the default system turn that the checkpoint's own template writes.
_PLAIN_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DOWNSAMPLING = {"16x": Downsampling(4, 16), "4x": Downsampling(1, 4)}


@dataclass(frozen=True)
class Generation:
    """The properties of one generation that code may depend on.

    Attributes:
        name: Short name, as used in file and test names.
        title: The name its users know.
        llm_types: Every value of ``--llm_type`` that is right for it; the first is that of the official scripts.
        llm: The transformers model type that holds the LLM's weights.
        family: The folder under ``models/`` that has its model class.
        vision: ``siglip`` (NaViT, patches of any grid), ``timm`` (V-2), ``clip`` (InternLM-XComposer2) or
            ``transformers`` (transformers' own tower of 4.6 and 4.7).
        positions: How the vision tower numbers patches: ``buckets`` (2-D, 70 x 70), ``one_row``
            (the 2.5 quirk: padded patches attend, ids along one row), ``resampled`` (V-2's table
            resized per image) or ``table`` (all others).
        prompt: ``template`` (the checkpoint's chat template) or ``minicpm`` (V-2's own markers).
        image_ids: True when every image's placeholder starts with ``<image_id>i</image_id>``.
        slice_tag: The tag around each slice of a sliced image: ``image`` with an outer
            ``<slice>`` wrapper (V-2, 2.5) or ``slice`` without one.
        turn_end: The token that ends an answer.
        thinking: True when the template takes ``enable_thinking``.
        thinks: Whether inference thinks unless it is told not to.
        frames: How inference takes frames from a video: ``step`` (every so many), ``packs`` (several share a
            placeholder and carry ``temporal_ids``) or ``seconds``; None: not trained on video.
        video_ids: Whether videos are numbered as images are; transformers' processor of 4.6 does so.
        image_ids_beside_video: Whether images are numbered in a conversation with a video.
        upright_images: Whether inference turns images as their EXIF orientation says.
        box_form: How names and boxes stand in a text: ``tags`` (``<ref>dog</ref><box>1 2 3 4</box>``) or ``brackets``
            (``dog [1, 2, 3, 4]``).
        content_parts: Whether the chat template takes a message as a list of texts and images.
        token_types: Whether the model takes ``mm_token_type_ids``.
        downsampling: What each value of ``downsample_mode`` joins; empty: there is no such setting.
        downsample_mode: The value where a checkpoint's files name none.
        modules: Part -> names of the modules (or parameters) that hold it. A parameter belongs to the
            first part one of whose names it starts with.
        hearing: How audio is written; None: the generation takes none.
        slicing: How images are cut: ``adaptive`` (V-2 to V-4.5), ``minicpmv46`` (4.6, 4.7), ``square`` (one
            square, the aspect not kept) or ``tiles`` (4khd).
        tokenizer: ``json`` (tokenizer.json) or ``sentencepiece`` (tokenizer.model).
        special_tokens: For SentencePiece tokenizers whose tokenizer_config.json does not list them.
        chat_template: For checkpoints that bring none.
        image_end: What follows an image that no placeholder mentions.
        lora_targets: What the launchers' default of ``--lora_target_modules`` stands for; empty: itself.
        adapter_parts: Parts that train in full beside an adapter, as far as they are tuned.
        saved_name_parts: Parts of a module's name that an adapter's ``modules_to_save`` needs. 4.6 and 4.7
            need two: ``merger`` alone would also match the vit_merger inside the vision tower.
        reads_inside_tower: Whether the released code reads attributes inside the vision tower (V-2), and so can't
            load an adapter that holds the tower.
        bare_parameters: Those of ``modules`` that are parameters of the model itself; PEFT can't train them in full.
        output_layer: Last part of the output layer's name.
        ties_output: Whether the output layer has the weight of the embeddings.
        exact: Linear layers inside the LLM that are never quantized and get no adapter, by last name.
        expert_parameters: Ends of the names of the parameters that hold the weights of all experts of a layer; empty:
            there are no experts.
    """

    name: str
    title: str
    llm_types: tuple[str, ...]
    llm: str
    family: str = "minicpmv"
    vision: str = "siglip"
    positions: str = "buckets"
    prompt: str = "template"
    image_ids: bool = True
    slice_tag: str = "slice"
    turn_end: str = "<|im_end|>"
    thinking: bool = False
    thinks: bool = False
    frames: str | None = "step"
    video_ids: bool = False
    image_ids_beside_video: bool = False
    upright_images: bool = False
    box_form: str = "tags"
    content_parts: bool = False
    token_types: bool = False
    downsampling: dict[str, Downsampling] = field(default_factory=dict)
    downsample_mode: str = "16x"
    hearing: Hearing | None = None
    modules: dict[str, tuple[str, ...]] = field(default_factory=lambda: _RELEASED_MODULES)
    slicing: str = "adaptive"
    tokenizer: str = "json"
    special_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    image_end: str = "\n"
    lora_targets: str = ""
    adapter_parts: tuple[str, ...] = ("embeddings", "resampler", "vision", "audio")
    saved_name_parts: int = 1
    reads_inside_tower: bool = False
    bare_parameters: tuple[str, ...] = ()
    output_layer: str = "lm_head"
    ties_output: bool = False
    exact: tuple[str, ...] = ()
    expert_parameters: tuple[str, ...] = ()

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to: a key of ``modules``, or ``lora``.

        Args:
            name: The parameter's name, with or without what adapters put around it.

        Example:
            >>> GENERATIONS["v2_6"].part_of("llm.model.layers.0.self_attn.q_proj.lora_A.default.weight")
            'lora'
            >>> GENERATIONS["v2_6"].part_of("base_model.model.resampler.modules_to_save.default.query")
            'resampler'
        """
        if ".lora_" in name:  # with the dot: the partial LoRA inside InternLM-XComposer2 is no adapter
            return "lora"
        plain = plain_name(name)
        for part, modules in self.modules.items():
            if plain in modules or plain.startswith(tuple(f"{module}." for module in modules)):
                return part
        raise AssertionError(f"parameter {name!r} belongs to no part of {self.title}")


def plain_name(name: str) -> str:
    """A parameter's own name, without what wrappers put around it.

    Example:
        >>> plain_name("base_model.model.resampler.modules_to_save.default.query")
        'resampler.query'
        >>> plain_name("module.base_model.model.llm.model.embed_tokens.weight")
        'llm.model.embed_tokens.weight'
    """
    return _WRAPPERS.sub("", name)


def _minicpmv46(name: str, title: str, *, llm: str = "qwen3_5", **own: Any) -> Generation:
    """A row of the models that transformers itself has."""
    return Generation(
        name, title, ("qwen", "qwen2"), llm, family="minicpmv46", vision="transformers",
        positions="table", thinking=True, frames="seconds", image_ids_beside_video=True, upright_images=True,
        content_parts=True, downsampling=DOWNSAMPLING, modules=_MINICPMV46_MODULES, slicing="minicpmv46",
        saved_name_parts=2, **own,
    )  # fmt: skip


def _xcomposer2(name: str, title: str, *, slicing: str) -> Generation:
    """A row of InternLM-XComposer2; the three differ in how they see images."""
    return Generation(
        name, title, ("internlm2",), "internlm2", family="xcomposer2", vision="clip",
        positions="table", image_ids=False, slice_tag="", turn_end="[UNUSED_TOKEN_145]", frames=None,
        modules=_XCOMPOSER2_MODULES, slicing=slicing, tokenizer="sentencepiece",
        special_tokens=("<unk>", "<s>", "</s>", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"),
        chat_template=_XCOMPOSER2_TEMPLATE, image_end="", box_form="brackets",
        lora_targets=r"model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))",
        adapter_parts=("resampler", "vision"), exact=("Plora_A", "Plora_B"), output_layer="output",
        bare_parameters=_XCOMPOSER2_SEPARATORS,
    )  # fmt: skip


GENERATIONS: dict[str, Generation] = {
    row.name: row
    for row in (
        Generation(
            "v2", "MiniCPM-V 2.0", ("minicpm",), "granite", vision="timm",
            positions="resampled", prompt="minicpm", image_ids=False, slice_tag="image",
            turn_end="</s>", frames=None, tokenizer="sentencepiece", reads_inside_tower=True,
        ),
        Generation(
            "v2_5", "MiniCPM-Llama3-V 2.5", ("llama3",), "llama", positions="one_row",
            image_ids=False, slice_tag="image", turn_end="<|eot_id|>", frames=None,
        ),
        Generation("v2_6", "MiniCPM-V 2.6", ("qwen", "qwen2"), "qwen2"),
        Generation(
            "o2_6", "MiniCPM-o 2.6", ("qwen", "qwen2"), "qwen2", modules=_OMNI_MODULES,
            hearing=Hearing(True, "<|spk_bos|><|spk|><|spk_eos|><|tts_bos|>", _PLAIN_CHATML, unit="<unit>"),
        ),
        Generation("v4", "MiniCPM-V 4.0", ("llama",), "llama"),
        Generation(
            "v4_5", "MiniCPM-V 4.5", ("qwen", "qwen2"), "qwen3", thinking=True, frames="packs"
        ),
        Generation(
            "o4_5", "MiniCPM-o 4.5", ("qwen", "qwen2"), "qwen3", thinking=True, modules=_OMNI_MODULES,
            hearing=Hearing(False, "<|tts_bos|>"),
        ),
        _minicpmv46("v4_6", "MiniCPM-V 4.6", video_ids=True, ties_output=True),
        _minicpmv46(
            "v4_6_thinking", "MiniCPM-V 4.6-Thinking", video_ids=True, ties_output=True, thinks=True
        ),
        _minicpmv46("v4_7", "MiniCPM-V 4.7", token_types=True, ties_output=True),
        _minicpmv46(
            "v4_7_moe", "MiniCPM-V 4.7-35B-A3B", llm="qwen3_5_moe", token_types=True,
            exact=("shared_expert_gate",),
            expert_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
        _minicpmv46("ocr_1", "MiniCPM-OCR 1.0", video_ids=True, ties_output=True, downsample_mode="4x"),
        _xcomposer2("xc2_7b", "InternLM-XComposer2 7B", slicing="square"),
        _xcomposer2("xc2_vl_7b", "InternLM-XComposer2-VL 7B", slicing="square"),
        _xcomposer2("xc2_4khd_7b", "InternLM-XComposer2-4KHD 7B", slicing="tiles"),
    )
}  # fmt: skip
