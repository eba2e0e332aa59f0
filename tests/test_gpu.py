"Recorded and replayed on a GPU, a step does what it does called; where there is none, the same test runs on a tape"
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from safetensors.torch import load_file

from ltbook.data.streamed import RowStore, placed
from ltbook.methods import method
from ltbook.methods.difficulty_net import DifficultyWeigher
from ltbook.methods.method import get_method
from ltbook.methods.recipe import recipe
from ltbook.runs.run import make_context, run
from ltbook.train.captured import CapturedStep
from ltbook.train.pack import Pack, together
from ltbook.train.tape import TapeCuda

from memory import memory

NO_GPU = not torch.cuda.is_available()
MACHINES = ['tape', pytest.param('cuda', marks=pytest.mark.skipif(NO_GPU, reason='no GPU here'))]
STAGES = [
    ('mislas', 'stage1', {}),
    ('mislas', 'stage1', dict(precision='bf16', nesterov=True)),
    ('mislas', 'stage1', dict(average='ema')),
    ('mislas', 'stage2', {}),
    ('balanced_softmax', 'stage1', dict(first_side=4)),
    ('sade', 'stage1', {}),
    ('ride', 'stage1', {}),
    ('dirmixe', 'stage1', {}),
    ('difficulty_net', 'stage1', dict(loss='equalization', auto_augment=True, cutout_side=4)),
    ('difficulty_net', 'stage2', {}),
    ('reweighting', 'stage1', dict(weights='cdb'))]
WAITS = ('cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize', 'cudaMemcpy')


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    "Device, and what stands for `torch.cuda`"
    for k, v in dict(deterministic=True, allow_tf32=False).items(): monkeypatch.setattr(torch.backends.cudnn, k, v)
    if request.param == 'cuda': return 'cuda:0', None
    monkeypatch.setattr(sys.modules['torch.optim.adam'], '_get_capturable_supported_devices', lambda *a, **k: ['cpu'])
    return 'cpu', TapeCuda()


def stage_of(method, name, device, **changes):
    context = make_context(
        recipe(
            method,
            'digits',
            profile='smoke',
            **dict(max_steps=None, epochs=2, batch_size=32, capture=True) | changes),
        device=device)
    stages = get_method(method).stages
    if name != 'stage1': stages['stage1'](context)
    stage = stages[name](context)
    stage.prepare(context.compute)
    weigher = stage.state.get('weigher')
    if isinstance(weigher, DifficultyWeigher):
        weigher.optimizer.param_groups[0]['capturable'] = True
        weigher.measured(1, torch.linspace(.9, .1, 10))
    if getattr(stage.view, 'auto', None): stage.view.auto.dense = True
    stage.set_mode(stage.network)
    return stage, context.compute


def load(stage, index, rng): return stage.view.load(stage.view.plan(index, rng))


@pytest.mark.parametrize(
    'method, name, changes', STAGES, ids=['-'.join(map(str, (m, n, *c.values()))) for m, n, c in STAGES])
def test_one_step_replayed_is_one_step_called(method, name, changes, machine):
    "From the same state, whole batches and partial ones, after some steps of both; and nobody waits"
    device, cuda = machine
    stage, compute = stage_of(method, name, device, **changes)
    optimizer, rng = stage.optimizer(), np.random.default_rng(0)
    step, order = CapturedStep(stage, optimizer, compute, cuda), stage.sampler.epoch()
    if stage.before_epoch:
        stage.before_epoch(0)
    drawn = stage.draw() if stage.draw else {}
    stage.draw = (lambda: drawn) if drawn else None
    for _ in range(6):
        for size in (32, 20):
            step(load(stage, order[:size], rng), 0.02)
    assert len(step.steps) == 2 and all(r.graph is not None for r in step.steps.values())  # both were recorded
    if cuda:
        assert [g.replays for g in cuda.graphs] == [3, 3]
    for size in (32, 20):
        loaded = load(stage, order[-size:], rng)
        before = [t.clone() for t in memory(stage, optimizer)]
        loss = step(loaded, 0.01).item()
        replayed = [t.clone() for t in memory(stage, optimizer)]
        for t, b in zip(memory(stage, optimizer), before):
            t.copy_(b)
        for g in optimizer.param_groups:
            g['lr'] = 0.01 * g['lr_factor']
        batch = stage.view.apply(loaded) | {
            k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in drawn.items()}
        if stage.before_step:
            batch = stage.before_step(batch, 0.01)
        called = stage.update(batch, optimizer, compute)
        assert loss == pytest.approx(called.item(), rel=1e-4) and any(
            not torch.equal(a, b) for a, b in zip(before, replayed))
        for a, b in zip(replayed, memory(stage, optimizer)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
    if cuda is None:
        nobody_waits(lambda: step(loaded, 0.01))
    step.release()
    assert not step.steps and all(p.grad is None for p in stage.network.parameters())
    for _ in range(5):
        step(load(stage, order[:32], rng), 0.01)  # records anew, in another memory
    assert len(step.steps) == 1 and all(r.graph is not None for r in step.steps.values())


def nobody_waits(step):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(20):
                step()
    finally: torch.cuda.set_sync_debug_mode('default')
    seen = {e.key: e.count for e in profile.key_averages()}
    waits = {k: n for k, n in seen.items() if k in WAITS}
    # the profiler itself waits once, when it ends
    assert seen['cudaGraphLaunch'] == 20 and sum(waits.values()) <= 1, waits


def test_a_pack_is_its_runs(machine):
    "Two seeds, one of them longer, on one graph and alone"
    device, cuda = machine
    def trained(seed, n, pack=None):
        stage, compute = stage_of('mislas', 'stage1', device, seed=seed)
        step, rng, order = (
            CapturedStep(stage, stage.optimizer(), replace(compute, pack=pack), cuda if pack is None else None),
            np.random.default_rng(seed),
            stage.sampler.epoch())
        for _ in range(n): step(load(stage, order[:32], rng), .02)
        return [t.clone() for t in stage.network.state_dict().values()]
    pack = Pack(2, torch.device('cuda:0'), **(dict(cuda=cuda) if cuda else {}))
    packed = together([lambda s=s: trained(s, 9 + s, pack) for s in (0, 1)], pack)
    # of both; the longer run ends by a step as it is
    if cuda: assert sorted(g.replays for g in cuda.graphs) == [6]
    for s, tensors in enumerate(packed):
        assert not isinstance(tensors, BaseException), tensors
        for a, b in zip(tensors, trained(s, 9 + s)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('device', ['cpu', MACHINES[1]])
@pytest.mark.parametrize('name', ['mislas', 'difficulty_net'])
def test_a_set_too_large_for_the_device_gives_the_same_weights(name, device, tmp_path, monkeypatch):
    "Rows gathered in main memory ahead of the step, against rows that lie on the device"
    for k, v in dict(deterministic=True, allow_tf32=False).items(): monkeypatch.setattr(torch.backends.cudnn, k, v)
    r, found, kinds = recipe(name, profile='smoke', epochs=2, stage2_epochs=1, max_steps=None, batch_size=64), [], []
    for free in (2**40, 0):
        def put(parts, device, free=free, processes=1):
            made = placed(parts, device, free)
            kinds.append({type(p.store) for p in made.values()})
            return made
        monkeypatch.setattr(method, 'placed', put)
        folder = run(r, tmp_path/str(free), device=device, say=lambda text: None)
        found.append({f'{p.name} {k}': v for p in folder.glob('*.safetensors') for k, v in load_file(p).items()})
    assert kinds == [{torch.Tensor}, {RowStore}] and found[0]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
