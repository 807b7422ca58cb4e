"""New tokens get rows in embeddings and output layer, which train, are saved, load and merge."""

import pytest
import torch

import merge_lora
from minicpm_tune.answering.load import ModelChoice, load_for_inference
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.samples import load_processing
from minicpm_tune.lora.adapter_folders import AdapterError, complete_adapter_folder, read_adapter_folder
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.lora.loading import load_adapter
from minicpm_tune.models.loading import add_token_rows
from minicpm_tune.settings.argument_groups import LoraArguments
from support.tiny_checkpoints import checkpoint, loaded

TOKENS = ("<cat_a>", "☃snow")
LOGIT_TOLERANCE = (
    2e-6  # 3.3e-7 of the largest logit (v4_6, whose logits grow to 300 in these steps), at least of 50
)
FAMILIES = ["v2", "v2_6", "v4_6", "xc2_7b"]


def grown(name):
    processing = load_processing(checkpoint(name), new_tokens=TOKENS)
    model = loaded(checkpoint(name), name)
    add_token_rows(model, processing.new_tokens)
    return model, processing


def error_of(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=50)).item()


def ids_of(processing):
    return torch.tensor([processing.tokenizer("a <cat_a> and ☃snow!")["input_ids"]])


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_new_rows_are_the_mean_and_old_logits_stay(name):
    model, processing = grown(name)
    before = loaded(checkpoint(name), name)
    old = before.get_input_embeddings().weight
    weight = model.get_input_embeddings().weight
    assert weight.shape == (len(processing.tokenizer), old.shape[1])
    assert torch.equal(weight[: len(old)], old)
    assert torch.allclose(weight[len(old) :], old.mean(dim=0), atol=1e-6)
    tied = GENERATIONS[name].ties_output
    assert (model.get_output_embeddings().weight is weight) == tied
    ids = torch.arange(5, 40)[None]
    assert torch.allclose(logits(model, ids)[..., : len(old)], logits(before, ids), atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tuned_model_with_new_tokens_is_a_checkpoint_like_any_other(name, tmp_path):
    model, processing = grown(name)
    ids = ids_of(processing)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "tuned")
    assert torch.equal(ids_of(load_processing(tmp_path / "tuned")), ids)
    assert torch.equal(logits(loaded(tmp_path / "tuned", name), ids), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_brings_its_new_tokens_along(name, tmp_path):
    model, processing = grown(name)
    row, ids = GENERATIONS[name], ids_of(processing)
    wrapped = add_adapter(model, row, LoraArguments(lora_r=4, lora_dropout=0.0), vision=False, resampler=True)
    optimizer = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.05)
    before = logits(wrapped, ids)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    expected = logits(wrapped, ids)
    assert (expected - before)[..., list(processing.new_tokens.values())].abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path / "adapter")
    base = checkpoint(name)
    complete_adapter_folder(tmp_path / "adapter", base=base, generation=row, new_tokens=processing.new_tokens)

    found, theirs = load_for_inference(ModelChoice(adapter=str(tmp_path / "adapter"), device="cpu"))
    assert theirs.new_tokens == processing.new_tokens
    assert torch.equal(ids_of(theirs), ids)
    assert error_of(logits(found, ids), expected) < LOGIT_TOLERANCE

    words = ["--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    merge_lora.run(merge_lora.parse_flags([str(word) for word in words]))
    assert torch.equal(ids_of(load_processing(tmp_path / "merged")), ids)
    assert error_of(logits(loaded(tmp_path / "merged", name), ids), expected) < LOGIT_TOLERANCE

    with pytest.raises(AdapterError, match=r"was trained with 2 new tokens, the model here has 0"):
        load_adapter(loaded(base, name), read_adapter_folder(tmp_path / "adapter"))
