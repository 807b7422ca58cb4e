"""The calls that users of transformers expect: from_pretrained, save_pretrained, and one load_model for all."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import minicpm_tune
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.loading import load_model, model_class
from support.paths import FINETUNE

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module", params=GENERATIONS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    return make_checkpoint(folder, request.param, size="tiny")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_every_class_loads_a_folder_and_saves_one_that_it_loads_again(checkpoint, tmp_path):
    kind = model_class(GENERATIONS[checkpoint.name])
    model = kind.from_pretrained(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items() if name in own)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())
    assert {path.name for path in checkpoint.iterdir()} <= {path.name for path in tmp_path.iterdir()}
    assert torch.equal(logits(kind.from_pretrained(tmp_path)), logits(model))


def test_load_model_finds_the_class(checkpoint):
    model = minicpm_tune.load_model(checkpoint)
    kind = model_class(GENERATIONS[checkpoint.name])
    assert type(model) is kind
    assert torch.equal(logits(model), logits(kind.from_pretrained(checkpoint)))


def test_by_default_weights_are_held_as_the_configuration_says(tmp_path):
    folder = make_checkpoint(tmp_path, "v2_6", size="tiny")
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float32).dtype == torch.float32


def test_transformers_options_reach_the_llm(tmp_path):
    kind = model_class(GENERATIONS["v2_6"])
    model = kind.from_pretrained(
        make_checkpoint(tmp_path, "v2_6", size="tiny"), attn_implementation="eager", dtype=torch.float16
    )
    assert model.dtype == torch.float16
    assert model.llm.config._attn_implementation == "eager"


def test_the_package_is_imported_without_torch():
    found = subprocess.run(
        [sys.executable, "-c", "import minicpm_tune, sys; print('torch' in sys.modules)"],
        cwd=FINETUNE, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        _ = minicpm_tune.train
