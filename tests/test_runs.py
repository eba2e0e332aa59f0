"Whole runs: through papermill and the command line, killed with SIGKILL, from damaged files, with bad words"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.data.images import data_root, load_images
from ltbook.cli.main import app
from ltbook.runs.folder import find_runs, load_run, run_id
from ltbook.methods import method
from ltbook.methods.recipe import Recipe, recipe
from ltbook.runs.run import recipe_from, run
from ltbook.train.files import write_json

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT/'nbs'/'experiments'/'80_run.ipynb'
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', COLUMNS='160')
CLI = [sys.executable, '-c', 'from ltbook.cli.main import main; main()']


def ltbook(*words, cwd=None, **env):
    return subprocess.run([*CLI, *map(str, words)], cwd=cwd, env=ENV | env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "A finished smoke run and its parent folder"
    out = tmp_path_factory.mktemp('outputs')
    return load_run(run(recipe('mislas', profile='smoke'), out)), out


def test_metrics_have_the_promised_names(smoke):
    m = smoke[0].metrics
    assert list(m) == ['stage1', 'stage2', 'final', 'protocol']
    for s in ('stage1', 'stage2', 'final'):
        assert {
            'top1',
            'many',
            'medium',
            'few',
            'ece15',
            'nll',
            'brier',
            'bins',
            'per_class',
            'best_on_test'} <= set(m[s]) and 0 <= m[s]['top1'] <= 1
    assert (
        m['protocol']['shot_rule'] == '100/20'
        and m['protocol']['selection'] == 'last'
        and m['protocol']['bins'] == 15)
    assert all(m['final'][k] == m['stage2'][k] for k in m['stage2'])


def test_measures_come_from_the_stored_logits(smoke):
    p, m = smoke[0].predictions, smoke[0].metrics
    assert (p['stage1/logits'].argmax(1) == p['labels']).mean() == pytest.approx(m['stage1']['top1'])
    assert np.array_equal(p['train_counts'], [124, 88, 63, 45, 32, 23, 16, 12, 8, 6])


def test_empty_group_is_null(tmp_path):
    "Balanced digits have 124 images a class: nobody is medium or few"
    r = load_run(run(recipe('cross_entropy', imbalance=1, profile='smoke'), tmp_path))
    assert r.metrics['final']['few'] is None and r.metrics['final']['ece15_few'] is None
    assert '"few": null' in (r.path/'metrics.json').read_text()


def test_killed_run_goes_on(tmp_path):
    "SIGKILL in the middle, then the same command: same logits as an undisturbed run"
    words = ('run', 'mislas', 'digits', '--profile', 'smoke', '--epochs', '30', '--bare', '--out', tmp_path/'a')
    folder = tmp_path/'a'/run_id(recipe('mislas', profile='smoke', epochs=30))
    p = subprocess.Popen([*CLI, *map(str, words)], env=ENV, stdout=subprocess.DEVNULL)
    for _ in range(3600):          # a busy machine may take long to start
        assert p.poll() is None, 'it ended before it could be killed'
        if (folder/'history.csv').exists() and len((folder/'history.csv').read_text().splitlines()) > 3: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert (folder/'training.pt').exists() and not (folder/'done.json').exists()
    with pytest.raises(UserError, match='not finished'): load_run(folder)
    assert find_runs(tmp_path/'a') == []
    assert ltbook(*words).returncode == 0
    assert ltbook(*words[:-1], tmp_path/'b').returncode == 0
    whole = load_run(next((tmp_path/'b').glob('*/*/*')))
    resumed = load_run(folder)
    assert len(resumed.history) == len(whole.history) == 31
    assert np.array_equal(resumed.predictions['logits'], whole.predictions['logits']), 'one thread here and there'
    assert not list(folder.glob('.*part*'))


def test_from_copies_the_first_stage(smoke):
    first, out = smoke
    second = load_run(run(recipe_from(first, 'lws'), out, start=first))
    assert second.metrics['stage1']['top1'] == first.metrics['stage1']['top1'] and second.recipe.start == first.id


def test_bad_folders(smoke, tmp_path):
    first, _ = smoke
    copy = tmp_path/'copy'
    shutil.copytree(first.path, copy)
    (copy/'metrics.json').write_text((copy/'metrics.json').read_text()[:50])
    with pytest.raises(UserError, match='damaged'): load_run(copy)
    with pytest.raises(UserError, match='not a run folder'): load_run(tmp_path)
    (copy/'predictions.h5').unlink()
    shutil.copy(first.path/'metrics.json', copy/'metrics.json')
    with pytest.raises(UserError, match='no logits'): load_run(copy).predictions
    (copy/'predictions.h5').write_bytes((first.path/'predictions.h5').read_bytes()[:3000])
    with pytest.raises(UserError, match='damaged'): load_run(copy).predictions
    recipe_file = json.loads((copy/'recipe.json').read_text())
    (copy/'recipe.json').write_text(json.dumps(recipe_file | dict(method='mine')))
    with pytest.raises(UserError, match='recipe.json .* was changed'): load_run(copy)
    write_json(copy/'recipe.json', recipe_file | dict(method='mine'))
    with pytest.raises(UserError, match='mine'): load_run(copy)


def test_truncated_training_state_is_told(tmp_path):
    "It costs the stage, says so, and the run ends with the numbers of an undisturbed one"
    r, said = recipe('cross_entropy', profile='smoke'), []
    folder = tmp_path/run_id(r)
    class Stop(Exception): pass
    def stop(row): raise Stop
    with pytest.raises(Stop): run(r, tmp_path, report=stop)
    (folder/'training.pt').write_bytes(b'PK half')
    (folder/'files.json').unlink()      # as in a run that is older than lists
    again = load_run(run(r, tmp_path, say=said.append))
    assert len(said) == 1 and 'damaged' in said[0] and 'from its start' in said[0]
    assert np.array_equal(again.predictions['logits'], load_run(run(r, tmp_path/'whole')).predictions['logits'])


@pytest.mark.parametrize(
    'words, says',
    [
        (('mislsa',), 'mislas'),
        (('mislas', 'cifra100'), 'cifar100'),
        (('mislas', '--set', 'weight_deca=1'), 'weight_decay'),
        (('mislas', '--set', 'lr=fast'), 'lr'),
        (('mislas', '--set', 'lr'), 'key=value'),
        (('mislas', '--imbalance', '0.5'), 'imbalance'),
        (('mislas', '--imbalance', '500'), 'without images'),
        (('mislas', '--device', 'gpu'), 'device'),
        (('mislas', '--imbalance', '.1'), 'imbalance'),
        (('mislas', '--set', 'batch_size=0'), 'batch_size'),
        (('mislas', 'places_lt'), 'weights of ImageNet'),
        (('mislas', '--from', 'nothing'), 'no run'),
        (('mislas', 'cifar100', '--imbalance', '-1'), 'imbalance'),
        (('mislas', '--set', 'imbalance=50'), '--imbalance'),
        (('mislas', '--seed', '2', '--set', 'seed=3'), 'twice'),
        (('mislas', '--set', 'stage2_epochs=-1'), 'stage2_epochs'),
        (('mislas', '--set', 'lr=Infinity'), 'lr'),
        (('mislas', '--set', 'epochs=true'), 'epochs')])
def test_mistakes_exit_2_with_one_sentence(tmp_path, words, says):
    p = CliRunner().invoke(app, ['run', *words, '--out', str(tmp_path/'out')], env=dict(COLUMNS='160'))
    assert p.exit_code == 2 and says in p.output and 'Traceback' not in p.output
    assert not list(tmp_path.rglob('*.*')), 'a refused run leaves nothing behind'


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    p = ltbook('run', 'mislas', '--profile', 'smoke', '--bare', '--out', tmp_path/'file')
    assert p.returncode == 2 and 'Cannot make' in p.stderr


def test_a_mistake_from_a_real_shell():
    p = ltbook('run', 'mislsa')
    assert p.returncode == 2 and p.stderr.startswith('Error: ') and len(p.stderr.splitlines()) == 1 and not p.stdout


def test_own_pictures(tmp_path):
    "A folder of class folders becomes a data set, which runs as it is"
    from PIL import Image
    g = np.random.default_rng(0)
    for name, n in dict(cat=30, dog=12, eel=6).items():
        (tmp_path/'pictures'/name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(g.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
                tmp_path/'pictures' / name/f'{i}.png')
    root = ['--data-root', str(tmp_path/'data')]
    p = CliRunner().invoke(app, ['import', str(tmp_path/'pictures'), 'pets', '--size', '16', *root])
    assert p.exit_code == 0 and (tmp_path/'data'/'pets.h5').exists(), p.output
    p = CliRunner().invoke(
        app,
        [
            'run',
            'mislas',
            'pets',
            '--profile',
            'smoke',
            '--set',
            'batch_size=16',
            '--bare',
            '--out',
            str(tmp_path/'out'),
            *root])
    assert p.exit_code == 0, p.output
    r = find_runs(tmp_path/'out')[0]
    assert (
        r.recipe.imbalance is None
        and r.predictions['train_counts'].tolist() == [24, 10, 5]
        and r.metrics['final']['n'] == 9)
    again = CliRunner().invoke(app, ['import', str(tmp_path/'pictures'), 'cifar10', *root])
    assert again.exit_code == 2, 'the name of a built-in data set is refused'
    for more, code in (([], 2), (['--force', '--size', '0'], 2), (['--force'], 0)):
        assert (
            CliRunner().invoke(app, ['import', str(tmp_path/'pictures'), 'pets', *more, *root]).exit_code
            == code), more


def test_damaged_data(tmp_path):
    (tmp_path/'cifar100.h5').write_bytes(b'\x89HDF half a file')
    p = ltbook('run', 'mislas', 'cifar100', '--data-root', tmp_path, '--out', tmp_path/'out')
    assert p.returncode == 2 and 'cifar100.h5' in p.stderr and 'Traceback' not in p.stderr


def test_through_the_notebook(tmp_path):
    "`ltbook run` executes the page: log, figures, no path of this machine"
    pytest.importorskip('papermill')
    p = ltbook('run', 'balanced_softmax', '--profile', 'smoke', '--out', 'out', cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    r = find_runs(tmp_path/'out')[0]
    assert (r.path/'run.ipynb').exists() and {f.name for f in (r.path/'figures').iterdir()} == {
        'profile.png',
        'history.png',
        'reliability.png',
        'shot_accuracy.png'}
    assert str(tmp_path) not in (r.path/'run.ipynb').read_text() and 'run.ipynb' in p.stdout
    assert not list(r.path.glob('.*')) and not (r.path/'progress.json').exists()
    again = ltbook('run', 'balanced_softmax', '--profile', 'smoke', '--out', 'out', cwd=tmp_path)
    assert again.returncode == 0 and 'run.ipynb' in again.stdout


def test_words_left_out_mean_the_same_in_the_notebook(tmp_path):
    "No profile, no seed: `short` and 0, with the notebook as without"
    pytest.importorskip('papermill')
    p = ltbook('run', 'cross_entropy', '--set', 'max_steps=1', '--set', 'epochs=2', '--out', 'out', cwd=tmp_path,
               PYTHONPROFILEIMPORTTIME='1')
    assert p.returncode == 0, p.stderr
    # what takes seconds to import and is of no use to a run stays out of both processes
    imported = {line.rsplit('|', 1)[1].strip() for line in p.stderr.splitlines() if line.startswith('import time:')}
    assert {'papermill', 'torch', 'matplotlib.pyplot', 'ipykernel.kernelapp'} <= imported
    assert not imported & {'rfc3987_syntax.syntax_helpers', 'scipy.stats', 'sklearn', 'torchvision', 'torch._dynamo'}
    r = find_runs(tmp_path/'out')[0]
    assert (r.recipe.profile, r.recipe.seed, r.recipe.epochs) == ('short', 0, 2) and (r.path/'run.ipynb').exists()


def test_plain_papermill_from_anywhere(tmp_path):
    papermill = pytest.importorskip('papermill')
    os.environ['PYTHONPATH'] = str(ROOT)
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        papermill.execute_notebook(
            str(NOTEBOOK),
            'good.ipynb',
            dict(method='mixup', out='runs', mixup_alpha=0.5),
            progress_bar=False,
            kernel_name='python3')
        assert find_runs('runs')[0].recipe.mixup_alpha == .5
        with pytest.raises(papermill.PapermillExecutionError, match='mixup_alpha'):
            papermill.execute_notebook(
                str(NOTEBOOK),
                'bad.ipynb',
                dict(method='mixup', out='other', mixup_alhpa=0.5),
                progress_bar=False,
                kernel_name='python3')
        assert not Path('other').exists(), 'refused before training'
    finally: os.chdir(here)


@pytest.mark.parametrize('page', ['90_reliability', '91_shot_accuracy'])
def test_analysis_on_nothing(tmp_path, page):
    papermill = pytest.importorskip('papermill')
    os.environ['PYTHONPATH'] = str(ROOT)
    nb = papermill.execute_notebook(
        str(ROOT/'nbs' / 'analysis' / f'{page}.ipynb'),
        str(tmp_path/'out.ipynb'),
        dict(outputs=str(tmp_path/'none')),
        progress_bar=False,
        kernel_name='python3')
    assert 'Make one with' in json.dumps(nb)


def test_committed_runs_can_be_read():
    for r in find_runs(ROOT/'outputs'):
        assert isinstance(r.recipe, Recipe) and r.metrics['final']['n'] == r.metrics['protocol']['n_test']
        assert r.path.relative_to(ROOT/'outputs').as_posix() == r.id, 'the folder of a run is named by its recipe'


def test_real_cifar_smoke(tmp_path, monkeypatch):
    "A few steps on the real thing, and a twentieth of the test images"
    if not (data_root()/'cifar100.h5').exists(): pytest.skip('cifar100.h5 is not in LTBOOK_DATA')
    whole = load_images('cifar100')
    some = replace(whole, test=whole.test.subset(np.arange(0, 10_000, 20)))
    monkeypatch.setattr(method, 'load_images', lambda name, root: some)
    r = load_run(run(recipe('mislas', 'cifar100', 100, 'smoke'), tmp_path))
    counts = r.predictions['train_counts']
    assert (
        counts.sum() == 10_847
        and counts[0] == 500
        and counts[-1] == 5
        and r.metrics['protocol']['group_sizes'] == dict(many=35, medium=35, few=30))
