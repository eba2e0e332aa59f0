"Sweeps: the grid counted by hand, what is finished by what the folders say, and the command line"
import itertools
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.methods.difficulty_net import ablation_grid
from ltbook.methods.method import Method, methods
from ltbook.cli.main import app
from ltbook.methods.recipe import recipe
from ltbook.studies.sweep import choose, is_row, listing, sweep, sweep_rows


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
            for name in m.sweeps: assert all(r.recipe.dataset == 'digits' for r in sweep_rows(m.name, name))

    def test_no_sweeps_by_default(self):
        a, b = Method('a', '', '', {}), Method('b', '', '', {})
        assert a.sweeps == {} and a.sweeps is not b.sweeps


class TestSweep:
    def rows(self, tmp_path, only=(), **changes):
        return choose(
            sweep_rows('difficulty_net', 'ablation', 'digits', profile='smoke', out=tmp_path, changes=changes),
            only)

    @staticmethod
    def pretend(row):
        row.folder.mkdir(parents=True)
        (row.folder/'done.json').write_text('{}')

    def test_runs_what_is_missing(self, tmp_path):
        rows, asked = self.rows(tmp_path, ['cdb']), []
        self.pretend(rows[2])
        def start(row): asked.append(row.name); self.pretend(row)
        assert [w for _, w in sweep(rows, start)] == ['run', 'run', 'finished', 'run', 'run']
        assert asked == ['cdb tau 0.5', 'cdb tau 1.0', 'cdb tau 2.0', 'cdb tau dynamic']
        assert [w for _, w in sweep(rows, start)] == ['finished']*5 and len(asked) == 4

    def test_other_seed_is_another_run(self, tmp_path):
        for row in self.rows(tmp_path): row.finished or self.pretend(row)
        assert {s for _, _, s, _ in listing(self.rows(tmp_path))} == {'finished'}
        assert (
            {s for _, _, s, _ in listing(self.rows(tmp_path, seed=1))}
            == {s for _, _, s, _ in listing(self.rows(tmp_path, epochs=3))}
            == {'not run'})

    def test_same_recipe_runs_once(self, tmp_path):
        for _ in sweep(self.rows(tmp_path), self.pretend): pass      # mkdir of a folder that is there would raise
        assert len(list(tmp_path.glob('*/*/*/done.json'))) == 48

    def test_half_finished_goes_on(self, tmp_path):
        row, = self.rows(tmp_path, ['focal'])
        row.folder.mkdir(parents=True)
        assert not row.finished and listing([row])[0][2] == 'not run'

    def test_failure_stops(self, tmp_path):
        def fail(row): raise UserError('no disk')
        with pytest.raises(UserError, match='no disk'): list(sweep(self.rows(tmp_path), fail))

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
            'digits',
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
        only = words[:7] + ('--only', 'tau dynamic', '--only', 'none, lambda 0.3, relative, cross') + words[-2:]
        code, text = self.call(*only, '--bare')
        assert code == 0 and '2 run now, 0 finished before' in text
        assert '0 run now, 2 finished before' in self.call(*only, '--bare')[1]
        code, text = self.call(*words, '--dry-run')
        assert code == 0 and text.count('finished') == 2 and text.count('not run') == 21

    @pytest.mark.parametrize(
        'words, says',
        [
            (('ride', 'ablation'), 'ride has no sweeps'),
            (('difficulty_net', 'ablatoin'), 'Did you mean ablation'),
            (('difficulty_net', 'ablation', 'digits', '--only', '53'), 'from 1 to 52')])
    def test_mistakes(self, words, says):
        code, text = self.call(*words)
        assert code == 2 and 'Traceback' not in text and says in text
