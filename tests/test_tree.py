"""600 real JPEGs of about 500 x 375 pixels, long-tailed over 20 classes, in the layouts of the three large sets:
doctor, pack, all five methods, label shift, features, DLSA and fusion, with one process and with two.

Every layout is packed and trained on; who trains what is shared out, so that a whole check stays short. With
LTBOOK_WHOLE=1 every layout gets every method, with one process and with two."""
import json, os

import numpy as np, pytest, torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.runs.folder import load_run
from ltbook.studies.fusion import fuse_logits, run_members

WHOLE = os.environ.get('LTBOOK_WHOLE') == '1'
COUNTS = [115, 85, 62, 46, 34, 25, 18, 14, 10, 8, 6, 5, 4, 4, 3, 3, 2, 2, 2, 2]     # 450 to train on
TESTED = [8]*10 + [7]*10                                                            # 150 to test on
METHODS = dict(
    mislas=['stage2_epochs=1'],
    difficulty_net=['n_meta=1', 'auto_augment=false', 'cutout_side=0', 'stage2_epochs=1'],
    dirmixe=[],
    class_balanced_experts=['splits=quantile', 'ratios=[1,1,1]', 'expert_epochs=[1,1,1]', 'calibration_epochs=1'],
    sade=[])
LAYOUTS = dict(
    imagenet=dict(train='train/n{k:08d}/n{k:08d}_{i}.JPEG', test='val/ILSVRC2012_val_{n:08d}.JPEG'),
    places=dict(train='data_256/{c}/street{k}/{i:08d}.jpg', test='val_256/Places365_val_{n:08d}.jpg'),
    inat=dict(train='train_val2018/Aves/{k}/{h}.jpg', test='train_val2018/Aves/{k}/t{h}.jpg'))
# layout -> (method, processes); LTBOOK_WHOLE=1: everything with everything
SHARES = dict(imagenet=[('mislas', 2), ('sade', 1)], places=[('class_balanced_experts', 1), ('dirmixe', 2)],
              inat=[('difficulty_net', 2), ('mislas', 1)])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "600 pieces of two photographs, changed in light, colour and size, a class a place in them: (part, class, file)"
    top, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(n)) for n in ('china.jpg', 'flower.jpg')]
    made = []
    for part, counts in dict(train=COUNTS, test=TESTED).items():
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
    "The files under the names of a large set, with lists as people have them"
    lists, lines = top/'lists', dict(train=[], test=[])
    lists.mkdir(parents=True)
    for n, (part, k, file) in enumerate(pictures):
        name = LAYOUTS[layout][part].format(k=k, i=n, n=n, c='abc'[k % 3], h=f'{n*2654435761 % 2**32:08x}')
        (top/name).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, top/name)
        lines[part].append((name, k))
    for part, some in lines.items():
        if layout == 'inat':
            (lists/f'{part}.json').write_text(json.dumps(dict(
                images=[dict(id=i, file_name=f) for i, (f, _) in enumerate(some)],
                annotations=[dict(id=i, image_id=i, category_id=k) for i, (_, k) in enumerate(some)],
                categories=[dict(id=k, name=f'bird {k}') for k in range(20)])))
        else: (lists/f'{part}.txt').write_text(''.join(f'{f} {k}\n' for f, k in some))
    return top, lists


def done(*words):
    p = CliRunner().invoke(app, [*map(str, words)], env=dict(COLUMNS='250'))
    assert p.exit_code == 0, (words, p.output)
    return p.output


@pytest.mark.parametrize('layout', LAYOUTS)
def test_from_pictures_to_results(layout, pictures, tmp_path):
    name, (images, lists) = f'like_{layout}', lay_out(layout, pictures, tmp_path/'set')
    data = ['--data-root', tmp_path/'data']
    said = done('doctor', name, '--images', images, '--lists', lists, '--deep')
    assert '450 images, 20 classes, 115 to 2 a class' in said and 'All files are there' in said
    done('pack', name, '--images', images, '--lists', lists, '--size', 72, *data)
    shares = [(m, n) for m in METHODS for n in (1, 2)] if WHOLE else SHARES[layout]
    runs = {}
    for method, processes in shares:
        where = ['--out', tmp_path/'runs'/str(processes)]
        sets = [w for c in ('backbone=resnet10', 'crop=resized', 'side=64', 'flip=true', 'batch_size=64',
                            *METHODS[method]) for w in ('--set', c)]
        told = done('run', method, name, '--epochs', 1, '--bare', *sets, '--processes', processes, *data, *where)
        assert 'GFLOPs an image' in told and 'images/s, as two steps went' in told
        [path] = (tmp_path/'runs'/str(processes)/name/method).iterdir()
        runs[method, processes] = run = load_run(path)
        assert run.env['sessions'][0]['sharing']['processes'] == processes
        assert len(run.predictions['labels']) == 150 and np.isfinite(run.metrics['final']['nll'])
        held = 20 if method == 'difficulty_net' else 0      # an image a class to learn weights from
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
        assert len(load_run(dlsa).predictions['labels']) == 150
    fused = fuse_logits([run_members(r, stages=[r.stages[-1]])[0] for r in runs.values()])
    assert fused.log_p.shape == (150, 20) and torch.allclose(fused.log_p.exp().sum(1), torch.ones(150), atol=1e-4)
