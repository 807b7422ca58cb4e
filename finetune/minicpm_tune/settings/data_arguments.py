"""Everything that decides how rows become samples: one dataclass, from the command line to the data side.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from minicpm_tune.errors import DataError

# Twice Pillow's default warning limit, where Pillow itself would refuse.
DEFAULT_MAX_PIXELS = 178_956_970


@dataclass
class RowLimits:
    """How long a row may be and how finely its images are cut.

    The official script has both in its TrainingArguments; ours inherits them there too, and one flag fills both.
    """

    model_max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Longest row, in tokens, image placeholders included. --overlength says what happens to longer "
            "rows; by default they are cut at the end, never inside an image."
        },
    )
    max_slice_nums: int | None = field(
        default=9,
        metadata={
            "help": "Most slices an image is cut into, the overview not counted. More slices see finer detail and "
            "cost 64 to 96 tokens each."
        },
    )


@dataclass
class DataArguments(RowLimits):
    """Which rows are learned from, and how they become samples."""

    _argument_group_name = "Data"

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "The training rows: JSON, JSONL, CSV, Parquet or a Hugging Face datasets folder, with #count or "
            ":weight behind it; several, separated by commas; or a .txt list of them (docs/data.md)."
        },
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={
            "help": "The evaluation rows, same format. Needed by --do_eval and --eval_strategy, without --eval_split."
        },
    )
    eval_split: float | None = field(
        default=None,
        metadata={
            "help": "Without --eval_data_path: hold rows out of training for the evaluation, a fraction (0.01) or a "
            "number of rows (200). Rows that share a picture stay on one side. The seed (--data_seed, or --seed) and "
            "the pictures decide, not the rows' order: with a fraction, a row keeps its side when rows are added."
        },
    )
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "The first N rows of each training file are all that is read of it, before --eval_split; also the "
            "most that a #count takes."
        },
    )
    eval_max_samples: int | None = field(
        default=None,
        metadata={
            "help": "The same for each file of --eval_data_path, or for what --eval_split holds out of each."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "New names for the columns of a table or the keys of rows, as JSON: "
            '\'{"query": "user", "response": "assistant", "image_path": "image"}\'. The names are those of '
            "docs/data.md, section Forms; in a mixture, each file is renamed where it has the columns."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that relative image and video paths start from. Default: the folder of the data file, and "
            "then the current folder."
        },
    )
    allow_remote_images: bool = field(
        default=False,
        metadata={"help": "Fetch images given as http(s) addresses; otherwise they are bad rows."},
    )
    max_image_pixels: int = field(
        default=DEFAULT_MAX_PIXELS,
        metadata={
            "help": "Most pixels an image may have once decoded, against files that unfold to gigabytes; 0 for no "
            "limit."
        },
    )
    exif_orientation: str = field(
        default="auto",
        metadata={
            "help": "Whether images are turned upright by their EXIF orientation. auto: as inference does, which is "
            "no up to V-4.5 and yes for 4.6 and 4.7.",
            "choices": ["auto", "apply", "ignore"],
        },
    )
    enable_thinking: str = field(
        default="auto",
        metadata={
            "help": "Thinking mode of V-4.5 and later. auto: an answer that holds <think>...</think> is trained with "
            "it, any other behind the empty think block. Every prompt of V-4.6-Thinking opens thoughts, and an answer "
            "without any learns to close them. true: every prompt asks for thoughts. false: every prompt has the "
            "empty think block, and thoughts in answers are left out.",
            "choices": ["auto", "true", "false"],
        },
    )
    audio_prompt: str | None = field(
        default=None,
        metadata={
            "help": "MiniCPM-o: the prompt of a conversation with audio. chat (default): the speech form that the "
            "released chat() writes. plain: the form without speech tokens, which vLLM and other trainers use.",
            "choices": ["chat", "plain"],
        },
    )
    train_on: str = field(
        default="all_turns",
        metadata={
            "help": 'Which answers are supervised. A message with "loss": false never is.',
            "choices": ["all_turns", "last_turn"],
        },
    )
    literal_control_tokens: bool = field(
        default=False,
        metadata={
            "help": "Whether control texts in messages (<|im_end|>, </s>, <image> without an image, ...) are encoded "
            'as plain text. false: such a row is a bad row, unless it sets "literal_control_tokens": true or writes a '
            "backslash in front of the text.",
        },
    )
    overlength: str = field(
        default="truncate",
        metadata={
            "help": "Rows over --model_max_length. truncate: cut at the limit, inside an answer if need be, in front "
            "of an image if the limit falls into it. drop: left out, counted and listed. error: a bad row. "
            "shrink_slices: fewer slices per image until the row fits, then truncate.",
            "choices": ["truncate", "drop", "error", "shrink_slices"],
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "Rows that can't be used. error: the run ends before the model is loaded, with all of them "
            "counted and the first twenty shown. skip: left out and listed in <output_dir>/bad_rows.jsonl. An image "
            "that becomes unreadable during training is left out and listed either way.",
            "choices": ["error", "skip"],
        },
    )
    check_images: str = field(
        default="auto",
        metadata={
            "help": "How images are checked before training. header: the file exists and is an image. full: it is "
            "decoded. auto: full for up to 500 rows.",
            "choices": ["auto", "header", "full"],
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={
            "help": "Frames taken per second of video. Default: as the generation's inference: 1, and 3 for V-4.5. A "
            "folder or list of frames counts as sampled at this rate."
        },
    )
    max_num_frames: int | None = field(
        default=None,
        metadata={
            "help": "Most frames of a video; longer ones are thinned out evenly. Default: 64; 128 for 4.6 and 4.7; "
            "180 packs of up to 3 frames for V-4.5."
        },
    )
    video_sound: bool = field(
        default=False,
        metadata={
            "help": "MiniCPM-o: take videos with their sound, a frame and the sound of its second in turn, as the omni "
            'form of the released chat() does. A row\'s "use_audio": true or false goes before it.'
        },
    )
    stack_frames: int | None = field(
        default=None,
        metadata={
            "help": "MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: frames that are shown per second of a film. Those after the "
            "first of each second share one composite picture, so that every number above 1 doubles the pictures. "
            "Default: the checkpoint's, which is 1."
        },
    )
    given_num: bool = field(
        default=True,
        metadata={
            "help": "Whether the amounts in --data_path count (those of a .txt list, too). false: every row once."
        },
    )
    downsample_mode: str | None = field(
        default=None,
        metadata={
            "help": "MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: how many patches become one token. 4x gives four times the "
            "tokens of 16x, for fine detail and counting. Default: the checkpoint's, 4x for MiniCPM-OCR.",
            "choices": ["4x", "16x"],
        },
    )
    img_size: int | None = field(
        default=None,
        metadata={
            "help": "InternLM-XComposer2: side of the square that images are resized to, in pixels: 224 for 7b, 490 "
            "for vl-7b. Default: the checkpoint's, which is the only right one. 4khd does not use it."
        },
    )
    hd_num: int | None = field(
        default=None,
        metadata={
            "help": "InternLM-XComposer2-4KHD: most tiles of 336 x 336 pixels that an image is cut into; replaces "
            "--max_slice_nums. -1 for 7b and vl-7b, which don't cut images."
        },
    )

    def __post_init__(self) -> None:
        if self.stack_frames is not None and self.stack_frames < 1:
            raise DataError(f"--stack_frames: found {self.stack_frames}, expected at least 1. Raise it.")
        for name in ("max_samples", "eval_max_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataError(f"--{name}: found {value}, expected at least 1. Raise it, or leave it out.")
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise DataError(
                    f"--{each.name}: found {value!r}, expected one of {', '.join(choices)}. Choose one."
                )

    @classmethod
    def of_checkpoint(cls, **values) -> DataArguments:
        """Arguments with no limits but the checkpoint's own: as at inference, unless ``values`` say otherwise."""
        return cls(**{"model_max_length": None, "max_slice_nums": None, **values})
