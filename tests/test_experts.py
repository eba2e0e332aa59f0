"Experts: rotation, network, losses, pool and runs, against loops, torchvision and finite differences"
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from ltbook.data.augment import rotate
from ltbook.data.checks import UserError
from ltbook.data.stores import ImageSet
from ltbook.data.views import Augmentation, TrainView
from ltbook.losses.dirichlet import DirichletPool, component_means, dirmixe_loss, draw_losses, semi_variance
from ltbook.losses.experts import (
    ldam_margins, reversed_prior, ride_loss, ride_temperature, sade_adjustment, skill_diverse_loss)
from ltbook.losses.reweighting import class_balanced_weights
from ltbook.models.expert_resnet import ExpertResNet32
from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import make_context, run

sizes = dict(b=st.integers(1, 5), c=st.integers(2, 8), seed=st.integers(0, 2**16))


def experts(b, c, seed):
    g = np.random.default_rng(seed)
    return torch.tensor(g.normal(size=(b, 3, c))*3), torch.tensor(g.integers(0, c, b)), g.integers(1, 500, c), g


def ce(z, y):
    "Cross-entropy of one row by plain floats"
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z)) - z[y]


@pytest.mark.parametrize('side,channels', [(8, 1), (32, 3), (7, 3)])
def test_rotation_as_torchvision_image_by_image(side, channels):
    "Torchvision's nearest neighbour goes through a grid in [-1, 1]; only pixels on a tie may differ"
    r = np.random.default_rng(side)
    x = torch.from_numpy(r.integers(1, 256, (200, side, side, channels), dtype=np.uint8)).permute(0, 3, 1, 2)
    degrees = torch.from_numpy(r.uniform(-15, 15, 200)).float()
    want = torch.stack(
        [
            TF.rotate(i, d, TF.InterpolationMode.NEAREST, fill=[0.0] * channels)
            for i, d in zip(x, degrees.tolist())])
    got = rotate(x, degrees)
    assert got.dtype == torch.uint8 and (got != want).float().mean() < 2e-4


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_rotation_pixel_by_pixel(seed):
    r = np.random.default_rng(seed)
    x, d = torch.from_numpy(r.integers(1, 256, (1, 2, 9, 9))), float(r.uniform(-180, 180))
    got, cos, sin = rotate(x, torch.tensor([d])), math.cos(math.radians(d)), math.sin(math.radians(d))
    for i in range(9):
        for j in range(9):
            u, v = j - 4, i - 4
            col, row = u*cos - v*sin + 4, u*sin + v*cos + 4
            if min(abs(col % 1 - .5), abs(row % 1 - .5)) < 1e-4: continue
            col, row = round(col), round(row)
            want = x[0, :, row, col] if 0 <= row < 9 and 0 <= col < 9 else torch.zeros(2, dtype=x.dtype)
            assert torch.equal(got[0, :, i, j], want)


def test_view_with_rotation_is_its_plan():
    data = ImageSet(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)),
        torch.arange(9) % 3,
        tuple('abc'))
    view, plain = (TrainView(data, Augmentation(2, True, rotation=r)) for r in (15., 0.))
    index = np.arange(2000) % 9
    plan, old = (v.plan(index, np.random.default_rng(1))['rows'] for v in (view, plain))
    assert (
        plan.shape[0] == 7
        and torch.equal(plan[:6], old)
        and plan[6].abs().max() <= 15_000
        and abs(plan[6].double().mean()) < 5 * 8660 / math.sqrt(2000))
    x, still = (255*v(index[:20], np.random.default_rng(1))['x'] for v in (view, plain))
    assert torch.allclose(
        x, rotate(still, view.plan(index[:20], np.random.default_rng(1))['rows'][6] / 1000), atol=1e-3
    ) and not torch.allclose(x, still, atol=1)
    with pytest.raises(UserError, match='rotation'): TrainView(data, Augmentation(2, True, rotation=200.))


@pytest.mark.parametrize('classes,reduced,total', [(10, True, 770_896), (100, True, 783_856), (100, False, 1_362_064)])
def test_network_sizes(classes, reduced, total):
    net = ExpertResNet32(classes, reduced=reduced)
    assert sum(p.numel() for p in net.parameters()) == total
    out = net(torch.randn(2, 3, 32, 32))
    assert (
        out['experts'].shape == (2, 3, classes)
        and torch.equal(out['logits'], out['experts'].mean(1))
        and out['experts'].abs().max() <= 30 + 1e-4)
    assert net.features(torch.randn(2, 3, 32, 32)).shape == (2, 3, 48 if reduced else 64)


@given(**sizes)
@settings(deadline=None, max_examples=40)
def test_sade_by_floats(b, c, seed):
    f, y, n, g = experts(b, c, seed)
    pi = [k/n.sum() for k in n]
    order = sorted(range(c), key=lambda k: -pi[k])
    rev = [0.]*c
    for j, k in enumerate(order): rev[k] = pi[order[c - 1 - j]]
    add = [
        [0.0] * c,
        [math.log(p + 1e-9) for p in pi],
        [math.log(p + 1e-9) - 1.5 * math.log(r + 1e-9) for p, r in zip(pi, rev)]]
    want = sum(ce([f[i, k, j].item() + add[k][j] for j in range(c)], y[i].item()) for i in range(b) for k in range(3))/b
    assert skill_diverse_loss(f, y, sade_adjustment(torch.tensor(n), 1.5)).item() == pytest.approx(want, abs=1e-9)


@given(**sizes)
@settings(deadline=None, max_examples=30)
def test_permuted_classes_and_reversed_priors(b, c, seed):
    f, y, n, g = experts(b, c, seed)
    n = np.arange(1, c + 1)*7 + g.permutation(c)*0          # no ties
    p = torch.tensor(g.permutation(c))
    back = torch.empty_like(p); back[p] = torch.arange(c)
    losses = [
        skill_diverse_loss(a, t, sade_adjustment(torch.tensor(m)))
        for a, t, m in ((f, y, n), (f[:, :, p], back[y], n[p.numpy()]))]
    assert torch.allclose(*losses)
    w, v = component_means(n), component_means(n[p.numpy()])
    assert np.allclose(w[:, p.numpy()], v)
    q = torch.tensor(n/n.sum())
    assert torch.equal(reversed_prior(reversed_prior(q)), q)


@given(**sizes, power=st.sampled_from([1., 1.3, 1.6]), m=st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_dirmixe_by_floats(b, c, seed, power, m):
    f, y, n, g = experts(b, c, seed)
    pi, k, q = torch.tensor(n/n.sum()), g.integers(0, 3, m), g.dirichlet(np.ones(c), m)
    want = [
        sum(
            ce(
                [f[i, k[j], a].item() - math.log((q[j, a] / pi[a].item()) ** power + 1e-9) for a in range(c)],
                y[i].item())
            for i in range(b))
        / b
        for j in range(m)]
    got = draw_losses(f, y, torch.tensor(k), torch.tensor(q), pi, power)
    assert np.allclose(got, want, atol=1e-7)
    mean = sum(want)/m
    above = [v for v in want if v > mean]
    penalty = sum((v - mean)**2 for v in above)/max(len(above) - 1, 1)
    assert dirmixe_loss(f, y, torch.tensor(k), torch.tensor(q), pi, power, 5.0).item() == pytest.approx(
        mean + 5 * penalty, abs=1e-6)


def test_losses_differentiate_as_they_should():
    f, y, n, g = experts(3, 4, 0)
    f, pi = f.requires_grad_(), torch.tensor(n/n.sum())
    k, q = torch.tensor([0, 1, 2, 2, 1]), torch.tensor(g.dirichlet(np.ones(4), 5))
    assert gradcheck(lambda z: skill_diverse_loss(z, y, sade_adjustment(torch.tensor(n))), f)
    assert gradcheck(lambda z: dirmixe_loss(z, y, k, q, pi, 1.3, 5.), f)
    margins = 30*ldam_margins(torch.tensor(n))
    assert gradcheck(lambda z: ride_loss(z, y, margins, 0., class_balanced_weights(torch.tensor(n))), f)


def test_large_logits_in_single_precision():
    "B = 128, C = 100, M = 60, logits in +-30: loop and matrix form agree, in value and gradient"
    g = torch.Generator().manual_seed(1)
    f, y, n = (
        torch.rand(128, 3, 100, generator=g) * 60 - 30,
        torch.randint(100, (128,), generator=g),
        np.array([int(500 * 0.01 ** (c / 99)) for c in range(100)]))
    k, q = (torch.as_tensor(v) for v in DirichletPool(component_means(n), 10_000, 60, 60).take())
    pi = torch.tensor(n/n.sum(), dtype=torch.float32)
    a, b = f.clone().requires_grad_(), f.double().clone().requires_grad_()
    fast = draw_losses(a, y, k, q, pi).mean()
    slow = torch.stack(
        [
            torch.nn.functional.cross_entropy(b[:, i] - ((r.double() / pi.double()) ** 1.3 + 1e-9).log(), y)
            for i, r in zip(k.tolist(), q)]).mean()
    fast.backward(); slow.backward()
    assert abs(fast.item() - slow.item()) < 1e-5 and (a.grad - b.grad).abs().max() < 1e-5


def test_ride_by_floats():
    f, y, n, g = experts(4, 3, 5)
    margins, t = 30*ldam_margins(torch.tensor(n)), ride_temperature(torch.tensor(n), .1)
    want = 0.
    for k in range(3):
        for i in range(4):
            z = [f[i, k, j].item() - (margins[j].item() if j == y[i] else 0.) for j in range(3)]
            want += ce(z, y[i].item())/4
            mean = [f[i, :, j].mean().item()/t[j].item() for j in range(3)]
            own = [f[i, k, j].item()/t[j].item() for j in range(3)]
            want += -.45*t.mean().item()**2*sum(math.exp(-ce(mean, j))*(ce(own, j) - ce(mean, j)) for j in range(3))/4
    assert ride_loss(f, y, margins, -.45, None, t).item() == pytest.approx(want, abs=1e-9)


@given(
    draws=st.integers(1, 6),
    passes=st.integers(1, 5),
    extra=st.integers(0, 5),
    stop=st.integers(0, 30),
    fresh=st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_pool_goes_on_exactly(draws, passes, extra, stop, fresh):
    make = lambda: DirichletPool(
        component_means([5, 3, 2]), 50.0, draws, draws * passes + min(extra, draws - 1), seed=7, fresh=fresh)
    whole, first, second = make(), make(), make()
    for _ in range(stop):
        whole.take(), first.take()
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        for a, b in zip(whole.take(), second.take()):
            assert np.array_equal(a, b)
    if not fresh:
        again = make()
        seen = np.concatenate([again.take()[1][:, 0] for _ in range(passes)])
        assert len(np.unique(seen)) == draws * passes  # nothing twice before all were used


@given(l=st.lists(st.floats(0, 50), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_semi_variance_properties(l):
    t = torch.tensor(l, dtype=torch.float64)
    v = {d: semi_variance(t, d).item() for d in ('above-1', 'above', 'all')}
    assert (
        v['all'] <= v['above'] + 1e-12
        and v['above'] <= v['above-1'] + 1e-12
        and v['all'] <= t.var(correction=0).item() + 1e-9)
    assert semi_variance(t + 3, 'all').item() == pytest.approx(v['all'], abs=1e-9)


class Stop(Exception): pass


@pytest.mark.parametrize('method', ['sade', 'dirmixe', 'ride'])
def test_a_stopped_run_goes_on_exactly(method, tmp_path):
    "Late losses are on in the last epochs, and the count of steps or draws survives the stop"
    late = dict(sade={}, dirmixe=dict(penalty_start=.4), ride=dict(late=.5))[method]
    r = recipe(method, profile='smoke', epochs=4, **late)
    def stop(row):
        if row['epoch'] == 1: raise Stop
    with pytest.raises(Stop): run(r, tmp_path/'a', report=stop, device='cpu')
    a, b = (load_run(run(r, tmp_path/x, device='cpu')) for x in 'ab')
    assert (
        np.array_equal(a.predictions['stage1/experts'], b.predictions['stage1/experts'])
        and a.history.loss.tolist() == b.history.loss.tolist())
    assert np.allclose(a.predictions['logits'], a.predictions['stage1/experts'].mean(1), atol=1e-5)


@pytest.mark.parametrize('method', ['sade', 'dirmixe'])
def test_wrong_numbers_of_experts_and_draws(method):
    with pytest.raises(UserError, match='n_experts=3'):
        make_context(recipe(method, profile='smoke', n_experts=2), device='cpu')
    with pytest.raises(UserError, match='pool_size'):
        make_context(recipe('dirmixe', profile='smoke', pool_size=10), device='cpu')
    with pytest.raises(UserError, match='one draw'):
        make_context(recipe('dirmixe', profile='smoke', draws=0), device='cpu')
    with pytest.raises(UserError, match='n_experts'): recipe(method, n_expert=3)


@pytest.mark.parametrize('method', ['sade', 'dirmixe', 'ride'])
def test_large_recipes_are_declared(method):
    for dataset in ('imagenet_lt', 'inaturalist2018'):
        r = recipe(method, dataset, profile='paper')
        assert r.backbone in ('resnext50', 'resnet50') and r.nesterov and r.head == 'cosine'
        with pytest.raises(UserError, match=f'ltbook pack {dataset}'): make_context(r)
    assert (
        recipe('dirmixe', 'imagenet_lt', profile='paper').settings.power == 1.6
        and recipe('dirmixe', 'inaturalist2018').settings.concentration == 1e5)


def test_recipes_of_the_papers():
    d10, d100, s10, s100 = (recipe(m, d, 100, 'paper') for m in ('dirmixe', 'sade') for d in ('cifar10', 'cifar100'))
    for r in (d10, d100, s10, s100):
        assert (r.epochs, r.batch_size, r.momentum, r.nesterov, r.schedule, r.rotation) == (
            200,
            128,
            0.9,
            True,
            'step',
            15)
    assert (d10.weight_decay, d100.weight_decay, s10.weight_decay, s100.weight_decay) == (5e-4, 1e-3, 5e-4, 5e-4)
    assert (
        d10.settings.penalty,
        d100.settings.penalty,
        d100.settings.draws,
        d100.settings.power,
        d100.settings.concentration) == (15, 5, 60, 1.3, 1e4)
    assert (s10.lr, s10.settings.reduced, s100.lr, s100.settings.tau) == (.05, False, .1, 2)
    assert recipe('ride', 'cifar100', 100).settings.diversity == -.45
