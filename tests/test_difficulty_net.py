("Difficulty-Net and its relatives: the bilevel step against definitions, a toy "
 "on which the modes must differ, exact resume, bad input")
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ltbook.data.checks import UserError
from ltbook.data.meta_set import MetaTail, meta_tail
from ltbook.data.sampling import ClassAwareSampler
from ltbook.losses.cross_entropy import balanced_softmax
from ltbook.methods.difficulty_net import gradients
from ltbook.methods.method import get_method
from ltbook.methods.reweighting import class_accuracies
from ltbook.models.difficulty_net import DifficultyNet, difficulty_weights, driver_loss
from ltbook.models.resnet_cifar import ResNet32
from ltbook.runs.folder import load_run
from ltbook.methods.recipe import flat, recipe
from ltbook.runs.run import make_context, recipe_from, run
from ltbook.train.bilevel import (
    bilevel_steps, meta_gradient, meta_gradient_reference, no_running_statistics, plain_cross_entropy)


def images(n, classes=10, side=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(x=torch.randn(n, 3, side, side, generator=g), y=torch.randint(0, classes, (n,), generator=g))


class TestBilevel:
    def test_finite_differences(self):
        "The meta loss after the virtual step really changes as the gradient says; float64, a network with BatchNorm"
        torch.manual_seed(0)
        net = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
            .double()
            .train())
        batch, meta = ({k: v.double() if k == 'x' else v for k, v in images(n, 5, 8, n).items()} for n in (12, 10))
        w, lr = torch.rand(5).double() + .5, .3

        def after(w):
            "Meta loss by hand: copy the network, step, look"
            other = copy.deepcopy(net)
            loss = (w[batch['y']]*plain_cross_entropy(other(batch['x']), batch['y'])).sum()/12
            for p, g in zip(other.parameters(), torch.autograd.grad(loss, other.parameters())): p.data -= lr*g
            return plain_cross_entropy(other(meta['x']), meta['y']).mean().item()

        fast, m = meta_gradient(net, batch, meta, w, lr)
        assert m.item() == pytest.approx(after(w), abs=1e-10)
        for c in range(5):
            e = torch.zeros(5).double(); e[c] = 1e-5
            assert fast[c].item() == pytest.approx((after(w + e) - after(w - e))/2e-5, abs=1e-7)

    @pytest.mark.parametrize(
        'loss',
        [plain_cross_entropy, lambda z, y: balanced_softmax(z, y, torch.arange(1, 11), reduction='none')],
        ids=['cross-entropy', 'balanced'])
    def test_both_routes(self, loss):
        torch.manual_seed(1)
        net = ResNet32(10).train()
        w = torch.rand(10) + 0.5
        a, m = meta_gradient_reference(net, images(16), images(12, seed=1), w, 0.2, loss)
        b, n = meta_gradient(net, images(16), images(12, seed=1), w, 0.2, loss)
        assert (a - b).abs().max() < 1e-6 < a.abs().max() and abs(m - n) < 1e-6

    def test_one_lot_a_batch(self):
        "Equalization loss: the look ahead and the real step of a batch see the same throw, and batches differ"
        c = make_context(recipe('difficulty_net', 'digits', profile='smoke', loss='equalization', equalization_drop=.5))
        stage = get_method('difficulty_net').stages['stage1'](c)
        stage.set_mode(stage.network)
        lot, weigher = stage.state['lot'], stage.state['weigher']
        weigher.accuracies = torch.linspace(.9, .1, 10)
        rng, seen = np.random.default_rng(0), []
        for _ in range(6):
            batch = stage.before_step(stage.view(rng.integers(0, 200, 32), rng) | stage.draw(), .1)
            seen.append(lot.yes.item())
            a, _ = meta_gradient(c.network, batch, weigher.view(np.arange(20)), torch.ones(10), .1, weigher.loss)
            b, _ = meta_gradient_reference(
                c.network, batch, weigher.view(np.arange(20)), torch.ones(10), 0.1, weigher.loss)
            assert lot.yes == seen[-1] and (a - b).abs().max() <= 1e-5*max(1., b.abs().max())
        assert len(set(seen)) == 2

    def test_nothing_leaks(self):
        net = ResNet32(10).train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        for f in (meta_gradient, meta_gradient_reference): f(net, images(8), images(8, seed=1), torch.ones(10), .1)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
        with no_running_statistics(net):
            assert not any(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))

    def test_frozen_parameters_take_no_part(self):
        net = ResNet32(10).train().requires_grad_(False)
        net.head.requires_grad_(True)
        a, _ = meta_gradient(net, images(8), images(8, seed=1), torch.ones(10), .1)
        b, _ = meta_gradient_reference(net, images(8), images(8, seed=1), torch.ones(10), .1)
        assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 0

    def test_cost_in_operations(self):
        "Parts of a plain step, at 4 training images to 3 meta images"
        def flops(step):
            with FlopCounterMode(display=False) as counter: step()
            return counter.get_total_flops()
        steps = bilevel_steps(ResNet32(10).train(), images(16), images(12), 10)
        plain = flops(steps['plain'])
        assert 2.6 <= flops(steps['bilevel'])/plain - 1 <= 2.9
        assert 2.9 <= flops(steps['bilevel_reference'])/plain - 1 <= 3.3


class TestModes:
    def weigher(self, mode, **changes):
        c = make_context(
            recipe('difficulty_net', 'digits', profile='smoke', meta_grad=mode, network_lr=1e-2, **changes))
        stage = get_method('difficulty_net').stages['stage1'](c)
        stage.set_mode(stage.network)
        w = stage.state['weigher']
        w.accuracies = torch.linspace(.95, .1, 10)
        return w, stage

    def test_none_is_exact_thrown_away(self):
        "Mode none: the same network as with a virtual step whose gradient is discarded, as in the released code"
        w, stage = self.weigher('none')
        other, _ = self.weigher('none')
        rng = np.random.default_rng(0)
        for _ in range(5):
            batch = stage.view(rng.integers(0, 200, 32), rng)
            w.before_step(batch, .1)
            pull, _, _, _ = gradients(
                other.g,
                other.accuracies,
                0.3,
                'relative',
                lambda v: (
                    meta_gradient(other.context.network, batch, other.view(np.arange(30)), v, 0.1)[0] * 0,
                    torch.tensor(0.0)))
            for p, g in zip(other.g.parameters(), pull): p.grad = g
            other.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(w.g.parameters(), other.g.parameters()))

    def test_weights_are_those_of_the_new_network(self):
        w, stage = self.weigher('exact')
        batch = stage.view(np.arange(32), np.random.default_rng(0))
        old = w.weights()
        out = w.before_step(batch | w.draw(), .1)
        assert torch.equal(out['weight'], w.weights()[batch['y']]) and not torch.equal(out['weight'], old[batch['y']])
        assert not out['weight'].requires_grad

    def test_first_epoch_is_plain(self):
        w, stage = self.weigher('exact')
        w.accuracies = torch.zeros(10)
        assert (w.before_step(stage.view(np.arange(32), np.random.default_rng(0)) | w.draw(), .1)['weight'] == 1).all()
        assert w.sums['meta_gradient'] == 0 and w.sums['driver_gradient'] == 0 and w.sums['steps'] == 1

    def test_meta_batches(self):
        "No meta image twice before a new order, which comes when fewer than a batch are left"
        w, _ = self.weigher('exact', meta_batch=30)
        seen = np.concatenate([w.draw()['meta'].numpy() for _ in range(3)])
        assert len(np.unique(seen)) == 90
        assert len(np.unique(w.draw()['meta'])) == 30           # ten were left, too few: a new order

    def test_half_precision(self):
        w, stage = self.weigher('exact', meta_precision='bf16')
        v, _ = self.weigher('exact')
        batch = stage.view(np.arange(64), np.random.default_rng(0))
        for u in (w, v): u.before_step(batch | u.draw(), .1)
        one_unit = 2**-8*v.sums['meta_loss']      # bf16 has eight bits; how they are rounded depends on the processor
        assert abs(w.sums['meta_loss'] - v.sums['meta_loss']) < one_unit and w.sums['meta_loss'] != v.sums['meta_loss']


def gaussian_toy(seed, mode, driver_weight, steps=600):
    ("Six Gaussian classes, 300 to 9 training points; returns the mean "
     "weights of the last half and the balanced accuracy")
    g = torch.Generator().manual_seed(seed)
    means, counts = torch.randn(6, 8, generator=g), [300, 150, 75, 38, 19, 9]
    draw = lambda n: (
        torch.cat([means[k] + torch.randn(m, 8, generator=g) for k, m in enumerate(n)]),
        torch.arange(6).repeat_interleave(torch.tensor(n)))
    (x, y), (mx, my), (tx, ty) = draw(counts), draw([25]*6), draw([500]*6)
    torch.manual_seed(seed)
    net, net_g = nn.Linear(8, 6), DifficultyNet(6, 32)
    adam, A, seen = torch.optim.Adam(net_g.parameters(), 3e-3, weight_decay=1e-4), torch.zeros(6), []
    sgd = torch.optim.SGD(net.parameters(), .5)
    meta = dict(x=mx, y=my)
    for step in range(steps):
        if step and step % 10 == 0:
            with torch.no_grad(): hit = (net(mx).argmax(1) == my).float()
            A = torch.stack([hit[my == k].mean() for k in range(6)])
        i = torch.randint(0, len(x), (64,), generator=g)
        batch = dict(x=x[i], y=y[i])
        look = (lambda w: meta_gradient(net, batch, meta, w, .5)) if mode == 'exact' else None
        pull, push, _, _ = gradients(net_g, A, driver_weight, 'relative', look)
        for p, a, b in zip(net_g.parameters(), pull, push): p.grad = a + b
        adam.step()
        with torch.no_grad(): w = difficulty_weights(net_g(A))
        if step >= steps//2: seen.append(w)
        sgd.zero_grad()
        (w[batch['y']]*plain_cross_entropy(net(batch['x']), batch['y'])).mean().backward()
        sgd.step()
    with torch.no_grad(): top = (net(tx).argmax(1) == ty).float().mean().item()
    return torch.stack(seen).mean(0), top


def test_modes_on_a_toy():
    ("Five seeds: looking ahead helps over the driver alone, weighs the rare "
     "class up, and the driver pulls to equal weights")
    results = {
        name: [gaussian_toy(s, *a) for s in range(5)]
        for name, a in dict(exact=('exact', 0.3), driver=('none', 0.3), free=('exact', 0.0)).items()}
    weights = {k: torch.stack([w for w, _ in v]).mean(0) for k, v in results.items()}
    accuracy = {k: np.mean([a for _, a in v]) for k, v in results.items()}
    spread = {k: (w.max() - w.min()).item() for k, w in weights.items()}
    assert accuracy['exact'] >= accuracy['driver'], accuracy
    assert weights['exact'][5] > weights['exact'][0], weights
    assert spread['free'] > spread['exact'] > spread['driver'], spread


class TestRuns:
    @pytest.mark.parametrize(
        'method, changes',
        [
            ('difficulty_net', {}),
            ('difficulty_net', dict(meta_grad='none', relative_input=False)),
            ('reweighting', dict(weights='cdb', tau='dynamic')),
            ('reweighting', dict(loss='equalization', select='val'))],
        ids=['exact', 'none, one at a time', 'cdb', 'equalization, best on val'])
    def test_resume(self, tmp_path, method, changes):
        "Killed in stage 1 and taken up again: the same run to the last bit"
        r = recipe(method, 'digits', epochs=4, max_steps=2, stage2_epochs=2, **changes)
        whole = load_run(run(r, tmp_path/'whole'))

        def kill(row):
            if row['epoch'] == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(r, tmp_path/'parts', report=kill)
        parts = load_run(run(r, tmp_path/'parts'))
        assert parts.metrics == whole.metrics
        pd.testing.assert_frame_equal(
            parts.history.drop(columns=['seconds', 'images_per_second']),
            whole.history.drop(columns=['seconds', 'images_per_second']))
        for name in ('weights', 'accuracies'):
            assert (whole.path/f'stage1-{name}.csv').read_text() == (parts.path/f'stage1-{name}.csv').read_text()

    def test_folder(self, tmp_path):
        done = load_run(run(recipe('difficulty_net', 'digits', profile='smoke'), tmp_path))
        for name in ('weights', 'accuracies', 'difficulties'):
            assert pd.read_csv(done.path/f'stage1-{name}.csv').shape == (2, 10)
        first = done.history[done.history.stage == 'stage1']
        assert {
            'driver_loss',
            'meta_loss',
            'driver_gradient',
            'meta_gradient',
            'gradient_cosine',
            'val_top1'} <= set(first)
        assert done.metrics['protocol']['meta_images'] == 100
        manifest = (done.path/'manifest.json').read_text()
        # content, positions, those of the meta set
        assert manifest.count('sha256') == 3 and 'positions_sha256' in manifest

    def test_best_on_val_is_named(self, tmp_path):
        done = load_run(run(recipe('reweighting', 'digits', profile='smoke', select='val', smoothing=False), tmp_path))
        assert done.stages == ['stage1'] and done.metrics['stage1']['selection'] == 'best_on_val'


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('start')
    return load_run(
        run(
            recipe(
                'difficulty_net',
                'digits',
                profile='smoke',
                meta_grad='none',
                driver_weight=3.0,
                loss='balanced_softmax',
                n_meta=5),
            folder))


class TestTakenOver:
    def test_settings_of_stage_1_come_along(self, start):
        r = recipe_from(start, 'difficulty_net', stage2_lr=.01)
        kept = ('meta_grad', 'driver_weight', 'loss', 'n_meta', 'network_lr')
        assert [flat(r)[k] for k in kept] == [flat(start.recipe)[k] for k in kept] and r.settings.stage2_lr == .01
        second = load_run(run(r, start.path.parents[2], start=start))
        assert second.metrics['stage1']['top1'] == start.metrics['stage1']['top1']

    def test_refused(self, start, tmp_path):
        with pytest.raises(UserError, match=r'What belongs to stage 1 \(meta_grad\)'):
            recipe_from(start, 'difficulty_net', meta_grad='exact')
        with pytest.raises(UserError, match='was not trained as reweighting trains its own'):
            recipe_from(start, 'reweighting')
        with pytest.raises(UserError, match='was not trained as crt trains its own'): recipe_from(start, 'crt')


class TestBadInput:
    def test_overlap(self):
        with pytest.raises(UserError, match='overlaps'):
            MetaTail(np.arange(5), np.array([5]), None, 'all', 0, meta=np.array([4]))

    def test_class_without_meta_images(self):
        c = make_context(recipe('difficulty_net', 'digits', profile='smoke'))
        c.parts['val'] = c.parts['val'].subset(np.flatnonzero(c.parts['val'].labels.numpy() != 3))
        with pytest.raises(UserError, match='Class 3 has no image'): class_accuracies(c)
        with pytest.raises(UserError, match='at least 1'): meta_tail([0, 0, 1, 1], n_meta=0)

    @pytest.mark.parametrize('values', [[.5, 1.5], [-.1, .5], [float('nan'), .5], [50., 60.]])
    def test_accuracies(self, values):
        with pytest.raises(UserError, match=r'\[0, 1\]'): driver_loss(torch.tensor([.5, .5]), torch.tensor(values))

    @pytest.mark.parametrize(
        'bad, word',
        [
            (dict(driver_weight=-0.1), 'driver_weight = -0.1'),
            (dict(meta_grad='half'), "'exact' or 'none'"),
            (dict(target='rel'), "'relative' or 'absolute'"),
            (dict(n_meta=0), 'n_meta = 0'),
            (dict(meta_val_split=10), 'divided after 1 to 9'),
            (dict(n_meta=200), 'too few to put 200 aside'),
            (dict(loss='ldam'), 'head=cosine'),
            (dict(data_seed=7), 'Leave data_seed out')])
    def test_settings(self, bad, word):
        with pytest.raises(UserError) as e:
            make_context(recipe('difficulty_net', 'digits', **bad))
        assert word in str(e.value)

    def test_negative_lambda(self):
        with pytest.raises(UserError, match='at least 0'):
            gradients(DifficultyNet(3), torch.tensor([0.1, 0.2, 0.3]), -1.0, 'relative', None)


def test_class_aware_stream():
    "Stage 2: four images of a class in a row, every class four times in 4 C draws, 47,500 draws an epoch"
    labels = np.repeat(np.arange(100), meta_tail(np.repeat(np.arange(100), 500), 100).counts)
    s = ClassAwareSampler(labels)
    assert len(s) == 47_500
    drawn = labels[s.epoch()]
    assert (drawn.reshape(-1, 4) == drawn[::4, None]).all()
    assert (np.sort(drawn[:47_200].reshape(-1, 400), axis=1) == np.repeat(np.arange(100), 4)).all()
