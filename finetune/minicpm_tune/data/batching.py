"""From samples to what goes through the model: packed rows joined, sizes kept on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataset import data_collator
from minicpm_tune.data.packing import Sample, join
from minicpm_tune.models.loss import IGNORE_INDEX


class BatchMaker:
    """The collator of a run.

    The model reads sizes, bounds and the places of supervised tokens as Python numbers or as
    indices. As numpy arrays they are not moved to the GPU with the rest, and reading them makes no
    step wait for it.

    Args:
        pad_token_id: What rows are filled up with.
        packing: Whether rows are lists of samples that share the row.
        copies: Whether the model reads the token ids on the CPU too (4.6 and 4.7).
    """

    def __init__(self, pad_token_id: int, *, packing: bool = False, copies: bool = False):
        self.pad_token_id, self.packing, self.copies = pad_token_id, packing, copies

    def __call__(self, rows: Sequence[Sample | list[Sample]]) -> dict[str, Any]:
        """Make a batch; see ``dataset.data_collator``.

        Returns:
            Its batch, with ``tgt_sizes``, ``image_bound``, ``temporal_ids`` as numpy arrays, and
            ``supervised`` [N] int64: the places, in the flattened [B * T] batch, whose next token is
            supervised. ``position_ids`` only with packing. ``rows``: (source, row) of every sample.
            ``supervised_sources`` [N]: the source each of those tokens comes from.
            ``on_cpu`` [2 or 3, B, T] int64, ids, mask and positions, with ``copies``.
        """
        samples: list[Any] = (
            [join(row if isinstance(row, list) else [row]) for row in rows] if self.packing else list(rows)
        )
        batch = data_collator(samples, pad_token_id=self.pad_token_id)
        del batch["position_ids"]
        if self.packing:
            batch["position_ids"] = _positions(samples, batch["input_ids"].shape[1])
            batch["rows"] = [part for sample in samples for part in sample["parts"]]
        for name in ("tgt_sizes", "image_bound", "temporal_ids"):
            if name in batch:
                batch[name] = batch[name].numpy()
        batch["supervised"] = supervised_places(batch["labels"])
        batch["supervised_sources"] = self._sources(samples, batch)
        if self.copies:
            copied = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
            batch["on_cpu"] = np.stack([batch[name].numpy() for name in copied])
        return batch

    def _sources(self, samples: Sequence[Sample], batch: dict[str, Any]) -> np.ndarray:
        """[N] int64: the source of the sample that holds each supervised place."""
        rows, columns = np.divmod(batch["supervised"], batch["labels"].shape[1])
        if not self.packing:
            return np.array([samples[row]["source"] for row in rows], dtype=np.int64)
        # A place's sample is the number of restarts up to it, within its row.
        numbers = (batch["position_ids"] == 0).cumsum(dim=1).numpy()[rows, columns] - 1
        parts = (samples[row]["parts"][number] for row, number in zip(rows, numbers, strict=True))
        return np.array([source for source, _ in parts], dtype=np.int64)


def supervised_places(labels: torch.Tensor) -> np.ndarray:
    """Places in the flattened batch whose next token has a label.

    Example:
        >>> supervised_places(torch.tensor([[-100, 5, -100], [-100, -100, 7]])).tolist()
        [0, 4]
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return (rows * labels.shape[1] + columns).numpy()


def _positions(samples: Sequence[Sample], length: int) -> torch.Tensor:
    """[B, T] positions that restart with each sample; padding counts as one more."""
    return torch.stack(
        [
            torch.cat([sample["position_ids"], torch.arange(length - len(sample["position_ids"]))])
            for sample in samples
        ]
    )
