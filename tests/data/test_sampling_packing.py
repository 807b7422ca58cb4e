"""Packing: every sample exactly once, and nothing of one sample reaches another."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import SupervisedDataset
from draw_pictures import draw_data_set
from make_checkpoint import make_checkpoint
from minicpm_tune.data.files.row_files import epoch_order
from minicpm_tune.data.sample_tensors import data_collator, supervised_places
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.sampling import PADDING, EpochSampler, PackingSampler, best_fit, grouped_by_length
from minicpm_tune.training.step_metrics import SourceLosses
from support.golden_models import SIX, as_patches, golden_model
from support.paths import GOLDENS

LOGIT_TOLERANCE = 2e-5  # 5.2e-6 (v2_5)
GRADIENT_TOLERANCE = 1e-5  # 1.9e-6, relative to the largest gradient of the parameter
USEFUL_SHARE = 0.95


def golden_sample(generation, case, row, *, number=0):
    """A row of the goldens as the sample the dataset would give."""
    arrays = np.load(GOLDENS / generation / "forward.npz")
    prefix = f"{case}.{row}."
    sizes = arrays[prefix + "tgt_sizes"]
    pixels = [as_patches(arrays[f"{prefix}pixels.{index}"]) for index in range(len(sizes))]
    sample = {
        "input_ids": torch.from_numpy(arrays[prefix + "input_ids"]).long(),
        "labels": torch.from_numpy(arrays[prefix + "labels"]).long(),
        "pixel_values": torch.from_numpy(np.concatenate([np.zeros((3, 14, 0), np.uint8), *pixels], axis=-1)),
        "tgt_sizes": torch.from_numpy(sizes).reshape(-1, 2),
        "image_bound": torch.from_numpy(arrays[prefix + "image_bound"]).long().reshape(-1, 2),
        "origin": (0, number),
    }
    packs = json.loads((GOLDENS / generation / "forward.json").read_text())["cases"][case].get("temporal_ids")
    if packs:
        times = [[place, time] for place, pack in enumerate(packs[row]) for time in pack]
        sample["temporal_ids"] = torch.tensor(times)
    return sample


def samples_of(generation):
    """Samples with one slice, several, none, and (V-4.5) frames."""
    cases = {"v2_5": [("single", 0), ("batch_row0", 0), ("batch_row1", 0)]}
    wanted = cases.get(generation, [("mixed_text", 1), ("batch", 0), ("batch", 1)])
    if generation == "v4_5":
        wanted = [*wanted, ("video", 0)]
    return [golden_sample(generation, case, row, number=number) for number, (case, row) in enumerate(wanted)]


def run(model, batch):
    """Logits, loss sum and gradients of a batch."""
    batch = {name: value for name, value in batch.items() if name not in ("provenance", "attention_mask")}
    model.zero_grad()
    output = model(**batch, num_items_in_batch=1)
    output.loss.backward()
    gradients = {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }
    of_labels = ("labels", "supervised", "loss_weights")
    without_labels = {name: value for name, value in batch.items() if name not in of_labels}
    with torch.no_grad():
        return model(**without_labels).logits, output.loss_sum.item(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("generation", SIX)
def test_a_packed_row_equals_its_samples_alone(generation, attention):
    model, _ = golden_model(generation, attention=attention)
    samples = samples_of(generation)
    logits, loss, gradients = run(model, data_collator([samples], packing=True))
    start, loss_sum, added = 0, 0.0, {}
    for sample in samples:
        alone, alone_loss, alone_gradients = run(model, data_collator([sample]))
        length = len(sample["input_ids"])
        assert (logits[0, start : start + length] - alone[0]).abs().max() < LOGIT_TOLERANCE
        start, loss_sum = start + length, loss_sum + alone_loss
        for name, gradient in alone_gradients.items():
            added[name] = added.get(name, 0) + gradient
    assert loss == pytest.approx(loss_sum, rel=1e-6)
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):
            scale = added[name].abs().max().clamp(min=1e-3)
            assert (gradient - added[name]).abs().max() / scale < GRADIENT_TOLERANCE, name


def test_weights_of_samples_act_packed_padded_and_in_the_sum_of_a_step():
    model, _ = golden_model("v2_6", attention="sdpa")
    samples = samples_of("v2_6")
    alone = [run(model, data_collator([sample])) for sample in samples]
    shares = (0.25, 1.0, 2.0)
    for sample, share in zip(samples, shares, strict=True):
        if share != 1:
            sample["loss_weights"] = torch.full((len(sample["input_ids"]),), share)
    expected = sum(share * loss for share, (_, loss, _) in zip(shares, alone, strict=True))
    for batch in (data_collator([samples], packing=True), data_collator(samples)):
        _, loss, gradients = run(model, batch)
        counts = [int((sample["labels"][1:] != -100).sum()) for sample in samples]
        assert batch["loss_weights"].tolist() == list(np.repeat(shares, counts))
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            if not name.endswith("k_proj.bias"):
                added = sum(share * found[name] for share, (*_, found) in zip(shares, alone, strict=True))
                scale = added.abs().max().clamp(min=1e-3)
                assert (gradient - added).abs().max() / scale < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("generation", SIX)
def test_a_changed_sample_moves_no_logit_of_another(generation):
    model, _ = golden_model(generation, attention="sdpa")
    samples = samples_of(generation)
    before, _, _ = run(model, data_collator([samples], packing=True))
    changed = [dict(sample) for sample in samples]
    changed[1]["input_ids"] = samples[1]["input_ids"].clone()
    changed[1]["input_ids"][-5:] = 7
    changed[1]["pixel_values"] = 255 - samples[1]["pixel_values"]
    after, _, _ = run(model, data_collator([changed], packing=True))
    first, second = (len(sample["input_ids"]) for sample in samples[:2])
    same = torch.ones(before.shape[1], dtype=torch.bool)
    same[first : first + second] = False
    assert torch.equal(before[0, same], after[0, same])
    assert not torch.equal(before[0, ~same], after[0, ~same])


@pytest.mark.parametrize("generation", SIX)
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(generation):
    model, _ = golden_model(generation, attention="sdpa")
    samples = samples_of(generation)
    together, _, _ = run(model, data_collator(samples))
    for row, sample in enumerate(samples):
        alone, _, _ = run(model, data_collator([sample]))
        assert (together[row, : len(sample["input_ids"])] - alone[0]).abs().max() < LOGIT_TOLERANCE


def test_the_places_of_supervised_tokens_give_the_loss_that_labels_give():
    model, _ = golden_model("v2_6", attention="sdpa")
    batch = data_collator(samples_of("v2_6"))
    del batch["provenance"]
    with_places = model(**batch)
    del batch["supervised"]
    without = model(**batch)
    assert with_places.loss == without.loss
    assert with_places.token_count == without.token_count == len(supervised_places(batch["labels"]))


def test_joined_samples_keep_their_rows_and_never_learn_their_first_token():
    samples = samples_of("v2_6")
    for sample in samples:
        sample["labels"][0] = 5
    batch = data_collator([samples], packing=True)
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    assert starts.tolist() == [0, 41, 41 + 84]
    assert batch["labels"][0, starts].tolist() == [-100] * 3
    assert batch["provenance"].rows == [(0, 0), (0, 1), (0, 2)]
    assert samples[0]["labels"][0] == 5


@pytest.mark.parametrize("packing", [True, False])
def test_every_supervised_token_is_counted_for_its_source(packing):
    samples = samples_of("v2_6")
    for source, sample in enumerate(samples):
        sample["origin"] = (source, 0)
    batch = data_collator([samples] if packing else samples, packing=packing)
    counts = [int((sample["labels"][1:] != -100).sum()) for sample in samples]
    assert np.bincount(batch["provenance"].supervised_sources).tolist() == counts
    losses = SourceLosses(["a/x.json", "b/x.json", "y.json"])
    losses.add(torch.arange(sum(counts), dtype=torch.float32), batch["provenance"].supervised_sources)
    found = losses.read(Accelerator(cpu=True))
    assert list(found) == ["loss/0:x.json", "loss/1:x.json", "loss/y.json"]
    assert found["loss/0:x.json"] == pytest.approx(np.arange(counts[0]).mean())


@settings(max_examples=200)
@given(st.lists(st.integers(1, 130), max_size=60), st.integers(1, 120))
def test_best_fit_uses_every_sample_once_and_overfills_no_row(lengths, capacity):
    rows = best_fit(range(len(lengths)), np.array(lengths, dtype=np.int64), capacity=capacity)
    assert rows == best_fit(range(len(lengths)), lengths, capacity=capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity or len(row) == 1 for row in rows)


def shuffled(count, *, seed):
    return lambda epoch: epoch_order([count], [count], seed=seed, epoch=epoch, shuffle=True).tolist()


def skewed_lengths(count=5000, longest=2048):
    random = np.random.RandomState(0)
    return np.clip(random.lognormal(5.5, 0.8, count).astype(int), 20, longest).tolist()


@pytest.mark.parametrize("window", [1000, 10_000])
def test_packed_rows_are_nearly_full_on_a_skewed_distribution(window):
    lengths = skewed_lengths()
    sampler = PackingSampler(
        shuffled(len(lengths), seed=1), multiple=8, lengths=lengths, capacity=2048, window=window, seed=1
    )
    share = sum(lengths) / (len(sampler) * 2048)
    print(f"\nwindow {window}: {share:.1%} useful tokens")
    assert share > USEFUL_SHARE


def test_every_epoch_packs_every_sample_once_in_another_order():
    lengths = skewed_lengths(700)
    sampler = PackingSampler(
        shuffled(700, seed=3), multiple=4, lengths=lengths, capacity=2048, window=100, seed=3
    )
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        assert sorted(index for row in rows if row != PADDING for index in row) == list(range(700))
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


def test_unpacked_orders_are_reproducible_and_filled_up_to_full_steps():
    sampler = EpochSampler(shuffled(10, seed=5), multiple=4)
    first = list(sampler)
    assert sorted(first[:10]) == list(range(10))
    assert first[10:] == [PADDING, PADDING]
    sampler.set_epoch(1)
    assert sorted(list(sampler)[:10]) == list(range(10))
    assert list(sampler)[:10] != first[:10]
    assert list(EpochSampler(shuffled(10, seed=5), multiple=4)) == first
    assert list(EpochSampler(shuffled(10, seed=6), multiple=4)) != first


def test_grouping_by_length_saves_padding():
    lengths = skewed_lengths(2000)

    def padding(order, batch=8):
        batches = [
            [lengths[index] for index in order[start : start + batch]] for start in range(0, 2000, batch)
        ]
        return 1 - sum(map(sum, batches)) / sum(max(rows) * len(rows) for rows in batches)

    grouped = grouped_by_length(shuffled(2000, seed=0), lengths, batch_size=8, seed=0)(0)
    assert sorted(grouped) == list(range(2000))
    assert padding(grouped) < 0.25 * padding(shuffled(2000, seed=0)(0))


@pytest.mark.parametrize("task", ["questions_train", "descriptions_train"])
def test_packed_rows_are_nearly_full_on_the_demo_s_rows(tmp_path, task):
    files = draw_data_set(tmp_path / "data", sizes={"train": 144, "eval": 9, "held_out": 9}, seed=0)
    processing = load_processing(make_checkpoint(tmp_path / "model", "v2_6", size="tiny"))
    rows = SupervisedDataset(files[task], processing)
    lengths = [len(rows.plan(index).encoded.input_ids) for index in range(rows.mixture.row_count)]
    packed = best_fit(range(len(lengths)), lengths, capacity=2048)
    # The last row is what is left over; in a data set of any size it is one row.
    share = sum(lengths) / ((len(packed) - 1) * 2048 + min(2048, sum(lengths[index] for index in packed[-1])))
    print(f"\n{task}: {share:.1%} useful tokens")
    assert share > USEFUL_SHARE
