"Many runs and other machines: what belongs together, what is removed, what a card or a version is in the way of"
import errno, json, os, shlex, shutil
from concurrent.futures import Future
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.checks import UserError
from ltbook.data.shift import PROTOCOLS
from ltbook.data.stores import ImageSet
from ltbook.data.random_views import FixedViews, RandomViews
from ltbook.methods.class_balanced_experts import expert_classes
from ltbook.methods.method import context_of
from ltbook.methods.recipe import recipe, recipe_hash
from ltbook.runs.classifier import classifier_of
from ltbook.runs.cost import cost, image_bytes
from ltbook.runs.environment import command, go_on
from ltbook.runs.export import export, from_export, model_card
from ltbook.runs.folder import Run, load_run, verify_run
from ltbook.runs.published import beside_the_paper, differs, printed_for
from ltbook.runs.run import run
from ltbook.studies import engines, packs, shift as shifts, sweep as sweeps
from ltbook.studies.compare import compare, seeds_together
from ltbook.studies.grid import grid
from ltbook.studies.leaderboard import leaderboard, run_ids
from ltbook.studies.report import anchor, report
from ltbook.studies.shift import cli_shift
from ltbook.train.files import write_json
from ltbook.train.ranks import Sharing


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


def test_a_blank_in_the_name_of_a_data_set(out, tmp_path):
    one = load_run(next(out.glob('digits/cross_entropy/*')))
    run = replace(one, recipe=one.recipe.model_copy(update=dict(dataset='my birds')),
                  path=Path(shutil.copytree(one.path, tmp_path/'my birds'/'cross_entropy'/one.path.name)))
    odd = ['x-12345678 y/mislas/0-abcdefab', 'b/c/1-12345678']
    assert run_ids(f'{one.id} {run.id}') == [one.id, run.id] and run_ids('') == [] and run_ids(' '.join(odd)) == odd
    page = report([one, run], tmp_path/'r.html').read_text()
    assert anchor(run.id) in page and f'{run.id}: ' in page


def test_a_report_says_what_is_a_search(out, tmp_path):
    one = load_run(next(out.glob('digits/cross_entropy/*')))
    held = replace(one, recipe=one.recipe.model_copy(update=dict(hold_out=5)), path=one.path)
    assert 'All are searches' in report([held], tmp_path/'r.html').read_text()
    assert 'All are searches' not in report([one], tmp_path/'r.html').read_text()


@pytest.mark.parametrize('words,sentence', [
    (['sweep', 'GRID', 'ablation'], 'leave ablation out'), (['sweep', '--method', 'mislas', '--only', '²'], 'fits'),
    (['sweep', '--method', 'mislas', '--set', 'lr=.1', '--set', 'lr=.2'], 'lr=.1,.2'),
    (['sweep', 'EMPTY'], 'at least a line'), (['sweep', 'NOTHING'], 'is empty'), (['sweep', 'NUMBER'], '1'),
    (['compare', '--leaderboard', '--missing'], 'leave --missing'), (['compare', '--leaderboard', '--measures', 'few'],
                                                                    'leave --missing'),
    (['doctor', 'digits', 'mine'], 'One name is enough'), (['doctor', 'digits', '--deep'], '--images'),
    (['new', 'method', '2birds'], 'begin with a letter'), (['run', 'mislas', '--import', 'a:b/x.py'], 'without')])
def test_one_clear_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = dict(GRID='method: mislas', EMPTY='[]', NOTHING='{method: mislas, set: {lr: []}}',
                 NUMBER='{method: mislas, set: {1: 2}}')
    for name, text in files.items(): (tmp_path/f'{name}.yaml').write_text(text)
    (tmp_path/'a:b').mkdir()
    (tmp_path/'a:b'/'x.py').touch()
    got = ltbook(*(f'{w}.yaml' if w in files else w for w in words))
    assert got.exit_code == 2 and sentence in got.output and 'Traceback' not in got.output, got.output
    assert len(got.output.strip().splitlines()) == 1


@pytest.mark.parametrize('words', [['shift', 'x', '--seed', '-1'],
                                   ['pack', 'x', '--images', 'a', '--lists', 'b', '--workers', '-1']])
def test_numbers_out_of_range(words):
    got = ltbook(*words)
    assert got.exit_code == 2 and 'Invalid value' in got.output and words[-2] in got.output


def test_commands_go_on_with_batches_cut_as_they_were(tmp_path):
    place = tmp_path/'digits'/'mislas'/'0-00000000'
    place.mkdir(parents=True)
    write_json(place/'recipe.json', json.loads(recipe('mislas', 'digits').model_dump_json()))
    write_json(place/'sessions.json', dict(sessions=[dict(sharing=Sharing(1, 4, 'each').about(128))]))
    assert ' --accumulate 4 --batchnorm each --out ' in go_on(place) and '--processes' not in go_on(place)


def test_a_list_in_brackets_is_one_value():
    several = grid('depth_balpoe', changes=dict(taus='[0,1,2],[1,1,1]'))
    assert [c.recipe.settings.taus for c in several] == [(0, 1, 2), (1, 1, 1)]
    [cell] = grid('mislas', changes=dict(drops='[.6,.8]'))
    assert cell.recipe.drops == recipe('mislas', drops='[.6,.8]').drops == (.6, .8)


@pytest.mark.parametrize('number,advice', [(errno.ENOSPC, 'room'), (errno.EROFS, 'written'), (errno.EACCES, 'may use'),
                                           (errno.EEXIST, 'another name')])
def test_advice_by_what_went_wrong(number, advice, monkeypatch):
    def fails(*_, **__): raise OSError(number, 'it went wrong')
    monkeypatch.setattr('ltbook.runs.folder.scan_runs', fails)
    got = ltbook('show')
    assert got.exit_code == 2 and advice in got.output and 'None' not in got.output


def test_what_is_left_of_a_removal_is_no_run(out, tmp_path, monkeypatch):
    place = tmp_path/'digits'/'cross_entropy'/next(out.glob('digits/cross_entropy/*')).name
    shutil.copytree(next(out.glob('digits/cross_entropy/*')), place)
    monkeypatch.setattr('shutil.rmtree', lambda p: None)      # cut off
    assert ltbook('rm', '-y', place, '--out', tmp_path).exit_code == 0
    assert place.exists() and 'not finished' in ltbook('show', '--out', tmp_path).output


def test_a_link_is_removed_and_what_it_leads_to_stays(out, tmp_path):
    place = next(out.glob('digits/cross_entropy/*'))
    link = tmp_path/'digits'/'cross_entropy'/place.name
    link.parent.mkdir(parents=True)
    link.symlink_to(place.absolute())
    got = ltbook('rm', '-y', link, '--out', tmp_path)
    assert got.exit_code == 0 and 'the link' in got.output and not link.exists() and (place/'done.json').exists()


def test_programs_hear_what_is_left_out(out, tmp_path, capsys):
    shutil.copytree(out, tmp_path/'o')
    (next((tmp_path/'o').glob('digits/sade/*'))/'metrics.json').write_text('{')
    for words in (['compare', '--leaderboard', '--format', 'csv'], ['show', '--json']):
        app([*words, '--out', str(tmp_path/'o')], standalone_mode=False)
        told = capsys.readouterr()
        assert 'left out' in told.err and told.out and 'left out' not in told.out


def test_the_first_stage_is_taken_over_from_where_it_lies(out, tmp_path):
    one = load_run(next(out.glob('digits/cross_entropy/*')))
    shutil.copytree(one.path, tmp_path/one.id)
    took = run(recipe('crt', 'digits', profile='smoke', start=one.id), tmp_path, device='cpu', start=one)
    words = shlex.split(load_run(took).again)
    assert Path(words[words.index('--from') + 1]).samefile(tmp_path/one.id)


def test_time_of_all_sittings(out):
    one = load_run(next(out.glob('digits/cross_entropy/*')))
    resumed = replace(one, env=one.env | dict(wall_seconds=10., train_seconds=90.))
    [cell] = [c for c in grid('cross_entropy', 'digits', profile='smoke') if c.id == one.id]
    assert sweeps.seconds_of([resumed])(cell) == 90.
    later = resumed.recipe.model_copy(update=dict(start='digits/mixup/0-00000000'))
    assert sweeps.seconds_of([replace(resumed, recipe=later)])(cell) == 10.


@pytest.mark.parametrize('key', ['recipe', 'classes', 'parts', 'counts', 'mean', 'shape'])
def test_a_config_that_was_changed(out, tmp_path, key):
    place = export(load_run(next(out.glob('digits/cross_entropy/*'))), tmp_path/'x')
    config = json.loads((place/'config.json').read_text())
    config.pop(key)
    write_json(place/'config.json', config)
    with pytest.raises(UserError, match='export the run once more'): from_export(place)


def test_a_model_card_of_any_name(out, tmp_path):
    yaml = pytest.importorskip('yaml')
    one = load_run(next(out.glob('digits/cross_entropy/*')))
    named = replace(one, recipe=one.recipe.model_copy(update=dict(dataset='birds: north, a')))
    card = yaml.safe_load(model_card(named, classifier_of(one), 'cc: by').split('---')[1])
    [result] = card['model-index'][0]['results']
    assert result['dataset'] == dict(name='birds: north, a', type='birds: north, a') and card['license'] == 'cc: by'


def test_a_picture_with_a_name_that_is_no_utf8(out, tmp_path):
    pictures, name = tmp_path/'p', os.fsdecode(b'caf\xe9.png')
    pictures.mkdir()
    try: Image.new('L', (8, 8)).save(pictures/name)
    except OSError: pytest.skip('this file system takes such names not')
    got = ltbook('predict', next(out.glob('digits/cross_entropy/*')), pictures, '--to', tmp_path/'t.csv')
    assert got.exit_code == 0 and len((tmp_path/'t.csv').read_text().splitlines()) == 2, got.output


def test_runs_of_a_method_from_elsewhere_are_as_written(out, tmp_path):
    place = shutil.copytree(next(out.glob('digits/cross_entropy/*')), tmp_path/'digits'/'mine'/'0-00000000')
    listed = json.loads((place/'done.json').read_text())
    write_json(place/'recipe.json', json.loads((place/'recipe.json').read_text()) | dict(method='mine'))
    listed['run'] = 'digits/mine/0-00000000'
    listed['files']['recipe.json'] = sha256((place/'recipe.json').read_bytes()).hexdigest()
    write_json(place/'done.json', listed)
    faults, notes = verify_run(place)
    assert faults == [] and 'add --import' in notes and 'files as written' in notes
    assert ltbook('verify', '--out', tmp_path).exit_code == 0
    moved = shutil.copytree(place, tmp_path/'digits'/'mine'/'1-00000000')
    assert verify_run(moved)[0] and ltbook('verify', '--out', tmp_path).exit_code == 1
    shutil.rmtree(moved)
    (place/'env.json').write_text('{}')
    assert verify_run(place)[0] and ltbook('verify', '--out', tmp_path).exit_code == 1


def test_what_is_not_finished_is_listed_with_its_command(tmp_path, monkeypatch):
    monkeypatch.delenv('LTBOOK_IMPORT', raising=False)
    class Cut(Exception): pass
    def stop(row): raise Cut
    with pytest.raises(Cut):
        run(recipe('mislas', 'digits', profile='smoke', lr=.06), tmp_path, device='cpu', report=stop)
    words = 'ltbook run mislas digits --imbalance 20 --profile smoke --seed 0 --set lr=0.06 --out '
    assert f'go on with: {words}{tmp_path}' in ltbook('show', '--out', tmp_path).output
    [place] = tmp_path.glob('digits/mislas/*')
    got = ltbook('eval', place, '--out', tmp_path)
    assert got.exit_code == 2 and words in got.output
    monkeypatch.chdir(place)      # a short name of it
    assert words in ltbook('eval', '.').output
    assert ltbook(*words.split()[1:], tmp_path, '--bare').exit_code == 0 and (place/'done.json').exists()


def test_a_first_stage_from_elsewhere_is_said(out, tmp_path):
    one, said = load_run(next(out.glob('digits/cross_entropy/*'))), []
    run(recipe('crt', 'digits', profile='smoke', start=one.id), tmp_path, device='cpu', start=one, say=said.append)
    assert f'The first stage is taken over from {one.id}.' in said
    assert 'from cross_entropy' in leaderboard([load_run(next(tmp_path.glob('digits/crt/*')))]).changes[0]


def test_predict_says_what_works_without_data(out, tmp_path, monkeypatch):
    picture = tmp_path/'p.png'
    Image.new('L', (8, 8)).save(picture)
    def gone(*_): raise UserError('These are other data.')
    monkeypatch.setattr('ltbook.runs.classifier.make_context', gone)
    got = ltbook('predict', next(out.glob('digits/cross_entropy/*')), picture)
    assert got.exit_code == 2 and 'other data' in got.output and 'ltbook export' in got.output


def test_warnings_of_runs_that_a_sweep_does_not_ask_for(out, tmp_path):
    shutil.copytree(out, tmp_path/'o')
    (next((tmp_path/'o').glob('digits/sade/*'))/'metrics.json').write_text('{')
    got = ltbook('sweep', '--method', 'cross_entropy', '--profile', 'smoke', '--dry-run', '--out', tmp_path/'o')
    assert got.exit_code == 0 and 'Warning' not in got.output and 'Nothing left to run' in got.output
    told = ltbook('report', '--to', tmp_path/'r.html', '--out', tmp_path/'o')
    assert told.exit_code == 0 and 'left out' in told.output


def test_the_cost_of_a_run_is_that_of_its_largest_images_and_of_the_steps_it_takes(tmp_path):
    def of(**changes): return cost(context_of(recipe('mislas', 'digits', epochs=9, **changes)))
    plain, growing, few = of(), of(first_side=4), of(max_steps=2)
    assert growing.flops == plain.flops and growing.images == plain.images
    assert few.images == 2*recipe('mislas', 'digits').batch_size < plain.images
    files = [tmp_path/f'{k}' for k in range(5)]
    for k, f in enumerate(files): f.write_bytes(b'x'*100*k)
    store = SimpleNamespace(files=np.array(files))
    assert image_bytes(SimpleNamespace(store=store)) == 200 and image_bytes(SimpleNamespace(store=store), 2) == 200
