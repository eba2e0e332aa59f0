("The captured step is the ordinary step: same numbers, nothing asked of "
 "the device, nothing that only the loop would notice")
import copy
import gc
import json
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ltbook.data.views import PlainView, TrainView
from ltbook.data.auto_augment import AutoAugment
from ltbook.data.checks import UserError
from ltbook.data.stores import ImageSet, write_h5
from ltbook.methods.difficulty_net import DifficultyWeigher
from ltbook.methods.method import get_method
from ltbook.runs.folder import run_id
from ltbook.methods.recipe import Recipe, recipe, recipe_hash
from ltbook.runs.run import make_context
from ltbook.train import captured
from ltbook.train.captured import CapturedStep, Replay, TensorSGD, can_capture, captured_step, host_questions
from ltbook.train.compute import Compute, find_device
from ltbook.train.loop import NonFiniteLoss, fit, predict, train_epoch
from ltbook.train.stage import KeepBest
from ltbook.train.tape import TapeCuda

from memory import memory

ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    ('mislas', 'stage1'),
    ('mislas', 'stage2'),
    ('cross_entropy', 'stage1'),
    ('balanced_softmax', 'stage1'),
    ('sade', 'stage1'),
    ('ride', 'stage1'),
    ('dirmixe', 'stage1'),
    ('reweighting', 'stage1'),
    ('difficulty_net', 'stage1'),
    ('difficulty_net', 'stage2')]
LOSSES = ('balanced_softmax', 'focal', 'equalization', 'logit_adjustment', 'ldam')


def stage_of(method, name='stage1', n=150, **changes):
    "A stage on n digits, so that an epoch is one whole and one partial batch"
    context = make_context(recipe(method, 'digits', profile='smoke', **dict(max_steps=None) | changes), device='cpu')
    order = np.random.default_rng(0).permutation(len(context.train))
    first = np.unique(context.train.labels.numpy()[order], return_index=True)[1]           # every class is there
    keep = np.r_[order[first], np.delete(order, first)][:n]
    context.parts['train'] = context.train.subset(torch.as_tensor(keep))
    return get_method(method).stages[name](context)


def load(stage, index, rng): return stage.view.load(stage.view.plan(index, rng))


def values(stage, optimizer):
    ("Weights, statistics and momenta in one vector; of a network that "
     "learns weights too, with its Adam and what it logs")
    return torch.cat([v.double().flatten() for v in memory(stage, optimizer)])


def counts_on_the_device(stage, monkeypatch, foreach=True):
    ("Adam in the form it has on a GPU, where its count of steps lies on the device; PyTorch "
     "allows it nowhere else, and with foreach makes a number of its own on a CPU")
    monkeypatch.setattr(sys.modules['torch.optim.adam'], '_get_capturable_supported_devices', lambda *a, **k: ['cpu'])
    weigher = stage.state.get('weigher')
    if isinstance(weigher, DifficultyWeigher):
        weigher.optimizer.param_groups[0] |= dict(capturable=True, foreach=foreach)


def trained(method, name, capture, epochs=3, precision='fp32', cuda=None, monkeypatch=None, **changes):
    stage, compute = stage_of(method, name, **changes), Compute(precision=precision, capture=capture)
    if monkeypatch: counts_on_the_device(stage, monkeypatch)
    stage.prepare(compute)
    optimizer, rng = stage.optimizer(), np.random.default_rng(1)
    step = CapturedStep(stage, optimizer, compute, cuda) if cuda else captured_step(stage, optimizer, compute)
    assert (step is not None) == capture
    stage.lr = lambda e: (.05, .02, .01)[e]                    # the rate must be followed, not recorded
    losses = []
    for e in range(epochs):
        losses.append(train_epoch(stage, e, optimizer, rng, compute, step=step)[0])
        # accuracies, and weights from them, must be followed too
        if stage.after_epoch: losses += [v.mean().item() for v in stage.after_epoch(e).values()]
    if step: assert len(step.loaded) == 1 + (len(stage.sampler) % stage.batch_size > 0)
    return losses, values(stage, optimizer), rng.bit_generator.state


def same(a, b):
    assert a[2] == b[2] and len(a[1]) == len(b[1])
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize('method, name', STAGES, ids=['-'.join(s) for s in STAGES])
def test_same_as_the_loop(method, name):
    "Whole and partial batches, a rate that changes, group factors, a frozen backbone with moving statistics"
    same(trained(method, name, False), trained(method, name, True))


REPLAYED = (
    [(m, n, {}) for m, n in STAGES]
    + [
        ('balanced_softmax', 'stage1', dict(first_side=4, nesterov=True, precision='bf16')),
        ('difficulty_net', 'stage1', dict(meta_grad='none')),
        ('difficulty_net', 'stage1', dict(first_side=4))]
    + [
        (m, 'stage1', dict(loss=v, head='cosine' if v == 'ldam' else 'linear'))
        for m in ('difficulty_net', 'reweighting')
        for v in LOSSES])


@pytest.mark.parametrize(
    'method, name, changes', REPLAYED, ids=['-'.join(map(str, (m, n, *c.values()))) for m, n, c in REPLAYED])
def test_replayed_it_is_the_loop(method, name, changes, monkeypatch):
    "Operations done again on the same memory, no Python between them: to the last bits what the loop does"
    changes, cuda = dict(batch_size=32, monkeypatch=monkeypatch) | changes, TapeCuda()
    a, b = trained(method, name, False, **changes), trained(method, name, True, cuda=cuda, **changes)
    assert max(g.replays for g in cuda.graphs) > 3
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_replaying_notices_what_stays_in_python(monkeypatch):
    "Accuracies that are replaced and not overwritten: right when called, frozen when replayed"
    def measured(self, epoch, accuracies): self.epoch, self.accuracies = epoch, accuracies
    changes = dict(batch_size=32, monkeypatch=monkeypatch, network_lr=1e-2)
    monkeypatch.setattr(DifficultyWeigher, 'measured', measured)
    loop, called, replayed = (
        trained('difficulty_net', 'stage1', c, cuda=t, **changes)
        for c, t in ((False, None), (True, None), (True, TapeCuda())))
    same(loop, called)
    assert (loop[1] - replayed[1]).abs().max() > 1e-3


def test_replaying_notices_a_history_that_stays_in_python(monkeypatch):
    "Sums that are replaced and not added to: the weights are right, what is logged is not"
    class Replaced(dict):
        def __setitem__(self, k, v): super().__setitem__(k, self[k].clone().copy_(v) if k in self else v)
    def init(self, *a, **k): plain(self, *a, **k); self.sums = Replaced(self.sums)
    plain = DifficultyWeigher.__init__
    monkeypatch.setattr(DifficultyWeigher, '__init__', init)
    loop, replayed = (
        trained('difficulty_net', 'stage1', c, cuda=t, batch_size=32, monkeypatch=monkeypatch)
        for c, t in ((False, None), (True, TapeCuda())))
    assert not np.allclose(loop[0], replayed[0], rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    'changes',
    [dict(auto_augment=True), dict(cutout_side=4, pad_mode='reflect+constant')],
    ids=['auto', 'cutout'])
def test_strong_views_replayed(changes, monkeypatch):
    "The views of the CIFAR recipes, AutoAugment in the form it has on a GPU"
    from ltbook.data import views

    monkeypatch.setattr(views, 'AutoAugment', lambda *a: AutoAugment(*a, dense=True))
    cuda, changes = TapeCuda(), dict(batch_size=32, monkeypatch=monkeypatch, **changes)
    a, b = (
        trained('difficulty_net', 'stage1', False, **changes),
        trained('difficulty_net', 'stage1', True, cuda=cuda, **changes))
    assert max(g.replays for g in cuda.graphs) > 3
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=1e-6, equal_nan=True)
    stage = stage_of('reweighting', **{k: v for k, v in changes.items() if k not in ('batch_size', 'monkeypatch')})
    loaded = load(stage, np.arange(16), np.random.default_rng(0))
    assert host_questions(lambda: stage.view.apply(loaded)) == []


@pytest.mark.parametrize(
    'changes',
    [dict(crop='resized', side=8, pad=0), dict(grey=.3, blur=.4), dict(jitter=.4, rand_augment=2),
     dict(crop='resized', side=8, pad=0, blur=.5, jitter=.4)],
    ids=['crops', 'blur', 'colours', 'all'])
def test_views_of_photographs_replayed(changes, monkeypatch, tmp_path):
    "Pictures in colour; crops, blurs and operations in the form these have on a GPU, where nothing may be asked"
    from ltbook.data import views

    class Far(TrainView):
        def __init__(self, *a):
            super().__init__(*a)
            self.cuts = False      # the images lie on the device
    monkeypatch.setattr('ltbook.methods.method.TrainView', Far)
    monkeypatch.setattr(views, 'resized_crops', partial(views.resized_crops, dense=True))
    monkeypatch.setattr(views, 'grey_and_blur', partial(views.grey_and_blur, dense=True))
    monkeypatch.setattr(views, 'RandAugment', partial(views.RandAugment, dense=True))
    rng, labels = np.random.default_rng(0), torch.arange(160) % 4
    pixels = torch.from_numpy(rng.integers(0, 256, (160, 10, 10, 3), dtype=np.uint8))
    write_h5(tmp_path/'colours.h5', *(ImageSet(pixels, labels, tuple('abcd')),)*2)
    def stage():
        r = recipe('mislas', 'colours', imbalance=None, profile='smoke', max_steps=None, batch_size=32,
                   **dict(pad=1) | changes)
        return get_method('mislas').stages['stage1'](make_context(r, root=tmp_path, device='cpu'))
    def weights(cuda):
        one, compute = stage(), Compute(capture=cuda is not None)
        one.prepare(compute)
        optimizer, rng = one.optimizer(), np.random.default_rng(1)
        step = CapturedStep(one, optimizer, compute, cuda) if cuda else None
        for epoch in range(3): train_epoch(one, epoch, optimizer, rng, compute, step=step)
        return values(one, optimizer)
    cuda = TapeCuda()
    torch.testing.assert_close(weights(None), weights(cuda), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert max(g.replays for g in cuda.graphs) > 3
    one = stage()
    assert type(one.view) is Far and can_capture(one)
    loaded = load(one, np.arange(16), np.random.default_rng(0))
    assert loaded['pixels'].shape[3] == 3 and host_questions(lambda: one.view.apply(loaded)) == []


def test_a_finished_stage_lets_go():
    "No graph, no gradient and no cycle is left for the next recording to meet"
    stage, steps = stage_of('cross_entropy', n=64, batch_size=32), []
    import ltbook.train.loop as loop
    made = loop.captured_step
    def noted(*a): step = made(*a); steps.append(weakref.ref(step)); return step
    gc.collect(); gc.disable()
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(loop, 'captured_step', noted)
            fit(stage, Compute(capture=True))
        assert steps[0]() is None and all(p.grad is None for p in stage.network.parameters())
    finally: gc.enable()


def test_evaluation_leaves_cudnn_on():
    seen = []
    def outputs(net, x):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return dict(logits=net(x))
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    predict(nn.Linear(2, 3), lambda i, rng: dict(x=torch.ones(len(i), 2)), 4, outputs)
    assert seen == [(before[0], False)] and (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == before


def test_a_gpu_has_a_number(monkeypatch):
    "`torch.cuda.set_device` refuses a device without one"
    from torch._utils import _get_device_index
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [_get_device_index(find_device(n)) for n in ('auto', 'cuda', 'cuda:0', 'cuda:1')] == [0, 0, 0, 1]
    with pytest.raises(ValueError): _get_device_index(torch.device('cuda'))


def test_same_in_bf16_with_nesterov():
    changes = dict(nesterov=True, weight_decay=5e-3)
    same(*(trained('mislas', 'stage1', c, epochs=1, precision='bf16', **changes) for c in (False, True)))


@pytest.mark.parametrize(
    'momentum, nesterov, decay',
    [(0.0, False, 0.0), (0.9, False, 2e-4), (0.9, True, 5e-4), (0.0, False, 0.1), (0.5, True, 0.0)])
@pytest.mark.parametrize(
    'reference',
    [dict(foreach=False), dict(foreach=True), dict(fused=True)],
    ids=lambda r: next(iter(r)) + str(next(iter(r.values()))))
def test_update_is_that_of_pytorch(momentum, nesterov, decay, reference):
    "Every form of torch.optim.SGD, two groups, channels-last weights, a parameter without gradient"
    results = []
    for ours in (False, True):
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=g)) for s in ((7, 5), (33,), (4, 3, 2, 2), (3,))]
        params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
        groups = [dict(params=params[:1], lr_factor=0.2), dict(params=params[1:], lr_factor=1.0)]
        optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=momentum, nesterov=nesterov, weight_decay=decay, **reference)
        sgd = TensorSGD(optimizer) if ours else None
        for k in range(5):
            for p in params[:3]:
                p.grad = torch.randn(p.shape, generator=g).contiguous(
                    memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
            for q in optimizer.param_groups:
                q['lr'] = 0.3 / (1 + k // 2) * q['lr_factor']
            if ours:
                sgd.set_lr(0.3 / (1 + k // 2))
            (sgd or optimizer).step()
        results.append(
            [*params, *(optimizer.state[p].get('momentum_buffer') if momentum else None for p in params[:3])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_momentum_goes_on():
    "An update that begins in the middle takes over the momentum PyTorch left, and leaves it to PyTorch again"
    results = []
    for ours in ((), (1,), (0, 1, 2), (1, 2)):
        w = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([w], lr=.1, momentum=.9)
        for k in range(3):
            w.grad = torch.arange(3.) + k
            if k in ours: sgd = TensorSGD(optimizer); sgd.set_lr(.1); sgd.step()
            else: optimizer.step()
        results.append(w.detach())
    for w in results[1:]: torch.testing.assert_close(w, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('method, name', STAGES, ids=['-'.join(s) for s in STAGES])
def test_arithmetic_asks_nothing(method, name, monkeypatch):
    "No value is read back, no size depends on values, no number comes from Python; also in the backward pass"
    nothing_asked(stage_of(method, name), monkeypatch)


@pytest.mark.parametrize('loss', LOSSES)
def test_losses_of_samples_ask_nothing(loss, monkeypatch):
    "Under learned weights, the look ahead with them, and under weights from accuracies"
    changes = dict(loss=loss, head='cosine' if loss == 'ldam' else 'linear')
    for method, more in (
        ('difficulty_net', dict(target='absolute', relative_input=False)),
        ('reweighting', dict(weights='cdb', tau='dynamic'))):
        nothing_asked(stage_of(method, **changes, **more), monkeypatch)


def nothing_asked(stage, monkeypatch):
    counts_on_the_device(stage, monkeypatch, foreach=False)
    stage.prepare(Compute())
    step = CapturedStep(stage, stage.optimizer(), Compute(capture=True))
    stage.set_mode(stage.network)
    step(load(stage, stage.sampler.epoch()[:16], np.random.default_rng(0)), .1)
    before, [plan] = values(stage, step.sgd.optimizer), step.loaded.values()
    def asked(*a, **k): raise AssertionError('the device was asked for a value')
    for k in ('item', 'cpu', 'tolist', 'numpy', 'nonzero', '__bool__', '__float__', '__int__', '__index__'):
        monkeypatch.setattr(torch.Tensor, k, asked)
    as_tensor = torch.as_tensor
    # would be brought from the processor
    monkeypatch.setattr(
        torch, 'as_tensor', lambda v, *a, **k: as_tensor(v, *a, **k) if isinstance(v, torch.Tensor) else asked())
    monkeypatch.setattr(torch, 'from_numpy', asked)
    questions = host_questions(lambda: step.arithmetic(plan))
    monkeypatch.undo()
    assert questions == [] and not torch.equal(values(stage, step.sgd.optimizer), before)


def test_questions_are_noticed():
    "In the loss, and in the backward pass"
    class Peek(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x*2

        @staticmethod
        def backward(ctx, g): return g*g.sum().item()

    stage = stage_of('cross_entropy')
    plain = stage.loss
    for loss in (lambda z, b: plain(z, b)*float(z.detach().sum()), lambda z, b: Peek.apply(plain(z, b))):
        stage.loss = loss
        step = CapturedStep(stage, stage.optimizer(), Compute())
        step(load(stage, np.arange(4), np.random.default_rng(0)), .1)
        assert host_questions(lambda: step.arithmetic(*step.loaded.values())) == ['_local_scalar_dense']


def test_arithmetic_reads_only_the_buffers():
    "What stands in the buffers and the rate when it is called decides; earlier arguments don't"
    stage = stage_of('mislas')
    step, rng = CapturedStep(stage, stage.optimizer(), Compute()), np.random.default_rng(0)
    plans = [load(stage, np.arange(8) + k, rng) for k in (0, 50)]
    step(plans[0], 0.)
    first, weights = step.loss.item(), values(stage, step.sgd.optimizer)[:100].clone()
    [buffers] = step.loaded.values()
    def addresses(): return [t.data_ptr() for t in (*buffers.values(), step.loss, *step.sgd.rates.values())]
    before = addresses()
    for k, v in plans[1].items(): buffers[k].copy_(v)
    step.arithmetic(buffers)
    by_hand = step.loss.item()
    # rate 0: the weights stay
    assert step(plans[1], 0.).item() == pytest.approx(by_hand, abs=1e-6) and by_hand != first
    assert torch.equal(values(stage, step.sgd.optimizer)[:100], weights)
    assert addresses() == before


def test_who_fits():
    stage = stage_of('cross_entropy')
    assert can_capture(stage) and isinstance(stage.view, TrainView)
    assert can_capture(replace(stage, state=dict(best=KeepBest(stage.network, lambda: 0.))))
    own = replace(stage, before_step=lambda b, lr: b)
    assert can_capture(replace(own, recordable=True)) and can_capture(stage_of('difficulty_net'))
    not_these = [
        own,
        replace(own, draw=dict),
        replace(stage, state=dict(count=object())),
        replace(stage, view=lambda i, rng: {}),
        replace(stage, view=PlainView.__call__),
        replace(own, recordable=True, view=lambda i, rng: {})]
    for k, v in (('workers', 2), ('recordable', False)):
        view = copy.copy(stage.view)
        view.__class__ = type('View', (TrainView,), {k: v})
        not_these.append(replace(stage, view=view))
    assert not any(map(can_capture, not_these))
    for s in not_these:
        assert captured_step(s, None, Compute(capture=True)) is None
        with pytest.raises(UserError, match='cannot be captured'): CapturedStep(s, None, Compute())
    with pytest.raises(UserError, match='dampening'):
        TensorSGD(torch.optim.SGD(stage.network.parameters(), lr=0.1, momentum=0.9, dampening=0.1))


def test_several_processes_are_not_captured(monkeypatch):
    "They exchange gradients between the backward pass and the step"
    stage = stage_of('cross_entropy')
    monkeypatch.setattr(captured, 'here', lambda: SimpleNamespace(count=2))
    assert not can_capture(stage)


def test_fit_falls_back():
    "A stage that doesn't fit is trained the ordinary way, with the same bits"
    results = []
    for capture in (False, True):
        stage = stage_of('cross_entropy', n=64, batch_size=32, epochs=1)
        # asks, so nobody called it recordable
        stage.before_step = lambda batch, lr: batch | dict(x=batch['x']*float(batch['x'].mean() > 0))
        assert captured_step(stage, stage.optimizer(), Compute(capture=capture)) is None
        rows, _ = fit(stage, Compute(capture=capture))
        results.append(rows[0]['loss'])
    assert results[0] == results[1]


@pytest.mark.parametrize('rule', ['sgd', 'adamw'])
def test_killed_and_resumed_while_captured(tmp_path, rule):
    "The same bits as at once; and a run may be begun without capture and end with it, and the other way round"
    class Killed(Exception): pass
    def kill(row): raise Killed
    def make():
        stage = stage_of('mislas', n=64, batch_size=40, epochs=2)
        stage.rule = rule
        return stage
    whole = make()
    rows, _ = fit(whole, Compute(capture=True))
    for first, then in ((True, True), (False, True), (True, False)):
        folder = tmp_path/f'{first}-{then}'
        folder.mkdir()
        with pytest.raises(Killed): fit(make(), Compute(capture=first), folder, report=kill)
        again, told = make(), []
        more, _ = fit(again, Compute(capture=then), folder, say=told.append)
        assert not [t for t in told if 'from its start' in t]
        assert [r['loss'] for r in more] == pytest.approx([r['loss'] for r in rows], abs=1e-6)
        # AdamW divides small gradients by small numbers, so that one rounding is seen
        near = dict(rtol=0, atol=0) if first and then else dict(rtol=5e-7, atol=1e-6 if rule == 'sgd' else 1e-5)
        for a, b in zip(whole.network.state_dict().values(), again.network.state_dict().values()):
            torch.testing.assert_close(a, b, **near)


def test_bad_loss_is_noticed():
    stage = stage_of('cross_entropy', n=64, batch_size=32)
    stage.loss = lambda z, b: z.sum()*float('nan')
    with pytest.raises(NonFiniteLoss, match='batch 1'): fit(stage, Compute(capture=True))


class FakeCuda:
    "Stands for torch.cuda: while it records, launches are noted and not executed, as on a GPU"
    def __init__(self): self.tape, self.streams, self.pools = None, [], []
    def Stream(self): return Waiting('side', self)
    def current_stream(self): return Waiting('main', self)
    def synchronize(self): self.streams.append('synchronize')
    def CUDAGraph(self): return Tape()

    @contextmanager
    def stream(self, s): self.streams.append(f'on {s.name}'); yield; self.streams.append(f'off {s.name}')

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.tape = graph
        self.pools.append((pool, stream.name, gc.isenabled()))
        yield
        self.tape = None
    def launch(self, f): self.tape.calls.append(f) if self.tape else f()


class Tape:
    def __init__(self): self.calls = []
    def replay(self): [f() for f in self.calls]


class Waiting:
    def __init__(self, name, cuda): self.name, self.cuda = name, cuda
    def wait_stream(self, other): self.cuda.streams.append(f'{self.name} waits for {other.name}')


@pytest.mark.parametrize('warm_up', [0, 1, 3])
def test_every_call_is_one_step(warm_up):
    "Warm-up runs are steps, recording is none, a replay is one"
    cuda, done, python = FakeCuda(), [], []
    step = Replay(lambda: (python.append(1), cuda.launch(lambda: done.append(1))), warm_up, pool='shared', cuda=cuda)
    for n in range(1, 7):
        step()
        assert len(done) == n
    # Python runs no more once it is recorded
    assert len(python) == warm_up + 1 and cuda.pools == [('shared', 'side', False)] and gc.isenabled()
    assert cuda.streams == ['side waits for main', 'on side', 'off side', 'main waits for side'] * warm_up + [
        'synchronize']


def test_a_failed_recording_is_not_replayed():
    cuda = FakeCuda()
    def fails(): raise RuntimeError('operation not permitted when stream is capturing')
    step = Replay(fails, 0, cuda=cuda)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='capturing.*--set capture=false'): step()
    assert gc.isenabled()
    assert step.graph is None


def test_capture_leaves_the_hash_alone():
    "Folders that were named before there was capture keep their names"
    r = recipe('mislas', 'digits')
    assert recipe_hash(r) == recipe_hash(recipe('mislas', 'digits', capture=True)) and not r.capture
    assert make_context(recipe('mislas', 'digits', profile='smoke', capture=True), device='cpu').compute.capture
    checked = 0
    for file in (ROOT/'outputs').rglob('recipe.json'):
        known = json.loads(file.read_text())
        if 'capture' in known: continue
        assert run_id(Recipe(**known)).split('/')[-1] == file.parent.name, file.parent.name
        checked += 1
    assert checked or not list((ROOT/'outputs').rglob('recipe.json'))
