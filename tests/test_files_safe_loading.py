"""Nothing is unpickled, whoever asks for it."""

import os
import pickle

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from minicpm_tune.files import allow_deepspeed_states, refuse_pickles
from support.hostile import Bomb


@pytest.fixture
def no_pickles(monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    refuse_pickles()
    yield
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")


def test_the_bomb_would_go_off(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"optimizer": Bomb(tmp_path / "mark")}, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled_even_when_a_library_asks_for_it(tmp_path, no_pickles, zipped):
    allow_deepspeed_states()
    state = {"optimizer": Bomb(tmp_path / "mark")}
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "mark").exists()


def test_a_stage_of_deepspeed_is_written_without_asking_for_a_function(tmp_path, no_pickles):
    """As Python 3.11.0 to 3.11.3 write every Enum, which could not be read again."""
    allow_deepspeed_states()
    assert b"getattr" not in pickle.dumps(ZeroStageEnum.weights, protocol=2)
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt")["zero_stage"] is ZeroStageEnum.gradients
