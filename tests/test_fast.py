("The profile `fast`: growing images resume and capture exactly, searches "
 "never see the test part, older runs keep their names")
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ltbook.data.checks import UserError
from ltbook.methods.fast import fast_rows
from ltbook.methods.method import get_method, methods
from ltbook.studies.features import export_features
from ltbook.runs.folder import find_runs, load_run, run_id
from ltbook.studies.fusion import unused_images
from ltbook.runs.published import beside_the_paper
from ltbook.methods.recipe import Recipe, recipe
from ltbook.runs.environment import command
from ltbook.runs.run import make_context, recipe_from, run
from ltbook.studies.grid import choose, is_row, method_grid
from ltbook.train.captured import captured_step
from ltbook.train.compute import Compute
from ltbook.train.loop import fit, train_epoch

ROOT = Path(__file__).resolve().parents[1]
GROWING = dict(profile='smoke', first_side=4, epochs=5, max_steps=2)           # sides 4 4 4 4 8


def stage_of(method='mislas', **changes):
    return get_method(method).stages['stage1'](make_context(recipe(method, **GROWING | changes), device='cpu'))


def sides_seen(stage, epochs=5, step=None):
    "Train, and note the side of the images of every batch"
    seen, forward = [], stage.forward
    stage.forward = lambda network, batch: seen.append(batch['x'].shape[-1]) or forward(network, batch)
    optimizer, rng = stage.optimizer(), np.random.default_rng(0)
    step = captured_step(stage, optimizer, Compute(capture=True)) if step else None
    losses = [train_epoch(stage, e, optimizer, rng, Compute(), step=step)[0] for e in range(epochs)]
    return seen, losses, torch.cat([v.double().flatten() for v in stage.network.state_dict().values()])


@pytest.mark.parametrize('method', ['mislas', 'balanced_softmax', 'cross_entropy', 'sade', 'ride', 'difficulty_net'])
def test_images_grow_in_the_loop_and_in_the_captured_step(method):
    plain, captured = (sides_seen(stage_of(method), step=capture) for capture in (False, True))
    assert plain[0] == captured[0] == [4]*8 + [8]*2
    np.testing.assert_allclose(plain[1], captured[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain[2], captured[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize('method', ['difficulty_net', 'reweighting'])
def test_balanced_images_have_the_size_of_those_that_are_trained_on(method):
    "In the look ahead and where the accuracies of the classes are measured"
    stage, seen, epochs = stage_of(method), set(), []
    stage.network.register_forward_pre_hook(lambda network, x: seen.add(x[0].shape[-1]))
    def note(row):
        epochs.append(sorted(seen))
        seen.clear()
    fit(stage, Compute(), report=note)
    assert epochs == [[4]]*4 + [[8]]


@pytest.mark.parametrize('at', [2, 4])
@pytest.mark.parametrize('words', [
    dict(method='mislas'), dict(method='difficulty_net', n_meta=5),
    dict(method='reweighting', weights='cdb', select='val')],
    ids=lambda w: w['method'])
def test_a_growing_stage_resumes_exactly(tmp_path, words, at):
    def kill(row):
        if row['epoch'] == at - 1: raise KeyboardInterrupt
    whole, part = stage_of(**words), stage_of(**words)
    fit(whole, Compute())
    with pytest.raises(KeyboardInterrupt): fit(part, Compute(), tmp_path, report=kill)
    again = stage_of(**words)
    fit(again, Compute(), tmp_path)
    for k, v in whole.network.state_dict().items(): assert torch.equal(v, again.network.state_dict()[k]), k


def test_who_cannot_grow_says_so(monkeypatch):
    "A method whose first stage is built in another way"
    m = get_method('cross_entropy')
    stiff = replace(
        m,
        name='stiff',
        stages=dict(stage1=lambda c: replace(m.stages['stage1'](c), before_epoch=None)),
        hidden=True)
    monkeypatch.setitem(sys.modules['ltbook.methods.registry']._methods, 'stiff', stiff)
    with pytest.raises(UserError, match="stiff can't grow: leave first_side out"):
        make_context(recipe('stiff', profile='smoke', first_side=4), device='cpu')


def test_the_profile_is_there_where_stages_follow_it():
    have = [k for k, m in methods().items() if m.fast is not None]
    assert have == [
        'balanced_softmax', 'balpoe', 'class_balanced_experts', 'cross_entropy', 'crt', 'depth_balpoe',
        'difficulty_net', 'dirmixe', 'lws', 'mislas', 'mixup', 'reweighting', 'ride', 'sade', 'shike', 'tau_norm']
    for name in have:
        r = recipe(name, 'cifar100', 100, 'fast')
        assert (r.profile, r.schedule, r.nesterov, r.first_side) == ('fast', 'one_cycle', True, 16)
        assert recipe(name, 'cifar100', 100, 'fast', epochs=7, nesterov=False).epochs == 7
        rows = method_grid(name, 'fast', 'cifar100', 100, 'fast')
        assert len({row.folder for row in rows}) == len(rows) == 8 and rows[0].recipe == r
    with pytest.raises(UserError, match='supcon has no profile fast; balanced_softmax, balpoe'):
        recipe('supcon', profile='fast')


def test_older_runs_keep_their_names():
    "A new field that is left alone changes no hash: every committed run lies where its recipe says"
    files = sorted((ROOT/'outputs').glob('*/*/*/recipe.json'))
    if not files: pytest.skip('no committed runs here')
    for f in files: assert run_id(Recipe(**json.loads(f.read_text()))) == str(f.parent.relative_to(ROOT/'outputs'))


def test_a_search_never_sees_the_test_part(tmp_path):
    words = dict(profile='smoke', epochs=1)
    counted, searched = (make_context(recipe('balanced_softmax', hold_out=n, **words), device='cpu') for n in (0, 10))
    pixels = lambda part: {x.numpy().tobytes() for x in part.images}
    test = pixels(counted.parts['test'])
    assert not test & pixels(searched.parts['test']) and not test & pixels(searched.parts['train'])
    assert not pixels(searched.parts['test']) & pixels(searched.parts['train'])
    assert (
        searched.parts['test'].counts.tolist() == [10] * 10
        and searched.trained_counts.max() < counted.trained_counts.max())
    folder = run(recipe('balanced_softmax', hold_out=10, **words), tmp_path)
    found = load_run(folder)
    assert (
        found.metrics['protocol']['test_part'].startswith('not the test set: the last 10')
        and found.metrics['protocol']['n_test'] == 100)
    assert beside_the_paper(found).empty
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find_runs(tmp_path) == [] and [r.id for r in find_runs(tmp_path, hold_out=10)] == [
            r.id for r in find_runs(tmp_path, hold_out=None)] == [found.id]


def test_too_many_held_out():
    with pytest.raises(UserError, match='use a smaller hold_out'):
        make_context(recipe('balanced_softmax', hold_out=10**6), device='cpu')


def test_committed_runs_are_finished():
    there = sorted((ROOT/'outputs').glob('*/*/*/recipe.json'))
    assert len(there) > 80
    for f in there: assert (f.parent/'done.json').exists(), f.parent


def test_the_sweep_is_of_the_profile_whatever_was_asked_for():
    "Its rows are changes of `fast`; a run belongs to the row that it was made of and to no other"
    rows = method_grid('balanced_softmax', 'fast', 'digits', profile='short')
    assert len({r.folder for r in rows}) == 8 and [r.recipe.profile for r in rows] == ['fast']*7 + ['short']
    assert (
        [r.name for r in choose(rows, ('Nesterov',))]
        == [r.name for r in choose(rows, ('nesterov',))]
        == ['without Nesterov'])
    grid = fast_rows('balanced_softmax')
    for i, row in enumerate(rows):
        fits = [g['name'] for g in grid if is_row(g, SimpleNamespace(recipe=row.recipe))]
        # precision is free
        assert grid[i]['name'] in fits and (len(fits) == 1 or fits == ['all of it', 'without bf16']), (row.name, fits)


def test_a_second_stage_may_follow_a_fast_first_one(tmp_path):
    first = load_run(
        run(recipe('mislas', profile='fast', epochs=1, max_steps=2, stage2_epochs=1, hold_out=10), tmp_path))
    second = recipe_from(first, 'crt')
    assert (second.profile, second.schedule, second.first_side, second.hold_out) == ('fast', 'one_cycle', 16, 10)
    words = command(second)
    assert '--set' not in words and words.endswith(f'--from outputs/{first.id}')
    with pytest.raises(UserError, match='hold_out'): recipe_from(first, 'crt', hold_out=0)
    with pytest.raises(UserError, match='without hold_out only'): export_features(first, tmp_path/'features')
    unused = unused_images(first)
    known = make_context(first.recipe, device='cpu')
    pixels = lambda images: {x.numpy().tobytes() for x in images}
    assert len(unused) and not pixels(unused.images) & (
        pixels(known.parts['train'].images) | pixels(known.parts['test'].images))
