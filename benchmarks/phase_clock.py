"""Where a training step's time goes: marks on the device's own time line, put there by hooks.

A mark opens a phase that lasts until the next mark. On a GPU marks are CUDA events, read when the measurement
is over, so that measuring makes no step wait; a phase then holds what the GPU did and waited for between the
two. On the CPU they are times.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

OTHER = "other"


class PhaseClock:
    """Collects marks.

    Args:
        on_gpu: Whether the work runs on a GPU.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.running = False
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Open a phase."""
        if not self.running:
            return
        moment: Any = time.perf_counter()
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((phase, moment))

    def start(self) -> None:
        """Forget what was marked, and begin."""
        self._marks.clear()
        self.running = True
        self.mark(OTHER)

    def stop(self) -> Counter[str]:
        """End; give the seconds of every phase."""
        self.mark(OTHER)
        self.running = False
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: Counter[str] = Counter()
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        return seconds

    def watch(self, model: Any) -> None:
        """Mark the phases of a model of V-2 to V-4.5 and of every optimizer."""
        self._part(model.vpm, "vision")
        self._part(model.resampler, "resampler")
        self._part(model.llm.model, "LLM")
        model.llm.lm_head.register_forward_pre_hook(lambda *_: self.mark("loss"))
        model.llm.lm_head.register_forward_hook(lambda *_: self.mark(OTHER))
        register_optimizer_step_pre_hook(lambda *_: self.mark("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self.mark(OTHER))

    def _part(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.mark(f"{name} forward"))
        module.register_forward_hook(lambda *call: self._after(call[-1], name))
        if name == "LLM":
            module.register_forward_pre_hook(self._before_llm, with_kwargs=True)

    def _after(self, output: Any, name: str) -> None:
        self.mark(OTHER)
        result = output if isinstance(output, Tensor) else output[0]
        if self.running and result.requires_grad:
            result.register_hook(lambda _: self.mark(f"{name} backward"))

    def _before_llm(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs["inputs_embeds"]
        if self.running and embeddings.requires_grad:
            embeddings.register_hook(lambda _: self.mark(OTHER))
