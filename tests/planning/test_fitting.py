"""What fits: the choice of checkpointing, and the flags that MEMORY=auto adds."""

import os
from argparse import Namespace

import pytest
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from minicpm_tune.errors import UserError
from minicpm_tune.models.speed_options import Checkpointing
from minicpm_tune.planning import fitting
from minicpm_tune.planning.fitting import Room, flags_that_fit, training_of
from minicpm_tune.planning.memory_plan import Training
from minicpm_tune.settings.argument_groups import LoraArguments
from minicpm_tune.settings.finetune_command import read_command_line
from support.paths import GOLDENS, ROOT

GIBIBYTE = 2**30
LAUNCHER = ROOT / "finetune" / "finetune_lora.sh"


@pytest.fixture
def made_up(monkeypatch):
    """Plans of made-up sizes: 60 GiB, less 10 with each step of checkpointing, DeepSpeed's files, and 8 bit."""

    def need(folder, training):
        layers = training.computed_again
        planned = 60 - {0: 0, 2: 5, 1: 10}[layers.vision] - {0: 0, 2: 10, 1: 20}[layers.llm]
        planned -= {"none": 0, "optimizer": 15, "all": 22}[training.offload]
        planned -= 10 * (training.optim == "adamw_8bit")
        return {"all": planned * GIBIBYTE + fitting.CUDA_BYTES}

    monkeypatch.setattr(fitting, "plan", need)
    monkeypatch.setattr(fitting, "_at_most", lambda *_: 100 * GIBIBYTE)
    monkeypatch.setattr(fitting, "host_bytes", lambda *_: 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (200, Checkpointing(0, 0)),
        (64, Checkpointing(0, 0)),
        (58, Checkpointing(0, 2)),
        (53, Checkpointing(0, 1)),
        (43, Checkpointing(2, 1)),
        (32, Checkpointing(1, 1)),
        (20, Checkpointing(1, 1)),
    ],
)
def test_the_least_checkpointing_that_fits_is_chosen(made_up, size, expected):
    found, text = fitting.fitting(GOLDENS / "v2_6", Training(), Room(size * GIBIBYTE, False))
    assert found == expected
    assert (f"Computed again: {expected}" in text) or size == 200
    assert ("does not fit" in text) == (size == 20)


def test_what_is_asked_for_for_the_tower_stays(made_up):
    def chosen(size, **how):
        return fitting.fitting(GOLDENS / "v2_6", Training(), Room(size * GIBIBYTE, False), **how)[0]

    assert chosen(53, vision=False) == Checkpointing(2, 0)
    assert chosen(20, vision=False) == Checkpointing(1, 0)
    assert chosen(58, vision=True) == Checkpointing(0, 1)
    assert chosen(20, asked=Checkpointing(0, 0)) == Checkpointing(0, 0)


def test_a_tower_that_does_not_train_keeps_nothing(made_up):
    frozen = Training(tune_vision=False)
    found, _ = fitting.fitting(GOLDENS / "v2_6", frozen, Room(53 * GIBIBYTE, False))
    assert found == Checkpointing(2, 0)


def test_a_small_model_needs_no_plan(monkeypatch):
    monkeypatch.setattr(fitting, "plan", lambda *_: pytest.fail("planned"))
    found, text = fitting.fitting(GOLDENS / "v2_6", Training(), Room(8 * GIBIBYTE, True))
    assert found == Checkpointing(0, 0)
    assert "Memory: at most" in text


def test_a_plan_of_one_process_is_not_divided_by_zero3(monkeypatch):
    """transformers would divide the planned model among all processes, and wait for them."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    training = Namespace(
        chooses_checkpointing=True, deepspeed="zero3", hf_deepspeed_config=config,
        vision_gradient_checkpointing=None,
    )  # fmt: skip
    seen = []

    def look(*_, **__):
        seen.append(is_deepspeed_zero3_enabled())
        raise TypeError("a fault in the plan")

    monkeypatch.setattr(fitting, "training_of", lambda *_, **__: Training())
    monkeypatch.setattr(fitting, "fitting", look)
    try:
        room = Room(GIBIBYTE, False)
        found = fitting._choose(training, LoraArguments(), GOLDENS / "v2_6", room, gpus=2, length=10)
        seen.append(is_deepspeed_zero3_enabled())
    finally:
        unset_hf_deepspeed_config()
    assert seen == [False, True]
    assert found == Checkpointing(1, 1)  # a plan that fails does not end the run


def line(*words):
    return ["--model_name_or_path", str(GOLDENS / "v2_6"), "--data_path", str(GOLDENS / "v2_6" / "config.json"),
            "--use_lora", "true", "--tune_llm", "false", "--bf16", "true", *words]  # fmt: skip


class TestMemoryAuto:
    """Cards of several sizes, where plans are made up: 30 GiB with all checkpointing."""

    ZERO2 = ("--deepspeed", "ds_config_zero2.json")

    @pytest.fixture(autouse=True)
    def _gpu(self, made_up, monkeypatch):
        monkeypatch.setattr(fitting, "has_accelerator", lambda: True)
        monkeypatch.setattr(fitting.importlib.util, "find_spec", lambda name: name)

    @pytest.mark.parametrize(
        ("size", "added"),
        [
            (64, []),
            (32, []),
            (24, ["--optim", "adamw_8bit"]),
            (16, ["--deepspeed", "ds_config_zero2_offload.json"]),
            (10, ["--deepspeed", "ds_config_zero3_offload.json"]),
        ],
    )
    def test_the_cheapest_flags_that_fit_are_added(self, size, added):
        found, text = flags_that_fit(line(*self.ZERO2, "--memory_gib", str(size)), gpus=1)
        assert found == added
        assert f"{size}.0 GiB of the GPU" in text
        assert (" ".join(added) or "no further flag") in text

    def test_what_was_given_is_never_changed(self):
        given = line("--deepspeed", "ds_config_zero2.json", "--optim", "sgd", "--memory_gib", "24")
        assert flags_that_fit(given, gpus=1)[0] == ["--deepspeed", "ds_config_zero2_offload.json"]
        with pytest.raises(
            UserError, match=r"MEMORY=auto: 24\.0 GiB of the GPU, and the least that can be planned"
        ):
            flags_that_fit(line("--optim", "sgd", "--memory_gib", "24"), gpus=1)

    def test_weights_in_4_bit_are_not_divided(self):
        given = line(*self.ZERO2, "--q_lora", "true", "--memory_gib", "10")
        with pytest.raises(UserError, match=r"the least that can be planned is 15\.0 GiB"):
            flags_that_fit(given, gpus=1)

    def test_fsdp_is_not_planned(self):
        with pytest.raises(UserError, match="--fsdp is not planned"):
            flags_that_fit(line("--fsdp", "full_shard"), gpus=2)


def test_what_is_planned_is_what_the_flags_say():
    found = read_command_line(
        line("--deepspeed", "ds_config_zero3_offload.json", "--optim", "paged_adamw_8bit", "--q_lora", "true",
             "--per_device_train_batch_size", "3", "--model_max_length", "512", "--max_slice_nums", "4")
    )  # fmt: skip
    planned = training_of(found.training, found.lora, gpus=2, length=300)
    assert planned == Training(
        method="qlora", gpus=2, zero=3, offload="all", model_max_length=300, batch_size=3, max_slice_nums=4,
        optim="adamw_8bit", lora=found.lora, tune_llm=False,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_a_wrong_value_of_the_flag_is_refused(value):
    with pytest.raises(
        UserError, match=f"--activation_checkpointing is '{value}', expected true, false or auto"
    ):
        read_command_line(line("--activation_checkpointing", value))


def test_layers_of_the_users_own_contradict_the_choice():
    words = (
        "--activation_checkpointing",
        "auto",
        "--activation_checkpointing_kwargs",
        '{"every_n_layers": 2}',
    )
    with pytest.raises(UserError, match="every_n_layers contradicts --activation_checkpointing auto"):
        read_command_line(line(*words))


def test_free_memory_of_a_cpu_is_divided_among_its_processes(monkeypatch):
    from minicpm_tune.settings import hardware

    monkeypatch.setattr(hardware, "_CONTROL_GROUP", ROOT / "nowhere")
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "1")
    alone = hardware.free_memory(on_cpu=True)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "4")
    assert hardware.free_memory(on_cpu=True) == pytest.approx(alone / 4, rel=0.2)
