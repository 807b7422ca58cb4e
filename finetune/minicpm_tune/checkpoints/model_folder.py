"""A model folder's small files: where it is, its config.json, and which of the generations these tell.

Nothing here runs code from the folder, and the path tells nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from minicpm_tune.checkpoints.model_generations import GENERATIONS, Generation
from minicpm_tune.checkpoints.weight_files import INDEX_FILES, has_weights, tensor_names
from minicpm_tune.errors import UserError

# What a training or an export can need of a hub repository; pictures and other formats stay there.
_HUB_PATTERNS = ("*.json", "*.py", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# Value of model_type of the models that transformers itself has -> LLM in ``text_config`` -> the generation.
_NATIVE_TYPES = {
    "minicpmv4_6": {"qwen3_5_text": "v4_6"},
    "minicpmv4_7": {"qwen3_5_text": "v4_7", "qwen3_5_moe_text": "v4_7_moe"},
    "minicpm_ocr": {"qwen3_5_text": "ocr_1"},
}
# Values of model_type: as released; and in derivatives and the official 4-bit files.
_XCOMPOSER2_TYPES = ("internlmxcomposer2", "internlm")
# Keys of V-2's config.json that V-1.0 lacks.
_V2_SLICING = {"slice_mode", "max_slice_nums", "scale_resolution"}
# config.json of 7b and vl-7b; 4khd has 16384.
_XC2_MAX_LENGTH = 4096
_XC2_SMALL_IMAGE = 224  # pixels: 7b; vl-7b has 490


class ModelFolderError(UserError):
    """A model folder that lacks something, or holds something that can't be used."""


class UnknownCheckpointError(UserError):
    """A config.json that is none of the generations this project trains."""


class LlmTypeError(UserError):
    """An --llm_type that contradicts the checkpoint."""


def resolve_model_folder(name_or_path: str, *, cache_dir: str | None = None, weights: bool = True) -> Path:
    """Give the folder of a checkpoint, downloading it first when it is a hub id.

    Downloads follow huggingface_hub's own settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN).
    Where a repository has several weight formats, safetensors alone are downloaded.

    Args:
        name_or_path: A folder, or ``owner/name`` on the hub.
        cache_dir: Where downloads go; huggingface_hub's default when None.
        weights: False fetches the configuration and tokenizer files alone.

    Raises:
        ModelFolderError: When it is neither; the message says which of the two was tried.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelFolderError(
                f"--model_name_or_path {name_or_path}: the folder has no config.json. Expected a MiniCPM-V checkpoint."
            )
        return folder.resolve()
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise ModelFolderError(
            f"--model_name_or_path {name_or_path}: no such folder. Give a checkpoint's folder, or a hub id such "
            "as openbmb/MiniCPM-V-2_6."
        )
    return _download(name_or_path, cache_dir=cache_dir, weights=weights)


def _download(hub_id: str, *, cache_dir: str | None, weights: bool) -> Path:
    download = _downloader()
    try:
        folder = Path(download(hub_id, cache_dir=cache_dir, allow_patterns=list(_HUB_PATTERNS)))
        if weights:
            safetensors, bins = ((folder / name).is_file() for name in INDEX_FILES)
            kind = "*.bin" if bins and not safetensors else "*.safetensors"
            folder = Path(download(hub_id, cache_dir=cache_dir, allow_patterns=[*_HUB_PATTERNS, kind]))
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"--model_name_or_path {hub_id}: no such folder here, and it can't be downloaded from the hub "
            f"({error}). Check the name. Without a network, download the checkpoint elsewhere and give its folder."
        ) from error
    return folder


def _downloader() -> Callable[..., str]:
    """What downloads from the Hugging Face Hub, or with USE_MODELSCOPE_HUB=1 from ModelScope, under the same names.

    Raises:
        ModelFolderError: When the variable is set without the package.
    """
    if os.environ.get("USE_MODELSCOPE_HUB", "").lower() not in ("1", "true", "yes", "on"):
        return snapshot_download
    try:
        from modelscope import snapshot_download as modelscope_download
    except ImportError as error:
        raise ModelFolderError(
            "USE_MODELSCOPE_HUB is set, but the package modelscope is not installed. Install it (pip install "
            "modelscope), or unset the variable to download from the Hugging Face Hub."
        ) from error
    return modelscope_download


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        ModelFolderError: If there is none, or it is not the configuration of a model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelFolderError(
            f"{folder}: found no config.json, expected a model folder. Give --model_name_or_path the folder that "
            "holds config.json, or a hub id."
        )
    config = _read_json(path)
    if "model_type" not in config:
        raise ModelFolderError(
            f"{path}: found no model_type, expected the configuration of a model. If this is an adapter folder, give "
            "--model_name_or_path the base model's folder."
        )
    return config


def read_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """Read one of a model folder's small JSON files; empty when there is none."""
    path = Path(folder) / name
    return _read_json(path) if path.is_file() else {}


def chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """The text of a model folder's chat template, else what tokenizer_config.json (``settings``) has of one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The precision that a model folder's config.json names; float32 when it names none."""
    config = read_config(folder)
    name = config.get("torch_dtype") or config.get("dtype")
    return getattr(torch, name) if name else torch.float32


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFolderError(f"{path}: not readable as JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelFolderError(
            f"{path}: found a JSON {type(value).__name__}, expected an object. Download the file again."
        )
    return value


def read_generation(folder: str | Path) -> Generation:
    """Tell a model folder's generation from its files; see ``detect_generation``."""
    config = read_config(folder)
    # These alone are told apart by their tensors as well.
    by_weights = config["model_type"] in (*_XCOMPOSER2_TYPES, "minicpmo") and has_weights(Path(folder))
    tensors = tensor_names(Path(folder)) if by_weights else ()
    # Their inference is the template's own default; that of the others is what the released chat() asks for.
    thinks = config["model_type"] in _NATIVE_TYPES and _opens_thoughts(Path(folder))
    decoder = read_settings(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    tokens = [entry["content"] for entry in decoder.values()]
    return detect_generation(config, tokens, tensors, thinks=thinks)


def _opens_thoughts(folder: Path) -> bool:
    """Whether the chat template, asked for nothing, lets the answer start with thoughts."""
    template = chat_template(folder, read_settings(folder, "tokenizer_config.json"))
    if not isinstance(template, str):
        return False
    question = [{"role": "user", "content": "?"}]
    try:
        rendered: Any = render_jinja_template([question], chat_template=template, add_generation_prompt=True)
    except TemplateError:
        return False  # ``data/prompts.py`` tells what is wrong with it
    return rendered[0][0].rstrip().endswith("<think>")


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
    if model_type in _NATIVE_TYPES:
        return _native_model(config, thinks=thinks)
    _refuse_relatives(config)
    if model_type == "minicpmo":
        return GENERATIONS[_omni_model(config, tensors)]
    if model_type in _XCOMPOSER2_TYPES:
        return GENERATIONS[_xcomposer2_model(config, tensors)]
    if model_type != "minicpmv":
        raise UnknownCheckpointError(
            f"config.json: model_type is {model_type or 'missing'!r}, expected 'minicpmv', 'minicpmo', "
            "'minicpmv4_6', 'minicpmv4_7' or 'minicpm_ocr' (MiniCPM), or 'internlmxcomposer2' or 'internlm' "
            "(InternLM-XComposer2). Give --model_name_or_path such a checkpoint."
        )
    by_version = {"2.5": "v2_5", "2.6": "v2_6", "4": "v4", "4.0": "v4", "4.5": "v4_5"}
    version = config.get("version")
    if version is None:
        return GENERATIONS[_generation_without_version(config, tokens)]
    if str(version) not in by_version:
        raise UnknownCheckpointError(
            f"config.json: version is {version!r}, expected one of {', '.join(by_version)}, or none for V-2. "
            "Use a release of this tool that knows that generation."
        )
    return GENERATIONS[by_version[str(version)]]


def _native_model(config: dict[str, Any], *, thinks: bool) -> Generation:
    """By the LLM, which transformers takes for a Qwen3.5 without experts where ``text_config`` does not name it."""
    known = _NATIVE_TYPES[config["model_type"]]
    llm = (config.get("text_config") or {}).get("model_type", "qwen3_5_text")
    if llm not in known:
        raise UnknownCheckpointError(
            f"config.json: model_type is {config['model_type']!r} and text_config.model_type is {llm!r}, expected "
            f"{' or '.join(known)}. Use a release of this tool that knows that model."
        )
    row = GENERATIONS[known[llm]]
    return GENERATIONS.get(f"{row.name}_thinking", replace(row, thinks=True)) if thinks else row


def _refuse_relatives(config: dict[str, Any]) -> None:
    """Refuse models that look like one of the generations in config.json, and are another."""
    model_type, names = config.get("model_type"), _class_names(config)
    if model_type == "minicpmv" and "scale_emb" in config and not _V2_SLICING & config.keys():
        title = "MiniCPM-V 1.0"
    elif "2d5" in names or (model_type == "internlm2" and "XComposer2" in names):
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
    longer = config.get("max_length", 0) > _XC2_MAX_LENGTH
    looks_tiled = "4khd" in names.lower() or longer or "img_size" not in config
    tiles = "plora_glb_GN" in tensors if tensors else looks_tiled
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
    if llm_type != "auto" and llm_type not in generation.llm_types:
        raise LlmTypeError(
            f"--llm_type {llm_type} does not fit this checkpoint, which is {generation.title}: expected "
            f"--llm_type {' or '.join(generation.llm_types)} (or auto, the default)."
        )
