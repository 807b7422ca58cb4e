"""The loss that keeps the experts of a mixture evenly used (MiniCPM-V 4.7-35B-A3B).

transformers adds it where config.json says so: ``output_router_logits`` and ``router_aux_loss_coef`` in
``text_config``. It computes one value per batch, and the value depends on which samples share it: their tokens are
counted together, and padding with them. Here every sample has its own value, as if it were the batch, so that
packing, batches and processes change nothing; and it is weighted as the sample's cross entropy is.

Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
(arXiv:2101.03961), equations 4 to 6; transformers 5.23, ``load_balancing_loss_func``.
Letters: L layers, N tokens of all samples, S samples, E experts, K experts that a token is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minicpm_tune.batch import IGNORE_INDEX
from minicpm_tune.models.batch_layout import SampleLayout


def balance_losses(router_logits: Sequence[Tensor], samples: SampleLayout, *, per_token: int) -> Tensor:
    """How unevenly each sample uses the experts, over all layers.

    Args:
        router_logits: L times [N, E], every layer's logits of its router.
        samples: The samples.
        per_token: K.

    Returns:
        [S] fp32: E times the sum over experts of (share of tokens sent there) x (mean probability); K where all
        experts are used alike.
    """
    experts = router_logits[0].shape[-1]
    of_token = samples.sample_of_token
    sent = torch.zeros(len(samples.samples), experts, device=of_token.device)
    likely = torch.zeros_like(sent)
    for logits in router_logits:
        chances = logits.float().softmax(dim=-1)
        chosen = chances.topk(per_token, dim=-1).indices
        # Each choice of a token is one more for its sample's count.
        places = of_token[:, None] * experts + chosen
        sent = sent.view(-1).index_add(
            0, places.view(-1), torch.ones_like(chances[:, :1]).expand_as(chosen).reshape(-1)
        )
        sent = sent.view(-1, experts)
        likely = likely.index_add(0, of_token, chances)
    rows = torch.tensor(samples.samples, dtype=torch.float32).to(of_token.device, non_blocking=True)
    rows = len(router_logits) * rows[:, None]
    return experts * (sent / rows * (likely / rows)).sum(dim=-1)


def sample_weights(labels: Tensor, samples: SampleLayout, places: Any = None, weights: Any = None) -> Tensor:
    """How much each sample counts in the loss: the sum of the weights of its supervised tokens.

    Args:
        labels: [B, T], -100 where a token is not supervised.
        samples: The samples. Nothing predicts the first token of a sample, so it never counts.
        places: ``supervised`` of ``batch.Batch``; needed with ``weights`` alone.
        weights: ``loss_weights`` of ``batch.Batch``; None: every token counts 1.

    Returns:
        [S] fp32.
    """
    sums = torch.zeros(len(samples.samples), device=labels.device)
    if weights is None:
        supervised = (samples.take(labels) != IGNORE_INDEX) & (samples.positions > 0)
        return sums.index_add(0, samples.sample_of_token, supervised.float())
    targets = torch.from_numpy(places).to(labels.device, non_blocking=True) + 1
    of_target = samples.sample_of_token[samples.rank(targets)]
    return sums.index_add(0, of_target, torch.from_numpy(weights).to(labels.device, non_blocking=True))
