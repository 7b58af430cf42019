"""Nearest neighbours: the kNN classifier of DINO's evaluation and cross-set retrieval. Pure functions of features.

Everything is float32 on the features' own device, in chunks of queries, and gives the same answer however the rows
tie.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 2**25  # similarities held at once (float32: 128 MiB)


def as_features(features, name: str = "features") -> Tensor:
    """`features` as a detached float32 (N, D) tensor; ValueError if they are empty, not 2-D or not finite."""
    features = torch.as_tensor(features).detach().float()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must have shape (N, D) with N and D at least 1, got {tuple(features.shape)}.")
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"{name} hold NaN or infinity in {int((~finite).sum())} of {len(features)} rows (first: row {first}). "
            "Run the model in float32 (float16 overflows) or use an earlier checkpoint."
        )
    return features


def encode_labels(
    train: Sequence[Hashable] | Tensor, test: Sequence[Hashable] | Tensor
) -> tuple[Tensor, Tensor, list]:
    """Labels of any type as class numbers: (train (N,), test (M,), classes). A test label unknown to train is -1."""
    train_values, test_values = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (train, test))
    classes = sorted(set(train_values), key=lambda value: (str(type(value)), value))
    number = {value: i for i, value in enumerate(classes)}
    return (
        torch.tensor([number[v] for v in train_values], dtype=torch.long),
        torch.tensor([number.get(v, -1) for v in test_values], dtype=torch.long),
        classes,
    )


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` rows of `bank` (N, D) most similar to each row of `queries` (M, D), both unit vectors.

    Returns (similarities, rows), each (M, k), best first; equal similarities are ordered by row of the bank.
    """
    queries = queries.to(bank.device)
    similarities, rows = [], []
    for chunk in queries.split(max(1, _CHUNK_ELEMENTS // len(bank))):
        similarity = chunk @ bank.T
        top, index = similarity.topk(k, dim=1)
        # topk leaves the choice among equals open; only rows whose k-th value is shared need the slow stable sort
        shared = (similarity >= top[:, -1:]).sum(dim=1) > k
        if shared.any():
            ordered = similarity[shared].sort(dim=1, descending=True, stable=True)
            top[shared], index[shared] = ordered.values[:, :k], ordered.indices[:, :k]
        order = index.argsort(dim=1)
        top, index = top.gather(1, order), index.gather(1, order)
        order = top.argsort(dim=1, descending=True, stable=True)
        similarities.append(top.gather(1, order))
        rows.append(index.gather(1, order))
    return torch.cat(similarities), torch.cat(rows)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Sequence[Hashable] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[Hashable] | Tensor,
    k: int | Sequence[int] = (20, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> dict[str, float]:
    """Weighted kNN accuracy by DINO's rule: cosine similarity, each neighbour votes exp(similarity / temperature).

    train_features (N, D) and test_features (M, D) are normalised here; labels are N and M class numbers, or N and M
    values of any hashable type when `num_classes` is None. A test label that no training row has counts as wrong.
    Returns {"knn20_top1": fraction, "knn20_top5": fraction, ...} for every k. Top-5 looks at min(5, k, classes) ranks:
    k neighbours name at most k classes. A k above N is clamped to N and the key keeps the k asked for.
    Equal votes go to the lower class number. Raises ValueError for mismatched sizes, bad k, bad temperature or NaN
    features.
    """
    bank = F.normalize(as_features(train_features, "train_features"), dim=1)
    queries = F.normalize(as_features(test_features, "test_features"), dim=1).to(bank.device)
    bank_labels, truth, num_classes = _class_numbers(train_labels, test_labels, num_classes, len(bank), len(queries))
    bank_labels, truth = bank_labels.to(bank.device), truth.to(bank.device)
    ks = [k] if isinstance(k, int) else list(k)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"train_features have {bank.shape[1]} columns and test_features {queries.shape[1]}: same model?"
        )
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be positive whole numbers, got {k}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if max(ks) > len(bank):
        logger.warning("kNN: the bank has %d rows, so k is %d where more was asked (%s).", len(bank), len(bank), ks)

    correct = {wanted: [0, 0] for wanted in ks}
    step = max(1, _CHUNK_ELEMENTS // max(len(bank), num_classes))
    for start in range(0, len(queries), step):
        similarity, rows = nearest(queries[start : start + step], bank, min(max(ks), len(bank)))
        weight = ((similarity - 1) / temperature).double().exp()  # the -1 cancels in the ranking and cannot overflow
        target = truth[start : start + step, None]
        for wanted in ks:
            votes = weight.new_zeros(len(rows), num_classes)
            votes.scatter_add_(1, bank_labels[rows[:, :wanted]], weight[:, :wanted])
            ranking = votes.argsort(dim=1, descending=True, stable=True)
            hit = ranking[:, : min(5, wanted, num_classes)] == target
            correct[wanted][0] += int(hit[:, 0].sum())
            correct[wanted][1] += int(hit.sum())
    result = {}
    for wanted, (top1, top5) in correct.items():
        result[f"knn{wanted}_top1"] = top1 / len(queries)
        result[f"knn{wanted}_top5"] = top5 / len(queries)
    return result


def _class_numbers(train, test, num_classes: int | None, n: int, m: int) -> tuple[Tensor, Tensor, int]:
    if len(train) != n or len(test) != m:
        raise ValueError(f"{n} train and {m} test features came with {len(train)} train and {len(test)} test labels.")
    if num_classes is None:
        train_numbers, test_numbers, classes = encode_labels(train, test)
        return train_numbers, test_numbers, len(classes)
    train_numbers, test_numbers = torch.as_tensor(train).long(), torch.as_tensor(test).long()
    if int(train_numbers.min()) < 0 or int(train_numbers.max()) >= num_classes:
        low, high = int(train_numbers.min()), int(train_numbers.max())
        raise ValueError(f"train_labels run from {low} to {high}, but num_classes is {num_classes}.")
    return train_numbers, test_numbers, num_classes


def retrieval_recall(
    query: Tensor,
    gallery: Tensor,
    query_ids: Sequence[Hashable] | Tensor,
    gallery_ids: Sequence[Hashable] | Tensor,
    k: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Recall@k: the fraction of queries with an item of the same id among their k most similar gallery items (cosine).

    query (M, D), gallery (N, D), ids of any hashable type. Queries whose id the gallery lacks cannot be answered: they
    are left out and counted in the log. Equal similarities go to the lower gallery row.
    Returns {"r1": fraction, "r5": fraction}. Raises ValueError for mismatched sizes or when no query can be answered.
    """
    queries = F.normalize(as_features(query, "query"), dim=1)
    items = F.normalize(as_features(gallery, "gallery"), dim=1)
    if len(query_ids) != len(queries) or len(gallery_ids) != len(items):
        raise ValueError(
            f"{len(queries)} queries and {len(items)} gallery items came with "
            f"{len(query_ids)} and {len(gallery_ids)} ids."
        )
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be positive whole numbers, got {k}.")
    gallery_numbers, query_numbers, _ = encode_labels(gallery_ids, query_ids)
    answerable = query_numbers >= 0
    if not answerable.any():
        raise ValueError("No query id occurs among gallery_ids: are both sides from the same set of items?")
    if not answerable.all():
        logger.warning("Retrieval: %d of %d queries have no counterpart.", int((~answerable).sum()), len(queries))
    _, rows = nearest(queries[answerable.to(queries.device)], items, min(max(ks), len(items)))
    hit = gallery_numbers[rows.cpu()] == query_numbers[answerable][:, None]
    return {f"r{wanted}": hit[:, :wanted].any(dim=1).double().mean().item() for wanted in ks}
