"""InternLM-XComposer2 in use: packing, padding, several images, text alone, generation, adapters, files."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minicpm_tune.answering.generate import GREEDY, answer
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.checkpoints.weight_files import tensor_names
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.lora.adapter_folders import read_adapter_folder
from minicpm_tune.lora.build import add_adapter, target_modules
from minicpm_tune.lora.loading import load_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.quantization import quantized_modules
from minicpm_tune.settings.argument_groups import LoraArguments
from minicpm_tune.settings.data_arguments import DataArguments
from support.golden_checkpoints import limited
from support.rows import chat
from support.rows import turns_of as read_turns
from support.tiny_checkpoints import checkpoint
from support.xcomposer2_cases import THREE

# Worst values measured on torch 2.13 (CPU, 2 cores, 7b and 4khd) stand behind each.
LOGIT_TOLERANCE = 2e-5  # 3.3e-6 (7b)
GRADIENT_TOLERANCE = 1e-4  # 4.0e-6 (7b), of the largest entry


@pytest.fixture(scope="module")
def loaded():
    """Model (in evaluation mode: no dropout) and data side of each small checkpoint."""
    found = {}
    for name in THREE:
        folder = checkpoint(name)
        model = load_model(folder, dtype=torch.float32).eval()
        found[name] = (
            model.requires_grad_(True),
            load_processing(folder, DataArguments.of_checkpoint(hd_num=4 if "4khd" in name else None)),
        )
    return found


def conversation(*parts, answer_text="A red one."):
    number, content = 0, []
    for part in parts:
        content.append(Media("image", number) if isinstance(part, tuple) else part)
        number += isinstance(part, tuple)
    images = [Image.effect_noise(part, 80).convert("RGB") for part in parts if isinstance(part, tuple)]
    return [Turn("user", tuple(content)), Turn("assistant", (answer_text,))], images


# Text alone, one image, two images of different shape.
ROWS = (
    conversation("Who are you?", answer_text="I am a model, and I can see."),
    conversation((60, 40), "What is it?"),
    conversation("First: ", (40, 90), ", second: ", (50, 50), ". Compare.", answer_text="Both are gray."),
)


def samples_of(rules):
    return [rules.encode(turns, images) | {"origin": (0, row)} for row, (turns, images) in enumerate(ROWS)]


def run(model, batch):
    """Logits, summed loss and gradients."""
    batch = {key: value for key, value in batch.items() if key not in ("provenance", "attention_mask")}
    model.zero_grad()
    output = model(**batch, num_items_in_batch=1)
    output.loss.backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters()}
    with torch.no_grad():
        logits = model(
            **{key: value for key, value in batch.items() if key not in ("labels", "supervised")}
        ).logits
    return logits, output.loss_sum.item(), gradients


def test_the_loss_counts_tokens_by_the_weights_of_their_messages(loaded):
    model, rules = loaded["xc2_7b"]
    batch = data_collator(samples_of(rules))
    losses = model(**{key: value for key, value in batch.items() if key != "provenance"}).token_losses
    batch["loss_weights"] = np.linspace(0.1, 1, len(losses), dtype=np.float32)
    weights = torch.from_numpy(batch["loss_weights"])
    del batch["provenance"]
    torch.testing.assert_close(model(**batch).loss, (losses * weights).sum() / weights.sum())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", THREE)
def test_a_batch_packed_or_padded_equals_its_samples_alone(loaded, name, packing):
    model, rules = loaded[name]
    samples = samples_of(rules)
    logits, loss, gradients = run(model, data_collator([samples] if packing else samples, packing=packing))
    start, loss_sum, added = 0, 0.0, {}
    for row, sample in enumerate(samples):
        alone, alone_loss, alone_gradients = run(model, data_collator([sample]))
        length = len(sample["input_ids"])
        mine = logits[0, start : start + length] if packing else logits[row, :length]
        assert (mine - alone[0]).abs().max() < LOGIT_TOLERANCE
        start, loss_sum = start + length, loss_sum + alone_loss
        added = {key: value + added.get(key, 0) for key, value in alone_gradients.items()}
    assert loss == pytest.approx(loss_sum, rel=1e-6)
    for key, gradient in gradients.items():
        if not key.endswith("k_proj.bias"):
            scale = added[key].abs().max().clamp(min=1e-3)
            assert (gradient - added[key]).abs().max() / scale < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize("name", THREE)
def test_a_changed_sample_moves_no_logit_of_another_in_its_row(loaded, name):
    model, rules = loaded[name]
    samples = samples_of(rules)
    before, _, _ = run(model, data_collator([samples], packing=True))
    changed = [dict(sample) for sample in samples]
    changed[1]["pixel_values"] = 255 - samples[1]["pixel_values"]
    after, _, _ = run(model, data_collator([changed], packing=True))
    first, second = (len(sample["input_ids"]) for sample in samples[:2])
    same = torch.ones(before.shape[1], dtype=torch.bool)
    same[first : first + second] = False
    assert torch.equal(before[0, same], after[0, same])
    assert not torch.equal(before[0, ~same], after[0, ~same])


@pytest.mark.parametrize("name", THREE)
def test_text_alone_gives_every_parameter_a_gradient_and_those_of_vision_are_zero(loaded, name):
    model, rules = loaded[name]
    _, _, gradients = run(model, data_collator(samples_of(rules)[:1]))
    seeing = ("vit.", "vision_proj.", "plora_")
    for key, gradient in gradients.items():
        assert gradient is not None, key
        if key.startswith(seeing) or ".Plora_" in key:
            assert not gradient.any(), key


@pytest.mark.parametrize("name", THREE)
def test_partial_lora_and_projector_learn_from_images(loaded, name):
    model, rules = loaded[name]
    _, _, gradients = run(model, data_collator(samples_of(rules)[1:2]))
    first = "model.layers.0.attention.wqkv.Plora_B.weight"
    for key in (first, "vision_proj.0.weight", "vit.vision_tower.vision_model.embeddings.class_embedding"):
        assert gradients[key].any(), key


def test_partial_lora_drops_out_in_training_only(loaded):
    model, rules = loaded["xc2_7b"]
    batch = {key: value for key, value in data_collator(samples_of(rules)[1:2]).items()
             if key not in ("provenance", "attention_mask")}  # fmt: skip
    with torch.no_grad():
        assert model(**batch).loss == model(**batch).loss
        model.train()
        try:
            assert model(**batch).loss != model(**batch).loss
        finally:
            model.eval()


def test_a_truncated_row_keeps_whole_images(loaded):
    _, rules = loaded["xc2_7b"]
    turns, images = ROWS[2]
    first, *_ = rules.encode(turns, images)["image_bound"].tolist()
    earlier = [Turn("user", ("Hi",)), Turn("assistant", ("Hello",))]
    whole = rules.encode([*earlier, *turns], images)
    cut = limited(rules, int(whole["image_bound"][1, 0]) + 5).encode([*earlier, *turns], images)
    assert len(cut["image_bound"]) == 1
    assert len(cut["input_ids"]) == whole["image_bound"][1, 0]
    assert first[1] - first[0] == 64


@pytest.mark.parametrize("name", THREE)
def test_prompts_answered_together_are_answered_as_each_alone(loaded, name):
    model, rules = loaded[name]
    prompts = [rules.encode_prompt(turns[:1], images) for turns, images in ROWS]
    options = GREEDY | {"max_new_tokens": 6}
    together = answer(model, rules, prompts, **options)
    assert together == [answer(model, rules, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("name", THREE)
def test_answers_with_a_cache_are_those_of_the_training_forward(loaded, name):
    model, rules = loaded[name]
    turns, images = ROWS[2]
    prompt = rules.encode_prompt(turns[:1], images)
    bounds = torch.nn.functional.pad(prompt["image_bound"], (1, 0))
    where = {"pixel_values": prompt["pixel_values"], "tgt_sizes": prompt["tgt_sizes"], "image_bound": bounds}
    ids = prompt["input_ids"][None]
    found = model.generate(
        ids, torch.ones_like(ids), **where, **GREEDY, max_new_tokens=5, eos_token_id=None, pad_token_id=0
    )
    for token in found[0]:
        with torch.no_grad():
            assert model(ids, **where).logits[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def adapted(name, **lora):
    folder = checkpoint(name)
    model = load_model(folder, dtype=torch.float32)
    return add_adapter(
        model, GENERATIONS[name], LoraArguments(lora_r=4, **lora), vision=False, resampler=True
    )


@pytest.mark.parametrize("name", THREE)
def test_an_adapters_names_open_in_the_released_code(name, tmp_path):
    wrapped = adapted(name)
    trained = {key for key, value in wrapped.named_parameters() if value.requires_grad}
    assert not any("Plora" in key for key in trained)
    wrapped.save_pretrained(tmp_path)
    found = set(load_file(tmp_path / "adapter_model.safetensors"))
    layers = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    expected = {
        f"base_model.model.model.layers.{number}.{layer}.lora_{matrix}.weight"
        for number in (0, 1) for layer in layers for matrix in "AB"
    }  # fmt: skip
    expected |= {
        f"base_model.model.vision_proj.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")
    }
    assert found == expected
    base = load_model(checkpoint(name), dtype=torch.float32)
    again = load_adapter(base, read_adapter_folder(tmp_path), trainable=True)
    assert {key for key, value in again.named_parameters() if value.requires_grad} == trained


def test_all_linear_leaves_the_partial_lora_alone():
    model = load_model(checkpoint("xc2_7b"), dtype=torch.float32)
    pattern = target_modules(model, GENERATIONS["xc2_7b"], LoraArguments(lora_target_modules="all-linear"))
    wrapped = adapted("xc2_7b", lora_target_modules="all-linear")
    names = [key for key, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 2 * 5, pattern
    assert not any("Plora" in key for key in names)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_keep_their_partial_lora_exact(bits):
    name = "xc2_7b"
    exact = load_model(checkpoint(name), dtype=torch.float32)
    model = load_model(checkpoint(name), dtype=torch.float32, quant_bits=bits)
    assert len(quantized_modules(model)) == 2 * 5
    for key, value in exact.named_parameters():
        if ".Plora_" in key or not key.startswith("model.layers."):
            assert torch.equal(model.get_parameter(key), value), key
    rules = load_processing(checkpoint(name))
    wrapped = add_adapter(
        model, GENERATIONS[name], LoraArguments(lora_r=4, q_lora=True), vision=False, resampler=True
    ).train()
    batch = data_collator(samples_of(rules))
    output = wrapped(**{key: value for key, value in batch.items() if key != "provenance"})
    output.loss.backward()
    assert all(value.grad is not None for value in wrapped.parameters() if value.requires_grad)


@pytest.mark.parametrize("name", THREE)
def test_a_saved_model_has_the_released_files_and_is_the_same(loaded, name, tmp_path):
    model, rules = loaded[name]
    model.save_pretrained(tmp_path)
    source = checkpoint(name)
    assert tensor_names(tmp_path) == tensor_names(source)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert {path.name for path in source.iterdir()} <= {path.name for path in tmp_path.iterdir()}
    again = load_model(tmp_path, dtype=torch.float32).eval()
    prompt = [rules.encode_prompt(ROWS[1][0][:1], ROWS[1][1])]
    assert answer(again, rules, prompt, **GREEDY, max_new_tokens=4) == answer(
        model, rules, prompt, **GREEDY, max_new_tokens=4
    )


def changed(name, folder, change):
    """A copy of a small checkpoint whose tensors were changed."""
    shutil.copytree(checkpoint(name), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_without_the_unused_norm_loads_and_is_saved_without_it(tmp_path):
    norm = "vit.vision_tower.vision_model.post_layernorm."
    folder = changed(
        "xc2_7b",
        tmp_path / "base",
        lambda tensors: [tensors.pop(f"{norm}{kind}") for kind in ("weight", "bias")],
    )
    model = load_model(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert tensor_names(tmp_path / "saved") == tensor_names(folder)


def test_a_position_table_of_another_size_is_resampled_to_img_size(tmp_path):
    key = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"

    def larger(tensors):
        tensors[key] = torch.randn(1 + 24 * 24, tensors[key].shape[1])

    folder = changed("xc2_7b", tmp_path / "base", larger)
    model = load_model(folder, dtype=torch.float32)
    assert model.vit.tower.embeddings.position_embedding.weight.shape[0] == 1 + 8 * 8
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    found, expected = (m.vit.tower.embeddings.position_embedding.weight for m in (again, model))
    assert torch.equal(found, expected)


def test_4khd_is_known_by_its_separators_too(tmp_path):
    folder = changed("xc2_4khd_7b", tmp_path / "base", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_length": 4096, "img_size": 490}))
    rules = load_processing(folder)
    assert rules.generation.name == "xc2_4khd_7b"
    assert rules.rules.side == 4  # by the stored table, not by img_size
    assert load_model(folder, dtype=torch.float32).config.tiles


@pytest.mark.parametrize("name", THREE)
def test_the_released_model_type_loads_and_is_kept(tmp_path, name):
    folder = changed(name, tmp_path / "base", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "internlmxcomposer2"}
    if name == "xc2_4khd_7b":  # whose config.json names the LLM's class and no image size
        config |= {"architectures": ["InternLM2ForCausalLM"]}
        del config["img_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_processing(folder).generation.name == name
    model = load_model(folder)
    assert model.config.generation.name == name
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("sizes", "bounds", "message"),
    [
        ([[8, 8]], [[0, 1, 60]], "59 tokens, expected 64"),
        ([[4, 8]], [[0, 1, 33]], "4 x 8 patches, expected 8 x 8"),
        ([[8, 8]], [], "1 images and 0 placeholders"),
    ],
)
def test_a_batch_whose_parts_do_not_fit_is_refused(loaded, sizes, bounds, message):
    model, _ = loaded["xc2_7b"]
    with pytest.raises(ValueError, match=message):
        model(
            torch.zeros(1, 80, dtype=torch.int64),
            pixel_values=torch.zeros(3, 14, 14 * 64, dtype=torch.uint8),
            tgt_sizes=torch.tensor(sizes), image_bound=torch.tensor(bounds).reshape(-1, 3),
        )  # fmt: skip


def test_joined_samples_keep_their_images(loaded):
    _, rules = loaded["xc2_7b"]
    batch = data_collator([samples_of(rules)], packing=True)
    assert len(batch["image_bound"]) == len(batch["tgt_sizes"]) == 3
    read = read_turns(chat("Hi", "Hello"))
    assert len(rules.encode(read, [])["image_bound"]) == 0
