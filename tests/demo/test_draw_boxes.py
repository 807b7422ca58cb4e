"""The demo's boxes: they fit their shapes, lie on tenths, and can be trained on."""

import json

import numpy as np
from PIL import Image

from dataset import SupervisedDataset
from draw_boxes import draw_data_set
from minicpm_tune.data.grounding import read_boxes
from minicpm_tune.data.row_check import check_rows
from support.golden_checkpoints import processing

SIZES = {"train": 12, "eval": 3, "held_out": 3}


def test_boxes_fit_their_shapes_and_lie_on_tenths(tmp_path):
    files = draw_data_set(tmp_path, sizes=SIZES, seed=1)
    assert set(files) == {"boxes_train", "boxes_eval", "held_out"}
    rows = SupervisedDataset(files["boxes_train"], processing("v2_6"))
    check_rows(rows, workers=0)
    for index, row in enumerate(json.loads(files["boxes_train"].read_text())):
        parsed = rows.parse(index)
        pictures = rows.open_media(index, parsed.sources)
        turns = rows.processing.with_boxes_written(parsed.turns, pictures)
        [box] = read_boxes(turns[-1].text)
        assert all(value % 100 == 0 for value in box.values), box
        pixels = np.asarray(Image.open(tmp_path / row["image"]).convert("RGB")).astype(int)
        x1, y1, x2, y2 = row["objects"]["bbox"][0]
        inside = pixels[int((y1 + y2) / 2), int((x1 + x2) / 2)]
        shape = np.abs(pixels - inside).sum(axis=2) == 0
        down, across = shape.any(axis=1).nonzero()[0], shape.any(axis=0).nonzero()[0]
        assert np.abs([across[0] - x1, down[0] - y1, across[-1] + 1 - x2, down[-1] + 1 - y2]).max() < 2


def test_the_same_seed_draws_the_same_rows(tmp_path):
    texts = [
        draw_data_set(tmp_path / name, sizes=SIZES, seed=seed)["boxes_train"].read_text()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert texts[0] == texts[1] != texts[2]
