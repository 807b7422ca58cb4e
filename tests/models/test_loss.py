"""The chunked loss: equal to the plain one, in values and gradients, whatever the chunk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.models.loss import LMHead, MiniCPMVOutput, as_lm_head, supervised_loss

WIDTH, VOCABULARY = 16, 50
LOSS_TOLERANCE = 1e-5  # 1.9e-6 measured, loss sums near 40
GRADIENT_TOLERANCE = 1e-6  # 2.4e-7


def head_hidden_labels(seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(2, 9, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 9))
    labels[0, :4] = IGNORE_INDEX
    labels[1, 5:] = IGNORE_INDEX
    return LMHead(WIDTH, VOCABULARY, bias=True), hidden, labels


def plain_loss(head, hidden, labels):
    logits = F.linear(hidden, head.weight, head.bias)[:, :-1].flatten(0, 1)
    return F.cross_entropy(
        logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_loss_and_the_gradients_of_full_logits(chunk):
    head, hidden, labels = head_hidden_labels()
    expected = plain_loss(head, hidden, labels)
    expected_gradients = torch.autograd.grad(expected, (hidden, head.weight, head.bias))
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    found, _, token_losses = head(hidden[:, :-1][supervised], labels=targets[supervised], chunk=chunk)
    gradients = torch.autograd.grad(found, (hidden, head.weight, head.bias))
    assert abs(found - expected) < LOSS_TOLERANCE
    assert abs(token_losses.sum() - expected) < LOSS_TOLERANCE
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() < GRADIENT_TOLERANCE * wanted.abs().max().clamp(min=1)


WEIGHTS = np.array([0.5, 0.5, 0.25, 0.25, 2, 1, 1, 0.125, 0.125], dtype=np.float32)  # of 5 + 4 tokens


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_weighted_chunks_give_the_loss_and_the_gradients_of_full_logits(chunk):
    head, hidden, labels = head_hidden_labels()
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    chosen, weights = hidden[:, :-1][supervised], torch.from_numpy(WEIGHTS)
    logits = F.linear(chosen, head.weight, head.bias)
    expected = (F.cross_entropy(logits, targets[supervised], reduction="none") * weights).sum()
    expected_gradients = torch.autograd.grad(expected, (hidden, head.weight, head.bias))
    chosen = hidden[:, :-1][supervised]
    found, _, _ = head(chosen, labels=targets[supervised], chunk=chunk, token_weights=weights)
    gradients = torch.autograd.grad(found, (hidden, head.weight, head.bias))
    assert abs(found - expected) < LOSS_TOLERANCE
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() < GRADIENT_TOLERANCE * wanted.abs().max().clamp(min=1)


def test_the_mean_is_the_weighted_sum_over_the_sum_of_weights():
    head, hidden, labels = head_hidden_labels()
    found = supervised_loss(head, hidden, labels, weights=WEIGHTS * 0.01)
    mean = MiniCPMVOutput.of(found, None)
    plain = supervised_loss(head, hidden, labels).token_losses
    expected = (plain * torch.from_numpy(WEIGHTS)).sum() / WEIGHTS.sum()
    assert found.weight_sum == pytest.approx(0.01 * WEIGHTS.sum())  # below 1, and not raised to it
    assert found.token_count == 9
    torch.testing.assert_close(mean.loss, expected)
    torch.testing.assert_close(MiniCPMVOutput.of(found, 4).loss, found.loss_sum / 4)


def test_counts_are_of_supervised_positions_only():
    head, hidden, labels = head_hidden_labels()
    found = supervised_loss(head, hidden, labels)
    likeliest = head(hidden)[:, :-1].argmax(-1)
    targets = labels[:, 1:]
    assert found.token_count == 5 + 4
    assert found.correct_count == ((likeliest == targets) & (targets != IGNORE_INDEX)).sum()


def test_a_batch_without_labels_still_gives_every_parameter_a_gradient():
    head, hidden, labels = head_hidden_labels()
    found = supervised_loss(head, hidden, torch.full_like(labels, IGNORE_INDEX))
    found.loss_sum.backward()
    assert found.loss_sum == 0
    assert head.weight.grad.abs().sum() == 0
    assert hidden.grad.abs().sum() == 0


def test_bf16_gradients_are_summed_in_fp32_over_chunks():
    head, hidden, _ = head_hidden_labels()
    head = head.to(torch.bfloat16)
    rows = hidden.detach()[0].to(torch.bfloat16).repeat(60, 1)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    head(rows, labels=labels, chunk=1)[0].backward()
    by_ones = head.weight.grad.clone()
    head.weight.grad = None
    head(rows, labels=labels, chunk=10_000)[0].backward()
    relative = (by_ones - head.weight.grad).abs().max() / head.weight.grad.abs().max()
    assert relative < 0.01  # 0.004: the rounding of one bf16 number, not of 540 additions


FP16_TOLERANCE = 0.02  # 0.0145 measured, from slopes of 1e-6 in fp32


@pytest.mark.parametrize("weights", [None, 1000.0], ids=["plain", "weighted"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp16 weights", "autocast"])
def test_small_gradients_survive_fp16(autocast, weights):
    """A model that is nearly sure has slopes of 1e-6, whose products with the weights fp16 can't hold."""
    torch.manual_seed(0)
    held = torch.float32 if autocast else torch.float16
    weight = (torch.randn(500, 64) * 0.002).half()
    labels = torch.randint(0, 500, (300,))
    rows = weight.float()[labels]
    hidden = (20 * rows / rows.square().sum(-1, keepdim=True)).half()
    head = LMHead(64, 500, bias=False)
    head.weight = torch.nn.Parameter(weight.to(held))
    given = hidden.to(held, copy=True).requires_grad_()
    own = None if weights is None else torch.full((300,), weights)
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        loss, _, _ = head(given, labels=labels, chunk=128, token_weights=own)
    scale = 2.0**16 if weights is None else 2.0**6  # the loss scale
    (loss * scale).backward()

    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    (F.cross_entropy(F.linear(*exact), labels, reduction="sum") * (weights or 1)).backward()
    for found, expected in zip((given.grad, head.weight.grad), exact, strict=True):
        error = (found.double() / scale - expected.grad).norm() / expected.grad.norm()
        print(f"{error:.2e}")
        assert error < FP16_TOLERANCE


def test_taking_over_an_output_layer_keeps_its_parameters():
    linear = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    weight = linear.weight
    head = as_lm_head(linear)
    assert head is linear
    assert head.weight is weight
