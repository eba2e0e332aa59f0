"A run belongs to its data: other images under the same name are refused, whatever is asked for, and nothing is changed"
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.data.fingerprint import find_copies
from ltbook.data.images import load_images
from ltbook.data.stores import ImageSet, write_h5
from ltbook.cli.main import app
from ltbook.runs.evaluate import evaluate, logits_from_weights
from ltbook.studies.features import export_features
from ltbook.runs.folder import find_runs, load_run, run_id
from ltbook.studies.fusion import check_alike, logits_on, read_logits, run_members, share_generalist, write_logits
from ltbook.methods.recipe import recipe
from ltbook.runs.run import recipe_from, run
from ltbook.studies.shift import shift

SMALL = dict(imbalance=4, profile='smoke', batch_size=8)


def store(root, pixels=0, labels=0, classes='abc', name='mine', std=(.25, .25, .25)):
    "A small data set; another number is another set of the same form"
    def part(n, seed):
        y = torch.arange(3).repeat(n)
        x = torch.from_numpy(np.random.default_rng([pixels, seed]).integers(0, 256, (3*n, 8, 8, 3), dtype=np.uint8))
        return ImageSet(x, y.roll(labels), tuple(classes))
    write_h5(root/f'{name}.h5', part(24, 0), part(10, 1), mean=(.5, .5, .5), std=std)
    return root


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Finished runs on data A; beside it other data of the same name"
    top = tmp_path_factory.mktemp('identity')
    a, out = store(top/'a'), top/'out'
    runs = {m: load_run(run(recipe(m, 'mine', **SMALL), out, a)) for m in ('mixup', 'sade')}
    return top, a, out, runs


OTHER = [dict(pixels=1), dict(labels=1), dict(classes='abd'), dict(std=(.5, .5, .5))]


@pytest.fixture(params=OTHER, ids=lambda c: next(iter(c)))
def other(request, tmp_path): return store(tmp_path/'b', **request.param)


def refused(f, *folders):
    "One sentence or two of a person, and nothing changed"
    before = [content(p) for p in folders]
    with pytest.raises(UserError, match='other data') as e: f()
    assert '\n' not in str(e.value) and [content(p) for p in folders] == before


def test_fingerprints_are_everywhere(made, tmp_path):
    _, a, _, runs = made
    r = runs['mixup']
    manifest = json.loads((r.path/'manifest.json').read_text())
    assert set(r.data) == {'train', 'test', 'view'} and all(len(v) == 64 for v in r.data.values())
    assert manifest['data'] == r.metrics['protocol']['data'] == r.data
    with h5py.File(r.path/'predictions.h5') as f: assert json.loads(f.attrs['data']) == r.data
    assert load_images('mine', a).test.sha256() == r.data['test']
    for part, path in zip(('train', 'test'), export_features(r, tmp_path/'f', root=a)):
        with h5py.File(path) as f: assert f.attrs['data'] == r.data[part]
    member = run_members(r)[0]
    assert read_logits(write_logits(tmp_path/'l.h5', member)).data == member.data == r.data['test']
    shift(runs['sade'].path, a, only=['uniform'], draws=1)
    assert json.loads((runs['sade'].path/'shift'/'settings.json').read_text())['data'] == runs['sade'].data


def test_same_words(made, other):
    _, a, out, runs = made
    r = runs['mixup']
    refused(lambda: run(r.recipe, out, other), out)
    p = CliRunner().invoke(
        app,
        [
            'run',
            'mixup',
            'mine',
            '--imbalance',
            '4',
            '--profile',
            'smoke',
            '--set',
            'batch_size=8',
            '--bare',
            '--out',
            str(out),
            '--data-root',
            str(other)],
        env=dict(COLUMNS='400'))
    assert p.exit_code == 2 and 'other data' in p.output and 'Traceback' not in p.output
    assert run(r.recipe, out, a) == r.path


def test_nothing_is_needed_to_see_a_finished_run(made, tmp_path):
    _, _, out, runs = made
    assert run(runs['mixup'].recipe, out, tmp_path) == runs['mixup'].path


def test_import_with_force(tmp_path):
    from PIL import Image
    def pictures(folder, seed):
        for c in ('ant', 'bee'):
            (tmp_path/folder/c).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng([seed, i, ord(c[0])]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path/folder/c/f'{i}.png')
        return tmp_path/folder
    def call(*words):
        return CliRunner().invoke(
            app, [*map(str, words), '--data-root', str(tmp_path/'data')], env=dict(COLUMNS='400'))
    words = (
        'run',
        'balanced_softmax',
        'mine',
        '--profile',
        'smoke',
        '--set',
        'batch_size=4',
        '--bare',
        '--out',
        tmp_path/'out')
    assert call('import', pictures('one', 0), 'mine', '--size', 12).exit_code == 0
    assert call(*words).exit_code == 0
    before = content(tmp_path/'out')
    assert call('import', pictures('two', 1), 'mine', '--size', 12, '--force').exit_code == 0
    p = call(*words)
    assert p.exit_code == 2 and 'other data' in p.output and content(tmp_path/'out') == before
    assert call('import', tmp_path/'one', 'mine', '--size', 12, '--force').exit_code == 0
    assert call(*words).exit_code == 0, 'the same pictures again are the same data'


def test_resume(made, other, tmp_path):
    _, a, _, _ = made
    class Killed(Exception): pass
    def kill(row): raise Killed
    r, out = recipe('mislas', 'mine', **SMALL), tmp_path/'out'
    with pytest.raises(Killed): run(r, out, a, report=kill)
    refused(lambda: run(r, out, other), out)
    assert load_run(run(r, out, a)).data == load_run(run(r, tmp_path/'whole', a)).data


def test_measured_again(made, other, tmp_path):
    _, a, _, runs = made
    r = runs['mixup']
    refused(lambda: evaluate(r, weights=True, root=other), r.path)
    refused(lambda: logits_from_weights(r, other), r.path)
    refused(lambda: export_features(r, tmp_path/'features', root=other), r.path)
    assert not (tmp_path/'features').exists() or not list((tmp_path/'features').iterdir())
    assert evaluate(r, weights=True, root=a).metrics['final']['top1'] == r.metrics['final']['top1']


def test_shift(made, other):
    refused(lambda: shift(made[3]['sade'].path, other, draws=1), made[3]['sade'].path)


def test_second_stage(made, other, tmp_path):
    _, a, _, runs = made
    first, out = runs['mixup'], tmp_path/'out'
    second = recipe_from(first, 'crt')
    refused(lambda: run(second, out, other, start=first), first.path)
    assert not out.exists(), 'refused before anything is written'
    assert load_run(run(second, out, a, start=first)).data == first.data


def test_fusion(made, other, tmp_path):
    _, a, _, runs = made
    r = runs['mixup']
    refused(lambda: logits_on(r, load_images('mine', a).test, root=other), r.path)
    there = load_run(run(r.recipe, tmp_path/'out', other))
    if there.data['test'] != r.data['test']:      # the same images may be looked at in another way
        with pytest.raises(UserError, match='other'): check_alike([*run_members(r), *run_members(there)])


def test_shared_generalist(made, other, tmp_path):
    _, a, _, _ = made
    small = dict(SMALL, splits=[[0], [1], [2]], ratios=[2, 2, 1])
    first = load_run(run(recipe('class_balanced_experts', 'mine', **small), tmp_path/'out', a))
    new = recipe('class_balanced_experts', 'mine', **small, calibration_epochs=3)
    folder = share_generalist(first, new, tmp_path/'out')
    refused(lambda: run(new, tmp_path/'out', other), tmp_path/'out')
    assert load_run(run(new, tmp_path/'out', a)).path == folder


def test_older_runs_are_read_and_say_so(made, tmp_path):
    "A run whose files know no fingerprint: shown, marked, and not compared"
    _, a, _, runs = made
    old = tmp_path/run_id(runs['mixup'].recipe)
    shutil.copytree(runs['mixup'].path, old)
    for name, inside in (('metrics', lambda d: d['protocol']), ('manifest', lambda d: d)):
        d = json.loads((old/f'{name}.json').read_text())
        inside(d).pop('data')
        (old/f'{name}.json').write_text(json.dumps(d))
    (old/'done.json').write_text(json.dumps(dict(run=run_id(runs['mixup'].recipe))))      # no list of files either
    assert load_run(old).data is None
    assert 'not recorded' in CliRunner().invoke(app, ['show', str(old)], env=dict(COLUMNS='200')).output
    assert run(runs['mixup'].recipe, tmp_path, a) == old


def test_committed_runs_are_read():
    from pathlib import Path
    committed = Path(__file__).resolve().parents[1]/'outputs'
    assert len(find_runs(committed, hold_out=None)) == len(list(committed.glob('*/*/*/done.json'))) > 50


def test_copies_are_told(tmp_path):
    rows = np.arange(6, dtype=np.uint8).repeat(32).reshape(6, 32)
    assert find_copies(rows[:4], np.arange(4), rows[3:], np.arange(3, 6))['test_in_train'] == 1
    x = torch.arange(4, dtype=torch.uint8).repeat_interleave(3*16).view(4, 4, 4, 3)
    write_h5(
        tmp_path/'twice.h5',
        ImageSet(x, torch.tensor([0, 0, 1, 1]), ('a', 'b')),
        ImageSet(x[2:], torch.tensor([0, 1]), ('a', 'b')))
    out = (
        CliRunner()
        .invoke(app, ['doctor', 'data', 'twice', '--data-root', str(tmp_path)], env=dict(COLUMNS='200'))
        .output)
    assert '2 of the test images equal a train image' in out and '1 of the images come with more than one label' in out
    write_h5(
        tmp_path/'once.h5',
        ImageSet(x[:2], torch.tensor([0, 1]), ('a', 'b')),
        ImageSet(x[2:], torch.tensor([0, 1]), ('a', 'b')))
    assert (
        'No image is there twice'
        in CliRunner().invoke(app, ['doctor', 'data', 'once', '--data-root', str(tmp_path)]).output)


def test_hashes_beside_the_file(tmp_path):
    "Kept, used, and made again when the file is another one; a folder that can't be written is no obstacle"
    store(tmp_path)
    first = load_images('mine', tmp_path).train.sha256()
    assert (tmp_path/'.mine.h5.rows.npz').exists() and load_images('mine', tmp_path).train.sha256() == first
    store(tmp_path, pixels=5)
    assert load_images('mine', tmp_path).train.sha256() != first
    with h5py.File(tmp_path/'mine.h5', 'a') as f: f['train/images'][0, 0, 0, 0] ^= 1      # in place, same size
    changed = load_images('mine', tmp_path).train
    (tmp_path/'.mine.h5.rows.npz').unlink()
    assert load_images('mine', tmp_path).train.sha256() == changed.sha256() != first


def test_a_sweep_looks_at_the_data(made, other, tmp_path):
    "Rows that are finished count only on their own data"
    words = [
        'sweep',
        'balanced_softmax',
        'fast',
        '--dataset',
        'mine',
        '--imbalance',
        '4',
        '--profile',
        'smoke',
        '--only',
        '1',
        '--bare',
        '--out',
        str(tmp_path/'out'),
        *(
            w
            for c in ('epochs=1', 'max_steps=2', 'batch_size=8', 'first_side=4', 'precision=fp32')
            for w in ('--set', c))]
    p = CliRunner().invoke(app, [*words, '--data-root', str(made[1])], env=dict(COLUMNS='400'))
    assert p.exit_code == 0, p.output
    before = content(tmp_path/'out')
    p = CliRunner().invoke(app, [*words, '--data-root', str(other)], env=dict(COLUMNS='400'))
    assert p.exit_code == 2 and 'other data' in p.output and content(tmp_path/'out') == before
    p = CliRunner().invoke(
        app, ['eval', str(made[3]['mixup'].path), '--data-root', str(other)], env=dict(COLUMNS='400'))
    assert p.exit_code == 2 and 'other data' in p.output


def test_disks_that_refuse(tmp_path, monkeypatch):
    "A data set and features that can't be written are told, not thrown"
    from ltbook.data.features import write_features
    x = ImageSet(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), torch.tensor([0, 1]), ('a', 'b'))
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='Cannot write'): write_h5(tmp_path/'file'/'x.h5', x, x)
    with pytest.raises(UserError, match='Cannot write'):
        write_features(tmp_path/'file' / 'x.h5', [(torch.zeros(2, 3), torch.tensor([0, 1]))])
