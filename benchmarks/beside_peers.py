"""Seconds for an epoch beside ms-swift and the official script: small models, LoRA on every linear layer, on the CPU.

    python -m venv peer && peer/bin/pip install ms-swift==4.6.0
    python benchmarks/beside_peers.py --swift peer/bin/python [--rows 240] [--repeats 3]
    python benchmarks/beside_peers.py --generations v2_6 --official FOLDER --official_code FOLDER

All programs take turns in one run, on the same rows of skewed lengths and the same small checkpoint in fp32, with rank
8, batches of 8, frozen vision and merger, no checkpointing, and no worker processes. What counts is
``train_runtime``, which transformers' Trainer measures in each of them: without imports and loading, with the
decoding of pictures. A peer that is not given or can't run is left out with the reason. Ratios are to the best median
of the peers of a model; above 1 is faster than they are.

ms-swift trains 4.6. For V-2.6 it, and the official script, need the released model's own Python files
(``--official_code``, such as a download of the model without its weights), which this project does not have;
``--official`` is the official repository's folder ``finetune``, ``--official_python`` an interpreter with what both ask
for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo"):
    sys.path.insert(0, str(ROOT / folder))

from gpu import run_command

RANK, BATCH, LENGTH = 8, 8, 1024
LIMIT = 900  # seconds for one epoch of one program
PICTURES = 16
WORDS = "red green blue small large left right above below cat dog house tree sky".split()
OURS = {
    "ours, plain": [],
    "ours, grouped": ["--group_by_length", "true"],
    "ours, packed": ["--packing", "true", "--per_device_train_batch_size", "1"],
}
SWIFT = {"ms-swift, plain": [], "ms-swift, grouped": ["--group_by_length", "true"]}
OFFICIAL = "official script"


def draw_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """The same rows in the official form and in ms-swift's: a picture each, answers of log-normal length."""
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        side = (280, 260) if number % 4 == 0 else (112, 98)
        pixels = random.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    official, swift = [], []
    for number in range(count):
        picture = str(folder / f"{number % PICTURES}.png")
        answer = " ".join(random.choice(WORDS, size=min(400, max(1, int(random.lognormal(3.2, 1.0))))))
        turns = [
            {"role": "user", "content": "<image>\nDescribe it."},
            {"role": "assistant", "content": answer},
        ]
        official.append({"id": str(number), "image": picture, "conversations": turns})
        swift.append({"messages": turns, "images": [picture]})
    paths = folder / "rows.json", folder / "rows.jsonl"
    paths[0].write_text(json.dumps(official))
    paths[1].write_text("".join(json.dumps(row) + "\n" for row in swift))
    return paths


def shared_flags(output: Path) -> list[str]:
    """What transformers' Trainer is told in every program."""
    words: list[Any] = [
        "--output_dir", output, "--num_train_epochs", 1, "--per_device_train_batch_size", BATCH,
        "--gradient_accumulation_steps", 1, "--learning_rate", "1e-4", "--logging_steps", 1000, "--report_to", "none",
        "--save_strategy", "no", "--dataloader_num_workers", 0, "--seed", 7, "--bf16", "false",
    ]  # fmt: skip
    return [str(word) for word in words]


def ours(model: Path, rows: Path, output: Path, extra: list[str]) -> list[str]:
    """The command of this project."""
    return [
        sys.executable, str(ROOT / "finetune" / "finetune.py"), "--model_name_or_path", str(model), "--data_path",
        str(rows), *shared_flags(output), "--overwrite_output_dir", "true", "--use_lora", "true", "--tune_llm", "false",
        "--tune_vision", "false", "--tune_resampler", "false", "--lora_modules_to_save", "none", "--lora_r", str(RANK),
        "--lora_alpha", "32", "--lora_target_modules", "all-linear", "--model_max_length", str(LENGTH), *extra,
    ]  # fmt: skip


def swift(python: str, model: Path, rows: Path, output: Path, extra: list[str]) -> list[str]:
    """The command of ms-swift 4."""
    return [
        python, "-m", "swift.cli.sft", "--model", str(model), "--model_type", "minicpmv4_6", "--template",
        "minicpmv4_6", "--dataset", str(rows), *shared_flags(output), "--tuner_type", "lora", "--lora_rank",
        str(RANK), "--lora_alpha", "32", "--target_modules", "all-linear", "--torch_dtype", "float32", "--max_length",
        str(LENGTH), "--gradient_checkpointing", "false", "--attn_impl", "sdpa", "--split_dataset_ratio", "0",
        "--dataset_num_proc", "1", "--load_from_cache_file", "false", "--add_version", "false", *extra,
    ]  # fmt: skip


def official(python: str, script: Path, model: Path, rows: Path, output: Path) -> list[str]:
    """The command of the official finetune.py, with adapters on every linear layer of the LLM."""
    return [
        python, str(script / "finetune.py"), "--model_name_or_path", str(model), "--llm_type", "qwen", "--data_path",
        str(rows), *shared_flags(output), "--remove_unused_columns", "false", "--label_names", "labels", "--use_lora",
        "true", "--tune_vision", "false", "--tune_llm", "false", "--lora_r", str(RANK), "--lora_alpha", "32",
        "--lora_target_modules", r"llm\..*layers\.\d+\.(self_attn|mlp)\.\w+_proj", "--model_max_length", str(LENGTH),
        "--max_slice_nums", "9",
    ]  # fmt: skip


def seconds_of(command: list[str], output: Path) -> float | str:
    """``train_runtime`` of a run, or why there is none."""
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "USE_HF": "1", "CUDA_VISIBLE_DEVICES": "",
        "MINICPMV_CACHE": str(output.parent / "cache"), "MODELSCOPE_CACHE": str(output.parent / "cache"),
    }  # fmt: skip
    done = run_command(command, limit=LIMIT, environment=environment)
    if "error" in done:
        return done["error"]
    for path in sorted(output.rglob("trainer_state.json")) + sorted(output.rglob("logging.jsonl")):
        found = runtime_in(path.read_text())
        if found is not None:
            return found
    found = runtime_in(done["output"])
    return "the run says no train_runtime" if found is None else found


def runtime_in(text: str) -> float | None:
    """The last train_runtime of a JSON file, a log of JSON lines, or printed dictionaries; in seconds."""
    values = re.findall(r"""["']train_runtime["']: *["']?([\d.]+)""", text)
    return float(values[-1]) if values else None


def programs(options: argparse.Namespace, generation: str, model: Path, folder: Path) -> dict[str, Any]:
    """Name -> the command of a program and the folder that it writes to; or why it is left out."""
    rows, swift_rows = folder / "rows.json", folder / "rows.jsonl"
    output = folder / "out"
    found: dict[str, Any] = {name: ours(model, rows, output, extra) for name, extra in OURS.items()}
    for name, extra in SWIFT.items():
        if generation != "v4_6":
            found[name] = "needs the released model's own Python files for this model"
        elif options.swift is None:
            found[name] = "--swift names no interpreter with ms-swift"
        else:
            found[name] = swift(options.swift, model, swift_rows, output, extra)
    if generation != "v2_6":
        found[OFFICIAL] = "there is none for this model"
    elif options.official is None or options.official_code is None:
        found[OFFICIAL] = "--official and --official_code are not given"
    else:
        released = folder / "released"
        shutil.copytree(model, released, dirs_exist_ok=True)
        for path in options.official_code.glob("*.py"):
            shutil.copy(path, released)
        found[OFFICIAL] = official(options.official_python, options.official, released, rows, output)
    chosen = options.only or list(found)
    return {name: command for name, command in found.items() if any(word in name for word in chosen)}


def measure(options: argparse.Namespace, generation: str) -> dict[str, list[float]]:
    """Run all programs of a model in turns; print why one is left out; give the seconds of each."""
    from make_checkpoint import make_checkpoint

    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_checkpoint(folder / "model", generation, size=options.size)
        draw_rows(folder, options.rows)
        commands = programs(options, generation, model, folder)
        for number in range(options.repeats):
            for program, command in commands.items():
                if isinstance(command, str):
                    if number == 0:
                        print(f"{generation} {program}: left out, {command}", flush=True)
                    continue
                found = seconds_of(command, folder / "out")
                if isinstance(found, str):
                    print(f"{generation} {program}: left out, {found}", flush=True)
                    commands[program] = found
                    continue
                times[program].append(found)
    return times


def table(times: dict[str, list[float]]) -> str:
    """A line per program: median, spread, and the ratio to the best of the peers.

    Example:
        >>> print(table({"ours, plain": [2.0, 4.0, 3.0], "ms-swift, plain": [6.0]}))
        ours, plain                3.0 s  (2.0 to 4.0)   2.00
        ms-swift, plain            6.0 s  (6.0 to 6.0)   1.00
    """
    medians = {name: statistics.median(found) for name, found in times.items()}
    peers = [value for name, value in medians.items() if not name.startswith("ours")]
    lines = []
    for name, found in times.items():
        line = f"{name:<22}{medians[name]:>8.1f} s  ({min(found):.1f} to {max(found):.1f})"
        lines.append(line + (f"{min(peers) / medians[name]:>7.2f}" if peers else ""))
    return "\n".join(lines)


def main() -> int:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description="Seconds for an epoch, beside other programs.")
    parser.add_argument("--generations", nargs="+", default=["v4_6", "v2_6"], choices=["v4_6", "v2_6"])
    parser.add_argument("--swift", help="a Python interpreter with ms-swift 4.6")
    parser.add_argument("--official", type=Path, help="the official repository's folder finetune")
    parser.add_argument("--official_code", type=Path, help="a folder with the released model's Python files")
    parser.add_argument("--official_python", default=sys.executable, help="an interpreter for both")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="demo", choices=["demo", "tiny"])
    parser.add_argument("--only", nargs="+", default=[], help="programs whose names hold one of these")
    options = parser.parse_args()
    for generation in options.generations:
        times = measure(options, generation)
        print(f"{generation}, {options.rows} rows, batches of {BATCH}: seconds for an epoch, and the ratio")
        print(table(times), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
