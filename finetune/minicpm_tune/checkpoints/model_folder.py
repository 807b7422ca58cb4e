"""A model folder's small files: its config.json and its tokenizer.

Nothing here runs code from the folder. Tokenizers are loaded as plain fast tokenizers from
``tokenizer.json``, because on transformers 5 the released classes lose their pre-tokenizer (2.6 and later)
or rebuild their normalizer (Llama-based ones). MiniCPM-V 2.0 and InternLM-XComposer2 have no
``tokenizer.json``; ``checkpoints/vocabulary.py`` builds their tokenizers from
``tokenizer.model``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minicpm_tune.checkpoints.generation_detection import NATIVE_TYPES, XCOMPOSER2_TYPES, detect_generation
from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.vocabulary import add_tokens, build_tokenizer
from minicpm_tune.checkpoints.weight_files import has_weights, tensor_names
from minicpm_tune.errors import UserError

# Keys of tokenizer_config.json that are for the released classes, not for a plain tokenizer.
_CLASS_KEYS = ("tokenizer_class", "auto_map", "added_tokens_decoder", "backend", "processor_class")


# What a training or an export can need of a hub repository; pictures and other formats stay there.
_HUB_PATTERNS = ("*.json", "*.py", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_HUB_WEIGHTS = ("*.safetensors", "*.bin")


class ModelFolderError(UserError):
    """A model folder that lacks something, or holds something that can't be used."""


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
            has_safetensors = (folder / "model.safetensors.index.json").is_file() or not (
                folder / "pytorch_model.bin.index.json"
            ).is_file()
            patterns = [*_HUB_PATTERNS, _HUB_WEIGHTS[0] if has_safetensors else _HUB_WEIGHTS[1]]
            folder = Path(download(hub_id, cache_dir=cache_dir, allow_patterns=patterns))
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


def added_tokens(folder: str | Path) -> list[str]:
    """The tokens that tokenizer_config.json adds, which tell generations apart."""
    decoder = read_settings(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    return [entry["content"] for entry in decoder.values()]


def read_generation(folder: str | Path) -> Generation:
    """Tell a model folder's generation from its files; see ``generation_detection``."""
    config = read_config(folder)
    # These alone are told apart by their tensors as well.
    by_weights = config["model_type"] in (*XCOMPOSER2_TYPES, "minicpmo") and has_weights(Path(folder))
    tensors = tensor_names(Path(folder)) if by_weights else ()
    # Their inference is the template's own default; that of the others is what the released chat() asks for.
    thinks = config["model_type"] in NATIVE_TYPES and _opens_thoughts(Path(folder))
    return detect_generation(config, added_tokens(folder), tensors, thinks=thinks)


def _opens_thoughts(folder: Path) -> bool:
    """Whether the chat template, asked for nothing, lets the answer start with thoughts."""
    template = _chat_template(folder, read_settings(folder, "tokenizer_config.json"))
    if not isinstance(template, str):
        return False
    question = [{"role": "user", "content": "?"}]
    try:
        rendered: Any = render_jinja_template([question], chat_template=template, add_generation_prompt=True)
    except TemplateError:
        return False  # ``data/prompts.py`` tells what is wrong with it
    return rendered[0][0].rstrip().endswith("<think>")


def load_tokenizer(folder: str | Path, generation: Generation) -> PreTrainedTokenizerFast:
    """Load a model folder's tokenizer as a plain fast tokenizer.

    Args:
        folder: The model folder.
        generation: Its generation, which says whether there is a ``tokenizer.json``.

    Returns:
        The tokenizer, with the folder's special tokens and chat template (V-2 has none).

    Raises:
        ModelFolderError: If the tokenizer's files are missing.
    """
    folder = Path(folder)
    settings = read_settings(folder, "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder", {})
    settings = {key: value for key, value in settings.items() if key not in _CLASS_KEYS}
    settings["chat_template"] = _chat_template(folder, settings) or generation.chat_template
    if generation.tokenizer == "sentencepiece":
        listed = [entry for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))]
        special = [entry["content"] for entry in listed if entry.get("special", True)]
        special += [token for token in generation.special_tokens if token not in special]
        backend = build_tokenizer(
            _existing(folder / "tokenizer.model"),
            special_tokens=special,
            add_bos=settings.get("add_bos_token", True),
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
        add_tokens(tokenizer, [entry["content"] for entry in listed if entry["content"] not in special])
        return tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(_existing(folder / "tokenizer.json")), **settings)
    vocabulary = tokenizer.get_vocab()
    missing = [entry["content"] for entry in decoder.values() if entry["content"] not in vocabulary]
    if missing:
        raise ModelFolderError(
            f"{folder / 'tokenizer.json'}: lacks {', '.join(missing[:5])}, which tokenizer_config.json lists, "
            "expected both to hold the same tokens. Download the tokenizer files again."
        )
    return tokenizer


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The precision that a model folder's config.json names; float32 when it names none."""
    config = read_config(folder)
    name = config.get("torch_dtype") or config.get("dtype")
    return getattr(torch, name) if name else torch.float32


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelFolderError(
            f"{path.parent}: found no {path.name}, expected the model's own tokenizer. Copy the tokenizer files into "
            "the folder, or download the model again."
        )
    return path


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
