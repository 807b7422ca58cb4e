"""Merge a LoRA adapter into its base model, and write the result in the released format.

    python merge_lora.py --model_name_or_path BASE --adapter ADAPTER --output_dir OUT

The new folder holds everything that inference servers and the released code load: weights, configuration,
tokenizer, processor and *.py files. Before it is written, the merged model is compared with the adapter on a
probe prompt.

With ``--export_lora gguf-names`` nothing is merged: the new folder holds the adapter under the tensor names that
llama.cpp's convert_lora_to_gguf.py understands.

Imports that take seconds stand where they are used, so that ``--help`` and messages come at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_tune.settings.command_flags import DTYPES, CommandParser, add_switch
from minicpm_tune.training.process_lifecycle import run_command

if TYPE_CHECKING:
    import torch

    from minicpm_tune.lora.adapter_folders import AdapterFolder

logger = logging.getLogger("minicpm_tune.merge_lora")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="merge_lora.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--model_name_or_path",
        help="The base model: a folder or a hub id. Default: the one that the adapter names.",
    )
    add(
        "--adapter",
        required=True,
        help="Folder of the adapter; those of the early official scripts work too.",
    )
    add("--output_dir", required=True, help="Folder for the merged model; it must be new or empty.")
    add(
        "--export_lora", choices=["gguf-names"],
        help="Merge nothing; write a plain adapter of the LLM under the names that llama.cpp's "
        "convert_lora_to_gguf.py understands.",
    )  # fmt: skip
    add(
        "--dtype", default="auto", choices=DTYPES,
        help="Precision of the merged weights. auto: that of the base model.",
    )  # fmt: skip
    add(
        "--base_precision", default="original", choices=["original", "quantized"],
        help="For an adapter trained on a 4- or 8-bit model. original: merge into the full-precision weights. "
        "quantized: merge into the values of the quantized weights, on which it was trained.",
    )  # fmt: skip
    add(
        "--quant_bits", type=int, choices=[4, 8],
        help="With --base_precision quantized and a full-precision base: bits to quantize it to. "
        "Default: those that the adapter was trained on, or 4.",
    )  # fmt: skip
    add("--max_shard_size", default="5GB", help="Size of the largest weight file.")
    add_switch(
        parser, "--safe_serialization", default=True,
        help="true: write model*.safetensors. false: write pytorch_model*.bin, for tools that read nothing else.",
    )  # fmt: skip
    add("--device", default="cpu", help="Device that computes the merge: cpu, cuda or cuda:N.")
    add_switch(
        parser, "--allow_other_base", default=False,
        help="Accept another base model than the one trained on.",
    )  # fmt: skip
    add("--cache_dir", help="Folder for downloads from the hub.")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run one merge, and return the exit code: 0, or 1 with one message for a mistake of the user's."""
    return run_command(run, parse_flags(argv), interrupted="Interrupted; no merged model was written.")


def run(values: argparse.Namespace) -> None:
    """Merge, or only rename."""
    from minicpm_tune.answering.load import resolve_base
    from minicpm_tune.files import check_new_folder

    output = check_new_folder(values.output_dir)
    base, adapter = resolve_base(values.model_name_or_path, values.adapter, cache_dir=values.cache_dir)
    assert adapter is not None, values.adapter
    if values.export_lora:
        _export(base, adapter, output)
    else:
        _merge(values, base, adapter, output)


def _export(base: Path, adapter: AdapterFolder, output: Path) -> None:
    from minicpm_tune.checkpoints.model_folder import read_generation
    from minicpm_tune.files import whole_folder
    from minicpm_tune.lora.merging import check_convertible, write_gguf_names

    generation = read_generation(base)
    check_convertible(adapter, generation)
    with whole_folder(output) as partial:
        partial.mkdir(parents=True)
        write_gguf_names(adapter, generation, partial)
    logger.info(
        "Adapter for llama.cpp: %s. Next: convert_lora_to_gguf.py --base LLM_FOLDER %s", output, output
    )


def _merge(values: argparse.Namespace, base: Path, adapter: AdapterFolder, output: Path) -> None:
    """The steps of a merge, in order."""
    from minicpm_tune.answering.load import DTYPE_NAMES, choose_device
    from minicpm_tune.checkpoints.model_folder import stored_dtype
    from minicpm_tune.data.samples import load_processing
    from minicpm_tune.files import checked_size, whole_folder
    from minicpm_tune.lora.adapter_folders import check_base
    from minicpm_tune.lora.loading import load_adapter
    from minicpm_tune.lora.merging import check_saved, merge, to_bin_files
    from minicpm_tune.models.loading import add_token_rows
    from minicpm_tune.settings.data_arguments import DataArguments

    size = checked_size(values.max_shard_size)
    arguments = DataArguments.of_checkpoint(downsample_mode=adapter.downsample_mode)
    processing = load_processing(base, arguments, new_tokens=adapter.new_tokens)
    check_base(adapter, base, processing.generation, allow_other_base=values.allow_other_base)
    dtype = stored_dtype(base) if values.dtype == "auto" else DTYPE_NAMES[values.dtype]

    model = _load_base(values, base, adapter, dtype).to(choose_device(values.device))
    add_token_rows(model, processing.new_tokens)
    model = load_adapter(model, adapter)
    merged, report = merge(model, processing)
    logger.info("%s", report)

    with whole_folder(output) as partial:
        merged.save_pretrained(partial, max_shard_size=size)
        if not values.safe_serialization:
            to_bin_files(partial)
        if values.base_precision == "original":
            taller = bool(adapter.config.get("layer_replication"))
            check_saved(partial, base, taller=taller, tied=merged.all_tied_weights_keys)
    logger.info("Merged model: %s (%s)", output, str(dtype).removeprefix("torch."))


def _load_base(values: argparse.Namespace, base: Path, adapter: AdapterFolder, dtype: torch.dtype) -> Any:
    """Load the weights that the adapter is merged into, and log which they are."""
    from minicpm_tune.checkpoints.quantized_files import stored_quantization
    from minicpm_tune.lora.merging import MergeError
    from minicpm_tune.models.loading import load_model
    from minicpm_tune.models.quantization import dequantize

    stored = stored_quantization(base)
    mode = adapter.downsample_mode
    trained_in = adapter.fingerprint.quantization if adapter.fingerprint else None
    if values.base_precision == "original":
        if stored is not None:
            raise MergeError(
                f"{base}: found weights stored in {stored.bits} bit, expected full precision. Give the full-precision "
                "version of the same model, or add --base_precision quantized."
            )
        if trained_in:
            logger.info("The adapter was trained on %s weights; merging into full precision.", trained_in)
        return load_model(base, dtype=dtype, downsample_mode=mode)
    bits = stored.bits if stored else values.quant_bits or int((trained_in or "4").split()[0])
    logger.info("Merging into the values of the %d-bit weights.", bits)
    return dequantize(load_model(base, dtype=dtype, quant_bits=bits, downsample_mode=mode), dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
