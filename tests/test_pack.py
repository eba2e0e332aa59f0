"Several runs in one pack: the same numbers as alone, whatever the others do"
import os
import signal
import threading
import time

import numpy as np
import pytest

from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.studies import seeds
from ltbook.studies.seeds import run_packed
from ltbook.train.pack import Pack, together


def logits(folder): return load_run(folder).predictions['logits']


@pytest.mark.parametrize(
    'method, changes',
    [
        ('mislas', {}),
        ('dirmixe', dict(epochs=3)),
        ('difficulty_net', {}),
        ('balanced_softmax', dict(first_side=4, epochs=3))])
def test_packed_runs_are_those_alone(tmp_path, method, changes):
    "Two stages, draws, a look ahead with a network of its own, growing images; to the last bit"
    recipes = {s: recipe(method, profile='smoke', seed=s, **changes) for s in (3, 4)}
    packed = run_packed(recipes, tmp_path/'packed', device='cpu')
    for s, r in recipes.items():
        alone = run(r.model_copy(update=dict(capture=True)), tmp_path/'alone', device='cpu')
        assert packed[s].relative_to(tmp_path/'packed') == alone.relative_to(tmp_path/'alone')
        assert np.array_equal(logits(packed[s]), logits(alone)), (method, s)


def test_a_run_that_goes_on_meets_one_that_begins(tmp_path):
    "One of the two was stopped after an epoch; both end as if nothing had happened"
    recipes = {s: recipe('mislas', profile='smoke', seed=s, epochs=4, capture=True) for s in (0, 1)}
    def kill(row):
        if row['epoch'] == 0: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(recipes[0], tmp_path/'packed', device='cpu', report=kill)
    packed = run_packed(recipes, tmp_path/'packed', device='cpu')
    for s, r in recipes.items():
        assert np.array_equal(logits(packed[s]), logits(run(r, tmp_path/'alone', device='cpu')))


def test_ctrl_c_ends_all_and_the_same_call_goes_on(tmp_path):
    recipes = {s: recipe('mislas', profile='smoke', seed=s, epochs=4, capture=True) for s in (0, 1)}
    pack, rounds = Pack(2), []
    def step():
        rounds.append(len(rounds))
        if len(rounds) == 6: signal.raise_signal(signal.SIGINT)         # in the middle of a round
    def work():
        for _ in range(100): pack(step)
    with pytest.raises(KeyboardInterrupt): together([work, work], pack)
    assert len(rounds) < 10 and pack.members == 0
    pack, began = Pack(2), time.monotonic()
    def uncaptured():
        while time.monotonic() - began < 30: time.sleep(.01); pack.check()
    threading.Timer(.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    # while a run keeps the turn
    with pytest.raises(KeyboardInterrupt): together([uncaptured, uncaptured], pack)
    assert time.monotonic() - began < 20 and not [t for t in threading.enumerate() if t.name.endswith('(work)')]

    def broken(seed, row):
        if (seed, row['epoch']) == (1, 1): raise OSError('disk full')
    first = run_packed(recipes, tmp_path/'packed', device='cpu', report=broken)
    assert first[0].name.startswith('0-') and isinstance(first[1], OSError)
    second = run_packed(recipes, tmp_path/'packed', device='cpu')
    for s, r in recipes.items():
        assert np.array_equal(logits(second[s]), logits(run(r, tmp_path/'alone', device='cpu')))


def test_the_command_packs_where_it_should(tmp_path, monkeypatch, capsys):
    "Trained in this process, then one command a seed for what is left to do"
    from rich.console import Console
    monkeypatch.setattr(seeds, 'packs', lambda device: True)
    words = dict(
        method='cross_entropy',
        dataset='digits',
        imbalance=None,
        profile='smoke',
        seed=None,
        epochs=None,
        precision=None,
        data_root=None,
        out=str(tmp_path),
        device='cpu',
        start=None)
    commands = []
    monkeypatch.setattr(seeds, 'run_all', lambda c, logs, *more: commands.append(sorted(c)) or dict.fromkeys(c, 0))
    folders = seeds.cli_seeds('0,1', words, {}, [], True, Console(width=120))
    assert commands == [[0, 1]] and all((f/'done.json').exists() for f in folders.values())
    assert '2 of 2 seeds' in capsys.readouterr().out


def test_no_pack_where_nobody_wants_one(tmp_path, monkeypatch):
    "--set capture=false on a GPU: one command a seed from the start"
    from rich.console import Console
    monkeypatch.setattr(seeds, 'packs', lambda device: True)
    monkeypatch.setattr(seeds, 'run_packed', lambda *a: pytest.fail('a pack was made'))
    commands = []
    monkeypatch.setattr(seeds, 'run_all', lambda c, logs, *more: commands.append(c) or dict.fromkeys(c, 0))
    words = dict(
        method='cross_entropy',
        dataset='digits',
        imbalance=None,
        profile='smoke',
        seed=None,
        epochs=None,
        precision=None,
        data_root=None,
        out=str(tmp_path),
        device='cpu',
        start=None)
    seeds.cli_seeds('0,1', words, dict(capture=False), ['capture=false'], True, Console(width=120))
    assert [sorted(c) for c in commands] == [[0, 1]] and all(
        'capture=false' in ' '.join(map(str, c)) for c in commands[0].values())
