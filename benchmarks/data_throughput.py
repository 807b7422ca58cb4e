"""How long a sample takes: ours against Pillow's own decode and the same resizes.

    python benchmarks/data_throughput.py [--images 24] [--repeats 7] [--workers 2]

Draws JPEG photos of 1344 x 1008 pixels, then times, per image, (1) Pillow alone: decode, and the two resizes
that slicing needs; (2) decoding and slicing here; (3) a whole sample of SupervisedDataset, text included;
(4) a DataLoader with workers. Also the bytes per pixel value that go from the workers to the trainer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo"):
    sys.path.insert(0, str(ROOT / folder))

from dataset import SupervisedDataset, data_collator
from minicpm_tune.data.media.images import ImageOptions, open_image
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.data.slicing.layouts import cut_into_patches, patch_columns

SIZE = (1344, 1008)


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Smooth noise compresses about as a photo does."""
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (126, 168, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def with_pillow(path: Path, prepared: Processing) -> None:
    """Decode, and resize to the overview and to what the slices are cut from."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    layout = prepared.rules.layout(*image.size)
    for size in (layout.overview, layout.refined):
        if size is not None:
            image.resize((size.width, size.height), Image.Resampling.BICUBIC)


def with_ours(path: Path, prepared: Processing) -> None:
    """Decode and slice, as a sample does."""
    picture = open_image(str(path), ImageOptions(folder=path.parent))
    layout = prepared.rules.layout(*picture.sizes[0])
    for image in picture.frames():
        cut_into_patches(image, layout, np.empty((3, 14, patch_columns(layout)), dtype=np.uint8))


def seconds_each(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds per image of one run; those of workers are not in the latter."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - start) / count, (time.process_time() - cpu) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_name_or_path", help="a checkpoint folder; default: the small one of the demo"
    )
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_photos(folder, options.images)
        prepared = load_processing(options.model_name_or_path or _golden_checkpoint(folder))
        question = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Noise."}]
        rows = [{"image": path.name, "conversations": question} for path in paths]
        (folder / "rows.json").write_text(json.dumps(rows))
        dataset = SupervisedDataset(folder / "rows.json", prepared)
        loader = DataLoader(dataset, batch_size=4, num_workers=options.workers, collate_fn=data_collator)
        works: dict[str, Callable[[], object]] = {
            "Pillow: decode and resizes": lambda: [with_pillow(path, prepared) for path in paths],
            "decode and slice": lambda: [with_ours(path, prepared) for path in paths],
            "whole sample": lambda: [dataset[index] for index in range(len(paths))],
            f"DataLoader, {options.workers} workers": lambda: list(loader),
        }
        times: dict[str, list[tuple[float, float]]] = {title: [] for title in works}
        for turn in range(
            options.repeats + 1
        ):  # the works take turns, so that a busy machine slows all alike
            for title, work in works.items():
                seconds = seconds_each(work, len(paths))
                if turn:  # the first is the warm-up
                    times[title].append(seconds)
        base = statistics.median(wall for wall, _ in times["Pillow: decode and resizes"])
        for title, values in times.items():
            wall, cpu = (statistics.median(kind) for kind in zip(*values, strict=True))
            sys.stdout.write(
                f"{title:28} {wall * 1000:8.2f} ms per image  {wall / base:5.2f} x  ({cpu * 1000:.2f} ms of CPU)\n"
            )
        pixels = dataset[0]["pixel_values"]
        sys.stdout.write(f"bytes per pixel value: {pixels.element_size()} ({pixels.dtype})\n")


def _golden_checkpoint(folder: Path) -> Path:
    """The tokenizer and configuration of the goldens of V-2.6, as a checkpoint folder."""
    source = ROOT / "tests" / "goldens" / "v2_6"
    target = folder / "checkpoint"
    target.mkdir()
    for path in (source / "config.json", *(source / "tokenizer").iterdir()):
        (target / path.name).write_bytes(path.read_bytes())
    return target


if __name__ == "__main__":
    main()
