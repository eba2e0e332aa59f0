"""600 real JPEGs of about 500 x 375 pixels, long-tailed over 20 classes, in the layouts of the three large sets and
under their names: doctor, pack, all five methods, label shift, features, DLSA and fusion, with one process and with
two. What was published about the sets is replaced by the numbers of the pictures, nothing else.

Every layout is packed and trained on; who trains what is shared out, so that a whole check stays short. With
LTBOOK_WHOLE=1 every layout gets every method, with one process and with two."""
import json, os, time
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.lists import LARGE
from ltbook.runs.folder import load_run
from ltbook.studies.fusion import fuse_logits, run_members

WHOLE = os.environ.get('LTBOOK_WHOLE') == '1'
COUNTS = [115, 85, 62, 46, 34, 25, 18, 14, 10, 8, 6, 5, 4, 4, 3, 3, 2, 2, 2, 2]     # 450 to train on
VALIDATED = [1]*20                                                                  # 20 apart from both
TESTED = [7]*10 + [6]*10                                                            # 130 to test on
METHODS = dict(
    mislas=['stage2_epochs=1'],
    difficulty_net=['n_meta=1', 'auto_augment=false', 'cutout_side=0', 'stage2_epochs=1'],
    dirmixe=[],
    class_balanced_experts=['splits=quantile', 'ratios=[1,1,1]', 'expert_epochs=[1,1,1]', 'calibration_epochs=1'],
    sade=[])
# the paper's protocol, where there is a part to validate on
VALIDATING = {('places_lt', 'class_balanced_experts'): ['protocol=V'],
              ('imagenet_lt', 'class_balanced_experts'): ['protocol=V']}
LAYOUTS = dict(
    imagenet_lt=dict(train='train/n{k:08d}/n{k:08d}_{n}.JPEG', val='train/n{k:08d}/n{k:08d}_{n}.JPEG',
                     test='val/n{k:08d}/ILSVRC2012_val_{n:08d}.JPEG'),
    places_lt=dict(train='data_256/{c}/street{k}/{n:08d}.jpg', val='data_256/{c}/street{k}/{n:08d}.jpg',
                   test='val_256/Places365_val_{n:08d}.jpg'),
    inaturalist2018=dict(train='train_val2018/Aves/{k}/{h}.jpg', val='train_val2018/Aves/{k}/{h}.jpg'))
# layout -> (method, processes); LTBOOK_WHOLE=1: everything with everything
SHARES = dict(imagenet_lt=[('mislas', 2), ('difficulty_net', 1)],
              places_lt=[('class_balanced_experts', 1), ('dirmixe', 2)],
              inaturalist2018=[('sade', 2), ('mislas', 1)])

SPENT = []      # seconds


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "600 pieces of two photographs, changed in light, colour and size, a class a place in them: (part, class, file)"
    top, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(n)) for n in ('china.jpg', 'flower.jpg')]
    made = []
    for part, counts in dict(train=COUNTS, val=VALIDATED, test=TESTED).items():
        for k, n in enumerate(counts):
            for i in range(n):
                w, h = (int(v) for v in rng.integers((150, 110), (210, 160)))
                left, upper = 22*k + int(rng.integers(20)), int(rng.integers(260))
                x = whole[k % 2].crop((left, upper, left + w, upper + h))
                x = x.resize((500, 375) if rng.random() < .8 else (375, 500), Image.Resampling.BILINEAR)
                x = ImageEnhance.Brightness(ImageEnhance.Color(x).enhance(rng.uniform(.6, 1.4))).enhance(
                    rng.uniform(.7, 1.3))
                file = top/f'{part}-{k}-{i}.jpg'
                x.save(file, quality=88)
                made.append((part, k, file))
    assert len(made) == 600
    return made


def lay_out(layout, pictures, top):
    "The files under the names of a large set, with lists as people have them; iNaturalist is tested on its val part"
    lists, names = top/'lists', LAYOUTS[layout]
    lines = {part: [] for part in names}
    lists.mkdir(parents=True)
    for n, (part, k, file) in enumerate(pictures):
        part = part if part in names else 'val'
        name = names[part].format(k=k, n=n, c='abc'[k % 3], h=f'{n*2654435761 % 2**32:08x}')
        (top/name).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, top/name)
        lines[part].append((name, k))
    for part, some in lines.items():
        if layout == 'inaturalist2018':
            (lists/f'{part}.json').write_text(json.dumps(dict(
                images=[dict(id=i, file_name=f) for i, (f, _) in enumerate(some)],
                annotations=[dict(id=i, image_id=i, category_id=k) for i, (_, k) in enumerate(some)],
                categories=[dict(id=k, name=f'bird {k}') for k in range(20)])))
        else: (lists/f'{part}.txt').write_text(''.join(f'{f} {k}\n' for f, k in some))
    return top, lists


def as_published(layout):
    "What is known of a large set, with the numbers of the pictures here"
    parts = dict(train=(450, 115, 2), val=(20, 1, 1), test=(130, 7, 6))
    if layout == 'inaturalist2018': parts = dict(train=(450, 115, 2), val=(150, 8, 7))
    return replace(LARGE[layout], n_classes=20, parts=parts)


def done(*words):
    p = CliRunner().invoke(app, [*map(str, words)], env=dict(COLUMNS='250'))
    assert p.exit_code == 0, (words, p.output)
    return p.output


@pytest.mark.parametrize('layout', LAYOUTS)
def test_from_pictures_to_results(layout, pictures, tmp_path, monkeypatch):
    began = time.monotonic()
    monkeypatch.setitem(LARGE, layout, as_published(layout))
    name, (images, lists), known = layout, lay_out(layout, pictures, tmp_path/'set'), as_published(layout).parts
    n_test = known.get('test', known['val'])[0]
    data = ['--data-root', tmp_path/'data']
    said = done('doctor', name, '--images', images, '--lists', lists, '--deep')
    assert '450 images, 20 classes, 115 to 2 a class' in said and 'All files are there' in said
    assert any(f'layout    {x.name}' in said for x in LARGE[layout].layouts), said
    done('pack', name, '--images', images, '--lists', lists, '--size', 72, *data)
    shares = [(m, n) for m in METHODS for n in (1, 2)] if WHOLE else SHARES[layout]
    runs = {}
    for method, processes in shares:
        where = ['--out', tmp_path/'runs'/str(processes)]
        sets = [w for c in ('backbone=resnet10', 'init=none', 'crop=resized', 'side=64', 'flip=true', 'batch_size=64',
                            *METHODS[method], *VALIDATING.get((layout, method), ())) for w in ('--set', c)]
        told = done('run', method, name, '--epochs', 1, '--bare', *sets, '--processes', processes, *data, *where)
        assert 'GFLOPs an image' in told and 'images/s, as two steps went' in told
        [path] = (tmp_path/'runs'/str(processes)/name/method).iterdir()
        runs[method, processes] = run = load_run(path)
        assert run.env['sessions'][0]['sharing']['processes'] == processes
        assert len(run.predictions['labels']) == n_test and np.isfinite(run.metrics['final']['nll'])
        # an image a class to learn weights from: of its own part, where there is one
        held = 20 if method == 'difficulty_net' and 'test' not in LAYOUTS[layout] else 0
        assert run.predictions['train_counts'].sum() == 450 - held
    (method, processes), run = next(iter(runs.items()))
    where = ['--out', tmp_path/'runs'/str(processes)]
    assert 'setting A' in done('shift', run.path, '--ratios', '2', '--draws', '1', *data, *where)
    for (method, processes), run in runs.items():
        if method != 'mislas': continue
        where = ['--out', tmp_path/'runs'/str(processes)]
        features = done('features', run.path, *data, *where).split('ltbook run dlsa ')[1].split()[0]
        done('run', 'dlsa', features, '--profile', 'smoke', '--bare', '--set', 'flow_lr=0.01',
             '--processes', processes, *data, *where)
        [dlsa] = (tmp_path/'runs'/str(processes)/features/'dlsa').iterdir()
        assert len(load_run(dlsa).predictions['labels']) == n_test
    if layout == 'imagenet_lt':      # the pictures where they are, with crops of the whole of them
        data = ['--data-root', tmp_path/'files']
        done('pack', name, '--images', images, '--lists', lists, '--size', 72, '--as-files', *data)
        sets = [w for c in ('backbone=resnet10', 'side=64', 'batch_size=64') for w in ('--set', c)]
        done('run', 'mislas', name, '--profile', 'smoke', '--bare', *sets, *data, '--out', tmp_path/'files')
        [path] = (tmp_path/'files'/name/'mislas').iterdir()
        run = load_run(path)
        assert run.recipe.crop == 'resized' and run.data['test'] == next(iter(runs.values())).data['test']
    fused = fuse_logits([run_members(r, stages=[r.stages[-1]])[0] for r in runs.values()])
    assert fused.log_p.shape == (n_test, 20) and torch.allclose(fused.log_p.exp().sum(1), torch.ones(n_test), atol=1e-4)
    SPENT.append(time.monotonic() - began)
    assert sum(SPENT) < 360, 'six minutes for all that one process of the tests does'
