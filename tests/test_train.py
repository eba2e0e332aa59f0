"Fast and plain paths give the same numbers, a killed stage resumes exactly, every module stands alone"
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltbook.data.images import load_images
from ltbook.data.sampling import InstanceBalanced
from ltbook.methods.method import get_method
from ltbook.methods.recipe import recipe
from ltbook.runs.run import make_context
from ltbook.train.compute import Compute
from ltbook.train.loop import fit, predict

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    '.'.join(p.relative_to(ROOT).with_suffix('').parts)
    for p in (ROOT/'ltbook').rglob('*.py')
    if p.name not in ('__init__.py', '_modidx.py'))


def small(**changes):
    "The stages' context of a small MiSLAS run"
    return make_context(recipe('mislas', **dict(epochs=2, stage2_epochs=1) | changes), device='cpu')


def train(context, compute=Compute(), folder=None, report=None):
    "Both stages in a row; the test logits"
    for name, build in get_method('mislas').stages.items():
        stage = build(context)
        fit(stage, compute, report=report)
    return predict(context.network, context.plain('test'), 500)['logits']


def test_layout_does_not_change_the_numbers():
    "channels_last is the plain layout up to rounding"
    networks = []
    for last in (True, False):
        context = small()
        stage = get_method('mislas').stages['stage1'](context)
        stage.epochs, stage.steps = 1, 1
        fit(stage, Compute(channels_last=last))
        networks.append(context.network.state_dict())
    for k, v in networks[0].items(): assert torch.allclose(v.float(), networks[1][k].float(), rtol=1e-3, atol=1e-5), k


def test_bf16_gradients_are_close():
    "One forward and backward pass in bf16 points where that in fp32 does"
    context, grads = small(), {}
    batch = context.plain('train')(np.arange(128))
    for precision in ('fp32', 'bf16'):
        context.network.zero_grad()
        with Compute(precision=precision).autocast(): z = context.network(batch['x'])
        F.cross_entropy(z.float(), batch['y']).backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in context.network.parameters()])
    assert F.cosine_similarity(grads['fp32'], grads['bf16'], dim=0) > .98


def test_same_seed_same_bits_other_seed_other_bits():
    a, b, c = train(small()), train(small()), train(small(seed=1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_no_global_randomness():
    "Training neither uses nor moves the global generators"
    np.random.seed(1); torch.manual_seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    a = train(small())
    assert torch.equal(torch.random.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    np.random.seed(2); torch.manual_seed(2)
    assert torch.equal(a, train(small()))


@pytest.mark.parametrize('at', [0, 1])
def test_resume_is_exact(tmp_path, at):
    "Stage 1 of MiSLAS, killed after an epoch"
    class Killed(Exception): pass
    def kill(row):
        if row['epoch'] == at: raise Killed
    whole, parts = small(), small()
    fit(get_method('mislas').stages['stage1'](whole), Compute())
    with pytest.raises(Killed): fit(get_method('mislas').stages['stage1'](parts), Compute(), tmp_path, report=kill)
    again = small()
    fit(get_method('mislas').stages['stage1'](again), Compute(), tmp_path)
    for k, v in whole.network.state_dict().items(): assert torch.equal(v, again.network.state_dict()[k]), k


def test_stage2_resumes_exactly(tmp_path):
    "The middle of stage 2: the cycles of the class-aware stream and the shifted BatchNorm statistics go on"
    class Killed(Exception): pass
    def kill(row):
        if row['epoch'] == 0: raise Killed
    def second():
        context = small(stage2_epochs=3)
        fit(get_method('mislas').stages['stage1'](context), Compute())
        return context, get_method('mislas').stages['stage2'](context)
    whole, stage = second()
    fit(stage, Compute())
    with pytest.raises(Killed): fit(second()[1], Compute(), tmp_path, report=kill)
    again, stage = second()
    fit(stage, Compute(), tmp_path)
    for k, v in whole.network.state_dict().items(): assert torch.equal(v, again.network.state_dict()[k]), k


def test_stage2_starts_where_stage1_ended():
    context = small()
    stages = get_method('mislas').stages
    fit(stages['stage1'](context), Compute())
    before = predict(context.network, context.plain('test'), 500)['logits']
    stages['stage2'](context)
    assert torch.equal(before, predict(context.network, context.plain('test'), 500)['logits'])


def test_step_equals_a_plain_loop():
    "Two epochs of cross-entropy against a loop written out with torch alone"
    context = make_context(recipe('cross_entropy', epochs=2, batch_size=64), device='cpu')
    plain = make_context(recipe('cross_entropy', epochs=2, batch_size=64), device='cpu')
    stage = get_method('cross_entropy').stages['stage1'](context)
    fixed = context.plain('train')
    stage.view = fixed
    fit(stage, Compute(channels_last=False))
    net, sampler = plain.network, InstanceBalanced(plain.train.labels, seed=0)
    opt = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=2e-4)
    net.train()
    for epoch in range(2):
        order = sampler.epoch()
        for g in opt.param_groups: g['lr'] = .1          # warm-up of two epochs is one epoch at the full rate
        for i in range(0, len(order), 64):
            b = fixed(order[i:i + 64])
            opt.zero_grad()
            F.cross_entropy(net(b['x'].contiguous()), b['y']).backward()
            opt.step()
    for (k, v), w in zip(net.state_dict().items(), context.network.state_dict().values()):
        assert torch.allclose(v.float(), w.float(), rtol=1e-3, atol=1e-4), k


FORKS = """
import importlib, os, sys
import h5py, numpy, pandas, pydantic, rich, safetensors, torch, typer      # once; nothing of ours
HEAVY = {'matplotlib', 'seaborn', 'nbdev', 'papermill', 'IPython', 'jupyterlab', 'sklearn', 'torchmetrics'}
failed = []
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
            own = dict(estimator={'sklearn'}).get(name.rpartition('.')[2], set())      # what a module is there for
            bad = set() if '.plots.' in name else (HEAVY - own) & set(sys.modules)
            if bad: print(name, 'imports', bad)
            os._exit(bool(bad))
        except BaseException as e:
            print(name, repr(e)); os._exit(1)
    if os.waitpid(child, 0)[1]: failed.append(name)
sys.exit(', '.join(failed) or 0)
"""


def test_every_module_imports_alone():
    ("Each in a process that has seen no other module of ours; the training "
     "side without any plotting or notebook package")
    p = subprocess.run([sys.executable, '-u', '-c', FORKS, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr


def test_digits_are_what_the_page_says():
    d = load_images('digits')
    assert len(d.train) + len(d.test) == 1797 and (d.test.counts == 50).all()
