"""What is read from a model folder's weight files, and what an export writes and carries along."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpm_tune.checkpoints.weight_files import (
    WeightFileError,
    copy_model_files,
    has_weights,
    stored_tensors,
    weight_files,
)
from minicpm_tune.files import UnreadableFileError
from support.tiny_checkpoints import checkpoint, loaded

RUN_FILES = (
    "run.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "bad_rows.jsonl",
    "checkpoint.json", "base_model.json", "adapter_config.json", "training_args.bin", "predictions.jsonl",
    "report.html",
)  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "old bin"])
def test_a_tensor_is_read_whole_or_by_its_first_row(suffix, tmp_path):
    tensors = {
        "scale": torch.tensor(3.0),
        "norm": torch.arange(4.0),
        "linear": torch.arange(6).view(2, 3).bfloat16(),
    }
    if suffix.endswith("bin"):
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=suffix == "bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    found = {
        tensor.name: (tensor.shape, tensor.read(), tensor.read_first_row())
        for tensor in stored_tensors(tmp_path)
    }
    assert found.keys() == tensors.keys()
    for name, (shape, values, first) in found.items():
        assert shape == tuple(tensors[name].shape)
        assert torch.equal(values, tensors[name])
        assert torch.equal(first, tensors[name][0] if name == "linear" else tensors[name])


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\other.bin", ".."]
)
def test_an_index_names_files_of_its_own_folder_alone(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (weight_files, has_weights):
        with pytest.raises(
            WeightFileError, match=r"index\.json: found the shard name .*, expected a file name without"
        ):
            read(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightFileError, match=r"index\.json: not the index of a model's weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_weight_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x10" * 100)
    with pytest.raises(UnreadableFileError, match=f"{tmp_path.name}: a file there is damaged"):
        list(stored_tensors(tmp_path))


def test_an_export_carries_files_of_the_model_and_not_of_the_run_that_wrote_it(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    loaded(checkpoint("v2_6"), "v2_6").save_pretrained(source)
    (source / "README.md").write_text("MiniCPM-V 2.6")
    expected = {path.name for path in source.iterdir()} - {"model.safetensors"}
    copy_model_files(source, target)
    assert {path.name for path in target.iterdir()} == expected
    assert {"tokenizer.json", "README.md", "modeling_minicpmv.py", "preprocessor_config.json"} <= expected
    for name in RUN_FILES:
        (source / name).write_text("{}")
    for path in target.iterdir():
        path.unlink()
    copy_model_files(source, target)
    assert {path.name for path in target.iterdir()} == expected - {"README.md"}


@pytest.mark.parametrize("name", ["v4_6", "v4_7"])
def test_a_tied_output_layer_is_not_saved_even_when_its_tie_is_hidden(name, tmp_path):
    """DeepSpeed hands out a state dict of copies."""
    model = loaded(checkpoint(name), name)
    copies = {key: value.clone() for key, value in model.state_dict().items()}
    assert "lm_head.weight" in copies
    model.save_pretrained(tmp_path, state_dict=copies)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == load_file(checkpoint(name) / "model.safetensors").keys()
    assert "lm_head.weight" not in saved


def test_an_output_layer_that_is_no_longer_tied_is_saved(tmp_path):
    model = loaded(checkpoint("v4_6"), "v4_6")
    other = {key: value.clone() for key, value in model.state_dict().items()}
    other["lm_head.weight"] += 1
    model.save_pretrained(tmp_path, state_dict=other)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], other["lm_head.weight"])
