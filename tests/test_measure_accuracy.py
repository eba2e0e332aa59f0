"Accuracies against scikit-learn, over sizes, classes and ties."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, recall_score
from ltbook.data.checks import UserError
from ltbook.measure.accuracy import as_predictions, per_class_accuracy, shot_accuracy, top1


def case(seed, n, C, ties=False):
    "Random logits (with many equal ones where `ties`) and labels; some classes may have no sample."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, C, generator=g)
    return (logits.round() if ties else logits), torch.randint(C, (n,), generator=g)


cases = dict(seed=st.integers(0, 2**31), n=st.integers(1, 60), C=st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(**cases, ties=st.booleans())
def test_against_scikit_learn(seed, n, C, ties):
    logits, labels = case(seed, n, C, ties)
    guess = logits.numpy().argmax(1)  # numpy takes the first of equal values, too
    assert top1(logits, labels) == pytest.approx(accuracy_score(labels, guess))
    expected = recall_score(labels, guess, labels=range(C), average=None, zero_division=np.nan)
    expected[np.bincount(labels, minlength=C) == 0] = np.nan
    np.testing.assert_allclose(per_class_accuracy(logits, labels, C), expected)


@settings(max_examples=40, deadline=None)
@given(**cases)
def test_permuting_classes_permutes_results(seed, n, C):
    logits, labels = case(seed, n, C)
    new = torch.randperm(C, generator=torch.Generator().manual_seed(seed))  # class k is called new[k] from now on
    renamed = logits[:, new.argsort()], new[labels]
    assert top1(*renamed) == top1(logits, labels)
    before, after = (per_class_accuracy(*pair, C) for pair in ((logits, labels), renamed))
    np.testing.assert_array_equal(after[new], before)
    groups = dict(many=np.arange(C // 2), few=np.arange(C // 2, C))
    moved = shot_accuracy(after, {name: new.numpy()[ids] for name, ids in groups.items()})
    for name, value in shot_accuracy(before, groups).items():
        assert moved[name] == (value if value is None else pytest.approx(value))


def test_group_is_mean_over_classes_and_not_over_samples():
    per_class = per_class_accuracy(torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]), 2)
    assert shot_accuracy(per_class, dict(all=[0, 1])) == dict(all=0.5)


def test_a_column_beyond_the_classes_is_never_right():
    logits = torch.tensor([[0., 1, 5], [0, 9, 5]])  # the last column stands for "none of them"
    assert per_class_accuracy(logits, torch.tensor([1, 1]), 2)[1] == 0.5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype):
    logits, labels = torch.eye(4, dtype=dtype), torch.tensor([0, 1, 2, 0])
    assert top1(logits, labels) == 0.75 and per_class_accuracy(logits, labels, 4).tolist()[:3] == [0.5, 1, 1]


@pytest.mark.parametrize(
    'logits, labels',
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(2)),
        (torch.zeros(3, 2), torch.zeros(3, 1)),
        (torch.zeros(0, 2), torch.zeros(0)),
        (torch.zeros(2, 2), torch.tensor([0, 2])),
        (torch.zeros(2, 2), torch.tensor([-1, 0]))])
def test_what_does_not_fit_is_refused(logits, labels):
    for f in (as_predictions, top1, lambda *pair: per_class_accuracy(*pair, 2)):
        with pytest.raises(UserError):
            f(logits, labels)


def test_more_labels_than_classes_asked_for():
    with pytest.raises(UserError, match='2 classes'): per_class_accuracy(torch.zeros(1, 3), torch.tensor([2]), 2)
