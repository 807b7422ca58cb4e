"""Adapter folders: what they hold, whether they belong to a base model, and how freshly saved ones are completed.

A path says little: folders are renamed and copied. ``base_model.json`` beside an adapter holds digests
of the base's norm weights and of the first row of every linear layer, both read from its files, so that
an adapter is not merged into another model of the same shapes. Quantized files keep the norms exact, and
are therefore recognized as the same base.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicpm_tune.checkpoints.model_generations import Generation
from minicpm_tune.checkpoints.released_format import set_downsample_mode
from minicpm_tune.checkpoints.vocabulary import write_added_tokens
from minicpm_tune.checkpoints.weight_files import copy_tokenizer_files, stored_tensors
from minicpm_tune.errors import UserError
from minicpm_tune.files import give_umask_mode

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# The early official scripts kept the modules trained in full in a file of their own.
LEGACY_FILE = "vpm_resampler_embedtokens.pt"
FINGERPRINT_FILE = "base_model.json"
# Settings of a LoRA adapter in peft 0.10.0.
_SETTINGS_OF_PEFT_0_10 = frozenset(
    (
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
        "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication",
    )
)  # fmt: skip


class AdapterError(UserError):
    """An adapter that can't be built, or does not fit the model."""


class FingerprintError(UserError):
    """A fingerprint file that can't be read."""


@dataclass(frozen=True)
class BaseFingerprint:
    """What identifies a base model.

    Attributes:
        generation: Its name in ``model_generations.GENERATIONS``.
        norms: Digest of the LLM's one-dimensional weights, rounded to bf16.
        linears: Digest of the first row of each of the LLM's matrices; None when they are quantized.
        quantization: How the base was held while the adapter was trained, such as ``4 bit``; or None.
        downsample_mode: That of the adapter's training, for 4.6 and 4.7.
        new_tokens: Token -> id of those that the training added to the base.
    """

    generation: str
    norms: str
    linears: str | None
    quantization: str | None = None
    downsample_mode: str | None = None
    new_tokens: dict[str, int] = field(default_factory=dict)

    def has_same_weights(self, other: BaseFingerprint) -> bool:
        """Whether both come from one model; linear layers are compared where both know them."""
        linears = self.linears is None or other.linears is None or self.linears == other.linears
        return self.norms == other.norms and linears


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        path: Its folder.
        config: Its adapter_config.json.
        fingerprint: That of its base model; None for an adapter of another tool.
    """

    path: Path
    config: dict[str, Any]
    fingerprint: BaseFingerprint | None

    @property
    def base_name(self) -> str:
        """The base model's path or hub id in adapter_config.json; may be empty."""
        return self.config.get("base_model_name_or_path") or ""

    @property
    def new_tokens(self) -> dict[str, int]:
        """Token -> id of those that its training added to the base."""
        return self.fingerprint.new_tokens if self.fingerprint else {}

    @property
    def downsample_mode(self) -> str | None:
        """That of its training, for 4.6 and 4.7; None where it is not known."""
        return self.fingerprint.downsample_mode if self.fingerprint else None

    @property
    def modules_to_save(self) -> list[str]:
        """Names of the modules it trains in full; PEFT lists those of tied weights twice, also by their whole name."""
        names = self.config.get("modules_to_save") or []
        return [name for name in names if not any(name.endswith(f".{other}") for other in names)]

    @property
    def weights(self) -> Path:
        """The file with its weights."""
        return next(self.path / name for name in WEIGHT_FILES if (self.path / name).is_file())

    @property
    def is_legacy(self) -> bool:
        """Whether the early official scripts wrote it."""
        return (self.path / LEGACY_FILE).is_file()


def read_adapter_folder(name: str | Path, *, flag: str = "--adapter") -> AdapterFolder:
    """Look at an adapter's folder.

    Args:
        name: The folder.
        flag: The command-line flag that names it.

    Raises:
        AdapterError: When it holds no adapter, or only part of one.
    """
    path = Path(name).expanduser()
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{flag} {name}: found no {CONFIG_FILE}, expected the folder that a LoRA run wrote. Check the path."
        )
    config = _read_config(path)
    if not any((path / weights).is_file() for weights in WEIGHT_FILES):
        raise AdapterError(
            f"{path}: found {CONFIG_FILE} but no {WEIGHT_FILES[0]}, expected both. Copy the whole folder."
        )
    return AdapterFolder(path.resolve(), config, read_fingerprint(path))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file}: not readable as JSON ({error}). Copy the adapter again.") from error


def check_base(
    adapter: AdapterFolder, base: Path, generation: Generation, *, allow_other_base: bool = False
) -> None:
    """Refuse to put an adapter on a model that it was not trained on.

    An adapter of this project is compared by the weights themselves. Another one is compared by the name
    of its base, and by weights where that base is available.

    Args:
        adapter: The adapter.
        base: The folder of the model to put it on.
        generation: That model's generation.
        allow_other_base: Accept other weights of the same shapes.

    Raises:
        AdapterError: When it belongs to another model, or nothing shows that it belongs to this one.
    """
    named = f" ({adapter.base_name})" if adapter.base_name else ""
    if adapter.fingerprint is not None and adapter.fingerprint.generation != generation.name:
        raise AdapterError(
            f"{adapter.path}: an adapter of generation {adapter.fingerprint.generation}, but {base} is "
            f"{generation.title}. Give the base model it was trained on{named}."
        )
    problem = None if allow_other_base else _mismatch(adapter, base, generation)
    if problem:
        raise AdapterError(
            f"{adapter.path}: {problem} Give the base model it was trained on{named}. If you know that the two "
            "belong together, add --allow_other_base true."
        )


def _mismatch(adapter: AdapterFolder, base: Path, generation: Generation) -> str | None:
    """Why the adapter may belong to another model; None when it belongs to this one."""
    named = adapter.base_name
    if adapter.fingerprint is not None:
        same = adapter.fingerprint.has_same_weights(fingerprint_of(base, generation))
        return None if same else f"it was not trained on the weights of {base}."
    if not named:
        logger.warning("%s names no base model; only the shapes show that it fits.", adapter.path)
        return None
    folder = Path(named).expanduser()
    if (folder / "config.json").is_file():
        same = folder.resolve() == base.resolve() or fingerprint_of(folder, generation).has_same_weights(
            fingerprint_of(base, generation)
        )
        return None if same else f"it was trained on {named}, whose weights differ from those of {base}."
    if folder.name.lower() in (base.name.lower(), _hub_name(base)):
        return None
    return f"it was trained on {named}, which is not available to compare with {base}."


def _hub_name(base: Path) -> str:
    """The repository's name of a folder in the hub's cache (models--owner--name/snapshots/commit)."""
    repository = base.parent.parent.name
    return repository.rpartition("--")[2].lower() if repository.startswith("models--") else ""


def fingerprint_of(base: Path, generation: Generation) -> BaseFingerprint:
    """Read a base model's fingerprint off its weight files; about 300 small reads for an 8B model."""
    norms, linears = hashlib.sha256(), hashlib.sha256()
    quantized = False
    for name, values in sorted(_first_rows(base, generation)):
        if not values.is_floating_point():
            quantized = True
            continue
        rounded = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        (norms if name.startswith("norm:") else linears).update(name.encode() + rounded)
    return BaseFingerprint(generation.name, norms.hexdigest(), None if quantized else linears.hexdigest())


def _first_rows(base: Path, generation: Generation) -> Iterator[tuple[str, Tensor]]:
    prefix = generation.modules["llm"][0] + "."
    for tensor in stored_tensors(base):
        name = tensor.name
        if name.startswith(prefix) and ".layers." in name and name.endswith(".weight"):
            yield f"{'norm' if len(tensor.shape) == 1 else 'linear'}:{name}", tensor.read_first_row()


def read_fingerprint(folder: Path) -> BaseFingerprint | None:
    """Read the fingerprint in an adapter's folder; None for an adapter of another tool.

    Raises:
        FingerprintError: When the file is damaged.
    """
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        return BaseFingerprint(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise FingerprintError(
            f"{path}: {error}, expected what a LoRA run writes. Copy the adapter again, or delete this file: "
            "the base model is then recognized by its name alone."
        ) from error


def complete_adapter_folder(
    folder: Path,
    *,
    base: Path,
    generation: Generation,
    quant_bits: int | None = None,
    downsample_mode: str | None = None,
    new_tokens: dict[str, int] | None = None,
) -> None:
    """Make a freshly saved adapter loadable by others, and identify its base model.

    Beside the weights go the base model's fingerprint, and its tokenizer and processor files: the official
    trainer puts them there, and code after its guides looks for them there.

    adapter_config.json lists every setting of the peft that wrote it, and an older peft refuses settings it does
    not know. The released code needs transformers 4.40 to 4.48, and so peft 0.10 to 0.13. Therefore unknown
    settings are removed where they hold their default.

    Args:
        folder: What PEFT saved.
        base: The base model's folder.
        generation: The base model's generation.
        quant_bits: How the base was held in training; None for full precision.
        downsample_mode: That of the training (4.6 and 4.7); the adapter is then used in the same mode.
        new_tokens: Token -> id of those that the training added; the adapter's tokenizer has them.
    """
    # peft takes seconds, and those who only look at adapters need none of it.
    from peft import LoraConfig

    fingerprint = replace(
        fingerprint_of(base, generation),
        quantization=None if quant_bits is None else f"{quant_bits} bit",
        downsample_mode=downsample_mode,
        new_tokens=new_tokens or {},
    )
    text = json.dumps(asdict(fingerprint), indent=2) + "\n"
    (folder / FINGERPRINT_FILE).write_text(text, encoding="utf-8")
    copy_tokenizer_files(base, folder)
    write_added_tokens(folder, new_tokens or {})
    if downsample_mode is not None:
        set_downsample_mode(folder, downsample_mode)
    defaults = LoraConfig().to_dict()
    needed = {
        key: value
        for key, value in _read_config(folder).items()
        if key in _SETTINGS_OF_PEFT_0_10 or (key != "peft_version" and value != defaults.get(key))
    }
    write_adapter_config(folder, needed)


def fit_to_original_base(model: Any, folder: Path) -> None:
    """Convert a saved adapter that started from the weights; leave any other as it is.

    PiSSA and OLoRA take a part A0 B0 out of each weight and train it, W = W' + s B A with B A = B0 A0 at first.
    Loaded on the original W the trained A, B alone would be wrong; what was learned is B A - B0 A0, which is
    itself an adapter of twice the rank, at the same scale: alpha / r, or with rsLoRA alpha / sqrt(r). PEFT's own
    conversion (0.21) drops modules_to_save.

    Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation" (arXiv:2404.02948), appendix.

    Args:
        model: The model that was trained; ``build.add_adapter`` remembered how its adapter started.
        folder: Where the adapter was saved.
    """
    initial = getattr(model, "initial_lora", None)
    if initial is None:
        return
    weights = load_file(folder / WEIGHT_FILES[0])
    for key, start in initial.items():
        trained, start = weights[key], start.to(weights[key].dtype)
        if ".lora_A." in key:
            weights[key] = torch.cat([trained, start], dim=0)
        elif ".lora_B." in key:
            weights[key] = torch.cat([trained, -start], dim=1).contiguous()
    save_file(weights, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    give_umask_mode(folder)
    config = _read_config(folder)
    factor = 2**0.5 if config.get("use_rslora") else 2
    config |= {"lora_alpha": config["lora_alpha"] * factor, "r": 2 * config["r"], "init_lora_weights": True}
    write_adapter_config(folder, config)


def write_adapter_config(folder: Path, config: dict[str, Any]) -> None:
    """Write an adapter's settings as PEFT does."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
