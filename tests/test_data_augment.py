"Augmentation against torchvision and plain loops, image by image; its distribution; and its speed"
import time
from dataclasses import replace
import numpy as np, pytest, torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from ltbook.data.augment import crop_flip, cutout, mixup, normalize, pad_images
from ltbook.data.checks import UserError
from ltbook.data.images import data_root, load_images
from ltbook.data.stores import ImageSet
from ltbook.data.views import Augmentation, PlainView, TrainView

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
def some(n=20, side=32, channels=3, seed=0, more=0):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, side, side + more, channels), dtype=np.uint8))
    return ImageSet(x, torch.arange(n) % 5, tuple('abcde'), mean=MEAN[:channels], std=STD[:channels])

def nchw(data): return data.images.permute(0, 3, 1, 2)

def by_torchvision(image, pad, mode, top, left, flip, size):
    image = image.permute(2, 0, 1)
    for m in mode.split('+'): image = TF.pad(image, [pad], padding_mode=m)
    image = TF.crop(image, top, left, *size)
    return TF.hflip(image) if flip else image

@given(
    side=st.integers(3, 12),
    more=st.integers(0, 3),
    channels=st.sampled_from([1, 3]),
    pad=st.integers(0, 2),
    mode=st.sampled_from(['constant', 'reflect', 'reflect+constant']),
    b=st.integers(1, 9),
    seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_crop_and_flip_pixel_for_pixel(side, more, channels, pad, mode, b, seed):
    r, data = np.random.default_rng(seed), some(7, side, channels, seed, more)
    padded = pad_images(data.images, pad, mode)
    room = padded.shape[1] - side
    index, top, left, flip = (
        r.integers(7, size=b),
        r.integers(room + 1, size=b),
        r.integers(room + 1, size=b),
        r.random(b) < 0.5)
    got = crop_flip(padded, *map(torch.from_numpy, (index, top, left, flip)), (side, side + more))
    for g, i, t, l, f in zip(got, index, top, left, flip):
        assert torch.equal(g, by_torchvision(data.images[i], pad, mode, int(t), int(l), f, (side, side + more)))
    assert got.dtype == torch.uint8 and got.permute(0, 2, 3, 1).is_contiguous()

@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('channels', [1, 3])
def test_normalize_as_torchvision(channels, memory):
    x = nchw(some(channels=channels)).contiguous(memory_format=memory)
    before = x.clone()
    want = torch.stack([TF.normalize(i.float() / 255, MEAN[:channels], STD[:channels]) for i in x])
    got = normalize(x, MEAN[:channels], STD[:channels])
    assert (
        torch.allclose(got, want, atol=2e-6)
        and got.is_contiguous(memory_format=torch.channels_last)
        and torch.equal(x, before))
    assert torch.equal(got, normalize(x, torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])))

def test_normalize_does_not_write_into_float_images():
    x = torch.full((2, 3, 4, 4), 51.).contiguous(memory_format=torch.channels_last)
    normalize(x, MEAN, STD)
    assert (x == 51).all()

@given(lam=st.floats(0, 1), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_mixup_by_hand(lam, seed):
    g = torch.Generator().manual_seed(seed)
    x, y, p = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64), torch.arange(6), torch.randperm(6, generator=g)
    mixed, own, other = mixup(x, y, lam, p)
    for i in range(6):
        assert (
            torch.allclose(mixed[i], lam * x[i] + (1 - lam) * x[p[i]], atol=1e-12)
            and own[i] == i
            and other[i] == p[i])

@given(side=st.integers(1, 9), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_cutout_by_loops(side, seed):
    r = np.random.default_rng(seed)
    x, top, left = torch.rand(4, 2, 7, 7), r.integers(-9, 9, 4), r.integers(-9, 9, 4)
    fill = torch.arange(4.).view(4, 1, 1, 1) + 5
    got, want = cutout(x, torch.from_numpy(top), torch.from_numpy(left), side, fill), x.clone()
    for b in range(4):
        for i in range(7):
            for j in range(7):
                if top[b] <= i < top[b] + side and left[b] <= j < left[b] + side: want[b, :, i, j] = b + 5
    assert torch.equal(got, want)

def test_view_is_its_plan_carried_out_by_hand():
    data, index = some(), np.array([3, 3, 19, 0, 7, 11])
    view = TrainView(data, Augmentation(4, True, mixup_alpha=.4, cutout_side=16, pad_mode='reflect'))
    planned, batch = view.plan(index, np.random.default_rng(5)), view(index, np.random.default_rng(5))
    plan, lam = planned['rows'], planned['lam']
    rows = []
    for i, (t, l, f, ct, cl, _) in zip(index, plan.T.tolist()):
        im = by_torchvision(data.images[i], 4, 'reflect', t, l, f, (32, 32))
        fill = int(im.double().mean())
        im[:, max(ct, 0):max(ct + 16, 0), max(cl, 0):max(cl + 16, 0)] = fill
        rows.append(TF.normalize(im.float() / 255, MEAN, STD))
    x = torch.stack(rows)
    assert torch.allclose(batch['x'], lam * x + (1 - lam) * x[plan[5]], atol=5e-6)
    assert (
        planned['index'].tolist() == index.tolist()
        and sorted(plan[5].tolist()) == list(range(6))
        and batch['lam'] == lam
        and batch['lam'].ndim == 0)
    assert torch.equal(batch['y'], data.labels[index]) and torch.equal(batch['y_mix'], data.labels[index][plan[5]])
    assert batch['x'].is_contiguous(memory_format=torch.channels_last) and batch['x'].dtype == torch.float32

def chi2(counts): return ((counts - counts.mean()) ** 2 / counts.mean()).sum()

def test_offsets_flips_corners_and_lambda_have_the_right_distribution():
    n = 40_000
    view = TrainView(some(), Augmentation(4, True, cutout_side=16))
    plan = view.plan(np.zeros(n, dtype=np.int64), np.random.default_rng(1))['rows'].numpy()
    both = np.bincount(plan[0] * 9 + plan[1], minlength=81)
    assert len(both) == 81 and chi2(both) < 150  # 80 degrees of freedom: mean 80, sd 12.6
    assert abs(plan[2].mean() - .5) < .0125 and set(plan[2]) == {0, 1}  # 5 sd
    # 23 degrees of freedom
    for row in plan[3:5]: assert (row.min(), row.max()) == (-8, 15) and chi2(np.bincount(row + 8)) < 60
    r = np.random.default_rng(0)
    lams = np.array([TrainView(some(), Augmentation(mixup_alpha=1.)).plan(np.arange(2), r)['lam'] for _ in range(800)])
    # Beta(1, 1), not folded
    assert abs(lams.mean() - .5) < .05 and (lams < .5).mean() > .4 and abs(lams.std() - 12 ** -.5) < .03

def test_far_wandering_crops_of_double_padding():
    view = TrainView(some(), Augmentation(4, True, pad_mode='reflect+constant'))
    plan = view.plan(np.zeros(3000, dtype=np.int64), np.random.default_rng(0))['rows']
    padded = pad_images(some().images, 4, 'reflect+constant')
    assert padded.shape == (20, 48, 48, 3) and (plan[0].min(), plan[0].max()) == (0, 16) and (padded[:, 3] == 0).all()

def test_options_that_are_off_draw_nothing():
    view = TrainView(some())
    plan = view.plan(np.arange(5), np.random.default_rng(0))
    assert (
        plan['rows'].sum() == 0
        and plan['lam'] == 1
        and view(np.arange(5), np.random.default_rng(0)).keys() == {'x', 'y'})

def test_chance_comes_only_from_the_given_generator():
    view, index = TrainView(some(), Augmentation(4, True, mixup_alpha=1., cutout_side=8, jitter=.3)), np.arange(20)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    a, b, c = (view(index, np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['x'], c['x'])
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.get_rng_state())

def test_views_keep_the_images_and_do_not_depend_on_where_they_lie():
    data = some()
    before = data.images.clone()
    order = torch.randperm(20)
    spread = replace(data, store=data.store[order], at=order.argsort())
    for v in (lambda d: TrainView(d, Augmentation(4, True, mixup_alpha=1.)), PlainView):
        a, b = (v(d)(np.arange(9), np.random.default_rng(0)) for d in (data, spread))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(data.images, before)

def test_plain_view_is_normalisation_only():
    data, index = some(), np.array([4, 0, 4])
    got = PlainView(data)(index)
    assert torch.equal(got['x'], normalize(nchw(data)[index], MEAN, STD)) and torch.equal(got['y'], data.labels[index])

@pytest.mark.parametrize('channels', [1, 3])
def test_jitter_as_torchvision(channels):
    "One after the other, with the factors of the plan"
    data, index = some(12, 9, channels), np.arange(12)
    view = TrainView(data, Augmentation(jitter=.6))
    factors, got = (
        view.plan(index, np.random.default_rng(2))['rows'][6:9] / 1000,
        view(index, np.random.default_rng(2))['x'])
    assert .4 <= factors.min() < .6 and 1.4 < factors.max() <= 1.6 and abs(factors.mean() - 1) < .2
    for x, image, (b, c, s) in zip(got, nchw(data), factors.T.tolist()):
        want = TF.adjust_contrast(TF.adjust_brightness(image.float() / 255, b), c)
        if channels == 3: want = TF.adjust_saturation(want, s)
        mean, std = (torch.tensor(v[:channels]).view(-1, 1, 1) for v in (MEAN, STD))
        assert (x*std + mean - want).abs().max() < .51 / 255 + 1e-4

def test_wide_images_with_everything():
    "A view of images that are not square: every option at its own edge"
    data, index = some(9, 12, more=7), np.arange(9)
    view = TrainView(data, Augmentation(3, True, 'reflect+constant', 15., .2, cutout_side=12, mixup_alpha=1.))
    assert view(index, np.random.default_rng(0))['x'].shape == (9, 3, 12, 19)
    corners = TrainView(data, Augmentation(cutout_side=6)).plan(np.zeros(4000, int), np.random.default_rng(0))[
        'rows'][3:5]
    assert corners.min() == -3 and corners.max(1).values.tolist() == [5, 12]
    view.side = 6
    assert view(index, np.random.default_rng(0))['x'].shape == (9, 3, 6, 9)
    with pytest.raises(UserError, match='square'): TrainView(data, Augmentation(auto_augment=True))

def test_positions_outside_are_an_error():
    for v in (TrainView(some(), Augmentation(4, True)), PlainView(some())):
        with pytest.raises(IndexError): v(np.array([20]), np.random.default_rng(0))

@pytest.mark.parametrize(
    'kw',
    [
        dict(pad=-1),
        dict(pad=32, pad_mode='reflect'),
        dict(pad_mode='zeros'),
        dict(mixup_alpha=-0.1),
        dict(cutout_side=33),
        dict(cutout_side=-1),
        dict(jitter=1.5),
        dict(rotation=181.0)])
def test_impossible_views_are_refused(kw):
    with pytest.raises(UserError):
        TrainView(some(), Augmentation(**{'pad': 4, 'flip': True, **kw}))

def test_one_core_makes_25000_cifar_images_a_second():
    if not (data_root()/'cifar100.h5').is_file(): pytest.skip('cifar100.h5 is not in the data folder (LTBOOK_DATA)')
    d, threads, rng = load_images('cifar100'), torch.get_num_threads(), np.random.default_rng(0)
    view, best = TrainView(d.train.subset(rng.permutation(50000)[:10847]), Augmentation(d.pad, d.flip)), 0
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            steps = rng.permutation(10847)[:40 * 128].reshape(40, 128)
            begin = time.perf_counter()
            for index in steps: view(index, rng)
            best = max(best, steps.size / (time.perf_counter() - begin))
    finally: torch.set_num_threads(threads)
    assert best >= 25_000, f'{best:,.0f} images/s'
