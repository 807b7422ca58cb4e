"""Let a model answer the rows of a data file, and compare with the answers in it.

    python predict.py --model_name_or_path M [--adapter A] --data_path rows.json --output out.jsonl
    torchrun --nproc_per_node 4 predict.py ...    (the rows are shared out)

Each row's last answer is left out and predicted. A stopped run goes on where it was with the same command.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicpm_tune import processes
from minicpm_tune.settings.command_flags import (
    CommandParser,
    add_generation_flags,
    add_model_flags,
    add_switch,
    check_generation_flags,
    count,
)
from minicpm_tune.training.process_lifecycle import run_command

logger = logging.getLogger("minicpm_tune.predict")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="predict.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", required=True, help="The rows, in any form that training takes.")
    parser.add_argument("--output", required=True, help="The file to write: one JSON object per row.")
    parser.add_argument(
        "--image_folder", help="What relative image paths start from. Unset: the data file's folder."
    )
    parser.add_argument("--batch_size", type=count, default=4, help="Rows answered at once by each process.")
    parser.add_argument("--limit", type=count, help="Answer only the first rows, so many. Unset: all.")
    add_switch(parser, "--overwrite", default=False, help="Start over where the output is there already.")
    add_model_flags(parser)
    add_generation_flags(parser, sampling=False, max_new_tokens=256)
    values = parser.parse_args(argv)
    check_generation_flags(parser, values)
    return values


def main(argv: list[str]) -> int:
    """Run one prediction, and give the exit code: 0, or 1 with one message for a mistake of the user's."""
    told = "Interrupted; the rows answered so far are kept, and the same command goes on with the others."
    return run_command(run, parse_flags(argv), interrupted=told)


def run(values: argparse.Namespace) -> None:
    """The steps of a prediction, in their order."""
    from transformers import set_seed

    from minicpm_tune.answering.generate import generation_options
    from minicpm_tune.answering.load import ModelChoice, find_model, load_for_inference
    from minicpm_tune.answering.metrics import mean_scores
    from minicpm_tune.answering.prediction_file import PredictionFile
    from minicpm_tune.answering.prediction_rows import predict

    rank, world = processes.rank(), processes.world_size()
    file = PredictionFile(Path(values.output).expanduser(), rank=rank, world=world)
    with _after_first_process(rank, world):
        if rank == 0:
            file.prepare(_settings(values), overwrite=values.overwrite)
    set_seed(values.seed + rank)
    choice = ModelChoice.of(values)
    found = find_model(choice)
    rows = _rows(values, found.processing)
    done = {line["row"] for line in file.done()}
    wanted = range(len(rows) if values.limit is None else min(values.limit, len(rows)))
    mine = [index for index in wanted if index not in done][rank::world]
    if done:
        logger.info("%d of %d rows are answered already.", len(done & set(wanted)), len(wanted))
    rows.check(mine)
    model, _ = load_for_inference(choice, found)
    options = generation_options(values)
    for lines in predict(model, rows, mine, batch_size=values.batch_size, options=options):
        file.append(lines)
    _wait_for_all(world)
    if rank == 0:
        scores = mean_scores(line["scores"] for line in file.all_lines() if line["scores"])
        lines = file.finish(scores)
        sys.stdout.write(_summary(lines, scores))
    _wait_for_all(world)


def _rows(values: argparse.Namespace, processing: Any) -> Any:
    from dataset import SupervisedDataset
    from minicpm_tune.answering.prediction_rows import PredictionRows

    arguments = replace(processing.arguments, image_folder=values.image_folder)
    rows = SupervisedDataset(values.data_path, replace(processing, arguments=arguments))
    return PredictionRows(rows, thinking=values.enable_thinking, system_prompt=values.system_prompt)


def _settings(values: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers; a run goes on only with the same."""
    from minicpm_tune.answering.generate import generation_options

    names = ("model_name_or_path", "adapter", "data_path", "image_folder")
    paths = {name: getattr(values, name) for name in names}
    here = {
        name: os.path.abspath(value) if value and os.path.exists(value) else value
        for name, value in paths.items()
    }
    rest = (
        "dtype",
        "load_4bit",
        "max_slice_nums",
        "video_fps",
        "max_num_frames",
        "enable_thinking",
        "system_prompt",
        "seed",
    )
    return here | {name: getattr(values, name) for name in rest} | generation_options(values)


def _summary(lines: Sequence[dict[str, Any]], scores: dict[str, float]) -> str:
    compared = sum(line["scores"] is not None for line in lines)
    rows = f"{len(lines)} rows answered, {compared} compared with their answers\n"
    return rows + "".join(f"{name:<12}{value:8.4f}\n" for name, value in scores.items())


def _after_first_process(rank: int, world: int) -> Any:
    """Let rank 0 do the block's work before the other processes go on."""
    from contextlib import contextmanager
    from datetime import timedelta

    import torch.distributed as dist

    @contextmanager
    def order() -> Iterator[None]:
        if world > 1 and not dist.is_initialized():
            # For waiting alone, as long as the slowest needs; the processes exchange no tensors.
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        try:
            yield
        finally:
            _wait_for_all(world)

    return order()


def _wait_for_all(world: int) -> None:
    import torch.distributed as dist

    if world > 1:
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
