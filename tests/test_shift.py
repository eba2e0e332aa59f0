"Label shift: test sets, corrections, views, mixing and whole runs, against loops, torchvision and finite differences"
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st

from ltbook.data.checks import UserError
from ltbook.data.shift import RATIOS, dirichlet_shift, ratio_shift, ratio_shifts, reference_shifts
from ltbook.data.stores import ImageSet
from ltbook.data.augment import JITTERS, blur, grey
from ltbook.data.random_views import FixedViews, RandomViews
from ltbook.losses.experts import sade_adjustment, skill_diverse_loss
from ltbook.measure.aggregation import learn_weights, mix
from ltbook.measure.label_shift import estimate_prior, replace_prior
from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.studies.shift import cli_shift, collect_shifts, make_shifts, shift, shift_summary


def tail(n, c, r): return [int(n*(1/r)**(k/(c - 1))) for k in range(c)]


@pytest.mark.parametrize(
    'classes,n,n_train,totals',
    [
        (10, 1000, 5000, (2478, 2795, 3229, 4084, 5081, 7241)),
        (100, 100, 500, (2131, 2486, 2956, 3876, 4932, 7166))])
def test_published_sizes(classes, n, n_train, totals):
    labels, train = np.repeat(np.arange(classes), n), tail(n_train, classes, 100)
    for R, total in zip(RATIOS, totals):
        f, b = (ratio_shift(labels, train, k, R) for k in ('forward', 'backward'))
        assert (
            len(f) == len(b) == total
            and (f.counts[::-1] == b.counts).all()
            and f.counts.tolist() == tail(n, classes, R))
    assert [s.name for s in ratio_shifts(labels, train, (2, 10))] == [
        'forward-10',
        'forward-2',
        'uniform',
        'backward-2',
        'backward-10']


@given(classes=st.integers(2, 12), n=st.integers(1, 40), ratio=st.floats(1, 200), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_balanced_set_can_be_shifted(classes, n, ratio, seed):
    r = np.random.default_rng(seed)
    labels, train = r.permutation(np.repeat(np.arange(classes), n)), r.permutation(classes) + 1
    for s in (
        *(ratio_shift(labels, train, k, ratio, seed) for k in ('forward', 'backward')),
        *(dirichlet_shift(labels, train, k, 1, ratio, seed=seed) for k in ('forward', 'uniform', 'backward'))):
        assert len(set(s.indices)) == len(s.indices) and np.array_equal(
            np.bincount(labels[s.indices], minlength=classes), s.counts)
        assert 1 <= s.counts.min() and s.counts.max() <= n
        d = s.to_dict()
        json.dumps(d)
        assert d['n'] == sum(d['counts']) and len(d['sha256']) == 64
    f = ratio_shift(labels, train, 'forward', ratio, seed)
    assert (np.diff(f.counts[np.argsort(-train)]) <= 0).all()


def test_an_unbalanced_test_set_is_cut_to_its_smallest_class():
    labels = np.array([0]*30 + [1]*10 + [2]*20)
    assert ratio_shift(labels, [5, 4, 3], 'forward', 10).counts.tolist() == [10, 3, 1]


def test_replay_by_an_independent_generator():
    "The published stream, written out once more without the library's functions"
    labels, train, rs = np.repeat(np.arange(10), 1000), tail(5000, 10, 100), np.random.RandomState(0)
    got = iter(reference_shifts(labels, train, 5000))
    for component in range(3):
        for draw in range(3):
            sets = []
            for n in (5000, 1000, 1000):
                base = [n]*10 if component == 0 else tail(n, 10, 100)[::1 if component == 1 else -1]
                a = [b*(1 + .1*(rs.uniform() - .5)) for b in base]
                q = rs.dirichlet([n*v/sum(a) for v in a])
                counts = [max(int(n*(v/max(q))), 1) for v in q]
                images = []
                for c, m in enumerate(counts):
                    where = list(range(c*n, (c + 1)*n))
                    array = np.array(where, dtype=np.int64); rs.shuffle(array)
                    images += array[:m].tolist()
                sets.append((counts, images))
            s = next(got)
            assert (
                s.counts.tolist() == sets[2][0]
                and s.indices.tolist() == sets[2][1]
                and s.adapt_indices.tolist() == sets[1][1])


def test_bad_shifts():
    labels = np.repeat(np.arange(3), 5)
    with pytest.raises(UserError, match='at least 1'): ratio_shift(labels, [3, 2, 1], 'forward', .99)
    with pytest.raises(UserError, match='Class 1 has no test images'):
        ratio_shift(labels[labels != 1], [3, 2, 1], 'forward', 2)
    with pytest.raises(UserError, match='no test images'): dirichlet_shift(labels, [4, 3, 2, 1], 'forward', 0)
    with pytest.raises(UserError, match='0..1'): ratio_shift(labels, [2, 1], 'forward', 2)
    with pytest.raises(UserError, match='component'): ratio_shift(labels, [3, 2, 1], 'sideways', 2)
    with pytest.raises(UserError, match='concentration'):
        dirichlet_shift(labels, [3, 2, 1], 'forward', 0, concentration=-1.0)


def test_colours_as_torchvision():
    x = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    x[0] = x[0, :1]                                                 # a grey image
    f = torch.tensor([.6, .8, 1., 1.1, 1.3, 1.4])
    for name, tv in (
        ('brightness', TF.adjust_brightness),
        ('contrast', TF.adjust_contrast),
        ('saturation', TF.adjust_saturation)):
        want = torch.stack([tv(i, v) for i, v in zip(x, f.tolist())])
        assert torch.allclose(JITTERS[name](x, f.view(-1, 1, 1, 1)), want, atol=1e-5), name
    want = torch.stack([TF.adjust_hue(i, v) for i, v in zip(x, (f - 1).div(4).tolist())])
    assert torch.allclose(JITTERS['hue'](x, (f - 1).div(4).view(-1, 1, 1, 1)), want, atol=1e-4)
    assert torch.allclose(grey(x), TF.rgb_to_grayscale(x), atol=1e-6)
    inner = torch.stack(
        [
            TF.gaussian_blur(i, 13, s)
            for i, s in zip(torch.nn.functional.pad(x, (12,) * 4, mode='replicate'), f.tolist())]
    )[:, :, 12:-12, 12:-12]
    assert torch.allclose(blur(x, f), inner, atol=1e-5)


def test_views_image_by_image():
    "Order of the jitter, greyscale and blur as drawn, with torchvision's functions on single images"
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 3, 12, 12), dtype=np.uint8))
    data = ImageSet(images.permute(0, 2, 3, 1), torch.zeros(30, dtype=torch.int64), ('a',))
    views = FixedViews(RandomViews(data, 2, True), np.random.default_rng(3))
    d, got = views.drawn, views(np.arange(30))['x']
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for i in range(30):
        top, left = d['offset'][i].tolist()
        x = TF.pad(images[i], [2])[:, top:top + 12, left:left + 12].float()/255
        if d['flip'][i]: x = x.flip(2)
        if d['jitter'][i]:
            for k in d['order'][i].tolist(): x = ops[k](x, d['factors'][i, k].item())
        if d['grey'][i]: x = TF.rgb_to_grayscale(x, 3)
        if d['blur'][i]: x = blur(x[None], d['sigma'][i:i + 1])[0]
        assert (got[i] - x).abs().max() < .51/255 + 2e-4, i
    some = np.array([4, 17, 4])
    assert torch.allclose(views(some)['x'], got[some], atol=1e-6)
    assert {k: bool(v.any()) for k, v in d.items() if v.dtype == torch.bool} == dict(
        flip=True, jitter=True, grey=True, blur=True)


@given(n=st.integers(1, 30), c=st.integers(2, 6), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_em_by_loops(n, c, seed):
    r = np.random.default_rng(seed)
    z, source = r.normal(size=(n, c))*2, r.dirichlet(np.ones(c)*3)
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    q = source.copy()
    for _ in range(25):
        new = np.zeros(c)
        for row in p:
            w = row*q/source
            new += w/w.sum()/n
        q = new
    assert np.allclose(estimate_prior(torch.tensor(z), torch.tensor(source), steps=25, tolerance=0.), q, atol=1e-8)
    target = r.dirichlet(np.ones(c))
    want = p*target/source
    got = replace_prior(torch.tensor(z), torch.tensor(source), torch.tensor(target)).softmax(1)
    assert np.allclose(got, want/want.sum(1, keepdims=True), atol=1e-9)


def test_weights_by_finite_differences():
    "Two epochs of shuffled batches, Nesterov and weight decay, written with numpy and numerical gradients"
    r = np.random.default_rng(0)
    views = [tuple(r.normal(size=(10, 3, 4))*2 for _ in range(2)) for _ in range(2)]
    def s(a, x, y):
        w = np.exp(a)/np.exp(a).sum()
        p, q = (np.exp(np.einsum('nkc,k->nc', v, w)) for v in (x, y))
        p, q = (v/v.sum(1, keepdims=True) for v in (p, q))
        return np.mean((p*q).sum(1)/np.linalg.norm(p, axis=1)/np.linalg.norm(q, axis=1))
    a, buf, rng = np.full(3, 1/3), np.zeros(3), np.random.default_rng(5)
    for x, y in views:
        order = rng.permutation(10)
        for i in (order[:4], order[4:8], order[8:]):
            grad = -np.array([(s(a + 1e-6*e, x[i], y[i]) - s(a - 1e-6*e, x[i], y[i]))/2e-6 for e in np.eye(3)]) + 5e-4*a
            buf = .9*buf + grad
            a = a - .1*(grad + .9*buf)
    m = learn_weights([tuple(map(torch.tensor, v)) for v in views], np.random.default_rng(5), batch_size=4, smallest=0.)
    assert np.allclose(m.weights, np.exp(a)/np.exp(a).sum(), atol=1e-7) and len(m.path) == 2


def test_learning_stops_when_an_expert_is_gone():
    g = torch.Generator().manual_seed(0)
    sure = 8*torch.nn.functional.one_hot(torch.arange(400) % 5, 5).float()
    def view(): return torch.stack([sure, 6*torch.randn(400, 5, generator=g), 6*torch.randn(400, 5, generator=g)], 1)
    m = learn_weights([(view(), view()) for _ in range(5)], np.random.default_rng(0), batch_size=8)
    assert m.stopped and len(m.path) < 5 and m.weights.argmax() == 0 and round(m.weights.min(), 2) < .05


def test_experts_find_their_test_set():
    ("Linear experts on separable noise: the first is best on a forward set, the "
     "third on a backward set, and the weights lean there")
    r, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    centres, n = 1.2*torch.randn(8, 12, generator=g), np.array(tail(400, 8, 50))
    def sample(counts):
        y = torch.tensor(np.repeat(np.arange(8), counts))
        return centres[y] + torch.randn(len(y), 12, generator=g), y
    x, y = sample(n)
    w = torch.zeros(3, 12, 8, requires_grad=True)
    opt, adjustment = torch.optim.SGD([w], .1, .9), sade_adjustment(torch.tensor(n)).float()
    answer = lambda x: torch.einsum('bd,kdc->bkc', x, w)
    for _ in range(300):
        i = torch.tensor(r.integers(0, len(y), 128))
        loss = skill_diverse_loss(answer(x[i]), y[i], adjustment)
        opt.zero_grad(); loss.backward(); opt.step()
    found = {}
    for name, counts in (('forward', n), ('backward', n[::-1])):
        x, y = sample(counts)
        with torch.no_grad():
            e = answer(x)
            views = [tuple(answer(x + .5*torch.randn(x.shape, generator=g)) for _ in range(2)) for _ in range(5)]
        m = learn_weights(views, np.random.default_rng(0))
        accuracy = lambda z: (z.argmax(1) == y).double().mean().item()
        alone = [accuracy(e[:, k]) for k in range(3)]
        found[name] = m.weights
        assert (
            np.argmax(alone) != (2 if name == 'forward' else 0)
            and alone[0 if name == 'forward' else 2] > alone[2 if name == 'forward' else 0])
        assert accuracy(mix(e, m.weights)) >= accuracy(e.mean(1)) - .01
    assert found['forward'][0] > found['backward'][0] and found['backward'][2] > found['forward'][2]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp('outputs')
    return {m: run(recipe(m, profile='smoke'), out, device='cpu') for m in ('sade', 'mislas')}


def test_shift_of_any_run(runs):
    for method, path in runs.items():
        text = '\n'.join(cli_shift(path, ratios=(10, 2), draws=2, device='cpu'))
        t = pd.read_csv(path/'shift'/'accuracy.csv')
        assert (
            t['shift'].nunique() == 5 + 6
            and ('adapted' in set(t.answer)) == (method == 'sade') == (path/'shift' / 'weights.csv').exists())
        assert (
            'backward-10' in text
            and (path/'shift' / 'shift.png').exists()
            and json.loads((path/'shift' / 'settings.json').read_text())['draws'] == 2)
        r = load_run(path)
        whole = t[(t['shift'] == 'uniform') & (t.answer == 'as is')].iloc[0]
        assert (
            whole.top1 == pytest.approx(r.metrics['final']['top1'])
            and whole.few == pytest.approx(r.metrics['final']['few'])
            and whole.n == 500)
        p, s = r.predictions, make_shifts(r.predictions['labels'], r.predictions['train_counts'], (10, 2), 2)[0]
        assert t[(t['shift'] == s.name) & (t.answer == 'as is')].top1.item() == pytest.approx(
            (p['logits'].argmax(1) == p['labels'])[s.indices].mean())
        assert [d['sha256'] for d in json.loads((path/'shift'/'shifts.json').read_text())][0] == s.to_dict()['sha256']
    both = collect_shifts([load_run(p) for p in runs.values()])
    assert set(both.line) == {'sade', 'mislas'} and len(shift_summary(both[both.line == 'sade'])) == 12
    w = pd.read_csv(runs['sade']/'shift'/'weights.csv')
    assert np.allclose(w[['w1', 'w2', 'w3']].sum(axis=1), 1) and w['shift'].nunique() == 11


def test_published_draws_go_to_their_own_folder(runs):
    t = shift(runs['mislas'], ratios=(10,), reference_rng=True)
    assert (runs['mislas']/'shift-reference'/'accuracy.csv').exists() and (t.setting == 'B').sum() == 9*7
    assert not json.loads((runs['mislas']/'shift-reference'/'settings.json').read_text())['same_subset']


def test_one_shift_alone_gets_the_weights_it_gets_among_all(runs):
    shift(runs['sade'], ratios=(10, 2), draws=1, device='cpu')
    among = pd.read_csv(runs['sade']/'shift'/'weights.csv')
    shift(runs['sade'], ratios=(10, 2), draws=1, only=['backward-10'], device='cpu')
    alone = pd.read_csv(runs['sade']/'shift'/'weights.csv')
    among = among[among['shift'] == 'backward-10']
    assert len(alone) == len(among) and np.allclose(alone[['w1', 'w2', 'w3']], among[['w1', 'w2', 'w3']], atol=1e-4)


def test_what_is_missing_is_said(runs, tmp_path):
    import shutil
    path = tmp_path/'run'
    shutil.copytree(runs['sade'], path)
    for bad, words in (((.5,), 'at least 1'), ((10, -2), 'at least 1')):
        with pytest.raises(UserError, match=words): shift(path, ratios=bad)
    with pytest.raises(UserError, match='forward-10'): shift(path, ratios=(10,), draws=0, only=['forward-11'])
    (path/'stage1.safetensors').unlink()
    with pytest.raises(UserError, match='no weights'): shift(path, ratios=(10,), draws=1)
    assert 'expert 1' in set(shift(path, ratios=(10,), draws=1, adapt=False).answer)
    (path/'predictions.h5').unlink()
    with pytest.raises(UserError, match='no logits'): shift(path)
    with pytest.raises(UserError, match='not a run folder'): shift(tmp_path)
