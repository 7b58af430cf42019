"""NPID by hand: the loss, Z once, the bank once per step; what PIRL takes from it is tested here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl import distributed
from hf_ssl.methods.joint_embedding.instdisc import InstDiscConfig, nce
from tests.contract.tiny import VIT, adamw, batch, build, train_step


def nce_by_hand(own: float, noise: list[float], examples: int) -> float:
    prior = len(noise) / examples
    loss = -math.log(own / (own + prior))
    return loss - sum(math.log(1 - p / (p + prior)) for p in noise)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_nce_by_hand() -> None:
    probabilities = torch.tensor([[0.3, 0.01, 0.2], [0.05, 0.4, 0.02]])
    wanted = [nce_by_hand(row[0], row[1:], 50) for row in probabilities.tolist()]
    torch.testing.assert_close(nce(probabilities, 50), torch.tensor(wanted), rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", ["nce", "cross_entropy"])
def test_a_row_against_noise_by_hand(criterion: str) -> None:
    model = build("instdisc", criterion=criterion, partition=9.0)
    rows, index, noise = unit(3, 8), torch.tensor([5, 0, 23]), torch.tensor([5, 7, 7, 1])  # the own row, one twice
    loss, accuracy = model.discriminate(rows, index, noise)
    losses, ranks = [], []
    for row, own in zip(rows, index.tolist()):
        scores = [math.exp(float(row @ model.bank.rows[place]) / 0.5) for place in (own, *noise.tolist())]
        chances = [score / 9.0 for score in scores]
        softmax = -math.log(scores[0] / sum(scores))
        losses.append(nce_by_hand(chances[0], chances[1:], 24) if criterion == "nce" else softmax)
        ranks.append(scores[0] >= max(scores))
    assert float(loss) == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert float(accuracy) == pytest.approx(sum(ranks) / 3)


def test_without_negatives_it_is_a_softmax_over_all_images() -> None:
    model = build("instdisc", nce_negatives=0)
    rows, index = unit(2, 8), torch.tensor([3, 20])
    loss, accuracy = model.discriminate(rows, index)
    similar = rows @ model.bank.rows.T / 0.5
    assert torch.allclose(loss, -similar.log_softmax(1)[[0, 1], index].mean())
    assert accuracy == (similar.argmax(1) == index).float().mean()


def test_the_first_batch_fixes_z_for_good() -> None:
    """Z is N times the mean of exp(similarity / τ), own rows included; no gradient passes through it, and it stays."""
    model = build("instdisc", partition=None)
    rows, index, noise = unit(3, 8).requires_grad_(), torch.arange(3), torch.tensor([9, 4])
    logits, _ = model.logits(rows, index, noise)
    wanted = 24 * logits.detach().exp().mean()
    model.discriminate(rows, index, noise)[0].backward()
    torch.testing.assert_close(model.partition, wanted)
    known = build("instdisc", partition=float(wanted))
    known.bank.rows.copy_(model.bank.rows)
    again = rows.detach().clone().requires_grad_()
    known.discriminate(again, index, noise)[0].backward()
    torch.testing.assert_close(rows.grad, again.grad)
    model.discriminate(unit(3, 8, seed=1), index, noise)
    torch.testing.assert_close(model.partition, wanted)
    fresh = build("instdisc", partition=None).eval()
    fresh.discriminate(rows, index, noise)
    assert fresh.partition == 0  # evaluation fixes nothing


def test_the_estimate_is_kept_in_a_checkpoint(tmp_path) -> None:
    model = build("instdisc", partition=None)
    train_step(model, adamw(model), batch("instdisc"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert model.partition > 0 and torch.equal(again.partition, model.partition)


def test_the_bank_moves_once_per_optimiser_step_and_stays_on_the_sphere() -> None:
    model = build("instdisc")
    start = model.bank.rows.clone()
    assert start.abs().max() <= (3 / 8) ** 0.5 and start.norm(dim=1).std() > 0.01  # uniform, not normalised
    first, second = batch("instdisc", seed=0), batch("instdisc", seed=1)
    second["index"] = torch.tensor([4, 5, 6, 7])
    features = []
    model.projector.register_forward_hook(lambda module, args, output: features.append(F.normalize(output, dim=1)))
    for views in (first, second):
        model(**views).loss.backward()
        assert torch.equal(model.bank.rows, start)  # all micro-batches of a step see the same memory
    model.after_optimizer_step()
    wanted = F.normalize(0.5 * start[:8] + 0.5 * torch.cat(features).detach(), dim=1)
    torch.testing.assert_close(model.bank.rows[:8], wanted)
    assert torch.equal(model.bank.rows[8:], start[8:])
    model.eval()(**first)
    model.after_optimizer_step()
    torch.testing.assert_close(model.bank.rows[:8], wanted)  # an evaluation leaves no trace


def test_a_replaced_row_is_normalised_too() -> None:
    """lightly 7891ae77 threw the normalisation's result away."""
    model = build("instdisc", bank_momentum=0.0)
    model.bank.push(torch.tensor([3]), torch.full((1, 8), 5.0))
    model.bank.advance()
    torch.testing.assert_close(model.bank.rows[3], torch.full((8,), 8**-0.5))


def test_a_row_seen_twice_in_a_step_learns_the_mean_in_any_order() -> None:
    """A broken image gives its place, and its number, to a good one of the batch."""
    rows, index = unit(5, 8), torch.tensor([2, 7, 2, 0, 2])
    banks = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        model = build("instdisc")
        start = model.bank.rows.clone()
        model.bank.push(index[order], rows[order])
        model.bank.advance()
        banks.append(model.bank.rows.clone())
    torch.testing.assert_close(banks[0], banks[1])
    torch.testing.assert_close(banks[0][2], F.normalize(0.5 * start[2] + 0.5 * rows[[0, 2, 4]].mean(0), dim=0))
    torch.testing.assert_close(banks[0][7], F.normalize(0.5 * start[7] + 0.5 * rows[1], dim=0))


def test_negatives_change_with_the_step_and_with_nothing_else() -> None:
    """With replacement, uniform over all rows, the same whatever was drawn elsewhere."""
    step = torch.tensor(3)
    torch.manual_seed(1)
    first = distributed.step_integers(step, 10, 40_000)
    torch.manual_seed(2)
    assert torch.equal(first, distributed.step_integers(step, 10, 40_000))
    assert not torch.equal(first, distributed.step_integers(step + 1, 10, 40_000))
    counts = torch.bincount(first, minlength=10)
    assert len(counts) == 10 and ((counts - 4000).square() / 4000).sum() < 27.9  # chi-square, 9 degrees, p .001
    many = distributed.step_integers(step, 2**30, 4096)
    assert (many % 64).unique().numel() == 64  # every row can be drawn, where a float's 24 bits would skip most
    model, views = build("instdisc"), batch("instdisc")
    seen = []
    for step in (0, 0, 1):
        model.step.fill_(step)
        seen.append(float(model(**views).loss.detach()))
    assert seen[0] == seen[1] != seen[2]


def test_what_it_cannot_train_on_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="num_examples must say how many"):
        build("instdisc", num_examples=None)
    model, views = build("instdisc"), batch("instdisc")
    with pytest.raises(ValueError, match="pass index"):
        model(views["pixel_values"])
    with pytest.raises(ValueError, match="outside the bank of 24 training images"):
        model(views["pixel_values"], index=torch.tensor([0, 1, 2, 24]))
    with pytest.raises(ValueError, match="got 2"):
        model(views["pixel_values"].repeat(1, 2, 1, 1, 1), index=views["index"])
    for fields, word in [
        ({"temperature": 0.0}, "temperature must be positive, got 0"), ({"criterion": "mse"}, "nce or cross_entropy"),
        ({"nce_negatives": -1}, "nce_negatives"), ({"partition": 0}, "partition must be positive, got 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            InstDiscConfig(backbone_config=dict(VIT), **fields)


def test_it_learns_to_tell_images_apart() -> None:
    """Eight pictures, a softmax over eight rows: chance is an accuracy of 1/8 and a loss of ln 8."""
    model = build("instdisc", num_examples=8, nce_negatives=0, temperature=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = [float(train_step(model, optimizer, batch("instdisc", 8, seed=0))) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert model(**batch("instdisc", 8, seed=0)).metrics["instance_accuracy"] > 0.7  # seen: 1
