"""The project's own flags, as plain dataclasses that need no torch.

``settings/arguments.py`` joins them with the fields of ``transformers.TrainingArguments``. Each class docstring names
the defaults that differ from the official finetune.py or from transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from minicpm_tune.checkpoints.model_generations import LLM_TYPES, TunedParts
from minicpm_tune.settings.data_arguments import RowLimits, flag

OFFICIAL_LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"


@dataclass
class ModelArguments:
    """Which checkpoint is tuned, and how its attention is computed."""

    _argument_group_name = "Model"

    model_name_or_path: str = flag(
        "openbmb/MiniCPM-V-2",
        "The model to start from, MiniCPM-V 2.0 to 4.7 or InternLM-XComposer2: a folder in the released "
        "layout, or a Hub id (owner/name).",
    )
    attn_implementation: str = flag(
        "sdpa",
        "How the language model computes attention. flash_attention_2 needs a GPU and the flash-attn "
        "package; eager is the slow reference.",
        choices=["sdpa", "eager", "flash_attention_2"],
    )
    new_tokens: str | None = flag(
        None,
        "Text file with a token in each line, to add to the vocabulary. Embeddings and output layer "
        "get a row for each and train in full, also beside an adapter, which then carries them.",
    )


@dataclass
class TuningOptions(RowLimits):
    """What trains and how long a row may be; the project's part of ``TrainingArguments``.

    Differs from the official script: ``llm_type`` is read from the checkpoint unless given, and
    ``tune_resampler`` exists (the official script always trains the resampler).
    """

    _argument_group_name = "What trains, and row length"

    cache_dir: str | None = flag(
        None, "Where checkpoints from the Hub are kept. Default: the Hub's own cache (HF_HOME)."
    )
    llm_type: str = flag(
        "auto",
        "The language model's family. auto reads it from the checkpoint; a value that "
        "contradicts the checkpoint is an error.",
        choices=list(LLM_TYPES),
    )
    packing: bool = flag(
        False,
        "Put several samples into one row of --model_max_length tokens; they don't see each other. "
        "--per_device_train_batch_size then counts such rows. Evaluation is never packed.",
    )
    packing_window: int = flag(
        10_000,
        "How many samples of the shuffled order are packed at a time with --packing true. More samples "
        "fill the rows better, fewer mix the lengths better.",
    )
    tune_vision: bool = flag(True, "Train the vision tower (vpm).")
    tune_audio: bool = flag(
        False,
        "MiniCPM-o: train the audio encoder in full. The projection behind it trains with the resampler.",
    )
    tune_resampler: bool = flag(
        True, "Train the part between vision and language: the resampler, in 4.6 and 4.7 the merger."
    )
    tune_llm: bool = flag(True, "Train all weights of the language model. Not together with --use_lora.")
    memory_gib: float | None = flag(
        None,
        "Memory that each process may fill, in GiB, for --activation_checkpointing auto and for what is "
        "said before the weights are loaded. Default: what is free on its GPU, on a CPU its share of the free RAM.",
    )
    vision_gradient_checkpointing: bool | None = flag(
        None,
        "Compute the vision tower's activations a second time instead of keeping them. Default: what "
        "--activation_checkpointing says for the whole model.",
    )
    cache_vision_features: str | None = flag(
        None,
        "Folder that keeps the frozen vision tower's output, so that it is computed once per image and not "
        "once per epoch; about 2.3 MB per slice in bf16. Needs --tune_vision false and no adapter on the tower. "
        "Frames of videos are not kept, and nothing of audio is: its encoder runs in every step.",
    )
    fp32_residual_connection: bool | None = flag(
        None,
        "Without DeepSpeed, where the embeddings train: keep the sums that run through all layers in fp32, "
        "which takes more time and memory. Default: true with --fp16, whose numbers end at 65,504, otherwise "
        "false, as with DeepSpeed.",
    )
    vision_lr: float | None = flag(None, "Learning rate of the vision tower. Default: --learning_rate.")
    audio_lr: float | None = flag(
        None, "MiniCPM-o: learning rate of the audio encoder. Default: --learning_rate."
    )
    resampler_lr: float | None = flag(
        None, "Learning rate of the resampler or merger. Default: --learning_rate."
    )
    llm_lr: float | None = flag(
        None, "Learning rate of the language model's own weights. Default: --learning_rate."
    )
    embed_lr: float | None = flag(None, "Learning rate of the token embeddings. Default: --learning_rate.")
    lora_lr_ratio: float | None = flag(
        None,
        "LoRA+: the B matrices train with this multiple of --learning_rate (16 is usual), the A matrices "
        "with --learning_rate. Default: both with --learning_rate.",
    )
    use_lora: bool = flag(False, "Train LoRA adapters instead of the language model's own weights.")

    @property
    def tuned_around_llm(self) -> TunedParts:
        """Whether the parts before the language model train, as the keyword arguments many functions take."""
        return {"vision": self.tune_vision, "resampler": self.tune_resampler, "audio": self.tune_audio}


@dataclass
class RunOptions:
    """Arguments of ``transformers.TrainingArguments`` that mean something else, or more, here.

    Differs from transformers: ``activation_checkpointing`` takes ``auto``; ``dataloader_num_workers`` follows the
    machine and the workers persist (transformers: no workers); ``optim`` follows machine and precision (transformers:
    the fused AdamW); ``use_liger_kernel`` follows the machine and its packages (transformers: false);
    ``remove_unused_columns`` is false and ``label_names`` is labels, as in the official launchers;
    ``logging_nan_inf_filter`` is false; ``do_train`` follows the data; ``resume_from_checkpoint`` takes ``true``;
    ``overwrite_output_dir`` no longer exists in transformers 5.
    """

    _argument_group_name = "The run"

    do_train: bool | None = flag(
        None, "Whether to train. Default: true when --data_path is given.", nargs="?", const=True
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "true: continue from the last checkpoint in --output_dir, or start if there is none. Or the path "
        "of a checkpoint folder.",
        nargs="?",
        const="true",
    )
    allow_inexact_resume: bool = flag(
        False,
        "Continue also from a checkpoint without optimizer, schedule or random numbers (--save_only_model "
        "true); these start anew, so the run differs from one that was not interrupted.",
    )
    predict_with_generate: bool = flag(
        False,
        "Let the model answer some evaluation rows at every evaluation. Logs exact match, ANLS and "
        "ROUGE-L; TensorBoard shows examples with their pictures.",
    )
    generation_samples: int = flag(16, "Evaluation rows answered with --predict_with_generate true.")
    generation_max_new_tokens: int = flag(
        128, "Longest answer, in tokens, with --predict_with_generate true."
    )
    run_report: bool = flag(
        True,
        "Write report.html into --output_dir with every checkpoint and at the end: curves, answers before "
        "and after training (with --predict_with_generate true), and what the run was made of.",
    )
    overwrite_output_dir: bool = flag(
        False,
        "Start over in an --output_dir that holds an earlier run. Its checkpoints and its model are "
        "deleted when training starts.",
    )
    on_nonfinite: str = flag(
        "stop",
        "What to do when a step's loss or gradient norm is NaN or infinite. The step is never applied, and "
        "its rows are named. stop: the third such step in a row ends the run. skip: the run continues.",
        choices=["stop", "skip"],
    )
    dataloader_num_workers: int | None = flag(
        None,
        "Processes per rank that decode and cut images; 0: the training process does it. Default: with a "
        "GPU one per free core, at most 8; on a CPU 2, or 0 with fewer than 4 cores per rank.",
    )
    dataloader_persistent_workers: bool = flag(True, "Keep these processes between epochs.")
    optim: str | None = flag(
        None,
        "The optimizer, by transformers' name: adamw_torch, adamw_8bit, adafactor, ... Default: "
        "adamw_torch_fused on a GPU, adamw_torch on a CPU and with fp16 without DeepSpeed.",
    )
    use_liger_kernel: bool | None = flag(
        None,
        "liger's kernels for RMSNorm, rotary embedding and SwiGLU of the language model. Default: true "
        "with a GPU and the liger-kernel package.",
    )
    activation_checkpointing: str | None = flag(
        None,
        "Compute activations again in the backward instead of keeping them: true, false, or auto, which plans the "
        "memory and computes again only as many layers as it must: none, every second, or every layer of the vision "
        "tower, then of the language model. The losses are the same. Default: false; the launchers say auto.",
        nargs="?",
        const="true",
    )
    early_stopping_patience: int | None = flag(
        None,
        "Stop after this many evaluations in a row without an improvement of --metric_for_best_model "
        "(eval_loss unless set). --load_best_model_at_end true ends with the best model instead of the last.",
    )
    early_stopping_threshold: float = flag(
        0.0, "The least change that counts as an improvement for --early_stopping_patience."
    )
    logging_nan_inf_filter: bool = flag(
        False, "Must stay false: ResilientTrainer handles losses that are not finite."
    )
    remove_unused_columns: bool = flag(False, "Must stay false: a row holds more than the model's text.")
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "The name of a batch's labels; always labels."}
    )


@dataclass
class LoraArguments:
    """The adapters; read only with ``--use_lora true``."""

    _argument_group_name = "LoRA (with --use_lora true)"

    lora_r: int = flag(64, "Rank of the adapters.")
    lora_alpha: int = flag(64, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(0.05, "Dropout in front of each adapter, from 0 to below 1.")
    lora_target_modules: str = flag(
        OFFICIAL_LORA_TARGETS,
        "Regular expression that matches whole module names, or all-linear: every linear layer of the "
        "language model.",
    )
    lora_experts: bool = flag(
        False,
        "MiniCPM-V 4.7-35B-A3B: adapt the experts too, each with a rank of its own; needs --lora_dropout 0.",
    )
    lora_weight_path: str = flag("", "Folder of an adapter to continue from. Empty: a new adapter.")
    allow_other_base: bool = flag(False, "Accept a --lora_weight_path that was trained on another model.")
    lora_bias: str = flag(
        "none",
        "Which biases train: none, those of the adapted layers (lora_only), or all.",
        choices=["none", "lora_only", "all"],
    )
    use_rslora: bool = flag(False, "Scale adapters by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA).")
    use_dora: bool = flag(
        False, "Train each weight's magnitude apart from its direction (DoRA); slower, often better."
    )
    init_lora_weights: str = flag(
        "true",
        "How adapters start: true (B is zero), gaussian, pissa, pissa_niter_<n>, olora. With pissa and "
        "olora the saved adapter is converted to twice the rank, so that it fits the unchanged base model.",
    )
    q_lora: bool = flag(False, "Keep the frozen language model in 4 or 8 bit (QLoRA).")
    quant_bits: int = flag(4, "Bits per weight with --q_lora true.", choices=[4, 8])
    lora_modules_to_save: list[str] | None = flag(  # noqa: RUF009  (it makes a field)
        None,
        "Modules trained in full and saved with the adapter, separated by spaces or commas. Default: "
        "resampler and token embeddings, and with --tune_vision true the vision tower. none: a plain adapter, as "
        "inference servers need it.",
    )
    lora_layer_replication: str | None = flag(
        None, "Build a taller model from layer ranges, as JSON: [[0, 16], [8, 24]]."
    )
    lora_layers_to_transform: list[int] | None = flag(  # noqa: RUF009  (it makes a field)
        None, "Adapt only these layers, by number from 0. Default: all."
    )
    lora_layers_pattern: str | None = flag(
        None, "Name of the module list that --lora_layers_to_transform counts in (layers)."
    )

    @property
    def held_bits(self) -> int | None:
        """Bits per weight of the language model while it is tuned; None for full precision."""
        return self.quant_bits if self.q_lora else None

    @property
    def modules_to_save(self) -> list[str] | None:
        """The list behind ``--lora_modules_to_save``: None is the official default, [] is none.

        Example:
            >>> LoraArguments(lora_modules_to_save=["resampler,embed_tokens vpm"]).modules_to_save
            ['resampler', 'embed_tokens', 'vpm']
            >>> LoraArguments(lora_modules_to_save=["none"]).modules_to_save
            []
        """
        if self.lora_modules_to_save is None:
            return None
        names = [name for text in self.lora_modules_to_save for name in re.split(r"[,\s]+", text) if name]
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
        problem = (
            f"--lora_layer_replication is {self.lora_layer_replication!r}, expected a JSON list of layer "
            "ranges such as [[0, 16], [8, 24]]."
        )
        try:
            pairs = [(start, end) for start, end in json.loads(self.lora_layer_replication)]
        except (TypeError, ValueError) as error:
            raise ValueError(problem) from error
        if not pairs or not all(type(x) is int and 0 <= x for pair in pairs for x in pair):
            raise ValueError(problem)
        return pairs


@dataclass(frozen=True)
class LearningRates:
    """Which rate a parameter trains with.

    Attributes:
        base: ``--learning_rate``, for every part without a rate of its own.
        parts: Part -> its own rate, or None for the base.
        lora_ratio: Rate of LoRA's B matrices divided by that of everything else in LoRA.
            Source: "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354).
    """

    base: float
    parts: dict[str, float | None]
    lora_ratio: float | None = None

    @property
    def differ(self) -> bool:
        """True when any parameter trains with another rate than the base."""
        return self.lora_ratio is not None or any(rate is not None for rate in self.parts.values())

    def of(self, name: str, part: str) -> float:
        """The rate of one parameter, by its name and the part of the model that it belongs to.

        Example:
            >>> rates = LearningRates(1e-4, {"vision": 1e-6}, lora_ratio=16)
            >>> rates.of("vpm.post_layernorm.weight", "vision")
            1e-06
            >>> rates.of("llm.model.layers.0.self_attn.q_proj.lora_B.default.weight", "lora")
            0.0016
        """
        own = self.parts.get(part)
        rate = self.base if own is None else own
        return rate * self.lora_ratio if self.lora_ratio is not None and ".lora_B" in name else rate
