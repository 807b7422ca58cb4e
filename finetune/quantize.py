"""Write a 4-bit or 8-bit copy of a model, in the format of the released int4 ones (bitsandbytes).

    python finetune/quantize.py --model_name_or_path openbmb/MiniCPM-V-2_6 --output_dir MiniCPM-V-2_6-int4

The copy loads wherever the released int4 models do, takes a quarter of the disk space and loading time, and
trains with ``finetune.py --use_lora true --q_lora true``. Only the LLM's linear layers are quantized;
everything else is copied exactly, so that vision can be tuned on it, which the released int4 models do not
allow.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from pathlib import Path

from minicpm_tune.settings.command_flags import CommandParser
from minicpm_tune.training.process_lifecycle import run_command

logger = logging.getLogger("minicpm_tune.quantize")


def main(argv: list[str]) -> int:
    """Quantize one model, and return the exit code."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted; no model was written.")


def run(values: Namespace) -> None:
    """Find the model that the command line names, and quantize it."""
    from minicpm_tune.checkpoints.model_folder import resolve_model_folder
    from minicpm_tune.files import checked_size

    size = checked_size(values.max_shard_size)
    folder = resolve_model_folder(values.model_name_or_path, cache_dir=values.cache_dir)
    quantize_checkpoint(folder, Path(values.output_dir), bits=values.quant_bits, max_shard_size=size)


def parse_flags(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = CommandParser(prog="quantize.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="Model in full precision: a folder or a hub id.")
    add("--output_dir", required=True, help="Folder for the copy; it must be new or empty.")
    add("--quant_bits", type=int, choices=[4, 8], default=4, help="Bits per weight.")
    add("--max_shard_size", default="5GB", help="Size of the largest weight file.")
    add("--cache_dir", help="Folder for downloads from the hub.")
    return parser.parse_args(argv)


def quantize_checkpoint(folder: Path, output: Path, *, bits: int = 4, max_shard_size: str = "5GB") -> None:
    """Quantize a model while loading it, and save it with its configuration, tokenizer and *.py files.

    Args:
        folder: A model in full precision.
        output: Folder for the copy.
        bits: 4 (NormalFloat, double quantization) or 8.
        max_shard_size: Size of the largest file, such as ``5GB``.

    Raises:
        QuantizationError: When the model is quantized already.
        OutputError: When ``output`` can't be written.
    """
    from minicpm_tune.checkpoints.quantized_files import QuantizationError, stored_quantization
    from minicpm_tune.files import check_new_folder, whole_folder
    from minicpm_tune.models.loading import load_model
    from minicpm_tune.models.quantization import quantized_modules

    output = check_new_folder(str(output))
    if stored_quantization(folder) is not None:
        raise QuantizationError(
            f"{folder}: found quantized weights, expected full precision. Give the original model."
        )
    model = load_model(folder, quant_bits=bits)
    # As long as it is there, save_pretrained omits o-2.6's speech parts (transformers 5.23).
    del model.hf_quantizer
    with whole_folder(output) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
    logger.info(
        "%s: %d layers in %d bit, %.3f GiB of weights instead of %.3f. Train on it with --use_lora true "
        "--tune_llm false --q_lora true --quant_bits %d.",
        output, len(quantized_modules(model)), bits, _size(output), _size(folder), bits,
    )  # fmt: skip


def _size(folder: Path) -> float:
    """GiB of a model's weight files."""
    from minicpm_tune.checkpoints.weight_files import weight_files
    from minicpm_tune.files import GIB

    return sum(path.stat().st_size for path in weight_files(folder)) / GIB


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
