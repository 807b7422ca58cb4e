"""Sizes, grids and patches of images."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from minicpm_tune.data.samples import load_processing
from minicpm_tune.data.slicing.adaptive import MergedSliceRules, SliceRules, choose_grid
from minicpm_tune.data.slicing.layouts import cut_into_patches, patch_columns
from minicpm_tune.errors import RowError
from support.golden_checkpoints import checkpoint_folder

SIDES = st.integers(1, 4000)


def drawn(width, height, seed=0):
    """An image of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "expected_tgt_sizes"),
    [
        ((200, 150), [(28, 37)]),
        ((1200, 500), [(21, 50)] + [(29, 35)] * 2),
        ((400, 1600), [(64, 16)] + [(32, 32)] * 4),
        ((1344, 1344), [(32, 32)] + [(32, 32)] * 9),
        # ratios beyond 20:1: a strip as long as its area allows; no limit is set on a side
        ((2000, 50), [(5, 200)]),
        ((4000, 100), [(5, 200)] + [(9, 116)] * 3),
        ((1, 10), [(101, 10)]),
        ((1, 1), [(32, 32)]),
    ],
)
def test_layouts_of_known_sizes(size, expected_tgt_sizes):
    assert SliceRules().layout(*size).tgt_sizes == expected_tgt_sizes


@given(SIDES, SIDES, st.integers(1, 12))
def test_a_layout_is_whole_patches_and_within_the_limit(width, height, max_slice_nums):
    layout = SliceRules(max_slice_nums=max_slice_nums).layout(width, height)
    sizes = layout.tgt_sizes
    assert 1 <= len(sizes) <= 1 + max_slice_nums
    assert all(rows >= 1 and columns >= 1 for rows, columns in sizes)
    assert layout.overview.width % 14 == layout.overview.height % 14 == 0
    if layout.grid is None:
        assert len(sizes) == 1
    else:
        assert len(sizes) == 1 + layout.grid.columns * layout.grid.rows
        assert layout.refined.width % (14 * layout.grid.columns) == 0
        assert layout.refined.height % (14 * layout.grid.rows) == 0
    assert patch_columns(layout) == 14 * sum(rows * columns for rows, columns in sizes)


@given(SIDES, SIDES, st.integers(1, 12))
def test_grids_equal_those_of_transformers_own_processor(width, height, max_slice_nums):
    grid = choose_grid(width, height, max_slice_nums=max_slice_nums, scale_resolution=448)
    expected = MiniCPMV4_6ImageProcessorPil().get_sliced_grid((height, width), max_slice_nums, 448)
    assert (None if grid is None else [grid.rows, grid.columns]) == expected


@pytest.mark.parametrize("mode", ["16x", "4x"])
@settings(max_examples=25)
@given(width=st.integers(20, 1200), height=st.integers(20, 1200))
def test_native_patches_equal_transformers_own_processor(mode, width, height):
    image = drawn(width, height)
    rules = MergedSliceRules(downsample_mode=mode)
    layout = rules.layout(width, height)
    out = np.empty((3, 14, patch_columns(layout)), dtype=np.uint8)
    cut_into_patches(image, layout, out)
    expected = MiniCPMV4_6ImageProcessorPil(downsample_mode=mode)(
        image, do_rescale=False, do_normalize=False, return_tensors="np"
    )
    assert [list(size) for size in layout.tgt_sizes] == expected["target_sizes"].tolist()
    assert np.array_equal(out, expected["pixel_values"][0])


@pytest.mark.parametrize("size", [(200, 150), (900, 1300), (2000, 50)])
def test_patches_are_the_resized_image_cut_row_by_row(size):
    image = drawn(*size)
    layout = SliceRules().layout(*size)
    out = np.empty((3, 14, patch_columns(layout)), dtype=np.uint8)
    cut_into_patches(image, layout, out)
    sources = [
        np.asarray(image.resize((layout.overview.width, layout.overview.height), Image.Resampling.BICUBIC))
    ]
    if layout.grid:
        refined = image.resize((layout.refined.width, layout.refined.height), Image.Resampling.BICUBIC)
        height, width = layout.refined.height // layout.grid.rows, layout.refined.width // layout.grid.columns
        sources += [
            np.asarray(refined.crop((x, y, x + width, y + height)))
            for y in range(0, layout.refined.height, height)
            for x in range(0, layout.refined.width, width)
        ]
    start = 0
    for pixels, (rows, columns) in zip(sources, layout.tgt_sizes, strict=True):
        for row in range(rows):
            for column in range(columns):
                expected = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
                assert np.array_equal(out[:, :, start : start + 14], expected)
                start += 14
    assert start == out.shape[2]


@pytest.mark.parametrize("rules", [SliceRules(), MergedSliceRules()])
def test_an_image_without_pixels_is_refused(rules):
    with pytest.raises(RowError, match="0 x 5 pixels, expected at least 1 x 1"):
        rules.layout(0, 5)


def test_a_limit_of_one_never_cuts():
    assert len(SliceRules().limited(1).layout(3000, 2000).tgt_sizes) == 1
    assert len(MergedSliceRules().limited(1).layout(3000, 2000).tgt_sizes) == 1


def test_a_checkpoint_without_its_processor_s_file_has_every_assumption_told(tmp_path, caplog):
    for name, file in (("v2_6", "preprocessor_config.json"), ("v4_6", "processor_config.json")):
        folder = shutil.copytree(checkpoint_folder(name), tmp_path / name)
        (folder / file).unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        known = {
            "max_slice_nums",
            "slice_config",
            "scale_resolution",
            "patch_size",
            "use_image_id",
            "downsample_mode",
        }
        text = json.dumps(
            {key: value for key, value in config.items() if key not in known} | {"patch_size": 14}
        )
        (folder / "config.json").write_text(text)
        caplog.clear()
        load_processing(folder)
        assert f"has no {file}" in caplog.text
        assert "scale_resolution 448 (assumed), patch_size 14 (config.json)" in caplog.text
        assert "use_image_id True (assumed)" in caplog.text


def test_use_image_id_false_in_the_processor_s_file_leaves_the_numbers_out(tmp_path, caplog):
    folder = shutil.copytree(checkpoint_folder("v2_6"), tmp_path / "model")
    settings = {"use_image_id": False, "max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert not load_processing(folder).style.image_ids
    assert "assumed" not in caplog.text
