"""Steps that are not finite are counted and named; memory that runs out gives advice."""

import math

import numpy as np
import pytest
import torch

from minicpm_tune.batch import Provenance
from minicpm_tune.settings.arguments import TrainingArguments
from minicpm_tune.training import nonfinite_and_memory
from minicpm_tune.training.nonfinite_and_memory import (
    MicroBatch,
    NonFiniteError,
    NonFiniteSteps,
    memory_advice,
)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_every_library_is_heard_when_memory_runs_out(text):
    assert nonfinite_and_memory.is_out_of_memory(RuntimeError(text))
    assert not nonfinite_and_memory.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_advice_on_memory_is_about_what_is_not_set_yet(tmp_path):
    training = TrainingArguments(
        output_dir=str(tmp_path), activation_checkpointing=True, per_device_train_batch_size=1, use_lora=True,
        model_max_length=2048, max_slice_nums=9,
    )  # fmt: skip
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
    assert nonfinite_and_memory.is_out_of_memory(error)
    text = memory_advice(error, training, None, [])
    assert "Tried to allocate 20.00 GiB.)" in text
    assert "1. --deepspeed ds_config_zero2_offload.json" in text
    assert "2. --model_max_length 1024 (now 2048)" in text
    assert "3. --max_slice_nums 4 (slices per image, now 9)" in text


def report(loss, *rows, rank=0):
    return {"rank": rank, "rows": list(rows), "loss": loss}


def test_rows_are_named_by_file_and_only_those_of_bad_losses():
    steps = NonFiniteSteps("stop")
    batches = [report(1.0, (0, 1)), report(math.nan, (0, 4), (1, 7), rank=1)]
    steps.refused(5, math.nan, batches, ["a.json", "b.json"])
    steps.refused(6, math.inf, [report(1.0, (0, 1), (0, 2))], ["a.json"])
    with pytest.raises(
        NonFiniteError, match=r"row 4 of a.json and row 7 of b.json \(process 1\).*those of step 4"
    ):
        steps.refused(7, math.nan, batches, ["a.json", "b.json"])


def test_finite_losses_with_an_infinite_norm_name_all_rows(caplog):
    NonFiniteSteps("skip").refused(1, math.inf, [report(1.0, (0, 1), (0, 2))], ["a.json"])
    assert "every loss is finite, but the gradient norm is inf, from rows 1, 2 of a.json" in caplog.text


def test_a_finite_step_starts_the_count_anew():
    steps = NonFiniteSteps("stop")
    for step in range(1, 9, 2):
        steps.refused(step, math.nan, [report(math.nan, (0, 1))], ["a.json"])
        steps.refused(step, math.nan, [report(math.nan, (0, 1))], ["a.json"])
        steps.applied()


def test_skipped_steps_do_not_count_as_losses_of_zero():
    steps = NonFiniteSteps("skip")
    steps.applied()
    steps.refused(2, math.nan, [report(math.nan, (0, 1))], ["a.json"])
    line = {"loss": 2.0}
    steps.correct(line)
    assert line == {"loss": 4.0, "skipped_steps": 1}
    steps.applied()
    line = {"loss": 2.0}
    steps.correct(line)
    assert line == {"loss": 2.0}
    line = {"train_loss": 2.0}
    steps.correct(line)
    assert line == {"train_loss": 3.0}


def test_a_batch_is_described_without_being_kept():
    inputs = {
        "provenance": Provenance([(0, 3), None], np.array([], dtype=np.int64)),
        "input_ids": torch.zeros(2, 50),
        "tgt_sizes": torch.tensor([[4, 4], [2, 3]]),
        "pixel_values": torch.zeros(3, 14, 14 * 22, dtype=torch.uint8),
    }
    batch = MicroBatch.of(inputs)
    assert (batch.rows, batch.shape, batch.slices, batch.patches) == (((0, 3), None), (2, 50), 2, 22)
