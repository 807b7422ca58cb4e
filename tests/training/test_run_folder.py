"""The folder of checkpoints: which are whole, which one is chosen, moved, removed, or refused."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from minicpm_tune import output_folder
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.settings.checks import UsageError
from minicpm_tune.training import run_folder
from minicpm_tune.training.run_folder import CheckpointError, CheckpointWriter, choose_checkpoint
from minicpm_tune.training.run_plan import ResumeError, check_continues, run_shape
from support import finetune_runs
from support.paths import FINETUNE

TRAINING = Namespace(
    world_size=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, deepspeed=None, use_lora=False,
    train_sampling_strategy="random", seed=7, data_seed=None, packing=False, ignore_data_skip=False,
    allow_inexact_resume=False,
)  # fmt: skip
SHAPE = run_shape(TRAINING, 100)


def with_flags(**flags):
    return Namespace(**{**vars(TRAINING), **flags})


def checkpoint(folder, step, *, sizes=None, **shape):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (path / name).write_text(f"{step}")
    files = {"model.safetensors": len(str(step)), "trainer_state.json": len(str(step)), **(sizes or {})}
    manifest = {"step": step, **vars(SHAPE), **shape, "files": files}
    (path / output_folder.MANIFEST).write_text(json.dumps(manifest))
    return path


def with_states(path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (path / name).touch()
    return path


def settled(folder, **values):
    return Namespace(
        **{
            "output_dir": str(folder),
            "continues_last": True,
            "resume_from_checkpoint": None,
            "process_index": 0,
        }
        | values
    )


def test_damage_is_seen_and_said(tmp_path):
    assert output_folder.find_damage(checkpoint(tmp_path, 1)) is None
    cut = checkpoint(tmp_path, 2, sizes={"model.safetensors": 7})
    assert output_folder.find_damage(cut) == "model.safetensors has 1 bytes, expected 7"
    lost = checkpoint(tmp_path, 3, sizes={"optimizer.pt": 7})
    assert output_folder.find_damage(lost) == "optimizer.pt is missing"
    (checkpoint(tmp_path, 4) / output_folder.MANIFEST).write_text('{"step"')
    assert output_folder.find_damage(tmp_path / "checkpoint-4") == "checkpoint.json is cut short"
    (tmp_path / "checkpoint-5").mkdir()
    assert output_folder.find_damage(tmp_path / "checkpoint-5") == "no trainer_state.json"
    assert output_folder.find_earlier_run(tmp_path).last_checkpoint == tmp_path / "checkpoint-1"


def test_the_last_whole_checkpoint_is_chosen(tmp_path, caplog):
    assert choose_checkpoint(settled(tmp_path)) is None
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sizes={"model.safetensors": 7})
    assert choose_checkpoint(settled(tmp_path)) == tmp_path / "checkpoint-10"
    assert "checkpoint-11 is not whole and is passed over" in caplog.text
    given = settled(tmp_path, continues_last=False, resume_from_checkpoint="elsewhere")
    assert str(choose_checkpoint(given)) == "elsewhere"


def test_machines_with_folders_of_their_own_agree(tmp_path, monkeypatch, caplog):
    for step in (4, 6, 8):
        checkpoint(tmp_path, step)
    elsewhere = {4: None, 6: None, 7: None}
    monkeypatch.setattr(run_folder, "gather", lambda value: [value, elsewhere])
    assert choose_checkpoint(settled(tmp_path)) == tmp_path / "checkpoint-6"
    assert "checkpoint-8 is not whole and is passed over: not on every machine" in caplog.text


def test_old_checkpoints_go_but_never_the_last_whole_one(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    for step in (4, 5):
        checkpoint(tmp_path, step, sizes={"optimizer.pt": 1})

    def left():
        return [step for step, _ in output_folder.list_checkpoints(tmp_path)]

    assert output_folder.remove_old_checkpoints(tmp_path, keep=None) == []
    assert output_folder.remove_old_checkpoints(tmp_path, keep=3) == []
    output_folder.remove_old_checkpoints(tmp_path, keep=2, best=tmp_path / "checkpoint-1")
    assert left() == [1, 3, 4, 5]
    output_folder.remove_old_checkpoints(tmp_path, keep=1)
    assert left() == [3, 4, 5]
    checkpoint(tmp_path, 6)
    output_folder.remove_old_checkpoints(tmp_path, keep=1)
    assert left() == [6]


def writer(folder, step):
    return CheckpointWriter(folder, step, owns_folder=True, shape=SHAPE)


def test_a_checkpoint_appears_whole_at_once_and_replaces_a_damaged_one(tmp_path):
    checkpoint(tmp_path, 3, sizes={"optimizer.pt": 1})
    new = writer(tmp_path, 3)
    with new.writing():
        folder = new.staging / new.name
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        (folder / "global_step3").mkdir()
        (folder / "global_step3" / "part.pt").write_bytes(bytes(5))
    assert output_folder.find_earlier_run(tmp_path).last_checkpoint is None
    new.move_into_place()
    assert output_folder.is_checkpoint(tmp_path / "checkpoint-3")
    manifest = output_folder.read_manifest(tmp_path / "checkpoint-3")
    assert manifest["files"] == {"global_step3/part.pt": 5, "trainer_state.json": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    (tmp_path / "checkpoint-3" / "global_step3" / "part.pt").write_bytes(bytes(4))
    assert not output_folder.is_checkpoint(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file data/0"
        ),
        OSError(28, "No space left on device"),
    ],
)
def test_every_way_of_not_being_written_is_one_message(tmp_path, error):
    checkpoint(tmp_path, 2)
    new = writer(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not .*checkpoint-2 is whole") as raised:
        fail_while_writing(new, error)
    assert (new.staging / new.name).exists()  # others may be writing there
    raised.value.clean_up()
    assert not (new.staging / new.name).exists()


def fail_while_writing(new, error):
    with new.writing():
        (new.staging / new.name).mkdir()
        raise error


def test_a_full_disk_is_named_whatever_the_library_says(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: Namespace(free=1000))
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(CheckpointError, match=r"written: No space left on device\. 0\.0 GiB are free"):
        fail_while_writing(writer(tmp_path, 4), error)


def test_a_checkpoint_that_cannot_be_moved_is_a_message(tmp_path, monkeypatch):
    new = writer(tmp_path, 4)
    with new.writing():
        (new.staging / new.name).mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written: No space left"):
        new.move_into_place()


def test_errors_of_the_program_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writer(tmp_path, 4).writing():
        raise RuntimeError("shapes differ")


def test_a_run_of_the_same_shape_continues(tmp_path):
    check_continues(with_states(checkpoint(tmp_path, 3)), TRAINING, rows=100)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"trains": "adapter"}, "it trained adapter, this run trains weights. Set --use_lora as it was"),
        ({"deepspeed_stage": 2}, "written under DeepSpeed ZeRO-2, this run is under no DeepSpeed"),
        ({"rows": 90}, "the data had 90 rows and now has 100.*--ignore_data_skip true"),
        (
            {"order": "--seed 8"},
            "in the order of --seed 8, now it is --train_sampling_strategy random --seed 7",
        ),
        ({"rows_per_step": 8}, "a step had 8 rows and now has 4"),
    ],
)
def test_a_run_of_another_shape_is_refused(tmp_path, written, message):
    path = with_states(checkpoint(tmp_path, 3, **written))
    with pytest.raises(ResumeError, match=message):
        check_continues(path, TRAINING, rows=100)
    if {"rows", "order", "rows_per_step"} & set(written):
        check_continues(path, with_flags(ignore_data_skip=True), rows=100)


def test_a_checkpoint_of_transformers_own_is_taken_as_it_is(tmp_path):
    path = with_states(checkpoint(tmp_path, 3))
    (path / output_folder.MANIFEST).unlink()
    assert output_folder.is_checkpoint(path)
    check_continues(path, TRAINING, rows=100)


def test_a_checkpoint_of_weights_alone_is_continued_only_when_that_is_wanted(tmp_path, caplog):
    path = checkpoint(tmp_path, 3)
    lacks = "lacks the optimizer's state and the place in the schedule and random numbers"
    with pytest.raises(ResumeError, match=f"{lacks}. .*--allow_inexact_resume true"):
        check_continues(path, TRAINING, rows=100)
    check_continues(path, with_flags(allow_inexact_resume=True), rows=100)
    assert f"{lacks}; these start anew" in caplog.text
    deepspeed = {"zero_optimization": {"stage": 2}}
    path = checkpoint(tmp_path, 4, deepspeed_stage=2)
    with pytest.raises(ResumeError, match=r"which DeepSpeed needs\. Continue from another checkpoint"):
        check_continues(path, with_flags(allow_inexact_resume=True, deepspeed=deepspeed), rows=100)
    (path / "global_step4").mkdir()
    check_continues(path, with_flags(deepspeed=deepspeed), rows=100)


HOLDS = """
import sys
sys.path.insert(0, sys.argv[1])
from minicpm_tune.output_folder import lock
file = open(sys.argv[2], "a+")
assert lock(file)
file.write("process 7 on here")
file.flush()
sys.stdout.write("locked")
sys.stdout.flush()
sys.stdin.read()
"""


def test_a_folder_in_use_is_said_to_be_so_and_not_to_hold_an_unfinished_run(tmp_path):
    checkpoint(tmp_path / "out", 3)
    lock_file = tmp_path / "out" / output_folder.LOGS / output_folder.LOCK_FILE
    assert output_folder.find_user(tmp_path / "out") is None
    lock_file.parent.mkdir()
    lock_file.touch()
    assert output_folder.find_user(tmp_path / "out") is None
    data = finetune_runs.write_data(tmp_path / "data", rows=1)
    words = [
        "--model_name_or_path",
        str(tmp_path),
        "--data_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UsageError, match=r"holds an unfinished run \(checkpoint-3\)"):
        parse_arguments(words)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, FINETUNE, lock_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.read(6) == "locked"
        assert output_folder.find_user(tmp_path / "out") == "process 7 on here"
        with pytest.raises(UsageError, match=r"is in use by another run \(process 7 on here\)"):
            parse_arguments(words)
    finally:
        other.kill()
        other.communicate()
    assert output_folder.find_user(tmp_path / "out") is None
