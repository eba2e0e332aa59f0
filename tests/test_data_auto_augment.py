"AutoAugment against torchvision, operation by operation and as a whole; its distribution; and its place in the view"
import numpy as np, pytest, torch
import torchvision.transforms.functional as TF
from PIL import Image
from hypothesis import given, settings, strategies as st
from torchvision.transforms import AutoAugment as TorchvisionAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from ltbook.data.augment import crop_flip, pad_images, rotate
from ltbook.data.auto_augment import (
    POLICY, AutoAugment, affine_row, autocontrast_table, blend, equalize_table, magnitudes, points, warp)
from ltbook.data.checks import UserError
from ltbook.data.stores import ImageSet
from ltbook.data.views import Augmentation, TrainView

def pictures(side=32, channels=3, seed=0):
    "Noise, narrow noise, a ramp, few values, one value, black and white."
    r = np.random.default_rng(seed)
    noise, ramp = (
        r.integers(0, 256, (3, side, side, channels)),
        np.linspace(0, 255, side)[:, None, None] + np.zeros((side, side, channels)))
    kinds = [
        *noise,
        noise[0] // 9 + 100,
        ramp * [1, 0.5, 0.2][:channels],
        noise[1] // 100 * 70,
        np.full_like(ramp, 77),
        np.zeros_like(ramp),
        np.full_like(ramp, 255),
        noise[2] // 250 * 255]
    return torch.from_numpy(np.stack(kinds).astype(np.uint8)).permute(0, 3, 1, 2)

def one(image, name, m): return _apply_op(image, name, m, InterpolationMode.NEAREST, None)
def to_pil(image):
    return Image.fromarray(
        image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
def by_pil(image, name, m):
    return (
        torch.from_numpy(np.array(one(to_pil(image), name, m)))
        .view(*image.shape[1:], len(image))
        .permute(2, 0, 1))
SHAPES = [(32, 3), (32, 1), (8, 1), (9, 3), (40, 3)]

@pytest.mark.parametrize('side,channels', SHAPES)
def test_every_move_is_torchvisions_to_the_bit_and_pils_to_a_level(side, channels):
    auto, x = AutoAugment(side, channels), pictures(side, channels)
    for k, (name, m) in enumerate(auto.moves):
        steps = torch.zeros(2, len(x), dtype=torch.int64); steps[k % 2] = k
        got = auto(x, steps)
        assert torch.equal(got, torch.stack([one(im, name, m) for im in x])), (name, m)
        if side % 2 == 0:
            assert (got.int() - torch.stack([by_pil(im, name, m) for im in x]).int()).abs().max() <= 1, (
                name,
                m)

@given(
    degrees=st.floats(-180, 180),
    shear=st.floats(-0.3, 0.3),
    dx=st.integers(-40, 40),
    dy=st.integers(-40, 40),
    side=st.integers(3, 40))
@settings(deadline=None, max_examples=60)
def test_geometry_with_any_magnitude(degrees, shear, dx, dy, side):
    "Equal to the bit, but for pixels that come from the middle between two"
    x, u = pictures(side)[:1], np.arange(side) - (side - 1)/2
    for name, m in [('Rotate', degrees), ('ShearY', shear), ('TranslateX', dx), ('TranslateY', dy)]:
        row = affine_row(name, m, side)
        got, want = warp(x, torch.tensor([row]))[0], one(x[0], name, m)
        places = [row[k]*u + row[k + 1]*u[:, None] + row[k + 2] + (side - 1)/2 for k in (0, 3)]
        tie = sum(abs(p - np.floor(p) - .5) < 1e-4 for p in places) > 0
        assert not ((got != want).any(0).numpy() & ~tie).any() and not ('Translate' in name and tie.any()), (name, m)

@given(seed=st.integers(0, 10_000), side=st.integers(3, 40), few=st.integers(1, 256), low=st.integers(0, 255))
@settings(deadline=None, max_examples=60)
def test_histogram_operations_on_any_image(seed, side, few, low):
    x = torch.from_numpy(
        np.random.default_rng(seed).integers(low, min(low + few, 256), (3, 1, side, side), dtype=np.uint8))
    table = torch.zeros(3, 256, dtype=torch.uint8)
    assert torch.equal(points(x, table, torch.tensor([1, 1, 1])), torch.stack([TF.autocontrast(i) for i in x]))
    assert torch.equal(points(x, table, torch.tensor([2, 2, 2])), torch.stack([TF.equalize(i) for i in x]))
    assert torch.equal(points(x, table, torch.tensor([2, 0, 1]))[1], torch.zeros_like(x[1]))

@given(m=st.floats(-1, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_blends_with_any_factor(m, seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 12, 12), dtype=np.uint8))
    for k, name in enumerate(['Brightness', 'Color', 'Contrast', 'Sharpness']):
        weights = torch.zeros(1, 4); weights[0, k] = -m; weights[0, 0] = 1 + m
        assert (blend(x, weights)[0].int() - one(x[0], name, m).int()).abs().max() <= 1, name

def test_tables_are_whole_and_monotone():
    count = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (20, 256)).astype(np.int32))
    for f in (autocontrast_table, equalize_table):
        t = f(count)
        assert torch.equal(t, t.floor()) and (t.diff(dim=1) >= 0).all() and t.amin() == 0 and t.amax() == 255

class Replay(TorchvisionAugment):
    def get_params(self, n): return self.drawn

@pytest.mark.parametrize('side,channels', SHAPES[:3])
def test_the_policy_as_torchvision_carries_it_out(side, channels):
    auto, replay, n = AutoAugment(side, channels), Replay(AutoAugmentPolicy.CIFAR10), 250
    x = pictures(side, channels, 1)[torch.arange(n) % 10]
    r = np.random.default_rng(7)
    which, lucky, sign = r.integers(25, size=n), r.random((2, n)), r.integers(2, size=(2, n))
    got = auto(x, torch.from_numpy(auto.draw(n, np.random.default_rng(7))))
    for i, im in enumerate(x):
        replay.drawn = int(which[i]), torch.from_numpy(lucky[:, i]), torch.from_numpy(sign[:, i])
        assert torch.equal(replay(im), got[i]), POLICY[which[i]]

def test_a_batch_is_its_images_one_by_one_in_any_memory_and_order():
    auto, x = AutoAugment(32), pictures().repeat(4, 1, 1, 1)
    before, steps = x.clone(), torch.from_numpy(auto.draw(40, np.random.default_rng(0)))
    got = auto(x, steps)
    assert torch.equal(got, torch.cat([auto(x[i:i + 1], steps[:, i:i + 1]) for i in range(40)]))
    back = torch.arange(39, -1, -1)
    assert torch.equal(auto(x[back], steps[:, back]), got[back])
    for memory in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(auto(x.contiguous(memory_format=memory), steps), got)
    assert torch.equal(x, before) and got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
    assert auto(x[:0], steps[:, :0]).shape == (0, 3, 32, 32)

def test_without_picking_images_the_result_is_the_same():
    "What a GPU does: every image through every family."
    auto, x = AutoAugment(32), pictures().repeat(4, 1, 1, 1)
    steps = torch.from_numpy(auto.draw(40, np.random.default_rng(2)))
    want, y = auto(x, steps), x
    for move in steps:
        for act, _, tables in auto.families: y = act(y, *(t[move] for t in tables))
    assert torch.equal(y, want)

def test_sub_policies_probabilities_and_signs_have_the_right_distribution():
    auto, n = AutoAugment(32), 100_000
    steps = auto.draw(n, np.random.default_rng(3))
    grid, want = magnitudes(32), [{}, {}]
    for pair in POLICY:
        for slot, (name, p, level) in zip(want, pair):
            m = 0. if level is None else grid[name][level]
            signs = (1,) if m == 0 or name in ('Posterize', 'Solarize') else (-1, 1)
            for sign in signs: slot[name, sign*m] = slot.get((name, sign*m), 0) + p/25/len(signs)
    for row, slot in zip(steps, want):
        got = np.bincount(row, minlength=len(auto.moves))/n
        for k, move in enumerate(auto.moves[1:], 1):
            p = slot.get(move, 0.)
            assert abs(got[k] - p) <= 5*(p*(1 - p)/n)**.5, move  # 5 sd; exactly 0 where it must be
        assert abs(got[0] - (1 - sum(slot.values()))) < .01
    turn, shift = (auto.moves.index((name, m)) for name, m in [('Rotate', grid['Rotate'][2]), ('TranslateX', 14.)])
    both = ((steps[0] == turn) & (steps[1] == shift)).mean()
    assert abs(both - .7*.3/4/25) < 5*(.0021/n)**.5  # the two operations and signs of a sub-policy are independent

def test_images_are_drawn_on_their_own_and_only_by_the_given_generator():
    auto = AutoAugment(32)
    a, b, c = (auto.draw(1000, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and a.dtype == np.int64
    assert abs(np.corrcoef(a[0, :-1], a[0, 1:])[0, 1]) < .16  # neighbours in a batch; 5 sd
    moved = (a[0, :-1] > 0) & (a[0, 1:] > 0)
    assert abs(moved.mean() - (a[0] > 0).mean()**2) < .08

@pytest.mark.parametrize('side,channels', [(32, 4), (2, 3), (32, 2)])
def test_other_images_are_refused(side, channels):
    with pytest.raises(UserError, match='switch it off'): AutoAugment(side, channels)

def test_a_view_of_too_small_images_is_refused():
    data = ImageSet(torch.zeros(2, 2, 2, 1, dtype=torch.uint8), torch.arange(2), ('a', 'b'))
    with pytest.raises(UserError, match='at least 3 pixels'): TrainView(data, Augmentation(auto_augment=True))

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
def some(n=40):
    images = pictures().repeat(n//10, 1, 1, 1).permute(0, 2, 3, 1)
    return ImageSet(images, torch.arange(n) % 5, tuple('abcde'), mean=MEAN, std=STD)

@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(cutout_side=16, pad_mode='reflect+constant'),
        dict(mixup_alpha=0.5),
        dict(rotation=15.0, cutout_side=8)])
def test_the_view_draws_the_rest_as_without_and_stays_as_it_was(options):
    plain, auto = (TrainView(some(), Augmentation(4, True, auto_augment=a, **options)) for a in (False, True))
    index, r, s = np.arange(40), np.random.default_rng(1), np.random.default_rng(1)
    first, second = plain.plan(index, r), auto.plan(index, s)
    a, b = first['rows'], second['rows']
    assert torch.equal(a, b[:-2]) and torch.equal(first['lam'], second['lam']) and len(b) == len(a) + 2
    # and nothing else was drawn
    assert (np.array_equal(auto.auto.draw(40, r), b[-2:].numpy()) and r.bit_generator.state == s.bit_generator.state)

def test_the_view_augments_after_the_crop_and_before_the_cutout():
    wanted = Augmentation(4, True, cutout_side=16, pad_mode='reflect+constant', rotation=15., auto_augment=True)
    view, index = TrainView(some(), wanted), np.arange(40)
    plan = view.plan(index, np.random.default_rng(4))['rows']
    padded = pad_images(some().images, 4, 'reflect+constant')
    got = view(index, np.random.default_rng(4))['x']
    x = rotate(crop_flip(padded, torch.arange(40), plan[0], plan[1], plan[2].bool(), (32, 32)), plan[6]/1000)
    for i, (im, moves) in enumerate(zip(x, plan[-2:].T.tolist())):
        for k in moves: im = one(im, *view.auto.moves[k])
        top, left, fill = int(plan[3, i]), int(plan[4, i]), int(im.double().mean())
        im[:, max(top, 0):top + 16, max(left, 0):left + 16] = fill
        assert -8 <= min(top, left) and max(top, left) <= 15
        assert torch.allclose(got[i], TF.normalize(im.float()/255, MEAN, STD), atol=5e-6)


@pytest.mark.parametrize('channels', [1, 3])
def test_all_images_or_those_concerned(channels):
    "The form for a GPU, where every operation is done to all images, gives the same bytes"
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (600, channels, 12, 12), dtype=np.uint8))
    dense, sparse = (AutoAugment(12, channels, dense=d) for d in (True, False))
    steps = torch.from_numpy(dense.draw(600, rng))
    assert (
        len(set(steps.flatten().tolist())) > 30
        and torch.equal(dense(x, steps), sparse(x, steps))
        and not torch.equal(dense(x, steps), x))
    assert not AutoAugment(12, channels).dense
