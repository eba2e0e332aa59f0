"Many runs and other machines: what belongs together, what is removed, what a card or a version is in the way of"
import json, shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.checks import UserError
from ltbook.data.shift import PROTOCOLS
from ltbook.data.stores import ImageSet
from ltbook.data.random_views import FixedViews, RandomViews
from ltbook.methods.class_balanced_experts import expert_classes
from ltbook.methods.recipe import recipe, recipe_hash
from ltbook.runs.environment import command
from ltbook.runs.export import export, from_export
from ltbook.runs.folder import Run, load_run, verify_run
from ltbook.runs.published import beside_the_paper, differs, printed_for
from ltbook.runs.run import run
from ltbook.studies import engines, packs, shift as shifts, sweep as sweeps
from ltbook.studies.compare import compare, seeds_together
from ltbook.studies.grid import grid
from ltbook.studies.shift import cli_shift
from ltbook.train.files import write_json


def ltbook(*words): return CliRunner().invoke(app, [*map(str, words)], env=dict(COLUMNS='300'))


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "Two runs on digits, one of them with experts"
    out = tmp_path_factory.mktemp('out')
    for m in ('sade', 'cross_entropy'): run(recipe(m, 'digits', profile='smoke'), out, device='cpu')
    return out


def test_what_a_shift_leaves_behind_is_what_it_was_asked_for(out):
    place = next(out.glob('digits/sade/*'))
    cli_shift(place, draws=1, device='cpu')
    assert {'weights.csv', 'shift.png'} <= {f.name for f in (place/'shift').iterdir()}
    cli_shift(place, draws=0, adapt=False)
    assert not {'weights.csv', 'shift.png'} & {f.name for f in (place/'shift').iterdir()}
    assert not verify_run(place)[0]


def test_experts_adapt_to_images_as_the_network_knows_them(tmp_path, monkeypatch):
    place, made = run(recipe('sade', 'digits', profile='smoke', pad=2, flip=True), tmp_path, device='cpu'), []
    class Watched(RandomViews):
        def __init__(self, *given): super().__init__(*given); made.append(given[1:])
    monkeypatch.setattr(shifts, 'RandomViews', Watched)
    shifts.shift(place, draws=0, only=['uniform'], device='cpu')
    assert made == [(2, True, .2, None, None)]


@pytest.mark.parametrize('scale', [None, (.2, 1.)])
def test_views_have_the_side_of_the_network(scale):
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(6) % 2, ('a', 'b'))
    views = RandomViews(data, 0, True, side=24, scale=scale)
    fixed = FixedViews(views, np.random.default_rng(0))
    all_, some = fixed(np.arange(6))['x'], fixed(np.array([4, 1]))['x']
    assert all_.shape == (6, 3, 24, 24) and torch.equal(all_[[4, 1]], some)
    if scale is None:      # without chance about colours a view is a window of its image, or of its mirror image
        drawn = views.draw(6, np.random.default_rng(0))
        assert drawn['offset'].max() <= 8 and len(drawn['offset'].unique()) > 3


def test_large_sets_are_shifted_as_in_their_papers():
    tested, train = np.repeat(np.arange(10), 3), np.arange(10, 0, -1)
    a = shifts.make_shifts(tested, train, draws=4, protocol=PROTOCOLS['inaturalist2018'])
    assert [s.name for s in a[:5]] == ['forward-3', 'forward-2', 'uniform', 'backward-2', 'backward-3']
    assert {s.ratio for s in a if s.setting == 'B'} == {1., 3.}
    drawn = np.stack([s.q for s in a if s.component == 'uniform' and s.setting == 'B'])
    assert abs(drawn - .1).max() < .01, 'a concentration of a hundred thousand'
    kept = [int(s.counts.min()) for s in shifts.make_shifts(
        tested, train, (100., ), 20, protocol=replace(PROTOCOLS['inaturalist2018'], concentration=1.))]
    assert 0 in kept[3:], 'a class may have no image'


def test_cards_are_shared_out(monkeypatch):
    "Four cards: four cells at once; one that was named: one; somebody's choice of cards is kept"
    monkeypatch.setattr(engines, 'find_device', lambda d: torch.device('cuda:0' if d in ('auto', 'cuda') else d))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert engines.side_by_side(8, 'auto') == (4, None, 4) and engines.side_by_side(8, 'cuda', 6) == (6, None, 4)
    assert engines.side_by_side(8, 'cuda:1') == (1, None, 0)
    def cards(slots):
        place = engines.Local(slots, cards=2)
        return [place.places.get()['CUDA_VISIBLE_DEVICES'] for _ in range(slots)]
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert cards(3) == ['0', '1', '0']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
    assert cards(3) == ['2', '3', '2']


def test_a_pack_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    cells, told, begun = grid('mislas', profile='smoke', seeds='0..4', changes=dict(lr=[10., .1]), out=tmp_path), [], []
    def fails(recipes, *_):
        begun.append((next(iter(recipes.values())).lr, len(recipes)))
        return {s: RuntimeError('the loss is not finite') if r.lr > 1 else tmp_path for s, r in recipes.items()}
    monkeypatch.setattr(packs, 'run_packed', fails)
    packs.pack_first(cells, say=told.append, most=3)
    assert begun == [(10., 3), (10., 2), (.1, 3), (.1, 2)] and len(told) == 5
    monkeypatch.setattr(packs, 'run_packed', lambda recipes, *_: {s: KeyboardInterrupt() for s in recipes})
    with pytest.raises(KeyboardInterrupt): packs.pack_first(cells)


def test_a_cell_that_cannot_start_does_not_end_the_others(tmp_path):
    cells = grid('mislas', profile='smoke', seeds='0..2', out=tmp_path)
    class Engine:
        slots = 3
        def submit(self, words, log):
            job = Future()
            if '1' in words[words.index('--seed') + 1]: job.set_exception(PermissionError(13, 'Permission denied', 'f'))
            else:
                log.parent.mkdir(parents=True)
                (log.parent/'done.json').write_text('{}')
                job.set_result(0)
            return job
        def close(self): pass
    ends = sweeps.sweep(cells, Engine(), say=lambda t: None)
    assert [*ends.values()].count('run') == 2 and 'failed: Permission denied' in ends[cells[1].id]


@pytest.mark.parametrize('method,dataset,stage,top1', [
    ('sade', 'imagenet_lt', 'stage1', 58.8), ('sade', 'inaturalist2018', 'stage1', 72.9),
    ('difficulty_net', 'places_lt', 'stage2', 41.7)])
def test_large_sets_stand_beside_what_was_printed(out, method, dataset, stage, top1):
    r, m = recipe(method, dataset, profile='paper'), load_run(next(out.glob('digits/sade/*'))).metrics['final']
    made = Run(Path('.'), r, {stage: m, 'final': m | dict(stage=stage)}, {})
    rows = printed_for(made, stage)
    assert set(rows[(rows.split == 'all') & (rows.metric == 'top1')].value) == {top1}
    table = compare([made])
    assert 'not run' not in set(table[(table.method == method) & (table.dataset == dataset)].verdict)
    other = replace(made, recipe=r.model_copy(update=dict(backbone='resnet10')))
    assert method == 'difficulty_net' or beside_the_paper(other).empty, 'printed for another network'


def test_weights_to_begin_with_make_no_other_recipe():
    "Places-LT begins with a file of weights of ImageNet, whatever it is called"
    for method in ('mislas', 'difficulty_net', 'class_balanced_experts'):
        r = recipe(method, 'places_lt', profile='paper', init='mine.pth')
        assert differs(Run(Path('.'), r, {}, {}), 'stage2') == ''
    r = recipe('mislas', 'imagenet_lt', profile='paper', init='mine.pth')
    assert 'init mine.pth' in differs(Run(Path('.'), r, {}, {}), 'stage2')


def test_equal_counts_make_three_experts():
    r = recipe('class_balanced_experts', 'cifar100', 1, 'paper')
    assert [len(k) for k in expert_classes(r, np.full(100, 500))] == [34, 33, 33]


def test_seeds_of_other_data_stay_apart_and_a_run_is_one_seed():
    def made(seed, data): return Run(Path('.'), recipe('mislas', 'birds', profile='short', seed=seed),
                                     dict(protocol=dict(data=data)), {})
    a, b = dict(train='1', test='2'), dict(train='3', test='2')
    groups = seeds_together([made(0, a), made(1, b), made(2, a), made(3, None), made(0, a)])
    assert [[r.recipe.seed for r in g] for g in groups] == [[0, 2, 3], [1]]


def test_a_run_of_a_newer_version_is_not_called_damaged(out, tmp_path):
    old = next(out.glob('digits/cross_entropy/*'))
    place = tmp_path/'digits'/'cross_entropy'/old.name
    shutil.copytree(old, place)
    write_json(place/'recipe.json', json.loads((place/'recipe.json').read_text()) | dict(of_tomorrow=1))
    write_json(place/'env.json', json.loads((place/'env.json').read_text()) | dict(ltbook='9.9'))
    with pytest.raises(UserError) as e: load_run(place)
    assert 'ltbook 9.9' in str(e.value) and 'of_tomorrow' in str(e.value) and 'emove' not in str(e.value)
    (place/'recipe.json').write_text('{')
    with pytest.raises(UserError, match='damaged.*remove the folder'): load_run(place)


def test_an_export_of_another_method_or_version_is_a_sentence(out, tmp_path):
    made = export(load_run(next(out.glob('digits/cross_entropy/*'))), tmp_path/'made')
    config = json.loads((made/'config.json').read_text())
    for change, told in ((dict(method='mine'), '--import'), (dict(of_tomorrow=1), 'ltbook 9.9')):
        (made/'config.json').write_text(json.dumps(config | dict(ltbook='9.9', recipe=config['recipe'] | change)))
        with pytest.raises(UserError, match=told): from_export(made)


@pytest.mark.parametrize('words,told', [
    (('--seeds', '0..4'), 'write seeds into it'), (('--profile', 'smoke'), 'write profile'),
    (('--set', 'lr=.5'), 'write set'), (('--dataset', 'digits'), 'write dataset')])
def test_a_grid_file_says_it_all(tmp_path, words, told):
    (tmp_path/'g.yaml').write_text('method: mislas\ndataset: digits\n')
    p = ltbook('sweep', tmp_path/'g.yaml', *words, '--dry-run')
    assert p.exit_code == 2 and told in p.output
    assert '1 cell' in ltbook('sweep', tmp_path/'g.yaml', '--dry-run').output


def test_a_sweep_of_one_imbalance():
    p = ltbook('sweep', 'difficulty_net', 'ablation', '--imbalance', '100,50', '--dry-run')
    assert p.exit_code == 2 and 'one imbalance' in p.output


def test_settings_of_an_engine(tmp_path, monkeypatch):
    "Halves of a card, with and without a nought; no half processors"
    import sys
    class Ray:
        def __init__(self, out, gpus: float = 0, cpus: int = 2, address: str = ''): self.gpus, self.cpus = gpus, cpus
    monkeypatch.setitem(sys.modules, 'ltbook.studies.on_ray', SimpleNamespace(Ray=Ray))
    for given in ('.5', .5, '0.5'): assert engines.make_engine('ray', dict(gpus=given), tmp_path, 1).gpus == .5
    with pytest.raises(UserError, match='cpus of the engine ray is a whole number'):
        engines.make_engine('ray', dict(cpus=.5), tmp_path, 1)
    with pytest.raises(UserError, match='gpus of the engine ray is a number'):
        engines.make_engine('ray', dict(gpus='many'), tmp_path, 1)


def test_a_report_of_a_pattern(out, tmp_path):
    assert ltbook('report', 'digits/*', 'digits/sade/*', '--out', out, '--to', tmp_path/'r.html').exit_code == 0
    assert (tmp_path/'r.html').read_text().count('<details id=') == 2
    assert "called 'birds/*'" in ltbook('report', 'birds/*', '--out', out).output


def test_numbers_that_are_names_and_numbers_that_are_long():
    assert grid('mislas', '2024', profile='smoke')[0].recipe.dataset == '2024'
    r = recipe('mislas', 'digits', 100/3)
    words = command(r).split()
    again = recipe('mislas', 'digits', float(words[words.index('--imbalance') + 1]))
    assert recipe_hash(again) == recipe_hash(r)
    assert '--imbalance 100 ' in command(recipe('mislas', 'digits', 100.))


def test_what_was_never_run_may_be_asked_for(out):
    p = ltbook('compare', '--missing', '--dataset', 'imagenet_lt', '--out', out)
    assert p.exit_code == 0 and 'not run' in p.output
