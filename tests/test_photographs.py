"Photographs as people have them: imported at any side, trained on with crops of any size, looked at again"
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torchvision.models import get_model
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.checks import UserError
from ltbook.data.stores import ImageSet, write_h5
from ltbook.methods.recipe import recipe
from ltbook.models.backbones import BACKBONES, build_backbone
from ltbook.models.resnet import FrozenResNet
from ltbook.runs.export import export, from_export
from ltbook.runs.folder import load_run
from ltbook.runs.run import make_context, run as train_run
from ltbook.train.processes import child_env

CLASSES = {'Größe 1': 14, '鳥': 9, 'a b': 6, "it's": 5, '-dash': 3}
SMOKE = ['--profile', 'smoke', '--bare', '--device', 'cpu', '--set', 'batch_size=8']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pieces of two photographs, a class a place in them, of many sizes, kinds and modes"
    top, rng = tmp_path_factory.mktemp('people')/'My photographs', np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(n)) for n in ('china.jpg', 'flower.jpg')]
    modes, ends = ('RGB', 'L', 'P', 'RGBA', 'CMYK', 'RGB', '1'), ('jpg', 'png', 'gif', 'png', 'jpg', 'webp', 'bmp')
    kinds = [*zip(modes, ends)]
    for k, (name, n) in enumerate(CLASSES.items()):
        (top/name).mkdir(parents=True)
        for i in range(n):
            w, h = (int(v) for v in rng.integers(200, 260, 2))
            left, top_ = 75*k + int(rng.integers(40)), int(rng.integers(150))
            piece = whole[k % 2].crop((left, top_, left + w, top_ + h))
            mode, end = kinds[i % len(kinds)]
            piece.convert(mode).save(top/name/f'{i} ü.{end}')
    exif = Image.Exif()
    exif[0x0112] = 6      # lies on its side
    whole[0].crop((0, 0, 300, 240)).save(top/'Größe 1'/'turned.jpg', exif=exif)
    deep = np.asarray(whole[1].crop((0, 0, 240, 260)).convert('L')).astype(np.uint16)*257
    Image.fromarray(deep).save(top/'鳥'/'16 bit.png')
    return top


@pytest.fixture(scope='module')
def place(folder, tmp_path_factory):
    "Where the sets `birds` of 64 and `large` of 232 pixels lie"
    here = tmp_path_factory.mktemp('place')
    for name, side in (('birds', 64), ('large', 232)):
        done(here, 'import', str(folder), name, '--size', str(side), '--fit', 'crop', '--data-root', str(here/'data'))
    return here


def done(here, *words):
    p = CliRunner().invoke(app, [*words], env=dict(COLUMNS='250', LTBOOK_DATA=str(here/'data')))
    assert p.exit_code == 0, (words, p.output)
    return p.output


def train(here, method, data, *changes):
    sets = [w for c in changes for w in ('--set', c)]
    before = set((here/'runs').glob('*/*/*'))
    done(here, 'run', method, data, '--out', str(here/'runs'), *SMOKE, *sets)
    [path] = set((here/'runs').glob('*/*/*')) - before
    return path


SMALL = ('backbone=resnet10', 'crop=resized', 'side=48', 'jitter=0.4')
METHODS = {
    'mislas': SMALL,
    'balanced_softmax': ('backbone=resnet18', 'side=48', 'auto_augment=true'),
    'difficulty_net': (*SMALL, 'n_meta=1', 'auto_augment=false', 'cutout_side=0'),
    'class_balanced_experts': (*SMALL, 'splits=quantile', 'ratios=[1,1,1]'),
    'sade': ('backbone=resnet50', 'crop=resized', 'side=32'),
    'dirmixe': ('backbone=resnext50', 'crop=resized', 'side=32')}


@pytest.mark.parametrize('method', METHODS)
def test_every_method_learns_from_photographs(method, place):
    run = load_run(train(place, method, 'birds', *METHODS[method]))
    asked = dict(c.split('=') for c in METHODS[method])
    assert run.recipe.backbone == asked['backbone'] and run.recipe.side == int(asked['side'])
    assert np.isfinite(run.metrics['final']['nll']) and len(run.predictions['logits']) == len(run.predictions['labels'])
    assert asked['backbone'] in json.loads((run.path/'recipe.json').read_text())['backbone']


@pytest.mark.parametrize('data,side', [('birds', 48), ('large', 224)])
def test_from_pictures_to_dlsa(data, side, place):
    "run from the weights of a small ResNet in a file, show, eval, shift, features, dlsa on features"
    (place/'data'/'weights').mkdir(exist_ok=True)
    theirs = {k.removeprefix('body.'): v for k, v in build_backbone('resnet10', 3, 3, 'linear').state_dict().items()}
    torch.save(theirs, place/'data'/'weights'/f'small-{side}.pth')
    run = train(place, 'crt', data, 'backbone=resnet10', 'crop=resized', f'side={side}', 'flip=true',
                f'init=small-{side}.pth')
    assert 'starts anew' in load_run(run).metrics['protocol']['init'][-1], 'three classes there, five here'
    name = str(run.relative_to(place/'runs'))
    out = ['--out', str(place/'runs')]
    assert 'crt on' in done(place, 'show', name, *out)
    again = done(place, 'eval', name, '--weights', *out)
    assert f'{100*load_run(run).metrics["final"]["top1"]:.1f}' in again
    assert 'setting A' in done(place, 'shift', name, '--ratios', '2', '--draws', '1', *out)
    said = done(place, 'features', name, *out)
    features = said.split('ltbook run dlsa ')[1].split()[0]
    dlsa = load_run(train(place, 'dlsa', features))
    assert dlsa.metrics['final']['top1'] >= 0 and dlsa.recipe.dataset == features


def test_weights_of_a_file_are_where_a_run_starts(place):
    "torchvision's names, other classes; the file is part of the run's data, and another one of its name is refused"
    file = place/'data'/'weights'/'resnet18-x.pth'
    file.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    theirs = get_model('resnet18')
    torch.save(theirs.state_dict(), file)
    changes = ['backbone=resnet18', 'side=48', 'init=resnet18-x.pth', 'lr=1e-9']
    run = load_run(train(place, 'cross_entropy', 'birds', *changes))
    said = run.metrics['protocol']['init']
    assert '100 of 100' in said[0] and 'starts anew' in said[1] and set(run.data) > {'train', 'test', 'init'}
    ours = load_file(run.path/'stage1.safetensors')
    assert torch.allclose(ours['body.layer4.1.conv2.weight'], theirs.state_dict()['layer4.1.conv2.weight'])
    again = ['run', 'cross_entropy', 'birds', '--out', str(place/'runs'), *SMOKE, *[
        w for c in changes for w in ('--set', c)]]
    assert 'Nothing to train' in done(place, *again)
    torch.save(get_model('resnet18').state_dict(), file)
    env = dict(COLUMNS='250', LTBOOK_DATA=str(place/'data'))
    p = CliRunner().invoke(app, again, env=env)
    assert p.exit_code == 2 and 'init' in p.output and 'other data' in p.output
    file.unlink()
    assert CliRunner().invoke(app, [*again, '--seed', '1'], env=env).exit_code == 2
    assert not [*(place/'runs').glob('*/*/1-*')]
    out = ['--out', str(place/'runs')]
    assert 'cross_entropy' in done(place, 'eval', str(run.path), '--weights', *out), 'it needs the file no more'


def test_a_frozen_body_stays_what_the_file_says(place, monkeypatch):
    "MiSLAS with a network of which the last block trains: mixup, then smoothing with shifted BatchNorm of that block"
    monkeypatch.setitem(BACKBONES, 'resnet50_frozen', partial(FrozenResNet, 'resnet50'))
    torch.manual_seed(1)
    theirs = get_model('resnet50').state_dict()
    (place/'data'/'weights').mkdir(exist_ok=True)
    torch.save(theirs, place/'data'/'weights'/'resnet50-x.pth')
    run = load_run(train(place, 'mislas', 'birds', 'backbone=resnet50_frozen', 'side=48', 'init=resnet50-x.pth',
                         'shift_bn=true', 'batch_size=8'))
    assert 'starts anew' in run.metrics['protocol']['init'][-1]
    one, two = (load_file(run.path/f'stage{i}.safetensors') for i in (1, 2))
    body = [k for k in one if k.startswith('body.')]
    assert len(body) > 250 and all(
        torch.equal(w[k], theirs[k.removeprefix('body.')]) for w in (one, two) for k in body)
    assert not torch.equal(one['block.bn1.running_mean'], two['block.bn1.running_mean'])      # shifted
    assert torch.equal(one['block.conv1.weight'], two['block.conv1.weight'])


def test_a_network_of_timm_from_its_own_weights(place):
    timm = pytest.importorskip('timm')
    (place/'data'/'weights').mkdir(exist_ok=True)
    torch.manual_seed(2)
    torch.save(timm.create_model('resnet10t').state_dict(), place/'data'/'weights'/'resnet10t.pth')
    run = load_run(train(place, 'mislas', 'birds', 'backbone=timm:resnet10t', 'side=48', 'init=resnet10t.pth'))
    assert run.recipe.backbone == 'timm:resnet10t' and 'starts anew' in run.metrics['protocol']['init'][-1]
    assert run.metrics['protocol']['init'][0].split(': ')[1].split()[0] == run.metrics['protocol']['init'][0].split()[3]
    with pytest.raises(UserError, match='no network'): make_context(
        recipe('mislas', 'birds', profile='smoke', backbone='timm:nothing'), place/'data', 'cpu')


def test_one_seed_gives_one_result(place, tmp_path):
    "Crops of any size are drawn from the run's own generators"
    first = load_run(train(place, 'cross_entropy', 'birds', *SMALL, 'epochs=2'))
    done(place, 'run', 'cross_entropy', 'birds', '--out', str(tmp_path), *SMOKE, *[
        w for c in (*SMALL, 'epochs=2') for w in ('--set', c)])
    [path] = tmp_path.glob('*/*/*')
    assert np.array_equal(first.predictions['logits'], load_run(path).predictions['logits'])


@pytest.mark.parametrize('method,changes,words', [
    ('sade', dict(backbone='resnet18'), 'backbone with experts'),
    ('mislas', dict(backbone='resnet10', crop='resized'), 'needs a side'),
    ('mislas', dict(backbone='resnet10', side=80), 'smaller side'),
    ('mislas', dict(backbone='resnet152_frozen'), 'weights of ImageNet')])
def test_what_cannot_be_is_said_before_training(method, changes, words, place):
    r = recipe(method, 'birds', profile='smoke', **changes)
    with pytest.raises(UserError, match=words): make_context(r, place/'data', 'cpu').view()


def test_colour_pictures_are_exported(tmp_path):
    "Also to ONNX, for any number of images, and where sums in another order differ in the last bit"
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    data = ImageSet(pixels, torch.arange(40) % 3, tuple('abc'))
    write_h5(tmp_path/'colours.h5', data, data)
    r = recipe('cross_entropy', 'colours', imbalance=None, profile='smoke', backbone='resnet10')
    finished = load_run(train_run(r, tmp_path/'out', tmp_path, device='cpu'))
    folder = export(finished, tmp_path/'export', root=tmp_path, onnx=True)
    session, network = onnxruntime.InferenceSession(str(folder/'model.onnx')), from_export(folder)
    for n in (1, 7, 40):
        want, got = network(pixels[:n]).detach().numpy(), session.run(None, dict(pixels=pixels[:n].numpy()))[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4*np.abs(want).max())
    for words, code, said in (([], 1, 'FOLDER'), ([tmp_path/'nowhere'], 2, 'Error: There is no folder')):
        p = subprocess.run(
            [sys.executable, folder/'predict.py', *words], capture_output=True, text=True, env=child_env(1))
        assert p.returncode == code and said in p.stderr and 'Traceback' not in p.stderr
