import pytest
import torch
import torch.nn.functional as F

from hf_ssl.methods.joint_embedding.deepcluster_v2 import IGNORED, UNKNOWN, LabelBank, spherical_kmeans
from tests.contract.tiny import adamw, batch, build, train_step


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def epoch(model, rows: torch.Tensor) -> None:
    """Push unit vectors (views, N, d) of all images in steps of four, and end each."""
    for index in torch.arange(rows.shape[1]).split(4):
        model.memory.push(index, rows[:, index])
        model.update_state()


def test_kmeans_by_hand() -> None:
    """Two steps over six rows in three directions; the third centroid attracts nothing and stays where it is."""
    rows = F.normalize(torch.tensor([[1, 0.1], [1, -0.1], [1, 0.0], [0.1, 1], [-0.1, 1], [0.3, 1]]), dim=1)
    start = F.normalize(torch.tensor([[1.0, 0.5], [0.5, 1.0], [-1.0, -1.0]]), dim=1)
    centroids, labels = spherical_kmeans(rows, start, 2, torch.ones(6, dtype=torch.bool))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(centroids[0], F.normalize(rows[:3].mean(0), dim=0))
    torch.testing.assert_close(centroids[1], F.normalize(rows[3:].mean(0), dim=0))
    assert torch.equal(centroids[2], start[2])


def test_kmeans_leaves_rows_out_that_the_epoch_did_not_show() -> None:
    rows, start = unit(9, 4), unit(3, 4)
    mask = torch.arange(9) < 6
    centroids, labels = spherical_kmeans(rows, start, 4, mask)
    wanted, _ = spherical_kmeans(rows[:6], start, 4, mask[:6])
    torch.testing.assert_close(centroids, wanted)
    assert labels.shape == (9,)


def test_kmeans_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, start, mask = unit(20, 4), unit(3, 4), torch.ones(20, dtype=torch.bool)
    whole = spherical_kmeans(rows, start, 5, mask)
    monkeypatch.setattr("hf_ssl.methods.joint_embedding.deepcluster_v2._ROWS", 7)
    parts = spherical_kmeans(rows, start, 5, mask)
    torch.testing.assert_close(whole, parts)


def test_loss_by_hand_over_crops_heads_and_labelled_images() -> None:
    model = build("deepcluster_v2", temperature=0.5)
    labels = torch.tensor([[0, 1, 2, IGNORED], [3, 3, 4, IGNORED], [5, 0, 1, IGNORED]])
    model.memory.labels[:, [2, 0, 5, 7]] = labels
    rows = unit(4, 4, 8)
    loss, metrics = model.learn(rows, torch.tensor([2, 0, 5, 7]))
    total = sum(
        -float((rows[crop, image] @ head.weight.T / 0.5).log_softmax(0)[labels[h, image]])
        for h, head in enumerate(model.prototypes) for crop in range(4) for image in range(3)
    )  # fmt: skip
    assert float(loss) == pytest.approx(total / (3 * 4 * 3), rel=1e-5)
    assert metrics["labelled"] == 0.75


def test_a_batch_without_labels_costs_nothing() -> None:
    model = build("deepcluster_v2")
    model.memory.labels.fill_(IGNORED)
    loss, metrics = model.learn(unit(4, 4, 8).requires_grad_(), torch.arange(4))
    loss.backward()
    assert float(loss) == 0 and metrics["labelled"] == 0


def test_an_epoch_ends_when_every_image_was_seen_once() -> None:
    model = build("deepcluster_v2", num_examples=12)
    rows, clusterings = unit(2, 12, 8), []
    for _ in range(2):
        for index in torch.randperm(12).split(4):
            model.memory.push(index, rows[:, index])
            model.update_state()
            clusterings.append(int(model.memory.clock[1]))
    assert clusterings == [0, 0, 1, 1, 1, 2]


def test_an_epoch_whose_last_batch_is_dropped_ends_with_it() -> None:
    """Fourteen images in batches of four: the loader drops two, which have no label in the next epoch."""
    model = build("deepcluster_v2", num_examples=14)
    epoch(model, unit(2, 12, 8))
    assert int(model.memory.clock[1]) == 1
    assert (model.memory.labels[:, 12:] == IGNORED).all() and (model.memory.labels[:, :12] >= 0).all()
    assert not model.memory.fresh.any()


def test_centroids_become_the_prototypes_and_label_their_own() -> None:
    model = build("deepcluster_v2", num_examples=12, kmeans_iterations=10)
    rows = unit(2, 12, 8)
    epoch(model, rows)
    for head, prototypes in enumerate(model.prototypes):
        torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(6))
        view = rows[head % 2]  # heads take turns with the crops
        assert torch.equal((view @ prototypes.weight.T).argmax(1), model.memory.labels[head])


def test_images_keep_their_labels_whatever_the_order() -> None:
    """Two blobs by row number, pushed shuffled: the bank is kept by row number, not by arrival."""
    model = build("deepcluster_v2", num_examples=12, num_prototypes=2, heads=1)
    blobs = F.normalize(torch.eye(8)[:2].repeat(6, 1) + 0.01 * torch.randn(12, 8), dim=1)
    for index in torch.randperm(12).split(4):
        model.memory.push(index, torch.stack([blobs[index]] * 2))
        model.update_state()
    labels = model.memory.labels[0]
    assert (labels[::2] == labels[0]).all() and (labels[1::2] == labels[1]).all() and labels[0] != labels[1]


def test_the_gradient_never_trains_a_centroid() -> None:
    model = build("deepcluster_v2")
    model.total_steps.fill_(100)
    optimizer = adamw(model)
    before = model.prototypes[0].weight.detach().clone()
    train_step(model, optimizer, batch("deepcluster_v2"))
    torch.testing.assert_close(model.prototypes[0].weight.detach(), before)


def test_the_first_epoch_learns_the_balanced_assignment_of_the_batch() -> None:
    model = build("deepcluster_v2")
    assert (model.memory.labels == UNKNOWN).all()
    scores = torch.eye(6)[[0, 0, 0, 0]] @ model.prototypes[0].weight  # four images on one prototype
    rows = F.normalize(scores + 0.05 * torch.randn(4, 4, 8), dim=2)
    seen = []
    original = F.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda x, y, **k: seen.append(y) or original(x, y, **k))
        model.learn(rows, torch.arange(4))
    labels = seen[0].view(4, 4)
    assert (labels == labels[0]).all()  # every crop learns the image's one label
    assert len(labels[0].unique()) > 1


def test_start_rows_depend_on_clustering_and_head_alone() -> None:
    bank = LabelBank(12, 2, 8, 2)
    bank.push(torch.arange(12), unit(2, 12, 8))
    bank.advance()
    torch.manual_seed(1)
    first = bank.sample(0, 5)
    torch.manual_seed(2)
    assert torch.equal(bank.sample(0, 5), first)
    assert not torch.equal(bank.sample(1, 5), first)
    again = LabelBank(12, 2, 8, 2)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.sample(0, 5), first)


def test_start_rows_are_of_images_that_the_epoch_showed() -> None:
    bank = LabelBank(50, 1, 8, 1)
    shown = torch.arange(0, 50, 5)
    rows = unit(1, 10, 8)
    bank.push(shown, rows)
    bank.advance()
    assert all(any(torch.allclose(row, known) for known in rows[0]) for row in bank.sample(0, 10))


@pytest.mark.parametrize(("fields", "word"), [
    ({"num_examples": None}, "give num_examples"),
    ({"num_examples": 4}, "4 images .* cannot fill 6 clusters"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build("deepcluster_v2", **fields)


def test_without_row_numbers_there_is_no_label() -> None:
    views = batch("deepcluster_v2")
    views.pop("index")
    with pytest.raises(ValueError, match="pass index"):
        build("deepcluster_v2")(**views)


def test_evaluating_leaves_the_bank_alone() -> None:
    model = build("deepcluster_v2").eval()
    model(**batch("deepcluster_v2"))
    model.update_state()
    assert not model.memory.fresh.any() and int(model.memory.clock[0]) == 0
