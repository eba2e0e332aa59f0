"The benchmark as a table, several seeds side by side, and what an import costs"
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.measure.calibration import classwise_calibration_error
from ltbook.measure.report import measures
from ltbook.bench import table as bench
from ltbook.studies import engines
from ltbook.studies.grid import parse_seeds
from ltbook.bench.testing import plain_measures
from ltbook.bench.training import IMPORTS, NotRun, child, not_run, versus
from ltbook.bench.time_to_accuracy import evidence
from ltbook.cli.main import app
from ltbook.runs.folder import find_runs
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {'matplotlib', 'seaborn', 'papermill', 'nbdev', 'nbformat', 'nbclient', 'IPython', 'sklearn', 'torchmetrics'}
KEYS = {'name', 'unit', 'status', 'baseline', 'ours', 'ratio', 'baseline_spread', 'ours_spread', 'better'}
ASKED = {
    'train_mixup',
    'train_mixup_two_runs',
    'step_bilevel',
    'step_three_experts',
    'augment_crop_flip',
    'augment_autoaugment',
    'time_to_paper_accuracy'}


@pytest.fixture
def few(monkeypatch):
    "A table that takes no time: one good row, one that fails, one without a number"
    def broken(seconds): raise RuntimeError('out of order\nand more')
    monkeypatch.setattr(
        bench,
        'ROWS',
        dict(
            good=('images/s', lambda s: versus([1.0, 3.0, 2.0], [4.0, 4.0, 5.0], n=7)),
            broken=('s', broken),
            later=('s', not_run('not today')),
            last=('ms', lambda s: versus([4.0], [1.0], 'lower'))))
    monkeypatch.setattr(bench, 'GROWTH', dict(images=lambda s: [dict(at=10, unit='s', value=.5)], classes=broken))


def test_rows_have_their_keys_and_one_failure_stops_nothing(few):
    result = bench.bench(.01)
    rows = {r['name']: r for r in result['rows']}
    assert [r['status'] for r in rows.values()] == ['measured', 'failed', 'not run', 'measured'] and all(
        KEYS <= set(r) for r in rows.values())
    assert (
        rows['good']['baseline'],
        rows['good']['ours'],
        rows['good']['ratio'],
        rows['good']['baseline_spread'],
        rows['good']['n']) == (2.0, 4.0, 2.0, [1.0, 3.0], 7)
    assert (
        rows['broken']['reason'] == 'RuntimeError: out of order'
        and rows['later']['reason'] == 'not today'
        and rows['later']['ratio'] is None)
    assert result['growth']['images']['value'][0]['value'] == .5 and result['growth']['classes']['status'] == 'failed'
    assert {'device', 'threads', 'versions', 'date', 'commit'} <= set(result) and torch.__version__.startswith(
        result['versions']['torch'])


def test_the_rows_of_the_table():
    assert ASKED <= set(bench.ROWS)
    for row in bench.run_rows({k: v for k, v in bench.ROWS.items() if k in ('augment_crop_flip', 'aggregation')}, .05):
        assert (
            row['status'] == 'measured'
            and KEYS <= set(row)
            and row['ratio'] == pytest.approx(row['ours'] / row['baseline']))
        assert row['ours_spread'][0] <= row['ours'] <= row['ours_spread'][1]


def test_what_is_not_run_says_why(tmp_path, monkeypatch):
    with pytest.raises(NotRun, match='no finished run'): evidence(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('gpu_mislas_200_epochs', 'gpu_mislas_8_seeds', 'gpu_photographs', 'gpu_cifar_reproduction'):
        with pytest.raises(NotRun, match='no CUDA device'): bench.ROWS[name][1](1.)


def test_files(few, tmp_path, capsys):
    bench.cli_bench(.01, out=tmp_path)
    name = bench.slug(bench.processor()['name'])
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == [f'{name}.json', f'{name}.png']
        and (tmp_path/f'{name}.png').read_bytes()[:4] == b'\x89PNG')
    assert [r['name'] for r in json.loads((tmp_path/f'{name}.json').read_text())['rows']] == [
        'good',
        'broken',
        'later',
        'last']
    text = capsys.readouterr().out
    assert 'broken' in text and 'not today' in text and '2 ' in text
    bench.cli_bench(.01, ('good',), as_json=True)
    assert json.loads(capsys.readouterr().out)['rows'][0]['ratio'] == 2


def test_json_is_whole_or_not_there(few, tmp_path, monkeypatch):
    bench.bench(.01, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(self, *a, **k):
        self.write_bytes(b'{"rows": [')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(UserError, match='No space left'): bench.bench(.01, out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_part_of_the_table_replaces_no_file(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.cli_bench(.01, ('good,later',))
    assert not list(tmp_path.iterdir())
    for words in (['--only', 'god'], ['--seconds', '0'], ['--seconds', '-1']):
        r = CliRunner().invoke(app, ['bench', *words])
        assert r.exit_code == 2 and 'Traceback' not in r.output, r.output


def test_measures_equal_the_plain_loops():
    g = torch.Generator().manual_seed(1)
    z, y = 2*torch.randn(3000, 40, generator=g), torch.randint(40, (3000,), generator=g)
    ours = measures(z, y, np.geomspace(500, 5, 40).astype(int))
    for k, v in plain_measures(z, y).items(): assert ours[k] == pytest.approx(v, abs=1e-6), k
    assert classwise_calibration_error(z, y, logits=True) == classwise_calibration_error(z.softmax(1), y)


def test_import_is_light():
    "The package beside torch, and no plotting or notebook package in what trains"
    p = subprocess.run(
        [
            sys.executable,
            '-c',
            f'{IMPORTS}\nimport sys, ltbook.cli.sweep, ltbook.studies.sweep; print(*({HEAVY!r} & set(sys.modules)))'],
        cwd=ROOT,
        capture_output=True,
        text=True)
    assert p.returncode == 0, p.stderr
    times, heavy = p.stdout.split('\n')[:2]
    torch_alone, package, training = map(float, times.split())
    print(f'torch {torch_alone:.2f} s, ltbook {package:.4f} s beyond, what a training needs {training:.2f} s more')
    assert not heavy and package <= 0.3


def test_child_tells_what_failed():
    with pytest.raises(RuntimeError, match='ZeroDivisionError'): child('1/0')


@pytest.mark.parametrize(
    'text, wanted', [('0..7', range(8)), ('0,1,2', range(3)), ('5', [5]), (' 2..3 , 9', [2, 3, 9])])
def test_seeds_are_read(text, wanted):
    assert parse_seeds(text) == tuple(wanted)


@pytest.mark.parametrize(
    'text', ['', ',', '1-3', '7..0', '0,0', '-1', '0..', '..3', '1.5', '0...3', '0..99999999', 'x'])
def test_wrong_seeds(text):
    with pytest.raises(UserError, match='--seeds'):
        parse_seeds(text)
    r = CliRunner().invoke(app, ['run', 'crt', 'digits', '--seeds', text])
    assert r.exit_code == 2 and 'Traceback' not in r.output


@pytest.mark.parametrize(
    'words',
    [
        ['--seed', '0', '--seeds', '0..1'],
        ['--set', 'seed=3', '--seeds', '0..1'],
        ['--seeds', '0..1', '--set', 'lr=-1'],
        ['--seeds', '0..1', '--imbalance', '0.1']])
def test_mistakes_show_before_anything_starts(words, tmp_path):
    r = CliRunner().invoke(app, ['run', 'cross_entropy', 'digits', '--out', str(tmp_path), *words])
    assert r.exit_code == 2 and 'Error:' in r.output and not list(tmp_path.iterdir())


def test_two_seeds_at_once_equal_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, 'cores', lambda: 2)
    threads = torch.get_num_threads()
    words = [
        'run',
        'cross_entropy',
        'digits',
        '--profile',
        'smoke',
        '--bare',
        '--device',
        'cpu',
        '--seeds',
        '0,1',
        '--out',
        str(tmp_path/'both')]
    r = CliRunner().invoke(app, words, env=dict(COLUMNS='200'))
    assert r.exit_code == 0 and '2 of 2 seeds' in r.output and 'mean' in r.output, r.output
    both = find_runs(tmp_path/'both')
    torch.set_num_threads(1)
    try: alone = [run(recipe('cross_entropy', profile='smoke', seed=s), tmp_path/'alone', device='cpu') for s in (0, 1)]
    finally: torch.set_num_threads(threads)
    assert [r.recipe.seed for r in both] == [0, 1] and both[0].metrics['final']['nll'] != both[1].metrics[
        'final']['nll']
    for b, a in zip(both, alone):
        assert (
            b.metrics == json.loads((a/'metrics.json').read_text())
            and b.id in r.output
            and b.env['threads'] == 1)
    monkeypatch.setattr(engines, 'start', lambda *a: pytest.fail('a finished seed was started again'))
    assert CliRunner().invoke(app, words).exit_code == 0


def test_a_seed_that_fails_stops_no_other(tmp_path, monkeypatch):
    done = run(recipe('cross_entropy', profile='smoke', seed=0), tmp_path/'elsewhere', device='cpu')
    target = tmp_path/'out'/done.relative_to(tmp_path/'elsewhere')
    lines = {
        1: 'import sys; sys.exit("broken")',
        0: f'import shutil; shutil.copytree({str(done)!r}, {str(target)!r}, dirs_exist_ok=True)'}
    begin = engines.start
    seed_of = lambda words: int(words[words.index('--seed') + 1])
    monkeypatch.setattr(engines, 'start', lambda c, *more: begin([sys.executable, '-c', lines[seed_of(c)]], *more))
    words = [
        'run',
        'cross_entropy',
        'digits',
        '--profile',
        'smoke',
        '--bare',
        '--device',
        'cpu',
        '--seeds',
        '1,0',
        '--out',
        str(tmp_path/'out')]
    r = CliRunner().invoke(app, words, env=dict(COLUMNS='200'))
    assert r.exit_code == 1 and '1 of 2 seeds' in r.output, r.output
    assert '1 of 2 runs failed: digits/cross_entropy/1-' in r.output
    assert [x.recipe.seed for x in find_runs(tmp_path/'out')] == [0]
    assert 'broken' in next((tmp_path/'out').glob('*/*/1-*/run.log')).read_text()
