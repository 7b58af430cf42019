"""Queue and bank by hand; the traps are lightly 7891ae77 and stable-pretraining#324, #400."""

import copy

import pytest
import torch
from torch import Tensor

from hf_ssl.memory import Center, ExampleBank, FeatureQueue
from tests.contract.tiny import build


def rows(*numbers: float) -> Tensor:
    """Rows that are recognised by their one number."""
    return torch.tensor(numbers)[:, None]


def queue(size: int) -> FeatureQueue:
    """Of width 1, holding −1, −2, ..."""
    made = FeatureQueue(size, 1)
    made.rows.copy_(-torch.arange(1.0, size + 1)[:, None])
    return made


def held(memory: FeatureQueue | ExampleBank) -> list[float]:
    return memory.rows[:, 0].tolist()


# --- FeatureQueue -------------------------------------------------------------------------------------------------


def test_the_oldest_rows_go_first_and_the_pointer_wraps_round() -> None:
    q = queue(5)
    q.push(rows(1, 2))
    q.advance()
    assert held(q) == [1, 2, -3, -4, -5] and q.pointer == 2 and q.filled == 2
    q.push(rows(3, 4))
    q.advance()
    q.push(rows(5, 6))  # over the end: 6 replaces 1
    q.advance()
    assert held(q) == [6, 2, 3, 4, 5] and q.pointer == 1 and q.filled == 5
    q.push(rows(7))
    q.advance()
    assert held(q) == [6, 7, 3, 4, 5] and q.pointer == 2 and q.filled == 5


def test_all_micro_batches_of_a_step_see_the_same_memory() -> None:
    parts, whole = queue(5), queue(5)
    parts.push(rows(1, 2))
    assert held(parts) == [-1, -2, -3, -4, -5] and parts.pointer == 0
    parts.push(rows(3))
    assert held(parts) == [-1, -2, -3, -4, -5]
    parts.advance()
    whole.push(rows(1, 2, 3))
    whole.advance()
    assert held(parts) == held(whole) == [1, 2, 3, -4, -5]
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_step_without_rows_changes_nothing() -> None:
    q = queue(3)
    q.push(rows(1))
    q.advance()
    before = copy.deepcopy(q.state_dict())
    q.advance()
    torch.testing.assert_close(q.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("batches", [[4], [5], [9], [3, 3], [2, 2, 2, 2]])
def test_a_step_as_long_as_the_queue_or_longer_leaves_its_last_rows(batches: list[int]) -> None:
    q = queue(4)
    q.push(rows(0))
    q.advance()  # the pointer stands at 1
    numbers = iter(range(1, 100))
    for count in batches:
        q.push(rows(*(next(numbers) for _ in range(count))))
    total = sum(batches)
    q.advance()
    assert sorted(held(q)) == [total - 3, total - 2, total - 1, total]
    assert q.filled == 4
    q.push(rows(100))
    q.advance()
    assert total - 3 not in held(q) and 100 in held(q)  # the oldest of them is still the next to go


def test_what_is_pushed_is_kept_as_it_is_and_without_a_graph() -> None:
    """lightly 7891ae77: the normalised rows were computed and thrown away. Ours keeps the very rows it is given."""
    q = FeatureQueue(4, 3)
    assert torch.allclose(q.rows.norm(dim=1), torch.ones(4))
    features = torch.randn(2, 3, requires_grad=True)
    q.push(2 * features)
    q.advance()
    assert torch.equal(q.rows[:2], 2 * features.detach()) and not q.rows.requires_grad
    q.push(features.bfloat16())
    q.advance()
    assert q.rows.dtype == torch.float32


def test_a_checkpoint_in_the_middle_of_a_window_goes_on_as_if_nothing_happened() -> None:
    """stable-pretraining#324, #400: the queue was lost or reshaped on resume."""
    q = queue(5)
    q.push(rows(1, 2, 3))
    q.advance()
    q.push(rows(4))
    state = copy.deepcopy(q.state_dict())
    again = FeatureQueue(5, 1)
    again.push(rows(50, 60))  # what a used object held is gone as well
    again.load_state_dict(state)
    for one in (q, again):
        one.push(rows(5, 6))
        one.advance()
    assert held(q) == held(again) == [6, 2, 3, 4, 5] and again.pointer == 1 and again.filled == 5
    torch.testing.assert_close(again.state_dict(), q.state_dict(), rtol=0, atol=0)


def test_a_queue_of_another_size_is_not_loaded() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        FeatureQueue(6, 1).load_state_dict(queue(5).state_dict())


def test_reset_keeps_what_a_checkpoint_filled(tmp_path) -> None:
    """Through transformers: ``from_pretrained`` calls ``reset`` on a queue whose values are already there."""
    model = build("moco")
    model.queue.push(torch.randn(3, 8))
    model.queue.advance()
    model.queue.push(torch.randn(2, 8))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    again.queue.reset()
    torch.testing.assert_close(again.queue.state_dict(), model.queue.state_dict(), rtol=0, atol=0)
    for one in (model, again):
        one.queue.advance()
    assert again.queue.pointer == 5
    torch.testing.assert_close(again.queue.state_dict(), model.queue.state_dict(), rtol=0, atol=0)


def test_reset_starts_anew_otherwise() -> None:
    q = queue(4)
    q.push(rows(1))
    q.advance()
    q.push(rows(2))
    q.reset()
    assert q.pointer == q.filled == q.waiting.count == 0
    assert torch.allclose(q.rows.abs(), torch.ones(4, 1))


# --- ExampleBank --------------------------------------------------------------------------------------------------


def test_a_row_moves_towards_its_new_feature_and_stays_a_unit_vector() -> None:
    bank = ExampleBank(3, 2, momentum=0.25)
    bank.rows.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    bank.push(torch.tensor([2, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert bank.rows[2].tolist() == [-1, 0]  # not before the step is over
    bank.advance()
    mixed = torch.tensor([-0.25, 0.75])
    torch.testing.assert_close(bank.rows, torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]),
                                                       mixed / mixed.norm()]))  # fmt: skip


def test_without_momentum_a_row_is_replaced() -> None:
    bank = ExampleBank(4, 2, momentum=0.0)
    before = bank.rows.clone()
    bank.push(torch.tensor([3]), torch.tensor([[0.6, 0.8]]))
    bank.advance()
    torch.testing.assert_close(bank.rows[3], torch.tensor([0.6, 0.8]))
    assert torch.equal(bank.rows[:3], before[:3])


def test_micro_batches_of_a_bank_are_one_batch() -> None:
    parts = ExampleBank(6, 2)
    whole = copy.deepcopy(parts)
    features, index = torch.nn.functional.normalize(torch.randn(4, 2), dim=1), torch.tensor([5, 0, 3, 1])
    whole.push(index, features)
    for half in (slice(0, 2), slice(2, 4)):
        parts.push(index[half], features[half])
        assert torch.equal(parts.rows[index[half]], whole.rows[index[half]])  # the old rows, still
    for one in (parts, whole):
        one.advance()
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_bank_is_loaded_in_the_middle_of_a_window() -> None:
    bank = ExampleBank(5, 2)
    bank.push(torch.tensor([1]), torch.tensor([[1.0, 0.0]]))
    again = ExampleBank(5, 2)
    again.load_state_dict(bank.state_dict())
    for one in (bank, again):
        one.push(torch.tensor([4]), torch.tensor([[0.0, 1.0]]))
        one.advance()
    torch.testing.assert_close(again.state_dict(), bank.state_dict(), rtol=0, atol=0)
    assert not torch.equal(again.rows[1], again.rows[4])


def test_the_start_of_a_bank() -> None:
    assert torch.allclose(ExampleBank(7, 3).rows.norm(dim=1), torch.ones(7))
    scaled = ExampleBank(500, 3, scale=0.1).rows
    assert 0.09 < scaled.abs().max() <= 0.1


def test_more_images_than_a_step_may_hold_is_an_error_that_breaks_nothing() -> None:
    bank = ExampleBank(3, 1, momentum=0.0)
    bank.push(torch.tensor([0, 1]), rows(1, 1))
    with pytest.raises(ValueError, match="4 images in one optimiser step, and the memory holds 3 at a time"):
        bank.push(torch.tensor([2, 0]), rows(1, 1))
    bank.push(torch.tensor([2]), rows(1))
    bank.advance()
    assert held(bank) == [1, 1, 1]


# --- Center -------------------------------------------------------------------------------------------------------


def test_a_center_moves_towards_the_mean_of_all_rows_of_a_step() -> None:
    """Of all rows, not of the micro-batches' means, and once per step however many there are (lightly-train#968)."""
    center = Center(1)
    center.value.fill_(2.0)
    for part in (rows(1, 2, 6), rows(7)):
        center.observe(part)
        assert center.value.item() == 2
    center.advance(0.75)
    assert center.value.item() == pytest.approx(0.75 * 2 + 0.25 * 4)
    center.observe(rows(0))  # the sums started anew
    center.advance(0.75)
    assert center.value.item() == pytest.approx(0.75 * 2.5)


def test_a_center_is_loaded_in_the_middle_of_a_window_and_reset_to_zero() -> None:
    center, again = Center(2), Center(2)
    center.observe(torch.randn(3, 2))
    again.load_state_dict(center.state_dict())
    for one in (center, again):
        one.observe(torch.ones(2, 2))
        one.advance(0.5)
    torch.testing.assert_close(again.state_dict(), center.state_dict(), rtol=0, atol=0)
    assert center.value.any()
    center.reset()
    assert not any(buffer.any() for buffer in center.buffers())
