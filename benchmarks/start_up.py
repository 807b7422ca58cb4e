"""Start-up: how long --help takes, and how long a large data file needs until the first step is done.

    python benchmarks/start_up.py [--rows 1000000] [--repeats 3]

Writes a JSONL file (2,000 different rows, again and again, over 16 pictures), indexes it, and measures how
fast its rows are checked. What the check of all of them finds is put together from the different ones and
kept beside the index, as finetune.py keeps it. Then finetune.py is run for one step, with a small model, as a
user runs it. CPU seconds are what the run would take on a machine without other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo"):
    sys.path.insert(0, str(ROOT / folder))

DIFFERENT, PICTURES = 2000, 16
RUNS = {
    "first step": [],
    "first step, --packing true": ["--packing", "true"],
    "first step, --group_by_length true": ["--group_by_length", "true"],
}


def measured(command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(title: str, command: list[str], repeats: int) -> None:
    """Print the medians of a command, and the spread."""
    wall, cpu = zip(*[measured(command) for _ in range(repeats)], strict=True)
    for name, values in (("wall", wall), ("CPU", cpu)):
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"{title:<36}{name:>5} {statistics.median(values):>7.2f} s {spread}", flush=True)


def write_rows(folder: Path, count: int) -> Path:
    """The data file and its pictures."""
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = random.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((110, 90)).save(folder / f"{number}.png")
    lines = []
    for number in range(DIFFERENT):
        answer = " ".join(["A cat on a mat."] * int(random.lognormal(1, 0.8) + 1))
        turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"image": f"{number % PICTURES}.png", "conversations": turns}) + "\n")
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for start in range(0, count, DIFFERENT):
            file.writelines(lines[: count - start])
    return path


def keep_check(path: Path, model: Path) -> None:
    """Check the different rows as finetune.py does, and keep what the check of all would find."""
    from dataset import SupervisedDataset
    from minicpm_tune.data.row_check import FileCheck, check_path, check_row, for_rows
    from minicpm_tune.data.samples import load_processing
    from minicpm_tune.settings.data_arguments import DataArguments

    processing = load_processing(model, DataArguments())
    start = time.perf_counter()
    rows = SupervisedDataset(path, processing)
    print(f"{rows.mixture.row_count:,} rows, indexed in {time.perf_counter() - start:.2f} s")
    start = time.process_time()
    some = range(min(DIFFERENT, rows.mixture.row_count))
    lengths = [found.length for found in for_rows(rows, some, check_row, title="checking", workers=0)]
    rate = len(some) / (time.process_time() - start)
    print(
        f"first check: {rate:,.0f} rows per CPU second, {rows.mixture.row_count / rate:,.0f} for all (once per file)"
    )
    every = np.resize(np.array(lengths, dtype=np.int32), rows.mixture.row_count)
    FileCheck(every, {}).save(check_path(rows, 0, decoded=False))


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description="Start-up times.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    program = [sys.executable, str(ROOT / "finetune" / "finetune.py")]
    report("finetune.py --help", [*program, "--help"], options.repeats)

    from make_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MINICPMV_CACHE"] = str(folder / "cache")
        model = make_checkpoint(folder / "model", "v2_6", size="tiny")
        path = write_rows(folder, options.rows)
        keep_check(path, model)
        run = [
            *program, "--model_name_or_path", str(model), "--data_path", str(path), "--max_steps", "1",
            "--output_dir", str(folder / "out"), "--overwrite_output_dir", "true", "--report_to", "none",
            "--save_strategy", "no", "--use_lora", "true", "--tune_llm", "false",
        ]  # fmt: skip
        for title, flags in RUNS.items():
            report(title, [*run, *flags], options.repeats)


if __name__ == "__main__":
    main()
