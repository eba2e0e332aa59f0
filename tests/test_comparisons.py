"What may be compared with what: printed numbers with runs, a first stage with a second one"
from pathlib import Path

import pytest

from ltbook.data.checks import UserError
from ltbook.methods.recipe import Recipe, recipe, recipe_hash
from ltbook.methods.registry import get_method, methods
from ltbook.runs.folder import Run
from ltbook.runs.published import beside_the_paper, differs, published
from ltbook.runs.run import recipe_from

SECOND = [m for m in methods() if [*get_method(m).stages_of(recipe(m, 'digits'))][0] == 'stage1'
          and len(get_method(m).stages_of(recipe(m, 'digits'))) > 1]
# their stage 1 is one family, with one loss
PLAIN = ('cross_entropy', 'mixup', 'mislas', 'crt', 'lws', 'tau_norm', 'dlsa')
DEPTHS = ('shike', 'depth_balpoe')     # experts of different depth, whose strengths are settings that go with stage 1


def made(method, dataset='digits', **changes):
    "A run as `load_run` gives it; nothing of it is trained"
    return Run(Path('.'), recipe(method, dataset, **dict(profile='short') | changes), {}, {})


@pytest.mark.parametrize('second', SECOND)
@pytest.mark.parametrize('first', methods())
def test_every_pair(first, second):
    "Taken over where `second` would have trained the first stage alike; else one sentence that says why not"
    allowed = first == second or any(first in family and second in family for family in (PLAIN, DEPTHS))
    if allowed:
        r = recipe_from(made(first), second)
        own = recipe(second, 'digits')
        assert (
            r.loss == own.loss
            and r.mixup_alpha == made(first).recipe.mixup_alpha
            and r.epochs == made(first).recipe.epochs)
        for k in get_method(second).stage1_settings:
            assert getattr(r.settings, k) == getattr(made(first).recipe.settings, k)
    else:
        with pytest.raises(UserError) as e: recipe_from(made(first), second)
        assert str(e.value).count('. ') == 0 and first in str(e.value)


def test_another_loss_is_taken_over_knowingly():
    "Balanced softmax is no first stage of cRT, unless one says so; then the recipe says so too"
    start = made('balanced_softmax')
    with pytest.raises(UserError, match='--set loss=balanced_softmax') as e: recipe_from(start, 'crt')
    r = recipe_from(start, 'crt', loss='balanced_softmax')
    assert r.loss == 'balanced_softmax' and recipe_hash(r) != recipe_hash(recipe_from(made('cross_entropy'), 'crt'))


@pytest.mark.parametrize(
    'trick',
    [
        dict(mixup_alpha=0.3),
        dict(auto_augment=True),
        dict(cutout_side=4),
        dict(jitter=0.2),
        dict(rotation=10.0),
        dict(average='ema'),
        dict(sam_rho=0.05),
        dict(optimizer='adamw'),
        dict(head='cosine'),
        dict(hold_out=5)],
    ids=lambda d: next(iter(d)))
def test_what_shaped_the_first_stage_comes_along(trick):
    "And can't be changed afterwards"
    ((k, v),) = trick.items()
    r = recipe_from(made('cross_entropy', **trick), 'mislas')
    assert getattr(r, k) == v
    with pytest.raises(UserError, match=f'What belongs to stage 1 \\({k}\\)'):
        recipe_from(made('cross_entropy', **trick), 'mislas', **{k: getattr(recipe('cross_entropy'), k)})


def test_what_a_second_stage_does_not_know_is_no_first_stage():
    start = made('difficulty_net')
    odd = start.recipe.model_copy(update=dict(mixup_alpha=1.))
    with pytest.raises(UserError, match='knows no mixup_alpha'):
        recipe_from(Run(start.path, odd, {}, {}), 'difficulty_net')


CHANGES = [
    dict(epochs=40),
    dict(batch_size=64),
    dict(lr=0.05),
    dict(weight_decay=1e-3),
    dict(mixup_alpha=0.7),
    dict(jitter=0.1),
    dict(cutout_side=8),
    dict(auto_augment=True),
    dict(flip=False),
    dict(pad=2),
    dict(head='cosine'),
    dict(schedule='cosine'),
    dict(data_seed=1),
    dict(max_steps=2),
    dict(first_side=16),
    dict(optimizer='adamw'),
    dict(average='swa'),
    dict(sam_rho=0.1),
    dict(loss='focal')]


@pytest.mark.parametrize('method', [m for m in methods() if get_method(m).printed])
def test_only_the_published_settings_are_compared(method):
    "Every single change of them ends the comparison, and is named"
    m = get_method(method)
    for row in m.recipes:
        if row.dataset != 'cifar100': continue
        words = dict(dataset='cifar100', imbalance=row.imbalance or 100, profile='paper')
        for stage in m.printed:
            if not row.printed:
                assert differs(made(method, **words), stage)
            else:
                assert (
                    differs(made(method, **words), stage)
                    == differs(made(method, **words, seed=4, precision='bf16', test_every=1), stage)
                    == '')
            if stage != 'stage1' or not row.printed: continue
            for change in CHANGES:
                (k, v), = change.items()
                if k in m.unused or getattr(recipe(method, **words), k) == v: continue
                said = differs(made(method, **words, **change), stage)
                assert said.startswith(k) and ' instead of ' in said, (method, said)


@pytest.mark.parametrize(
    'words',
    [
        dict(method='cross_entropy', mixup_alpha=1.0),
        dict(method='crt', mixup_alpha=0.0),
        dict(method='mislas', profile='smoke'),
        dict(method='mislas', profile='short'),
        dict(method='balanced_softmax')],
    ids=lambda w: w['method'])
def test_nothing_is_subtracted_from_what_was_printed_for_something_else(words):
    measures = dict(top1=0.4, many=0.6, medium=0.4, few=0.1, ece15=0.1)
    r = recipe(**dict(dataset='cifar100', imbalance=100, profile='paper') | words)
    paper = beside_the_paper(Run(Path('.'), r, dict(stage1=measures), {}))
    assert len(paper) and paper.difference.isna().all() and all(paper.differs) and paper.printed.notna().all()


def test_what_was_printed_is_compared():
    measures = dict(top1=.4, many=.6, medium=.4, few=.1, ece15=.1)
    paper = beside_the_paper(
        Run(Path('.'), recipe('cross_entropy', 'cifar100', 100, 'paper', seed=7), dict(stage1=measures), {}))
    assert len(paper) and not any(paper.differs) and (paper.difference == paper.ours - paper.printed).all()


def test_old_recipes_keep_their_names():
    "As they were written before augmentation and loss belonged to every recipe, from the committed runs"
    import json
    found = sorted((Path(__file__).resolve().parents[1]/'outputs').glob('*/*/*/recipe.json'))
    for p in found:
        r = Recipe(**json.loads(p.read_text()))
        assert recipe_hash(r) == p.parent.name.split('-')[1] and Recipe(**json.loads(r.model_dump_json())) == r
    assert len(found) > 50 and any('mixup_alpha' in json.loads(p.read_text())['settings'] for p in found)


def test_a_printed_value_has_a_row_that_it_is_for():
    "Names under which methods look for printed numbers are those of the table"
    table = set(zip(published().paper, published().method))
    assert all(v in table for m in methods().values() for v in m.printed.values())
