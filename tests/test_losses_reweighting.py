"Class weights and losses that change what is asked of a sample: plain loops, finite differences, properties"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from ltbook.data.checks import UserError
from ltbook.losses.cross_entropy import balanced_softmax, reduced, weighted_mean
from ltbook.losses.margins import adjusted_logits, equalization_loss, focal_loss, ldam_loss, logit_adjustment
from ltbook.losses.reweighting import (
    cdb_weights, class_balanced_weights, deferred, dynamic_tau, inverse_frequency_weights)
from ltbook.measure.label_shift import replace_prior

sizes = dict(b=st.integers(1, 6), c=st.integers(2, 9), seed=st.integers(0, 2**16))
counts = st.lists(st.integers(1, 5000), min_size=1, max_size=20)
betas = st.sampled_from([0., .5, .9, .99, .999, .9999])
accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=20)
taus = st.one_of(st.floats(.05, 8), st.just('dynamic'))


def batch(b, c, seed):
    g = np.random.default_rng(seed)
    return (
        torch.tensor(g.normal(size=(b, c)) * 3),
        torch.tensor(g.integers(0, c, b)),
        torch.tensor(g.integers(1, 500, c)),
        g)


def cross_entropy(z, y):
    "One sample, by hand"
    return math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[y]


# weights

@given(n=counts, beta=betas)
@settings(deadline=None, max_examples=40)
def test_class_balanced_by_the_sum_of_powers(n, beta):
    "The effective number is 1 + beta + beta^2 + ... over the images of a class"
    effective = [sum(beta**j for j in range(k)) for k in n]
    total = sum(1/e for e in effective)
    assert class_balanced_weights(n, beta).numpy() == pytest.approx([len(n)/e/total for e in effective], rel=1e-9)


@given(n=counts)
@settings(deadline=None, max_examples=40)
def test_class_balanced_between_its_ends(n):
    "beta = 0 gives ones, beta -> 1 the inverse frequency, and in between the contrast grows"
    assert class_balanced_weights(n, 0.).numpy() == pytest.approx(np.ones(len(n)))
    assert class_balanced_weights(n, 1 - 1e-14).numpy() == pytest.approx(inverse_frequency_weights(n).numpy(), rel=1e-6)
    contrast = [(w.max()/w.min()).item() for w in (class_balanced_weights(n, b) for b in (0., .9, .99, .999, .9999))]
    assert all(b >= a - 1e-12 for a, b in zip(contrast, contrast[1:]))


@given(n=counts, beta=betas)
@settings(deadline=None, max_examples=40)
def test_weights_by_count_are_normalised_and_follow_the_classes(n, beta):
    order = np.random.default_rng(len(n)).permutation(len(n))
    for make in (inverse_frequency_weights, lambda n: class_balanced_weights(n, beta)):
        w = make(n)
        assert w.dtype == torch.float64 and w.sum().item() == pytest.approx(len(n))
        assert torch.allclose(make(np.array(n)[order]), w[order]) and torch.equal(make(torch.tensor(n)), w)
        assert (w[np.argsort(n)].diff() <= 1e-12).all()
    plain = (1 - beta)/(1 - beta**np.array(n, dtype=np.float64))
    assert np.allclose(class_balanced_weights(n, beta), plain*len(n)/plain.sum())


@given(a=accuracies, tau=taus)
@settings(deadline=None, max_examples=80)
def test_difficulty_weights_by_loops(a, tau):
    "Never nan, sum C, harder is heavier; the plain quotient wherever it can be computed"
    w = cdb_weights(a, tau).numpy()
    assert np.isfinite(w).all() and w.sum() == pytest.approx(len(a)) and (np.diff(w[np.argsort(a)]) <= 1e-9).all()
    t = 2/(1 + math.exp(1 - max(a)/(min(a) + .01))) if tau == 'dynamic' else tau
    powers = [(1 - v)**t for v in a]
    if sum(powers) > 1e-200: assert w == pytest.approx([len(a)*p/sum(powers) for p in powers], rel=1e-7, abs=1e-12)
    if len(set(a)) == 1: assert w == pytest.approx(np.ones(len(a)))


@given(a=accuracies)
@settings(deadline=None, max_examples=40)
def test_dynamic_tau_stays_in_its_range(a):
    assert .53 < dynamic_tau(a) <= 2
    assert dynamic_tau(torch.tensor(a, dtype=torch.float64)) == dynamic_tau(a)
    assert torch.equal(cdb_weights(a, 'dynamic'), cdb_weights(a, dynamic_tau(a)))


@pytest.mark.parametrize(
    'call',
    [
        lambda: inverse_frequency_weights([3, 0]),
        lambda: inverse_frequency_weights([3, -1]),
        lambda: class_balanced_weights([3.0, float('nan')]),
        lambda: class_balanced_weights([3, 4], 1.0),
        lambda: class_balanced_weights([3, 4], -0.1),
        lambda: class_balanced_weights([3, 4], float('nan')),
        lambda: cdb_weights([0.5, 1.01]),
        lambda: cdb_weights([-0.01, 0.5]),
        lambda: cdb_weights([float('nan'), 0.5]),
        lambda: dynamic_tau([50.0, 80.0]),
        lambda: cdb_weights([0.5, 0.6], 0),
        lambda: cdb_weights([0.5, 0.6], -2.0),
        lambda: cdb_weights([0.5, 0.6], float('inf')),
        lambda: cdb_weights([0.5, 0.6], 'auto'),
        lambda: weighted_mean(torch.ones(3, 1), torch.ones(3)),
        lambda: weighted_mean(torch.ones(3), torch.ones(1)),
        lambda: reduced(torch.ones(3), 'sum'),
        lambda: focal_loss(torch.zeros(1, 2), torch.tensor([0]), -1.0),
        lambda: focal_loss(torch.zeros(1, 2), torch.tensor([0]), float('nan')),
        lambda: equalization_loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), drop=0.5),
        lambda: equalization_loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), drop=1.5),
        lambda: adjusted_logits(torch.zeros(1, 2), [5, 0]),
        lambda: ldam_loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), -0.5),
        lambda: ldam_loss(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), scale=0)])
def test_mistakes_are_told_in_one_line(call):
    with pytest.raises(UserError) as err:
        call()
    assert '\n' not in str(err.value) and len(str(err.value)) > 20


def test_deferred_starts_on_its_epoch():
    w = class_balanced_weights([100, 10])
    assert [torch.equal(deferred(w, e, 3), w) for e in range(5)] == [False, False, False, True, True]
    assert all(torch.equal(deferred(w, e, 3), torch.ones(2, dtype=w.dtype)) for e in range(3))


# losses

@given(**sizes, gamma=st.sampled_from([0., .5, 1., 2., 5.]))
@settings(deadline=None, max_examples=30)
def test_focal_by_hand(b, c, seed, gamma):
    z, y, _, _ = batch(b, c, seed)
    ce = [cross_entropy(row, k) for row, k in zip(z.tolist(), y.tolist())]
    expected = [(1 - math.exp(-v))**gamma*v for v in ce]
    for detach in (False, True):
        assert focal_loss(z, y, gamma, detach, 'none').numpy() == pytest.approx(expected, abs=1e-9)
    assert focal_loss(z, y, gamma).item() == pytest.approx(np.mean(expected), abs=1e-9)


@given(**sizes, threshold=st.sampled_from([0., .05, .2, 1.1]), s=st.booleans())
@settings(deadline=None, max_examples=30)
def test_equalization_by_hand(b, c, seed, threshold, s):
    z, y, n, _ = batch(b, c, seed)
    expected = []
    for row, label in zip(z.tolist(), y.tolist()):
        terms = [math.log1p(math.exp(-v)) if k == label else math.log1p(math.exp(v)) for k, v in enumerate(row)]
        expected.append(
            sum(
                t
                for k, t in enumerate(terms)
                if k == label or not (s and n[k].item() / n.sum().item() < threshold)))
    assert equalization_loss(z, y, n, threshold, drop=s, reduction='none').numpy() == pytest.approx(expected, abs=1e-9)


@given(**sizes, tau=st.floats(-1, 3))
@settings(deadline=None, max_examples=30)
def test_logit_adjustment_by_hand(b, c, seed, tau):
    z, y, n, _ = batch(b, c, seed)
    p = (n.double()/n.sum()).tolist()
    expected = [
        cross_entropy([v + tau * math.log(q) for v, q in zip(row, p)], k)
        for row, k in zip(z.tolist(), y.tolist())]
    assert logit_adjustment(z, y, n, tau, 'none').numpy() == pytest.approx(expected, abs=1e-8)
    assert torch.equal(logit_adjustment(z, y, n, 1., 'none'), balanced_softmax(z, y, n, 'none'))


@given(**sizes)
@settings(deadline=None, max_examples=40)
def test_post_hoc_adjustment_undoes_the_training_prior(b, c, seed):
    "Probabilities under a uniform prior at tau 1; training-time and post-hoc shifts are inverse"
    z, y, n, _ = batch(b, c, seed)
    assert torch.allclose(adjusted_logits(z, n).softmax(1), replace_prior(z, n, torch.ones(c)).softmax(1))
    bayes = z.softmax(1)/n
    assert torch.allclose(adjusted_logits(z, n).softmax(1), bayes/bayes.sum(1, keepdim=True))
    assert logit_adjustment(adjusted_logits(z, n, 0.7), y, n, 0.7).item() == pytest.approx(
        torch.nn.functional.cross_entropy(z, y).item(), abs=1e-9)


@given(**sizes, margin=st.sampled_from([0., .1, .5]))
@settings(deadline=None, max_examples=30)
def test_ldam_by_hand(b, c, seed, margin):
    z, y, n, g = batch(b, c, seed)
    z, w = z.tanh(), torch.tensor(g.uniform(0, 3, c))
    rarest, expected = min(n.tolist()), []
    for row, k in zip(z.tolist(), y.tolist()):
        row[k] -= margin*(rarest/n[k].item())**.25
        expected.append(cross_entropy([30*v for v in row], k))
    assert ldam_loss(z, y, n, margin, reduction='none').numpy() == pytest.approx(expected, abs=1e-6)
    weighted = [v*w[k].item() for v, k in zip(expected, y)]
    # over the batch size
    assert ldam_loss(z, y, n, margin, weight=w).item() == pytest.approx(sum(weighted)/b, abs=1e-6)


LOSSES = {
    'focal': lambda z, y, n, **kw: focal_loss(z, y, 2.0, **kw),
    'focal, detached': lambda z, y, n, **kw: focal_loss(z, y, 2.0, True, **kw),
    'equalization': lambda z, y, n, **kw: equalization_loss(z, y, n, 0.1, **kw),
    'logit adjustment': lambda z, y, n, **kw: logit_adjustment(z, y, n, 1.5, **kw),
    'LDAM': lambda z, y, n, **kw: ldam_loss(z.tanh(), y, n, **kw)}


@pytest.mark.parametrize('name', LOSSES)
@given(**sizes)
@settings(deadline=None, max_examples=10)
def test_one_value_a_sample_and_the_order_of_classes(name, b, c, seed):
    z, y, n, g = batch(b, c, seed)
    loss = LOSSES[name]
    each, p = loss(z, y, n, reduction='none'), torch.tensor(g.permutation(c))
    assert each.shape == (b,) and each.mean().item() == pytest.approx(loss(z, y, n).item(), abs=1e-9)
    assert all(loss(z[i:i + 1], y[i:i + 1], n).item() == pytest.approx(each[i].item(), abs=1e-9) for i in range(b))
    assert torch.allclose(loss(z[:, p], torch.argsort(p)[y], n[p], reduction='none'), each)
    w = class_balanced_weights(n)
    assert weighted_mean(each, w[y]).item() == pytest.approx(
        sum(v * w[k].item() for v, k in zip(each.tolist(), y)) / b, abs=1e-9)


@pytest.mark.parametrize('name', [k for k in LOSSES if 'detached' not in k])
def test_gradients(name):
    "By finite differences, to the logits and to the class weights"
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    w, y, n = (
        torch.tensor([0.3, 0.7, 1.0, 2.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 3, 1]),
        torch.tensor([100, 50, 20, 5]))
    assert gradcheck(lambda z, w: weighted_mean(LOSSES[name](z, y, n, reduction='none'), w[y]), (z, w))


def test_detached_factor_is_a_weight():
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.tensor([0, 3, 1, 1, 2])
    q = z.detach().softmax(1)[range(5), y]
    own, = torch.autograd.grad(focal_loss(z, y, 2., True), z)
    (weighted,) = torch.autograd.grad(
        weighted_mean(torch.nn.functional.cross_entropy(z, y, reduction='none'), (1 - q) ** 2), z)
    assert torch.allclose(own, weighted)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_are_finite(name, dtype):
    z = torch.tensor([[90., -90., 0.], [-90., 90., 0.]], dtype=dtype, requires_grad=True)
    loss = LOSSES[name](z, torch.tensor([0, 0]), torch.tensor([500, 20, 5]))
    loss.backward()
    assert loss.dtype == dtype and loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize('gamma', [.1, .5, 1., 3.])
def test_focal_gradient_of_a_known_sample(gamma):
    "Logits 40 apart: 1 - q rounds to 0, and the straight formula gives nan below gamma 1"
    z = torch.tensor([[40., 0., 0.]], requires_grad=True)
    focal_loss(z, torch.tensor([0]), gamma).backward()
    assert z.grad.isfinite().all()


def test_equalization_draws_from_its_generator_alone():
    z, y, n = torch.tensor([[2., 1, 0, -1]]), torch.tensor([0]), torch.tensor([100, 50, 20, 5])
    def run(seed):
        g = torch.Generator().manual_seed(seed)
        return [equalization_loss(z, y, n, .1, .5, g).item() for _ in range(40)]
    before = torch.get_rng_state()
    values = run(0)
    assert values == run(0) and values != run(1) and len(set(values)) == 2
    assert torch.equal(torch.get_rng_state(), before)
