"""Processes with uneven work: no hang, a gradient for everything in every batch, the losses of one process.

Rows have two images, none, one, or many slices. All generations run one after another in the same
processes, which saves the time that imports take.
"""

import json

import pytest

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support import finetune_runs, live_runs
from support.live_runs import FIRST_NORM_TOLERANCE, LORA, LOSS_TOLERANCE, NORM_TOLERANCE, STAGES
from support.processes import Started, environment

EVERY = tuple(GENERATIONS)
TIME_LIMIT = 400  # seconds, for all generations of one kind; 20 to 40 alone
OFFLOADING = {
    "zero2": ("--deepspeed", "ds_config_zero2_offload.json"),
    "zero3": ("--deepspeed", "ds_config_zero3_offload.json"),
}
KINDS = {"full": (), "lora": (*LORA, "--lora_dropout", 0)}


class Place:
    """Checkpoints, data, and the runs of a module's tests."""

    def __init__(self, folder):
        self.folder = folder
        self.data = live_runs.uneven_rows(folder / "data")
        self.rows = json.loads(self.data.read_text())
        for name in EVERY:
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def alone(place):
    """A process that takes all rows of a step itself, beside two that divide them (full, DDP)."""
    both = [
        place.start("full-alone", EVERY, processes=1, batch=2),
        place.start("full-none", EVERY, processes=2, batch=1),
    ]
    for process in both:
        finish(process)
    return place.losses("full-alone", EVERY)


@pytest.fixture(scope="module")
def lora_alone(place):
    return place.run("lora-alone", EVERY, *KINDS["lora"], processes=1, batch=2)[0]


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


def test_ranks_with_uneven_work_give_the_run_of_one_process(place, alone):
    reports = place.reports("full-none")
    assert_every_gradient(reports, processes=2, batches=4 * len(EVERY))
    slices = [[batch["slices"] for batch in report[:4]] for report in reports]
    # Text alone beside images, in both directions; different numbers of slices; the last step is half filled.
    assert slices == [[0, 1, 2, 0], [10, 0, 5, 0]]
    found = place.losses("full-none", EVERY)
    for name in EVERY:
        assert_same(found[name], alone[name])


def test_every_division_of_the_work_with_offloading_to_the_cpu(place):
    """ZeRO and both offloading configurations, adapters and all weights, one after another.

    InternLM-XComposer2-4KHD has parameters whose gradients could come in another order from a process without
    images, which ZeRO-2 would mix up.
    """
    kinds = {"v2": KINDS["full"], "v2_6": KINDS["lora"], "v4_6": KINDS["lora"], "xc2_4khd_7b": KINDS["full"]}
    stages = {"v2": OFFLOADING["zero2"], "v2_6": OFFLOADING["zero3"], "v4_6": STAGES["zero3"]}
    stages["xc2_4khd_7b"] = STAGES["zero2"]
    divided = {name: (*kinds[name], *stages[name]) for name in kinds}
    one, _ = place.run("some-alone", kinds, processes=1, batch=2, steps=3)
    two, reports = place.run("some-divided", divided, processes=2, batch=1, steps=3)
    assert_every_gradient(reports, processes=2, batches=12)
    for name in kinds:
        assert_same(two[name], one[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_generation_under_every_stage(place, alone, lora_alone, stage, kind):
    if (stage, kind) != ("none", "full"):
        place.run(f"{kind}-{stage}", EVERY, *KINDS[kind], *STAGES[stage], processes=2, batch=1)
    assert_every_gradient(place.reports(f"{kind}-{stage}"), processes=2, batches=4 * len(EVERY))
    expected = alone if kind == "full" else lora_alone
    for name, found in place.losses(f"{kind}-{stage}", EVERY).items():
        assert_same(found, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", OFFLOADING)
def test_every_generation_with_offloading(place, alone, lora_alone, stage, kind):
    found, reports = place.run(
        f"{kind}-{stage}-offload", EVERY, *KINDS[kind], *OFFLOADING[stage], processes=2, batch=1
    )
    assert_every_gradient(reports, processes=2, batches=4 * len(EVERY))
    expected = alone if kind == "full" else lora_alone
    for name in EVERY:
        assert_same(found[name], expected[name])


def take_turns(place, tag, generations, stage, data, *flags, processes):
    """Compare processes that take the rows in turn with one that takes all; give the reports."""
    one, _ = place.run(
        f"{tag}-alone-{stage}", generations, *flags, processes=1, batch=processes, data=data, steps=2
    )
    found, reports = place.run(
        f"{tag}-{stage}",
        generations,
        *flags,
        *STAGES[stage],
        processes=processes,
        batch=1,
        data=data,
        steps=2,
    )
    assert_every_gradient(reports, processes=processes, batches=2 * len(generations))
    for name in generations:
        assert_same(found[name], one[name])
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_three_processes_in_every_generation(place, stage):
    reports = take_turns(place, "three", EVERY, stage, None, processes=3)
    assert [[batch["slices"] for batch in report[:2]] for report in reports] == [[0, 0], [10, 2], [1, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_fewer_rows_than_processes(place, stage):
    data = place.write("few.json", [place.rows[0], place.rows[3]])
    reports = take_turns(place, "few", EVERY, stage, data, processes=3)
    assert [[batch["rows"] for batch in report[:2]] for report in reports] == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_whose_every_row_is_bad_keeps_in_step(place, stage):
    whole = (place.data.parent / "3-0.png").read_bytes()
    (place.data.parent / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = {**place.rows[4], "image": "cut.png"}
    rows = [place.rows[0], bad, place.rows[1], bad, place.rows[6], bad]
    data = place.write("bad.json", rows)
    reports = take_turns(place, "bad", EVERY, stage, data, "--on_bad_row", "skip", processes=2)
    assert any(sorted(report[step]["rows"] for report in reports) == [0, 1] for step in range(2))
