"""Another commit's rows of training_step.py and start_up.py beside this one's, as ratios of CPU time.

    git worktree add --detach ../before COMMIT
    python benchmarks/before_after.py ../before [--pairs 5] [--rows 100000]

The two commits take turns, so that other work on the machine falls on both. What a row shows is the median, over
all pairs, of the later commit's CPU time divided by the earlier one's: below 1 is faster.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A row of training_step.py (tokens per CPU second), and one of start_up.py (CPU seconds).
TOKENS = re.compile(r"^(\S.*?) +(\d+) +\d+ to \d+ +[\d.]+$", re.MULTILINE)
SECONDS = re.compile(r"^(\S.*?) +CPU +([\d.]+) s", re.MULTILINE)
CHECKED = re.compile(r"^(first check): ([\d,]+) rows", re.MULTILINE)


def cpu_times(folder: Path, words: list[str]) -> dict[str, float]:
    """What a benchmark of one commit says, by row, in something proportional to CPU seconds."""
    command = [sys.executable, str(folder / "benchmarks" / words[0]), *words[1:]]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    found = {name: float(value) for name, value in SECONDS.findall(shown)}
    for name, value in (*TOKENS.findall(shown), *CHECKED.findall(shown)):
        found[name] = 1 / float(value.replace(",", ""))
    return found


def main() -> None:
    """Print a line per row: the median ratio and the spread of the pairs."""
    parser = argparse.ArgumentParser(description="Two commits side by side.")
    parser.add_argument("before", type=Path, help="a working tree of the earlier commit")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000, help="of start_up.py's data file")
    parser.add_argument("--generations", default="v2_6,v4_6")
    options = parser.parse_args()
    benchmarks = [
        ["training_step.py", "--rounds", "1", "--generation", name] for name in options.generations.split(",")
    ]
    benchmarks.append(["start_up.py", "--rows", str(options.rows), "--repeats", "1"])
    for words in benchmarks:
        ratios: dict[str, list[float]] = defaultdict(list)
        for pair in range(options.pairs):
            order = [options.before.resolve(), ROOT]
            taken = {folder: cpu_times(folder, words) for folder in (order if pair % 2 == 0 else order[::-1])}
            for row, before in taken[order[0]].items():
                ratios[row].append(taken[ROOT][row] / before)
        print(" ".join(words))
        for row, found in ratios.items():
            print(
                f"  {row:<36}{statistics.median(found):>6.2f}  ({min(found):.2f} to {max(found):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
