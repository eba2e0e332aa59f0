("Class-Balanced Experts: parts, splits, fusion, calibration, logit files, "
 "and whole runs, against loops and in spite of bad input")
import dataclasses
import itertools
import warnings

import h5py
import numpy as np
import pytest
import torch

import ltbook.methods.method as method_module
from ltbook.data.checks import UserError
from ltbook.data.images import load_images
from ltbook.data.parts import (
    class_splits, expert_part, expert_positions, held_out_counts, hold_out, open_count, reserve)
from ltbook.data.profile import long_tail
from ltbook.methods.class_balanced_experts import train_only
from ltbook.models.fusion import JointCalibration, fuse, reject_shift
from ltbook.models.resnet_cifar import ResNet32
from ltbook.runs.folder import load_run
from ltbook.studies.fusion import Logits, export_logits, fuse_logits, read_logits, run_members, write_logits
from ltbook.methods.recipe import Recipe, recipe
from ltbook.runs.run import run

WHO = [np.array([0, 3]), np.array([1, 4]), np.array([2])]


def slow_fusion(logits, classes, C):
    "Probabilities, one image and one expert at a time"
    out = np.zeros((len(logits[0]), C))
    for i in range(len(out)):
        for z, ids in zip(logits, classes):
            e = np.exp(np.asarray(z[i], dtype=np.float64) - max(z[i].tolist()))
            for j, c in enumerate(ids): out[i, c] = e[j]/e.sum()
        out[i] /= out[i].sum()
    return out


# parts

@pytest.mark.parametrize('C,imbalance', [(100, 100), (100, 50), (10, 100)])
def test_parts_are_disjoint_and_of_the_right_size(C, imbalance):
    y = np.random.default_rng(3).permutation(np.repeat(np.arange(C), 50000//C))
    usual = long_tail(y, imbalance)
    kept, held = hold_out(y[usual.indices], held_out_counts(usual.counts), 0)
    assert sorted([*kept, *held]) == list(range(len(usual)))
    assert (np.bincount(y[usual.indices][held], minlength=C) == held_out_counts(usual.counts)).all()
    tail, aside = reserve(y, imbalance)
    assert (
        not set(tail.indices) & set(aside)
        and set(tail.indices) <= set(usual.indices)
        and np.bincount(y[aside]).tolist() == [20] * C)
    if (C, imbalance) == (100, 100): assert (len(kept), len(held), len(tail), len(aside)) == (10022, 825, 10827, 2000)


def test_splits_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.choice([5, 19, 20, 21, 50, 99, 100, 101, 300], 30)
        for inclusive in (True, False):
            want = {'many': [], 'medium': [], 'few': []}
            for c, k in enumerate(n):
                want['many' if k > 100 or (inclusive and k == 100) else 'few' if k < 20 else 'medium'].append(c)
            if all(want.values()):
                assert {k: v.tolist() for k, v in class_splits(n, many_inclusive=inclusive).items()} == want
        parts = list(class_splits(n, 'quantile', n_experts=4).values())
        assert [len(p) for p in parts] == [8, 8, 7, 7] and sorted(np.concatenate(parts)) == list(range(30))
        assert all(n[a].min() >= n[b].max() for a, b in itertools.pairwise(parts))


def test_open_images_follow_the_pool():
    "Uniform over images, not over classes; never the expert's own; the last label"
    y = np.repeat(np.arange(4), [600, 300, 60, 40])
    drawn = np.zeros(4)
    for seed in range(200): drawn += np.bincount(y[expert_positions(y, np.array([2]), 2, seed)[1]], minlength=4)
    assert drawn[2] == 0 and np.allclose(drawn/drawn.sum(), np.array([600, 300, 0, 40])/940, atol=.02)
    digits = load_images('digits').train
    part = expert_part(digits, np.array([3, 8]), 4)
    assert (
        part.counts[:2].tolist() == digits.counts[[3, 8]].tolist()
        and part.counts[2] == digits.counts[[3, 8]].sum() // 4)
    threes = part.images[part.labels == 0]
    assert torch.equal(threes, digits.images[digits.labels == 3])


def test_pool_smaller_than_wanted_warns():
    with pytest.warns(UserWarning, match='all of them'): assert open_count(100, 7, 1, 4) == 7
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_count(100, 100, 1, 4) == 100


# fusion

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_fusion_against_a_loop(dtype):
    g = torch.Generator().manual_seed(1)
    z = [4*torch.randn(40, len(c) + 1, generator=g, dtype=dtype) for c in WHO]
    assert np.allclose(fuse(z, WHO).exp(), slow_fusion(z, WHO, 5), atol=1e-6)
    net = JointCalibration(WHO, 5, (16, 8, 8)).to(dtype)
    with torch.no_grad(): net.scale.uniform_(.5, 2, generator=g); net.bias.normal_(generator=g)
    shift, t, b = [torch.split(v.detach(), net.widths) for v in (net.shift, net.scale, net.bias)]
    by_hand = [ti*(zi + si) + bi for ti, zi, si, bi in zip(t, z, shift, b)]
    assert np.allclose(net(torch.cat(z, 1)).detach().exp(), slow_fusion(by_hand, WHO, 5), atol=1e-6)
    assert [round(s[-1].item(), 5) for s in shift] == [round(reject_shift(r), 5) for r in (16, 8, 8)]


@pytest.mark.parametrize('tied', [True, False])
def test_gradients(tied):
    g = torch.Generator().manual_seed(0)
    net = JointCalibration([*WHO, None], 5, (16, 8, 8, 1), tied).double()
    z = torch.randn(3, 13, generator=g, dtype=torch.float64, requires_grad=True)
    names, start = zip(*net.named_parameters())
    def f(z, *p): return torch.func.functional_call(net, dict(zip(names, p)), (z,))
    assert torch.autograd.gradcheck(f, (z, *start))


def test_permuting_classes_permutes_the_posterior():
    g = torch.Generator().manual_seed(2)
    z, perm = [torch.randn(9, len(c) + 1, generator=g) for c in WHO], np.array([3, 0, 4, 1, 2])
    assert torch.allclose(fuse(z, [perm[c] for c in WHO])[:, perm], fuse(z, WHO), atol=1e-6)


def test_an_expert_that_rejects_contributes_nothing():
    z = [torch.tensor([[1., 2, 0]]), torch.tensor([[5., 5, 60]]), torch.tensor([[0., 60]])]
    assert torch.allclose(fuse(z, WHO)[0, [0, 3]].exp(), torch.tensor([1., 2]).softmax(0), atol=1e-6)


# files

@pytest.fixture
def three():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 5
    return [
        Logits(f'e{i}', torch.randn(30, len(c) + 1, generator=g), y, np.isin(np.arange(5), c))
        for i, c in enumerate(WHO)]


def test_files_round_trip_and_a_member_from_elsewhere(three, tmp_path):
    files = [write_logits(tmp_path/f'{m.name}.h5', m) for m in three]
    with h5py.File(tmp_path/'theirs.h5', 'w') as f:          # float64, 0/1 mask, int32 labels, no name
        f['logits'], f['labels'], f['class_mask'] = (
            np.random.default_rng(0).normal(size=(30, 5)),
            (np.arange(30) % 5).astype('i4'),
            np.ones(5, 'u1'))
    members = [*map(read_logits, files), read_logits(tmp_path/'theirs.h5')]
    fused = fuse_logits(members, members, epochs=3)
    assert (
        fused.log_p.shape == (30, 5)
        and torch.allclose(fused.log_p.exp().sum(1), torch.ones(30))
        and members[-1].name == 'theirs')
    assert torch.allclose(fuse_logits(three).log_p, fuse([m.logits for m in three], WHO))


def damage(path, **arrays):
    with h5py.File(path, 'a') as f:
        for k, v in arrays.items():
            del f[k]
            if v is not None: f[k] = v


@pytest.mark.parametrize(
    'arrays,word',
    [
        (dict(logits=np.full((30, 3), np.nan)), 'NaN'),
        (dict(logits=np.zeros((30, 4))), 'shape'),
        (dict(logits=np.zeros((29, 3))), '29 rows'),
        (dict(labels=None), 'no labels'),
        (dict(labels=np.full(30, 7)), 'reach'),
        (dict(class_mask=np.zeros(5, bool)), 'no class'),
        (dict(class_mask=np.array([1, 1, 1, 0, 0], bool)), 'shape')])
def test_damaged_files_say_what_is_wrong(three, tmp_path, arrays, word):
    path = write_logits(tmp_path/'e.h5', three[0])
    damage(path, **arrays)
    with pytest.raises(UserError, match=word):
        read_logits(path)


def test_members_that_do_not_belong_together(three):
    other = dataclasses.replace(three[2], labels=three[2].labels.roll(1))
    wide = Logits('wide', torch.randn(30, 6), three[0].labels, np.ones(6, bool))
    mute = dataclasses.replace(three[0], logits=three[0].logits + torch.tensor([0., 0, 99]))
    for members, word in (
        ([mute, *three[1:]], 'rejects all'),
        (three[:2], 'expert is missing'),
        ([*three, three[1]], 'More than one'),
        ([*three[:2], other], 'other labels'),
        ([*three, wide], '6 classes'),
        ([], 'nothing')):
        with pytest.raises(UserError, match=word):
            fuse_logits(members)
    with pytest.raises(UserError, match='other members'): fuse_logits(three, three[:2])


# whole runs

TINY = dict(profile='smoke', max_steps=2, expert_epochs=(2, 2, 2), calibration_epochs=3)


class Killed(Exception): pass


def killer(stage, epoch):
    def report(row):
        if (row['stage'], row['epoch']) == (stage, epoch): raise Killed
    return report


def same(a, b):
    pa, pb = load_run(a).predictions, load_run(b).predictions
    return pa.keys() == pb.keys() and all(np.array_equal(pa[k], pb[k]) for k in pa)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return {
        p: run(recipe('class_balanced_experts', protocol=p, **TINY), tmp_path_factory.mktemp(p)) for p in 'HV'}


@pytest.mark.parametrize(
    'protocol,stage,epoch',
    [('H', 'expert2', 0), ('H', 'calibrated', 1), ('V', 'expert1', 0), ('V', 'expert3', 1)])
def test_killed_and_resumed_is_the_same(whole, tmp_path, protocol, stage, epoch):
    r = recipe('class_balanced_experts', protocol=protocol, **TINY)
    with pytest.raises(Killed):
        run(r, tmp_path, report=killer(stage, epoch))
    assert same(run(r, tmp_path), whole[protocol])


def test_run_says_its_protocol(whole):
    h, v = (load_run(whole[p]) for p in 'HV')
    assert [(r.metrics['protocol']['validation'], r.metrics['protocol']['selection']) for r in (h, v)] == [
        ('H', 'last'),
        ('V', 'best_on_val')]
    assert (
        h.stages == ['generalist', 'fused_raw', 'fused', 'calibrated']
        and h.metrics['final']['stage'] == 'calibrated')
    # of the long tail before images were held out
    assert h.predictions['train_counts'].tolist() == long_tail(load_images('digits').train.labels, 20).counts.tolist()
    assert Recipe(**h.recipe.model_dump()) == h.recipe
    assert 'val_score' in v.history and 'val_score' not in h.history


def test_test_labels_choose_nothing(whole, tmp_path, monkeypatch):
    "With other test labels, every stored logit is the same"
    data = load_images('digits')
    other = dataclasses.replace(data, test=dataclasses.replace(data.test, labels=data.test.labels.roll(7)))
    monkeypatch.setattr(method_module, 'load_images', lambda *a: other)
    a, b = (
        load_run(p).predictions
        for p in (run(recipe('class_balanced_experts', protocol='V', **TINY), tmp_path), whole['V']))
    assert not np.array_equal(a['labels'], b['labels']) and all(np.array_equal(a[k], b[k]) for k in a if k != 'labels')


def test_two_experts_and_the_generalist(tmp_path):
    r = load_run(
        run(
            recipe('class_balanced_experts', splits=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]], extended=True, **TINY),
            tmp_path))
    assert (
        r.metrics['final']['stage'] == 'extended'
        and not (r.path/'expert3.safetensors').exists()
        and len(run_members(r)) == 2)
    files = export_logits(r, tmp_path/'logits')
    assert sorted(p.name for p in files) == [
        f'{p}-{n}.h5' for p in ('test', 'val') for n in ('expert1', 'expert2', 'generalist')]


@pytest.mark.parametrize(
    'changes,word',
    [
        (dict(splits='thresholds', low=1), 'quantile'),
        (dict(ratios=(4, 2, 500)), 'at most'),
        (dict(learnable=(-1, 6, 1)), 'learnable'),
        (dict(splits=[[0, 1], [2]]), 'exactly once'),
        (dict(imbalance=120.0), 'one has to be held out'),
        (dict(protocol='X'), 'protocol')])
def test_mistakes_show_before_training(tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        run(
            recipe('class_balanced_experts', **TINY | changes),
            tmp_path,
            report=lambda row: pytest.fail('trained'))


def test_depths_freeze_what_they_say():
    for n, first in ((1, 'head'), (3, 'groups.2'), (4, 'groups.1'), (5, 'groups.0'), (-1, 'stem')):
        names = [k for k, p in train_only(ResNet32(4), n).named_parameters() if p.requires_grad]
        assert names[0].startswith(first) and names[-1].startswith('head')
    with pytest.warns(UserWarning): train_only(ResNet32(4), 2)


@pytest.mark.parametrize('sizes, expected', [((391, 473, 136), 35.78), ((132, 162, 71), 34.3151), ((35, 35, 30), 32.5)])
def test_all_is_the_class_weighted_mean_of_the_groups(sizes, expected):
    "Groups at 50, 30 and 15 % on ImageNet-LT, Places-LT and CIFAR-100-LT"
    from ltbook.measure.accuracy import shot_accuracy
    per_class = np.repeat([.50, .30, .15], sizes)
    groups = dict(zip(('many', 'medium', 'few'), np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])))
    shots = shot_accuracy(per_class, groups)
    assert [shots[g] for g in groups] == pytest.approx([.50, .30, .15])
    assert (
        100 * sum(len(ids) * shots[g] for g, ids in groups.items()) / sum(sizes)
        == pytest.approx(expected, abs=1e-4)
        == pytest.approx(100 * per_class.mean(), abs=1e-4))
