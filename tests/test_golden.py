"""Golden runs: three epochs of every method and every second stage, to the last bit on the processor they were made on.

`LTBOOK_GOLDEN=write pytest tests/test_golden.py` writes the file of this processor anew: only together with a commit
that says which number changed and why. On a processor without a file the runs are compared with the first one's, within
tolerances.
"""
import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltbook.data.checks import UserError
from ltbook.data.images import data_root
from ltbook.methods.method import get_method, methods
from ltbook.runs.classifier import trained_classifier
from ltbook.runs.environment import processor
from ltbook.runs.folder import load_run
from ltbook.methods.recipe import recipe
from ltbook.runs.run import make_context, recipe_from, run

GOLDEN = Path(__file__).parent/'golden'
FIRST = GOLDEN/'runs.json'
WRITE = os.environ.get('LTBOOK_GOLDEN') == 'write'
MEASURES = ('top1', 'many', 'medium', 'few', 'ece15', 'nll', 'brier')
# elsewhere; two processors differ by two images of the fifty of a group, and the binned error is left to NLL and Brier:
# where all confidences lie near the edge of a bin, rounding moves it by .12
TOLERANCE = dict(nll=2e-2, brier=2e-2) | {k: 5e-2 for k in ('top1', 'many', 'medium', 'few')}

GENTLE = dict(lr=1e-3, batch_size=64)     # far from chaos, so that another processor comes near
SECOND_RATE = dict.fromkeys(('mislas', 'crt', 'lws', 'difficulty_net', 'reweighting'), dict(stage2_lr=.01))
SLOW = SECOND_RATE | dict(
    class_balanced_experts=dict(expert_lr=1e-3, calibration_lr=.01), dlsa=dict(head_lr=.01),
    depth_balpoe=dict(lr=1e-4))      # mixed images and averaged statistics on top: 1e-3 is not far enough
STRONG = dict(auto_augment=True, cutout_side=4, pad_mode='reflect+constant')
CHANGED = [
    ('mislas', dict(precision='bf16', first_side=4, nesterov=True, schedule='one_cycle')),
    ('mislas', dict(smooth_shape='power', smooth_target='paper', shift_bn=False, head='cosine', schedule='cosine')),
    ('balanced_softmax', dict(hold_out=1, long_tail='step')),
    ('balanced_softmax', dict(capture=True)),
    ('difficulty_net', dict(meta_grad='none', loss='equalization', select='val', **STRONG)),
    ('reweighting', dict(loss='ldam', head='cosine', weights='cdb')),
    ('reweighting', dict(loss='logit_adjustment', weights='class_balanced', defer=.5)),
    ('class_balanced_experts', dict(protocol='V'))]
CASES = ([('digits', m, {}) for m in methods()] + [('digits', *c) for c in CHANGED]
         + [('cifar100', 'mislas', dict(max_steps=2, epochs=2, hold_out=5))])
SECOND = ['mislas', 'crt', 'lws', 'tau_norm']     # second stages on the first one of another run


def name(dataset, method, changes): return '-'.join([dataset, method, *(f'{k}={v}' for k, v in changes.items())])


def machine():
    "What the last bit depends on."
    found = processor()
    return dict(
        machine=platform.machine(),
        model=found['model'],
        kernels=found['kernels'],
        torch=torch.__version__)


def weights(folder):
    "Fingerprint of all weights of a run, whatever its tensors are called."
    found = sorted(
        hashlib.sha256(
            f'{t.dtype} {tuple(t.shape)}'.encode()
            + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for f in sorted(folder.glob('*.safetensors'))
        for t in load_file(f).values())
    return hashlib.sha256(' '.join(found).encode()).hexdigest()


def outcome(folder):
    r = load_run(folder)
    return dict(weights=weights(folder), stages={s: {k: r.metrics[s][k] for k in MEASURES} for s in r.stages})


def own_file():
    "The file that was made on a processor like this one; where there is none, the path that it would have."
    here = machine()
    same = [f for f in sorted(GOLDEN.glob('*.json')) if json.loads(f.read_text())['made_on'] == here]
    words = (here['machine'], here['model'], here['kernels'], 'torch', here['torch'])
    return same[0] if same else GOLDEN/('-'.join(words).replace(' ', '_') + '.json')


def stored():
    "The runs of every file, the first processor's first."
    files = [FIRST, *sorted(set(GOLDEN.glob('*.json')) - {FIRST})]
    return [json.loads(f.read_text())['runs'] for f in files]


def compare(key, found):
    "Equal to the stored run; on another processor within tolerances."
    own = own_file()
    if WRITE:
        runs = json.loads(own.read_text())['runs'] if own.exists() else {}
        runs = dict(sorted((runs | {key: found}).items()))
        own.write_text(json.dumps(dict(made_on=machine(), runs=runs), indent=1) + '\n')
    here = json.loads(own.read_text())['runs'] if own.exists() else {}
    if key in here:
        assert found == here[key]
        return
    want = next(runs[key] for runs in stored() if key in runs)      # a run that is younger than a processor's file
    assert list(found['stages']) == list(want['stages'])
    wide = 5 if 'bf16' in key else 1      # eight bits of mantissa
    for stage, values in want['stages'].items():
        for k, tolerance in TOLERANCE.items():
            near = values[k] if values[k] is None else pytest.approx(values[k], abs=wide*tolerance, rel=wide*tolerance)
            assert found['stages'][stage][k] == near, (stage, k)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('dataset, method, changes', CASES, ids=[name(*c) for c in CASES])
def test_run(dataset, method, changes, tmp_path):
    if dataset != 'digits' and not (data_root()/f'{dataset}.h5').exists(): pytest.skip(f'{dataset} is not here')
    r = recipe(
        method,
        dataset,
        profile='smoke',
        **dict(epochs=3, max_steps=None, **GENTLE) | SLOW.get(method, {}) | changes)
    folder = run(r, tmp_path, device='cpu')
    compare(name(dataset, method, changes), outcome(folder))
    try: answers = bool(trained_classifier(load_run(folder), make_context(r, device='cpu')))
    except UserError as e: answers = 'one network' not in str(e)
    assert answers is get_method(method).one_network, 'it says of itself what is true'


@pytest.mark.parametrize('method', SECOND)
def test_second_stage(method, tmp_path):
    first = load_run(run(recipe('mixup', profile='smoke', epochs=3, max_steps=None, **GENTLE), tmp_path, device='cpu'))
    compare(
        f'digits-mixup-then-{method}',
        outcome(run(recipe_from(first, method, **SLOW.get(method, {})), tmp_path, device='cpu', start=first)))


def test_every_run_is_compared():
    "No golden run without a test, no method without a golden run"
    expected = {*(name(*c) for c in CASES), *(f'digits-mixup-then-{m}' for m in SECOND)}
    assert set().union(*stored()) == expected
