"Advice is followed: what an error message says to do is taken out of the message itself, done, and works"
import re
import shlex

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ltbook.cli.main import app
from ltbook.data.stores import ImageSet, write_h5

SMOKE = ['--profile', 'smoke', '--bare', '--device', 'cpu']


def run(*words): return ['run', *words, *SMOKE]


def more(words, found): return words + shlex.split(found[1])


def instead(words, found): return shlex.split(found[1]) + (SMOKE if found[1].startswith('run') else [])


def without(name):
    "The same words without a --set of this name"
    def follow(words, found):
        assert name in found[0]
        i = next(i for i, w in enumerate(words) if w.startswith(f'{name}='))
        return words[:i - 1] + words[i + 1:]
    return follow


def smaller(field):
    "The same words with a usual rate: one bad step of ten may still be too far"
    return lambda words, found: [w if not w.startswith(f'{field}=') else f'{field}=0.01' for w in words]


def put(old, group=1):
    "The same words with `old` as the message spells it"
    return lambda words, found: [w.replace(old, found[group]) for w in words]


THRESHOLDS = ['class_balanced_experts', 'digits', '--imbalance', '3', '--set', 'splits=thresholds', '--set', 'low=2']
CASES = {
    'ldam': (run('balanced_softmax', 'digits', '--set', 'loss=ldam'), r'add (--set head=cosine)', more),
    'pool': (run('dirmixe', 'digits', '--set', 'pool_size=1'), r'use (--set pool_size=\d+) or more',
             lambda words, found: run('dirmixe', 'digits', *shlex.split(found[1]))),
    'pool left out': (run('dirmixe', 'digits', '--set', 'pool_size=1'), r'leave pool_size out', without('pool_size')),
    'splits': (run(*THRESHOLDS), r'Use (--set splits=quantile)', more),
    'drop': (run(*THRESHOLDS), r'(--set on_empty=drop)', more),
    'setting': (run('mislas', 'digits', '--set', 'epoch=2'), r'did you mean (\w+)\?', put('epoch')),
    'name elsewhere': (run('mislas', 'digits', '--set', 'learning_rate=.05'), r'did you mean (\w+)\?\)\.$',
                       put('learning_rate')),
    'method': (run('mislass', 'digits'), r'Did you mean (\w+)', put('mislass')),
    'data set': (run('mislas', 'Digit'), r'Did you mean (\w+)', put('Digit')),
    'profile': (['run', 'mislas', 'digits', '--profile', 'smok', '--bare'], r'Did you mean (\w+)', put('smok')),
    'no fast': (['run', 'supcon', 'digits', '--profile', 'fast', '--bare', '--set', 'max_steps=1',
                 '--set', 'epochs=1'], r'Use (short)', put('fast')),
    'data seed': (run('reweighting', 'digits', '--set', 'data_seed=1'), r'Leave data_seed out', without('data_seed')),
    'average': (run('difficulty_net', 'digits', '--set', 'average=ema', '--set', 'select=val'),
                r'leave out average or select=val', without('average')),
    'select': (run('difficulty_net', 'digits', '--set', 'average=ema', '--set', 'select=val'),
               r'leave out average or select=val', without('select')),
    'no equals': (run('mislas', 'digits', '--set', 'lr'), r'For example: --set (\S+)', put('lr')),
    'rate of stage 1': (run('mislas', 'digits', '--set', 'lr=1e30'), r'rate \(--set lr=(\S+)\)', smaller('lr')),
    'rate of flows': (run('dlsa', 'digits', '--set', 'flow_lr=1e30'), r'rate \(--set flow_lr=', smaller('flow_lr')),
    'imbalance of a tail': (run('mislas', 'tail', '--imbalance', '10'), r'use at most (\d+)', put('10')),
    'imbalance of ones': (run('mislas', 'ones', '--imbalance', '10'), r'leave the imbalance out',
                          lambda words, found: words[:3] + words[5:]),
    'not imported': (run('mislas', 'birds'), r'with: ltbook (import) FOLDER birds',
                     lambda words, found: [found[1], 'good', 'birds']),
    'no sweeps': (['sweep', 'supcon', 'ablation'], r'with: ltbook (run .*)', instead),
    'no run': (['show', 'digits/mislas/0-none'], r'ltbook (show)', instead),
    'seed and seeds': (run('mislas', 'digits', '--seed', '1', '--seeds', '0,1'), r'either --seed or --seeds',
                       lambda words, found: words[:3] + words[5:]),
    'nothing named': (['doctor'], r'ltbook (doctor digits)', lambda words, found: found[1].split()),
    'doctor': (['doctor', 'data'], r'ltbook (doctor data) NAME', lambda words, found: [*found[1].split(), 'digits']),
    'long pictures': (['import', 'long', 'birds'], r'choose (--fit letterbox) or', more),
    'squash': (['import', 'long', 'birds'], r'or (--fit squash)', more),
    'crop': (['import', 'long', 'birds'], r'or (--fit crop)\.', more),
    'broken picture': (['import', 'broken', 'birds'], r'with (--skip-broken)', more),
    'there already': (['import', 'good', 'trees'], r'replace it with (--force)', more),
    'another name': (['import', 'good', 'digits'], r'choose another one', 
                     lambda words, found: ['import', 'good', 'other'])}


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Folders of pictures, and an empty place for data and runs"
    for name, size in (('good', (12, 12)), ('long', (90, 12)), ('broken', (12, 12))):
        for c in 'ab':
            (tmp_path/name/c).mkdir(parents=True)
            for i in range(4): Image.new('RGB', size, (30*i, 9, 9)).save(tmp_path/name/c/f'{i}.png')
    for name, sizes in (('tail', (40, 9, 4)), ('ones', (9, 3, 1))):
        y = torch.arange(3).repeat_interleave(torch.tensor(sizes))
        pixels = torch.arange(len(y), dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3).contiguous()
        part = ImageSet(pixels, y, ('a', 'b', 'c'))
        write_h5(tmp_path/'data'/f'{name}.h5', part, part)
    (tmp_path/'broken'/'a'/'bad.png').write_bytes(b'no picture')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LTBOOK_DATA', str(tmp_path/'data'))
    return tmp_path


def ltbook(words): return CliRunner().invoke(app, words, env=dict(COLUMNS='999'))


@pytest.mark.parametrize('name', CASES)
def test_advice_works(name, place):
    words, pattern, follow = CASES[name]
    if name == 'there already': assert ltbook(words).exit_code == 0
    p = ltbook(words)
    assert p.exit_code == (1 if name.startswith('rate') else 2), p.output
    found = re.search(pattern, p.output.strip())
    assert found, p.output
    again = ltbook(follow(words, found))
    assert again.exit_code == 0, (follow(words, found), again.output)
