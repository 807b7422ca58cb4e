"""A training step on the CPU, small model: one feature off or on per row, interleaved in one process.

    python benchmarks/training_step.py [--rounds 5] [--generation v2_6]

The same samples (texts of skewed lengths, one picture in four sliced) go through every variant; what counts
is real tokens per CPU second, padding not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
for folder in ("finetune", "demo"):
    sys.path.insert(0, str(ROOT / folder))

from make_checkpoint import make_checkpoint
from minicpm_tune.batch import PictureFeatures
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.data.media.images import Picture
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.data.sample_tensors import data_collator
from minicpm_tune.data.samples import Processing, load_processing
from minicpm_tune.data.sampling import best_fit
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.parameter_parts import freeze
from minicpm_tune.settings.data_arguments import DataArguments

KEPT = "+ packing, features kept"
SAMPLES, BATCH, CAPACITY = 48, 8, 1024
WORDS = "red green blue small large left right above below cat dog house tree sky".split()


def draw_samples(processing: Processing) -> list[dict[str, Any]]:
    """Samples with answers of log-normal length."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(SAMPLES):
        answer = " ".join(random.choice(WORDS, size=max(1, int(random.lognormal(3.2, 1.0)))))
        turns = [
            {"role": "user", "content": "<image>\nDescribe it."},
            {"role": "assistant", "content": answer},
        ]
        conversation = parse_row({"image": "x.png", "conversations": turns})
        side = (280, 260) if number % 4 == 0 else (112, 98)
        picture = Picture.of(Image.fromarray(random.integers(0, 255, (*side, 3), dtype=np.uint8)))
        sample = processing.encode(conversation.turns, [picture])
        samples.append({**sample, "origin": (0, number)})
    return samples


def batches(samples: list[dict[str, Any]], *, packed: bool, grouped: bool) -> Iterator[dict[str, Any]]:
    """All samples once, in batches of about the same number of places."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    if packed:
        for row in best_fit(range(len(samples)), lengths, capacity=CAPACITY):
            yield data_collator([[samples[index] for index in row]], packing=True)
        return
    order = sorted(range(len(samples)), key=lengths.__getitem__) if grouped else list(range(len(samples)))
    for start in range(0, len(order), BATCH):
        yield data_collator([samples[index] for index in order[start : start + BATCH]])


def with_features(model: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples as ``--cache_vision_features`` gives them from the second epoch on."""
    kept = []
    for sample in samples:
        pictures = [PictureFeatures(len(sample["tgt_sizes"]), "kept")]
        batch = data_collator([{**sample, "pictures": pictures}])
        del batch["provenance"]
        with torch.no_grad():
            ((_, features),) = model(**batch).new_features.entries
        known = [PictureFeatures(len(sample["tgt_sizes"]), "kept", features)]
        kept.append({**sample, "pictures": known, "pixel_values": sample["pixel_values"][:, :, :0]})
    return kept


def full_logits_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The usual loss: logits of every position."""
    labels = batch.pop("labels")
    del batch["supervised"]
    logits = model(**batch).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def ours_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of supervised positions."""
    return model(**batch).loss


def epoch_seconds(model: Any, samples: list[dict[str, Any]], loss: Callable, **order: bool) -> float:
    """CPU seconds of forward, backward and update on all samples once; other work on the machine does not count."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    start = time.process_time()
    for batch in batches(samples, **order):
        del batch["provenance"]
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Print medians and ratios to the first row."""
    parser = argparse.ArgumentParser(description="A training step, one feature per row.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generation", default="v2_6", choices=list(GENERATIONS))
    parser.add_argument("--only", default="", help="variants whose names hold this")
    options = parser.parse_args()
    row = GENERATIONS[options.generation]
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), row.name, size="demo")
        processing = load_processing(folder, DataArguments.of_checkpoint(model_max_length=CAPACITY))
        model = load_model(folder, dtype=torch.float32).train()
    samples = draw_samples(processing)
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    plain = {"packed": False, "grouped": False}
    variants: dict[str, tuple[bool, Callable, dict[str, bool]]] = {
        "full logits": (True, full_logits_loss, plain),
        "supervised positions only": (True, ours_loss, plain),
        "+ grouped by length": (True, ours_loss, {**plain, "grouped": True}),
        "+ packing": (True, ours_loss, {**plain, "packed": True}),
        "+ packing, vision frozen": (False, ours_loss, {**plain, "packed": True}),
        KEPT: (False, ours_loss, {**plain, "packed": True}),
    }
    variants = {name: variant for name, variant in variants.items() if options.only in name}
    freeze(model, row, vision=False, resampler=True, llm=True)
    kept = with_features(model, samples)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(options.rounds + 1):  # the first is the warm-up
        for name, (vision, loss, order) in variants.items():
            freeze(model, row, vision=vision, resampler=True, llm=True)
            seconds = epoch_seconds(model, kept if name == KEPT else samples, loss, **order)
            if round_number:
                times[name].append(seconds)
    print(f"{row.title}, {tokens} tokens in {SAMPLES} samples, {torch.get_num_threads()} threads\n")
    print(f"{'':<28}{'tokens/s':>9}{'spread':>16}{'ratio':>7}")
    base = statistics.median(next(iter(times.values())))
    for name, found in times.items():
        spread = f"{tokens / max(found):.0f} to {tokens / min(found):.0f}"
        median = statistics.median(found)
        print(f"{name:<28}{tokens / median:>9.0f}{spread:>16}{base / median:>7.2f}")


if __name__ == "__main__":
    main()
