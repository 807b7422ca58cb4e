"""Real runs of finetune.py for the tests: small checkpoints, small data, torchrun, a time limit."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from support.paths import ROOT
from support.processes import environment, torchrun
from support.processes import run as run_process

FINETUNE = ROOT / "finetune" / "finetune.py"
TIME_LIMIT = 240  # seconds, for one run
# Rows differ in supervised tokens, image sizes, turns; one has no image, one is sliced.
ANSWERS = (
    "Red.",
    "A cat on a mat.",
    "Two.",
    "It is a dog and a house.",
    "No.",
    "Green, and then blue.",
    "Yes.",
    "Left",
)


def write_data(folder, *, name="train.json", rows=8, text_only=(3,), sliced=(1,)):
    """Draw pictures and write a data file in the official form; give its path."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(1)
    content = []
    for row in range(rows):
        turns = [
            {"role": "user", "content": "What is in the image?"},
            {"role": "assistant", "content": ANSWERS[row % len(ANSWERS)]},
        ]
        entry = {"id": f"row-{row}", "conversations": turns}
        if row not in text_only:
            size = (560, 500) if row in sliced else (56 + 14 * (row % 3), 42)
            pixels = random.randint(0, 255, (size[1] // 14, size[0] // 14, 3), dtype=np.uint8)
            path = folder / f"{name}-{row}.png"
            Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
            entry["image"] = path.name
        content.append(entry)
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def run(arguments, *, processes=1, limit=TIME_LIMIT, launcher=True, env=None):
    """Run finetune.py; give the finished process with its output as text."""
    start = torchrun(processes, FINETUNE) if launcher else [sys.executable, FINETUNE]
    return run_process([*start, *arguments], limit=limit, env={**environment(), **(env or {})})


def train(folder, *flags, model, data, processes=1, batch=4, accumulation=1, steps=3, **kwargs):
    """Train for a few steps and give the log lines that report a loss."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    finished = run(
        [
            "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_steps", steps,
            "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--logging_steps", 1, "--report_to", "none",
            "--save_strategy", "no", "--seed", 7, *flags,
        ],
        processes=processes,
        **kwargs,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    return losses(output)


def losses(output):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]
