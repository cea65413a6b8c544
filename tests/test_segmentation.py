import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from geoaug import metrics
from tests import reference_segmentation as slow


def random_table(classes, categories, seed, *, sparse=0.0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 50, (classes, categories), generator=generator)
    return table * (torch.rand(classes, categories, generator=generator) >= sparse)


def things_of(classes, count):
    return torch.arange(classes) < count


def close(value, expected):
    return (math.isnan(value) and math.isnan(expected)) or value == pytest.approx(expected, abs=1e-12)


def test_the_vector_of_two_classes():
    score = metrics.hungarian_miou(torch.tensor([[0, 5], [4, 0]]))
    assert score.class_of.tolist() == [1, 0]
    assert score.iou.tolist() == [1, 1]
    assert (score.miou, score.pixel_accuracy) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_confusion_is_that_of_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 5, (2, 6, 7), generator=generator)
    predictions = torch.randint(0, 8, (2, 6, 7), generator=generator)
    table = metrics.confusion(predictions, labels, categories=8, classes=5)
    assert table.tolist() == slow.confusion(labels.flatten().tolist(), predictions.flatten().tolist(), 5, 8)
    assert table.sum() == (labels >= 0).sum() < labels.numel()


def test_confusion_of_nothing_is_nothing():
    none = torch.zeros(0, 4, 4, dtype=torch.int64)
    assert not metrics.confusion(none, none, categories=3, classes=2).any()
    void = torch.full((1, 4, 4), -1)
    assert not metrics.confusion(torch.zeros_like(void), void, categories=3, classes=2).any()


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 4), (1, 4), (4, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_matching_is_the_best_there_is_and_its_scores_are_those_of_loops(shape, seed):
    table = random_table(*shape, seed, sparse=0.5 if seed == 3 else 0)
    score = metrics.hungarian_miou(table)
    _, most = slow.best_matching(table.tolist())
    pairs = [(c, j) for j, c in enumerate(score.class_of.tolist()) if c >= 0]
    assert len({c for c, _ in pairs}) == len(pairs) == min(shape)
    assert sum(int(table[pair]) for pair in pairs) == most
    expected = slow.iou_of_classes(table.tolist(), score.class_of.tolist())
    assert all(map(close, score.iou.tolist(), expected))
    assert close(score.miou, slow.mean_of_numbers(expected))
    assert close(score.pixel_accuracy, most / max(1, int(table.sum())))


@pytest.mark.parametrize("shape", [(27, 27), (27, 128), (16, 5), (40, 40)])
def test_the_matching_is_scipys(shape):
    table = random_table(*shape, 7)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    class_of = metrics.hungarian_miou(table).class_of
    pairs = [(c, j) for j, c in enumerate(class_of.tolist()) if c >= 0]
    assert sum(int(table[pair]) for pair in pairs) == table.numpy()[rows, columns].sum()


def test_counts_beyond_float32_are_told_apart():
    big = 2**40
    assert metrics.hungarian_miou(torch.tensor([[big, big + 1], [big, big]])).class_of.tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("categories", [4, 9])
def test_majority_mapping_reads_each_category_as_its_most_frequent_class(categories, seed):
    table = random_table(5, categories, seed)
    score = metrics.hungarian_miou(table, mapping="majority")
    rows = table.tolist()
    for j, c in enumerate(score.class_of.tolist()):
        assert rows[c][j] == max(row[j] for row in rows)
    expected = slow.iou_of_classes(rows, score.class_of.tolist())
    assert all(map(close, score.iou.tolist(), expected))
    assert score.pixel_accuracy >= metrics.hungarian_miou(table).pixel_accuracy


def test_a_category_nothing_was_read_as_is_of_no_class():
    table = torch.tensor([[3, 0, 0], [0, 0, 4]])
    assert metrics.hungarian_miou(table, mapping="majority").class_of.tolist() == [0, -1, 1]


@pytest.mark.parametrize("things", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_things_and_stuff_are_means_over_a_partition(things, seed):
    table = random_table(7, 7, seed, sparse=0.3)
    score = metrics.hungarian_miou(table, things=things_of(7, things))
    expected = slow.iou_of_classes(table.tolist(), score.class_of.tolist())
    assert close(score.things, slow.mean_of_numbers(expected[:things]))
    assert close(score.stuff, slow.mean_of_numbers(expected[things:]))
    assert min(score.things, score.stuff) <= score.miou <= max(score.things, score.stuff)


@pytest.mark.parametrize("things", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_published_form_is_that_of_loops(things, seed):
    table = random_table(7, 7, seed, sparse=0.3)
    score = metrics.hungarian_miou(table, things=things_of(7, things), legacy=True)
    right = metrics.hungarian_miou(table, things=things_of(7, things))
    expected = slow.published_blocks(table.tolist(), score.class_of.tolist(), things)
    assert all(map(close, (score.things, score.stuff), expected))
    assert score.miou == right.miou  # which the published evaluation has right
    assert (score.things, score.stuff) != (right.things, right.stuff)


def test_the_published_form_can_exceed_the_mean_of_all_on_both_sides():
    """Every confusion crosses the blocks, so that each block by itself is perfect."""
    table = torch.tensor([[6, 0, 4, 0], [0, 6, 0, 4], [4, 0, 6, 0], [0, 4, 0, 6]])
    score = metrics.hungarian_miou(table, things=things_of(4, 2), legacy=True)
    assert (score.things, score.stuff) == (1, 1)
    assert score.miou == pytest.approx(6 / 14)


def test_scores_do_not_depend_on_how_categories_are_numbered_but_for_the_published_form():
    table = random_table(7, 7, 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    there, moved = (metrics.hungarian_miou(t, things=things_of(7, 3)) for t in (table, table[:, order]))
    assert torch.equal(there.class_of[order], moved.class_of)
    assert there[:4] == moved[:4]
    there, moved = (metrics.hungarian_miou(t, things=things_of(7, 3), legacy=True) for t in (table, table[:, order]))
    assert (there.things, there.stuff) != (moved.things, moved.stuff)


def test_what_is_not_there_is_no_number_and_no_nan_in_the_mean():
    empty = metrics.hungarian_miou(torch.zeros(3, 3, dtype=torch.int64), things=things_of(3, 1))
    assert all(math.isnan(value) for value in (empty.miou, empty.things, empty.stuff, empty.pixel_accuracy))
    one = metrics.hungarian_miou(torch.tensor([[5, 0, 0], [0, 0, 0], [0, 0, 0]]), things=things_of(3, 1))
    assert (one.miou, one.things, one.pixel_accuracy) == (1, 1, 1)
    assert math.isnan(one.stuff)
    fewer = metrics.hungarian_miou(torch.tensor([[5], [3], [0]]))  # one category for three classes
    assert fewer.class_of.tolist() == [0]
    assert fewer.iou[:2].tolist() == [5 / 8, 0]
    assert math.isnan(fewer.iou[2])


EYE = torch.eye(3, dtype=torch.int64)
WRONG = [
    (torch.zeros(3), {}, "confusion must be int64 .*got"),
    (EYE[:, :0], {}, "confusion must be int64"),
    (-EYE, {}, "confusion must be counts of at least 0"),
    (EYE, {"mapping": "best"}, "mapping must be"),
    (EYE, {"things": things_of(4, 2)}, r"things must be bool \[3\]"),
    (EYE, {"legacy": True}, "things must be given with legacy"),
    (EYE, {"legacy": True, "things": ~things_of(3, 1)}, "things must be the first classes with legacy"),
    (EYE[:2], {"legacy": True, "things": things_of(2, 1)}, "confusion must be square with legacy"),
    (EYE, {"legacy": True, "things": things_of(3, 1), "mapping": "majority"}, "mapping must be 'one-to-one'"),
]


@pytest.mark.parametrize(("table", "arguments", "message"), WRONG)
def test_what_is_wrong_is_told(table, arguments, message, our_errors):
    with pytest.raises(ValueError, match=f"hungarian_miou: {message}"):
        metrics.hungarian_miou(table, **arguments)


def test_labels_out_of_range_are_told(our_errors):
    good, bad = torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 3)
    with pytest.raises(ValueError, match=r"confusion: labels must be in \[-1, 2\]"):
        metrics.confusion(good, bad, categories=3, classes=3)
    with pytest.raises(ValueError, match=r"confusion: predictions must be in \[0, 2\]"):
        metrics.confusion(bad, good, categories=3, classes=3)
    with pytest.raises(ValueError, match="confusion: labels must be of predictions' shape"):
        metrics.confusion(good, good[0], categories=3, classes=3)
