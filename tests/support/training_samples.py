"""Samples of a checkpoint for tests of a training step: a sliced picture, a small one, and text alone."""

import numpy as np
from PIL import Image

from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.row_parsing import parse_row


def draw(processing):
    random = np.random.RandomState(0)
    samples = []
    for number, sizes in enumerate([[(300, 260)], [(60, 80), (112, 112)], []]):
        question = "<image>\n" * len(sizes) + "What is it?"
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "A cat." * (number + 1)},
        ]
        row = parse_row({"image": [f"{index}.png" for index in range(len(sizes))], "conversations": turns})
        images = [
            Image.fromarray(random.randint(0, 255, (height, width, 3), dtype=np.uint8))
            for width, height in sizes
        ]
        sample = processing.encode(row.turns, [Picture.of(image) for image in images])
        samples.append({**sample, "origin": (0, number)})
    return samples
