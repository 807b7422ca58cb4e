"""Kept vision features: the losses without them, in every generation, and never those of something else."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset import SupervisedDataset
from make_checkpoint import make_checkpoint
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.vision_cache import FeatureWriter, VisionCacheError, check_tower_is_frozen, open_cache
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.parameter_parts import freeze
from minicpm_tune.settings.argument_groups import LoraArguments
from minicpm_tune.settings.arguments import parse_arguments
from minicpm_tune.settings.checks import UsageError
from support import finetune_runs

LOSS_TOLERANCE = (
    1e-6  # 0 measured; on other machines slices multiplied together with others may round otherwise
)
GRADIENT_TOLERANCE = 1e-5  # 0
SIZES = ((100, 90), (600, 300), (90, 120), (64, 64), (500, 500))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five pictures; rows with one, two, none, and one that was seen before."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for number, (width, height) in enumerate(SIZES):
        small = random.randint(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "0 again.png")
    rows = []
    for images in (["0.png"], ["4.png", "2.png"], [], ["3.png"], ["0 again.png", "1.png"]):
        question = "<image>" * len(images) + "What is it?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat on a mat."}]
        rows.append({"image": images, "conversations": turns} if images else {"conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


class Run:
    """A model with a frozen tower, its data, and a count of the patches that went through the tower."""

    def __init__(self, folder, name, data, *, resampler=True, checkpoint=None):
        self.row, self.folder = GENERATIONS[name], folder
        self.checkpoint = checkpoint or make_checkpoint(folder / "model", name, size="tiny")
        self.model = load_model(self.checkpoint, dtype=torch.float32).train()
        for module in self.model.modules():
            if hasattr(module, "partial_dropout"):
                module.partial_dropout = 0.0  # losses are compared
        freeze(self.model, self.row, vision=False, resampler=resampler, llm=True)
        self.rows = SupervisedDataset(data, load_processing(self.checkpoint))
        self.writer = None
        tower = self.model.get_submodule(self.row.modules["vision"][0])
        # The forward of 4.6's tower is this project's own; its first module sees the same pixels.
        self.tower = tower.embeddings if self.row.family == "minicpmv46" else tower
        self.patches = 0
        self.tower.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        pixels = args[0]
        self.patches += pixels.shape[0] if self.row.family != "minicpmv46" else pixels.shape[-1] // 14

    def keep(self, folder="kept"):
        cache = open_cache(
            self.folder / folder,
            self.checkpoint,
            self.row,
            precision="fp32",
            downsample_mode=self.rows.processing.media.downsample_mode,
        )
        self.rows.processing = replace(self.rows.processing, vision_cache=cache)
        self.writer = FeatureWriter(cache)
        return cache

    def step(self, indices=range(5), *, packing=False):
        """Loss, gradients, and patches that went through the tower."""
        self.patches = 0
        samples = [self.rows[index] for index in indices]
        rows = [samples] if packing else samples
        batch = data_collator(rows, packing=packing)
        del batch["provenance"]
        self.model.zero_grad()
        output = self.model(**batch)
        output.loss.backward()
        if self.writer is not None:
            self.writer.keep(output.new_features)
            self.writer.close()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return output.loss.item(), gradients, self.patches


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        if name.endswith("k_proj.bias"):
            continue  # zero but for rounding
        scale = expected[1][name].abs().max().clamp(min=1e-3)
        assert (gradient - expected[1][name]).abs().max() / scale < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("name", [name for name in GENERATIONS if name != "v4_6_thinking"])
def test_losses_and_gradients_are_those_without_the_cache_in_the_first_and_the_second_epoch(
    tmp_path, data, name
):
    run = Run(tmp_path, name, data)
    expected, packed = run.step(), run.step(packing=True)
    assert expected[2] > 0
    cache = run.keep()
    first = run.step()
    assert_same(first, expected)
    assert first[2] == expected[2]
    second = run.step()
    assert_same(second, expected)
    assert second[2] == 0
    assert_same(run.step(packing=True), packed)
    # A picture that was seen before beside new ones, in one batch.
    shutil.rmtree(cache.folder)
    run.step([0, 3])
    mixed = run.step()
    assert_same(mixed, expected)
    assert 0 < mixed[2] < expected[2]
    text = run.step([2])
    assert set(text[1]) == set(expected[1])


def test_nothing_of_audio_is_kept(tmp_path, data):
    """The audio encoder runs in every step, and the losses are those without the cache."""
    turns = [{"role": "user", "content": "<image><audio>What?"}, {"role": "assistant", "content": "A cat."}]
    wave = {"array": (0.1 * np.sin(np.arange(16_000) / 9)).tolist(), "sampling_rate": 16_000}
    rows = data.with_name("heard.json")
    rows.write_text(json.dumps([{"images": ["0.png"], "audios": [wave], "messages": turns}]))
    run = Run(tmp_path, "o4_5", rows)
    heard = []
    run.model.apm.register_forward_pre_hook(lambda module, args: heard.append(args[0].shape))
    expected = run.step([0])
    run.keep()
    run.step([0])
    again = run.step([0])
    assert_same(again, expected)
    assert again[2] == 0
    assert heard == [(80, 100)] * 3


@pytest.mark.parametrize(("name", "patches"), [("v2", 1409), ("v2_6", 1409), ("v4_6", 348)])
def test_a_picture_is_kept_by_its_content_not_by_its_name(tmp_path, data, name, patches):
    run = Run(tmp_path, name, data)
    cache = run.keep()
    run.step()
    kept = [load_file(path)["features"] for path in cache.folder.rglob("*.safetensors")]
    assert len(kept) == len(SIZES)
    assert {(features.dtype, features.shape[1]) for features in kept} == {(torch.float32, 64)}
    assert sum(map(len, kept)) == patches


def test_a_slice_of_2_5_is_kept_together_with_what_it_was_filled_up_to(tmp_path, data):
    run = Run(tmp_path, "v2_5", data)
    cache = run.keep()
    run.step()
    # "0 again.png" stands beside a longer slice than its own, so its features differ from those of "0.png".
    assert len(list(cache.folder.rglob("*.safetensors"))) == len(SIZES) + 1


def test_other_pixels_slices_weights_or_precision_are_other_entries(tmp_path, data):
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    run = Run(tmp_path, "v2_6", folder / "rows.json")
    cache = run.keep()
    run.step()
    assert run.step([0])[2] == 0
    Image.new("RGB", SIZES[0], "red").save(folder / "0.png")
    assert run.step([0])[2] > 0
    assert run.step([1])[2] == 0
    limited = run.rows.processing.with_media(slicing=run.rows.processing.rules.limited(1))
    run.rows.processing = limited
    assert run.step([1])[2] > 0
    assert open_cache(tmp_path / "kept", run.checkpoint, run.row, precision="bf16").folder != cache.folder
    assert open_cache(tmp_path / "kept", run.checkpoint, run.row, precision="fp32").folder == cache.folder
    weights = load_file(run.checkpoint / "model.safetensors")
    weights["vpm.post_layernorm.bias"][0] += 1e-3
    save_file(weights, run.checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert open_cache(tmp_path / "kept", run.checkpoint, run.row, precision="fp32").folder != cache.folder


def test_an_entry_that_was_cut_short_is_computed_again(tmp_path, data):
    run = Run(tmp_path, "v2_6", data)
    expected = run.step()
    cache = run.keep()
    run.step()
    paths = sorted(cache.folder.rglob("*.safetensors"))
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    paths[1].write_bytes(b"")
    again = run.step()
    assert_same(again, expected)
    assert again[2] > 0
    assert run.step()[2] == 0


def test_under_zero_3_the_tower_is_run_even_when_all_features_are_known(tmp_path, data):
    run = Run(tmp_path, "v2_6", data)
    native = Run(tmp_path / "native", "v4_7", data)
    for each in (run, native):
        expected = each.step()
        each.keep()
        each.step()
        next(each.tower.parameters()).ds_id = 0  # what DeepSpeed marks partitioned weights with
        found = each.step()
        assert_same(found, expected)
        assert 0 < found[2] < expected[2] / 10


def test_a_full_disk_ends_the_keeping_not_the_training(tmp_path, data, monkeypatch, caplog):
    run = Run(tmp_path, "v2_6", data)
    cache = run.keep()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(cache), "write", full)
    run.step()
    run.step()
    assert len([line for line in caplog.messages if "No space left" in line]) == 1


def test_a_tower_that_trains_is_refused(tmp_path, data):
    run = Run(tmp_path, "v2_6", data)
    check_tower_is_frozen(run.model, run.row)
    freeze(run.model, run.row, vision=True, resampler=True, llm=False)
    with pytest.raises(VisionCacheError, match="vision tower has trained weights"):
        check_tower_is_frozen(run.model, run.row)


@pytest.mark.parametrize("name", ["v2_6", "v4_6"])
def test_an_adapter_on_the_tower_is_refused(tmp_path, data, name):
    run = Run(tmp_path, name, data)
    both = LoraArguments(
        lora_target_modules=r"(vpm|model\.vision_tower)\..*q_proj|.*layers\.\d+\.self_attn\.k_proj"
    )
    model = add_adapter(run.model, run.row, both, vision=False, resampler=False)
    with pytest.raises(VisionCacheError, match="has an adapter"):
        check_tower_is_frozen(model, run.row)


def test_a_plain_adapter_is_not_refused(tmp_path, data):
    run = Run(tmp_path, "v2_6", data)
    check_tower_is_frozen(
        add_adapter(run.model, run.row, LoraArguments(), vision=False, resampler=True), run.row
    )


def test_the_command_line_says_what_contradicts_the_cache(tmp_path, data):
    flags = [
        "--model_name_or_path",
        str(make_checkpoint(tmp_path / "m", "v2_6", size="tiny")),
        "--data_path",
        str(data),
    ]
    flags += ["--output_dir", str(tmp_path / "out"), "--cache_vision_features", str(tmp_path / "kept")]
    with pytest.raises(UsageError, match="features of a tower that trains"):
        parse_arguments(flags)
    with pytest.raises(UsageError, match="bf16_full_eval"):
        parse_arguments([*flags, "--tune_vision", "false", "--bf16_full_eval", "true"])


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, data):
    run = Run(tmp_path, "v2_6", data)
    (tmp_path / "file").write_text("")
    with pytest.raises(VisionCacheError, match="can't be written to"):
        run.keep("file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("v2_6", ()),
        ("v2_6", ("--deepspeed", "ds_config_zero3.json")),
        ("v4_6", ("--deepspeed", "ds_config_zero3.json")),
    ],
    ids=["ddp", "zero3", "zero3-v4_6"],
)
def test_two_processes_of_which_one_finds_its_features_give_the_run_without(tmp_path, name, stage):
    model = make_checkpoint(tmp_path / "model", name, size="tiny")
    data = finetune_runs.write_data(tmp_path / "data", rows=8)
    common = {"model": model, "data": data, "batch": 1, "accumulation": 2, "steps": 3, "processes": 2}
    frozen = ("--tune_vision", "false", *stage)
    expected = finetune_runs.train(tmp_path, *frozen, **common)
    few = json.loads(data.read_text())[:2]
    first = data.with_name("first.json")
    first.write_text(json.dumps(few))
    kept = (*frozen, "--cache_vision_features", tmp_path / "kept")
    # Some pictures are there before: in a step one process finds its own, the other does not.
    finetune_runs.train(tmp_path, *kept, **{**common, "data": first, "steps": 1, "processes": 1})
    entries = len(list((tmp_path / "kept").rglob("*.safetensors")))
    assert 0 < entries < 7
    found = finetune_runs.train(tmp_path, *kept, **common)
    for line, wanted in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=2e-5)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert entries < len(list((tmp_path / "kept").rglob("*.safetensors"))) <= 7
