"""The flags that are this project's own, as plain dataclasses.

``settings/arguments.py`` joins them with those of ``transformers.TrainingArguments``. They stand apart so that
``finetune.py --help`` can show them without importing torch, which takes seconds.

Each default that differs from the official finetune.py is named in the class docstring.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minicpm_tune.checkpoints.model_generations import LLM_TYPES
from minicpm_tune.settings.data_arguments import DataFlags
from minicpm_tune.settings.lora_arguments import OFFICIAL_LORA_TARGETS, LoraArguments

__all__ = [
    "OFFICIAL_LORA_TARGETS",
    "DataArguments",
    "LoraArguments",
    "ModelArguments",
    "RunOptions",
    "TuningOptions",
]


@dataclass
class ModelArguments:
    """Which checkpoint is tuned, and how its attention is computed."""

    _argument_group_name = "Model"

    model_name_or_path: str = field(
        default="openbmb/MiniCPM-V-2",
        metadata={
            "help": "The checkpoint to start from: a folder in the released layout, or a Hub id "
            "(owner/name): MiniCPM-V 2.0 to 4.7, or InternLM-XComposer2."
        },
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "How the language model computes attention. flash_attention_2 needs the flash-attn "
            "package and a GPU; eager is the slow reference.",
            "choices": ["sdpa", "eager", "flash_attention_2"],
        },
    )


@dataclass
class DataArguments(DataFlags):
    """Which rows are learned from, and how they become samples."""

    _argument_group_name = "Data"

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "The training rows: JSON, JSONL, Parquet or a Hugging Face datasets folder; with "
            "#count or :weight behind it; several, separated by commas; or a .txt list of them (README, "
            "'Your data')."
        },
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={"help": "The evaluation rows, same format. Needed by --do_eval and --eval_strategy."},
    )


@dataclass
class TuningOptions:
    """What trains and how long a row may be; the project's part of ``TrainingArguments``.

    Differs from the official script: ``llm_type`` is read from the checkpoint unless given, and
    ``tune_resampler`` exists (the official script always trains the resampler).
    """

    _argument_group_name = "What trains, and row length"

    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where checkpoints from the Hub are kept. Default: the Hub's own cache (HF_HOME)."},
    )
    llm_type: str = field(
        default="auto",
        metadata={
            "help": "The language model's family. auto reads it from the checkpoint; a value that "
            "contradicts the checkpoint is an error.",
            "choices": list(LLM_TYPES),
        },
    )
    model_max_length: int = field(
        default=2048,
        metadata={
            "help": "Longest row, in tokens, image placeholders included. Longer rows are cut at the end, "
            "never inside an image."
        },
    )
    max_slice_nums: int | None = field(
        default=9,
        metadata={
            "help": "Most slices an image is cut into, the overview not counted. More slices see finer "
            "detail and cost 64 to 96 tokens each."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put several samples into one row of --model_max_length tokens, without letting them "
            "see each other. --per_device_train_batch_size then counts such rows. Evaluation is never packed."
        },
    )
    packing_window: int = field(
        default=10_000,
        metadata={
            "help": "How many samples of the shuffled order are put together at a time with --packing true. "
            "More fill the rows better, fewer mix the lengths better."
        },
    )
    tune_vision: bool = field(
        default=True,
        metadata={"help": "Train the vision tower (vpm)."},
    )
    tune_resampler: bool = field(
        default=True,
        metadata={"help": "Train the part between vision and language: resampler, or merger in 4.6 and 4.7."},
    )
    tune_llm: bool = field(
        default=True,
        metadata={"help": "Train all weights of the language model. Not together with --use_lora."},
    )
    vision_gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the vision tower's activations twice instead of keeping them. Default: as "
            "--activation_checkpointing says for the whole model."
        },
    )
    cache_vision_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the frozen vision tower's output is kept, so that it is computed once per image "
            "and not once per epoch; about 2.3 MB per slice in bf16. Needs --tune_vision false, and no adapter on "
            "the tower. Frames of videos are not kept."
        },
    )
    vision_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: --learning_rate."}
    )
    resampler_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the resampler or merger. Default: --learning_rate."}
    )
    llm_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the language model's own weights. Default: --learning_rate."},
    )
    embed_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the token embeddings. Default: --learning_rate."}
    )
    lora_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+: the B matrices train with --learning_rate times this (16 is usual), the A "
            "matrices with --learning_rate. Default: both alike."
        },
    )
    use_lora: bool = field(
        default=False,
        metadata={"help": "Train LoRA adapters instead of the language model's own weights."},
    )


@dataclass
class RunOptions:
    """Arguments of ``transformers.TrainingArguments`` that mean something else, or more, here.

    Differs from transformers: ``dataloader_num_workers`` follows the machine and its processes are kept
    (transformers: none); ``optim`` is adamw_torch, as in the official script (transformers: the fused
    form); ``remove_unused_columns`` is false and ``label_names`` is labels, as in the official launchers;
    ``do_train`` follows the data; ``resume_from_checkpoint`` takes ``true``; ``overwrite_output_dir`` is
    gone from transformers 5.
    """

    _argument_group_name = "The run"

    do_train: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to train. Default: true when --data_path is given.",
            "nargs": "?",
            "const": True,
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true: continue from the last checkpoint in --output_dir, or start when there is none; "
            "or the path of a checkpoint folder.",
            "nargs": "?",
            "const": "true",
        },
    )
    predict_with_generate: bool = field(
        default=False,
        metadata={
            "help": "Let the model answer some evaluation rows at every evaluation: exact match, ANLS and ROUGE-L, and "
            "examples with their pictures in TensorBoard."
        },
    )
    generation_samples: int = field(
        default=16,
        metadata={"help": "How many evaluation rows are answered with --predict_with_generate true."},
    )
    generation_max_new_tokens: int = field(
        default=128, metadata={"help": "Longest answer, in tokens, with --predict_with_generate true."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start over in an --output_dir that holds an earlier run: its checkpoints and its model "
            "are deleted when training starts."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What happens when a step's loss or gradient norm is NaN or infinite. The step is never "
            "applied, and its rows are named. stop: the third such step in a row ends the run; skip: it "
            "goes on.",
            "choices": ["stop", "skip"],
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes per rank that decode and cut images; 0: none but the trainer's own. Default: "
            "beside a "
            "GPU one per free core, at most 8; on a CPU 2, or 0 with fewer than 4 cores per rank."
        },
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep these processes from epoch to epoch."}
    )
    optim: str = field(
        default="adamw_torch",
        metadata={"help": "The optimizer, by transformers' name: adamw_torch, adamw_8bit, adafactor, ..."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: a row holds more than the model's text."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "The name of a batch's labels; always labels."}
    )
