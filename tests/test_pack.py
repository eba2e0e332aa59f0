"Several runs in one pack: the same numbers as alone, whatever the others do"
from concurrent.futures import Future
import os
import signal
import threading
import time

import numpy as np
import pytest

from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.cli.sweep import run_cells
from ltbook.studies import engines, packs
from ltbook.studies.grid import grid
from ltbook.studies.packs import run_packed
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


def commands(monkeypatch):
    "What would be started; nothing is"
    asked = []
    def submit(self, words, log):
        asked.append(words)
        job = Future()
        job.set_result(1)
        return job
    monkeypatch.setattr(engines.Local, 'submit', submit)
    monkeypatch.setattr(packs, 'packs', lambda device: True)
    return asked


def test_the_command_packs_where_it_should(tmp_path, monkeypatch, capsys):
    "Seeds of one recipe are trained in this process"
    asked = commands(monkeypatch)
    run_cells(cells := grid('cross_entropy', profile='smoke', seeds='0,1', out=tmp_path), device='cpu', bare=True)
    assert not asked and all(c.finished for c in cells)
    assert '2 of 2 seeds' in capsys.readouterr().out


def test_no_pack_where_nobody_wants_one(tmp_path, monkeypatch):
    "--set capture=false on a GPU: one command a seed from the start"
    asked = commands(monkeypatch)
    monkeypatch.setattr(packs, 'run_packed', lambda *a: pytest.fail('a pack was made'))
    cells = grid('cross_entropy', profile='smoke', seeds='0,1', changes=dict(capture=False), out=tmp_path)
    with pytest.raises(RuntimeError, match='2 of 2 runs failed'): run_cells(cells, device='cpu', bare=True)
    assert len(asked) == 2 and all('capture=false' in words for words in asked)
