"""Nearest neighbours: the kNN classifier of DINO's evaluation and cross-set retrieval. Pure functions of features.

On the features' own device, in blocks of the bank and chunks of queries: the bank is never copied. By default the
answer is float32's, and the same however the rows tie.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.data.classes import UNLABELED, class_value, in_order, names_of

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16")
_CHUNK_ELEMENTS = 2**25  # similarities held at once (float32: 128 MiB)
_SMALL = 8192  # rows of a bank that is not worth screening
# A block of the bank is converted at once; its parts, its groups and the queries compared with it are sized for caches
_BLOCK, _PART, _GROUP, _QUERIES = 65536, 16384, 16, 256
_SPLIT = 3  # bfloat16 numbers that add up to a float32 one


def as_features(features, name: str = "features") -> Tensor:
    """`features` as a detached float32 (N, D) tensor; ValueError if they are empty, not 2-D or not finite."""
    features = torch.as_tensor(features).detach().float()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must have shape (N, D) with N and D at least 1, got {tuple(features.shape)}.")
    finite = torch.cat([block.isfinite().all(dim=1) for block in features.split(_BLOCK)])  # no mask of its size
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
    """Labels as class numbers: (train (N,), test (M,), classes by name). A test label unknown to train is -1."""
    train_names, test_names = (names_of(labels_list(labels)) for labels in (train, test))
    classes = in_order(name for name in train_names if name is not None)
    number = {name: i for i, name in enumerate(classes)}
    numbers = ([-1 if name is None else number.get(name, -1) for name in names] for names in (train_names, test_names))
    train_numbers, test_numbers = (torch.tensor(each, dtype=torch.long) for each in numbers)
    return train_numbers, test_numbers, classes


def labels_list(labels: Sequence[Hashable] | Tensor) -> list:
    return labels.tolist() if isinstance(labels, Tensor) else list(labels)


def labelled(
    features: Tensor, labels: Sequence[Hashable] | Tensor, name: str
) -> tuple[Tensor, Sequence[Hashable] | Tensor, Tensor | None]:
    """(features, labels, rows): those of the rows that have a label, as if there were no others; rows None: all have.

    None, NaN, -1 and empty text are no label. ValueError where nothing is left; `name`: what it calls the features.
    """
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        keep = (labels != UNLABELED).cpu()
    else:
        keep = torch.tensor([class_value(value) is not None for value in labels_list(labels)], dtype=torch.bool)
    if keep.all():
        return features, labels, None
    if not keep.any():
        raise ValueError(f"No row of {name} has a label.")
    rows = keep.nonzero()[:, 0]
    chosen = labels[rows] if isinstance(labels, Tensor) else [labels[i] for i in rows.tolist()]
    return features[rows.to(features.device)], chosen, rows


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """The `k` rows of `bank` (N, D) with the highest cosine similarity to each row of `queries` (M, D), k <= N.

    Returns (similarities, rows), each (M, k), best first; equal similarities are ordered by row of the bank. Beside
    the bank, which is not copied, about 300 MB are needed whatever N is.

    precision "fp32" is exact. Where the processor multiplies bfloat16 fast, a first pass in it picks the candidates
    and float32 ranks them; a query whose candidates cannot be proven to hold all k neighbours is done in float32
    throughout. "bf16" stops after the first pass: similarities to about 3 digits, neighbours nearly so. Banks of a few
    thousand rows are always done in float32. Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    queries = F.normalize(queries.to(bank.device), dim=1)
    length = torch.cat([block.norm(dim=1) for block in bank.split(_BLOCK)]).clamp_min(1e-12)
    kept = k if precision == "bf16" else k + k // 2 + 64
    if min(len(bank), _BLOCK // 2) < max(_SMALL, 2 * _GROUP * kept):
        return _exhaustive(queries, bank, length, k)
    dtype = torch.bfloat16 if precision == "bf16" or _fast_bf16(bank.device) else torch.float32
    guess, rows, error = _screen(queries, bank, length, kept, dtype)
    if precision == "bf16":
        return _in_order(guess, rows, k)
    similarities, rows, sure = _rescore(queries, bank, length, guess, rows, error, k)
    if not sure.all():
        similarities[~sure], rows[~sure] = _exhaustive(queries[~sure], bank, length, k)
    return similarities, rows


def _fast_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return False  # a GPU's float32 is fast enough, and its bfloat16 sums have no bound that could be proven
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _exhaustive(queries: Tensor, bank: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` from all similarities in float32; `length` (N,) holds the norms of the bank's rows."""
    similarities, rows = [], []
    for chunk in queries.split(max(1, _CHUNK_ELEMENTS // len(bank))):
        similarity = (chunk @ bank.T).div_(length)
        top, index = similarity.topk(min(k + 1, len(bank)), dim=1)
        if k < len(bank):
            # topk leaves the choice among equals open: where the k-th has an equal behind it, the lower rows win
            shared = top[:, k - 1] == top[:, k]
            last, some = top[shared, k - 1, None], similarity[shared]
            above, equal = some > last, some == last
            chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
            top, index = top[:, :k], index[:, :k].clone()
            index[shared] = chosen.nonzero()[:, 1].view(-1, k)
            top = similarity.gather(1, index)
        top, index = _in_order(top, index, k)
        similarities.append(top)
        rows.append(index)
    return torch.cat(similarities), torch.cat(rows)


def _in_order(similarity: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first `k` of each line, best first, equals by row."""
    top, order = similarity.sort(dim=1, descending=True)
    index = rows.gather(1, order)
    tied = (top[:, 1:] == top[:, :-1]).any(dim=1)
    if tied.any():
        order = rows[tied].argsort(dim=1)
        best = similarity[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
        index[tied] = rows[tied].gather(1, order).gather(1, best.indices)
    return top[:, :k], index[:, :k]


def _screen(
    queries: Tensor, bank: Tensor, length: Tensor, kept: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The `kept` rows of the bank that look most similar in `dtype`: (similarities, rows), (M, kept), and the most by
    which those of each query may be wrong (M, 1).

    What is multiplied is (query - centre) (row - centre), shorter vectors whose rounding harms less; centre (row -
    centre) comes in as three more columns, and query centre, equal for all rows, is added at the end.
    """
    blocks = -(-len(bank) // _BLOCK)
    size = -(-len(bank) // blocks)
    sums = [(1 / length[i : i + size]) @ bank[i : i + size] for i in range(0, len(bank), size)]
    centre = torch.stack(sums).sum(0) / len(bank)
    centred = queries - centre
    low = torch.cat([centred, centred.new_ones(len(queries), _SPLIT)], dim=1).to(dtype)
    values = queries.new_full((len(queries), kept), -torch.inf)
    rows = torch.zeros(len(queries), kept, dtype=torch.long, device=bank.device)
    radius = torch.zeros((), device=bank.device)
    for start in range(0, len(bank), size):
        parts, longest = _parts(bank[start : start + size], length[start : start + size], centre, dtype)
        radius = torch.maximum(radius, longest)
        count = min(size, len(bank) - start)
        for i in range(0, len(queries), _QUERIES):
            found, index = _best_of(low[i : i + _QUERIES], parts, count, kept)
            if start:
                found = torch.cat([values[i : i + _QUERIES], found], dim=1)
                index = torch.cat([rows[i : i + _QUERIES], index + start], dim=1)
                found, order = found.topk(kept, dim=1)
                index = index.gather(1, order)
            values[i : i + _QUERIES], rows[i : i + _QUERIES] = found, index
    # products of two rounded vectors (Cauchy-Schwarz), the sum over D in float32, the rounded result
    unit = 2**-8 if dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest" else 2**-22
    error = radius * (1.01 * unit * centred.norm(dim=1, keepdim=True) + bank.shape[1] * 2**-22)
    error = error + unit * values[:, [0, -1]].abs().amax(dim=1, keepdim=True)
    return values + (queries @ centre)[:, None], rows, error


def _parts(block: Tensor, length: Tensor, centre: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The centred unit rows of `block` as (parts, rows, D + 3), padded with zeros, and the longest row's norm."""
    count = -(-len(block) // _PART)
    rows = -(-len(block) // (count * _GROUP)) * _GROUP
    parts = torch.zeros(count * rows, block.shape[1] + _SPLIT, dtype=dtype, device=block.device)
    longest = []
    for start in range(0, len(block), rows):
        unit = (block[start : start + rows] / length[start : start + rows, None]).sub_(centre)
        longest.append(unit.norm(dim=1).max())
        part = parts[start : start + len(unit)]
        part[:, :-_SPLIT] = unit
        rest = unit @ centre
        for column in range(-_SPLIT, 0):  # the rest of the rest: together they keep float32's digits
            part[:, column] = rest
            rest = rest - part[:, column]
    return parts.view(count, rows, -1), torch.stack(longest).max()


def _best_of(queries: Tensor, parts: Tensor, count: int, kept: int) -> tuple[Tensor, Tensor]:
    """The `kept` most similar of the first `count` rows of `parts` to each query, and their row numbers.

    Only the best of each group of rows takes part in a first choice: the `kept` best groups hold the `kept` best rows.
    """
    (pieces, size, _), m = parts.shape, len(queries)
    groups = size // _GROUP
    values = queries.new_empty(pieces, m, size)
    best = queries.new_empty(m, pieces, groups)
    for i, part in enumerate(parts):
        torch.mm(queries, part.T, out=values[i])
        values[i, :, max(0, count - i * size) :] = -torch.inf
        best[:, i] = values[i].view(m, _GROUP, groups).amax(dim=1)
    chosen = best.view(m, -1).topk(kept, dim=1, sorted=False).indices
    piece, group = chosen // groups, chosen % groups
    within = group[:, :, None] + groups * torch.arange(_GROUP, device=queries.device)
    line = piece * m + torch.arange(m, device=queries.device)[:, None]
    # index_select: a sixth of the time of indexing with a tensor
    found = values.view(-1).index_select(0, (within + line[:, :, None] * size).flatten())
    top, order = found.view(m, -1).topk(kept, dim=1)
    return top.float(), (within + piece[:, :, None] * size).flatten(1).gather(1, order)


def _rescore(
    queries: Tensor, bank: Tensor, length: Tensor, guess: Tensor, rows: Tensor, error: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` best candidates by float32 similarity: (similarities, rows, sure); sure (M,): none can be missing."""
    similarities, found, sure = [], [], []
    step = 4 if bank.device.type == "cpu" else _QUERIES  # what is gathered should fit the cache

    def score(i: int, columns: slice) -> Tensor:
        # summed pair by pair, never by a matrix product: equal rows of the bank must get equal similarities
        picked = rows[i : i + step, columns]
        pairs = bank.index_select(0, picked.flatten()).view(*picked.shape, bank.shape[1])
        return pairs.mul_(queries[i : i + step, None]).sum(dim=2).div_(length[picked])

    for start in range(0, len(rows), _QUERIES):
        chunk = slice(start, start + _QUERIES)
        steps = range(start, min(start + _QUERIES, len(rows)), step)
        first = torch.cat([score(i, slice(k)) for i in steps])
        # k rows are at least as similar as the least of the first k: what cannot reach that is out
        needed = (guess[chunk] >= first.amin(dim=1, keepdim=True) - error[chunk]).sum(dim=1)
        sure.append(needed < guess.shape[1])
        rest = guess.new_full((len(first), guess.shape[1] - k), -torch.inf)
        widths = torch.where(sure[-1], needed, k).tolist()
        for i in steps:
            width = max(widths[i - start : i - start + step])
            rest[i - start : i - start + step, : width - k] = score(i, slice(k, width))
        top, index = _in_order(torch.cat([first, rest], dim=1), rows[chunk], k)
        similarities.append(top)
        found.append(index)
    return torch.cat(similarities), torch.cat(found), torch.cat(sure)


@cache  # a table measures several models with one bank
def _say_clamped(rows: int, ks: tuple[int, ...]) -> None:
    if ks:
        asked = ", ".join(map(str, ks))
        logger.warning("kNN: the bank has %d rows, so k is %d where %s was asked.", rows, rows, asked)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Sequence[Hashable] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[Hashable] | Tensor,
    k: int | Sequence[int] = (20, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    precision: str = "fp32",
    fill: bool = False,
) -> dict[str, float]:
    """Weighted kNN accuracy by DINO's rule: cosine similarity, each neighbour votes exp(similarity / temperature).

    train_features (N, D) and test_features (M, D) may have any length and are not copied; `precision`: see `nearest`.
    Labels are N and M class numbers, or N and M names or numbers when `num_classes` is None (3 and "3" are one class).
    Rows without a label (None, NaN, -1, "") are as if they were not there, on both sides; a test label that no
    training row has counts as wrong.
    Returns {"knn20_top1": fraction, "knn20_top5": fraction, ...} for every k. Top-5 looks at min(5, k, classes) ranks,
    and a class that no neighbour voted for has none. With `fill` such classes take the ranks that are left, in the
    order in which torch.sort leaves them: DINO's own code, whose top-5 is higher by chance where classes are few.
    A k above N is clamped to N and the key keeps the k asked for. Equal votes go to the lower class number. Raises
    ValueError for mismatched sizes, bad k, bad temperature, NaN features or a side without any label.
    """
    bank = as_features(train_features, "train_features")
    queries = as_features(test_features, "test_features").to(bank.device)
    for count, labels, side in ((len(bank), train_labels, "train"), (len(queries), test_labels, "test")):
        if len(labels) != count:
            raise ValueError(f"{count} {side} features came with {len(labels)} {side} labels.")
    bank, train_labels, _ = labelled(bank, train_labels, "train_features")
    queries, test_labels, _ = labelled(queries, test_labels, "test_features")
    bank_labels, truth, num_classes = _class_numbers(train_labels, test_labels, num_classes)
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
    _say_clamped(len(bank), tuple(wanted for wanted in ks if wanted > len(bank)))

    correct = {wanted: [0, 0] for wanted in ks}
    similarities, neighbours = nearest(queries, bank, min(max(ks), len(bank)), precision)
    step = max(1, _CHUNK_ELEMENTS // (4 * num_classes))
    for start in range(0, len(queries), step):
        rows, similarity = neighbours[start : start + step], similarities[start : start + step]
        weight = ((similarity - 1) / temperature).double().exp()  # the -1 cancels in the ranking and cannot overflow
        target = truth[start : start + step, None]
        for wanted in ks:
            votes = weight.new_zeros(len(rows), num_classes)
            named = bank_labels[rows[:, :wanted]]
            votes.scatter_add_(1, named, weight[:, :wanted])
            if fill:
                ranking = votes.float().sort(1, True).indices[:, : min(5, wanted, num_classes)]
                hit = ranking == target
            else:
                ranking = votes.argsort(dim=1, descending=True, stable=True)[:, : min(5, wanted, num_classes)]
                voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, named, True)
                hit = (ranking == target) & voted.gather(1, ranking)
            correct[wanted][0] += int(hit[:, 0].sum())
            correct[wanted][1] += int(hit.sum())
    result = {}
    for wanted, (top1, top5) in correct.items():
        result[f"knn{wanted}_top1"] = top1 / len(queries)
        result[f"knn{wanted}_top5"] = top5 / len(queries)
    return result


def _class_numbers(train, test, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
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

    query (M, D), gallery (N, D), ids: names or numbers. Rows without one (None, NaN, -1, "") are as if they were not
    there. Queries whose id the gallery lacks cannot be answered: they are left out and counted in the log. Equal
    similarities go to the lower gallery row.
    Returns {"r1": fraction, "r5": fraction}. Raises ValueError for mismatched sizes or when no query can be answered.
    """
    queries, items = as_features(query, "query"), as_features(gallery, "gallery")
    if len(query_ids) != len(queries) or len(gallery_ids) != len(items):
        raise ValueError(
            f"{len(queries)} queries and {len(items)} gallery items came with "
            f"{len(query_ids)} and {len(gallery_ids)} ids."
        )
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be positive whole numbers, got {k}.")
    queries, query_ids, _ = labelled(queries, query_ids, "query")
    items, gallery_ids, _ = labelled(items, gallery_ids, "gallery")
    gallery_numbers, query_numbers, _ = encode_labels(gallery_ids, query_ids)
    answerable = query_numbers >= 0
    if not answerable.any():
        raise ValueError("No query id occurs among gallery_ids: are both sides from the same set of items?")
    if not answerable.all():
        logger.warning("Retrieval: %d of %d queries have no counterpart.", int((~answerable).sum()), len(queries))
    _, rows = nearest(queries[answerable.to(queries.device)], items, min(max(ks), len(items)))
    hit = gallery_numbers[rows.cpu()] == query_numbers[answerable][:, None]
    return {f"r{wanted}": hit[:, :wanted].any(dim=1).double().mean().item() for wanted in ks}
