"""Processes with uneven work: no hang, a gradient for everything in every batch, the losses of one process.

Rows have two images, none, one, or many slices. All generations run one after another in the same
processes, which saves the time that imports take.
"""

import pytest

from support.live_runs import STAGES
from support.uneven_runs import EVERY, KINDS, Place, assert_every_gradient, assert_same, finish

OFFLOADING = {
    "zero2": ("--deepspeed", "ds_config_zero2_offload.json"),
    "zero3": ("--deepspeed", "ds_config_zero3_offload.json"),
}


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
