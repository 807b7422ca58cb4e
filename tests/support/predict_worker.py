"""One of two processes that answer rows under ZeRO-3; started by torchrun.

Usage: predict_worker.py CHECKPOINT DATA OUTPUT; the first process writes the answers to OUTPUT.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str((Path(__file__).parent / "../../finetune").resolve()))

from transformers.integrations import HfDeepSpeedConfig

from dataset import SupervisedDataset
from minicpm_tune.answering.prediction import PredictionRows
from minicpm_tune.answering.prediction_callback import PredictionCallback
from minicpm_tune.data.samples import load_processing
from minicpm_tune.models.loading import load_model
from minicpm_tune.settings.deepspeed_setup import start_on_cpu

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main() -> None:
    checkpoint, data, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    start_on_cpu()
    import deepspeed

    rules = load_processing(checkpoint)
    kept = HfDeepSpeedConfig(CONFIG)  # from_pretrained partitions, and ZeRO-3 counts as on, while it lives
    model = load_model(checkpoint, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=2, process_index=dist.get_rank()),
        is_fsdp_enabled=False,
        model=engine.module,
        compute_loss_context_manager=nullcontext,
    )
    callback = PredictionCallback(
        trainer,
        PredictionRows(SupervisedDataset(str(data), rules)),
        samples=5,
        batch_size=2,
        max_new_tokens=6,
    )
    lines = callback.answers()
    if dist.get_rank() == 0:
        output.write_text(json.dumps([line["prediction"] for line in lines]))
    dist.barrier()
    del kept
    sys.stdout.flush()
    # A gloo thread now and then aborts a DeepSpeed process while Python ends (deepspeed 0.19).
    os._exit(0)


if __name__ == "__main__":
    main()
