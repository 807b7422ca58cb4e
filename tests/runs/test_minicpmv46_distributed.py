"""4.6 and 4.7 on two processes whose batches differ: one has text alone, the other images; packed or not."""

import pytest
import torch

from support import processes
from support.minicpmv46_cases import loss_and_gradients, our_model, worst_gradient_error
from support.minicpmv46_worker import LEARNING_RATE, steps, supervised
from support.paths import SUPPORT

TIME_LIMIT = 240  # seconds, for two processes of four steps
LOSS_TOLERANCE = 1e-4  # 5e-6 in DDP, 4e-5 over the steps of ZeRO-3
GRADIENT_TOLERANCE = 1e-3
MOVE_TOLERANCE = 1e-2  # 1.5e-3: what is left of a small move when it is added to a weight in fp32


def run_two(kind, name, mode, folder):
    """What the first of two processes reports."""
    our_model(name).save_pretrained(folder / "checkpoint")
    start = processes.torchrun(2, SUPPORT / "minicpmv46_worker.py")
    given = (kind, name, mode, folder / "checkpoint", folder / "report.pt")
    finished = processes.run([*start, *given], limit=TIME_LIMIT)
    assert finished.returncode == 0, finished.stderr[-6000:]
    return torch.load(folder / "report.pt", weights_only=True)


def alone(model, batches):
    """Loss and gradients of both processes' batches, one after the other in this process."""
    total, loss, gradients = supervised(batches), 0.0, {}
    for batch in batches:
        output, found = loss_and_gradients(model, batch, num_items_in_batch=total)
        loss += output.loss.item()
        gradients = {key: value + gradients.get(key, 0) for key, value in found.items()}
    return loss, gradients


@pytest.mark.parametrize(("name", "mode"), [("v4_6", "4x"), ("v4_7", "16x")])
def test_ddp_gradients_equal_one_process(name, mode, tmp_path):
    report = run_two("ddp", name, mode, tmp_path)
    model = our_model(name, mode=mode)
    for found, batches in zip(report, steps(mode), strict=True):
        expected_loss, expected = alone(model, batches)
        assert abs(found["loss"] - expected_loss) <= LOSS_TOLERANCE
        assert worst_gradient_error(found["gradients"], expected) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(("name", "mode"), [("v4_6", "16x"), ("v4_7", "4x")])
def test_zero_3_steps_equal_one_process(name, mode, tmp_path):
    report = run_two("zero3", name, mode, tmp_path)
    model = our_model(name, mode=mode)
    for found, batches in zip(report["losses"], steps(mode), strict=True):
        expected_loss, expected = alone(model, batches)
        assert abs(found - expected_loss) <= LOSS_TOLERANCE
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter -= LEARNING_RATE * expected[key]
    start = dict(our_model(name, mode=mode).named_parameters())
    moved = {key: value - start[key].detach() for key, value in report["weights"].items()}
    expected_moves = {key: value.detach() - start[key].detach() for key, value in model.named_parameters()}
    assert worst_gradient_error(moved, expected_moves) <= MOVE_TOLERANCE
