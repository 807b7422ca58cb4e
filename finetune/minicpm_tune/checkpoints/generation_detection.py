"""Which of the generations a checkpoint is: told from what its files say, never from its path."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from minicpm_tune.checkpoints.model_generations import GENERATIONS, Generation
from minicpm_tune.errors import UserError

# Value of model_type of the models that transformers itself has -> LLM in ``text_config`` -> the generation.
NATIVE_TYPES = {
    "minicpmv4_6": {"qwen3_5_text": "v4_6"},
    "minicpmv4_7": {"qwen3_5_text": "v4_7", "qwen3_5_moe_text": "v4_7_moe"},
    "minicpm_ocr": {"qwen3_5_text": "ocr_1"},
}
# Values of model_type: as released; and in derivatives and the official 4-bit files.
XCOMPOSER2_TYPES = ("internlmxcomposer2", "internlm")
# Keys of V-2's config.json that V-1.0 lacks.
_V2_SLICING = {"slice_mode", "max_slice_nums", "scale_resolution"}
# config.json of 7b and vl-7b; 4khd has 16384.
_XC2_MAX_LENGTH = 4096
_XC2_SMALL_IMAGE = 224  # pixels: 7b; vl-7b has 490


class UnknownCheckpointError(UserError):
    """A config.json that is none of the generations this project trains."""


class LlmTypeError(UserError):
    """An --llm_type that contradicts the checkpoint."""


def detect_generation(
    config: dict[str, Any],
    tokens: Collection[str] = (),
    tensors: Collection[str] = (),
    *,
    thinks: bool = False,
) -> Generation:
    """Tell the generation of a checkpoint from its config.json, never from its path.

    The model type decides the models that transformers itself has; ``version`` decides the rest where it is present;
    V-2, which has none, is known by its MiniCPM scalings and its top-level slice fields. A
    checkpoint of 2.6 or later without ``version`` is told apart by what its LLM needs: biases
    on q, k, v (2.6), the Llama form (4), or Qwen3's think tokens (4.5). MiniCPM-V 1.0 and
    InternLM-XComposer 2.5 share a model type with one of these, and are refused by name.

    Args:
        config: The parsed config.json.
        tokens: The tokenizer's special tokens; used only when the config leaves two generations.
        tensors: Names of the stored weights, where they are at hand: 4khd and MiniCPM-o 4.5 have some that their
            relatives lack.
        thinks: Whether the chat template opens thoughts unless it is told not to; this alone tells MiniCPM-V
            4.6-Thinking from 4.6. Without a meaning for models whose released ``chat`` decides it.

    Returns:
        The row of ``GENERATIONS``.

    Raises:
        UnknownCheckpointError: When no generation fits; the message names what was looked at.

    Example:
        >>> detect_generation({"model_type": "minicpmv", "version": 2.6}).title
        'MiniCPM-V 2.6'
    """
    model_type = str(config.get("model_type", ""))
    if model_type in NATIVE_TYPES:
        return _native_model(config, thinks=thinks)
    _refuse_relatives(config, tensors)
    if model_type == "minicpmo":
        return GENERATIONS[_omni_model(config, tensors)]
    if model_type in XCOMPOSER2_TYPES:
        return GENERATIONS[_xcomposer2_model(config, tensors)]
    if model_type != "minicpmv":
        raise UnknownCheckpointError(
            f"config.json: model_type is {model_type or 'missing'!r}, expected 'minicpmv', 'minicpmo', "
            "'minicpmv4_6', 'minicpmv4_7' or 'minicpm_ocr' (MiniCPM), or 'internlmxcomposer2' or 'internlm' "
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


def _native_model(config: dict[str, Any], *, thinks: bool) -> Generation:
    """By the LLM, which transformers takes for a Qwen3.5 without experts where ``text_config`` does not name it."""
    known = NATIVE_TYPES[config["model_type"]]
    llm = (config.get("text_config") or {}).get("model_type", "qwen3_5_text")
    if llm not in known:
        raise UnknownCheckpointError(
            f"config.json: model_type is {config['model_type']!r} and text_config.model_type is {llm!r}, expected "
            f"{' or '.join(known)}. Use a release of this tool that knows that model."
        )
    row = GENERATIONS[known[llm]]
    if not thinks:
        return row
    return GENERATIONS.get(f"{row.name}_thinking", replace(row, thinks=True))


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
