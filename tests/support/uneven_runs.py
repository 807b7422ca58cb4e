"""Runs of several processes with uneven work: started for some generations in turn, and compared."""

import json

import pytest

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import finetune_runs, live_runs
from support.live_runs import FIRST_NORM_TOLERANCE, LORA, LOSS_TOLERANCE, NORM_TOLERANCE
from support.processes import Started, environment

# Not those whose class and sizes are those of 4.6.
EVERY = tuple(name for name in GENERATIONS if name not in ("v4_6_thinking", "ocr_1"))
TIME_LIMIT = 400  # seconds, for all generations of one kind; 20 to 40 alone
KINDS = {"full": (), "lora": (*LORA, "--lora_dropout", 0)}


class Place:
    """Checkpoints, data, and the runs of a module's tests."""

    def __init__(self, folder, *, only=EVERY):
        self.folder = folder
        self.data = live_runs.uneven_rows(folder / "data")
        self.rows = json.loads(self.data.read_text())
        for name in only:
            config = live_runs.tiny(folder / name, name) / "config.json"
            # InternLM-XComposer2's own dropout would differ between one process and two.
            config.write_text(json.dumps(json.loads(config.read_text()) | {"plora_dropout": 0.0}))

    def write(self, name, rows):
        """Another data file beside the pictures."""
        path = self.data.with_name(name)
        path.write_text(json.dumps(rows))
        return path

    def start(self, tag, generations, *flags, processes, batch, data=None, steps=4):
        """Start a run of each generation, in the same processes; a dict has flags of each one's own."""
        own = generations if isinstance(generations, dict) else dict.fromkeys(generations, ())
        report = self.folder / tag / "gradients"
        report.mkdir(parents=True)
        commands = [
            live_runs.flags(
                self.folder / name, data or self.data, self.folder / tag / name, "--save_strategy", "no", *flags,
                *more, steps=steps, batch=batch,
            )
            for name, more in own.items()
        ]  # fmt: skip
        start = live_runs.start_words(live_runs.WORKER, processes if processes > 1 else 0)
        faults = {"several": True, "count_gradients": str(report)}
        return Started(
            [*start, json.dumps(commands)], env={**environment(), "FAULTS": json.dumps(faults)}, merged=True
        )

    def run(self, tag, generations, *flags, **kwargs):
        """Run to the end; give the losses by generation, and every process's report of its batches."""
        finish(self.start(tag, generations, *flags, **kwargs))
        return self.losses(tag, generations), self.reports(tag)

    def losses(self, tag, generations):
        return {name: finetune_runs.losses(self.folder / tag / name) for name in generations}

    def reports(self, tag):
        paths = sorted((self.folder / tag / "gradients").glob("rank*.json"))
        return [json.loads(path.read_text()) for path in paths]


def finish(process):
    done = process.end(limit=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-6000:]


def assert_same(found, expected):
    assert len(found) == len(expected)
    tolerances = [FIRST_NORM_TOLERANCE] + [NORM_TOLERANCE] * (len(found) - 1)
    for line, wanted, tolerance in zip(found, expected, tolerances, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=tolerance)


def assert_every_gradient(reports, *, processes, batches):
    assert [len(report) for report in reports] == [batches] * processes
    for rank, report in enumerate(reports):
        for number, batch in enumerate(report):
            assert batch["parameters"] > 0
            assert batch["without"] == [], f"process {rank}, batch {number}"
