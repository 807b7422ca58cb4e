"""Start-up: how long --help takes, and how long a large data file needs until it can be trained on.

    python benchmarks/start_up.py [--rows 1000000] [--repeats 3]

Writes a JSONL file of text-only rows, opens it (first with, then without indexing), and checks its rows as
finetune.py does before it trains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo"):
    sys.path.insert(0, str(ROOT / folder))


def seconds_of(command: list[str], repeats: int) -> list[float]:
    """Wall-clock seconds of a command, sorted."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return sorted(times)


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description="Start-up times.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times = seconds_of([sys.executable, str(ROOT / "finetune" / "finetune.py"), "--help"], options.repeats)
    print(f"finetune.py --help: {statistics.median(times):.2f} s ({times[0]:.2f} to {times[-1]:.2f})")

    from dataset import SupervisedDataset
    from make_checkpoint import make_checkpoint
    from processing import load_processing
    from row_files import open_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        processing = load_processing(make_checkpoint(folder / "model", "v2_6", size="tiny"))
        path = folder / "rows.jsonl"
        turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
        with path.open("w") as file:
            for number in range(options.rows):
                file.write(json.dumps({"id": number, "conversations": turns}) + "\n")
        for what in ("first opening, with indexing", "later opening"):
            start = time.perf_counter()
            rows = open_rows(path)
            print(f"{len(rows):,} rows, {what}: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        data = SupervisedDataset(path, processing)
        data[len(data) - 1]
        print(f"first sample of the last row: {time.perf_counter() - start:.2f} s")
        start = time.perf_counter()
        data.check_rows()
        print(f"check of all rows before training: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
