"""New LoRA adapters: which modules get one, and what is trained in full and saved beside it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack, cast

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from minicpm_tune.checkpoints.model_generations import Generation, TunedParts
from minicpm_tune.lora.adapter_folders import AdapterError
from minicpm_tune.models.loss import LMHead
from minicpm_tune.settings.argument_groups import OFFICIAL_LORA_TARGETS, LoraArguments

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_STARTS_FROM_WEIGHTS = ("pissa", "olora")


def add_adapter(
    model: PreTrainedModel, generation: Generation, lora: LoraArguments, **tuned: Unpack[TunedParts]
) -> PeftModel:
    """Put a new LoRA adapter on a model.

    Args:
        model: The base model.
        generation: Its generation.
        lora: The adapter's arguments.
        **tuned: Which parts train in full and are saved with the adapter, as ``modules_to_save`` has it.

    Returns:
        The wrapped model; only the adapter and its ``modules_to_save`` train.

    Raises:
        AdapterError: When a pattern matches nothing, or names layers that the model does not have.
    """
    _check_layers(model, generation, lora)
    check_experts(generation, lora)
    targets = target_modules(model, generation, lora)
    adds_tokens = bool(getattr(model, "new_tokens", None))
    saved = _present(modules_to_save(generation, lora, adds_tokens=adds_tokens, **tuned), model, lora)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=cast(Any, lora.lora_bias),  # argparse has seen to the value
        target_modules=targets,
        target_parameters=_expert_parameters(model, generation, lora),
        modules_to_save=saved or None,
        layer_replication=lora.layer_replication,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=cast(Any, True if lora.init_lora_weights == "true" else lora.init_lora_weights),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
        # Where output layer and embeddings share a weight, both must get the trained one.
        ensure_weight_tying=tied and bool(saved),
    )
    model.requires_grad_(False)  # PEFT freezes all but names with "lora_", which a partial LoRA has (0.21)
    with layers_reachable(model):
        wrapped = get_peft_model(model, config)
    restore_output_layer(wrapped)
    _remember_start(wrapped)
    return wrapped


def check_experts(generation: Generation, lora: LoraArguments) -> None:
    """Refuse ``--lora_experts`` where there are none, or with what PEFT can't do for them (0.21).

    Raises:
        AdapterError: With the flag to change.
    """
    if not lora.lora_experts:
        return
    if not generation.expert_parameters:
        raise AdapterError(
            f"--lora_experts true: {generation.title} has no experts, expected MiniCPM-V 4.7-35B-A3B. Leave the flag "
            "out."
        )
    for flag, value, expected in (
        ("lora_dropout", lora.lora_dropout, 0),
        ("use_dora", lora.use_dora, False),
        ("init_lora_weights", lora.init_lora_weights, "true"),
    ):
        if value not in (expected, "gaussian"):
            raise AdapterError(
                f"--lora_experts true: found --{flag} {value}, expected {str(expected).lower()}: the weights of all "
                f"experts are one tensor, whose adapters know nothing else. Set --{flag} {str(expected).lower()}."
            )


def _expert_parameters(model: nn.Module, generation: Generation, lora: LoraArguments) -> list[str] | None:
    """What PEFT is given to adapt the experts: ends of names, or whole names where layers are chosen."""
    if not lora.lora_experts:
        return None
    if lora.lora_layers_to_transform is None:
        return list(generation.expert_parameters)
    names = [name for name, _ in model.named_parameters()]
    return _in_chosen_layers([name for name in names if name.endswith(generation.expert_parameters)], lora)


def _in_chosen_layers(names: list[str], lora: LoraArguments) -> list[str]:
    """The names in the layers of ``--lora_layers_to_transform``; all of them where it is not given."""
    chosen = lora.lora_layers_to_transform
    if chosen is None:
        return names
    layer = re.compile(rf".*\b{lora.lora_layers_pattern or 'layers'}\.(\d+)\b.*")
    return [name for name in names if (found := layer.match(name)) and int(found[1]) in chosen]


def _check_layers(model: PreTrainedModel, generation: Generation, lora: LoraArguments) -> None:
    """Refuse layers that the model does not have; PEFT ignores them silently."""
    count = int(model.config.get_text_config().num_hidden_layers)
    wrong = [number for number in lora.lora_layers_to_transform or [] if not 0 <= number < count]
    if wrong:
        raise AdapterError(
            f"--lora_layers_to_transform: layers {wrong}, expected numbers from 0 to {count - 1}, the layers of this "
            f"{generation.title}. Leave the others out."
        )
    ranges = lora.layer_replication or []
    if ranges and getattr(model, "llm", None) is None:
        raise AdapterError(
            f"--lora_layer_replication: the layers of {generation.title} can't be replicated, expected V-2 to V-4.5, "
            "whose layers are all of one kind. Leave the flag out."
        )
    if not all(0 <= start < end <= count for start, end in ranges):
        raise AdapterError(
            f"--lora_layer_replication {lora.lora_layer_replication}: expected ranges [start, end) within the {count} "
            "layers of the model. Correct them."
        )


def restore_output_layer(wrapped: PeftModel) -> None:
    """Make copies of the output layer ``LMHead`` again; PEFT ties them as plain linear layers (0.21)."""
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, LMHead):
            for copy in module.modules_to_save.values():
                copy.__class__ = LMHead


class _CopyAside(ModulesToSaveWrapper):
    """PEFT's wrapper of a module trained in full, with the frozen original beside the model instead of in it.

    Whatever moves, saves, or divides the model does not see the original: it stays on the CPU. When the adapter is
    switched off, it comes to where the trained copy is, and goes back afterwards.
    """

    @property
    def original_module(self) -> nn.Module:
        """The module as it was before training."""
        return self.__dict__["aside"]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the trained module and the original."""
        super().enable_adapters(enabled)
        trained = next(self.modules_to_save.parameters())
        self.original_module.to("cpu" if enabled else trained.device)


def set_frozen_copies_aside(model: PeftModel) -> None:
    """Keep the originals of modules that train in full out of the GPU's memory: 1.9 GiB of MiniCPM-V 2.6.

    PEFT needs them when the adapter is switched off and when another is added, and never in training. Under ZeRO-3
    they stay: each process holds a share of them, which only modules within the model can gather.

    Args:
        model: The model on the CPU, with its adapter.
    """
    for module in model.modules():
        if type(module) is not ModulesToSaveWrapper:
            continue
        original = module.original_module
        if any(hasattr(parameter, "ds_id") for parameter in original.parameters()):
            continue
        del module.original_module
        module.__dict__["aside"] = original
        module.__class__ = _CopyAside


def _remember_start(model: Any) -> None:
    """Keep a copy of an adapter whose start changed the base weights; see ``fit_to_original_base``."""
    if str(model.peft_config["default"].init_lora_weights).startswith(_STARTS_FROM_WEIGHTS):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        model.initial_lora = {
            key: value.detach().cpu().clone() for key, value in state.items() if ".lora_" in key
        }


def modules_to_save(
    generation: Generation, lora: LoraArguments, *, adds_tokens: bool = False, **tuned: Unpack[TunedParts]
) -> list[str]:
    """The modules that train in full and are saved with the adapter.

    The official default: token embeddings, the resampler, and the towers that are tuned. InternLM-XComposer2's
    embeddings are not trained beside an adapter, unless tokens are added. Then the output layer is trained too.
    """
    if lora.modules_to_save is not None:
        return lora.modules_to_save
    parts = {"embeddings": True, **tuned}
    saved = [
        name
        for part in generation.adapter_parts
        if parts.get(part)
        for name in _short_names(generation, part)
    ]
    if adds_tokens:
        saved += [name for name in modules_of_new_tokens(generation) if name not in saved]
    return saved


def modules_of_new_tokens(generation: Generation) -> list[str]:
    """The modules that have to train in full when tokens are added."""
    return _short_names(generation, "embeddings") + [generation.output_layer] * (not generation.ties_output)


def _short_names(generation: Generation, part: str) -> list[str]:
    """Names of a part's modules, as short as the official adapters have them: PEFT matches by suffix."""
    return [
        ".".join(module.split(".")[-generation.saved_name_parts :])
        for module in generation.modules.get(part, ())
        if module not in generation.bare_parameters
    ]


def _present(saved: list[str], model: nn.Module, lora: LoraArguments) -> list[str]:
    """Those of ``modules_to_save`` that this model has; refuse others that the flag names."""
    names = [name for name, _ in model.named_modules()]
    # Without what hears (init_audio false in config.json) there is no projection of audio to train.
    there = [name for name in saved if any(f".{module}".endswith(f".{name}") for module in names)]
    missing = [name for name in saved if name not in there]
    if missing and lora.modules_to_save is not None:
        raise AdapterError(
            f"--lora_modules_to_save {missing[0]}: the model has no module of that name, expected a name such as "
            "resampler, embed_tokens, vpm or lm_head. Correct it, or give none for a plain adapter."
        )
    return there


def target_modules(model: nn.Module, generation: Generation, lora: LoraArguments) -> str | list[str]:
    """Turn ``--lora_target_modules`` and the layer choice into what PEFT is given.

    Patterns are written for the released names (``llm...``) and translated for a generation whose LLM has
    another name. ``all-linear`` means the LLM's linear layers without the output layer.

    Returns:
        A regular expression over whole module names. Or the names themselves, where PEFT would not accept
        the pattern: it refuses one beside layer numbers, and one that also matches other modules.

    Raises:
        AdapterError: When no linear layer matches, or the output layer does.
    """
    pattern = translated_pattern(lora.lora_target_modules, generation)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            f"--lora_target_modules {lora.lora_target_modules!r}: not a regular expression ({error}). Correct it, or "
            f"give {ALL_LINEAR}."
        ) from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if compiled.fullmatch(name)]
    matches_others = len(matched) < sum(bool(compiled.fullmatch(name)) for name, _ in model.named_modules())
    matched = _in_chosen_layers(matched, lora)
    if not matched:
        examples = ", ".join([name for name in linear if name.startswith(generation.modules["llm"])][:4])
        raise AdapterError(
            f"--lora_target_modules {lora.lora_target_modules!r}"
            + (f" with layers {lora.lora_layers_to_transform}" if lora.lora_layers_to_transform else "")
            + f" matches no linear layer of {generation.title}, expected names like {examples}. Correct the pattern."
        )
    heads = [name for name in matched if isinstance(model.get_submodule(name), LMHead)]
    if heads:  # it computes the loss itself, in chunks, from its weight alone
        raise AdapterError(
            f"--lora_target_modules {lora.lora_target_modules!r} matches the output layer {heads[0]}, which can't have "
            f"LoRA weights. Leave it out of the pattern ({ALL_LINEAR} does), or train it in full with "
            f"--lora_modules_to_save {generation.output_layer}."
        )
    return matched if matches_others or lora.lora_layers_to_transform is not None else pattern


def translated_pattern(pattern: str, generation: Generation) -> str:
    """Rewrite a pattern over released module names for a generation's own names.

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
    for released, own in (("llm", llm), ("vpm", re.escape(generation.modules["vision"][0]))):
        prefix = re.match(rf"{released}\\?\.", pattern)
        if own != released and prefix:
            pattern = rf"{own}\." + pattern[prefix.end() :]
    return pattern


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that have LoRA weights."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


def log_adapted_modules(model: PeftModel) -> None:
    """Log which modules have an adapter, those of all layers as one: ``llm.model.layers.*.self_attn.q_proj (28)``."""
    names = adapted_modules(model)
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    summary = ", ".join(f"{name} ({count})" for name, count in counts.items())
    logger.info("LoRA on %d modules: %s", len(names), summary)


@contextmanager
def layers_reachable(model: nn.Module) -> Iterator[None]:
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
        # PEFT updates the number of replicated layers, but not the list of their kinds (0.21).
        config.layer_types = [layer.self_attn.layer_type for layer in layers]
