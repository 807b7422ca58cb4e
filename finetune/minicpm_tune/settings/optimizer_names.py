"""``--optim``: which of transformers' optimizers can run here.

All of them are passed through. Some need a package that is not among the requirements, which transformers
would say only after the model is loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator

# What a name starts with or contains, and the module it needs (transformers 5.23).
_NEEDS = (
    (r"galore_", "galore_torch", "galore-torch"),
    (r"apollo_", "apollo_torch", "apollo-torch"),
    (r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    (r"grokadamw$", "grokadamw", "grokadamw"),
    (r"schedule_free_", "schedulefree", "schedulefree"),
    (r"stable_adamw$", "optimi", "torch-optimi"),
    (r"adamw_torch_[48]bit$", "torchao", "torchao"),
    (r"adamw_anyprecision$", "torchdistx", "torchdistx"),
    (r"adamw_torch_xla$", "torch_xla", "torch-xla"),
    (r"adamw_torch_npu_fused$", "torch_npu", "torch-npu"),
    (r".*(bnb|8bit|paged_|lion|ademamix)", "bitsandbytes", "bitsandbytes"),
)


def optimizer_problems(name: str) -> Iterator[str]:
    """What is wrong with ``--optim``."""
    from transformers.training_args import OptimizerNames

    known = [each.value for each in OptimizerNames]
    if str(getattr(name, "value", name)) not in known:
        near = difflib.get_close_matches(name, known, n=1)
        instead = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(known)}."
        yield f"--optim {name}: the installed transformers has no such optimizer. {instead}"
        return
    for pattern, module, package in _NEEDS:
        if re.match(pattern, name):
            if importlib.util.find_spec(module) is None:
                yield f"--optim {name} needs the package {package}: pip install {package}, or choose another optimizer."
            return
