"""How many processes prepare data, when the user names no number."""

import pytest

from minicpm_tune.settings import hardware
from minicpm_tune.settings.arguments import TrainingArguments


@pytest.mark.parametrize(
    ("cores", "ranks", "accelerator", "expected"),
    [
        (2, 1, False, 0), (4, 1, False, 2), (64, 1, False, 2), (8, 4, False, 0),
        (2, 1, True, 1), (16, 1, True, 8), (16, 4, True, 3), (4, 8, True, 0),
    ],
)  # fmt: skip
def test_workers_follow_the_cores_of_a_rank(cores, ranks, accelerator, expected, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert hardware.data_workers(accelerator=accelerator) == expected


@pytest.mark.parametrize("workers", [0, 3])
def test_a_number_given_is_used_and_kept_processes_need_some(workers, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=workers)
    assert arguments.dataloader_num_workers == workers
    assert arguments.dataloader_persistent_workers == (workers > 0)
    assert not arguments.dataloader_pin_memory


@pytest.mark.parametrize(("cores", "expected"), [(2, 0), (8, 2)])
def test_without_a_number_the_machine_decides(cores, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.dataloader_num_workers == expected
