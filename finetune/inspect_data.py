"""Look at a data set as training will see it, without a model and without a GPU.

    python inspect_data.py --model_name_or_path M --data_path D [--report report.html] [--json rows.json]
    [--show 0]

Reads every row in parallel: problems by kind with row numbers, lengths, slices, what --model_max_length and
--max_slice_nums should be, how much of a batch is padding. The exit code is 1 when a row can't be used.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from minicpm_tune.settings.command_flags import CommandParser, add_fields
from minicpm_tune.settings.command_line import flag_names
from minicpm_tune.settings.data_arguments import DataArguments
from minicpm_tune.training.process_lifecycle import run_command


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; flags of training that say nothing about data are named and ignored."""
    parser = CommandParser(prog="inspect_data.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="The checkpoint: a folder or a hub id.")
    parser.add_argument("--data_path", required=True, help="The rows, in any form that finetune.py takes.")
    parser.add_argument(
        "--per_device_train_batch_size",
        type=int,
        default=1,
        help="Rows in a batch, for the share of padding.",
    )
    parser.add_argument("--cache_dir", help="Where checkpoints from the hub are kept.")
    names = {one.name for one in fields(DataArguments)} - {"data_path", "eval_data_path"}
    add_fields(parser.add_argument_group("Data, as in training"), DataArguments, names)
    output = parser.add_argument_group("Output")
    output.add_argument("--report", help="Write an HTML page with histograms and all problems.")
    output.add_argument(
        "--json",
        help="Write a JSON file: a summary, and per row input_ids, labels, image_bound, tgt_sizes and the "
        "SHA-256 of "
        "each slice's uint8 pixels, or its problem.",
    )
    output.add_argument(
        "--show", type=int, nargs="+", default=[], metavar="N",
        help="Only print these rows as the model will see them, numbered from 0 through all files: the "
        "prompt with "
        "placeholders folded, supervised text in [[ ]]. The slices go to sample_N.png in the current folder.",
    )  # fmt: skip
    output.add_argument(
        "--workers", type=int, help="Processes that read rows. Unset: one per core, at most 16."
    )
    values, rest = parser.parse_known_args(argv)
    parser.refuse_unknown(rest, also_known=flag_names())
    ignored = [word for word in rest if word.startswith("--")]
    if ignored:
        sys.stderr.write(f"ignored, as they say nothing about data: {' '.join(ignored)}\n")
    return values


def main(argv: list[str]) -> int:
    """Inspect a data set; give the exit code: 1 for rows that can't be used, or a mistake of the user's."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted.")


def run(values: argparse.Namespace) -> int:
    """Do what the flags ask for; 1 when there are rows that can't be used."""
    # Imported here: torch and transformers take seconds that --help need not wait for.
    from minicpm_tune.planning.inspection import inspect

    return min(inspect(values), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
