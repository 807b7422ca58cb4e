"""Ask where the shape of held-out pictures is, before and after tuning: a table of overlaps, and the loss curve.

    python compare_boxes.py FOLDER        # what demo.sh --task find made: base, full, data

The first column is the best single box for all pictures: a model that does not look can't do better.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "finetune"))

from compare import draw_losses
from draw_boxes import best_guess

BATCH = 25
MAX_NEW_TOKENS = 48  # a box has 19 and its end; 34 where its tags are no tokens
STAGES = {"before": "base", "after full tuning": "full"}
TITLES = {"iou_50": "overlap (IoU) of at least one half", "mean_iou": "mean overlap"}


def overlaps(model: Any, processing: Any, data: Path) -> dict[str, float]:
    """Let a model answer every row of a file; the scores of its boxes."""
    from dataset import SupervisedDataset
    from minicpm_tune.answering.generate import GREEDY
    from minicpm_tune.answering.metrics import BOX_METRICS, corpus_scores
    from minicpm_tune.answering.prediction import PredictionRows, predict

    rows = PredictionRows(SupervisedDataset(data, processing), metrics=BOX_METRICS)
    options = GREEDY | {"max_new_tokens": MAX_NEW_TOKENS}
    batches = predict(model, rows, range(len(rows)), batch_size=BATCH, options=options)
    return corpus_scores([line for lines in batches for line in lines])


def expected_boxes(data: Path, processing: Any) -> list[tuple[float, ...]]:
    """The box of every row of a file, from 0 to 1000."""
    from dataset import SupervisedDataset
    from minicpm_tune.data.grounding import read_boxes

    rows, boxes = SupervisedDataset(data, processing), []
    for index in range(len(rows)):
        row = rows.parse(index)
        turns = processing.with_boxes_written(row.turns, rows.open_media(index, row.sources))
        boxes += [box.values for box in read_boxes(turns[-1].text, processing.generation.box_form)]
    return boxes


def main() -> None:
    """Print the table and say where the curve is."""
    parser = argparse.ArgumentParser(description="Compare a demo's models on boxes in held-out pictures.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from minicpm_tune.logs import silence_libraries

    silence_libraries()
    from minicpm_tune.answering.load import ModelChoice, load_for_inference

    data = folder / "data"
    found: dict[str, dict[str, float]] = {}
    for title, name in STAGES.items():
        model, processing = load_for_inference(ModelChoice(str(folder / name)))
        if not found:
            known = expected_boxes(data / "boxes_eval.json", processing)
            found["one box"] = best_guess(expected_boxes(data / "held_out.json", processing), known)
        found[title] = overlaps(model, processing, data / "held_out.json")
    lines = [f"{'boxes in held-out pictures':<38}" + "".join(f"{title:>19}" for title in found)]
    lines += [
        f"{title:<38}" + "".join(f"{scores.get(name, 0):>19.1%}" for scores in found.values())
        for name, title in TITLES.items()
    ]
    draw_losses(folder, folder / "loss.png", {"full": "full tuning"})
    text = "\n".join(lines)
    (folder / "accuracy.txt").write_text(text + "\n")
    sys.stdout.write(f"\n{text}\n\nLoss curve: {folder / 'loss.png'}\n")


if __name__ == "__main__":
    main()
