"""``use_image_id`` of a checkpoint's processor: training, chat and prediction write images alike."""

import shutil

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.answering import generate
from minicpm_tune.answering.chat import chat
from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.data.samples import load_processing
from support.rows import write_rows
from support.tiny_checkpoints import checkpoint, edit_json, loaded


@pytest.mark.parametrize("generation", ["v2_6", "v4_5"])
@pytest.mark.parametrize("numbered", [True, False])
def test_images_are_numbered_as_the_processor_says(generation, numbered, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(generation), folder)
    edit_json(folder / "preprocessor_config.json", use_image_id=numbered)
    picture = Image.new("RGB", (600, 500))
    picture.save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
    processing = load_processing(folder)
    rows = SupervisedDataset(write_rows(tmp_path, [{"image": "a.png", "conversations": turns}]), processing)

    asked = []
    monkeypatch.setattr(
        generate, "answer", lambda model, rules, prompts, **options: asked.extend(prompts) or [""]
    )
    chat(
        loaded(folder, generation), picture, [{"role": "user", "content": "What?"}], processor=processing,
        sampling=False,
    )  # fmt: skip
    samples = {"training": rows[0], "prediction": PredictionRows(rows)[0].prompt, "chat": asked[0]}
    number = processing.tokenizer.convert_tokens_to_ids("<image_id>")
    assert {name: number in sample["input_ids"] for name, sample in samples.items()} == dict.fromkeys(
        samples, numbered
    )
    assert all(len(sample["image_bound"]) == len(sample["tgt_sizes"]) > 1 for sample in samples.values())
