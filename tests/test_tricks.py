("Optimiser, sharpness-aware steps and averaged weights: by hand, "
 "resumed, and captured; and a recipe is all that changes")
import copy

import numpy as np
import pytest
import torch
from torch import nn

from ltbook.data.checks import UserError
from ltbook.methods.method import context_of, recipe
from ltbook.methods.registry import get_method, methods
from ltbook.runs.evaluate import evaluate
from ltbook.runs.folder import load_run
from ltbook.runs.run import run
from ltbook.train.captured import CapturedStep, captured_step
from ltbook.train.compute import Compute
from ltbook.train.loop import fit, train_epoch
from ltbook.train.stage import Average
from ltbook.train.tape import TapeCuda

TRICKS = [
    dict(optimizer='adamw', lr=1e-4),
    dict(sam_rho=0.05),
    dict(average='ema', average_decay=0.9),
    dict(average='swa', average_start=0.25),
    dict(loss='focal', mixup_alpha=1.0),
    dict(loss='equalization'),
    dict(optimizer='adamw', lr=1e-4, sam_rho=0.1, average='ema')]
SMALL = dict(epochs=4, batch_size=64, max_steps=3)


def stage_of(method='balanced_softmax', **changes):
    return get_method(method).stages_of(r := recipe(method, 'digits', **SMALL | changes))['stage1'](context_of(r))


@pytest.mark.parametrize('changes', TRICKS, ids=str)
def test_killed_and_resumed_to_the_bit(changes, tmp_path):
    class Killed(Exception): pass
    def kill(row):
        if row['epoch'] == 1: raise Killed
    whole, part, again = (stage_of(**changes) for _ in range(3))
    fit(whole, Compute())
    with pytest.raises(Killed): fit(part, Compute(), tmp_path, report=kill)
    fit(again, Compute(), tmp_path)
    for k, v in whole.network.state_dict().items(): assert torch.equal(v, again.network.state_dict()[k]), k


@pytest.mark.parametrize('changes', TRICKS, ids=str)
def test_captured_is_plain(changes):
    "On buffers of its own, without recording; rates change from epoch to epoch"
    found = []
    for capture in (False, True):
        stage, compute, rng = stage_of(**changes), Compute(capture=capture), np.random.default_rng(1)
        stage.prepare(compute)
        optimizer = stage.optimizer()
        step = captured_step(stage, optimizer, compute)
        assert (step is not None) == capture
        losses = [train_epoch(stage, e, optimizer, rng, compute, step=step)[0] for e in range(3)]
        with stage.evaluated():
            found.append((losses, torch.cat([p.detach().flatten() for p in stage.network.parameters()])))
    # its steps are as long for small gradients as for large ones
    near = 5e-4 if changes.get('optimizer') == 'adamw' else 1e-5
    np.testing.assert_allclose(found[0][0], found[1][0], atol=near)
    torch.testing.assert_close(found[0][1], found[1][1], atol=near, rtol=0)


@pytest.mark.parametrize('changes', [t for t in TRICKS if 'average' in t and 'optimizer' not in t], ids=str)
def test_looks_between_epochs_do_not_part_recorded_steps_from_their_average(changes):
    found = []
    for cuda in (None, TapeCuda()):
        stage, compute, rng = stage_of(**changes), Compute(), np.random.default_rng(1)
        stage.prepare(compute)
        optimizer = stage.optimizer()
        step = CapturedStep(stage, optimizer, compute, cuda=cuda) if cuda else None
        for e in range(4):
            train_epoch(stage, e, optimizer, rng, compute, step=step)
            stage.average.after_epoch(e)
            with stage.evaluated(): pass
        found.append(torch.cat([v.double().flatten() for v in stage.average.values.values()]))
    assert sum(g.replays for g in cuda.graphs) > 6
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_the_average_goes_where_the_network_goes():
    "As to a GPU, after it was made"
    stage = stage_of(average='ema')
    stage.prepare(Compute(device=torch.device('meta')))
    assert {t.device.type for t in (stage.average.count, *stage.average.values.values())} == {'meta'}


def test_sharpness_by_hand():
    "Gradient where the loss climbs to, step from where the weights were; BatchNorm statistics follow the first pass"
    a, b = stage_of(sam_rho=.1), stage_of()
    b.network.load_state_dict(a.network.state_dict())
    b.network.train(), a.network.train()
    batch, opt = b.view(np.arange(64), np.random.default_rng(0)), a.optimizer()
    for g in opt.param_groups: g['lr'] = .1
    a.update(batch, opt, Compute())
    loss = b.loss(b.network(batch['x']), batch)
    loss.backward()
    statistics = {k: v.clone() for k, v in b.network.state_dict().items() if 'running' in k}
    grads = [p.grad.clone() for p in b.network.parameters()]
    length = torch.sqrt(sum((g**2).sum() for g in grads))
    moved = copy.deepcopy(b.network)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), grads): p += .1*g/length
    moved.zero_grad()
    b.loss(moved(batch['x']), batch).backward()
    with torch.no_grad():
        for p, q in zip(b.network.parameters(), moved.parameters()): p -= .1*(q.grad + 2e-4*p)
    for p, q in zip(a.network.parameters(), b.network.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    for k, v in statistics.items(): torch.testing.assert_close(a.network.state_dict()[k], v)


def test_swa_is_the_mean_of_the_last_epochs():
    net, kept = nn.Linear(3, 2), []
    average, g = Average(net, 'swa', first=2), torch.Generator().manual_seed(0)
    for epoch in range(6):
        with torch.no_grad(): net.weight.copy_(torch.randn(2, 3, generator=g))
        average.after_step(), average.after_epoch(epoch)
        if epoch >= 2: kept.append(net.weight.detach().clone())
    with average.in_place(): torch.testing.assert_close(net.weight.detach(), torch.stack(kept).mean(0))
    assert torch.equal(net.weight, kept[-1])


@pytest.mark.parametrize('kind', ['ema', 'swa'])
def test_the_average_is_what_is_tested_and_saved(kind, tmp_path):
    "And the run says so"
    r = recipe('cross_entropy', 'digits', **SMALL, average=kind, average_start=.25, test_every=2)
    done = load_run(run(r, tmp_path, device='cpu'))
    assert done.metrics['protocol']['weights'] == f'{kind} average'
    from ltbook.runs.evaluate import evaluate
    assert np.isclose(
        evaluate(done, weights=True, device='cpu').metrics['final']['nll'],
        done.metrics['final']['nll'],
        rtol=1e-5)
    raw = load_run(run(r.model_copy(update=dict(average='none')), tmp_path, device='cpu'))
    assert raw.metrics['final']['nll'] != done.metrics['final']['nll'] and 'weights' not in raw.metrics['protocol']


def test_what_a_method_does_not_use_is_refused():
    for method, changes in (
        ('sade', dict(mixup_alpha=1.0)),
        ('dirmixe', dict(loss='focal')),
        ('difficulty_net', dict(sam_rho=0.1)),
        ('supcon', dict(auto_augment=True))):
        with pytest.raises(UserError, match=f'{method} does not use {next(iter(changes))}'):
            recipe(method, 'digits', **changes)


@pytest.mark.parametrize('method', ['mislas', 'crt', 'sade', 'class_balanced_experts', 'reweighting', 'supcon'])
def test_every_method_has_them(method, tmp_path):
    "Averaged weights and another optimizer, through a whole run"
    r = recipe(method, 'digits', profile='smoke', average='ema', optimizer='adamw', lr=1e-3)
    assert load_run(run(r, tmp_path, device='cpu')).metrics['protocol']['weights'] == 'ema average'


@pytest.mark.parametrize('method', methods())
def test_images_kept_back(method, tmp_path):
    "They are left out of training and calibrate every stage that answers; or the method says why it can't"
    r = recipe(method, 'digits', profile='smoke', calibration=.1)
    if not get_method(method).one_network:
        with pytest.raises(UserError, match='leave calibration out'): run(r, tmp_path, device='cpu')
        return
    context, plain = context_of(r), context_of(recipe(method, 'digits', profile='smoke'))
    assert (context.trained_counts + context.parts['calibration'].counts).tolist() == plain.trained_counts.tolist()
    assert context.tail.counts.tolist() == plain.tail.counts.tolist()
    done = load_run(run(r, tmp_path, device='cpu'))
    for s in done.stages:
        m = done.metrics[s]
        assert m['calibrated']['plain']['nll'] == m['nll'] and m['calibrated']['temperature']['top1'] == m['top1']
        assert len(done.predictions[f'{s}/calibration_logits']) == len(context.parts['calibration'])
    assert evaluate(done).metrics['final']['calibrated'] == done.metrics['final']['calibrated']
