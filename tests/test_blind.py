"Test labels choose nothing, held-out runs never see the test part, parts are disjoint: for every method there is"
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ltbook.data.features import write_features
from ltbook.data.images import load_images
from ltbook.data.stores import ImageSet, write_h5
from ltbook.methods.method import get_method, methods, recipe_data
from ltbook.methods.recipe import recipe
from ltbook.runs.folder import load_run
from ltbook.runs.run import run

COUNTS = [120, 60, 40, 30]
# whatever looks at images while it trains or chooses between epochs
SMALL = dict(cutout_side=4, n_meta=6)
FEW = dict(splits='quantile', ratios=(2, 2, 2))
CHANGES = dict(difficulty_net=[dict(select='val', meta_val_split=3, **SMALL), dict(meta_grad='none', **SMALL)],
               reweighting=[dict(weights='cdb', **SMALL)],
               class_balanced_experts=[dict(protocol='H', **FEW), dict(protocol='V', **FEW)],
               mislas=[dict(test_every=1)], balanced_softmax=[dict(average='ema', test_every=1), dict(sam_rho=.05)])
CASES = [(m, c) for m in methods() for c in CHANGES.get(m, [{}])]


def pictures(counts, seed):
    "Images of which no two are the same"
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    x = torch.from_numpy(rng.integers(0, 256, (len(y), 8, 8, 1), dtype=np.uint8))
    return ImageSet((x//2 + 30*y[:, None, None, None]).to(torch.uint8), y, tuple('abcd')[:len(counts)])


def rows(counts, seed):
    "Features of as many rows"
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    x = rng.normal(size=(len(y), 12)).astype('f4') + 2*np.eye(12, dtype='f4')[y]
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    "Two folders of data: the same images to train on, other images and other labels to test on"
    found = []
    for seed, tested in ((1, [9, 9, 9, 9]), (2, [3, 8, 13, 12])):
        root = tmp_path_factory.mktemp('data')
        train, test = pictures(COUNTS, 0), pictures(tested, seed)
        if seed == 2: test = ImageSet(test.store, test.labels[torch.randperm(36)], test.classes)
        write_h5(root/'photos.h5', train, test, pad=1)
        for part, made in (('train', rows(COUNTS, 0)), ('test', rows(tested, seed))):
            write_features(root/'vectors'/f'feature_{part}.h5', [made])
        found.append(root)
    return found


def data_of(method): return 'vectors' if method == 'dlsa' else 'photos'


def left(folder):
    "Everything that was learned or logged on the way, but for times and test numbers"
    tensors = {f'{p.name}/{k}': v for p in folder.glob('*.safetensors') for k, v in load_file(p).items()}
    states = {p.name: p.read_bytes() for p in folder.glob('*.state.pt')}
    table = pd.read_csv(folder/'history.csv')
    return tensors, states, table[[c for c in table if not c.startswith(('seconds', 'images_per', 'test_'))]]


@pytest.mark.parametrize('method,changes', CASES)
def test_test_labels_and_images_choose_nothing(method, changes, roots, tmp_path):
    one, other = (
        load_run(run(recipe(method, data_of(method), profile='smoke', **changes), tmp_path/str(i), root, device='cpu'))
        for i, root in enumerate(roots))
    (a, s, h), (b, t, g) = left(one.path), left(other.path)
    assert a and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert s == t and h.equals(g)
    assert one.metrics['final']['nll'] != other.metrics['final']['nll'], 'other images have other results'


@pytest.mark.parametrize('method', ['mislas', 'balanced_softmax', 'sade', 'class_balanced_experts', 'reweighting'])
def test_what_is_held_out_stands_for_the_test_part_altogether(method, roots, tmp_path):
    changes = CHANGES.get(method, [{}])[-1]
    one, other = (
        load_run(run(recipe(method, 'photos', profile='smoke', hold_out=4, **changes), tmp_path/str(i), root,
                     device='cpu'))
        for i, root in enumerate(roots))
    assert one.metrics == other.metrics and one.metrics['protocol']['n_test'] == 16
    assert np.array_equal(one.predictions['logits'], other.predictions['logits'])


@pytest.mark.parametrize('hold_out', [0, 3])
@pytest.mark.parametrize('method,changes', CASES)
def test_parts_are_disjoint(method, changes, hold_out, roots):
    if method == 'dlsa' and hold_out: pytest.skip('learns from features of runs, whose images were held out there')
    r = recipe(method, data_of(method), profile='smoke', hold_out=hold_out, **changes)
    data = recipe_data(r, roots[0])
    parts, _ = get_method(method).split(r, data)
    seen = {k: {v.tobytes() for v in p.rows} for k, p in parts.items()}
    assert {'train', 'test'} <= seen.keys() and all(len(v) == len(parts[k]) for k, v in seen.items())
    if 'meta' in seen and not changes.get('meta_val_split'):
        assert seen.pop('meta') == seen['val'], 'one balanced set has both uses, unless it is split'
    names = sorted(seen)
    for i, k in enumerate(names):
        for other in names[:i]: assert not seen[k] & seen[other], (k, other)
    if method == 'dlsa': return
    tested = {v.tobytes() for v in load_images('photos', roots[0]).test.rows}
    assert not seen['test'] & tested if hold_out else seen['test'] == tested
