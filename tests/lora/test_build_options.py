"""rsLoRA, DoRA, LoRA+, starts from the weights, and learning rates of their own."""

import json

import pytest
import torch
from peft import PeftModel

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora.adapter_folders import fit_to_original_base, read_adapter_folder
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.lora.loading import load_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.argument_groups import LoraArguments
from support.golden_models import full_batch, golden_model

ROW = GENERATIONS["v2_6"]
LOGIT_TOLERANCE = 2e-4  # 2.1e-5 (olora), on logits up to 9


def wrapped_model(**options):
    model, about = golden_model("v2_6", attention="sdpa")
    lora = LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, **options)
    return add_adapter(model, ROW, lora, vision=False, resampler=True), about


def logits(model, about):
    batch, _ = full_batch("v2_6", "single", about)
    del batch["labels"]
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train_a_little(model, about):
    batch, _ = full_batch("v2_6", "single", about)
    model.train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("start", ["true", "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_a_saved_adapter_fits_the_unchanged_base_whatever_its_start(tmp_path, start):
    model, about = wrapped_model(init_lora_weights=start)
    before = logits(model, about)
    train_a_little(model, about)
    expected = logits(model, about)
    assert (expected - before).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    fit_to_original_base(model, tmp_path)
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    assert rank == (8 if start.startswith(("pissa", "olora")) else 4)
    base, _ = golden_model("v2_6", attention="sdpa")
    found = logits(PeftModel.from_pretrained(base, tmp_path), about)
    assert (found - expected).abs().max() < LOGIT_TOLERANCE


def test_rank_stabilized_adapters_and_dora_are_what_peft_is_given(tmp_path):
    model, _ = wrapped_model(use_rslora=True, use_dora=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert config["use_dora"] is True
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("generation", ["v4_6", "v4_7"])
def test_tied_embeddings_train_and_merge_as_one(tmp_path, generation):
    row = GENERATIONS[generation]
    folder = make_checkpoint(tmp_path / "base", generation, size="tiny")
    model = load_model(folder, dtype=torch.float32)
    wrapped = add_adapter(model, row, LoraArguments(lora_r=2, lora_dropout=0.0), vision=False, resampler=True)
    ids = torch.randint(0, 200, (1, 12))
    optimizer = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.5)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    head = wrapped.get_base_model().get_output_embeddings()
    embeddings = wrapped.get_base_model().get_input_embeddings()
    trained = embeddings.modules_to_save["default"].weight
    assert not torch.equal(trained, embeddings.original_module.weight)
    assert torch.equal(head.modules_to_save["default"].weight, trained)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        base = load_model(folder, dtype=torch.float32)
        again = load_adapter(base, read_adapter_folder(tmp_path / "adapter"))
        assert (again(input_ids=ids).logits - expected).abs().max() < LOGIT_TOLERANCE
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged", dtype=torch.float32).eval()
        assert (merged(input_ids=ids).logits - expected).abs().max() < LOGIT_TOLERANCE
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is True
