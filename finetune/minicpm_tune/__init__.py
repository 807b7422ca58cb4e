"""Fine-tune MiniCPM-V and InternLM-XComposer2 models.

Example:
    >>> import minicpm_tune
    >>> model = minicpm_tune.load_model("openbmb/MiniCPM-V-2_6")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm_tune.models.loading import load_model

__version__ = "0.2.0"

__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; the commands' --help does without them.
    if name == "load_model":
        from minicpm_tune.models.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
