"""Files of a checkpoint never run code: torch's pickles are read with a list of harmless classes.

Imports torch where it is used: ``refuse_pickles`` is called before anything slow.
"""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minicpm_tune.errors import UserError

# How torch speaks of a file that it can't make sense of (torch 2.13), in a RuntimeError.
_TORCH_READER = ("PytorchStreamReader", "legacy .tar format")


class UnreadableFileError(UserError):
    """A damaged file, or one that holds something other than tensors."""


def refuse_pickles() -> None:
    """Make every ``torch.load`` of this process refuse anything but tensors and plain containers.

    Optimizer states are pickles, and a pickle can run any program. DeepSpeed asks torch to trust them
    (0.19); this variable overrules it (torch 2.13, ``torch/serialization.py``).
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed_states() -> None:
    """Allow the four classes in DeepSpeed's own optimizer states; all of them are plain values."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler])
    # Python 3.11.0 to 3.11.3 write an Enum as a call of getattr, which no checkpoint may ask for; others as this.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@contextmanager
def unreadable_files_as_messages(folder: str | Path | None) -> Iterator[None]:
    """Turn errors of torch and safetensors about a file into a message that names its folder.

    Args:
        folder: What is being read.

    Raises:
        UnreadableFileError: When a file is damaged, or is a pickle of something other than tensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_READER):
            raise
        raise UnreadableFileError(
            f"{folder}: a file there is damaged, or holds something other than tensors, which is not loaded "
            f"({_reason(error)}). Download or copy the files again, or use others."
        ) from error


def _reason(error: Exception) -> str:
    """What was found, without torch's advice to load the file nevertheless."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    found = [line.strip() for line in lines if "Unsupported" in line]
    return (found or lines)[0].partition(" was not an allowed global")[0].partition(". In PyTorch 2.6")[0]
