"Calibration against naive loops, torchmetrics and scikit-learn."
import math
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import log_loss, mean_squared_error
from torchmetrics.functional.classification import multiclass_calibration_error
from ltbook.data.checks import UserError
from ltbook.measure import calibration
from ltbook.measure.calibration import (
    adaptive_calibration_error, brier_score, calibration_bins, calibration_error,
    classwise_calibration_error, confidences, negative_log_likelihood)

EDGES = [i / m for m in (1, 2, 3, 10, 15) for i in range(m + 1)]
pairs = st.lists(st.tuples(st.one_of(st.floats(0, 1), st.sampled_from(EDGES)), st.booleans()), min_size=1, max_size=80)
bin_numbers = st.sampled_from([1, 2, 3, 10, 15, 40])
cases = dict(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 50),
    C=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 5.0, 300.0]))


def case(seed, n, C, scale):
    "Logits (scale 0: all tied; scale 300: probabilities of exactly 0 and 1) and labels."
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, C, generator=g, dtype=torch.float64), torch.randint(C, (n,), generator=g)


def naive_bins(pairs, n_bins):
    "Samples of each bin, by the definition; exactly 0 belongs to the first."
    return [
        [(p, c) for p, c in pairs if i / n_bins < p <= (i + 1) / n_bins or i == p == 0]
        for i in range(n_bins)]


def naive_gap(bin):
    return abs(sum(c for _, c in bin) - math.fsum(p for p, _ in bin)) / len(bin) if bin else 0


@settings(max_examples=150, deadline=None)
@given(pairs, bin_numbers)
def test_bins_and_errors_against_a_loop(pairs, n_bins):
    bins, naive = calibration_bins(*zip(*pairs), n_bins), naive_bins(pairs, n_bins)
    assert bins['count'].tolist() == [len(b) for b in naive]
    assert (
        bins.accuracy.isna().tolist()
        == bins.confidence.isna().tolist()
        == bins.gap.isna().tolist()
        == [not b for b in naive])
    np.testing.assert_allclose(bins.gap.fillna(0), [naive_gap(b) for b in naive], atol=1e-12)
    np.testing.assert_allclose(bins.accuracy.dropna(), [np.mean([c for _, c in b]) for b in naive if b])
    binned = sum(map(len, naive))
    ece, mce = (calibration_error(*zip(*pairs), n_bins, norm) for norm in ('l1', 'max'))
    if binned:
        assert ece == pytest.approx(sum(len(b) * naive_gap(b) for b in naive) / binned, abs=1e-12)
        assert mce == pytest.approx(max(map(naive_gap, naive)), abs=1e-12) and ece <= mce + 1e-12
    else: assert math.isnan(ece) and math.isnan(mce)


@settings(max_examples=50, deadline=None)
@given(
    seed=cases['seed'],
    n=st.integers(1, 80),
    C=st.integers(2, 9),
    scale=st.sampled_from([1.0, 5.0, 300.0]),
    n_bins=st.sampled_from([10, 15]))
def test_errors_against_torchmetrics(seed, n, C, scale, n_bins):
    logits, labels = case(seed, n, C, scale)
    confidence, guess = confidences(logits)
    # torchmetrics closes its bins on the left and has one bin too many for exactly 1: stay clear of all edges
    inside = (confidence * n_bins - (confidence * n_bins).round()).abs() > 1e-5
    inside |= confidence > 1 - 1e-9
    if not inside.any():
        return
    clamped = logits.softmax(1)[inside].clamp(max=1 - 2**-24)
    for norm in ('l1', 'max'):
        theirs = multiclass_calibration_error(clamped, labels[inside], C, n_bins, norm).item()
        assert calibration_error(confidence[inside], (guess == labels)[inside], n_bins, norm) == pytest.approx(
            theirs, abs=2e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60, unique=True), st.randoms(use_true_random=False), bin_numbers)
def test_adaptive_error_against_a_loop(confidence, random, n_bins):
    correct = [random.random() < 0.5 for _ in confidence]
    ordered = sorted(zip(confidence, correct))
    m = min(n_bins, len(ordered))
    parts = np.array_split(np.arange(len(ordered)), m)
    expected = sum(len(part) * naive_gap([ordered[j] for j in part]) for part in parts) / len(ordered)
    assert adaptive_calibration_error(confidence, correct, n_bins) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(pairs, st.randoms(use_true_random=False), bin_numbers)
def test_order_of_samples_does_not_matter(pairs, random, n_bins):
    shuffled = random.sample(pairs, len(pairs))
    for error in (calibration_error, adaptive_calibration_error):
        assert error(*zip(*shuffled), n_bins) == pytest.approx(error(*zip(*pairs), n_bins), abs=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(**cases, n_bins=bin_numbers)
def test_classwise_error_against_a_loop(seed, n, C, scale, n_bins):
    logits, labels = case(seed, n, C, scale)
    p = logits.float().softmax(1)  # float32: with scale 300 it underflows to exact zeros
    of_class = (
        naive_bins([(q, k == y) for q, y in zip(p[:, k].tolist(), labels.tolist())], n_bins)
        for k in range(C))
    expected = sum(len(b) * naive_gap(b) for bins in of_class for b in bins) / (n * C)
    assert classwise_calibration_error(p, labels, n_bins) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_scores_against_scikit_learn(seed, n, C, scale):
    logits, labels = case(seed, n, C, scale / 100)  # scikit-learn clips log(p) where p is below 2e-16
    p, onehot = logits.softmax(1).numpy(), np.eye(C)[labels.numpy()]
    assert brier_score(logits, labels) == pytest.approx(C * mean_squared_error(onehot, p), abs=1e-12)
    if C > 1:
        assert negative_log_likelihood(logits, labels) == pytest.approx(
            log_loss(labels, p, labels=range(C)), abs=1e-12)
    else:
        assert negative_log_likelihood(logits, labels) == 0


@settings(max_examples=40, deadline=None)
@given(**cases)
def test_permuting_classes_changes_nothing(seed, n, C, scale):
    logits, labels = case(seed, n, C, scale or 1.)
    new = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    renamed, relabelled = logits[:, new.argsort()], new[labels]
    (p, guess), (q, guess_renamed) = confidences(logits), confidences(renamed)
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)
    assert torch.equal(new[guess], guess_renamed)
    for f in (negative_log_likelihood, brier_score):
        assert f(renamed, relabelled) == pytest.approx(f(logits, labels), rel=1e-12, abs=1e-12)
    p = logits.softmax(1)
    assert classwise_calibration_error(p[:, new.argsort()], relabelled) == pytest.approx(
        classwise_calibration_error(p, labels), abs=1e-12)


def test_drawn_labels_are_calibrated_and_sharper_logits_are_not():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)
    error = {s: calibration_error(confidences(s * logits)[0], logits.argmax(1) == labels) for s in (0.5, 1, 2)}
    assert error[1] < 0.02 and min(error[0.5], error[2]) > 5 * error[1]


def test_blocks_of_rows_give_the_same_numbers(monkeypatch):
    logits, labels = case(0, 50, 7, 3.)
    def numbers():
        p, guess = confidences(logits)
        return torch.cat([p, guess.double()]).tolist() + [
            negative_log_likelihood(logits, labels),
            brier_score(logits, labels),
            classwise_calibration_error(logits.softmax(1), labels)]
    whole, blocks = numbers(), calibration._blocks
    seen = []
    monkeypatch.setattr(calibration, '_blocks', lambda x: seen.append(len(list(blocks(x, 30)))) or blocks(x, 30))
    np.testing.assert_allclose(numbers(), whole, rtol=1e-12)
    assert seen == [13] * 4  # four rows of seven at a time


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    logits, labels = case(1, 40, 6, 3.)
    half = logits.to(dtype)
    confidence, _ = confidences(half)
    assert confidence.dtype == torch.float32 and torch.equal(confidence, half.float().softmax(1).amax(1))
    for f in (negative_log_likelihood, brier_score):
        assert f(half, labels) == pytest.approx(f(half.float(), labels), rel=1e-12)


def test_prediction_comes_from_the_logits():
    logits = torch.tensor([[0., 1e-9]])
    # the softmax cannot tell them apart
    assert logits.softmax(1).unique().numel() == 1 and confidences(logits)[1].item() == 1


def test_a_hopeless_model_has_an_infinite_likelihood():
    assert negative_log_likelihood(torch.tensor([[0., -math.inf]]), torch.tensor([1])) == math.inf
    assert classwise_calibration_error(torch.tensor([[1., 0]]), torch.tensor([1])) == 1


@pytest.mark.parametrize(
    'confidence, correct',
    [([], []), ([0.5], [1, 0]), ([[0.5]], [[1]]), ([-0.1], [1]), ([1.1], [1]), ([math.nan], [1]),
     ([.5], [2]), ([.5], [-1]), ([.5], [.5]), ([.5], [math.nan])])
def test_bad_pairs_are_refused(confidence, correct):
    for f in (calibration_bins, calibration_error, adaptive_calibration_error):
        with pytest.raises(UserError):
            f(confidence, correct)


def test_other_mistakes_are_refused():
    for n_bins in (0, -1, 1.5, True):
        for f in (calibration_bins, calibration_error, adaptive_calibration_error):
            with pytest.raises(UserError, match='number of bins'): f([.5], [1], n_bins)
    with pytest.raises(UserError, match='whole numbers'):
        negative_log_likelihood(torch.zeros(2, 3), torch.tensor([.5, 1]))
    with pytest.raises(UserError, match='norm'): calibration_error([0.5], [1], norm='l2')
    with pytest.raises(UserError, match='softmax'):
        classwise_calibration_error(torch.tensor([[3.0, -1]]), torch.tensor([0]))
    with pytest.raises(UserError, match='softmax'):
        classwise_calibration_error(torch.tensor([[math.nan, 0]]), torch.tensor([0]))
    with pytest.raises(UserError, match='diverged'): confidences(torch.tensor([[math.inf, 0]]))
