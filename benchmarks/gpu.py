"""Full-size training steps on one GPU: speed, memory, and where the time goes.

    python benchmarks/gpu.py                                # all rows: two models, three methods, two lengths ...
    python benchmarks/gpu.py --models v4_5 --methods lora --lengths 4096 --packing true
    python benchmarks/gpu.py --small                        # the same with tiny models on the CPU, as a test

The models have the released sizes and random weights, made on the GPU; data, collator, model, trainer and
optimizer are those of finetune.py with the flags that each row shows. Photos of several sizes are drawn and
saved as JPEG, answers have log-normal lengths, one row in five has no image. Each row of the table is a
process of its own: --warmup steps, --steps measured ones, and on a GPU two under torch.profiler.

MFU is the needed operations (step_flops.py says what counts: LoRA has no weight gradients, a frozen tower no
gradients, checkpointing's second forward is not needed) per second, divided by those of an 8192^3 bf16 matrix
product (median of the faster half of 20) measured in the same process. Shares of time are of the measured steps;
data is the time in which the training waits for samples, idle the share of the profiled time in which no kernel
ran.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo", "tests"):
    sys.path.insert(0, str(ROOT / folder))

MODELS = ("v2_6", "v4_5")
FROZEN = ["--tune_llm", "false", "--use_lora", "true", "--tune_vision", "false"]
METHODS = {
    "official-lora": ["--tune_llm", "false", "--use_lora", "true"],
    "lora": FROZEN,
    "qlora": [*FROZEN, "--q_lora", "true"],
    "plain-lora": [*FROZEN, "--tune_resampler", "false", "--lora_modules_to_save", "none"],
    "plain-qlora": [
        *FROZEN,
        "--q_lora",
        "true",
        "--tune_resampler",
        "false",
        "--lora_modules_to_save",
        "none",
    ],
    "full": ["--tune_vision", "false", "--optim", "adamw_8bit"],
}
COLUMNS = {
    "tokens_per_second": "tokens/s", "samples_per_second": "samples/s", "padding": "padding", "tflops": "TFLOP/s",
    "mfu": "MFU", "peak_gib": "peak GiB", "idle": "idle",
}  # fmt: skip
SIDES = ((1344, 1008), (1344, 1008), (800, 600), (448, 448), None)  # pixels of a row's photo
ROWS = 200
LONG_ANSWER = "a red house beside a tree " * 1000


def main() -> int:
    """Run every combination, and print a line for each."""
    options = _flags()
    if options.one:
        from gpu_run import measure

        json.dump(measure(json.loads(options.one)), sys.stdout)
        return 0
    print(f"{'':<52}" + "".join(f"{title:>11}" for title in COLUMNS.values()), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        draw_data(Path(name))
        for model, method, length, batch, packing in itertools.product(
            options.models, options.methods, options.lengths, options.batch_sizes, options.packing
        ):
            wish = {
                "model": model, "method": method, "flags": METHODS[method] + options.flags, "length": length,
                "batch": batch, "packing": packing, "steps": options.steps, "warmup": options.warmup,
                "small": options.small, "folder": name, "checkpointing": options.checkpointing,
            }  # fmt: skip
            rows.append(wish | run_row(wish))
            _show(rows[-1])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all("error" not in row for row in rows) else 1


def run_row(wish: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Measure one row in a process of its own.

    Args:
        wish: What ``gpu_run.measure`` takes.
        limit: Seconds after which the row is ended.

    Returns:
        What was measured; or ``error``, and ``output``, the end of what the process printed.
    """
    command = [sys.executable, __file__, "--one", json.dumps(wish)]
    environment = os.environ | {"MINICPMV_CACHE": wish["folder"] + "/cache"}
    done = run_command(command, limit=limit, environment=environment)
    if "error" in done:
        return done
    return json.loads(done["output"].strip().splitlines()[-1])


def run_command(
    command: list[str], *, limit: float | None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command; end it, and the processes that it started, at its limit in seconds.

    Returns:
        ``output``, what it printed; beside it ``error`` if it failed or was ended, with what it wrote to stderr.
    """
    try:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"error": str(error), "output": ""}
    try:
        printed, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        printed, errors = child.communicate()
        return {"error": f"ended at its limit of {limit:.0f} s", "output": (printed + errors)[-4000:]}
    if child.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1][:300]
        return {"error": last, "output": (printed + errors)[-4000:]}
    return {"output": printed}


def _show(row: dict[str, Any]) -> None:
    title = f"{row['model']} {row['method']} {row['length']} x {row['batch']}" + " packed" * row["packing"]
    if "error" in row:
        print(f"{title:<52} {row['error']}", flush=True)
        return
    cells = (row[name] for name in COLUMNS)
    print(f"{title:<52}" + "".join(f"{'-' if cell is None else f'{cell:.4g}':>11}" for cell in cells))
    shares = sorted(row["shares"].items(), key=lambda item: -item[1])
    print(f"{'':<4}{row['device']}, peak {row['peak_tflops']:.4g} TFLOP/s; time: ", end="")
    print(", ".join(f"{name} {share:.1%}" for name, share in shares), flush=True)


def draw_data(folder: Path) -> None:
    """Photos and rows: ``rows.json`` of skewed lengths, and ``full.json`` of rows that are all cut at the limit."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    rows, full = [], []
    for number in range(ROWS):
        side = SIDES[number % len(SIDES)]
        answer = " ".join(["a red house beside a tree"] * max(1, int(random.lognormal(2, 1))))
        turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
        row: dict[str, Any] = {"id": number, "conversations": turns}
        if side is not None:
            noise = random.integers(0, 256, (side[1] // 8, side[0] // 8, 3), dtype=np.uint8)
            row["image"] = f"{number}.jpg"
            Image.fromarray(noise).resize(side).save(folder / row["image"], quality=90)
        rows.append(row)
        if side == SIDES[0]:
            asked, _ = turns
            long = {"role": "assistant", "content": LONG_ANSWER}
            full.append(row | {"conversations": [asked, long]})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "full.json").write_text(json.dumps(full))


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps of full-size models with random weights.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=["v2_5", "v2_6", "v4", "v4_5"])
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "full"], choices=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--packing", nargs="+", type=lambda word: word == "true", default=[False, True], metavar="true|false"
    )
    parser.add_argument(
        "--checkpointing", type=lambda word: word == "true", default=True, metavar="true|false"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="further flags of finetune.py; last"
    )
    parser.add_argument("--small", action="store_true", help="tiny models, on whatever device there is")
    parser.add_argument("--json", help="also write everything that was measured to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
