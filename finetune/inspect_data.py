"""Look at a data set as training will see it, without a model and without a GPU.

    python inspect_data.py --model_name_or_path M --data_path D [--report report.html] [--json rows.json]
    [--show 0]

Reads every row, in parallel, and reports problems by kind with row numbers, lengths, slices, what --model_max_length
and --max_slice_nums should be, and how much of a batch is padding. The exit code is 1 when a row can't be used.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from minicpm_tune.errors import DataError, RowError
from minicpm_tune.settings.argument_groups import ModelArguments
from minicpm_tune.settings.command_flags import CommandParser, add_fields
from minicpm_tune.settings.data_arguments import DataArguments
from minicpm_tune.settings.finetune_command import flag_names
from minicpm_tune.training.process_lifecycle import run_command

if TYPE_CHECKING:
    from dataset import SupervisedDataset
    from minicpm_tune.batch import Sample
    from minicpm_tune.planning.row_statistics import DataStatistics


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Flags of training that change nothing here are named and ignored."""
    parser = CommandParser(prog="inspect_data.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="The model: a checkpoint's folder or a Hub id.")
    add("--data_path", required=True, help="The rows, in any form that finetune.py takes.")
    add(
        "--per_device_train_batch_size",
        type=int,
        default=1,
        help="Rows in a batch, for the share of padding.",
    )
    add("--cache_dir", help="Where checkpoints from the Hub are kept.")
    of_runs = {"data_path", "eval_data_path", "eval_split", "eval_max_samples"}
    names = {one.name for one in fields(DataArguments)} - of_runs
    add_fields(parser.add_argument_group("Data, as in training"), DataArguments, names)
    add_fields(parser, ModelArguments, {"new_tokens"})
    add = parser.add_argument_group("Output").add_argument
    add(
        "--report",
        help="Write an HTML page: histograms, all problems, and a look at some rows with their pictures, sounds and "
        "prompts. One file that needs no network.",
    )
    add(
        "--report_rows", type=_row_count, default=12,
        help="How many of the first, the bad, the longest and of random rows that page shows.",
    )  # fmt: skip
    add(
        "--json",
        help="Write a JSON file: a summary, and of each row its input_ids, labels, image_bound, tgt_sizes, those "
        "of audio, and the SHA-256 of each slice's uint8 pixels, or its problem.",
    )
    add(
        "--show", type=int, nargs="+", default=[], metavar="N",
        help="Only print these rows as the model will see them: the prompt with placeholders folded and supervised "
        "text in [[ ]]. The slices are drawn to sample_N.png in the current folder, the log-mel frames of audio to "
        "sample_N_audio.png, boxes on their picture to sample_N_boxes.png. Rows are numbered from 0, through all "
        "files.",
    )  # fmt: skip
    add("--workers", type=int, help="Processes that read rows. Default: one per core, at most 16.")
    parser.refuse_repeated(argv)
    values, rest = parser.parse_known_args(argv)
    written = [f"--{name}" for name in ("report", "json") if getattr(values, name) is not None]
    if values.show and written:
        parser.error(f"--show prints rows and writes no {written[0]}. Give one of them.")
    parser.refuse_unknown(rest, also_known=flag_names())
    ignored = [word for word in rest if word.startswith("--")]
    if ignored:
        sys.stderr.write(f"ignored, because they change nothing here: {' '.join(ignored)}\n")
    return values


def _row_count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(
            f"found {count}, expected 0 or more: how many rows of each kind are shown"
        )
    return count


def main(argv: list[str]) -> int:
    """Inspect a data set; the exit code is 1 for rows that can't be used, or for a user's mistake."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted; no report was written.")


def run(values: argparse.Namespace) -> int:
    """Show the rows that are asked for, or report on all; 1 when some of them can't be used."""
    rows = open_rows(values)
    if values.show:
        return int(not all([show(rows, index) for index in values.show]))
    return int(report(rows, values).bad != [])


def open_rows(values: argparse.Namespace) -> SupervisedDataset:
    """Open the rows with what the checkpoint says about text and images."""
    # Imported here, as in the functions below: torch and transformers take seconds that --help need not wait for.
    from dataset import SupervisedDataset
    from minicpm_tune.checkpoints.model_folder import resolve_model_folder
    from minicpm_tune.checkpoints.vocabulary import read_new_tokens
    from minicpm_tune.data.samples import load_processing

    given = {one.name: getattr(values, one.name) for one in fields(DataArguments) if one.name in values}
    arguments = DataArguments(**{**given, "model_max_length": values.model_max_length or None})
    folder = resolve_model_folder(values.model_name_or_path, cache_dir=values.cache_dir, weights=False)
    tokens = () if values.new_tokens is None else read_new_tokens(values.new_tokens)
    processing = load_processing(folder, arguments, new_tokens=tokens)
    return SupervisedDataset(values.data_path, processing, max_samples=values.max_samples)


def report(rows: SupervisedDataset, values: argparse.Namespace) -> DataStatistics:
    """Measure every row, print the summary, and write the files that are asked for."""
    from minicpm_tune.data.row_check import for_rows
    from minicpm_tune.files import whole_file
    from minicpm_tune.planning.data_report import as_page, as_text, summarize
    from minicpm_tune.planning.row_statistics import collect, measure_row

    measure = partial(measure_row, decode=values.check_images != "header", details=values.json is not None)
    with ExitStack() as files:
        # Opened before the work, so that a place that can't be written to is reported at once.
        page = values.report and files.enter_context(whole_file(values.report, flag="--report"))
        lines = values.json and files.enter_context(whole_file(values.json, flag="--json"))
        facts = for_rows(
            rows, range(rows.mixture.row_count), measure, title="inspecting", workers=values.workers
        )
        found = collect(facts, rows, write=_list_writer(lines) if lines else None)
        summary = summarize(found, rows, batch_size=values.per_device_train_batch_size)
        if lines:
            lines.write(f'\n], "summary": {json.dumps(summary)}}}\n')
        if page:
            page.write(as_page(summary, found, rows, shown=values.report_rows))
    sys.stdout.write(as_text(summary, found) + "\n")
    return found


def _list_writer(file: IO[str]) -> Callable[[str], object]:
    """Writes rows into a JSON list as they come."""
    before = chain(['{"rows": [\n'], repeat(",\n"))
    return lambda line: file.write(next(before) + line)


def show(rows: SupervisedDataset, index: int) -> bool:
    """Print a row as the model will see it, and draw its slices.

    Returns:
        Whether it can be used.

    Raises:
        DataError: When there is no such row.
    """
    from minicpm_tune.batch import IGNORE_INDEX
    from minicpm_tune.planning.row_view import contact_sheet, prompt_text, spectrogram

    processing, count = rows.processing, rows.mixture.row_count
    if not 0 <= index < count:
        raise DataError(
            f"--show {index}: expected a number from 0 to {count - 1}, as there are {count} rows."
        )
    try:
        sample = processing.finish(rows.plan(index))
    except RowError as error:
        sys.stdout.write(f"{rows.describe(index, error)}\n")
        return False
    supervised = int((sample["labels"] != IGNORE_INDEX).sum())
    sizes = ", ".join(f"{height} x {width}" for height, width in sample["tgt_sizes"].tolist())
    sys.stdout.write(
        f"--- row {index}: {len(sample['input_ids'])} tokens, {supervised} supervised, "
        f"{len(sample['tgt_sizes'])} slices{sizes and f' ({sizes} patches)'}{_heard(sample)}\n"
        f"{prompt_text(sample, processing.tokenizer, processing.style)}\n"
    )
    for name, end, sheet in (("slices", "", contact_sheet(sample)), ("audio", "_audio", spectrogram(sample))):
        if sheet is not None:
            path = Path(f"sample_{index}{end}.png")
            sheet.save(path)
            sys.stdout.write(f"{name}: {path}\n")
    _draw_boxes(rows, index)
    return True


def _draw_boxes(rows: SupervisedDataset, index: int) -> None:
    """Draw the boxes of a row on its pictures."""
    from minicpm_tune.data.grounding import draw_boxes
    from minicpm_tune.data.media.images import Picture

    row = rows.parse(index)
    pictures = rows.open_media(index, row.sources)
    pairs = zip(pictures, rows.processing.boxes(row.turns, pictures), strict=True)
    drawn = [(picture, boxes) for picture, boxes in pairs if boxes and isinstance(picture, Picture)]
    for number, (picture, boxes) in enumerate(drawn):
        path = Path(f"sample_{index}_boxes{number or ''}.png")
        [image] = picture.frames()
        draw_boxes(image, boxes).save(path)
        sys.stdout.write(f"boxes: {path}\n")


def _heard(sample: Sample) -> str:
    """The audio of a sample in a few words; nothing without any."""
    if "audio_segments" not in sample:
        return ""
    frames, _, tokens = sample["audio_segments"].sum(dim=0).tolist()
    return f", {frames / 100:.2f} s of audio as {tokens} tokens"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
