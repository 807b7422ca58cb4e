"""LoRA adapters: which modules they go on, and what is trained and saved beside them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.errors import UserError
from minicpm_tune.lora.pissa import remember_start
from minicpm_tune.models.loss import LMHead
from minicpm_tune.safe_loading import reading
from minicpm_tune.settings.argument_groups import OFFICIAL_LORA_TARGETS, LoraArguments

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


class AdapterError(UserError):
    """An adapter that can't be built or doesn't fit; the message says what to change."""


def add_adapter(
    model: PreTrainedModel, generation: Generation, lora: LoraArguments, *, vision: bool, resampler: bool
) -> PeftModel:
    """Wrap a model with a new LoRA adapter.

    Args:
        model: The base model, all of it loaded.
        generation: Its generation.
        lora: The adapter's arguments.
        vision: ``--tune_vision``: the vision tower trains in full and is saved with the adapter.
        resampler: ``--tune_resampler``, likewise.

    Returns:
        The wrapped model; only the adapter and its ``modules_to_save`` train.

    Raises:
        AdapterError: When a pattern matches nothing, or layers are named that the model does not have.
    """
    _check_layers(model, generation, lora)
    targets = target_modules(model, generation, lora)
    saved = lora.modules_to_save
    if saved is None:
        saved = default_modules_to_save(generation, vision=vision, resampler=resampler)
        saved = [name for name in saved if _is_module(model, name)]  # a bare parameter can't be saved so
    _check_modules_to_save(model, saved)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=cast(Any, lora.lora_bias),  # argparse has seen to the value
        target_modules=targets,
        modules_to_save=saved or None,
        layer_replication=lora.layer_replication,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=cast(Any, True if lora.init_lora_weights == "true" else lora.init_lora_weights),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
        # Where the output layer is the embeddings' transpose, both have to be what is trained.
        ensure_weight_tying=tied and bool(saved),
    )
    _freeze_base(model)
    with _layers_reachable(model):
        wrapped = get_peft_model(model, config)
    _restore_output_layer(wrapped)
    remember_start(wrapped)
    logger.info("LoRA on %d modules: %s", len(adapted_modules(wrapped)), _summary(adapted_modules(wrapped)))
    return wrapped


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base model.

    Args:
        model: The base model.
        folder: What a LoRA run saved (``adapter_config.json`` and its weights).
        trainable: True to go on training it.

    Raises:
        AdapterError: When the folder holds no adapter or its shapes are another model's.
    """
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: no adapter_config.json. Expected the folder that a LoRA run wrote.")
    _freeze_base(model)
    try:
        with _layers_reachable(model), reading(folder):
            wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except RuntimeError as error:
        raise AdapterError(
            f"{folder}: the adapter's weights don't fit this model ({error}). Give the base model it was trained on."
        ) from error
    _restore_output_layer(wrapped)
    return wrapped


def _freeze_base(model: PreTrainedModel) -> None:
    """Freeze all weights; PEFT freezes only those without "lora_" in their names, and so no partial LoRA (0.21)."""
    model.requires_grad_(False)


def _check_layers(model: PreTrainedModel, generation: Generation, lora: LoraArguments) -> None:
    """See that every layer that is named is there; PEFT passes over the others in silence."""
    count = int(model.config.get_text_config().num_hidden_layers)
    wrong = [number for number in lora.lora_layers_to_transform or [] if not 0 <= number < count]
    if wrong:
        raise AdapterError(
            f"--lora_layers_to_transform: layers {wrong}, expected numbers from 0 to {count - 1}, as "
            f"{generation.title} has them here. Leave them out."
        )
    ranges = lora.layer_replication or []
    if ranges and getattr(model, "llm", None) is None:
        raise AdapterError(
            f"--lora_layer_replication: {generation.title} can't be made taller, expected V-2 to V-4.5, whose layers "
            "are all of one kind. Leave it out."
        )
    if not all(0 <= start < end <= count for start, end in ranges):
        raise AdapterError(
            f"--lora_layer_replication {lora.lora_layer_replication}: expected ranges [start, end) within the {count} "
            "layers of the model. Correct them."
        )


def _restore_output_layer(wrapped: PeftModel) -> None:
    """Give copies of the output layer their loss-making forward back; PEFT ties plain layers (0.21)."""
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, LMHead):
            for copy in module.modules_to_save.values():
                copy.__class__ = LMHead


def default_modules_to_save(generation: Generation, *, vision: bool, resampler: bool) -> list[str]:
    """The official default: token embeddings, the resampler, and the vision tower when it is tuned.

    InternLM-XComposer2's embeddings are not trained beside an adapter.
    """
    tuned = {"embeddings": True, "resampler": resampler, "vision": vision}
    parts = [part for part in generation.adapter_parts if tuned[part]]
    # The last part of the name: it is what the official adapters say, and PEFT matches by suffix. "merger"
    # alone would also match the vit_merger inside 4.6's and 4.7's vision tower, so those keep two parts.
    kept = 2 if generation.native else 1
    return [".".join(module.split(".")[-kept:]) for part in parts for module in generation.modules[part]]


def target_modules(model: nn.Module, generation: Generation, lora: LoraArguments) -> str | list[str]:
    """Turn ``--lora_target_modules`` and the layer choice into what PEFT is given.

    Patterns are written for the released names (``llm...``); a generation whose LLM has another name
    gets them translated. ``all-linear`` means the LLM's linear layers, not vision or output layer.

    Returns:
        A regular expression over whole module names; or the names themselves where the pattern alone
        would not do, because PEFT refuses a pattern together with layer numbers.

    Raises:
        AdapterError: When no linear layer matches.
    """
    pattern = translated_pattern(lora.lora_target_modules, generation)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            f"--lora_target_modules {lora.lora_target_modules!r} is no regular expression: {error}."
        ) from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if compiled.fullmatch(name)]
    # Given the pattern, PEFT would also try, and refuse, what matches without being a linear layer.
    as_names = lora.lora_layers_to_transform is not None or len(matched) < len(
        [name for name, _ in model.named_modules() if compiled.fullmatch(name)]
    )
    if lora.lora_layers_to_transform is not None:
        layer = re.compile(rf".*\b{lora.lora_layers_pattern or 'layers'}\.(\d+)\b.*")
        numbers = set(lora.lora_layers_to_transform)
        matched = [name for name in matched if (found := layer.match(name)) and int(found[1]) in numbers]
    if not matched:
        examples = ", ".join([name for name in linear if name.startswith(generation.modules["llm"])][:4])
        raise AdapterError(
            f"--lora_target_modules {lora.lora_target_modules!r}"
            + (f" with layers {lora.lora_layers_to_transform}" if lora.lora_layers_to_transform else "")
            + f" matches no linear layer of {generation.title}. Its layers are named like {examples}."
        )
    return matched if as_names else pattern


def translated_pattern(pattern: str, generation: Generation) -> str:
    """Write a pattern over released names for a generation's own.

    Example:
        >>> from minicpm_tune.checkpoints.model_generations import GENERATIONS
        >>> translated_pattern(r"llm\\..*layers\\.\\d+\\.self_attn\\.q_proj", GENERATIONS["v4_6"])
        'model\\\\.language_model\\\\..*layers\\\\.\\\\d+\\\\.self_attn\\\\.q_proj'
    """
    llm = re.escape(generation.modules["llm"][0])
    if pattern == ALL_LINEAR:
        inner = "|".join(generation.exact)
        return rf"{llm}\.(model\.)?layers\.\d+\." + (rf"(?!.*({inner})).+" if inner else ".+")
    if pattern == OFFICIAL_LORA_TARGETS and generation.lora_targets:
        return generation.lora_targets
    if generation.native:
        translated = re.sub(r"^llm\\?\.", lambda _: rf"{llm}\.", pattern)
        return re.sub(r"^vpm\\?\.", lambda _: rf"{re.escape(generation.modules['vision'][0])}\.", translated)
    return pattern


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that carry LoRA weights."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


def _summary(names: list[str]) -> str:
    """Module names with their layer numbers folded: ``llm.model.layers.{0-27}.self_attn.q_proj``."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        layers.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(int(found[1]) if found else 0)
    return ", ".join(f"{name} ({len(numbers)})" for name, numbers in layers.items())


def _check_modules_to_save(model: nn.Module, names: list[str]) -> None:
    for name in names:
        if not _is_module(model, name):
            raise AdapterError(
                f"--lora_modules_to_save {name}: the model has no module of that name. Names are like resampler, "
                "embed_tokens, vpm, lm_head; none for a plain adapter."
            )


def _is_module(model: nn.Module, name: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules())


@contextmanager
def _layers_reachable(model: nn.Module) -> Iterator[None]:
    """Let PEFT find the LLM's layers for layer replication, which it looks for under ``.model``."""
    inner = getattr(getattr(model, "llm", None), "model", None)
    if inner is None or hasattr(model, "model"):
        yield
        return
    kind: Any = type(model)
    kind.model = property(lambda self: self.llm.model)
    try:
        yield
    finally:
        del kind.model
    llm: Any = model.llm
    config, layers = llm.config, inner.layers
    if len(getattr(config, "layer_types", layers)) != len(layers):
        # PEFT counts the replicated layers, and leaves the list of their kinds short (0.21).
        config.layer_types = [layer.self_attn.layer_type for layer in layers]
