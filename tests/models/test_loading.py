"""Checkpoints in the released layouts: loaded, refused with a reason, and exported as they came."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_folder import resolve_model_folder
from minicpm_tune.checkpoints.weight_files import WeightFileError, copy_model_files, weight_files
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from support.golden_models import SIX, full_batch, golden_model
from support.paths import GOLDENS


@pytest.fixture
def checkpoint(tmp_path):
    model, _ = golden_model("v2_6", attention="sdpa")
    model.config.name_or_path = str(GOLDENS / "v2_6" / "tokenizer")
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("generation", SIX)
def test_saved_and_loaded_again_a_model_gives_identical_logits(tmp_path, generation):
    model, about = golden_model(generation, attention="sdpa")
    model.save_pretrained(tmp_path, max_shard_size="600KB")
    assert len(weight_files(tmp_path)) > 1
    again = load_model(tmp_path, dtype=torch.float32)
    batch, _ = full_batch(generation, "single", about)
    del batch["labels"]
    assert torch.equal(model(**batch).logits, again.train()(**batch).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads((GOLDENS / generation / "config.json").read_text())


def test_torch_files_load_single_and_sharded(checkpoint):
    wanted = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(wanted, checkpoint / "pytorch_model.bin")
    found = load_model(checkpoint, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    (checkpoint / "pytorch_model.bin").unlink()
    keys = sorted(wanted)
    shards = {"pytorch_model-00001-of-00002.bin": keys[:40], "pytorch_model-00002-of-00002.bin": keys[40:]}
    for name, part in shards.items():
        torch.save({key: wanted[key] for key in part}, checkpoint / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in shards.items() for key in part}}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = load_model(checkpoint, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_weights_are_cast_while_loading(checkpoint):
    model = load_model(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tables_that_are_in_no_file_come_back_filled(tmp_path):
    model, _ = golden_model("v2", attention="sdpa")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights.pop("resampler.pos_embed")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(again.resampler.pos_embed, table)
    assert torch.equal(again.llm.model.rotary_emb.inv_freq, model.llm.model.rotary_emb.inv_freq)


def test_an_lfs_pointer_is_refused(checkpoint):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16000000000\n"
    (checkpoint / "model.safetensors").write_text(pointer)
    with pytest.raises(WeightFileError, match=r"a Git LFS pointer of 74 bytes.*git lfs pull"):
        load_model(checkpoint, dtype=torch.float32)


def test_missing_weights_are_refused(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["resampler.proj"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WeightFileError, match=r"lack 1 of the model's parameters, the first is resampler\.proj"
    ):
        load_model(checkpoint, dtype=torch.float32)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(WeightFileError, match="found no weights"):
        load_model(checkpoint, dtype=torch.float32)


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightFileError, match=r"2 of 2 shards are missing \(the first is model-00001"):
        weight_files(checkpoint)


def test_an_export_carries_the_files_and_the_tensors_it_does_not_use(tmp_path):
    make_checkpoint(tmp_path / "source", "o2_6", size="tiny")
    source = load_file(tmp_path / "source" / "model.safetensors")
    unused = {key: value for key, value in source.items() if key.startswith("tts.")}
    assert unused
    model = load_model(tmp_path / "source", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "export")
    export = load_file(tmp_path / "export" / "model.safetensors")
    assert export.keys() == source.keys()
    for key, value in unused.items():
        assert export[key].dtype == value.dtype
        assert torch.equal(export[key], value)
    names = {path.name for path in (tmp_path / "source").iterdir()}
    assert names <= {path.name for path in (tmp_path / "export").iterdir()}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_carrying_files_overwrites_nothing(tmp_path):
    for name, text in {"source": "old", "target": "new"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "source" / "modeling_minicpmv.py").write_text("code")
    (tmp_path / "source" / "notes.bin").write_text("weights")
    copy_model_files(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [
        "config.json",
        "modeling_minicpmv.py",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "no such folder"), ("./here", "no such folder"), ("just-a-name", "no such folder")],
)
def test_a_model_that_is_nowhere_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_model_folder(name)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_model_folder(str(tmp_path))


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="can't be downloaded from the hub"):
        resolve_model_folder("nobody/nothing", cache_dir=str(tmp_path))


def test_modelscope_is_asked_where_the_variable_says_so(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def download(model, *, cache_dir, allow_patterns):
        asked.append((model, cache_dir, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match="the package modelscope is not installed"):
        resolve_model_folder("OpenBMB/MiniCPM-V-2_6")
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=download))
    assert resolve_model_folder("OpenBMB/MiniCPM-V-2_6", cache_dir="kept") == tmp_path
    assert asked == [("OpenBMB/MiniCPM-V-2_6", "kept", False), ("OpenBMB/MiniCPM-V-2_6", "kept", True)]


def test_the_configuration_keeps_unknown_keys(tmp_path):
    released = json.loads((GOLDENS / "v2_6" / "config.json").read_text()) | {"a_later_key": {"x": 1}}
    config = MiniCPMVConfig(released)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == released
