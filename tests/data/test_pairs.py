"""Labelled and unlabelled images as one stream: in lock step, resumable, shared out exactly, labels true."""

import itertools
from collections import Counter
from functools import cache

import datasets
import numpy as np
import pytest
import torch

from hf_ssl.data import ImageSource, PairCollator, PairStream, build_dataloader, draw_labeled, load_source

ROWS, LABELED, BATCH, RATIO = 61, 7, 2, 3  # 10 steps an epoch; the labelled rows come round every 3.5 steps


class Views:
    """Every view is the picture's red value and one random number, 1 x 1 pixels."""

    model_input_names = ["pixel_values", "weak_pixel_values", "strong_pixel_values"]
    counts = {"pixel_values": 1, "weak_pixel_values": 1, "strong_pixel_values": 2}

    def count_views(self, keys=None):
        return sum(self.counts[key] for key in keys or self.model_input_names)

    def draw(self, images, rng, keys=None, out=None):
        assert len(images) == self.count_views(keys)
        return {
            key: np.array([[[[images[0][0, 0, 0]]], [[rng.random()]]] for _ in range(self.counts[key])], np.float64)
            for key in self.model_input_names
            if key in (keys or self.model_input_names)
        }


@pytest.fixture(scope="module")
def source_of(make, tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for i, (low, high) in enumerate(itertools.pairwise([0, 20, 23, 41, ROWS])):
        make.write_parquet(root / "many" / f"{i}.parquet", range(low, high), label=[v % 4 for v in range(low, high)])
        make.write_tar(root / f"{i}.tar", range(low, high))

    @cache
    def load(kind):
        return load_source(str(root / {"tar": "*.tar"}.get(kind, "many")), streaming=kind != "map")

    return load


@pytest.fixture(scope="module")
def labeled(source_of):
    return draw_labeled(source_of("map"), ids=[3, 9, 14, 22, 35, 48, 60])[0]


def loader(labeled, unlabeled, batch=BATCH, ratio=RATIO, **options):
    options = {"seed": 4, "shuffle_buffer": 7, **options}
    return build_dataloader(unlabeled, Views(), batch, labeled=labeled, ratio=ratio, **options)


def take(batches, count):
    got = list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), count))
    batches.close()
    return got


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def reds(batch, key="pixel_values"):
    return batch[key][:, 0, 0, 0, 0].long().tolist()


def noise(batch, key="pixel_values"):
    return batch[key][:, 0, 1, 0, 0].tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "parquet", "tar"])
def test_a_resumed_run_gets_the_batches_of_the_one_that_was_not_stopped(labeled, source_of, kind, workers):
    options = {"num_workers": workers, "rank": 1, "world_size": 2}
    whole = take(loader(labeled, source_of(kind), **options), 14)
    assert whole[0].keys() >= {"pixel_values", "labels", "weak_pixel_values", "strong_pixel_values", "unlabeled_index"}
    for start in (1, 6, 11):
        assert_same(take(loader(labeled, source_of(kind), start_batch=start, **options), 14 - start), whole[start:])
    moved = loader(labeled, source_of(kind), **options)
    next(iter(moved))
    moved.seek(9)
    assert_same(take(moved, 5), whole[9:])


def test_shapes_and_what_belongs_to_what(labeled, source_of):
    for batch in take(loader(labeled, source_of("map")), 12):
        assert batch["pixel_values"].shape == (BATCH, 1, 2, 1, 1) and batch["labels"].dtype == torch.int64
        assert batch["weak_pixel_values"].shape == (BATCH * RATIO, 1, 2, 1, 1)
        assert batch["strong_pixel_values"].shape == (BATCH * RATIO, 2, 2, 1, 1)
        assert set(reds(batch)) <= {3, 9, 14, 22, 35, 48, 60}
        assert batch["labels"].tolist() == [red % 4 for red in reds(batch)]
        unlabeled = batch["unlabeled_index"].tolist()
        assert unlabeled == reds(batch, "weak_pixel_values") == reds(batch, "strong_pixel_values")
        assert batch["unlabeled_labels"].tolist() == [i % 4 for i in unlabeled]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "parquet"])
def test_two_ranks_see_what_one_with_the_double_batch_sees(labeled, source_of, kind, workers):
    """Of a streamed source this holds for the labelled side; the unlabelled one is dealt out by shards."""
    ranks = [
        take(loader(labeled, source_of(kind), rank=rank, world_size=2, num_workers=workers), 12) for rank in (0, 1)
    ]
    alone = take(loader(labeled, source_of(kind), 2 * BATCH), 12)
    keys = alone[0].keys() if kind == "map" else ("pixel_values", "labels")
    for left, right, both in zip(*ranks, alone):
        for key in keys:
            assert torch.equal(torch.cat([left[key], right[key]]), both[key]), key


def test_ranks_share_the_rows_without_overlap_and_every_labelled_row_serves_as_often(labeled, source_of):
    first = Counter()
    for step in zip(*(take(loader(labeled, source_of("map"), rank=rank, world_size=2), 5) for rank in (0, 1))):
        first.update(i for batch in step for i in batch["unlabeled_index"].tolist())
    assert len(first) == 5 * 2 * BATCH * RATIO and max(first.values()) == 1
    # 14 batches of 4 are 8 whole passes over 7 rows, none of which is dropped
    seen = [red for batch in take(loader(labeled, source_of("map"), 4), 14) for red in reds(batch)]
    assert set(Counter(seen).values()) == {8}
    assert all(len(set(seen[i : i + 7])) == 7 for i in range(0, 56, 7))
    assert len({tuple(seen[i : i + 7]) for i in range(0, 56, 7)}) > 4  # each pass in its own order


def test_few_labelled_rows_fill_a_large_batch_with_different_views(labeled, source_of):
    batch = take(loader(labeled, source_of("map"), 16, 1), 1)[0]
    assert Counter(Counter(reds(batch)).values()) == {2: 5, 3: 2}
    assert len(set(noise(batch))) == 16


@pytest.mark.parametrize("kind", ["map", "parquet"])
def test_trap_2_both_orders_depend_on_the_seed_and_on_the_epoch(labeled, source_of, kind):
    runs = {seed: take(loader(labeled, source_of(kind), seed=seed), 21) for seed in (0, 1)}
    for read in (lambda batch: batch["labels"].tolist(), lambda batch: batch["unlabeled_index"].tolist()):
        orders = {seed: [read(batch) for batch in batches] for seed, batches in runs.items()}
        assert orders[0][:4] != orders[1][:4]
        assert orders[0][:7] != orders[0][7:14] and orders[0][:10] != orders[0][10:20]
    views = [{value for batch in batches for value in noise(batch)} for batches in runs.values()]
    assert not views[0] & views[1]


def test_the_two_sides_share_no_random_number():
    """All rows on both sides: neither in the order of the rows nor in a row's views."""
    rows = {"image": [np.full((2, 2, 3), i, np.uint8) for i in range(32)], "label": [0, 1] * 16}
    source = ImageSource("array", datasets.Dataset.from_dict(rows), labels=("label",), dtype="uint8")
    batches = take(loader(draw_labeled(source)[0], source, 8, 1, seed=0), 4)
    assert [reds(batch) for batch in batches] != [reds(batch, "weak_pixel_values") for batch in batches]
    sides = [
        {red: value for batch in batches for red, value in zip(reds(batch, key), noise(batch, key))}
        for key in ("pixel_values", "weak_pixel_values")
    ]
    assert sides[0].keys() == sides[1].keys() == set(range(32))
    assert not set(sides[0].values()) & set(sides[1].values())


def test_a_rows_views_do_not_depend_on_which_others_are_labelled(source_of):
    source = source_of("map")
    few, more = (draw_labeled(source, ids=ids)[0] for ids in ([9, 40], [3, 9, 20, 40]))
    batches = [take(loader(rows, source, 4, 1, shuffle=False), 1)[0] for rows in (few, more)]
    drawn = [dict(zip(reversed(reds(batch)), reversed(noise(batch)))) for batch in batches]  # first epoch's come last
    assert drawn[0][9] == drawn[1][9] and drawn[0][40] == drawn[1][40]


def test_without_unlabelled_images(labeled, source_of):
    batches = loader(labeled, source_of("map"), 2, 0)
    assert len(batches) == 3 and batches.ledger.total == 7
    epochs = [list(batches) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [3] * 3 and epochs[0][0].keys() == {"pixel_values", "labels"}
    assert batches.ledger.seen == 18
    assert_same(take(loader(labeled, source_of("map"), 2, 0, start_batch=4), 5), [b for e in epochs for b in e][4:])
    assert len(loader(labeled, source_of("map"), 16, 0)) == 1  # fewer rows than a batch: a step is an epoch


def test_an_epoch_is_one_pass_over_the_unlabelled_images(labeled, source_of):
    assert len(loader(labeled, source_of("map"))) == len(loader(labeled, source_of("parquet"))) == 10
    assert PairStream(labeled, source_of("map"), BATCH, RATIO, 0, 2).steps_per_epoch == 5
    with pytest.raises(TypeError, match="unknown length"):
        len(loader(labeled, source_of("tar")))
    indices = [i for batch in loader(labeled, source_of("map")) for i in batch["unlabeled_index"].tolist()]
    assert len(indices) == len(set(indices)) == 60


def made(name, values, label=None, names=None, column="label", contents=None, make=None):
    rows = {"image": [{"bytes": data, "path": None} for data in contents or [make.png(v) for v in values]]}
    features = datasets.Features(image=datasets.Image(decode=False))
    if label is not None:
        rows[column] = label
        features[column] = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    return ImageSource(name, datasets.Dataset.from_dict(rows, features=features), labels=(column,) if label else ())


def test_other_unlabelled_data_is_matched_by_the_names_of_the_classes(make):
    animals = draw_labeled(made("animals", range(4), [0, 1, 2, 1], ["ant", "bee", "cat"], make=make))[0]
    none = loader(animals, made("bare", range(9), make=make), 2, 2)
    batch = take(none, 1)[0]
    assert "unlabeled_labels" not in batch and none.ledger.total == 13
    for other in (
        made("zoo", range(4), [0, 1, 2, -1], ["cat", "dog", "ant"], "species", make=make),
        made("words", range(4), ["cat", "dog", "ant", None], column="species", make=make),
    ):
        batch = take(loader(animals, other, 2, 2, shuffle=False), 1)[0]
        assert batch["unlabeled_labels"].tolist() == [2, -1, 0, -1] and batch["labels"].tolist() == [0, 1]


def test_labels_follow_the_picture_that_is_shown(make):
    contents = [make.png(i) for i in range(8)]
    contents[1], contents[6] = b"", b"no image"
    source = made("broken", range(8), [0, 1, 2, 3] * 2, ["a", "b", "c", "d"], contents=contents)
    labeled = draw_labeled(source, ids=[0, 1, 2, 3])[0]
    batches = loader(labeled, source, 4, 2, shuffle=False)
    batch = take(batches, 1)[0]
    assert reds(batch) == [0, 2, 2, 3] and batch["labels"].tolist() == [0, 2, 2, 3]
    assert reds(batch, "weak_pixel_values") == batch["unlabeled_index"].tolist() == [0, 2, 2, 3, 4, 5, 7, 7]
    assert batch["unlabeled_labels"].tolist() == [0, 2, 2, 3, 0, 1, 3, 3]
    # row 1 is broken on both sides and is one image; 4 + 8 rows were shown
    ledger = batches.ledger
    assert (ledger.seen, ledger.skipped, ledger.distinct, ledger.total) == (12, 3, 2, 8)
    assert [name[:15] for name in ledger.names] == ["row 1 of broken", "row 6 of broken"]


def test_of_a_stream_a_broken_image_has_one_name_on_both_sides(make, tmp_path):
    rows = {"image": [{"bytes": b"" if i == 2 else make.png(i), "path": None} for i in range(6)], "label": [0, 1] * 3}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    source = load_source(str(tmp_path / "a.parquet"), streaming=True)
    batches = loader(draw_labeled(source)[0], source, 6, 1)
    assert take(batches, 1)[0]["labels"].shape == (6,)
    assert batches.ledger.skipped == 2 and batches.ledger.distinct == 1 and batches.ledger.total == 6


def test_render_is_called_once_per_view_of_its_side(make):
    calls = []
    source = made("drawn", range(4), [0, 1] * 2, ["a", "b"], make=make)
    source.render = lambda picture, rng: calls.append(1) or np.full((2, 2, 3), rng.integers(200), np.uint8)
    batch = take(loader(draw_labeled(source)[0], source, 2, 2), 1)[0]
    assert len(calls) == 2 * 1 + 4 * 3 and batch["labels"].shape == (2,)


def test_what_cannot_work_says_so(labeled, source_of):
    source = source_of("map")
    for options, message in (
        ({"batch": 7, "ratio": 9}, r"has 61 images, fewer than one batch: 7 labelled x unlabeled_ratio 9 x 1 process"),
        ({"ratio": -1}, "unlabeled_ratio is -1; it must be at least 0"),
        ({"batch": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2, "ratio": 0}, "rank is 2, but with world_size 2"),
        ({"start_batch": -1}, "start_batch is -1"),
        ({"keep_columns": ("label",)}, "keep_columns, encode_text and row_inputs are for one stream"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(labeled, source, **options)
    for wrong in (source, source_of("parquet")):
        with pytest.raises(ValueError, match="is not what draw_labeled returns"):
            loader(wrong, source)
    one_side = Views()
    one_side.model_input_names = ["pixel_values"]
    with pytest.raises(ValueError, match=r"Views makes pixel_values; .* unlabelled ones at least one other key"):
        PairCollator(labeled, source, one_side, 0, 1)
    assert PairCollator(labeled, source, one_side, 0, 0).ratio == 0
