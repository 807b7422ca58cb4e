"""Let a model answer the rows of a data file, and compare its answers with theirs.

    python predict.py --model_name_or_path M [--adapter A] --data_path rows.json --output out.jsonl
    torchrun --nproc_per_node 4 predict.py ...    (the processes share the rows)

The last answer of each row is held back and predicted. To continue a stopped run, repeat its command.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_tune import processes
from minicpm_tune.answering.metrics import BOX_METRICS, ERROR_RATES, METRICS
from minicpm_tune.settings.command_flags import CommandParser, add_switch, count, read_answering_flags
from minicpm_tune.training.process_lifecycle import run_command

if TYPE_CHECKING:
    from minicpm_tune.answering.prediction import PredictionFile, PredictionRows
    from minicpm_tune.data.samples import Processing

logger = logging.getLogger("minicpm_tune.predict")

# Flags that change no answer; a stopped run may continue with others.
_WITHOUT_EFFECT = {
    "output", "overwrite", "limit", "batch_size", "on_bad_row", "device", "cache_dir", "attn_implementation",
    "allow_other_base",
}  # fmt: skip
_PATHS = ("model_name_or_path", "adapter", "data_path", "image_folder")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="predict.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", required=True, help="The rows, in any form that training takes.")
    parser.add_argument("--columns", help="New names for columns or keys, as JSON; see finetune.py.")
    parser.add_argument("--output", required=True, help="The file to write: one JSON object per row.")
    parser.add_argument("--batch_size", type=count, default=4, help="Rows that each process answers at once.")
    parser.add_argument("--limit", type=count, help="Answer only the first LIMIT rows. Unset: all.")
    parser.add_argument(
        "--on_bad_row", choices=["error", "skip"], default="error",
        help="Rows that can't be answered. error: the run ends before the model is loaded. skip: they are left out and "
        "listed in OUTPUT.bad_rows.jsonl.",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", nargs="+", choices=[*METRICS, *BOX_METRICS, *ERROR_RATES],
        help="What the answers are compared by. Unset: exact_match, anls and rouge_l; for expected answers with boxes "
        "also iou_50, mean_iou and box_count_error; for rows with audio also wer and cer, the errors in words and in "
        "characters.",
    )  # fmt: skip
    add_switch(parser, "--overwrite", default=False, help="Start over when the output file exists.")
    return read_answering_flags(parser, argv, sampling=False, max_new_tokens=256)


def main(argv: list[str]) -> int:
    """Run one prediction; the exit code is 0, or 1 after a message for a user's mistake."""
    kept = "Interrupted. The rows answered so far are kept; the same command continues with the others."
    return run_command(run, parse_flags(argv), interrupted=kept)


def run(values: argparse.Namespace) -> None:
    """The steps of a prediction, in their order."""
    # Imported here: torch and transformers take seconds that --help need not wait for.
    import torch

    from minicpm_tune.answering.generate import generation_options
    from minicpm_tune.answering.load import ModelChoice, find_model, load_for_inference
    from minicpm_tune.answering.prediction import PredictionFile, predict

    rank, world = processes.rank(), processes.world_size()
    options = generation_options(values)
    file = PredictionFile(Path(values.output).expanduser(), rank=rank, world=world)
    if world > 1:
        _join_processes()
    try:
        if rank == 0:
            file.prepare(_what_decides_answers(values) | options, overwrite=values.overwrite)
    finally:
        processes.gather(None)  # the others wait
    torch.manual_seed(values.seed + rank)
    choice = ModelChoice.of(values)
    found = find_model(choice)
    rows = _open_rows(values, found.processing, file)
    mine = rows.check(_not_answered(rows, file, values.limit)[rank::world])
    model, _ = load_for_inference(choice, found)
    for lines in predict(model, rows, mine, batch_size=values.batch_size, options=options):
        file.append(lines)
    processes.gather(None)
    if rank == 0:
        lines, scores = file.finish()
        sys.stdout.write(_summary(lines, scores))
        if values.on_bad_row == "skip":
            sys.stdout.write(f"{rows.rows.bad_rows.summary()}\n")
    processes.gather(None)


def _open_rows(values: argparse.Namespace, processing: Processing, file: PredictionFile) -> PredictionRows:
    from dataset import SupervisedDataset
    from minicpm_tune.answering.prediction import PredictionRows

    arguments = replace(processing.arguments, on_bad_row=values.on_bad_row, columns=values.columns)
    rows = SupervisedDataset(values.data_path, replace(processing, arguments=arguments))
    rows.bad_rows.path = file.bad_rows_path
    return PredictionRows(
        rows, thinking=values.enable_thinking, system_prompt=values.system_prompt, metrics=values.metrics
    )


def _not_answered(rows: PredictionRows, file: PredictionFile, limit: int | None) -> list[int]:
    """The rows that are still to be answered."""
    from minicpm_tune.answering.prediction import read_lines

    done = {line["row"] for line in read_lines(file.path)}
    wanted = range(len(rows) if limit is None else min(limit, len(rows)))
    if done:
        logger.info("%d of %d rows are answered already.", len(done & set(wanted)), len(wanted))
    return [index for index in wanted if index not in done]


def _what_decides_answers(values: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide the answers; a stopped run continues only with the same ones."""
    flags = {name: value for name, value in vars(values).items() if name not in _WITHOUT_EFFECT}
    here = {name: os.path.abspath(flags[name]) for name in _PATHS if os.path.exists(flags[name] or "")}
    return flags | here


def _summary(lines: Sequence[dict[str, Any]], scores: dict[str, float]) -> str:
    compared = sum(line["scores"] is not None for line in lines)
    rows = f"{len(lines)} rows answered, {compared} compared with their answers\n"
    return rows + "".join(f"{name:<16}{value:8.4f}\n" for name, value in scores.items())


def _join_processes() -> None:
    """Join the processes, only for waiting, as long as the slowest needs; they exchange no tensors."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
