"""4.6 and 4.7 in use: generation, saving and loading, adapters."""

import pytest
import torch
import transformers

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora.adapter_folders import AdapterError
from minicpm_tune.lora.build import add_adapter, modules_to_save, target_modules
from minicpm_tune.settings.argument_groups import LoraArguments
from support.minicpmv46_cases import (
    NATIVE,
    PAD_IMAGE,
    SLICED,
    batch_of,
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
)

LOSS_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(params=NATIVE)
def name(request):
    return request.param


def prompts(samples):
    """Prompts of different lengths, padded on the left."""
    ids = [sample["input_ids"] for sample in samples]
    width = max(map(len, ids))
    return {
        "input_ids": torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in ids]),
        "attention_mask": torch.stack([torch.arange(width) >= width - len(row) for row in ids]).long(),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples], dim=-1),
        "tgt_sizes": torch.cat([sample["tgt_sizes"] for sample in samples]),
    }


NEW_TOKENS = 5
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_generation_with_and_without_cache_equals_transformers(name):
    model, reference = our_model(name).eval(), transformers_model(name).eval()
    sample = made_sample(1, images=[SLICED])
    inputs = released_inputs(name, sample, normalized(sample))
    expected = reference.generate(
        **{key: inputs[key] for key in inputs if key not in ("labels", "use_cache")}, **GREEDY
    )
    ours = {"input_ids": sample["input_ids"][None], "pixel_values": sample["pixel_values"]}
    ours["tgt_sizes"] = sample["tgt_sizes"]
    assert model.generate(**ours, **GREEDY).tolist() == expected[:, -NEW_TOKENS:].tolist()
    assert model.generate(**ours, use_cache=False, **GREEDY).tolist() == expected[:, -NEW_TOKENS:].tolist()


def test_a_batch_of_prompts_generates_what_each_does_alone(name):
    model = our_model(name).eval()
    samples = [made_sample(1, images=[SLICED]), made_sample(2, images=()), made_sample(3)]
    together = model.generate(**prompts(samples), **GREEDY)
    alone = [model.generate(**prompts([sample]), **GREEDY)[0] for sample in samples]
    assert together.tolist() == [row.tolist() for row in alone]


def test_beams_and_prompts_of_unlike_images_generate_what_transformers_does(name):
    model, reference = our_model(name).eval(), transformers_model(name).eval()
    sample = made_sample(1, images=[SLICED, (4, 4)])
    inputs = released_inputs(name, sample, normalized(sample))
    beams = GREEDY | {"num_beams": 3}
    expected = reference.generate(
        **{key: inputs[key] for key in inputs if key not in ("labels", "use_cache")}, **beams
    )
    assert model.generate(**prompts([sample]), **beams).tolist() == expected[:, -NEW_TOKENS:].tolist()
    samples = [made_sample(2, images=()), sample, made_sample(3)]
    together = model.generate(**prompts(samples), **beams)
    assert together[1].tolist() == expected[0, -NEW_TOKENS:].tolist()


def with_frames(model, sample):
    """The sample with its last image as the frame of a video."""
    ids = sample["input_ids"].clone()
    ids[(ids == PAD_IMAGE).nonzero()[-1]] = model.config.video_token_id
    return sample | {"input_ids": ids}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_videos_generate_what_transformers_does(name, options):
    model, reference = our_model(name).eval(), transformers_model(name).eval()
    sample = with_frames(model, made_sample(1, images=[SLICED, (4, 4)]))
    pixels, sizes, ids = normalized(sample), sample["tgt_sizes"], sample["input_ids"]
    image = int(sizes[:-1].prod(1).sum()) * 14
    inputs = {"input_ids": ids[None], "pixel_values": pixels[..., :image], "target_sizes": sizes[:-1]}
    inputs |= {"pixel_values_videos": pixels[..., image:], "target_sizes_videos": sizes[-1:]}
    if name == "v4_7":
        video = model.config.video_token_id
        inputs["mm_token_type_ids"] = ((ids == PAD_IMAGE).int() + 2 * (ids == video).int())[None]
    expected = reference.generate(**inputs, **GREEDY | options)
    assert (
        model.generate(**prompts([sample]), **GREEDY | options).tolist() == expected[:, -NEW_TOKENS:].tolist()
    )


def test_a_batch_without_images_can_run_the_vision_tower_for_the_others(name):
    model = our_model(name).eval()
    seen = []
    model.model.merger.register_forward_hook(lambda *_: seen.append(1))
    batch = prompts([made_sample(2, images=())])
    expected = model.generate(**batch, **GREEDY)
    assert not seen
    assert model.generate(**batch, dummy=True, **GREEDY).tolist() == expected.tolist()
    assert seen


def test_a_greedy_step_is_the_training_forward_s_best_token(name):
    model, sample = our_model(name).eval(), made_sample(1, images=[SLICED])
    batch = batch_of([[sample]])
    with torch.no_grad():
        expected = model(**without_labels(batch)).logits[0, -1].argmax()
    assert model.generate(**prompts([sample]), **GREEDY)[0, 0] == expected


def test_a_prompt_padded_on_the_right_is_refused(name):
    batch = batch_of([[made_sample(1)], [made_sample(2, images=())]], packed=False)
    with pytest.raises(ValueError, match=r"padded on the right, expected padding on the left"):
        our_model(name).generate(batch["input_ids"], attention_mask=batch["attention_mask"])


def test_what_is_saved_is_what_transformers_saves_and_loads(name, tmp_path):
    model, reference = our_model(name).eval(), transformers_model(name).eval()
    model.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "theirs")
    theirs = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "ours")
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    batch = without_labels(batch_of([[made_sample(1, images=[SLICED])]]))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=0, rtol=0)


def test_the_official_lora_pattern_finds_the_full_attention_layers(name):
    model = our_model(name)
    targets = target_modules(model, GENERATIONS[name], LoraArguments())
    wrapped = peft_model(model, target_modules=targets)
    assert adapted(wrapped) == {f"layers.3.self_attn.{kind}_proj" for kind in "qkvo"}


def test_all_linear_means_the_language_model_s_linear_layers(name):
    model = our_model(name)
    targets = target_modules(model, GENERATIONS[name], LoraArguments(lora_target_modules="all-linear"))
    expected = {f"layers.{layer}.mlp.{kind}_proj" for layer in range(4) for kind in ("gate", "up", "down")}
    expected |= {f"layers.3.self_attn.{kind}_proj" for kind in "qkvo"}
    kinds = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    expected |= {f"layers.{layer}.linear_attn.{kind}" for layer in range(3) for kind in kinds}
    assert adapted(peft_model(model, target_modules=targets)) == expected


def wrapped_by(name, **options):
    lora = LoraArguments(lora_r=2, lora_modules_to_save=["none"], **options)
    return add_adapter(our_model(name), GENERATIONS[name], lora, vision=False, resampler=True)


def test_layers_and_the_vision_tower_can_be_chosen(name):
    chosen = adapted(wrapped_by(name, lora_target_modules="all-linear", lora_layers_to_transform=[1, 3]))
    assert {key.split(".")[1] for key in chosen} == {"1", "3"}
    assert len(chosen) == 3 + 5 + 3 + 4
    wrapped = wrapped_by(name, lora_target_modules=r"vpm\..*q_proj")
    names = [key for key, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert names
    assert all(key.startswith("base_model.model.model.vision_tower.") for key in names)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}]
)
def test_other_adapters_leave_the_start_as_it_was_and_train(name, options):
    batch = batch_of(packed_rows(packing_samples()))
    expected = our_model(name)(**batch).loss
    wrapped = wrapped_by(name, lora_dropout=0.0, **options)
    output, found = loss_and_gradients(wrapped, batch)
    torch.testing.assert_close(output.loss, expected, atol=LOSS_TOLERANCE, rtol=0)
    assert set(found) == {key for key, value in wrapped.named_parameters() if value.requires_grad}


def test_biases_train_when_asked(name):
    wrapped = wrapped_by(name, lora_bias="all")
    assert all(value.requires_grad for key, value in wrapped.named_parameters() if key.endswith(".bias"))


def test_a_taller_model_is_refused(name):
    with pytest.raises(AdapterError, match="can't be replicated"):
        wrapped_by(name, lora_layer_replication="[[0, 4], [2, 4]]")


def peft_model(model, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def adapted(wrapped):
    prefix = "base_model.model.model.language_model."
    names = [key for key, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert all(key.startswith(prefix) for key in names)
    return {key.removeprefix(prefix) for key in names}


def test_an_adapter_beside_whole_modules_trains_packed_rows(name):
    model = our_model(name)
    expected = model(**batch_of(packed_rows(packing_samples()))).loss
    parts = modules_to_save(GENERATIONS[name], LoraArguments(), vision=True, resampler=True)
    assert parts == ["language_model.embed_tokens", "model.merger", "model.vision_tower"]
    wrapped = peft_model(model, target_modules=r".*in_proj_[abz]|.*self_attn\.q_proj", modules_to_save=parts)
    output, found = loss_and_gradients(wrapped, batch_of(packed_rows(packing_samples())))
    torch.testing.assert_close(output.loss, expected, atol=LOSS_TOLERANCE, rtol=0)
    assert set(found) == {key for key, value in wrapped.named_parameters() if value.requires_grad}
    tokens = wrapped.generate(**prompts([made_sample(1)]), **GREEDY)
    assert tokens.shape == (1, NEW_TOKENS)
