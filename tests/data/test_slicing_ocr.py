"""MiniCPM-OCR: 4x by default, and what its processor's settings say of small images."""

import json
import shutil

import pytest

from minicpm_tune.checkpoints.released_format import set_downsample_mode
from minicpm_tune.data.samples import load_processing
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments
from support.golden_checkpoints import checkpoint_folder


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(checkpoint_folder("ocr_1"), tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text())
    part = content.get("image_processor", content)
    part |= changes
    path.write_text(json.dumps(content))


def test_it_is_read_at_4x_unless_told_otherwise(folder):
    assert load_processing(folder).media.downsample_mode == "4x"
    wish = DataArguments.of_checkpoint(downsample_mode="16x")
    assert load_processing(folder, wish).media.downsample_mode == "16x"
    (folder / "processor_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["downsample_mode"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_processing(folder).media.downsample_mode == "4x"


def test_small_images_are_enlarged_unless_the_processor_says_never(folder):
    def sizes():
        rules = load_processing(folder).rules
        return rules.layout(100, 60).tgt_sizes, rules.limited(1).layout(100, 60).tgt_sizes

    assert sizes() == ([(24, 42)], [(24, 42)])
    edit(folder / "processor_config.json", small_image_upsize="never")
    assert sizes() == ([(4, 8)], [(4, 8)])
    edit(folder / "processor_config.json", small_image_upsize="adaptive")
    with pytest.raises(DataError, match="small_image_upsize 'adaptive', expected always or never"):
        load_processing(folder)


def test_settings_in_files_of_their_own_are_read_and_follow_the_mode(folder):
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text('{"processor_class": "MiniCPMOcrProcessor"}')
    image, video = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    image.write_text(json.dumps(settings["image_processor"] | {"max_slice_nums": 4}))
    video.write_text(json.dumps(settings["video_processor"] | {"max_num_frames": 7}))
    media = load_processing(folder).media
    assert (media.slicing.max_slice_nums, media.video.max_num_frames) == (4, 7)
    set_downsample_mode(folder, "16x")
    assert [json.loads(path.read_text())["downsample_mode"] for path in (image, video)] == ["16x", "16x"]
    assert load_processing(folder).media.downsample_mode == "16x"


@pytest.mark.parametrize("name", ["v2_6", "v4_6"])
def test_audio_prompt_is_refused_by_models_that_take_no_audio(name):
    with pytest.raises(DataError, match=r"--audio_prompt: MiniCPM-V .* takes no audio, expected MiniCPM-o"):
        load_processing(checkpoint_folder(name), DataArguments.of_checkpoint(audio_prompt="plain"))
