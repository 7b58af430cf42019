"""Batches of views: the same whoever draws them, full whatever is broken, and the broken images named and counted."""

import io
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_ssl.data import BadImageLedger, ImageSource, TooManyBadImages, ViewCollator, build_dataloader, load_source
from hf_ssl.data.workers import WaitEnded, WorkerError
from hf_ssl.processing import SSLImageProcessor
from tests import PATIENCE

BATCH = 4


class Views:
    """Two views of 2 x 2 pixels: the picture's corner plus noise from the generator."""

    def count_views(self, keys=None):
        return 2

    def draw(self, images, rng, *_):
        views = [image[:2, :2].transpose(2, 0, 1) + rng.random((1, 2, 2)) for image in images]
        return {"pixel_values": np.stack(views).astype(np.float32), "turn": rng.integers(4)}


class Deadly(Views):
    def draw(self, images, rng, *_):
        if images[0][0, 0, 0] == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(images, rng)


class Cramped(Views):
    """A worker that may write no file of more than 1,000 bytes, shared memory included, as if that were full."""

    def draw(self, images, rng, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return {"pixel_values": np.zeros((2, 3, 64, 64), np.float32)}


class Stuck(Views):
    def draw(self, images, rng, *_):
        time.sleep(600)


class Picky(Views):
    def draw(self, images, rng, *_):
        raise ValueError("too small to crop")


def picture_source(contents, **options):
    """A map-style source of image files in memory, each with its number as `id`."""
    rows = {
        "image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(contents)],
        "id": range(len(contents)),
    }
    features = Features(image=Image(decode=False), id=Value("int64"))
    return ImageSource("pictures", Dataset.from_dict(rows, features=features), **options)


@pytest.fixture(scope="module")
def sources(make, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for i in range(3):
        make.write_parquet(root / f"{i}.parquet", range(i * 7, i * 7 + 7), id=list(range(i * 7, i * 7 + 7)))
    make.write_tar(root / "a.tar", range(9))
    shards = {streaming: load_source(str(root / "*.parquet"), streaming=streaming) for streaming in (False, True)}
    return {**shards, "tar": load_source(str(root / "a.tar"), streaming=True)}


def take(loader, count):
    got = []
    while len(got) < count:
        for batch in loader:
            got.append(batch)
            if len(got) == count:
                break
    loader.close()
    return got


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_gets_the_batches_of_the_one_that_was_not_stopped(sources, streaming, workers):
    options = {"seed": 7, "num_workers": workers, "keep_columns": ("id", "_epoch"), "shuffle_buffer": 5}
    whole = take(build_dataloader(sources[streaming], Views(), BATCH, **options), 13)
    assert whole[-1]["_epoch"].max() >= 2 and whole[0]["pixel_values"].shape == (BATCH, 2, 3, 2, 2)
    for start in (3, 8):
        assert_same(
            take(build_dataloader(sources[streaming], Views(), BATCH, start_batch=start, **options), 5),
            whole[start : start + 5],
        )
    loader = build_dataloader(sources[streaming], Views(), BATCH, **options)
    take(loader, 2)
    loader.seek(6)
    assert_same(take(loader, 4), whole[6:10])


def test_views_depend_on_seed_epoch_and_row_only(sources):
    def by_row(source, seed=7, **options):
        batches = take(
            build_dataloader(source, Views(), BATCH, seed=seed, keep_columns=("_epoch", "_index"), **options), 9
        )
        rows = [{key: batch[key][i] for key in batch} for batch in batches for i in range(BATCH)]
        return {(int(row["_epoch"]), int(row["_index"])): row["pixel_values"] for row in rows}

    alone = by_row(sources[False])
    for other in (
        by_row(sources[False], num_workers=2),
        by_row(sources[True], shuffle_buffer=3),
        by_row(sources[False], shuffle=False),
        by_row(sources[False], rank=1, world_size=2),
    ):
        common = alone.keys() & other.keys()
        assert len(common) > 5 and all(torch.equal(alone[key], other[key]) for key in common)
    changed = by_row(sources[False], seed=8)
    assert not any(torch.equal(alone[key], changed[key]) for key in alone.keys() & changed.keys())
    index = next(i for epoch, i in alone if (1 - epoch, i) in alone)
    assert not torch.equal(alone[0, index], alone[1, index])
    assert not torch.equal(alone[0, index][0], alone[0, index][1])


def test_global_random_state_is_left_alone(sources):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        take(build_dataloader(sources[False], Views(), BATCH, num_workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_an_iteration_is_an_epoch_and_goes_on_where_it_stopped(sources):
    loader = build_dataloader(sources[False], Views(), BATCH, keep_columns=("_epoch",))
    assert len(loader) == 5 and len(list(loader)) == 5 and loader.position == 5
    epoch = [int(batch["_epoch"][0]) for batch in loader]
    assert epoch == [1] * 5
    next(iter(loader))
    assert len(list(loader)) == 4 and loader.position == 15
    loader.seek(7)
    assert [int(batch["_epoch"][0]) for batch in loader] == [1] * 3
    endless = build_dataloader(sources["tar"], Views(), BATCH)
    with pytest.raises(TypeError, match="unknown length: set max_steps"):
        len(endless)
    assert len(take(endless, 12)) == 12


def test_columns_are_kept(make):
    source = picture_source([make.png(i) for i in range(8)])
    source.dataset = source.dataset.add_column("name", [f"n{i}" for i in range(8)]).add_column(
        "weight", [i / 2 for i in range(8)]
    )
    batch = next(iter(build_dataloader(source, Views(), BATCH, shuffle=False, keep_columns=("id", "name", "weight"))))
    assert batch.keys() == {"pixel_values", "turn", "id", "name", "weight"}
    assert batch["id"].tolist() == [0, 1, 2, 3] and batch["name"] == ["n0", "n1", "n2", "n3"]
    assert batch["weight"].tolist() == [0, 0.5, 1, 1.5] and batch["turn"].shape == (BATCH,)


def test_render_is_called_once_per_view_with_the_rows_generator(make):
    calls = []

    def render(picture, rng):
        calls.append(picture.shape)
        return np.full((2, 2, 3), rng.integers(200), np.uint8)

    rows = [{"image": {"bytes": make.png(3), "path": None}, "_epoch": 2, "_index": 11}]
    source = picture_source([], keep_alpha=True, render=render)
    rng = np.random.default_rng((5, 2, 11))
    images = [np.full((2, 2, 3), rng.integers(200), np.uint8) for _ in range(2)]
    batch = ViewCollator(source, Views(), seed=5)(rows)
    np.testing.assert_array_equal(batch["pixel_values"][0], Views().draw(images, rng)["pixel_values"])
    assert calls == [(4, 4, 4)] * 2
    source.random_render = False
    ViewCollator(source, Views(), seed=5)(rows)
    assert len(calls) == 3


def test_broken_images_are_replaced_named_and_logged_once(make, caplog):
    contents = [make.png(i) for i in range(8)]
    contents[1], contents[3], contents[6] = b"", b"no image", contents[6][:40]
    loader = build_dataloader(picture_source(contents), Views(), BATCH, shuffle=False, keep_columns=("id",))
    with caplog.at_level(logging.WARNING, "hf_ssl.data"):
        first, second, again, _ = take(loader, 4)
    # the next good one of the batch, round its end, stands in with its own label
    assert first["id"].tolist() == [0, 2, 2, 0] and second["id"].tolist() == [4, 5, 7, 7]
    assert first["pixel_values"][:, :, 0].floor().unique().tolist() == [0, 2]
    assert not torch.equal(first["pixel_values"][1], first["pixel_values"][2])  # other views, though
    ledger = loader.ledger
    assert (ledger.seen, ledger.skipped, ledger.distinct, ledger.total) == (16, 6, 3, 8)
    assert ledger.names[0] == "1.png (row 1 of pictures): the file is empty (0 bytes)"
    assert ["1.png" in ledger.names[0], "3.png" in ledger.names[1], "6.png" in ledger.names[2]] == [True] * 3
    assert [record.getMessage() for record in caplog.records] == [f"image left out: {name}" for name in ledger.names]
    assert torch.equal(again["id"], first["id"])


def test_images_that_are_promised_and_missing_count_as_broken(make):
    source = picture_source([make.png(i) for i in range(8)])
    source.missing = ("gone.png: the metadata name it, and there is no such file",)
    loader = build_dataloader(source, Views(), BATCH)
    take(loader, 1)
    loader.ledger.load_state_dict({"seen": 0, "skipped": 0, "names": []})
    take(loader, 1)  # a run that goes on names them as well
    assert loader.ledger.names == list(source.missing)
    with pytest.raises(TooManyBadImages, match=r"more than 1.00% of 8"):
        loader.ledger.check(0.01)


def test_a_batch_of_broken_images_only(make):
    rows = [
        {"image": {"bytes": data, "path": None}, "_epoch": 0, "_index": i}
        for i, data in enumerate([make.png(7), b"", b""])
    ]
    collate = ViewCollator(picture_source([]), Views(), seed=0)
    with pytest.raises(
        TooManyBadImages, match=r"No image of a whole batch can be decoded; row 1 of pictures: .*; row 2 of"
    ):
        collate(rows[1:])
    collate(rows[:1])
    batch = collate(rows[1:])
    assert batch["pixel_values"][:, :, 0].floor().unique().tolist() == [7] and len(batch["_skipped"]) == 2


@pytest.mark.parametrize("broken, stops", [(5, False), (10, False), (11, True), (50, True)])
@pytest.mark.parametrize("where", ["first", "last", "spread"])
@pytest.mark.parametrize("batch", [1, 64, 256])
def test_the_run_stops_for_too_many_wherever_they_fall(broken, stops, where, batch):
    rng = np.random.default_rng(broken)
    ledger, stopped_at = BadImageLedger(total=1000), None
    for epoch in range(3):
        bad = {"first": range(broken), "last": range(1000 - broken, 1000), "spread": rng.permutation(1000)[:broken]}[
            where
        ]
        files = {int(position): f"{i}.png: broken" for i, position in enumerate(bad)}
        for start in range(0, 1000, batch):
            rows = range(start, min(start + batch, 1000))
            ledger.update([files[i] for i in rows if i in files], len(rows))
            try:
                ledger.check(0.01)
            except TooManyBadImages as error:
                assert "more than 1.00% of 1,000" in str(error)
                stopped_at = epoch if stopped_at is None else stopped_at
    assert (stopped_at == 0) if stops else (stopped_at is None)


def test_the_ledger_where_the_length_is_unknown_and_over_a_restart_and_ranks():
    ledger = BadImageLedger()
    ledger.update([f"{i}" for i in range(5)], 256)
    ledger.check(0.01)  # 5 of the first 256 say little
    ledger.update([f"{i}" for i in range(5, 30)], 744)
    with pytest.raises(
        TooManyBadImages, match=r"30 images cannot be decoded, more than 1.00% of 1,000, so the run stops: 0; 1; "
    ):
        ledger.check(0.01)
    ledger.check(0.05)
    resumed = BadImageLedger()
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.state_dict() == ledger.state_dict() and resumed.names == ledger.names
    other = BadImageLedger()
    other.update(["29", "30"], 100)
    both = BadImageLedger.merged([ledger.state_dict(), other.state_dict()])
    assert (both.seen, both.skipped, both.distinct) == (1100, 32, 31)
    many = BadImageLedger(10**6)
    many.update([str(i) for i in range(1500)], 1500)
    assert len(many.names) == 1000 and many.distinct == 1500


def test_a_dead_worker_is_a_sentence(make):
    source = picture_source([make.png(i) for i in range(12)])
    loader = build_dataloader(source, Deadly(), BATCH, num_workers=1, shuffle=False)
    with pytest.raises(RuntimeError, match=r"data-loading worker died at batch .* killed for memory"):
        take(loader, 4)


def test_shared_memory_that_is_full_is_a_sentence(make):
    """torch drops such a batch in a background thread, and the training process waits for it for ever."""
    loader = build_dataloader(picture_source([make.png(i) for i in range(8)]), Cramped(), BATCH, num_workers=1)
    with pytest.raises(
        WorkerError, match=r"There is no room in the shared memory \(/dev/shm, .*num_workers 0 needs none"
    ):
        take(loader, 1)


def test_a_worker_that_dies_between_two_batches_raises_nowhere_else(make):
    loader = build_dataloader(picture_source([make.png(i) for i in range(8)]), Views(), BATCH, num_workers=1)
    iterator = iter(loader)
    next(iterator)
    worker = loader._batches._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # a step, in which torch's own handler would raise
    with pytest.raises(WorkerError, match=r"worker died at batch \d+ \(killed by SIGKILL\). It was most likely"):
        take(loader, 9)


def test_a_wait_for_workers_ends(make, monkeypatch):
    """When somebody asks for it, and after half an hour in any case; a worker that hangs does not hang the end."""
    monkeypatch.setattr("hf_ssl.data.workers._POLL", 0.05)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.05)  # how long torch waits for its end
    loader = build_dataloader(picture_source([make.png(i) for i in range(8)]), Stuck(), BATCH, num_workers=1)
    monkeypatch.setattr("hf_ssl.data.workers._PATIENCE", 0.1)
    asked = iter([False, False, True, True])
    loader.ended = lambda: next(asked)
    with pytest.raises(WaitEnded):
        next(iter(loader))
    assert next(asked, None) is None
    loader.ended = lambda: False
    monkeypatch.setattr("hf_ssl.data.workers.SECONDS", 0.2)
    with pytest.raises(WorkerError, match="No batch came from the data-loading workers"):
        next(iter(loader))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_processor_names_the_row(make, workers):
    source = picture_source([make.png(i) for i in range(4)])
    with pytest.raises(
        RuntimeError, match=r"fails on 0.png \(row 0 of pictures\), 4 x 4 pixels, with ValueError: too small"
    ):
        take(build_dataloader(source, Picky(), BATCH, num_workers=workers, shuffle=False), 1)


def test_a_signal_to_the_process_group_leaves_the_workers_to_the_trainer(sources):
    loader = build_dataloader(sources[False], Views(), BATCH, num_workers=2, prefetch=1)
    iterator = iter(loader)
    next(iterator)
    workers = loader._batches._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(iterator)) == 4 and all(worker.is_alive() for worker in workers)
    loader.close()
    assert [worker.exitcode for worker in workers] == [0, 0]  # by themselves: one that is waited for in vain is killed


def test_the_process_ends_although_a_loader_was_left_open():
    script = (
        "import os, signal, numpy as np\n"
        "from hf_ssl.data import build_dataloader, load_source\n"
        "class Views:\n"
        "    def count_views(self, keys): return 1\n"
        "    def draw(self, images, *_): return {'pixel_values': images[0]}\n"
        "loader = build_dataloader(load_source('emoji'), Views(), 4, num_workers=2)\n"
        "batch = next(iter(loader))\n"
        "[os.kill(worker.pid, signal.SIGTERM) for worker in loader._batches._workers]\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def jpeg(number, size=(50, 40)):
    out = io.BytesIO()
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def test_jpeg_rows_make_one_batch_of_bytes_whatever_the_workers():
    """With the real processor: each view is what the decoded picture and (seed, epoch, row) give."""
    local = {"key": "local", "count": 3, "size": 8, "brightness": 0.4, "hue": 0.1, "blur_p": 0.5}
    processor = SSLImageProcessor(size=24, views=[{"count": 2, "hflip": 0.5, "solarize_p": 0.5}, local])
    contents = [jpeg(i, (50 + i, 40 - i)) for i in range(8)]
    source = picture_source(contents)
    batches = {n: take(build_dataloader(source, processor, 4, seed=3, num_workers=n), 4) for n in (0, 2)}
    for alone, shared in zip(batches[0], batches[2], strict=True):
        for key in ("pixel_values", "local"):
            assert torch.equal(alone[key], shared[key])
    rows = [{"image": {"bytes": data}, "_epoch": 1, "_index": i} for i, data in enumerate(contents)]
    batch = ViewCollator(source, processor, seed=3)(rows)
    assert batch["pixel_values"].shape == (8, 2, 24, 24, 3)
    assert batch["local"].shape == (8, 3, 8, 8, 3)
    assert batch["local"].dtype == torch.uint8
    assert batch["local"].is_contiguous()
    for i, data in enumerate(contents):
        picture = np.asarray(PIL.Image.open(io.BytesIO(data)))
        expected = processor.draw([picture] * 5, np.random.default_rng((3, 1, i)))
        for key, views in expected.items():
            np.testing.assert_array_equal(batch[key][i], views)


def test_a_truncated_jpeg_is_replaced_and_named_wherever_it_stands():
    contents = [jpeg(i) for i in range(4)]
    processor = SSLImageProcessor(size=32)  # too large to decode less than all
    for bad in range(4):
        rows = [{"image": {"bytes": c, "path": f"{i}.jpg"}, "_epoch": 0, "_index": i} for i, c in enumerate(contents)]
        rows[bad]["image"]["bytes"] = contents[bad][: len(contents[bad]) // 2]
        batch = ViewCollator(picture_source(contents), processor, seed=0)(rows)
        (message,) = batch["_skipped"]
        assert f"{bad}.jpg" in message and "truncated" in message
        picture = np.asarray(PIL.Image.open(io.BytesIO(contents[(bad + 1) % 4])))
        expected = processor.draw([picture] * 2, np.random.default_rng((0, 0, bad)))["pixel_values"]
        np.testing.assert_array_equal(batch["pixel_values"][bad], expected)
