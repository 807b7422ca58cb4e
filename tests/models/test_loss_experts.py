"""The mixture of experts of MiniCPM-V 4.7-35B-A3B: packed samples, and the loss that balances the experts."""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeGatedDeltaNet,
    load_balancing_loss_func,
)

from minicpm_tune.models.batch_layout import SampleLayout
from minicpm_tune.models.loss import balance_losses, sample_weights
from minicpm_tune.models.minicpmv46.delta_net import PackedMoeDeltaNet, use_packed_delta_nets
from support.minicpmv46_cases import (
    batch_of,
    gradients,
    loss_and_gradients,
    made_sample,
    one_thread,
    our_model,
    without_labels,
    worst_gradient_error,
)

MOE = "v4_7_moe"
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
# Worst values measured on the CPU, in fp32.
LOSS_TOLERANCE = 2e-6  # 4.8e-7
GRADIENT_TOLERANCE = 2e-4  # 2e-5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def samples():
    return [made_sample(1, after=5), made_sample(2, images=(), after=40), made_sample(3, images=(), before=9)]


def test_samples_of_a_packed_row_stay_apart():
    model = our_model(MOE).double().eval()
    alone = [model(**without_labels(batch_of([[each]]))).logits[0] for each in samples()]
    packed = model(**without_labels(batch_of([samples()]))).logits[0]
    for found, expected in zip(packed.split([len(each) for each in alone]), alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_every_delta_net_knows_the_samples_and_an_unknown_kind_is_no_silent_leak():
    llm = our_model(MOE).model.language_model
    nets = [layer.linear_attn for layer in llm.layers if hasattr(layer, "linear_attn")]
    assert [type(net) for net in nets] == [PackedMoeDeltaNet] * 3
    nets[0].__class__ = type("OtherDeltaNet", (Qwen3_5MoeGatedDeltaNet,), {})
    with pytest.raises(KeyError, match="OtherDeltaNet"):
        use_packed_delta_nets(llm)


def causal_lm(model):
    """transformers' own class for the mixture, which has a balance loss; with a model's weights, for text alone."""
    reference = Qwen3_5MoeForCausalLM(model.config.text_config)
    reference.model.load_state_dict(model.model.language_model.state_dict())
    reference.lm_head.load_state_dict(model.lm_head.state_dict())
    return reference.train()


def test_loss_and_gradients_with_balance_equal_transformers():
    model, sample = our_model(MOE, **BALANCED), made_sample(2, images=(), after=40)
    reference = causal_lm(model)
    expected = reference(sample["input_ids"][None], labels=sample["labels"][None], use_cache=False)
    expected.loss.backward()
    assert expected.aux_loss * 0.5 > 0.5  # or the tolerance would hide it
    output, found = loss_and_gradients(model, batch_of([[sample]], packed=False))
    assert abs(output.loss - expected.loss) <= LOSS_TOLERANCE
    assert abs(output.loss_sum / output.token_count + 0.5 * expected.aux_loss - output.loss) <= LOSS_TOLERANCE
    own = {f"model.language_model.{key}": value for key, value in gradients(reference.model).items()}
    assert worst_gradient_error({key: found[key] for key in own}, own) <= GRADIENT_TOLERANCE


def test_without_output_router_logits_there_is_no_balance_loss():
    output = our_model(MOE, router_aux_loss_coef=0.5)(**batch_of([samples()]))
    torch.testing.assert_close(output.loss, output.loss_sum / output.token_count)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_loss_is_that_of_each_sample_however_they_are_put_together(checkpointing):
    model, each = our_model(MOE, **BALANCED), samples()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    total = 5 + 40 + 9
    model.zero_grad()
    loss = 0.0
    for sample in each:  # as accumulation and processes split a step
        part = model(**batch_of([[sample]], packed=False), num_items_in_batch=total).loss
        part.backward()
        loss += part.item()
    expected = gradients(model)
    for rows in ([each], [each[:1], each[1:]], [[sample] for sample in each]):
        output, found = loss_and_gradients(model, batch_of(rows), num_items_in_batch=total)
        assert abs(output.loss.item() - loss) <= LOSS_TOLERANCE
        assert worst_gradient_error(found, expected) <= GRADIENT_TOLERANCE


def test_a_sample_counts_as_much_as_its_supervised_tokens_weigh():
    samples = SampleLayout(((3, 2), (4,)), width=5, device=torch.device("cpu"))
    labels = torch.tensor([[7, 7, -100, 7, 7], [-100, 7, -100, 7, -100]])
    assert sample_weights(labels, samples).tolist() == [1, 1, 2]  # the first tokens of samples don't count
    places, weights = np.array([0, 3, 5, 7]), np.array([0.5, 2, 0.25, 0.5], dtype=np.float32)
    assert sample_weights(labels, samples, places, weights).tolist() == [0.5, 2, 0.75]


def test_balance_losses_of_several_samples_equal_transformers_function_on_each():
    torch.manual_seed(0)
    samples = SampleLayout(((3, 7), (20,)), width=20, device=torch.device("cpu"))
    logits = tuple(torch.randn(30, 8) * 3 for _ in range(4))
    found = balance_losses(logits, samples, per_token=2)
    parts = [layer.split([3, 7, 20]) for layer in logits]
    expected = [load_balancing_loss_func(each, 8, 2) for each in zip(*parts, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    even = (torch.zeros(30, 8),)
    torch.testing.assert_close(balance_losses(even, samples, per_token=8), torch.full((3,), 8.0))
