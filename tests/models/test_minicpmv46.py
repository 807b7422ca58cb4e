"""4.6 and 4.7 against transformers' own classes: loss, logits and every gradient; packing; generation."""

import pytest
import torch

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import supervised_places
from minicpm_tune.models.parameter_parts import freeze
from support.minicpmv46_cases import (
    NATIVE,
    PAD_IMAGE,
    SLICED,
    batch_of,
    golden_sample,
    gradients,
    loss_and_gradients,
    made_sample,
    normalized,
    one_thread,
    our_model,
    packed_rows,
    packing_samples,
    released_inputs,
    transformers_model,
    without_labels,
    worst_gradient_error,
)

# Worst values measured on the CPU over all cases of this file, beside each tolerance; logits are up to 24.
# In fp32 against transformers, equal batches:
LOGITS_TOLERANCE = 1e-5  # 0, to the bit
LOSS_TOLERANCE = 1e-5  # 2.9e-6
GRADIENT_TOLERANCE = 2e-4  # 5e-5, dt_bias of a delta-net layer
# In fp64, where other shapes of a batch round alike; loss and delta rule compute in fp32 even so:
EXACT_LOGITS_TOLERANCE = 1e-10  # 5.3e-15
EXACT_GRADIENT_TOLERANCE = 2e-5  # 3.5e-6, dt_bias of a delta-net layer
EAGER_LOGITS_TOLERANCE = 2e-5  # 1.4e-6: eager attention has its softmax in fp32

CASES = ("one_wide", "text_only")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("v4_7_moe", "ocr_1")]


@pytest.fixture(params=[*NATIVE, *SLOW])
def name(request):
    return request.param


def check_against_transformers(name, sample, pixels, *, mode="16x", exact=False):
    reference, model = transformers_model(name, mode=mode), our_model(name, mode=mode)
    if exact:
        reference, model = reference.double(), model.double()
    expected = reference(**released_inputs(name, sample, pixels))
    expected.loss.backward()
    # A text-only batch leaves transformers' vision parameters without a gradient; ours get zeros.
    expected_gradients = {
        key: torch.zeros_like(value) if value.grad is None else value.grad
        for key, value in reference.named_parameters()
    }
    batch = batch_of([[sample]], packed=False)
    output, found = loss_and_gradients(model, batch)
    logits = model(**without_labels(batch)).logits
    assert output.logits is None
    assert (logits - expected.logits).abs().max().item() <= (
        EXACT_LOGITS_TOLERANCE if exact else LOGITS_TOLERANCE
    )
    assert (output.loss - expected.loss).abs().item() <= LOSS_TOLERANCE
    tolerance = EXACT_GRADIENT_TOLERANCE if exact else GRADIENT_TOLERANCE
    assert worst_gradient_error(found, expected_gradients) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_equal_transformers(name, case):
    sample, pixels = golden_sample(name, case)
    check_against_transformers(name, sample, pixels)


def test_two_images_one_of_them_sliced_equal_transformers(name):
    sample = made_sample(1, images=[SLICED, (4, 12)])
    check_against_transformers(name, sample, normalized(sample), exact=True)


def test_mode_4x_equals_transformers_and_leaves_zeros_on_the_skipped_merger(name):
    sample = made_sample(1, images=[((4, 6), (2, 4), (2, 4))], per_token=4)
    assert (sample["input_ids"] == PAD_IMAGE).sum() == 10  # (4 * 6 + 2 * 4 + 2 * 4) / 4
    check_against_transformers(name, sample, normalized(sample), mode="4x", exact=True)
    model = our_model(name, mode="4x")
    _, found = loss_and_gradients(model, batch_of([[sample]]))
    skipped = {key for key in found if ".vit_merger." in key}
    assert skipped == {key for key, _ in model.named_parameters() if ".vit_merger." in key}
    assert all(not found[key].any() for key in skipped)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_every_trained_parameter_gets_a_gradient_from_text_alone(name, mode, attention):
    model = our_model(name, mode=mode, attention=attention)
    _, found = loss_and_gradients(model, batch_of([[made_sample(3, images=())]]))
    assert set(found) == {key for key, _ in model.named_parameters()}
    moved = {key for key, gradient in found.items() if gradient.any()}
    assert not any("vision_tower" in key or "merger" in key for key in moved)


def test_loss_is_the_sum_over_the_given_number_of_items(name):
    model, batch = our_model(name), batch_of([[made_sample(3)]])
    output = model(**batch, num_items_in_batch=torch.tensor(36))
    assert output.token_count == 9
    torch.testing.assert_close(output.loss * 36, output.loss_sum)
    torch.testing.assert_close(model(**batch).loss * 9, output.loss_sum)


def test_the_loss_counts_tokens_by_the_weights_of_their_messages(name):
    model, batch = our_model(name), batch_of([[made_sample(3)]])
    losses = model(**batch).token_losses
    weights = torch.linspace(0.1, 1, 9)
    found = model(**batch, loss_weights=weights.numpy())
    torch.testing.assert_close(found.loss, (losses * weights).sum() / weights.sum())
    assert found.weight_sum == pytest.approx(float(weights.sum()))


def logits_by_sample(model, rows):
    """Logits of every sample of a batch, cut out of the rows."""
    logits = model(**without_labels(batch_of(rows))).logits
    found = []
    for row, samples in zip(logits, rows, strict=True):
        lengths = [len(sample["input_ids"]) for sample in samples]
        found += row[: sum(lengths)].split(lengths)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_logits_and_gradients_of_samples_alone(name, attention):
    model = our_model(name, attention=attention).double()
    samples = packing_samples()
    expected_logits = [logits_by_sample(model, [[sample]])[0] for sample in samples]
    expected_loss, total = 0.0, 9 + 9 + 60 + 23 + 9
    model.zero_grad()
    for sample in samples:
        output = model(**batch_of([[sample]], packed=False), num_items_in_batch=total)
        output.loss.backward()
        expected_loss += output.loss.item()
    expected_gradients = gradients(model)
    tolerance = EAGER_LOGITS_TOLERANCE if attention == "eager" else EXACT_LOGITS_TOLERANCE
    for found, expected in zip(logits_by_sample(model, packed_rows(samples)), expected_logits, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    output, found = loss_and_gradients(model, batch_of(packed_rows(samples)), num_items_in_batch=total)
    assert abs(output.loss.item() - expected_loss) <= LOSS_TOLERANCE
    assert worst_gradient_error(found, expected_gradients) <= EXACT_GRADIENT_TOLERANCE


@pytest.mark.parametrize("changed", range(5))
def test_changing_one_sample_never_moves_the_logits_of_another(name, changed):
    model, samples = our_model(name).eval(), packing_samples()
    with torch.no_grad():
        before = logits_by_sample(model, packed_rows(samples))
        other = dict(samples[changed])
        ids = other["input_ids"]
        other["input_ids"] = torch.where((ids >= 20) & (ids < 200), 219 - ids, ids)
        other["pixel_values"] = 255 - other["pixel_values"]
        samples[changed] = other
        after = logits_by_sample(model, packed_rows(samples))
    moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert moved == [number == changed for number in range(5)]


def test_rows_of_a_batch_equal_the_rows_alone(name):
    model = our_model(name).double().eval()
    samples = [made_sample(1, images=[SLICED], after=30), made_sample(2, images=()), made_sample(3)]
    with torch.no_grad():
        together = logits_by_sample(model, [[sample] for sample in samples])
        alone = [logits_by_sample(model, [[sample]])[0] for sample in samples]
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found, expected, atol=EXACT_LOGITS_TOLERANCE, rtol=0)


def test_the_first_token_of_a_packed_sample_is_never_supervised(name):
    model = our_model(name)
    first, second = made_sample(1, images=()), made_sample(2, images=())
    second["labels"] = second["input_ids"].clone()
    assert model(**batch_of([[first, second]])).token_count == 9 + 13


def test_what_the_collator_knows_already_gives_the_same(name):
    samples = packed_rows(packing_samples())
    batch, model = batch_of(samples), our_model(name)
    expected, expected_gradients = loss_and_gradients(model, batch)
    known = [batch[key] for key in ("input_ids", "attention_mask", "position_ids")]
    batch |= {"on_cpu": torch.stack(known).numpy(), "supervised": supervised_places(batch["labels"])}
    found, found_gradients = loss_and_gradients(model, batch | {"tgt_sizes": batch["tgt_sizes"].numpy()})
    assert found.loss == expected.loss
    assert found.token_count == expected.token_count
    assert worst_gradient_error(found_gradients, expected_gradients) == 0


def test_checkpointing_changes_no_gradient(name):
    batch = batch_of(packed_rows(packing_samples()))
    _, expected = loss_and_gradients(our_model(name), batch)
    model = our_model(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = loss_and_gradients(model, batch)
    assert worst_gradient_error(found, expected) <= 1e-6  # 0 measured


def test_attention_implementations_agree(name):
    batch = batch_of(packed_rows(packing_samples()))
    _, expected = loss_and_gradients(our_model(name), batch)
    _, found = loss_and_gradients(our_model(name, attention="eager"), batch)
    assert worst_gradient_error(found, expected) <= GRADIENT_TOLERANCE


def test_bf16_is_near_fp32(name):
    batch = batch_of(packed_rows(packing_samples()))
    expected = our_model(name)(**batch).loss
    found = our_model(name).to(torch.bfloat16)(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = our_model(name)(**batch).loss
    assert abs(found.item() / expected.item() - 1) <= 0.05  # 0.013 measured
    assert abs(cast.item() / expected.item() - 1) <= 0.05


def test_frozen_parts_get_no_gradient_and_text_still_runs(name):
    model = our_model(name)
    freeze(model, GENERATIONS[name], vision=False, resampler=True, llm=False)
    for images in ((), [(4, 4)]):
        _, found = loss_and_gradients(model, batch_of([[made_sample(3, images=images)]]))
        assert {key.rsplit(".mlp.")[0] for key in found} == {"model.merger"}


def test_samples_and_slices_must_fit(name):
    model, sample = our_model(name), made_sample(1)
    with pytest.raises(
        ValueError, match=r"from 6 on are 2, expected 4 x 8 patches / 4 = 8 \(downsample_mode 4x\)"
    ):
        our_model(name, mode="4x")(**batch_of([[sample]]))
    with pytest.raises(ValueError, match=r"2 slices \(tgt_sizes\) and 1 runs of image tokens"):
        model(**batch_of([[sample]]) | {"tgt_sizes": torch.tensor([[4, 4], [4, 4]])})
    batch = batch_of([[sample], [made_sample(2, images=())]])
    with pytest.raises(
        ValueError, match=r"row 1: found padding before a real token, expected rows padded on the right"
    ):
        model(**batch | {"attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(TypeError, match=r"does not know inputs_embeds"):
        model(**batch, inputs_embeds=torch.zeros(2, 3, 64))


def test_video_frames_are_scattered_and_placed_like_images_of_their_kind(name):
    reference, model = transformers_model(name).double().eval(), our_model(name).double().eval()
    sample = made_sample(1, images=[(4, 8), (4, 4)])
    ids = sample["input_ids"]
    second = (ids == PAD_IMAGE).nonzero()[-1]
    ids[second] = model.config.video_token_id
    pixels, sizes = normalized(sample), sample["tgt_sizes"]
    inputs = {"input_ids": ids[None], "pixel_values": pixels[..., : 14 * 32], "target_sizes": sizes[:1]}
    inputs |= {"pixel_values_videos": pixels[..., 14 * 32 :], "target_sizes_videos": sizes[1:]}
    if name.startswith("v4_7"):
        inputs["mm_token_type_ids"] = (ids == PAD_IMAGE).int()[None] + 2 * (ids == 13).int()[None]
    batch = without_labels(batch_of([[sample]]))
    with torch.no_grad():
        expected = reference(**inputs).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=EXACT_LOGITS_TOLERANCE, rtol=0)
