"""--lora_weight_path: only an adapter of this model, and no flag that asks for another shape than it has."""

import pytest
import torch

from dataset import SupervisedDataset, data_collator
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.samples import load_processing
from minicpm_tune.lora.adapter_folders import (
    LEGACY_FILE,
    AdapterError,
    FingerprintError,
    complete_adapter_folder,
    read_adapter_folder,
)
from minicpm_tune.lora.loading import check_adapter, load_adapter, new_tokens_of_run
from minicpm_tune.settings.argument_groups import OFFICIAL_LORA_TARGETS, LoraArguments
from support import finetune_runs
from support.tiny_checkpoints import checkpoint, edit_json, loaded, saved_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of rank 4, with the resampler and the token embeddings."""
    folder = tmp_path_factory.mktemp("continued") / "adapter"
    saved_adapter(folder, "v2_6", lora_dropout=0.0)
    return folder


def check(folder, *, name="v2_6", base=None, vision=False, **flags):
    lora = LoraArguments(lora_weight_path=str(folder), **flags)
    check_adapter(lora, base or checkpoint(name), GENERATIONS[name], vision=vision, resampler=True)


def test_flags_that_say_what_the_adapter_is_are_taken(adapter):
    check(adapter)
    check(adapter, lora_r=4, lora_target_modules=OFFICIAL_LORA_TARGETS)
    check(adapter, vision=True, lora_modules_to_save=["resampler,embed_tokens"])
    check(adapter, base=checkpoint("v2_6", seed=1), allow_other_base=True)


def test_a_continued_adapter_brings_its_tokens(tmp_path):
    tokens = {"<b>": 471, "<a>": 470}
    folder = tmp_path / "adapter"
    saved_adapter(folder, "v2_6")
    complete_adapter_folder(
        folder, base=checkpoint("v2_6"), generation=GENERATIONS["v2_6"], new_tokens=tokens
    )
    lora = LoraArguments(lora_weight_path=str(folder))
    assert new_tokens_of_run(None, lora) == ("<a>", "<b>")
    file = tmp_path / "tokens.txt"
    file.write_text("<a>\n<b>\n")
    assert new_tokens_of_run(str(file), lora) == ("<a>", "<b>")
    assert new_tokens_of_run(str(file), None) == ("<a>", "<b>")
    assert new_tokens_of_run(None, LoraArguments()) == ()
    file.write_text("<b>\n<a>\n")
    with pytest.raises(AdapterError, match=r"found 2 tokens, expected the 2 that .* in their order"):
        new_tokens_of_run(str(file), lora)


def test_new_tokens_need_embeddings_and_output_layer_to_train():
    def check_new(**flags):
        check_adapter(
            LoraArguments(**flags), checkpoint("v2_6"), GENERATIONS["v2_6"], vision=False, resampler=True,
            adds_tokens=True,
        )  # fmt: skip

    check_new()
    check_new(lora_modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match=r"--lora_modules_to_save embed_tokens: the list lacks lm_head"):
        check_new(lora_modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"--lora_modules_to_save none: the list lacks embed_tokens and"):
        check_new(lora_modules_to_save=["none"])


@pytest.mark.parametrize("name", ["v4_6", "v4_7", "xc2_7b"])
def test_an_adapter_of_any_family_can_be_continued(name, tmp_path):
    saved_adapter(tmp_path / "adapter", name)
    check(tmp_path / "adapter", name=name)


def test_an_adapter_is_continued_in_its_own_downsample_mode(tmp_path):
    saved_adapter(tmp_path / "adapter", "v4_6", complete=False)
    complete_adapter_folder(
        tmp_path / "adapter", base=checkpoint("v4_6"), generation=GENERATIONS["v4_6"], downsample_mode="4x"
    )

    def check_mode(mode):
        lora = LoraArguments(lora_weight_path=str(tmp_path / "adapter"))
        check_adapter(
            lora, checkpoint("v4_6"), GENERATIONS["v4_6"], vision=False, resampler=True, downsample_mode=mode
        )

    check_mode("4x")
    with pytest.raises(
        AdapterError, match=r"trained with --downsample_mode 4x, this run has 16x\. Give --downsample_mode 4x"
    ):
        check_mode("16x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_r": 8}, "--lora_r is 8, but the adapter has 4: leave the flag out"),
        ({"use_dora": True}, "--use_dora is True, but the adapter has False"),
        ({"lora_dropout": 0.5}, "--lora_dropout is 0.5, but the adapter has 0.0"),
        (
            {"lora_target_modules": "all-linear"},
            "--lora_target_modules is all-linear, but the adapter has llm",
        ),
        ({"lora_layers_to_transform": [1]}, r"--lora_layers_to_transform is \[1\], but the adapter has None"),
        ({"lora_layer_replication": "[[0, 2]]"}, "--lora_layer_replication is"),
        (
            {"lora_modules_to_save": ["none"]},
            "it trains embed_tokens, resampler in full, these flags ask for none. Give --lora_modules_to_save "
            "embed_tokens,resampler",
        ),
        ({"vision": True}, "these flags ask for embed_tokens, resampler, vpm"),
        ({"name": "v4"}, "an adapter of generation v2_6, but .* is MiniCPM-V 4.0"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(adapter, flags, message):
    with pytest.raises(AdapterError, match=message):
        check(adapter, **flags)


def test_an_adapter_of_another_base_is_refused(adapter):
    with pytest.raises(AdapterError, match="was not trained on the weights of"):
        check(adapter, base=checkpoint("v2_6", seed=1))


def test_folders_that_are_not_whole_or_of_the_early_scripts_are_refused(tmp_path):
    saved_adapter(tmp_path / "a", "v2_6", lora_modules_to_save=["none"])
    torch.save({}, tmp_path / "a" / LEGACY_FILE)
    with pytest.raises(AdapterError, match=r"Merge it with merge_lora\.py"):
        check(tmp_path / "a", lora_modules_to_save=["none"])
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"found adapter_config\.json but no adapter_model\.safetensors"):
        read_adapter_folder(tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"")
    edit_json(tmp_path / "a/base_model.json", color="red")
    with pytest.raises(FingerprintError, match="expected what a LoRA run writes"):
        read_adapter_folder(tmp_path / "a")


def test_the_continued_adapter_trains_from_where_it_was(adapter):
    wrapped = load_adapter(loaded(checkpoint("v2_6"), "v2_6"), read_adapter_folder(adapter), trainable=True)
    trained = {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert any("lora_B" in name for name in trained)
    assert any("resampler.modules_to_save" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "vision", "flags", "warned"),
    [
        ("v2", True, {}, True),
        ("v2", False, {"lora_modules_to_save": ["vpm"]}, True),
        ("v2", False, {}, False),
        ("v2", True, {"lora_modules_to_save": ["resampler"]}, False),
        ("v2_6", True, {}, False),
    ],
)
def test_an_adapter_with_the_tower_of_v2_is_announced_as_closed_to_the_released_code(
    name, vision, flags, warned, caplog
):
    check_adapter(LoraArguments(**flags), checkpoint(name), GENERATIONS[name], vision=vision, resampler=True)
    said = "released code of MiniCPM-V 2.0 can't load such an adapter"
    assert (said in caplog.text) == warned


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--deepspeed", "ds_config_zero3.json")], ids=["ddp", "zero3"])
def test_a_run_goes_on_from_the_adapter(adapter, tmp_path, more):
    """Its first loss is that of the base with the adapter, as the model alone computes it."""
    data = finetune_runs.write_data(tmp_path / "data", rows=4, text_only=())
    flags = (
        "--use_lora",
        "true",
        "--tune_llm",
        "false",
        "--tune_vision",
        "false",
        "--lora_weight_path",
        adapter,
    )
    [found] = finetune_runs.train(
        tmp_path, *flags, *more, model=checkpoint("v2_6"), data=data, steps=1, batch=2, processes=2
    )
    model = load_adapter(loaded(checkpoint("v2_6"), "v2_6"), read_adapter_folder(adapter), trainable=False)
    rows = SupervisedDataset(str(data), load_processing(checkpoint("v2_6")))
    batch = data_collator([rows[index] for index in range(4)])
    del batch["provenance"]
    with torch.no_grad():
        expected = model.train()(**batch).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
