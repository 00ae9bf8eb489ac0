import numpy as np
import pytest

from embedlab.data import BalancedBatches, ShuffledBatches
from embedlab.data.samplers import EvaluationBatches

LABELS = np.repeat(np.arange(10), 7)


def balanced(**arguments) -> BalancedBatches:
    return BalancedBatches(LABELS, arguments.pop("classes", 3), images_per_class=4, **arguments)


def test_a_batch_holds_p_classes_of_k_images() -> None:
    for batch in balanced():
        classes, counts = np.unique(LABELS[batch], return_counts=True)
        assert len(classes) == 3
        assert set(counts) == {4}
        assert len(set(batch)) == 12


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_draw_different_images_and_equal_numbers_of_batches(world) -> None:
    ranks = [list(balanced(rank=rank, world=world, batches=5)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    for step in zip(*ranks, strict=True):
        drawn = np.concatenate(step)
        assert len(set(drawn.tolist())) == len(drawn)
        assert len(np.unique(LABELS[drawn])) == 3 * world


def test_ranks_share_classes_but_not_images_when_classes_are_few() -> None:
    ranks = [next(iter(balanced(classes=8, rank=rank, world=2, batches=1))) for rank in range(2)]
    first, second = (set(rank) for rank in ranks)
    assert len(np.unique(LABELS[ranks[0]])) == 8
    shared = set(LABELS[ranks[0]]) & set(LABELS[ranks[1]])
    assert shared
    assert len(first & second) <= len(shared)  # 7 images a class cannot give 2 x 4 different ones: one comes twice


def test_epochs_differ_and_are_reproducible() -> None:
    one, other = balanced(seed=5), balanced(seed=5)
    first = list(one)
    assert first == list(other)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first


def test_all_images_are_used_before_any_comes_twice() -> None:
    drawn = np.concatenate(list(BalancedBatches(np.repeat([0, 1], 8), 2, images_per_class=2, batches=4)))
    assert sorted(drawn) == list(range(16))


def test_small_classes_give_what_they_have() -> None:
    sampler = BalancedBatches([0, 0, 1, 1, 1, 1, 1], 2, images_per_class=4, batches=3)
    assert all(len(batch) == 6 for batch in sampler)


@pytest.mark.parametrize(
    ("labels", "classes", "images", "text"),
    [
        ([0, 0, 1], 2, 2, "1 of 2 classes have one image only .* first class numbers \\[1\\]"),
        ([0, 0, 1, 1], 3, 2, "A batch of 3 classes cannot be drawn from 2"),
        ([0, 0, 1, 1], 2, 1, "at least 2 classes .* and 2 images per class"),
    ],
)
def test_what_cannot_be_balanced_is_explained(labels, classes, images, text) -> None:
    with pytest.raises(ValueError, match=text):
        BalancedBatches(labels, classes, images_per_class=images)


def test_shuffled_batches_of_all_ranks_cover_the_data_once() -> None:
    ranks = [list(ShuffledBatches(24, 4, rank=rank, world=3)) for rank in range(3)]
    assert sorted(np.concatenate([np.concatenate(rank) for rank in ranks])) == list(range(24))
    alone = list(ShuffledBatches(24, 12, rank=0, world=1))
    assert [np.concatenate(step).tolist() for step in zip(*ranks, strict=True)] == alone


def test_a_batch_larger_than_the_data_is_cut(caplog) -> None:
    sampler = ShuffledBatches(5, 64)
    assert [sorted(batch) for batch in sampler] == [[0, 1, 2, 3, 4]]
    assert "batch_size 64 is cut to 5" in caplog.text
    with pytest.raises(ValueError, match="1 training images cannot be shared by 2 processes"):
        ShuffledBatches(1, 4, rank=0, world=2)


def test_evaluation_counts_every_sample_once_without_padding() -> None:
    ranks = [list(EvaluationBatches(11, 2, rank=rank, world=3)) for rank in range(3)]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(11))
    with pytest.raises(ValueError, match="2 images to evaluate cannot be shared by 3 processes"):
        EvaluationBatches(2, 2, rank=0, world=3)
