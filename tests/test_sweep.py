"Sweeps: the grid counted by hand, what is finished by what the folders say, and the command line"
import itertools, json, os, re, signal, subprocess, sys, time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.methods.difficulty_net import ablation_grid
from ltbook.methods.method import Method, methods
from ltbook.cli.main import app
from ltbook.methods.recipe import recipe
from ltbook.runs.folder import find_runs
from ltbook.runs.keeping import owned
from ltbook.runs.notebook import execute
from ltbook.studies.grid import choose, is_row, method_grid
from ltbook.studies.sweep import how_it_ended, sweep
from ltbook.train.processes import child_env
from watching import numbers, processes


class TestGrid:
    def test_all_combinations(self):
        "Every cell of the grid is there once, and does what its name says"
        rows = {r['name']: r for r in ablation_grid()}
        for m, v, t, b in itertools.product(
            ('none', 'exact'),
            (0.0, 0.1, 0.3, 1.0, 3.0),
            ('relative', 'absolute'),
            ('cross_entropy', 'balanced_softmax')):
            s = recipe('difficulty_net', 'cifar100', **rows.pop(f'{m}, lambda {v:g}, {t}, {b}')['changes'])
            loss, s = s.loss, s.settings
            assert (s.meta_grad, s.driver_weight, loss, s.relative_input) == (m, v, b, True)
            assert s.target == (t if v else 'relative')
        assert [
            recipe(r['method'], 'cifar100', **r['changes']).settings.relative_input
            for r in rows.values()
            if r['method'] == 'difficulty_net'] == [False, False]
        found = {
            n: recipe('reweighting', 'cifar100', **r['changes'])
            for n, r in rows.items()
            if r['method'] == 'reweighting'}
        references = {n: r.settings for n, r in found.items()}
        assert {n: s.tau for n, s in references.items() if s.weights == 'cdb'} == {
            f'cdb tau {t}': t for t in (0.5, 1.0, 1.5, 2.0, 'dynamic')}
        assert sorted(r.loss for r in found.values() if r.settings.weights == 'none') == [
            'balanced_softmax',
            'cross_entropy',
            'equalization',
            'focal']
        assert references['class_balanced'].weights == 'class_balanced' and found['focal'].focal_gamma == 1

    def test_fresh_every_time(self):
        ablation_grid()[0]['changes']['loss'] = 'focal'
        assert ablation_grid()[0]['changes']['loss'] == 'cross_entropy'

    def test_every_sweep_of_every_method(self):
        for m in methods().values():
            for name in m.sweeps: assert all(r.recipe.dataset == 'digits' for r in method_grid(m.name, name))

    def test_no_sweeps_by_default(self):
        a, b = Method('a', '', '', {}), Method('b', '', '', {})
        assert a.sweeps == {} and a.sweeps is not b.sweeps


def ended(code):
    job = Future()
    job.set_result(code)
    return job


class Pretender:
    "An engine that leaves a finished folder behind, or whatever it was told to do with a run"
    def __init__(self, slots=1, does=None): self.slots, self.does, self.asked, self.closed = slots, does, [], False

    def submit(self, words, log):
        self.asked.append(log.parent)
        if self.does and (code := self.does(log.parent)) is not None: return ended(code)
        log.parent.mkdir(parents=True)
        (log.parent/'done.json').write_text('{}')
        return ended(0)

    def close(self): self.closed = True


class TestSweep:
    def rows(self, tmp_path, only=(), seeds=(0,), **changes):
        return choose(
            method_grid('difficulty_net', 'ablation', 'digits', profile='smoke', out=tmp_path, changes=changes,
                        seeds=seeds), only)

    @staticmethod
    def pretend(row):
        row.folder.mkdir(parents=True)
        (row.folder/'done.json').write_text('{}')

    def test_runs_what_is_missing(self, tmp_path):
        rows = self.rows(tmp_path, ['cdb'])
        self.pretend(rows[2])
        engine, again = Pretender(), Pretender()
        ends = sweep(rows, engine, say=lambda t: None)
        assert [ends[r.id] for r in rows] == ['run', 'run', 'finished', 'run', 'run'] and engine.closed
        assert engine.asked == [r.folder for i, r in enumerate(rows) if i != 2]
        assert {*sweep(rows, again, say=lambda t: None).values()} == {'finished'} and not again.asked

    def test_other_seed_is_another_run(self, tmp_path):
        for row in self.rows(tmp_path): row.finished or self.pretend(row)
        assert all(r.finished for r in self.rows(tmp_path))
        assert not any(r.finished for r in self.rows(tmp_path, seeds=(1,)) + self.rows(tmp_path, epochs=3))

    def test_same_recipe_runs_once(self, tmp_path):
        sweep(self.rows(tmp_path), Pretender(), say=lambda t: None)      # mkdir of a folder that is there would raise
        assert len(list(tmp_path.glob('*/*/*/done.json'))) == 48

    def test_half_finished_goes_on(self, tmp_path):
        row, = self.rows(tmp_path, ['focal'])
        row.folder.mkdir(parents=True)
        assert not row.finished

    def test_a_failure_stops_no_other(self, tmp_path):
        rows = self.rows(tmp_path, ['cdb'])
        ends = sweep(rows, Pretender(does=lambda f: 2 if f == rows[1].folder else None), say=lambda t: None)
        assert [ends[r.id] == 'run' for r in rows] == [True, False, True, True, True]
        with pytest.raises(RuntimeError, match='1 of 5 runs failed.*exit code 2.*run.log'): how_it_ended(ends)

    @pytest.mark.parametrize('times, ok', [(1, True), (2, False)])
    def test_a_killed_cell_is_tried_once_more(self, tmp_path, times, ok):
        rows, kills = self.rows(tmp_path, ['cdb']), []
        def does(f):
            if f == rows[0].folder and len(kills) < times: kills.append(f); return -9
        engine = Pretender(does=does)
        ends = sweep(rows, engine, say=lambda t: None)
        assert (ends[rows[0].id] == 'run') is ok and len(engine.asked) == 6

    def test_no_exit_code_counts_without_the_run(self, tmp_path):
        row, = self.rows(tmp_path, ['focal'])
        assert 'exit code 0' in sweep([row], Pretender(does=lambda f: 0), say=lambda t: None)[row.id]

    def test_somebody_elses_cell_is_left_for_the_end(self, tmp_path):
        rows = self.rows(tmp_path, ['cdb'])
        rows[0].folder.mkdir(parents=True)
        def does(f):
            if f == rows[0].folder: return (self_finish(), 0)[1]
        def self_finish(): (rows[0].folder/'done.json').write_text('{}')
        engine = Pretender(does=does)
        with owned(rows[0].folder): sweep(rows, engine, say=lambda t: None)
        assert engine.asked == [r.folder for r in rows[1:] + rows[:1]]

    def test_interrupted_it_closes_the_engine(self, tmp_path):
        def stop(f): raise KeyboardInterrupt
        engine = Pretender(does=stop)
        with pytest.raises(KeyboardInterrupt): sweep(self.rows(tmp_path), engine, say=lambda t: None)
        assert engine.closed

    @pytest.mark.parametrize(
        'changes',
        [dict(driver_wieght=1.0), dict(width=64), dict(dataset='cifar10')],
        ids=['typo', 'not of every method', 'a word'])
    def test_bad_changes(self, tmp_path, changes):
        with pytest.raises(UserError):
            self.rows(tmp_path, **changes)

    def test_is_row(self):
        "A finished run is found in the grid at any length, in one row or in two equal ones"
        def found(method, dataset='digits', **changes):
            return [
                r['name']
                for r in ablation_grid()
                if is_row(r, SimpleNamespace(recipe=recipe(method, dataset, **changes)))]
        assert found('difficulty_net', 'cifar100', imbalance=10, epochs=7) == [
            'exact, lambda 0.3, relative, cross_entropy']
        assert found('difficulty_net', driver_weight=0.0, meta_grad='none') == [
            'none, lambda 0, relative, cross_entropy',
            'none, lambda 0, absolute, cross_entropy']
        assert found('reweighting', weights='cdb', tau='dynamic') == ['cdb tau dynamic']
        assert found('reweighting', weights='inverse') == found('mislas') == []


class TestCommand:
    def call(self, *words):
        r = CliRunner().invoke(app, ['sweep', *words], env=dict(COLUMNS='160', FORCE_COLOR=''))
        return r.exit_code, r.output

    def test_runs_and_finds(self, tmp_path):
        words = (
            'difficulty_net',
            'ablation',
            '--profile',
            'smoke',
            '--set',
            'smoothing=false',
            '--only',
            'cross_entropy',
            '--only',
            'dynamic',
            '--out',
            str(tmp_path))
        only = words[:6] + ('--only', 'tau dynamic', '--only', 'none, lambda 0.3, relative, cross') + words[-2:]
        code, text = self.call(*only, '--bare')
        assert code == 0 and '2 run now, 0 finished before' in text
        assert '0 run now, 2 finished before' in self.call(*only, '--bare')[1]
        code, text = self.call(*words, '--dry-run')
        assert code == 0 and text.count('finished') == 2 and text.count('not run') == 21

    @pytest.mark.parametrize(
        'words, says',
        [
            (('supcon', 'ablation'), 'supcon has no sweeps'),
            (('difficulty_net',), 'Name the sweep of difficulty_net'),
            ((), 'Name what to run'),
            (('--method', 'mislas', '--set', 'lr'), '--set takes key=value'),
            (('--method', 'mislas', '--set', 'seed=1'), 'word of its own'),
            (('nowhere.yaml',), 'cannot be read as a grid'),
            (('difficulty_net', 'ablatoin'), 'Did you mean ablation'),
            (('difficulty_net', 'ablation', '--only', '53'), 'from 1 to 52')])
    def test_mistakes(self, words, says):
        code, text = self.call(*words)
        assert code == 2 and 'Traceback' not in text and says in text


WORDS = ('sweep', '--method', 'cross_entropy,balanced_softmax', '--profile', 'smoke', '--seeds', '0..1', '--bare',
         '--device', 'cpu', '--jobs', '2')


def begin(out, *words):
    return subprocess.Popen([sys.executable, '-m', 'ltbook', *WORDS, *words, '--out', str(out)], env=child_env(1),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for children in /proc')
def test_a_killed_cell_and_a_killed_sweep_change_no_number(tmp_path):
    "SIGKILL of a worker, then of the sweep; the same command ends with the same metrics"
    quiet = begin(tmp_path/'quiet')
    assert quiet.wait(300) == 0, quiet.stdout.read()
    first = begin(tmp_path/'hit')
    until = time.monotonic() + 60
    def born(): return [p for p, parent in processes('-m ltbook run ') if parent == first.pid]
    while not (cells := born()) and time.monotonic() < until: time.sleep(.05)
    os.kill(cells[0], signal.SIGKILL)
    for line in first.stdout:
        if 'killed, once more later' in line: break
    else: raise AssertionError('the sweep did not notice')
    first.kill()      # its cells live on, or end; whatever they do is taken into account
    first.wait()
    second = begin(tmp_path/'hit')
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and re.search(r'[0-4] run now, [0-4] finished before', said), said
    assert numbers(tmp_path/'hit') == numbers(tmp_path/'quiet') and len(numbers(tmp_path/'quiet')) == 4


def test_two_sweeps_on_one_folder_train_every_cell_once(tmp_path):
    both = [begin(tmp_path), begin(tmp_path)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(runs := find_runs(tmp_path)) == 4
    for r in runs: assert len(r.env['sessions']) == 1 and r.env['sessions'][0]['epochs_before'] == 0, r.env


def test_sixteen_kernels_at_once(tmp_path):
    "They share no port: each answers for itself"
    page = tmp_path/'a.ipynb'
    cell = dict(cell_type='code', id='a', metadata={}, outputs=[], execution_count=None,
                source='import os; os.getpid()')
    page.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell])))
    with ThreadPoolExecutor(16) as pool:
        pages = list(pool.map(lambda i: execute(page, tmp_path/f'{i}.ipynb', {}), range(16)))
    assert len({p['cells'][-1]['outputs'][0]['data']['text/plain'] for p in pages}) == 16
