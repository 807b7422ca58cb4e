"""The loss, computed only where there are labels and never as one [tokens, vocabulary] tensor.

Below it the loss that balances a mixture's experts. Letters: N supervised tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from minicpm_tune.batch import IGNORE_INDEX, NewFeatures
from minicpm_tune.models.autocast import autocast_dtype
from minicpm_tune.models.batch_layout import SampleLayout

# Logits of one chunk, in elements: 2**26 is 256 MiB in fp32 (442 tokens at a vocabulary of 151,748).
CHUNK_ELEMENTS = 2**26
# What the largest slope of a token's logits is brought to before they are rounded to fp16: their products with the
# output layer's weights stay below fp16's largest number, 65,504, for weights up to 32.
FP16_LARGEST = 2.0**10
FP32_STEP = 2.0**-24  # below it, the slope of a nearly sure prediction is 0 in fp32


@dataclass
class MiniCPMVOutput(ModelOutput):
    """What a forward gives; all but ``logits`` with labels alone.

    Attributes:
        loss: ``loss_sum / weight_sum``, or ``loss_sum / num_items_in_batch``. Of a mixture of experts it can hold more,
            see ``of``.
        logits: [B, T, V]. Without labels only.
        loss_sum: fp32 scalar, the SUM of the supervised tokens' cross entropies, in nats, each times its weight.
        weight_sum: fp32 scalar, the sum of the weights; without weights the number of tokens.
        token_count: int64 scalar, how many tokens were supervised.
        correct_count: int64 scalar, how many of them the most likely token got right.
        token_losses: [N] fp32, each supervised token's cross entropy, without a gradient; for reports.
        new_features: What the vision tower gave for the pictures that were not cached. With
            ``--cache_vision_features``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    token_count: Tensor | None = None
    correct_count: Tensor | None = None
    token_losses: Tensor | None = None
    new_features: NewFeatures | None = None

    @classmethod
    def of(
        cls,
        found: MiniCPMVOutput,
        num_items_in_batch: Tensor | int | None,
        new_features: NewFeatures | None = None,
        *,
        balance: Tensor | None = None,
    ) -> MiniCPMVOutput:
        """Make the output of a forward with labels.

        Args:
            found: The sums of the batch, from ``supervised_loss``.
            num_items_in_batch: What they are divided by; None: the batch's own sum of weights.
            new_features: See the class.
            balance: A mixture of experts: what ``loss`` holds beside the cross entropies, summed as they are.
        """
        assert found.loss_sum is not None, "the sums come from supervised_loss"
        whole = found.weight_sum if num_items_in_batch is None else num_items_in_batch
        whole = torch.as_tensor(whole, device=found.loss_sum.device)
        total = found.loss_sum if balance is None else found.loss_sum + balance
        loss = total / torch.where(whole == 0, 1, whole)  # a sum of weights may be below 1
        return replace(found, loss=loss, new_features=new_features)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear head that computes its gradient chunk by chunk in the forward.

    Only one chunk of logits is alive at a time, and the backward needs no second pass over the vocabulary. The
    weight's gradient is summed over the chunks in fp32. In fp16 all gradients stay fp32 until the backward has
    multiplied them by the loss scale: those of a model that is nearly sure are below fp16's smallest number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        narrow = (autocast_dtype(hidden.device) or weight.dtype) == torch.float16
        inputs: tuple[Any, ...] = (hidden, weight, bias)
        needed = [given if need else None for given, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        ctx.dtypes = [None if given is None else given.dtype for given in needed]
        grads: list[Any] = [None] * 3
        for index, given in enumerate(needed):
            if given is not None:
                wide = narrow or given is not hidden
                grads[index] = torch.zeros_like(given, dtype=torch.float32 if wide else None)
        token_losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part, target = hidden[rows], labels[rows]
            logits = F.linear(part, weight, bias).float()
            correct += (logits.argmax(dim=-1) == target).sum()
            log_sum = torch.logsumexp(logits, dim=-1)
            token_losses[rows] = log_sum - logits.gather(-1, target[:, None])[:, 0]
            if not any(ctx.dtypes):
                continue
            # d loss_sum / d logits = softmax - one-hot, written over the logits themselves.
            slope = logits.sub_(log_sum[:, None]).exp_()
            slope.scatter_add_(-1, target[:, None], slope.new_full((target.numel(), 1), -1.0))
            own = None if token_weights is None else token_weights[rows, None]
            _add_gradients(
                [None if grads[0] is None else grads[0][rows], *grads[1:]], slope, part, weight, own, narrow
            )
        ctx.grads = grads if narrow else _cast(grads, ctx.dtypes)
        ctx.mark_non_differentiable(correct, token_losses)
        weighted = token_losses if token_weights is None else token_losses * token_weights
        return weighted.sum(), correct, token_losses

    @staticmethod
    def backward(ctx: Any, loss_slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place: the gradient of an 8B model's output layer is a gibibyte.
        grads = _cast([None if grad is None else grad.mul_(loss_slope) for grad in ctx.grads], ctx.dtypes)
        ctx.grads = (None, None, None)
        return (*grads, None, None, None)


def _cast(grads: list[Any], dtypes: list[Any]) -> list[Any]:
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _add_gradients(
    grads: list[Any], slope: Tensor, part: Tensor, weight: Tensor, token_weights: Tensor | None, narrow: bool
) -> None:
    """Add a chunk's share to the gradients of its hidden states [n, D], of weight and bias (None: not needed).

    ``slope`` is [n, V] fp32, the slopes of the logits, and is overwritten; ``part`` [n, D] are the hidden states,
    ``token_weights`` [n, 1] or None. ``narrow``: products are computed in fp16.
    """
    hidden_grad, weight_grad, bias_grad = grads
    if narrow and hidden_grad is not None:  # before the tokens' weights, which have no limit
        # The label's slope is the only one below 0, and the largest.
        scale = FP16_LARGEST / (-slope.amin(dim=-1, keepdim=True)).clamp(min=FP32_STEP)
        hidden_grad.copy_((slope * scale).to(torch.float16) @ weight)
        hidden_grad.mul_(1 / scale if token_weights is None else token_weights / scale)
    if token_weights is not None:
        slope.mul_(token_weights)
    if bias_grad is not None:
        bias_grad += slope.sum(dim=0)
    if narrow:
        if weight_grad is not None:
            weight_grad.addmm_(slope.t(), part.float())
        return
    rounded = slope.to(part.dtype)
    if hidden_grad is not None:
        hidden_grad.copy_(rounded @ weight)
    if weight_grad is not None:
        weight_grad += rounded.t() @ part


class LMHead(nn.Linear):
    """An output layer that can return the loss instead of the logits.

    It is called once per forward, however many chunks there are: under ZeRO-3 each call of a module is a
    collective, and ranks have different numbers of supervised tokens.
    """

    def forward(  # type: ignore[override]  # more than a Linear's
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        chunk: int | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute logits, or the loss of the tokens in ``labels``.

        With labels it returns a plain tuple: DeepSpeed attaches the gathering of the weight for the backward to
        the tensors of a tuple, and looks into no other kind of object.

        Args:
            hidden: [N, D] (with labels) or [..., D], float.
            labels: [N] int64 token ids, every one supervised; or None for logits.
            chunk: Tokens per chunk; by default as many as fill ``CHUNK_ELEMENTS`` logits.
            token_weights: [N] fp32, what each token's cross entropy is multiplied by in the sum; None: 1.

        Returns:
            [..., V] logits in the dtype of ``hidden``; or the fp32 weighted sum of the tokens' cross entropies in
            nats, the int64 number of tokens predicted right, and [N] fp32 each token's cross entropy.
        """
        if autocast_dtype(hidden.device) is None:
            hidden = hidden.to(self.weight.dtype)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if chunk is None:
            chunk = max(1, CHUNK_ELEMENTS // self.out_features)
        return _ChunkedCrossEntropy.apply(hidden, self.weight, self.bias, labels, chunk, token_weights)


def supervised_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, places: Any = None, weights: Any = None
) -> MiniCPMVOutput:
    """Compute the loss of the positions that predict a supervised token.

    Args:
        head: The output layer, an ``LMHead`` possibly wrapped by an adapter.
        hidden: [B, T, D] last hidden states.
        labels: [B, T] int64, token id or -100; position t is predicted from position t - 1.
        places: [N] numpy int64, the flattened positions whose next token is supervised, as
            ``supervised`` in ``batch.Batch`` holds them. Without it they are searched for, and on a GPU the
            program waits for the result.
        weights: [N] numpy float32, ``loss_weights`` in ``batch.Batch``; None: all tokens count alike.

    Returns:
        The sums over the batch; ``MiniCPMVOutput.of`` divides them.
    """
    if places is None:
        supervised = labels[:, 1:] != IGNORE_INDEX
        chosen, targets = hidden[:, :-1][supervised], labels[:, 1:][supervised]
    else:
        index = torch.from_numpy(places).to(hidden.device, non_blocking=True)
        chosen, targets = hidden.flatten(0, 1)[index], labels.flatten()[index + 1]
    if weights is not None:
        weights = torch.from_numpy(weights).to(hidden.device, non_blocking=True)
    loss_sum, correct, token_losses = head(chosen, labels=targets, token_weights=weights)
    return MiniCPMVOutput(
        loss_sum=loss_sum,
        weight_sum=torch.full_like(loss_sum, targets.numel()) if weights is None else weights.sum(),
        token_count=torch.full_like(correct, targets.numel()),
        correct_count=correct,
        token_losses=token_losses,
    )


def as_lm_head(linear: Any) -> LMHead:
    """Turn the output layer of a transformers LLM into an ``LMHead`` with the same parameters.

    The module's class is changed in place, so that weight tying and ZeRO-3's partitioning, both done when the layer
    was created, stay as they are.
    """
    linear.__class__ = LMHead
    return linear


def balance_losses(router_logits: Sequence[Tensor], samples: SampleLayout, *, per_token: int) -> Tensor:
    """How unevenly each sample uses the experts, over all layers (MiniCPM-V 4.7-35B-A3B).

    transformers adds it where config.json says so: ``output_router_logits`` and ``router_aux_loss_coef`` in
    ``text_config``. It computes one value per batch, and the value depends on which samples share it: their tokens
    are counted together, and padding with them. Here every sample has its own value, as if it were the batch, so
    that packing, batches and processes change nothing; and it is weighted as the sample's cross entropy is.

    Source: "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
    (arXiv:2101.03961), equations 4 to 6; transformers 5.23, ``load_balancing_loss_func``.
    Letters: L layers, N tokens of all samples, S samples, E experts, K experts that a token is sent to.

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
        chosen = torch.zeros_like(chances).scatter_(1, chances.topk(per_token, dim=-1).indices, 1)
        sent = sent.index_add(0, of_token, chosen)
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
