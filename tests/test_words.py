("Words from shells, YAML and papermill mean the same in every usual "
 "spelling; what is no finite number is refused everywhere")
import math
import os
import shutil
import signal
import subprocess
import sys
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.checks import UserError
from ltbook.methods.method import methods
from ltbook.methods.recipe import Recipe, recipe
from ltbook.methods.spelling import spelt
from ltbook.runs.run import run

SPELLINGS = {
    .5: ['.5', '0.5', '5e-1', '+.5', '0.50', .5], 1.: ['1', '1.', '1e0', 1], 100.: ['100', '1e2', '1_00', 100]}


@pytest.mark.parametrize('name', ['mixup_alpha', 'weight_decay', 'sam_rho', 'focal_gamma', 'imbalance'])
@pytest.mark.parametrize('value', SPELLINGS)
def test_numbers(name, value):
    if name == 'imbalance' and value < 1: return
    method = 'balanced_softmax' if name != 'focal_gamma' else 'reweighting'
    got = [getattr(recipe(method, 'digits', **{name: s}), name) for s in SPELLINGS[value]]
    assert got == [value]*len(got) and len({type(g) for g in got if g != 1}) <= 2


@pytest.mark.parametrize('spelling', ['12', 12, 12., '1.2e1', ' 12 ', '+12'])
@pytest.mark.parametrize('name', ['epochs', 'batch_size', 'seed', 'hold_out', 'max_steps', 'pad'])
def test_whole_numbers(name, spelling):
    got = getattr(recipe('mislas', 'digits', **{name: spelling}), name)
    assert got == 12 and type(got) is int


@pytest.mark.parametrize(
    'value,spellings',
    [
        (True, [True, 'true', 'True', 'TRUE', 'yes', 'on', 1, '1']),
        (False, [False, 'false', 'False', 'no', 'Off', 0, '0'])])
@pytest.mark.parametrize('name', ['nesterov', 'auto_augment', 'capture', 'flip', 'shift_bn'])
def test_truths(name, value, spellings):
    for s in spellings:
        r = recipe('mislas', 'digits', **{name: s})
        assert getattr(r, name, getattr(r.settings, name, None)) is value, (name, s)


@pytest.mark.parametrize('word', ['none', 'None', 'null', None])
def test_nothing(word):
    assert recipe('mislas', 'digits', max_steps=word).max_steps is None
    # where it is a word of the field's own
    assert recipe('mislas', 'digits', average='none').average == 'none'


@pytest.mark.parametrize(
    'changes',
    [
        dict(epochs='ten'),
        dict(epochs=1.5),
        dict(epochs='1.5'),
        dict(epochs=0),
        dict(epochs=True),
        dict(lr='fast'),
        dict(lr=True),
        dict(nesterov='maybe'),
        dict(nesterov=2),
        dict(imbalance='ten'),
        dict(imbalance=True),
        dict(imbalance='.5'),
        dict(epochs=''),
        dict(lr=''),
        dict(lr=[1]),
        dict(seed=-1),
        dict(seed=2**32),
        dict(pad=-1),
        dict(precision='fp64')])
def test_what_is_none_of_these(changes):
    with pytest.raises(UserError):
        recipe('mislas', 'digits', **changes)


def floats(fields):
    "Names of fields that take a float."
    for k, f in fields.items():
        kinds = str(f.annotation)
        if 'float' in kinds: yield k, f


CASES = [(m, k) for m in methods() for k, _ in floats(methods()[m].settings.model_fields)]
CASES += [('balanced_softmax', k) for k, _ in floats(Recipe.model_fields)]


@pytest.mark.parametrize('method,name', CASES)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 'nan', 'inf', '-inf', 'NaN', '1e400'])
def test_no_field_takes_what_is_no_finite_number(method, name, value):
    with pytest.raises(UserError): recipe(method, 'digits', **{name: value})
    default = (Recipe.model_fields.get(name) or methods()[method].settings.model_fields[name]).default
    if isinstance(default, tuple) and default:
        with pytest.raises(UserError): recipe(method, 'digits', **{name: [value, *default[1:]]})


@pytest.mark.parametrize(
    'name', ['..', '../digits', '/etc/passwd', 'a/b', 'a\\b', '', '.', 'x' * 300, 'a\nb', '\x1b[31m'])
def test_names_stay_in_their_folder(name):
    with pytest.raises(UserError) as e:
        recipe('mislas', name)
    assert str(e.value).isprintable()


@pytest.mark.parametrize('method', methods())
def test_the_balanced_reference(method, tmp_path):
    "Imbalance 1 trains with every method: it is the reference that papers print"
    from ltbook.runs.folder import load_run
    from ltbook.runs.run import run
    if method == 'dlsa': pytest.skip('learns from features of runs, which have the imbalance')
    r = recipe(method, 'digits', 1, profile='smoke')
    assert 0 <= load_run(run(r, tmp_path, device='cpu')).metrics['final']['top1'] <= 1


def test_spelling_leaves_alone_what_it_does_not_know():
    for value, kind in (('ten', float), (None, int), ([1, 2], tuple[int, ...]), ('1', str), (object, object)):
        assert spelt(value, kind) is value
    assert get_args(tuple[int, ...]) and spelt('[1, 2]', tuple[int, ...]) == [1, 2]


def test_a_run_of_a_method_that_is_not_here_is_one_sentence(tmp_path):
    "Its warning says nothing about lines of this package, and tables say how many are left out"
    made = run(recipe('cross_entropy', profile='smoke'), tmp_path, device='cpu', say=lambda text: None)
    text = (made/'recipe.json').read_text().replace('"cross_entropy"', '"mine"')
    shutil.copytree(made, other := tmp_path/'digits'/'mine'/'0-00000000')
    (other/'recipe.json').write_text(text)
    def ltbook(*words):
        command = [sys.executable, '-m', 'ltbook', *words, '--out', tmp_path]
        return subprocess.run([*map(str, command)], capture_output=True, text=True)
    shutil.rmtree(made)
    for words in (['report'], ['compare'], ['compare', '--leaderboard']):
        p = ltbook(*words)
        assert p.returncode == 2 and '1 left out: ' in p.stderr and 'mine' in p.stderr, p.stderr
    for words in (['sweep', '--method', 'mislas', '--dry-run'], ['show'], ['eval', 'digits/mislas/0-da318a07']):
        p = ltbook(*words)
        assert 'UserWarning' not in p.stderr and '.py:' not in p.stderr, p.stderr


def test_the_sentence_is_heard_whoever_ends_the_process(monkeypatch):
    "As where several processes are ended because one was lost: the request comes while a mistake is told"
    heard, said = [], typer.echo
    def in_a_hurry(*a, **k):
        os.kill(os.getpid(), signal.SIGTERM)
        return said(*a, **k)
    def mine(*_): heard.append(1)
    monkeypatch.setattr(typer, 'echo', in_a_hurry)
    before = signal.signal(signal.SIGTERM, mine)
    try:
        p = CliRunner().invoke(app, ['run', 'no_such_method', 'digits'])
        assert p.exit_code == 2 and 'no_such_method' in p.output and not heard
        assert signal.getsignal(signal.SIGTERM) is mine
    finally: signal.signal(signal.SIGTERM, before)
