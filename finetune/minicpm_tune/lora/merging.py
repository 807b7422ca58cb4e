"""Adapters for use elsewhere: merged into the base model, with a check that nothing else changed, or for llama.cpp.

llama.cpp converts adapters of the LLM as a model by itself: ``base_model.model.model.layers...``, where an adapter of
MiniCPM-V has ``base_model.model.llm.model.layers...``. It scales them by alpha / r, whatever the adapter's
settings say (convert_lora_to_gguf.py of 2026, ``get_base_tensor_name`` and ``LoraModel``).

Letters: T tokens of the probe prompt, V vocabulary.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.weight_files import tensor_names, tensors_in_file
from minicpm_tune.data.samples import Processing
from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.errors import UserError
from minicpm_tune.lora.adapter_folders import WEIGHT_FILES, AdapterError, AdapterFolder, write_adapter_config

PROBE_QUESTION = "\nWhat is in the image?"
PROBE_SIZE = (640, 400)  # in pixels; every generation cuts it into slices
# A merge that changes logits by more than this share of the largest one went wrong; rounding an 8B model's
# weights to bf16 changes them by about 1 %.
LARGEST_CHANGE = 0.1
_WRAPPED = "base_model.model."
_LORA_WEIGHT = re.compile(r".*\.lora_[AB]\.weight")


class MergeError(UserError):
    """An adapter that can't be merged."""


def probe_logits(model: Any, processing: Processing) -> Tensor:
    """Logits of a fixed prompt with an image that is cut into slices, [T, V] fp32 on the CPU."""
    wide, high = PROBE_SIZE
    across, down = np.meshgrid(np.linspace(0, 255, wide), np.linspace(0, 255, high))
    picture = Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))
    turns = [Turn("user", (Media("image", 0), PROBE_QUESTION))]
    sample = processing.encode_prompt(turns, [picture])
    with torch.no_grad():
        output = model(
            input_ids=sample["input_ids"][None].to(model.device),
            pixel_values=sample["pixel_values"].to(model.device),
            tgt_sizes=sample["tgt_sizes"],
            image_bound=pad(sample["image_bound"], (1, 0)),  # all in row 0
        )
    return output.logits[0].float().cpu()


def merge(model: PeftModel, processing: Processing) -> tuple[PreTrainedModel, str]:
    """Merge a model's adapter, and compare the probe's logits before and after.

    Every layer is merged in fp32, and rounded once to its own precision.

    Args:
        model: The base model with its adapter.
        processing: The checkpoint's ``Processing``.

    Returns:
        The base model with the adapter in its weights, and in words what adapter and merging do to the logits.

    Raises:
        MergeError: When the logits change by more than rounding explains.
    """
    with model.disable_adapter():
        base = probe_logits(model, processing)
    before = probe_logits(model, processing)
    if model.active_peft_config.layer_replication:
        _unshare_weights(_llm_layers(model.get_base_model()))
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        with _in_fp32(layer.get_base_layer()):
            layer.merge(safe_merge=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = model.merge_and_unload()
    merged.requires_grad_(False)
    _update_config(merged)
    after = probe_logits(merged, processing)
    largest, change = before.abs().max().item(), (after - before).abs().max().item()
    same = int((after.argmax(-1) == before.argmax(-1)).sum())
    report = (
        f"probe of {len(after)} tokens, largest logit {largest:.3g}: the adapter changes logits "
        f"by up to {(before - base).abs().max().item():.3g}, merging it by up to {change:.3g}; the most "
        f"likely token is the same at {same} of {len(after)} positions."
    )
    if not change <= LARGEST_CHANGE * largest:  # also when it is not a number
        raise MergeError(
            f"Merging changed the model: {report} Expected a change of at most {LARGEST_CHANGE:.0%} of the largest "
            "logit. Merge in higher precision, with --dtype fp32."
        )
    return merged, report


@contextmanager
def _in_fp32(layer: nn.Module) -> Iterator[None]:
    held = {name: value.dtype for name, value in layer.named_parameters(recurse=False)}
    for value in layer.parameters(recurse=False):
        value.data = value.data.float()
    try:
        yield
    finally:
        for name, value in layer.named_parameters(recurse=False):
            value.data = value.data.to(held[name])


def _unshare_weights(layers: nn.ModuleList) -> None:
    """Give every replicated layer its own weights; a shared weight would get the adapters of all its copies.

    PEFT means to refuse that case, but looks in the wrong place (0.21).
    """
    seen: set[int] = set()
    for module in layers.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) in seen:
                setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=False))
            seen.add(id(value))


def _llm_layers(model: Any) -> nn.ModuleList:
    return getattr(model, "llm", model).model.layers


def _update_config(model: PreTrainedModel) -> None:
    """Write into the configuration what the merge changed: more layers, a separate output layer."""
    inner, outer = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    text = model.config.get_text_config()
    untied = bool(text.tie_word_embeddings or model.config.tie_word_embeddings) and inner is not outer
    released = getattr(model.config, "released", None)
    if untied:
        model.config.tie_word_embeddings = text.tie_word_embeddings = False
    if released is None:
        return
    if untied:
        released["tie_word_embeddings"] = False
    layers = len(_llm_layers(model))
    if layers != released["num_hidden_layers"]:
        released["num_hidden_layers"] = text.num_hidden_layers = layers


def check_saved(saved: Path, base: Path, *, taller: bool, tied: Collection[str] = ()) -> None:
    """Check that the files hold the base model's tensors, by name.

    Args:
        saved: The merged model's folder.
        base: The base model's folder, in full precision.
        taller: Whether layer replication added layers.
        tied: Names of tensors that are copies of others; some tools write them into the base's files.

    Raises:
        MergeError: When tensors are missing, or unknown to the base model.
    """
    found, expected = tensor_names(saved), tensor_names(base)
    missing = sorted(expected - found - set(tied))
    new = sorted(name for name in found - expected if not taller and "lm_head" not in name)
    if missing or new:
        raise MergeError(
            f"{saved}: {len(missing)} tensors of the base model are missing and {len(new)} are new (the first is "
            f"{[*missing, *new][0]}), expected the same names. Please report this with the adapter_config.json."
        )


def to_bin_files(folder: Path) -> None:
    """Convert a saved model's safetensors files to ``pytorch_model*.bin``, one file at a time.

    Args:
        folder: What ``save_pretrained`` wrote; an index is rewritten too.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        torch.save(load_file(path), folder / _bin_name(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: _bin_name(file) for name, file in content["weight_map"].items()}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / "pytorch_model.bin.index.json").write_text(text, encoding="utf-8")
        index.unlink()


def _bin_name(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


def check_convertible(adapter: AdapterFolder, generation: Generation) -> None:
    """Refuse an adapter that is more than LoRA weights of the LLM.

    Raises:
        AdapterError: With what it holds, and what to do instead.
    """
    llm = f"{_WRAPPED}{generation.modules['llm'][0]}."
    names = [tensor.name for tensor in tensors_in_file(adapter.weights)]
    others = sorted(name for name in names if not (name.startswith(llm) and _LORA_WEIGHT.fullmatch(name)))
    found = None
    if adapter.config.get("layer_replication"):
        found = "an adapter on replicated layers"
    elif adapter.config.get("target_parameters"):
        found = "an adapter of experts"
    elif adapter.is_legacy:
        found = "vision tower, resampler and embeddings in a file of their own"
    elif others:
        found = f"{len(others)} tensors besides LoRA weights of the LLM (the first is {others[0]})"
    if found:
        raise AdapterError(
            f"{adapter.path}: found {found}, expected a plain LoRA adapter of the LLM, as llama.cpp does. Merge it "
            "into its base, or train one with --lora_modules_to_save none and without DoRA and biases."
        )


def write_gguf_names(adapter: AdapterFolder, generation: Generation, folder: Path) -> None:
    """Write a copy of a plain adapter for convert_lora_to_gguf.py; see ``check_convertible``.

    Args:
        adapter: The adapter.
        generation: Its base model's generation.
        folder: Where the copy goes; it must exist.
    """
    llm = generation.modules["llm"][0]
    tensors = {_renamed(tensor.name, llm): tensor.read() for tensor in tensors_in_file(adapter.weights)}
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    config = dict(adapter.config)
    if config.pop("use_rslora", False):
        config["lora_alpha"] *= config["r"] ** 0.5
    write_adapter_config(folder, config)


def _renamed(name: str, llm: str) -> str:
    """A tensor's name in the LLM as a model by itself.

    Example:
        >>> _renamed("base_model.model.llm.model.layers.0.mlp.up_proj.lora_A.weight", "llm")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
        >>> _renamed("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight", "model.language_model")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    inner = name.removeprefix(f"{_WRAPPED}{llm}.")
    return _WRAPPED + (inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}")
