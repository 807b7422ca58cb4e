"""What libraries say that a user of these scripts can do nothing about: left out of the screen and the logs."""

from __future__ import annotations

import logging
import warnings

ROOT = "minicpm_tune"  # the one logger that the project's own loggers stand below
LOG_ONLY = f"{ROOT}.log_only"  # a logger that writes to the process's log and not to the screen

# Patterns of how warnings begin.
_WARNINGS = (
    "`torch.jit.script_method` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
    "The PEFT config's `base_model_name_or_path` was renamed",
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed 0.19 calls them once per parameter
)
# Logger -> how its messages begin.
_MESSAGES = {"DeepSpeed": "Setting accelerator to CPU."}
# Advice for GPUs: packages of faster kernels that don't run on a CPU (transformers 5.23).
_FOR_GPUS = {
    "transformers.integrations.hub_kernels": "is falling back to its reference PyTorch implementation"
}


def silence() -> None:
    """Keep such lines out; call before torch's friends are imported, and again after logging is set up."""
    # It says on every CPU, when peft imports it, that a faster kernel could be downloaded (0.50).
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in (*_MESSAGES, *_FOR_GPUS):
        logger = logging.getLogger(name)
        if _is_wanted not in logger.filters:
            logger.addFilter(_is_wanted)
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", message=text)


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if record.name in _MESSAGES:
        return not message.startswith(_MESSAGES[record.name])
    import torch

    return _FOR_GPUS[record.name] not in message or torch.cuda.is_available()
