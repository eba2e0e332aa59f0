"""Every published recipe for a large set starts on a set of the published size: its classes, its smallest class of
five or two images, its validation part. The images are eight pixels wide, as none of them is trained on here."""
import numpy as np, pytest, torch

from ltbook.data.lists import LARGE
from ltbook.data.stores import ImageSet, write_h5
from ltbook.methods.method import get_method, methods
from ltbook.methods.recipe import recipe
from ltbook.models.backbones import FROZEN
from ltbook.runs.run import make_context

from test_full_counts import SETS, generated

# (method, data set, imbalance)
STARTED = [(m, p.dataset, p.imbalance) for m in methods() for p in get_method(m).recipes if p.dataset in LARGE]


def images(counts):
    "Random images of 8 x 8 pixels, as many of every class"
    labels = torch.arange(len(counts)).repeat_interleave(torch.as_tensor(counts))
    x = torch.randint(256, (len(labels), 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(x, labels, tuple(f'class {k}' for k in range(len(counts))))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A folder with the three sets"
    folder = tmp_path_factory.mktemp('large')
    for name, (n_classes, total, largest, smallest, groups, n_test, _) in SETS.items():
        counts = generated(n_classes, total, largest, smallest, groups)
        parts = dict(train=counts, test=[n_test//n_classes]*n_classes)
        if 'test' in LARGE[name].parts: parts['val'] = [LARGE[name].parts['val'][1]]*n_classes
        write_h5(folder/f'{name}.h5', **{k: images(v) for k, v in parts.items()})
    return folder


def test_all_five_papers_are_among_them():
    assert {m for m, _, _ in STARTED} >= {'mislas', 'difficulty_net', 'sade', 'dirmixe', 'class_balanced_experts'}


@pytest.mark.parametrize('method,name,imbalance', STARTED)
def test_every_large_recipe_starts(method, name, imbalance, root):
    paper = recipe(method, name, imbalance, 'paper')
    weights = dict(init='weights.pth') if paper.backbone in FROZEN else {}
    assert paper.init or weights or not paper.backbone.startswith('resnet152'), 'nobody trains it from nothing'
    r = recipe(method, name, imbalance, 'paper', side=8, **weights)
    context = make_context(r, root)
    total, smallest = SETS[name][1], SETS[name][3]
    assert len(context.train) == context.tail.counts.sum() == total, 'nothing is taken from the tail'
    assert context.trained_counts.min() == smallest and len(context.parts['test']) == SETS[name][5]
    aside = {k: p.counts for k, p in context.parts.items() if k not in ('train', 'test')}
    wanted = dict(difficulty_net=dict(meta=10, val=10), class_balanced_experts=dict(val=20)).get(method, {})
    assert {k: np.unique(c).tolist() for k, c in aside.items()} == {k: [n] for k, n in wanted.items()}
