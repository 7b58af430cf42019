"""Losses that two methods or more share. All are means over the local rows; what they compare with is global."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """−cos, mean over the rows: (N, D) twice. ‖p̂ − ẑ‖² is 2 + 2 times this. Gradients flow into both."""
    return -F.cosine_similarity(predictions.float(), targets.float(), dim=-1).mean()


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A query's own key among shared negatives (MoCo, eq. 1): queries, keys (B, D), negatives (K, D), unit vectors.

    Returns the cross-entropy over 1 + K, the key first, mean over the queries, and the share of keys that rank first.
    """
    with torch.autocast(queries.device.type, enabled=False):  # similarities / τ need float32
        queries = queries.float()
        own = (queries * keys.float()).sum(1, keepdim=True)
        logits = torch.cat([own, queries @ negatives.float().T], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target), (logits.detach().argmax(1) == 0).float().mean()


def nt_xent(first: Tensor, second: Tensor, temperature: float, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """NT-Xent (eq. 1) of the local anchors against the global batch.

    first, second: (B, D) projections of the two views, normalised here unless told not to. Returns the mean over the
    2·B local anchors (the official code returns the sum of the two per-view means: twice this value) and the share of
    anchors whose positive ranks first. The gather carries gradients: the mean over ranks is the single-process loss.
    """
    logits, positive = contrastive_logits(first, second, temperature, normalise)
    accuracy = (logits.detach().argmax(1) == positive).float().mean()
    return F.cross_entropy(logits, positive), accuracy


def contrastive_logits(
    first: Tensor, second: Tensor, temperature: float, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Similarities / τ of the 2·B local anchors to the 2·W·B global keys, an anchor to itself at −∞: (2·B, 2·W·B).

    Rows and columns are view-major; also returns the column of each anchor's positive, (2·B,).
    """
    if len(first) * distributed.world_size() < 2:
        raise ValueError("NT-Xent has no negatives in a global batch of one image")
    anchors = torch.stack([first.float(), second.float()])  # (2, B, D)
    anchors = F.normalize(anchors, dim=-1) if normalise else anchors
    batch = anchors.shape[1]
    keys = torch.cat([distributed.gather_with_grad(view) for view in anchors])  # (2·W·B, D)
    with torch.autocast(first.device.type, enabled=False):  # similarities / τ need float32
        logits = anchors.flatten(0, 1) @ keys.T / temperature
    rows = torch.arange(batch, device=logits.device) + distributed.rank() * batch
    total = batch * distributed.world_size()
    itself, positive = torch.cat([rows, rows + total]), torch.cat([rows + total, rows])
    return logits.scatter(1, itself[:, None], float("-inf")), positive
