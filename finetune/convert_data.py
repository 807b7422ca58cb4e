"""Write data of other forms as rows that finetune.py takes.

    python convert_data.py coco annotations.json --images FOLDER --output rows.jsonl --task detect
    python convert_data.py rows INPUT --output official.json

The first word says what is converted; ``convert_data.py coco --help`` lists the flags for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from minicpm_tune.errors import RowError, UserError
from minicpm_tune.settings.command_flags import CommandParser, add_switch
from minicpm_tune.training.process_lifecycle import run_command


def coco_parser() -> CommandParser:
    """The flags of ``convert_data.py coco``."""
    parser = CommandParser(
        prog="convert_data.py coco",
        description="Write a COCO annotation file as rows with boxes. Crowds have no box, and pictures that are "
        "missing, broken or of another size than the file says are left out and counted.",
    )
    parser.add_argument("annotations", help="The file, such as instances_train2017.json.")
    parser.add_argument("--images", required=True, help="The folder of its pictures.")
    parser.add_argument("--output", required=True, help="The file of rows to write, such as rows.jsonl.")
    parser.add_argument(
        "--task", choices=["detect", "refer", "count"], required=True,
        help="detect: name and box of every object, one row per picture. refer: the boxes of one name (an "
        "annotation's 'caption', or its category), one row per name. count: how many there are of one name; one name "
        "in every picture is absent.",
    )  # fmt: skip
    parser.add_argument(
        "--question", help="Ask this instead of the task's own question; <ref-object> in it is the name."
    )
    return parser


def convert_coco(values: argparse.Namespace) -> int:
    """Write the rows of a COCO file; 1 when there is none."""
    # Imported here: what reads images takes seconds that --help need not wait for.
    from minicpm_tune.data.files.coco import CocoFile
    from minicpm_tune.files import whole_file

    output = Path(values.output).expanduser()
    file = CocoFile(Path(values.annotations).expanduser(), Path(values.images).expanduser())
    count = 0
    with whole_file(values.output, flag="--output") as lines:
        for row in file.rows(values.task, folder=output.parent, question=values.question):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    sys.stdout.write(f"{count} rows: {values.output}\n")
    for reason, number in file.left_out.most_common():
        sys.stdout.write(f"left out: {number} {reason}\n")
    return int(count == 0)


def rows_parser() -> CommandParser:
    """The flags of ``convert_data.py rows``."""
    parser = CommandParser(
        prog="convert_data.py rows",
        description="Write rows of any accepted form in the official form: id, image, conversations. Bad rows are left "
        "out, counted, and make the exit code 1.",
    )
    parser.add_argument("input", help="The rows, in any form that --data_path of finetune.py takes.")
    parser.add_argument(
        "--output", required=True, help="The file to write: a JSON list, or one row per line with .jsonl."
    )
    parser.add_argument("--columns", help="New names for columns or keys, as JSON; see finetune.py.")
    parser.add_argument("--image_folder", help="Folder that relative paths start from; see finetune.py.")
    parser.add_argument(
        "--media_dir",
        help="Where images, videos and audio that rows hold as bytes or base64 are written to. Default: OUTPUT's name "
        "with _media, beside it.",
    )
    add_switch(parser, "--overwrite", default=False, help="Replace the output file when it exists.")
    return parser


def convert_rows(values: argparse.Namespace) -> int:
    """Write rows in the official form; 1 when some of them can't be."""
    # Imported here: what reads rows takes seconds that --help need not wait for.
    from minicpm_tune.data.bad_rows import SHOWN_PROBLEMS, BadRow
    from minicpm_tune.data.files.row_files import Mixture
    from minicpm_tune.data.official_rows import OfficialForm
    from minicpm_tune.files import whole_file

    output = Path(values.output).expanduser()
    if output.exists() and not values.overwrite:
        raise UserError(f"--output {values.output}: the file exists. Name another, or pass --overwrite true.")
    mixture = Mixture(values.input, given_num=False, columns=values.columns)
    if any(output.resolve() == path.resolve() for file in mixture.files for path in file.rows.files):
        raise UserError(f"--output {values.output}: the rows are read from this file. Name another.")
    form = OfficialForm(
        output, Path(values.media_dir or output.with_name(f"{output.stem}_media")).expanduser()
    )
    unknown: Counter[str] = Counter()
    written = bad = 0
    start, between, end = ("", "\n", "\n") if output.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    with whole_file(values.output, flag="--output") as lines:
        for index in range(mixture.row_count):
            source, _ = mixture.origin(index)
            folder = Path(values.image_folder or mixture.files[source].rows.path.parent).expanduser()
            try:
                row, left_out = form.write(mixture.read(index), folder)
            except RowError as error:
                bad += 1
                if bad <= SHOWN_PROBLEMS:
                    sys.stderr.write(f"left out: {BadRow.of(mixture, index, error)}\n")
                continue
            unknown.update(left_out)
            lines.write((between if written else start) + json.dumps(row, ensure_ascii=False))
            written += 1
        if not written:
            raise UserError(f"none of the {bad} rows of {values.input} can be used; nothing was written.")
        lines.write(end)
    sys.stdout.write(f"{written} rows: {values.output}\n")
    for key, count in unknown.most_common(SHOWN_PROBLEMS):
        sys.stdout.write(f"not written, because nothing reads it: {key} ({count} rows)\n")
    if bad:
        sys.stdout.write(f"left out: {bad} rows that can't be used\n")
    return int(bad > 0)


# Word -> its flags, and what does the work.
FORMS: dict[str, tuple[Callable[[], CommandParser], Callable[[argparse.Namespace], int]]] = {
    "coco": (coco_parser, convert_coco),
    "rows": (rows_parser, convert_rows),
}


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; ``convert`` of the result does the work."""
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    if word not in FORMS:
        parser = CommandParser(prog="convert_data.py", description=(__doc__ or "").partition("\n")[0])
        parser.add_argument(
            "form", choices=list(FORMS), help="What is converted; FORM --help lists its flags."
        )
        parser.parse_args(argv)
    flags, convert = FORMS[word]
    values = flags().parse_args(rest)
    values.convert = convert
    return values


def main(argv: list[str]) -> int:
    """Convert one file; the exit code is 1 when nothing or not every row was written, or after a message."""
    values = parse_flags(argv)
    return run_command(values.convert, values, interrupted="Interrupted; nothing was written.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
