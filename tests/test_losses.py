"Losses against independent implementations, gradients against finite differences, properties"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from ltbook.losses.cross_entropy import balanced_softmax, mixed_cross_entropy, weighted_mean
from ltbook.losses.smoothing import SHAPES, label_aware_smoothing, smoothing_strength

sizes = dict(b=st.integers(1, 6), c=st.integers(2, 9), seed=st.integers(0, 2**16))


def batch(b, c, seed):
    g = np.random.default_rng(seed)
    return torch.tensor(g.normal(size=(b, c))*3), torch.tensor(g.integers(0, c, b)), g


def log_softmax(z):
    "By hand, one row at a time"
    return np.array([row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in z.numpy()])


@given(**sizes)
@settings(deadline=None, max_examples=50)
def test_smoothing_by_hand(b, c, seed):
    z, y, g = batch(b, c, seed)
    eps = g.uniform(0, .9, c)
    lp, expected = log_softmax(z), 0.
    for i in range(b):
        e = eps[y[i]]
        target = np.full(c, e/c)
        target[y[i]] += 1 - e
        expected -= (target*lp[i]).sum()/b
    assert label_aware_smoothing(z, y, torch.tensor(eps)).item() == pytest.approx(expected, abs=1e-9)


@given(**sizes)
@settings(deadline=None, max_examples=50)
def test_balanced_softmax_by_hand(b, c, seed):
    z, y, g = batch(b, c, seed)
    n = g.integers(1, 500, c)
    p = n*np.exp(z.numpy())
    expected = -np.log(p[np.arange(b), y.numpy()]/p.sum(1))
    assert balanced_softmax(z, y, torch.tensor(n), 'none').numpy() == pytest.approx(expected, abs=1e-8)


@given(**sizes, lam=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_mixed_by_soft_targets(b, c, seed, lam):
    "Two labels in proportion are one soft label"
    z, y, g = batch(b, c, seed)
    other = torch.tensor(g.integers(0, c, b))
    soft = lam*torch.eye(c, dtype=z.dtype)[y] + (1 - lam)*torch.eye(c, dtype=z.dtype)[other]
    assert mixed_cross_entropy(z, y, other, lam).item() == pytest.approx(
        torch.nn.functional.cross_entropy(z, soft).item(), abs=1e-9)


@given(**sizes)
@settings(deadline=None, max_examples=30)
def test_permuting_classes_changes_nothing(b, c, seed):
    z, y, g = batch(b, c, seed)
    p = torch.tensor(g.permutation(c))
    back = torch.argsort(p)
    n, eps = torch.tensor(g.integers(1, 99, c)), torch.tensor(g.uniform(0, .9, c))
    assert balanced_softmax(z[:, p], back[y], n[p]).item() == pytest.approx(balanced_softmax(z, y, n).item(), abs=1e-9)
    assert label_aware_smoothing(z[:, p], back[y], eps[p]).item() == pytest.approx(
        label_aware_smoothing(z, y, eps).item(), abs=1e-9)


@pytest.mark.parametrize(
    'loss',
    [
        lambda z, y: label_aware_smoothing(z, y, torch.tensor([0.1, 0.2, 0.3, 0.4])),
        lambda z, y: label_aware_smoothing(z, y, torch.tensor([0.1, 0.2, 0.3, 0.4]), 'paper'),
        lambda z, y: balanced_softmax(z, y, torch.tensor([50, 9, 3, 1])),
        lambda z, y: mixed_cross_entropy(z, y, y.flip(0), 0.3),
        lambda z, y: weighted_mean(
            torch.nn.functional.cross_entropy(z, y, reduction='none'), torch.tensor([0.5, 2.0, 1.0]))])
def test_gradients(loss):
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert gradcheck(lambda z: loss(z, torch.tensor([0, 3, 1])), (z,))


@given(
    n=st.lists(st.integers(1, 5000), min_size=2, max_size=30).filter(lambda n: min(n) < max(n)),
    head=st.floats(0.2, 0.9),
    tail=st.floats(0, 0.2),
    shape=st.sampled_from(sorted(SHAPES)))
@settings(deadline=None, max_examples=100)
def test_strength_grows_with_the_count(n, head, tail, shape):
    e = smoothing_strength(n, head, tail, shape).numpy()
    order = np.argsort(n, kind='stable')
    assert e[np.argmax(n)] == pytest.approx(head) and e[np.argmin(n)] == pytest.approx(tail)
    assert (np.diff(e[order]) >= -1e-12).all()


def test_extreme_logits_are_finite():
    z = torch.tensor([[80., -80.], [-80., 80.]])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert label_aware_smoothing(z.to(dtype), torch.tensor([1, 1]), torch.tensor([.4, .1])).isfinite()
