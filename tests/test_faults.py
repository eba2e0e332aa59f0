"The short form of `make faults`: kills, odd inputs for every reader, and that the programs notice a fault"
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent/'faults'))
import fuzz
import kills
from ltbook.data.checks import UserError


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    top = tmp_path_factory.mktemp('kills')
    return top, *kills.whole_run(top)


@pytest.mark.parametrize('seed', range(3))
def test_killed_and_started_again(whole, seed):
    "At some of its writes, and at some moment; `python tests/faults/kills.py 500` is the long form"
    top, run, writes, seconds = whole
    rng = random.Random(seed)
    killed, wrong = kills.trial(top, run, [rng.randrange(writes), rng.uniform(0, seconds), rng.randrange(writes//2)])
    assert killed and not wrong


def test_a_run_that_ends_otherwise_is_noticed(whole):
    top, run, *_ = whole
    other = kills.load_run(run.path)
    other.history, other.predictions['logits'][0, 0]
    other.metrics['final']['top1'] += .01
    other.predictions['logits'][0, 0] += 1
    assert {'other metrics', 'other logits'} <= set(kills.trial(top, other, [])[1])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with fuzz.bench(tmp_path_factory.mktemp('fuzz')) as lab: yield lab


@pytest.mark.parametrize('name', fuzz.READERS)
def test_odd_inputs(lab, name):
    "First what once failed, then a few by lot; `python tests/faults/fuzz.py 1000000` is the long form"
    row, faults = fuzz.fuzz(lab, name, len(list((fuzz.CORPUS/name).glob('*'))) + 60)
    assert not faults and row['growth_mb'] < fuzz.GROWTH


def test_a_reader_that_fails_or_hangs_is_noticed(lab, monkeypatch):
    def breaks(lab, data): raise ValueError('not the documented error')
    def refuses(lab, data): raise UserError('the documented one')
    def hangs(lab, data): time.sleep(9)
    monkeypatch.setattr(fuzz, 'SECONDS', .2)
    assert 'ValueError' in fuzz.look(breaks, lab, b'') and 'hangs' in fuzz.look(hangs, lab, b'')
    assert fuzz.look(refuses, lab, b'') is None and fuzz.look(lambda lab, data: data, lab, b'') is None
