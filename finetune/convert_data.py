"""Write data of other forms as rows that finetune.py takes.

    python convert_data.py coco annotations.json --images FOLDER --output rows.jsonl --task detect

The first word says what is converted; ``convert_data.py coco --help`` lists the flags for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from minicpm_tune.settings.command_flags import CommandParser
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
    from minicpm_tune.data.coco import CocoFile
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


# Word -> its flags, and what does the work.
FORMS: dict[str, tuple[Callable[[], CommandParser], Callable[[argparse.Namespace], int]]] = {
    "coco": (coco_parser, convert_coco),
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
    """Convert one file; the exit code is 1 when nothing was written, or after a message for a user's mistake."""
    values = parse_flags(argv)
    return run_command(values.convert, values, interrupted="Interrupted; nothing was written.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
