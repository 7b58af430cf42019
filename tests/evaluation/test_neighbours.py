"""kNN and retrieval against sums done by hand."""

import math

import pytest
import torch

from hf_ssl.evaluation import knn_accuracy, nearest, retrieval_recall


def _unit(degrees: list[float]) -> torch.Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def test_votes_are_weighted_by_similarity_over_temperature():
    # query at 0 degrees: class 0 has one neighbour at 0 degrees, class 1 has two at 30.
    # T = .07: exp(1/.07) = 1.6e6 against 2 exp(.866/.07) = 4.7e5 -> class 0
    # T = 1: e = 2.72 against 2 e^.866 = 4.75 -> class 1
    bank, labels, query = _unit([0, 30, -30]), [0, 1, 1], _unit([0])
    assert knn_accuracy(bank, labels, query, [0], k=3)["knn3_top1"] == 1.0
    assert knn_accuracy(bank, labels, query, [0], k=3, temperature=1.0)["knn3_top1"] == 0.0
    # the temperature at which the two sides tie is (1 - cos 30) / ln 2 = .1933: the rule changes sides there
    tie = (1 - math.cos(math.pi / 6)) / math.log(2)
    assert knn_accuracy(bank, labels, query, [0], k=3, temperature=tie * 0.99)["knn3_top1"] == 1.0
    assert knn_accuracy(bank, labels, query, [0], k=3, temperature=tie * 1.01)["knn3_top1"] == 0.0


def test_features_are_normalised_so_length_does_not_vote():
    bank = torch.tensor([[1.0, 0.0], [50.0, 40.0]])
    assert knn_accuracy(bank, [0, 1], torch.tensor([[7.0, 0.1]]), [0], k=1)["knn1_top1"] == 1.0


def test_top5_looks_at_no_more_ranks_than_neighbours():
    # one query, seven classes at growing angles; the truth is the 3rd nearest
    bank, labels = _unit([0, 10, 20, 30, 40, 50, 60]), list(range(7))
    result = knn_accuracy(bank, labels, _unit([0]), [2], k=(1, 2, 3, 7))
    assert [result[f"knn{k}_top1"] for k in (1, 2, 3, 7)] == [0, 0, 0, 0]
    assert [result[f"knn{k}_top5"] for k in (1, 2, 3, 7)] == [0, 0, 1, 1]
    assert knn_accuracy(bank, labels, _unit([0]), [5], k=7)["knn7_top5"] == 0.0  # the 6th nearest is rank 6


def test_fewer_than_five_classes():
    result = knn_accuracy(_unit([0, 90]), [0, 1], _unit([1, 89]), [1, 1], k=2, num_classes=2)
    assert result == {"knn2_top1": 0.5, "knn2_top5": 1.0}


def test_k_above_the_bank_is_clamped_and_said(caplog):
    result = knn_accuracy(_unit([0, 5, 90]), [0, 0, 1], _unit([80]), [1], k=200)
    assert result["knn200_top1"] == 1.0
    assert "3 rows" in caplog.text and "200" in caplog.text


def test_equal_similarities_are_taken_in_row_order_and_equal_votes_by_class():
    bank = torch.ones(300, 3)
    _, rows = nearest(bank[:2], bank, 7)
    assert rows.tolist() == [list(range(7))] * 2
    labels = [1] * 100 + [0] * 200
    assert knn_accuracy(bank, labels, bank[:1], [1], k=5)["knn5_top1"] == 1.0  # the first five rows are of class 1
    assert knn_accuracy(_unit([10, -10]), [1, 0], _unit([0]), [0], k=2)["knn2_top1"] == 1.0


def test_chunks_do_not_change_the_answer(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(90, 6, generator=generator), torch.randn(37, 6, generator=generator)
    y, z = torch.randint(4, (90,), generator=generator), torch.randint(4, (37,), generator=generator)
    whole = knn_accuracy(bank, y, queries, z, k=(1, 9))
    monkeypatch.setattr("hf_ssl.evaluation.knn._CHUNK_ELEMENTS", 180)  # two queries at a time
    assert knn_accuracy(bank, y, queries, z, k=(1, 9)) == whole


def test_string_labels_and_labels_unknown_to_train():
    result = knn_accuracy(_unit([0, 90]), ["cat", "dog"], _unit([1, 89, 45]), ["cat", "dog", "emu"], k=1)
    assert result["knn1_top1"] == pytest.approx(2 / 3)


def test_half_precision_overflow_is_named_not_scored():
    bad = torch.tensor([[1.0, 2.0], [70000.0, 1.0]]).half()
    with pytest.raises(ValueError, match=r"row 1.*float32"):
        knn_accuracy(bad, [0, 1], _unit([0]), [0], k=1)
    fine = knn_accuracy(_unit([0, 90]).half(), [0, 1], _unit([1]).half(), [0], k=1)
    assert fine["knn1_top1"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"test_labels": [0, 1]}, "labels"),
        ({"test_features": torch.ones(1, 3)}, "columns"),
        ({"num_classes": 1}, "num_classes is 1"),
    ],
)
def test_wrong_arguments_are_sentences(change, message):
    arguments = {
        "train_features": _unit([0, 90]),
        "train_labels": [0, 1],
        "test_features": _unit([0]),
        "test_labels": [0],
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})


def test_recall_by_hand():
    # similarities of each query: gallery a=0, b=40, c=90 degrees
    gallery, ids = _unit([0, 40, 90]), ["a", "b", "c"]
    queries = _unit([5, 30, 60])  # nearest first: a b c | b a c | b c a
    assert retrieval_recall(queries, gallery, ["a", "a", "a"], ids, k=(1, 2, 3)) == pytest.approx(
        {"r1": 1 / 3, "r2": 2 / 3, "r3": 1.0}
    )
    assert retrieval_recall(queries, gallery, ["a", "b", "c"], ids) == pytest.approx({"r1": 2 / 3, "r5": 1.0})


def test_several_gallery_items_may_share_an_id_and_unanswerable_queries_are_left_out(caplog):
    gallery = _unit([0, 40, 90])
    assert retrieval_recall(_unit([35, 0]), gallery, [7, 99], [7, 7, 8], k=(1,)) == {"r1": 1.0}
    assert "1 of 2 queries" in caplog.text
    with pytest.raises(ValueError, match="No query id"):
        retrieval_recall(_unit([35]), gallery, [1], [7, 7, 8])
