"""The screened search: the same neighbours as the exhaustive one, ties included, in bounded memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hf_ssl.evaluation import knn, knn_accuracy, nearest

CONE = 0.1 * torch.ones(24)  # all similarities near 1, as those of a collapsed or an untrained network are


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def small_blocks(request, monkeypatch):
    """Banks of a few hundred rows are screened, in several blocks and parts, some of them padded."""
    for name, value in (("_SMALL", 1), ("_BLOCK", 800), ("_PART", 130), ("_GROUP", 2), ("_QUERIES", 8)):
        monkeypatch.setattr(knn, name, value)
    monkeypatch.setattr(knn, "_fast_bf16", lambda device: request.param)
    return request.param


def _data(rows: int, queries: int, centre: torch.Tensor | float = 0.0):
    generator = torch.Generator().manual_seed(0)
    bank, query = (0.05 * torch.randn(n, 24, generator=generator) + centre for n in (rows, queries))
    return query * 3, bank * 7  # lengths must not matter


def _by_hand(queries, bank, k):
    similarity = F.normalize(queries, dim=1).double() @ F.normalize(bank, dim=1).double().T
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k], similarity


@pytest.mark.parametrize("centre", [0.0, CONE], ids=["random", "cone"])
@pytest.mark.parametrize("rows", [400, 1701])
def test_screened_neighbours_are_the_nearest(small_blocks, monkeypatch, centre, rows):
    monkeypatch.setattr(knn, "_exhaustive", None)  # none of these may need it
    queries, bank = _data(rows, 16, centre)
    similarities, found = nearest(queries, bank, 5)
    expected, exact = _by_hand(queries, bank, 5)
    assert torch.equal(found, expected)
    assert torch.allclose(similarities.double(), exact.gather(1, found), atol=1e-6)


@pytest.mark.parametrize("centre", [0.0, CONE], ids=["random", "cone"])
def test_the_error_that_is_claimed_is_never_exceeded(small_blocks, centre):
    queries, bank = _data(1701, 16, centre)
    queries, length = F.normalize(queries, dim=1), bank.norm(dim=1)
    dtype = torch.bfloat16 if small_blocks else torch.float32
    guess, rows, error = knn._screen(queries, bank, length, 60, dtype)
    exact = _by_hand(queries, bank, 5)[1].gather(1, rows)
    assert ((guess - exact).abs() <= error).all()
    assert (error < 0.02).all()


def test_equal_rows_go_by_number_and_unsure_queries_are_searched_in_full(small_blocks, monkeypatch):
    queries, bank = _data(900, 9)
    bank[[40, 333, 610, 777]] = bank[50:51].clone()  # in several blocks
    queries[0] = bank[50].clone()
    assert nearest(queries, bank, 4)[1][0].tolist() == [40, 50, 333, 610]
    expected = nearest(queries, bank, 4)
    bank[200:700] = bank[50].clone()  # more equals than candidates: what the first pass kept proves nothing
    asked = []
    exhaustive = knn._exhaustive
    monkeypatch.setattr(knn, "_exhaustive", lambda q, *rest: asked.append(len(q)) or exhaustive(q, *rest))
    similarities, rows = nearest(queries, bank, 4)
    assert asked[0] < len(queries)
    assert rows[0].tolist() == [40, 50, 200, 201]
    assert similarities.shape == expected[0].shape
    assert torch.equal(nearest(torch.ones(3, 24), torch.ones(900, 24), 4)[1], torch.arange(4).expand(3, 4))


def test_bf16_predicts_nearly_the_same_and_other_precisions_are_named(small_blocks):
    generator = torch.Generator().manual_seed(1)
    centres = 0.06 * torch.randn(10, 24, generator=generator)
    y, z = torch.arange(900) % 10, torch.arange(200) % 10
    bank, queries = (0.05 * torch.randn(len(c), 24, generator=generator) + centres[c] + CONE for c in (y, z))
    exact, fast = (knn_accuracy(bank, y, queries, z, k=20, precision=p)["knn20_top1"] for p in ("fp32", "bf16"))
    assert 0.5 < exact < 1 and abs(exact - fast) < 0.03
    found, expected = nearest(queries, bank, 20, "bf16")[1], nearest(queries, bank, 20)[1]
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True))
    assert shared / expected.numel() > 0.95
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'int4'"):
        nearest(queries, bank, 5, "int4")


_PEAK = """
import torch
from hf_ssl.evaluation import knn_accuracy
torch.set_num_threads(1)
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
bank = torch.rand(400_000, 256)
labels, queries = torch.arange(len(bank)) % 7, torch.rand(32, 256)
knn_accuracy(bank[:20_000], labels[:20_000], queries, labels[:32], k=20, num_classes=7)  # what libraries keep
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = status("VmRSS")
knn_accuracy(bank, labels, queries, labels[:32], k=20, num_classes=7)
print((status("VmHWM") - before) / (bank.nbytes / 2**20))
"""


def test_the_bank_is_never_copied():
    found = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.75, "of the bank's size (a normalised copy would be 1)"


def test_a_table_of_several_models_names_a_k_above_the_bank_once(caplog):
    bank, labels = torch.eye(7), torch.arange(7)
    for _ in range(3):
        knn_accuracy(bank, labels, bank, labels, k=(5, 999))
    assert [record.getMessage() for record in caplog.records] == [
        "kNN: the bank has 7 rows, so k is 7 where 999 was asked."
    ]
