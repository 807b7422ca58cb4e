"""Fine-tune MiniCPM-V and InternLM-XComposer2 models.

Example:
    >>> import minicpm_tune
    >>> model = minicpm_tune.load_model("openbmb/MiniCPM-V-2_6")  # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Public name -> the module that has it. Imported on first use: torch and transformers take seconds, and the
# commands' --help does without them.
_PUBLIC = {"load_model": "minicpm_tune.models.loading"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
