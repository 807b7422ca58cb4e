"""The adapters' flags, as a plain dataclass; see ``settings/argument_groups.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

OFFICIAL_LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"


@dataclass
class LoraArguments:
    """The adapters; read only with ``--use_lora true``."""

    _argument_group_name = "LoRA (with --use_lora true)"

    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout in front of each adapter, from 0 to below 1."}
    )
    lora_target_modules: str = field(
        default=OFFICIAL_LORA_TARGETS,
        metadata={
            "help": "Regular expression over whole module names; or all-linear: every linear layer of the "
            "language model."
        },
    )
    lora_weight_path: str = field(
        default="", metadata={"help": "Folder of an adapter to continue from. Empty: a new adapter."}
    )
    allow_other_base: bool = field(
        default=False,
        metadata={"help": "Let --lora_weight_path go onto a model that it was not trained on."},
    )
    lora_bias: str = field(
        default="none",
        metadata={
            "help": "Which biases train: none, those of the adapted layers (lora_only), or all.",
            "choices": ["none", "lora_only", "all"],
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale adapters by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA)."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Train the magnitude of each weight beside its direction (DoRA); slower, often better."
        },
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How adapters start: true (B is zero), gaussian, pissa, pissa_niter_<n>, olora. From "
            "pissa and olora the saved adapter is converted, at twice the rank, so that it fits the "
            "unchanged base."
        },
    )
    q_lora: bool = field(
        default=False, metadata={"help": "Hold the frozen language model in 4 or 8 bit (QLoRA)."}
    )
    quant_bits: int = field(
        default=4, metadata={"help": "Bits per weight with --q_lora true.", "choices": [4, 8]}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained in full and saved with the adapter, separated by spaces or commas. "
            "Default: resampler and token embeddings, and the vision tower with --tune_vision true. none: a "
            "plain adapter, as inference servers want."
        },
    )
    lora_layer_replication: str | None = field(
        default=None,
        metadata={"help": "Build a taller model from layer ranges, as JSON: [[0, 16], [8, 24]]."},
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Adapt only these layers, by number from 0. Default: all."}
    )
    lora_layers_pattern: str | None = field(
        default=None,
        metadata={"help": "Name of the module list that --lora_layers_to_transform counts in (layers)."},
    )

    @property
    def modules_to_save(self) -> list[str] | None:
        """The list behind ``--lora_modules_to_save``: None is the official default, [] is none.

        Example:
            >>> LoraArguments(lora_modules_to_save=["resampler,embed_tokens"]).modules_to_save
            ['resampler', 'embed_tokens']
            >>> LoraArguments(lora_modules_to_save=["none"]).modules_to_save
            []
        """
        if self.lora_modules_to_save is None:
            return None
        names = [name for text in self.lora_modules_to_save for name in text.split(",") if name]
        return [] if names == ["none"] else names

    @property
    def layer_replication(self) -> list[tuple[int, int]] | None:
        """The ranges behind ``--lora_layer_replication``.

        Raises:
            ValueError: When the text is not a JSON list of [start, end) pairs.

        Example:
            >>> LoraArguments(lora_layer_replication="[[0, 2], [1, 3]]").layer_replication
            [(0, 2), (1, 3)]
        """
        if self.lora_layer_replication is None:
            return None
        try:
            pairs = [(start, end) for start, end in json.loads(self.lora_layer_replication)]
        except (TypeError, ValueError) as error:
            raise ValueError(self._replication_problem()) from error
        if not pairs or not all(type(x) is int and 0 <= x for pair in pairs for x in pair):
            raise ValueError(self._replication_problem())
        return pairs

    def _replication_problem(self) -> str:
        return (
            f"--lora_layer_replication is {self.lora_layer_replication!r}, expected a JSON list of layer "
            "ranges such as [[0, 16], [8, 24]]."
        )
