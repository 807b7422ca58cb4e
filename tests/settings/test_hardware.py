"""NCCL's variables for consumer cards, with cards that are not here; and how many processes prepare data."""

import logging
import os

import pytest
import torch

from minicpm_tune.settings import hardware
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.settings.hardware import Cards, apply_settings, settings_for

BOTH_OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def cards(name, count=2, *, reach=False, processes=None, here=None, infiniband=False):
    processes = count if processes is None else processes
    return Cards((name,) * count, reach, processes, here or processes, infiniband)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA GeForce RTX 2080 Ti",
        "NVIDIA GeForce RTX 3090",
        "NVIDIA GeForce RTX 4070 Ti SUPER",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090",
    ],
)
def test_consumer_cards_without_access_to_each_other_get_both(name):
    assert settings_for(cards(name)) == BOTH_OFF


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "Tesla T4",
        "NVIDIA L40S",
        "NVIDIA RTX A6000",
        "NVIDIA RTX 4000 Ada Generation",
        "Quadro RTX 5000",
        "AMD Instinct MI300X",
    ],
)
def test_other_cards_get_none(name):
    assert settings_for(cards(name)) == {}


def test_cards_joined_by_nvlink_keep_it_but_a_driver_is_not_believed_where_there_is_none():
    assert settings_for(cards("NVIDIA GeForce RTX 3090", reach=True))["NCCL_P2P_DISABLE"] == "0"
    assert settings_for(cards("NVIDIA GeForce RTX 4090", reach=True))["NCCL_P2P_DISABLE"] == "1"
    mixed = Cards(("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 5090"), True, 2, 2, False)
    assert settings_for(mixed)["NCCL_P2P_DISABLE"] == "1"


def test_infiniband_between_machines_stays():
    name = "NVIDIA GeForce RTX 4090"
    assert settings_for(cards(name, processes=4, here=2, infiniband=True))["NCCL_IB_DISABLE"] == "0"
    assert settings_for(cards(name, processes=4, here=2)) == BOTH_OFF
    assert settings_for(cards(name, infiniband=True)) == BOTH_OFF


def test_a_single_process_needs_none():
    assert settings_for(cards("NVIDIA GeForce RTX 4090", processes=1)) == {}


@pytest.fixture
def three_3090(monkeypatch):
    """The machine of the guides' recipe, to this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: False)
    # Set, then deleted: so that what the code sets is undone.
    for name in BOTH_OFF:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    return monkeypatch


def test_the_environment_gets_what_is_needed_and_says_so(three_3090):
    said = apply_settings()
    assert "NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 is set for NVIDIA GeForce RTX 3090" in said
    assert {name: os.environ[name] for name in BOTH_OFF} == BOTH_OFF


def test_what_the_user_set_stays(three_3090):
    three_3090.setenv("NCCL_P2P_DISABLE", "0")
    said = apply_settings()
    assert said.startswith("NCCL_IB_DISABLE=1 is set")
    assert os.environ["NCCL_P2P_DISABLE"] == "0"
    three_3090.setenv("NCCL_IB_DISABLE", "0")
    assert apply_settings() is None
    assert os.environ["NCCL_IB_DISABLE"] == "0"


@pytest.mark.parametrize("rank", [0, 1])
def test_it_comes_before_the_processes_join_and_is_said_once(three_3090, caplog, tmp_path, rank):
    """Whatever started the processes: a launcher, torchrun, or srun."""

    class JoinedError(Exception):
        pass

    def join(self):
        assert {name: os.environ[name] for name in BOTH_OFF} == BOTH_OFF
        raise JoinedError

    caplog.set_level(logging.INFO)
    three_3090.setenv("RANK", str(rank))
    three_3090.setattr("minicpm_tune.settings.arguments.has_accelerator", lambda: True)
    three_3090.setattr("transformers.TrainingArguments.__post_init__", join)
    with pytest.raises(JoinedError):
        TrainingArguments(output_dir=str(tmp_path))
    assert caplog.text.count("NCCL_P2P_DISABLE=1") == (1 if rank == 0 else 0)


def test_without_cuda_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_look", None)
    assert apply_settings() is None


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
