"""Ask about held-out pictures or sounds before and after tuning: exact matches beside chance, and the loss curves.

    python compare.py FOLDER        # what demo.sh made: base, full, lora if there is one, data

Chance is the best that the text alone allows, see ``draw_pictures.chance``: a model that neither
looks nor listens can't do better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "finetune"))

from draw_pictures import chance, without_placeholder

BATCH = 24
MAX_NEW_TOKENS = 12  # the longest answer has 10 and its end
STAGES = {"before": "base", "after full tuning": "full", "after LoRA": "lora"}


def exact_matches(model: Any, processing: Any, data: Path) -> dict[str, float]:
    """Let a model answer every row of a file; last question -> share of exact answers."""
    from dataset import SupervisedDataset
    from minicpm_tune.answering.generate import GREEDY
    from minicpm_tune.answering.prediction import PredictionRows, predict

    rows = PredictionRows(SupervisedDataset(data, processing))
    right, asked = Counter(), Counter()
    options = GREEDY | {"max_new_tokens": MAX_NEW_TOKENS}
    for lines in predict(model, rows, range(len(rows)), batch_size=BATCH, options=options):
        for line in lines:
            question = without_placeholder(line["question"])
            asked[question] += 1
            right[question] += line["prediction"].strip() == line["answer"]
    return {question: right[question] / asked[question] for question in asked}


def draw_losses(folder: Path, target: Path, runs: dict[str, str]) -> None:
    """Draw the losses of runs beside each other; ``runs`` is name -> title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(5 * len(runs) + 1, 4), sharey=True, squeeze=False)
    for axis, (name, title) in zip(axes[0], runs.items(), strict=True):
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        for key, label in {"loss": "training", "eval_loss": "held-out rows"}.items():
            points = [(line["step"], line[key]) for line in history if key in line]
            axis.plot(*zip(*points, strict=True), marker="o" if key == "eval_loss" else None, label=label)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss, nats per supervised token")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    """Print the table and say where the curves are."""
    parser = argparse.ArgumentParser(description="Compare a demo's models on held-out rows.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from minicpm_tune.logs import silence_libraries

    silence_libraries()
    from minicpm_tune.answering.load import ModelChoice, load_for_inference

    held_out = folder / "data" / "held_out.json"
    rows = json.loads(held_out.read_text(encoding="utf-8"))
    chances = chance(rows)
    stages = {title: name for title, name in STAGES.items() if (folder / name).is_dir()}
    found: dict[str, dict[str, float]] = {}
    for title, name in stages.items():
        adapter = str(folder / name) if name == "lora" else None
        base = folder / ("full" if adapter else name)
        model, processing = load_for_inference(ModelChoice(str(base), adapter=adapter))
        found[title] = exact_matches(model, processing, held_out)
    head = f"exact match on held-out {'sounds' if 'audio' in rows[0] else 'pictures'}"
    lines = [f"{head:<34}{'chance':>8}" + "".join(f"{title:>19}" for title in stages)]
    lines += [
        f"{question:<34}{chances[question]:>8.1%}"
        + "".join(f"{found[title][question]:>19.1%}" for title in stages)
        for question in chances
    ]
    titles = {"full": "full tuning", "lora": "LoRA"}
    draw_losses(
        folder, folder / "loss.png", {name: titles[name] for name in titles if name in stages.values()}
    )
    text = "\n".join(lines)
    (folder / "accuracy.txt").write_text(text + "\n")
    sys.stdout.write(f"\n{text}\n\nLoss curves: {folder / 'loss.png'}\n")


if __name__ == "__main__":
    main()
