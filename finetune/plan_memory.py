"""Estimate how much memory a training needs on each GPU, before there is a GPU.

    python finetune/plan_memory.py --model_name_or_path openbmb/MiniCPM-V-2_6 --method lora --gpus 2 --zero 2

Only the checkpoint's config.json is read. The training step runs on tensors without contents: a plan of an 8B model
takes about ten seconds and a gigabyte of RAM, on the CPU.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace

from minicpm_tune.files import GIB
from minicpm_tune.settings.command_flags import CommandParser, add_switch, count
from minicpm_tune.training.process_lifecycle import run_command


def main(argv: list[str]) -> int:
    """Plan one training, print the table, and return the exit code."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted.")


def run(values: Namespace) -> None:
    """Print the plan of the training that the command line describes, as a table.

    Raises:
        PlanError: When the flags can't be combined.
    """
    from minicpm_tune.checkpoints.model_folder import read_generation, resolve_model_folder
    from minicpm_tune.planning.memory_plan import PlanError, Training, host_bytes, plan
    from minicpm_tune.settings.argument_groups import LoraArguments

    names = {item.name for item in dataclasses.fields(Training)} - {"lora", "checkpointing", "tune_llm"}
    of_adapter = ("lora_r", "lora_target_modules", "lora_modules_to_save")
    lora = LoraArguments(**{name: getattr(values, name) for name in of_adapter})
    training = Training(lora=lora, **{name: getattr(values, name) for name in names})
    folder = resolve_model_folder(values.model_name_or_path, cache_dir=values.cache_dir, weights=False)
    generation = read_generation(folder)
    if values.downsample_mode and not generation.downsampling:
        raise PlanError(
            f"--downsample_mode: {generation.title} has none, expected MiniCPM-V 4.6, 4.7 or MiniCPM-OCR. Leave it "
            "out."
        )
    parts = plan(folder, training)
    host = host_bytes(folder, training)
    source = "fitted to the official table" if training.zero == 3 else "assumed"
    lines = [
        f"{generation.title}, {training.method}, {training.precision}: GiB per GPU (GPUs: {training.gpus})",
        *(f"  {part:<20}{size / GIB:>8.2f}" for part, size in parts.items()),
        f"  {'total':<20}{sum(parts.values()) / GIB:>8.2f}",
        *([f"  RAM of the machine, for all GPUs together: {host / GIB:.2f} GiB"] if host else []),
        f"  The surcharge (CUDA, NCCL, unused memory that the allocator holds) is {source}, not measured.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def parse_flags(argv: list[str]) -> Namespace:
    """Parse the command line."""
    from minicpm_tune.settings.argument_groups import OFFICIAL_LORA_TARGETS

    parser = CommandParser(prog="plan_memory.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="A folder with a checkpoint's config.json, or a Hub id.")
    add("--cache_dir", help="Where downloads from the Hub are kept.")
    add("--method", choices=["lora", "qlora", "full"], default="lora", help="How the LLM trains.")
    add("--gpus", type=count, default=1, help="Number of GPUs.")
    add(
        "--zero", type=int, choices=[0, 2, 3], default=2,
        help="ZeRO stage of DeepSpeed; 0 is without DeepSpeed.",
    )  # fmt: skip
    add(
        "--offload", choices=["none", "optimizer", "all"], default="none",
        help="What is kept in RAM: optimizer and gradients, or (all, with ZeRO-3) the weights too.",
    )  # fmt: skip
    add("--model_max_length", type=count, default=2048, help="Length of a row, in tokens.")
    add("--batch_size", type=count, default=1, help="Rows per GPU in each forward.")
    add(
        "--gradient_accumulation_steps", type=count, default=1,
        help="Forwards per optimizer step. Without DeepSpeed, more than one keeps gradients during the next forward.",
    )  # fmt: skip
    add("--max_slice_nums", type=count, default=9, help="Most slices a row's image is cut into.")
    add("--audio_seconds", type=int, default=0, help="MiniCPM-o: seconds of audio of a row.")
    add("--downsample_mode", choices=["4x", "16x"], help="As in finetune.py, for 4.6, 4.7, and OCR.")
    add_switch(parser, "--tune_vision", default=True, help="Whether the vision tower trains.")
    add_switch(parser, "--tune_audio", default=False, help="MiniCPM-o: whether the audio encoder trains.")
    add_switch(parser, "--tune_resampler", default=True, help="Whether the resampler trains.")
    add_switch(
        parser, "--gradient_checkpointing", default=True,
        help="Whether the backward computes activations again, to save memory.",
    )  # fmt: skip
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="Precision of the training.")
    add_switch(
        parser, "--fp32_residual_connection", default=None, help="As in finetune.py. Unset: true with fp16."
    )
    add(
        "--optim", choices=["adamw_torch_fused", "adamw_torch", "adamw_8bit", "sgd"], default="adamw_torch_fused",
        help="The optimizer.",
    )  # fmt: skip
    add("--quant_bits", type=int, choices=[4, 8], default=4, help="Bits per weight with --method qlora.")
    add("--lora_r", type=count, default=64, help="Rank of the adapter.")
    add("--lora_target_modules", default=OFFICIAL_LORA_TARGETS, help="As in finetune.py.")
    add("--lora_modules_to_save", nargs="+", help="As in finetune.py; none plans a plain adapter.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
