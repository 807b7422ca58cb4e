"""The flags of the data side, for ``finetune.py`` and ``inspect_data.py``; no torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataset import DataOptions


@dataclass
class DataFlags:
    """How rows become samples, and what happens to rows that can't be used."""

    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that relative image and video paths start from. Default: the folder of the data "
            "file, and "
            "then the current folder."
        },
    )
    allow_remote_images: bool = field(
        default=False,
        metadata={"help": "Fetch images given as http(s) addresses; otherwise they are bad rows."},
    )
    max_image_pixels: int = field(
        default=178_956_970,
        metadata={
            "help": "Most pixels an image may have once decoded, against files that unfold to gigabytes; 0 "
            "for no "
            "limit."
        },
    )
    exif_orientation: str = field(
        default="auto",
        metadata={
            "help": "Whether images are turned upright by their EXIF orientation. auto: as inference does, "
            "which is "
            "no up to V-4.5 and yes for 4.6 and 4.7.",
            "choices": ["auto", "apply", "ignore"],
        },
    )
    enable_thinking: str = field(
        default="auto",
        metadata={
            "help": "Thinking mode of V-4.5, 4.6 and 4.7. auto: an answer that holds <think>...</think> is "
            "trained "
            "with it, any other behind the empty think block. true: every prompt asks for thoughts. false: "
            "every "
            "prompt has the empty think block, and thoughts in answers are left out.",
            "choices": ["auto", "true", "false"],
        },
    )
    train_on: str = field(
        default="all_turns",
        metadata={
            "help": 'Which answers are supervised. A message with "loss": false never is.',
            "choices": ["all_turns", "last_turn"],
        },
    )
    overlength: str = field(
        default="truncate",
        metadata={
            "help": "Rows over --model_max_length. truncate: cut at the limit, inside an answer if need be, "
            "in front "
            "of an image if the limit falls into it. drop: left out, counted and listed. error: a bad row. "
            "shrink_slices: fewer slices per image until the row fits, then truncate.",
            "choices": ["truncate", "drop", "error", "shrink_slices"],
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "Rows that can't be used. error: the run ends before the model is loaded, with all of "
            "them "
            "counted and the first twenty shown. skip: left out and listed in <output_dir>/bad_rows.jsonl. "
            "An image "
            "that becomes unreadable during training is left out and listed either way.",
            "choices": ["error", "skip"],
        },
    )
    check_images: str = field(
        default="auto",
        metadata={
            "help": "How images are checked before training. header: there, and of an image format. full: "
            "decoded. "
            "auto: full for up to 500 rows.",
            "choices": ["auto", "header", "full"],
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={
            "help": "Frames taken per second of video. Default: as the generation's inference: 1, and 3 for "
            "V-4.5. "
            "A folder or list of frames counts as sampled at this rate."
        },
    )
    max_num_frames: int | None = field(
        default=None,
        metadata={
            "help": "Most frames of a video; longer ones are thinned out evenly. Default: 64; 128 for 4.6 "
            "and 4.7; "
            "180 packs of up to 3 frames for V-4.5."
        },
    )

    given_num: bool = field(
        default=True,
        metadata={
            "help": "Whether the amounts in --data_path count (those of a .txt list, too). false: every row once."
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
            "help": "InternLM-XComposer2-4KHD: most tiles of 336 x 336 pixels that an image is cut into, in the "
            "place of --max_slice_nums. -1 for 7b and vl-7b, which don't cut images."
        },
    )

    def processing_options(self) -> dict[str, Any]:
        """The keyword arguments of ``load_processing`` that these flags decide."""
        names = ("enable_thinking", "train_on", "video_fps", "max_num_frames", "img_size", "hd_num")
        return {name: getattr(self, name) for name in names}

    def data_options(self, model_max_length: int | None) -> DataOptions:
        """The options of ``SupervisedDataset``."""
        from dataset import DataOptions

        return DataOptions(
            model_max_length=model_max_length,
            overlength=self.overlength,
            on_bad_row=self.on_bad_row,
            check_images=self.check_images,
            image_folder=self.image_folder,
            given_num=self.given_num,
            allow_remote_images=self.allow_remote_images,
            max_image_pixels=self.max_image_pixels,
            exif_orientation=self.exif_orientation,
        )
