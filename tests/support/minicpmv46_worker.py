"""One process of a distributed test of the native generations; started by torchrun.

Usage: native_worker.py {ddp,zero3} GENERATION MODE CHECKPOINT OUTPUT

Each step gives every process another kind of batch; the first process writes losses and gradients (or, under
ZeRO-3, the parameters after the steps) to OUTPUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

for folder in ("../../finetune", ".."):
    sys.path.insert(0, str((Path(__file__).parent / folder).resolve()))

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.models.loading import load_model
from support.minicpmv46_cases import batch_of, gradients, made_sample

LEARNING_RATE = 1e-3
SLICED = ((4, 8), (4, 4), (4, 4))


def steps(mode):
    """The batches of every step, one for each of two processes: counts of slices and samples differ."""
    per_token = {"16x": 16, "4x": 4}[mode]

    def sample(seed, **options):
        return made_sample(seed, per_token=per_token, **options)

    text, other_text = sample(1, images=()), sample(2, images=(), after=20)
    sliced, single = sample(3, images=[SLICED]), sample(4)
    unpacked = {"packed": False}
    return [
        (batch_of([[text]], **unpacked), batch_of([[sliced], [single]], **unpacked)),
        (batch_of([[single, text, other_text]]), batch_of([[text]])),
        (batch_of([[other_text], [text]]), batch_of([[text]], **unpacked)),
        (batch_of([[sliced, sliced], [single, text]]), batch_of([[text, single]])),
    ]


def supervised(batches):
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def main() -> None:
    kind, name, mode, checkpoint, output = sys.argv[1:]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    report = {"ddp": run_ddp, "zero3": run_zero3}[kind](GENERATIONS[name], mode, Path(checkpoint), rank)
    if rank == 0:
        torch.save(report, output)
    dist.barrier()
    sys.stdout.flush()
    # A gloo thread now and then aborts a DeepSpeed process while Python ends (deepspeed 0.19).
    os._exit(0)


def run_ddp(generation, mode, checkpoint, rank):
    dist.init_process_group("gloo")
    model = load_model(checkpoint, dtype=torch.float32).train()
    model.config.downsample_mode = mode
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    report = []
    for batches in steps(mode):
        model.zero_grad()
        # Twice: DDP averages over the two processes.
        loss = 2 * wrapped(**batches[rank], num_items_in_batch=supervised(batches)).loss
        loss.backward()
        report.append({"loss": summed(loss / 2), "gradients": gradients(model)})
    return report


def run_zero3(generation, mode, checkpoint, rank):
    from transformers.integrations import HfDeepSpeedConfig

    from minicpm_tune.settings.deepspeed_setup import start_on_cpu

    start_on_cpu()
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 2000,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 by default
    }  # fmt: skip
    kept = HfDeepSpeedConfig(config)  # from_pretrained partitions while this object lives
    model = load_model(checkpoint, dtype=torch.float32).train()
    del kept
    model.config.downsample_mode = mode
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for batches in steps(mode):
        loss = 2 * engine(**batches[rank], num_items_in_batch=supervised(batches)).loss
        engine.backward(loss)
        engine.step()
        losses.append(summed(loss / 2))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    return {"losses": losses, "weights": weights}


def summed(loss):
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


if __name__ == "__main__":
    main()
