("The flow filter and DLSA: against torch.distributions, loops and autograd; "
 "whole runs on feature files, stopped and resumed; bad files")
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ltbook.bench.training import child
from ltbook.data.checks import UserError
from ltbook.data.features import FeatureSet, check_features, read_features, write_features
from ltbook.losses.flow_losses import BalanceLoss, likelihood_loss, purity_loss, tail_weights
from ltbook.methods.dlsa import CONFIGS, CONTROLS, published_config
from ltbook.methods.routed_heads import HeadBank, LevelHead, RoutedRows, level_loss
from ltbook.models.flow import MaskedFlow
from ltbook.models.flow_filter import FlowFilter, component_densities, log_likelihood, read_rows
from ltbook.models.levels import PairSampler, assign_levels, cluster_prior, cluster_table, keep_threshold
from ltbook.studies.features import export_features
from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import recipe_from, run

ROOT = Path(__file__).resolve().parents[1]
f64 = torch.float64
TINY = dict(
    n_clusters=8,
    flow_batch=64,
    flow_epochs=3,
    head_batch=32,
    head_epochs=3,
    min_size=3,
    likelihood_weight=0.3,
    flow_lr=0.1)


def shaken(flow, seed=0):
    "A flow in eval mode with disturbed weights and statistics"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in flow.parameters(): t.add_(torch.randn(t.shape, generator=g, dtype=t.dtype), alpha=0.3)
        for b in flow.layers[1::2]: b.mean.normal_(generator=g), b.var.uniform_(0.5, 2, generator=g)
    return flow.eval()


def features(counts, d=12, seed=0, shift=0):
    "Blobs after a ReLU"
    g = torch.Generator().manual_seed(seed)
    centers = 2*torch.randn(len(counts), d, generator=torch.Generator().manual_seed(9))
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return (centers[y] + torch.randn(len(y), d, generator=g)).relu(), y + shift


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A folder of data sets with one set of feature files"
    root = tmp_path_factory.mktemp('data')
    for part, counts, seed in (('train', [90, 60, 40, 20, 8], 0), ('test', [15]*5, 1)):
        write_features(root/'blobs'/f'feature_{part}.h5', [features(counts, seed=seed)])
    return root


def trained(root, out, **changes):
    return load_run(run(recipe('dlsa', 'blobs', profile='short', **TINY | changes), out, root=root, device='cpu'))


@pytest.mark.parametrize('d, hidden, blocks', [(2, None, 1), (6, None, 2), (5, 9, 3), (7, 3, 4)])
def test_flow_against_autograd(d, hidden, blocks):
    flow = shaken(MaskedFlow(d, hidden, blocks).double(), d)
    x = torch.randn(4, d, dtype=f64, generator=torch.Generator().manual_seed(1))
    u, log_det = flow(x)
    jacobian = [torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row) for row in x]
    assert torch.allclose(log_det, torch.stack([torch.linalg.slogdet(j)[1] for j in jacobian]), rtol=0, atol=1e-12)
    assert (flow.inverse(u) - x).abs().max() < 1e-10


@pytest.mark.parametrize('reverse', [False, True])
def test_order_of_a_single_step(reverse):
    made = MaskedFlow(5, n_blocks=2).double().layers[2 if reverse else 0]
    j = torch.autograd.functional.jacobian(lambda v: made(v[None])[0][0], torch.randn(5, dtype=f64))
    assert torch.equal(j.tril(-1) if reverse else j.triu(1), torch.zeros(5, 5, dtype=f64))
    assert (j.diagonal() > 0).all()


def test_gradients_of_the_training_pass():
    "Batch statistics carry gradients, in training mode, in float64"
    flow = MaskedFlow(3).double().train()
    x = torch.randn(5, 3, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: flow(v), (x,))


def test_mixture_against_torch_distributions():
    f = FlowFilter(6, 7, seed=3).double()
    shaken(f.flow)
    x = torch.randn(20, 6, dtype=f64)
    u, log_det = f.latent(x)
    d = torch.distributions
    mixture = d.MixtureSameFamily(
        d.Categorical(logits=torch.zeros(7, dtype=f64)),
        d.Independent(d.Normal(f.centers, torch.ones((), dtype=f64)), 1))
    assert torch.allclose(log_likelihood(f(x)), mixture.log_prob(u) + log_det)
    assert torch.equal(read_rows(f, x)['cluster'], torch.cdist(u, f.centers).argmin(1))


def test_likelihood_integrates_to_one():
    f = FlowFilter(2, 4, seed=1)
    shaken(f.flow, 2)
    t = torch.linspace(-40, 40, 1201)
    p = read_rows(f, torch.cartesian_prod(t, t), 100_000)['loglik'].exp()
    assert p.sum().item()*(80/1200)**2 == pytest.approx(1, abs=0.02)


MEMORY = '''
import resource, torch
from ltbook.models.flow_filter import component_densities
from ltbook.losses.flow_losses import likelihood_loss
torch.set_num_threads(1)
def step(b, k, d):
    u, c = torch.randn(b, d, requires_grad=True), torch.randn(k, d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    likelihood_loss(component_densities(u, torch.zeros(b), c), torch.ones(b)).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024
step(8, 4, 16)
print(step(1024, 500, 2048))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss counts kilobytes on Linux')
def test_memory_of_the_mixture():
    "Batch 1024, K = 500, D = 2048, forward and backward: under 200 MB beyond inputs"
    out = subprocess.run(
        [sys.executable, '-c', MEMORY],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True)
    assert float(out.stdout) < 200


def test_losses_against_loops():
    g = torch.Generator().manual_seed(0)
    a, b, w = (
        torch.randn(6, 5, dtype=f64, generator=g),
        torch.randn(6, 5, dtype=f64, generator=g),
        torch.rand(6, dtype=f64, generator=g))
    p, q = a.softmax(1).numpy(), b.softmax(1).numpy()
    assert likelihood_loss(a, w).item() == pytest.approx(
        -sum(w[i].item() * np.log(np.exp(a[i].numpy()).mean()) for i in range(6)) / 6)
    assert purity_loss(a, b).item() == pytest.approx(sum(p[i, k]*np.log(q[i, k]) for i in range(6) for k in range(5))/6)
    assert purity_loss(a, b, margin=0.3).item() == pytest.approx(
        sum(p[i, k] * np.log(max(q[i, k], 0.3)) for i in range(6) for k in range(5)) / 6)
    loss, e = BalanceLoss(0.7), 0
    for t in (1, 2, 3):
        joint = a*t
        mean = joint.softmax(1).mean(0).numpy() + 1e-7
        e = 0.7*e + 0.3*mean
        hat = e/(1 - 0.7**t)
        assert loss(joint).item() == pytest.approx((hat*np.log(hat)).sum() + np.log(5))
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: likelihood_loss(x, w), (a,))
    assert torch.autograd.gradcheck(lambda x: BalanceLoss()(x), (a,))
    assert torch.autograd.gradcheck(lambda x, y: purity_loss(x, y, detach=False), (a, b))


def test_tail_weights_follow_the_classes():
    counts, order = np.array([50, 7, 0, 1]), [3, 0, 2, 1]
    assert torch.allclose(tail_weights(counts, 2)[order], tail_weights(counts[order], 2))
    with pytest.raises(UserError): tail_weights([0, 0])


def test_pairs():
    y = np.repeat([1, 4, 6], [50, 5, 1])
    s = PairSampler(y, 3)
    pairs = np.concatenate([s.epoch() for _ in range(300)])
    seen = np.zeros((7, 7))
    np.add.at(seen, (y[pairs[:, 0]], y[pairs[:, 1]]), 1)
    present = seen[np.ix_([1, 4, 6], [1, 4, 6])]/len(pairs)
    assert np.allclose(present, (1 - np.eye(3))/6, atol=0.01) and seen.trace() == 0
    inside = np.bincount(pairs[y[pairs[:, 0]] == 1, 0], minlength=50)[:50]
    assert inside.min() > 0.6*inside.mean()


@pytest.mark.parametrize(
    'n, want',
    [
        (10847, [3255, 2278, 1595, 3719]),
        (115846, [34754, 24328, 17030, 39734]),
        (437513, [131254, 91878, 64315, 150066])])
def test_chains_of_levels(n, want):
    "Kept rows of three levels and the rest, as published sizes give them"
    rng = np.random.default_rng(0)
    logliks, thresholds = [], []
    for d in range(3):
        logliks.append(torch.from_numpy(rng.permutation(n)).double())
        level = assign_levels(logliks[:d], thresholds, n)
        thresholds.append(keep_threshold(logliks[d][level == d], 0.3))
    assert assign_levels(logliks, thresholds, n).bincount().tolist() == want


def test_prior_against_a_loop():
    g = torch.Generator().manual_seed(0)
    k, y = torch.randint(4, (60,), generator=g), torch.randint(3, (60,), generator=g)
    table = cluster_table(k, y, 5, 3)
    for own in (False, True):
        got = cluster_prior(table, k, y if own else None)
        for i in range(60):
            others = y[(k == k[i]) & ((torch.arange(60) != i) if own else torch.tensor(True))]
            assert torch.allclose(got[i], others.bincount(minlength=3)/max(len(others), 1))


def test_level_loss_ignores_absent_classes():
    "A class without rows keeps its weights: its gradient is all but zero"
    head = LevelHead(4, 3)
    level_loss(head(torch.randn(20, 4)), torch.arange(20) % 2, torch.tensor([10, 10, 0])).backward()
    assert head.f_x.weight.grad[2].abs().max() < 1e-5 < head.f_x.weight.grad[0].abs().max()


def test_bank_decides_row_by_row():
    g = torch.Generator().manual_seed(0)
    x, prior, level = (
        torch.randn(30, 4, generator=g),
        torch.rand(30, 3, generator=g),
        torch.randint(3, (30,), generator=g))
    bank = HeadBank([LevelHead(4, 3, 7), LevelHead(4, 3, 7), LevelHead(4, 3, 4)])
    out = bank.decide(RoutedRows(x, torch.zeros(30, dtype=torch.int64), level, x, prior))
    for i, d in enumerate(level.tolist()):
        want = bank.heads[d](x[i:i+1], x[i:i+1] if d == 2 else torch.cat([x[i:i+1], prior[i:i+1]], 1))
        assert torch.allclose(out[i:i+1], want, atol=1e-6)


def test_run_on_feature_files(root, tmp_path):
    r = trained(root, tmp_path)
    assert (
        r.stages == [*CONTROLS, 'dlsa']
        and r.metrics['final']['stage'] == 'dlsa'
        and r.metrics['final']['top1'] > 0.6)
    p = r.predictions
    kept, kept_test = (
        np.loadtxt(r.path/f'flow1-{k}.csv', delimiter=',', skiprows=1)[-1] for k in ('kept', 'kept_test'))
    labels = read_features(root/'blobs'/'feature_train.h5', root/'blobs'/'feature_test.h5')[0].labels.numpy()
    assert kept.tolist() == np.bincount(
        labels[p['dlsa/train_level'] == 0], minlength=5).tolist() and kept.sum() == 218 - int(218 * 0.7)
    assert kept_test.tolist() == np.bincount(p['labels'][p['dlsa/level'] == 0], minlength=5).tolist()
    again = trained(root, tmp_path/'again')
    assert np.array_equal(again.predictions['logits'], p['logits']), 'the same seed gives the same predictions'
    assert not np.array_equal(trained(root, tmp_path, seed=1).predictions['logits'], p['logits'])


class Stop(Exception): pass


@pytest.mark.parametrize('at', [('flow1', 1), ('flow2', 0), ('random', 4), ('dlsa', 7)])
def test_resume_is_exact(root, tmp_path, at):
    ("Stopped within a filter or a classifier, then the same recipe again; depth "
     "2, both kinds of choosing an epoch, rows class by class")
    changes = dict(depth=2, selection='best_on_test', head_sampler='class_aware', head_epochs=6)
    want = trained(root, tmp_path/'whole', **changes)
    def stop(row):
        if (row['stage'], row['epoch']) == at: raise Stop
    r = recipe('dlsa', 'blobs', profile='short', **TINY | changes)
    with pytest.raises(Stop): run(r, tmp_path/'cut', root=root, device='cpu', report=stop)
    got = load_run(run(r, tmp_path/'cut', root=root, device='cpu'))
    assert np.array_equal(got.predictions['logits'], want.predictions['logits'])
    assert [x['loss'] for x in got.history.to_dict('records')] == [x['loss'] for x in want.history.to_dict('records')]
    assert got.metrics['final']['selection'] == got.metrics['protocol']['selection'] == 'best_on_test'


@pytest.mark.parametrize(
    'changes',
    [
        dict(depth=3),
        dict(z_source='latent', contrast='hard', rest_prior='subset'),
        dict(head_type='cosine', head_loss='plain', standardize=True),
        dict(
            balance_momentum=None,
            scale_bound=3.0,
            head_smooth=0.1,
            controls=False,
            leave_one_out=False,
            tail_power=2.0,
            contrast_margin=None)])
def test_switches(root, tmp_path, changes):
    r = trained(root, tmp_path, **changes)
    assert np.isfinite(r.predictions['logits']).all() and r.stages == (
        ['dlsa'] if not changes.get('controls', True) else [*CONTROLS, 'dlsa'])
    assert set(np.unique(r.predictions['dlsa/level'])) <= set(range(changes.get('depth', 1) + 1))


def test_features_of_a_run_and_start_from_it(tmp_path):
    start = load_run(run(recipe('mislas', profile='smoke'), tmp_path, device='cpu'))
    took = load_run(
        run(
            recipe_from(start, 'dlsa', flow_epochs=1, head_epochs=1, standardize=True),
            tmp_path,
            start=start,
            device='cpu'))
    assert took.metrics['stage1']['top1'] == start.metrics['stage1']['top1'] and took.stages[-1] == 'dlsa'
    files = export_features(start, tmp_path/'files', device='cpu')
    train, test = read_features(*files)
    logits = test.features @ test.head[0].T + test.head[1]
    assert (logits.argmax(1).numpy() == start.predictions['stage1/logits'].argmax(1)).mean() > 0.99
    assert not list((tmp_path/'files').glob('.*')), 'no half-written files'
    with pytest.raises(UserError, match='weights'):
        (start.path/'stage1.safetensors').unlink()
        export_features(start, tmp_path/'more', device='cpu')


@pytest.mark.parametrize('z_source', ['feature', 'latent'])
def test_mapped_files_give_the_same_run(z_source, tmp_path):
    "Rows read where they lie in the file, and rows in memory: the same weights and logits to the bit"
    for name, known in (('mapped', True), ('read', False)):
        for part, counts, seed in (('train', [90, 60, 40, 20, 8], 0), ('test', [15]*5, 1)):
            x, y = features(counts, seed=seed)
            write_features(tmp_path/name/'blobs'/f'feature_{part}.h5', zip(x.split(50), y.split(50)),
                           rows=len(y) if known else None)
    mapped, read = (trained(tmp_path/name, tmp_path/f'runs-{name}', depth=2, z_source=z_source,
                            selection='best_on_test') for name in ('mapped', 'read'))
    for name in ('mapped', 'read'):
        with h5py.File(tmp_path/name/'blobs'/'feature_train.h5') as f:
            assert bool(f['features'].chunks) == (name == 'read')
    for stage in mapped.stages:
        a, b = (load_file(r.path/f'{stage}.safetensors') for r in (mapped, read))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), stage
    assert np.array_equal(mapped.predictions['dlsa/logits'], read.predictions['dlsa/logits'])


# a process that runs DLSA on feature files and prints the memory of its own before and at the most, in MB
WATCHED = """
import sys
from ltbook.bench.training import memory, watch_memory
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
before, most = memory('RssAnon'), watch_memory(.02)
r = recipe('dlsa', 'wide', profile='smoke', depth=2, n_clusters=20, hidden=16, n_blocks=1, standardize=True,
           flow_epochs=1, head_epochs=1, max_steps=3, flow_lr=.001)
run(r, sys.argv[1] + '/runs', sys.argv[1], 'cpu', say=lambda text: None)
print(before, most())
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='only Linux tells the memory of a process apart')
def test_features_stay_in_their_file(tmp_path):
    "Two filters, four controls and DLSA on 614 MB of features take less than half of that (175 to 235 MB)"
    n, d, c = 150_000, 1024, 600      # priors of all rows would be 360 MB
    block = torch.randn(3000, d, generator=torch.Generator().manual_seed(0)).relu()
    for part, size in (('train', n), ('test', 3000)):
        batches = ((block + i/50, torch.arange(3000) % c) for i in range(size//3000))
        write_features(tmp_path/'wide'/f'feature_{part}.h5', batches, rows=size)
    before, most = child(WATCHED, str(tmp_path))
    assert most - before < 300, (before, most)


def bad_files(folder, **changes):
    "Feature files of which some arrays are other ones"
    for part in ('train', 'test'):
        x, y = features([20, 10, 5])
        write_features(folder/f'feature_{part}.h5', [(x, y)])
        with h5py.File(folder/f'feature_{part}.h5', 'a') as f:
            for k, v in changes.get(part, {}).items():
                del f[k]
                if v is not None: f[k] = v
    return folder/'feature_train.h5', folder/'feature_test.h5'


x0, y0 = (t.numpy() for t in features([20, 10, 5]))
nan = x0.copy(); nan[7, 2] = np.nan


@pytest.mark.parametrize(
    'part, arrays, words',
    [
        ('train', dict(labels=y0[:-2]), '35 rows of features but 33 labels'),
        ('test', dict(features=x0[:, :5]), '5 numbers a row, expected 12'),
        ('train', dict(features=x0[:, :0]), 'at least 2 numbers a row'),
        ('test', dict(labels=y0 + 2), 'there are 3 classes'),
        ('train', dict(labels=y0 - 1), 'start at 0'),
        ('train', dict(features=nan), 'row 7'),
        ('test', dict(features=nan), 'row 7'),
        ('train', dict(features=None), 'features missing'),
        ('train', dict(features=x0[:0], labels=y0[:0]), 'no rows'),
        ('train', dict(labels=y0 * 2), 'class 1 has no rows'),
        ('train', dict(features=x0[0]), '2 axes'),
        ('train', dict(labels=y0 + 0.5), 'whole numbers')])
def test_bad_feature_files(tmp_path, part, arrays, words):
    with pytest.raises(UserError, match=words):
        read_features(*bad_files(tmp_path/'bad', **{part: arrays}))


def test_truncated_file(tmp_path):
    train, test = bad_files(tmp_path)
    test.write_bytes(test.read_bytes()[:900])
    with pytest.raises(UserError, match='damaged'): check_features(test)


def test_levels_that_cannot_be(tmp_path):
    "One class only, and labels whose file names a class without rows"
    x, _ = features([60])
    for part in ('train', 'test'):
        write_features(tmp_path/'one' / f'feature_{part}.h5', [(x, torch.zeros(60, dtype=torch.int64))])
    with pytest.raises(UserError, match='two classes'):
        run(recipe('dlsa', 'one', profile='short', **TINY), tmp_path, root=tmp_path, device='cpu')
    with pytest.raises(UserError, match='No rows are left'): keep_threshold(torch.tensor([]))
    with pytest.raises(UserError, match='head_weight'):
        (
            write_features(tmp_path/'two' / 'feature_train.h5', [features([60, 30])]),
            write_features(tmp_path/'two' / 'feature_test.h5', [features([9, 9])]))
        run(
            recipe('dlsa', 'two', profile='short', **TINY | dict(head_start='stage1')),
            tmp_path,
            root=tmp_path,
            device='cpu')


def test_levels_without_test_rows():
    "No test row is kept: the head of that level decides nothing, and nothing breaks"
    x = torch.randn(6, 4)
    bank = HeadBank([LevelHead(4, 3, 7), LevelHead(4, 3, 4)])
    rows = RoutedRows(x, torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64), x, torch.zeros(6, 3))
    assert bank.decide(rows).shape == (6, 3) and bank.decide(
        RoutedRows(x[:0], rows.labels[:0], rows.level[:0], x[:0], rows.prior[:0])).shape == (0, 3)


def test_published_configurations(tmp_path):
    assert len(CONFIGS) == 12
    for name in CONFIGS:
        if name.endswith('ride'):
            with pytest.raises(UserError, match='no such head'): published_config(name)
            continue
        p = published_config(name)
        assert recipe('dlsa', p.dataset, profile='paper', **p.changes).settings.n_clusters == 500
    with pytest.raises(UserError, match='feature_train.h5'):
        run(recipe('dlsa', 'imagenet_lt', profile='paper'), tmp_path, root=tmp_path, device='cpu')
    with pytest.raises(UserError, match='Did you mean'): published_config('ImgNet_CE_R50_bms')


def test_subset_keeps_rows_together():
    x, y = features([5, 3])
    fs = FeatureSet(x, y, ('a', 'b'))
    part = fs.subset([6, 0])
    assert torch.equal(part.features, x[[6, 0]]) and part.labels.tolist() == [1, 0]


def test_densities_do_not_depend_on_the_batch():
    u, c = torch.randn(40, 8, dtype=f64), torch.randn(6, 8, dtype=f64)
    whole = component_densities(u, torch.zeros(40, dtype=f64), c)
    assert torch.allclose(torch.cat([component_densities(v[None], torch.zeros(1, dtype=f64), c) for v in u]), whole)
