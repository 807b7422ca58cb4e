"""What differs between the MiniCPM-V generations, and the models of InternLM-XComposer2, as data.

One row per generation. Code elsewhere asks the row for a property (``generation.image_ids``) and
never compares versions, so that adding a generation is adding a row.

Source: the released config.json, modeling and processing files of each checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from minicpm_tune.errors import UserError

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
    "resampler": ("resampler", "audio_projection_layer"),
    "embeddings": ("llm.model.embed_tokens",),
    "llm": ("llm",),
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


# Values of model_type: as released; and in derivatives and the official 4-bit files.
XCOMPOSER2_TYPES = ("internlmxcomposer2", "internlm")
# Keys of V-2's config.json that V-1.0 lacks.
_V2_SLICING = {"slice_mode", "max_slice_nums", "scale_resolution"}
# config.json of 7b and vl-7b; 4khd has 16384.
_XC2_MAX_LENGTH = 4096
_XC2_SMALL_IMAGE = 224  # pixels: 7b; vl-7b has 490


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
    """

    per_second: bool
    prompt_end: str
    chat_template: str | None = None
    merges: bool = True


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
        llm_type: What the official scripts call it in ``--llm_type``.
        accepted_llm_types: Every value of ``--llm_type`` that is right for it, older names included.
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
    """

    name: str
    title: str
    llm_type: str
    accepted_llm_types: tuple[str, ...]
    llm: str
    family: str = "minicpmv"
    vision: str = "siglip"
    positions: str = "buckets"
    prompt: str = "template"
    image_ids: bool = True
    slice_tag: str = "slice"
    turn_end: str = "<|im_end|>"
    thinking: bool = False
    frames: str | None = "step"
    video_ids: bool = False
    image_ids_beside_video: bool = False
    upright_images: bool = False
    box_form: str = "tags"
    content_parts: bool = False
    token_types: bool = False
    downsampling: dict[str, Downsampling] = field(default_factory=dict)
    hearing: Hearing | None = None
    modules: dict[str, tuple[str, ...]] = field(default_factory=lambda: _RELEASED_MODULES)
    slicing: str = "adaptive"
    tokenizer: str = "json"
    special_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    image_end: str = "\n"
    lora_targets: str = ""
    adapter_parts: tuple[str, ...] = ("embeddings", "resampler", "vision")
    saved_name_parts: int = 1
    reads_inside_tower: bool = False
    bare_parameters: tuple[str, ...] = ()
    output_layer: str = "lm_head"
    ties_output: bool = False
    exact: tuple[str, ...] = ()

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


def _minicpmv46(name: str, title: str, *, video_ids: bool, token_types: bool) -> Generation:
    """A row of the two generations that transformers itself has."""
    return Generation(
        name, title, "qwen", ("qwen", "qwen2"), "qwen3_5", family="minicpmv46", vision="transformers",
        positions="table", thinking=True, frames="seconds",
        video_ids=video_ids, image_ids_beside_video=True, upright_images=True, content_parts=True,
        token_types=token_types, downsampling=DOWNSAMPLING, modules=_MINICPMV46_MODULES, slicing="minicpmv46",
        saved_name_parts=2, ties_output=True,
    )  # fmt: skip


def _xcomposer2(name: str, title: str, *, slicing: str) -> Generation:
    """A row of InternLM-XComposer2; the three differ in how they see images."""
    return Generation(
        name, title, "internlm2", ("internlm2",), "internlm2", family="xcomposer2", vision="clip",
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
            "v2", "MiniCPM-V 2.0", "minicpm", ("minicpm",), "granite", vision="timm",
            positions="resampled", prompt="minicpm", image_ids=False, slice_tag="image",
            turn_end="</s>", frames=None, tokenizer="sentencepiece", reads_inside_tower=True,
        ),
        Generation(
            "v2_5", "MiniCPM-Llama3-V 2.5", "llama3", ("llama3",), "llama", positions="one_row",
            image_ids=False, slice_tag="image", turn_end="<|eot_id|>", frames=None,
        ),
        Generation("v2_6", "MiniCPM-V 2.6", "qwen", ("qwen", "qwen2"), "qwen2"),
        Generation(
            "o2_6", "MiniCPM-o 2.6", "qwen", ("qwen", "qwen2"), "qwen2", modules=_OMNI_MODULES,
            adapter_parts=("embeddings", "resampler", "vision", "audio"),
            hearing=Hearing(True, "<|spk_bos|><|spk|><|spk_eos|><|tts_bos|>", _PLAIN_CHATML),
        ),
        Generation("v4", "MiniCPM-V 4.0", "llama", ("llama",), "llama"),
        Generation(
            "v4_5", "MiniCPM-V 4.5", "qwen", ("qwen", "qwen2"), "qwen3", thinking=True, frames="packs"
        ),
        Generation(
            "o4_5", "MiniCPM-o 4.5", "qwen", ("qwen", "qwen2"), "qwen3", thinking=True, modules=_OMNI_MODULES,
            adapter_parts=("embeddings", "resampler", "vision", "audio"), hearing=Hearing(False, "<|tts_bos|>"),
        ),
        _minicpmv46("v4_6", "MiniCPM-V 4.6", video_ids=True, token_types=False),
        _minicpmv46("v4_7", "MiniCPM-V 4.7", video_ids=False, token_types=True),
        _xcomposer2("xc2_7b", "InternLM-XComposer2 7B", slicing="square"),
        _xcomposer2("xc2_vl_7b", "InternLM-XComposer2-VL 7B", slicing="square"),
        _xcomposer2("xc2_4khd_7b", "InternLM-XComposer2-4KHD 7B", slicing="tiles"),
    )
}  # fmt: skip


class UnknownCheckpointError(UserError):
    """A config.json that is none of the generations this project trains."""


class LlmTypeError(UserError):
    """An --llm_type that contradicts the checkpoint."""


def detect_generation(
    config: dict[str, Any], tokens: Collection[str] = (), tensors: Collection[str] = ()
) -> Generation:
    """Tell the generation of a checkpoint from its config.json, never from its path.

    The model type decides 4.6 and 4.7; ``version`` decides the rest where it is present;
    V-2, which has none, is known by its MiniCPM scalings and its top-level slice fields. A
    checkpoint of 2.6 or later without ``version`` is told apart by what its LLM needs: biases
    on q, k, v (2.6), the Llama form (4), or Qwen3's think tokens (4.5). MiniCPM-V 1.0 and
    InternLM-XComposer 2.5 share a model type with one of these, and are refused by name.

    Args:
        config: The parsed config.json.
        tokens: The tokenizer's special tokens; used only when the config leaves two generations.
        tensors: Names of the stored weights, where they are at hand: 4khd and MiniCPM-o 4.5 have some that their
            relatives lack.

    Returns:
        The row of ``GENERATIONS``.

    Raises:
        UnknownCheckpointError: When no generation fits; the message names what was looked at.

    Example:
        >>> detect_generation({"model_type": "minicpmv", "version": 2.6}).title
        'MiniCPM-V 2.6'
    """
    model_type = str(config.get("model_type", ""))
    by_type = {"minicpmv4_6": "v4_6", "minicpmv4_7": "v4_7"}
    if model_type in by_type:
        return GENERATIONS[by_type[model_type]]
    _refuse_relatives(config, tensors)
    if model_type == "minicpmo":
        return GENERATIONS[_omni_model(config, tensors)]
    if model_type in XCOMPOSER2_TYPES:
        return GENERATIONS[_xcomposer2_model(config, tensors)]
    if model_type != "minicpmv":
        raise UnknownCheckpointError(
            f"config.json: model_type is {model_type or 'missing'!r}, expected 'minicpmv', 'minicpmo', "
            "'minicpmv4_6' or 'minicpmv4_7' (MiniCPM-V), or 'internlmxcomposer2' or 'internlm' "
            "(InternLM-XComposer2). Give --model_name_or_path such a checkpoint."
        )
    by_version = {"2.5": "v2_5", "2.6": "v2_6", "4": "v4", "4.0": "v4", "4.5": "v4_5"}
    version = config.get("version")
    if version is not None:
        if str(version) in by_version:
            return GENERATIONS[by_version[str(version)]]
        raise UnknownCheckpointError(
            f"config.json: version is {version!r}, expected one of {', '.join(by_version)}, or none for V-2. "
            "Use a release of this tool that knows that generation."
        )
    return GENERATIONS[_generation_without_version(config, tokens)]


def _refuse_relatives(config: dict[str, Any], tensors: Collection[str]) -> None:
    """Refuse models that look like one of the generations in config.json, and are another."""
    if config.get("model_type") == "minicpmv" and "scale_emb" in config and not _V2_SLICING & config.keys():
        title = "MiniCPM-V 1.0"
    elif "2d5" in _class_names(config) or (
        config.get("model_type") == "internlm2" and "XComposer2" in _class_names(config)
    ):
        title = "InternLM-XComposer 2.5"
    else:
        return
    known = ", ".join(row.title for row in GENERATIONS.values())
    raise UnknownCheckpointError(
        f"config.json: this is {title}, which can't be trained here; expected one of {known}. Give "
        "--model_name_or_path another checkpoint."
    )


def _omni_model(config: dict[str, Any], tensors: Collection[str]) -> str:
    """By its version; without one by o-4.5's Qwen3 LLM, which has norms on queries and keys and names its head size."""
    by_version = {"2.6": "o2_6", "4.5": "o4_5"}
    version = config.get("version")
    if version is None:
        norms = any(name.endswith("self_attn.q_norm.weight") for name in tensors)
        return "o4_5" if norms or config.get("head_dim") is not None else "o2_6"
    if str(version) not in by_version:
        raise UnknownCheckpointError(
            f"config.json: model_type is 'minicpmo' and version is {version!r}, expected one of "
            f"{', '.join(by_version)}. Use a release of this tool that knows that generation."
        )
    return by_version[str(version)]


def _class_names(config: dict[str, Any]) -> str:
    """The names of the released classes and files, in one text."""
    return " ".join(
        [*(config.get("architectures") or ()), *map(str, (config.get("auto_map") or {}).values())]
    )


def _xcomposer2_model(config: dict[str, Any], tensors: Collection[str]) -> str:
    """4khd by its separators, its class, its longer ``max_length``, or as the one without an image size.

    The other two by the size of their image.
    """
    names = _class_names(config)
    if "XComposer2" not in names and "InternLM2ForCausalLM" not in names:
        raise UnknownCheckpointError(
            f"config.json: model_type is {config['model_type']!r} and architectures is "
            f"{config.get('architectures')!r}, expected InternLMXComposer2ForCausalLM. Give --model_name_or_path an "
            "InternLM-XComposer2 checkpoint."
        )
    if tensors:
        tiles = "plora_glb_GN" in tensors
    else:
        tiles = (
            "4khd" in names.lower()
            or config.get("max_length", 0) > _XC2_MAX_LENGTH
            or "img_size" not in config
        )
    if tiles:
        return "xc2_4khd_7b"
    return "xc2_7b" if config.get("img_size", 0) <= _XC2_SMALL_IMAGE else "xc2_vl_7b"


def _generation_without_version(config: dict[str, Any], tokens: Collection[str]) -> str:
    if "scale_emb" in config or "vision_encoder" in config:
        return "v2"
    if config.get("batch_3d_resampler") or "<think>" in tokens:
        return "v4_5"
    if "<|start_header_id|>" in tokens or config.get("vision_config", {}).get("model_type") == "idefics2":
        return "v2_5"
    if "<|endoftext|>" in tokens or "max_window_layers" in config:
        return "v2_6"
    if "head_dim" in config or "mlp_bias" in config:
        return "v4"
    raise UnknownCheckpointError(
        "config.json: model_type is 'minicpmv', and nothing else tells the generation (looked at "
        "version, scale_emb, vision_encoder, batch_3d_resampler, vision_config.model_type, "
        'max_window_layers, head_dim). Add the checkpoint\'s "version" to its config.json.'
    )


def check_llm_type(generation: Generation, llm_type: str) -> None:
    """Refuse an ``--llm_type`` that contradicts the checkpoint.

    Raises:
        LlmTypeError: When the value belongs to another generation; the message says which is right.
    """
    if llm_type != "auto" and llm_type not in generation.accepted_llm_types:
        raise LlmTypeError(
            f"--llm_type {llm_type} does not fit this checkpoint, which is {generation.title}: expected "
            f"--llm_type {' or '.join(generation.accepted_llm_types)} (or auto, the default)."
        )
