"""DeepSpeed's file: which one is read, and what it leaves to the command line."""

import pytest

from minicpm_tune.settings.deepspeed_setup import (
    DeepSpeedConfigError,
    drop_automatic_scheduler,
    read_deepspeed_config,
)


def test_a_scheduler_section_of_automatic_values_makes_way_for_the_command_line():
    automatic = {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}
    official = {"scheduler": {"type": "WarmupLR", "params": automatic}}
    own = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}
    assert drop_automatic_scheduler(official)
    assert official == {}
    assert not drop_automatic_scheduler(own)
    assert "scheduler" in own
    assert not drop_automatic_scheduler({})


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_deepspeed_files_leave_schedule_and_optimizer_to_the_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found beside finetune.py, from any folder
    config = read_deepspeed_config(f"ds_config_{name}.json")
    assert "scheduler" not in config
    assert "optimizer" not in config
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == name.endswith("offload")
    assert zero.get("stage3_gather_16bit_weights_on_model_save", zero["stage"] == 2)
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"


def test_a_missing_deepspeed_file_names_those_that_are_there():
    with pytest.raises(DeepSpeedConfigError, match=r"ds_config_zero2\.json, ds_config_zero2_offload\.json"):
        read_deepspeed_config("nothing.json")
