"""Runs that tests watch while they go on: started, waited for, signalled; with faults planted in them."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from make_checkpoint import make_checkpoint
from support import finetune_runs
from support.paths import SUPPORT
from support.processes import TOGETHER, Started, environment

START = finetune_runs.FINETUNE.with_name("start_processes.py")
WORKER = SUPPORT / "probe_worker.py"
LIMIT = 240  # seconds; a short run takes 10 alone, 60 beside a full machine's other work
LORA = ("--use_lora", "true", "--tune_llm", "false", "--tune_vision", "false", "--lora_r", "4")
# Relative; worst values measured (torch 2.13, CPU, gloo) behind each.
LOSS_TOLERANCE = 1e-5  # 2.4e-6 (V-4.6, ZeRO-3)
FIRST_NORM_TOLERANCE = 2e-5  # 4.5e-6 (V-4.7, ZeRO-2 with offloading)
NORM_TOLERANCE = 5e-4  # 1.1e-4 (V-4.7, ZeRO-3 with offloading, fourth step): AdamW amplifies rounding
STAGES = {
    "none": (),
    "zero2": ("--deepspeed", "ds_config_zero2.json"),
    "zero3": ("--deepspeed", "ds_config_zero3.json"),
}
FSDP = ("--fsdp", "full_shard auto_wrap")


def tiny(folder, generation="v2_6"):
    """A tiny checkpoint."""
    make_checkpoint(folder, generation, size="tiny")
    return folder


def uneven_rows(folder, *, count=7):
    """Rows of two images, none, one, many slices: whoever takes them in turn has different work in each step."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(3)
    shapes = [[(40, 30), (90, 60)], [], [], [(420, 400)], [(60, 60)], [], [(300, 120), (30, 30)]]
    rows = []
    for number in range(count):
        images = {}
        for place, (width, height) in enumerate(shapes[number % len(shapes)]):
            path = folder / f"{number}-{place}.png"
            Image.fromarray(random.randint(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
            images[f"<image_{place:02}>"] = path.name
        question = "".join(f"{name}\n" for name in images) + "What is it?"
        answer = finetune_runs.ANSWERS[number % len(finetune_runs.ANSWERS)] + " Yes." * (number % 3)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(
            {"id": f"uneven-{number}", "conversations": turns} | ({"image": images} if images else {})
        )
    path = folder / "uneven.json"
    path.write_text(json.dumps(rows))
    return path


def flags(model, data, output, *more, steps=4, batch=1):
    """The flags of a short run that saves every second step."""
    return [
        str(word)
        for word in (
            "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_steps", steps,
            "--per_device_train_batch_size", batch, "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine",
            "--logging_steps", 1, "--report_to", "none", "--save_strategy", "steps", "--save_steps", 2,
            "--seed", 7, "--dataloader_num_workers", 0, *more,
        )
    ]  # fmt: skip


def start_words(program, processes):
    """The words that start a program: in so many processes, or with 0 by itself."""
    if not processes:
        return [sys.executable, program]
    return [sys.executable, START, *TOGETHER, "--nproc_per_node", processes, program]


class LiveRun(Started):
    """A started run.

    Args:
        arguments: The flags of finetune.py.
        processes: How many; 0 starts finetune.py itself.
        faults: What ``support/probe_worker.py`` plants, as its docstring says; None runs finetune.py.
        env: Variables besides ``environment()``.
    """

    def __init__(self, arguments, *, processes=0, faults=None, env=None, start=None):
        program = finetune_runs.FINETUNE if faults is None else WORKER
        planted = {} if faults is None else {"FAULTS": json.dumps(faults)}
        self.output = Path(arguments[arguments.index("--output_dir") + 1])
        super().__init__(
            [*(start or start_words(program, processes)), *arguments],
            env={**environment(), **planted, **(env or {})},
            merged=True,
        )

    def wait_for_step(self, step):
        """Wait until rank 0's log has the line of a step."""
        log = self.output / "logs" / "rank0.log"
        self.wait_for(lambda: log.is_file() and f"step {step}: {{'loss'" in log.read_text(), limit=LIMIT)

    def workers(self):
        """Process ids of the run's processes, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid:
                found |= {int(word[5:]): int(folder.name) for word in variables if word.startswith(b"RANK=")}
        return found

    def end(self, *, limit=LIMIT):
        """Wait for the end; give the exit code and all that was printed."""
        done = super().end(limit=limit)
        return done.returncode, done.stdout


def finish(*args, expected=0, limit=LIMIT, **kwargs):
    """Run to the end, and give what was printed."""
    code, printed = LiveRun(*args, **kwargs).end(limit=limit)
    assert code == expected, printed[-6000:]
    return printed
