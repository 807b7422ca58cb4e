"""A long run under faults, started again after each, ends with the weights of an undisturbed run.

    python tests/soak.py [--steps 500] [--faults 24] [--stage none|zero2|zero3] [--seed 0] [--folder DIR]

Two processes train adapters with dropout on a tiny model. At random steps: a process or the whole run is
killed, SIGTERM is sent, an image is cut short and later repaired, a checkpoint is cut short, and the disk is
filled and freed (on a small file system in memory, where mounting one is allowed). Not part of the test
command; it prints a line per fault, and ends with code 1 when a weight differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "demo"), str(ROOT / "finetune")]

from safetensors.torch import load_file

from minicpm_tune import output_folder
from support import finetune_runs, live_runs
from support.live_runs import LORA, STAGES, LiveRun

LIMIT = 300  # seconds to wait for anything
SAVE_STEPS = 10
DISK = 64  # MiB, of the file system that is filled
ENDED_BY_FAULT = (0, 1, -signal.SIGKILL)


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Soak:
    """The disturbed run, from its first start to its end.

    Args:
        folder: Where everything goes.
        flags: The flags of finetune.py but for the output folder.
        steps: Steps of the whole run.
        faults: How many there will be; they are spread over the steps.
        seed: Decides which faults come when.
    """

    def __init__(self, folder, flags, *, steps, faults, seed):
        self.folder, self.flags, self.steps = folder, flags, steps
        self.reach = max(2 * SAVE_STEPS, 2 * steps // max(faults, 1))
        self.random = random.Random(seed)
        self.output = folder / "disk" / "out"
        self.output.mkdir(parents=True, exist_ok=True)
        self.images = sorted((folder / "data").glob("*.png"))

    def start(self):
        words = [*self.flags, "--output_dir", self.output, "--resume_from_checkpoint", "true"]
        return LiveRun([str(word) for word in words], processes=2)

    def step(self):
        """The last step in rank 0's log."""
        log = self.output / "logs" / "rank0.log"
        lines = log.read_text().splitlines() if log.is_file() else []
        steps = [line.partition(": step ")[2].partition(":")[0] for line in lines if "'loss'" in line]
        return int(steps[-1]) if steps else 0

    def difference_so_far(self, whole):
        """The first step whose numbers are not those of the undisturbed run, as its last checkpoint has them."""
        state = self.output / f"checkpoint-{self.last()}" / output_folder.STATE_FILE
        if not state.is_file():
            return None
        pairs = zip(numbers(json.loads(state.read_text())["log_history"]), whole, strict=False)
        return next((found[0] for found, expected in pairs if found != expected), None)

    def last(self):
        checkpoint = output_folder.find_earlier_run(self.output).last_checkpoint
        return 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])

    def wait_past(self, run, step):
        """Wait until a step is logged or the run ends; True when it goes on."""
        until = time.monotonic() + LIMIT
        while run.process.poll() is None and self.step() < step:
            assert time.monotonic() < until, f"step {step} never came"
            time.sleep(0.05)
        return run.process.poll() is None

    def suffer(self, name):
        """Start, get some steps further, have one fault, and end; give a line about it."""
        since = time.monotonic()
        from_step = self.last()
        log = self.output / "logs" / "rank0.log"
        log.unlink(missing_ok=True)
        run = self.start()
        at = min(from_step + self.random.randint(2, self.reach), self.steps - 1)
        if not self.wait_past(run, at):
            code, printed = run.end(limit=LIMIT)
            assert code == 0, printed[-5000:]
            return f"{name:16} not any more: the run was done"
        getattr(self, name)(run)
        code, printed = run.end(limit=LIMIT)
        assert code in ENDED_BY_FAULT, printed[-5000:]
        assert "Traceback" not in printed, printed[-5000:]
        passed = time.monotonic() - since
        return (
            f"{name:16} from {from_step:4} at {at:4}: code {code}, next from {self.last():4} ({passed:.0f} s)"
        )

    def kill_rank(self, run):
        """One process is killed."""
        os.kill(run.workers()[self.random.randint(0, 1)], signal.SIGKILL)

    def kill_all(self, run):
        """The machine stops."""
        workers = run.workers()
        run.process.kill()
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)

    def terminate(self, run):
        """The run is asked to stop."""
        run.process.send_signal(signal.SIGTERM)

    def cut_image(self, run):
        """An image is damaged; the run goes on without it. Then it is repaired, and what was learned is undone."""
        before, path = self.last(), self.random.choice(self.images)
        whole, kept = path.read_bytes(), self.folder / "kept"
        if before:
            shutil.copytree(self.output / f"checkpoint-{before}", kept)
        path.write_bytes(whole[: len(whole) // 2])
        self.wait_past(run, min(self.step() + 2 * SAVE_STEPS, self.steps - 1))
        self.kill_all(run)
        run.process.wait(LIMIT)
        path.write_bytes(whole)
        for step, checkpoint in output_folder.list_checkpoints(self.output):
            if step > before:
                shutil.rmtree(checkpoint)
        if before:
            shutil.rmtree(self.output / f"checkpoint-{before}", ignore_errors=True)
            shutil.move(kept, self.output / f"checkpoint-{before}")

    def cut_checkpoint(self, run):
        """The machine stops, and the last checkpoint's largest file loses its end."""
        self.kill_all(run)
        run.process.wait(LIMIT)
        found = output_folder.list_checkpoints(self.output)
        if len(found) > 1:
            files = [path for path in found[-1][1].rglob("*") if path.is_file()]
            with max(files, key=lambda path: path.stat().st_size).open("r+b") as file:
                file.truncate(100)

    def fill_disk(self, run):
        """The disk is full until the run has ended."""
        filler = self.output.parent / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        try:
            run.process.wait(LIMIT)
        finally:
            filler.unlink()

    def finish(self):
        """Undisturbed from here to the end."""
        code, printed = self.start().end(limit=4 * LIMIT)
        assert code == 0, printed[-5000:]


@contextmanager
def small_disk(path):
    """A file system of ``DISK`` MiB at a path; gives whether there is one."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    except AssertionError:
        shutil.copytree(path, path.with_name("found"))
        raise
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=False)


def undisturbed(folder, flags):
    since = time.monotonic()
    code, printed = LiveRun([*flags, "--output_dir", str(folder / "whole")], processes=2).end(limit=8 * LIMIT)
    assert code == 0, printed[-5000:]
    return time.monotonic() - since


def numbers(history):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in history if "loss" in line]


def difference(one, other):
    """Largest difference of two adapters, and their number of tensors."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first), len(first)


def soak(folder, options):
    model, data = live_runs.tiny(folder / "model"), live_runs.uneven_rows(folder / "data", count=30)
    flags = live_runs.flags(
        model, data, folder / "none", *LORA, "--lora_dropout", 0.1, *STAGES[options.stage], "--save_steps", SAVE_STEPS,
        "--save_total_limit", 3, steps=options.steps,
    )  # fmt: skip
    where = flags.index("--output_dir")
    del flags[where : where + 2]
    say(f"undisturbed: {options.steps} steps in {undisturbed(folder, flags):.0f} s ({options.stage})")
    with small_disk(folder / "disk") as mounted:
        run = Soak(folder, flags, steps=options.steps, faults=options.faults, seed=options.seed)
        names = ["kill_rank", "kill_all", "terminate", "cut_image", "cut_checkpoint"] + [
            "fill_disk"
        ] * mounted
        if not mounted:
            say("no file system can be mounted here, so the disk is not filled")
        faults = [names[number % len(names)] for number in range(options.faults)]
        run.random.shuffle(faults)
        whole = numbers(finetune_runs.losses(folder / "whole"))
        for number, name in enumerate(faults, start=1):
            say(f"{number:3}. {run.suffer(name)}")
            step = run.difference_so_far(whole)
            assert step is None, f"step {step} is not that of the undisturbed run"
        run.finish()
        found, tensors = difference(folder / "whole", run.output)
        same = numbers(finetune_runs.losses(run.output)) == whole
    say(
        f"after {options.faults} faults: largest difference of {tensors} tensors {found}; all losses equal: {same}"
    )
    return 0 if found == 0 and same else 1


def main():
    parser = argparse.ArgumentParser(description="A long run under faults.")
    parser.add_argument("--steps", type=int, default=500, help="steps of the run (default: 500)")
    parser.add_argument("--faults", type=int, default=24, help="faults on its way (default: 24)")
    parser.add_argument(
        "--stage", default="none", choices=list(STAGES), help="DeepSpeed's stage (default: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which faults come when (default: 0)")
    parser.add_argument("--folder", type=Path, default=None, help="where everything goes, and stays")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True)
        return soak(options.folder, options)
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
