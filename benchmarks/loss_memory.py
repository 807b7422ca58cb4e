"""Memory and time of the loss: full logits against supervised positions in chunks.

    python benchmarks/loss_memory.py [--lengths 1024 2048 4096 8192 16384] [--share 0.15] [--repeats 3]

One row of each length with the vocabulary of V-4.5 (151,748) and a small hidden width, forward and backward.
Each measurement runs in a process of its own, because the peak of a process never falls; those of one
length take turns. Full logits of lengths that would not fit (--limit GiB) are left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, WIDTH = 151_748, 64
GIB = 1024**3
KINDS = {
    "full": "full logits, fp32 loss",
    "chunks": "chunks, every token supervised",
    "ours": "chunks, supervised tokens only",
}


def measure(kind: str, length: int, share: float) -> dict[str, float]:
    """One forward and backward in this process: seconds, and GiB above what was there before."""
    sys.path.insert(0, str(ROOT / "finetune"))
    import torch

    from minicpm_tune.models.loss import LMHead, supervised_loss

    torch.manual_seed(0)
    torch.set_num_threads(2)
    head = LMHead(WIDTH, VOCABULARY)
    head.weight.requires_grad_(False)
    hidden = torch.randn(1, length, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, length))
    if kind == "ours":
        labels[0, : int(length * (1 - share))] = -100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    if kind == "full":
        logits = head(hidden)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
    else:
        loss = supervised_loss(head, hidden, labels).loss_sum
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "gib": (peak - before) / GIB}


def measured(kind: str, length: int, share: float) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--one", kind, "--lengths", str(length), "--share", str(share)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print a table of ratios to full logits."""
    parser = argparse.ArgumentParser(description="Memory and time of the loss.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--share", type=float, default=0.15, help="share of supervised tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that full logits may take")
    parser.add_argument("--one", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one, options.lengths[0], options.share)))
        return
    print(
        f"vocabulary {VOCABULARY:,}, {options.share:.0%} of the tokens supervised, median of {options.repeats}\n"
    )
    print(f"{'length':>7}  {'':<32}{'peak GiB':>10}{'seconds':>9}{'memory':>8}{'time':>7}")
    for length in options.lengths:
        # Logits, their fp32 copy's log-softmax and the gradient live at once.
        fits = 3 * 4 * length * VOCABULARY / GIB < options.limit
        kinds = [kind for kind in KINDS if kind != "full" or fits]
        results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind in kinds:
                results[kind].append(measured(kind, length, options.share))
        medians = {
            kind: {name: statistics.median(run[name] for run in runs) for name in ("gib", "seconds")}
            for kind, runs in results.items()
        }
        for kind, found in medians.items():
            base = medians.get("full")
            ratios = (
                f"{found['gib'] / base['gib']:>8.2f}{found['seconds'] / base['seconds']:>7.2f}"
                if base
                else ""
            )
            print(f"{length:>7}  {KINDS[kind]:<32}{found['gib']:>10.2f}{found['seconds']:>9.2f}{ratios}")


if __name__ == "__main__":
    main()
