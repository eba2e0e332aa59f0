"""Damaged run folders: nothing wrong may be shown or trained on, and every refusal is a sentence.

`python tests/faults/damage.py 400 100` damages four hundred finished and a hundred unfinished folders.
"""
import json
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from ltbook.data.checks import UserError
from ltbook.cli.main import app
from ltbook.runs.evaluate import evaluate
from ltbook.runs.folder import load_run, run_id
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run

KINDS = ('cut', 'empty', 'flip', 'swap', 'shape', 'nested', 'zeros', 'gone')


class Stop(Exception): pass


def made(top):
    "Two finished runs and two unfinished ones, of other seeds"
    found = {}
    for seed in (0, 1):
        r = recipe('mislas', 'digits', profile='smoke', seed=seed, epochs=3, stage2_epochs=2)
        found['finished', seed] = run(r, top/f'finished{seed}', device='cpu')
        rows = []
        def stop(row):
            rows.append(row)
            if row['stage'] == 'stage2': raise Stop
        try: run(r, top/f'half{seed}', device='cpu', report=stop)
        except Stop: pass
        found['half', seed] = top/f'half{seed}'/run_id(r)
    return found


def damage(path, kind, other, rng):
    "Change a file; returns whether it is really another one now"
    before = path.read_bytes()
    if kind == 'gone': path.unlink(); return True
    after = {
        'cut': before[: rng.randrange(len(before))],
        'empty': b'',
        'zeros': bytes(len(before)),
        'flip': bytearray(before),
        'swap': other.read_bytes() if other.exists() else b'x',
        'shape': rng.choice(
            [b'[]', b'{}', b'"x"', b'3', b'null', b'{"stage1": {"top1": "high"}}', b'{"run": 3, "files": []}']),
        'nested': b'[' * rng.choice([2_000, 200_000])}[kind]
    if kind == 'flip':
        i = rng.randrange(len(before))
        after[i] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(after))
    return bytes(after) != before


def quietly(f):
    "Result, or the sentence of a refusal; anything else is a fault"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return f(), None
        except UserError as e: return None, str(e)


def finished_fault(folder, whole):
    "What is wrong about a damaged finished folder: anything that differs from the whole run and is not refused"
    wrong = []
    for verb in (['show', str(folder)], ['eval', str(folder)], ['show', '--out', str(folder.parents[2])]):
        p = CliRunner().invoke(app, verb, env=dict(COLUMNS='200'))
        if p.exit_code not in (0, 1, 2) or (p.exception and not isinstance(p.exception, SystemExit)):
            wrong.append(f'{verb[0]}: {p.exception!r}')
        if 'Traceback' in p.output: wrong.append(f'{verb[0]}: traceback')
    found, refused = quietly(lambda: load_run(folder))
    if refused: return wrong
    if found.metrics != whole.metrics: wrong.append('other metrics are shown')
    if found.recipe != whole.recipe: wrong.append('another recipe is shown')
    if found.env.get('command') != whole.env.get('command'): wrong.append('another command is shown')
    history, refused = quietly(lambda: found.history)
    if not refused and not history.equals(whole.history): wrong.append('another history is shown')
    arrays, refused = quietly(lambda: found.predictions)
    if not refused and any(not np.array_equal(arrays.get(k), v) for k, v in whole.predictions.items()):
        wrong.append('other logits are shown')
    again, refused = quietly(lambda: evaluate(found, weights=True, device='cpu'))
    if not refused and abs(again.metrics['final']['top1'] - whole.metrics['final']['top1']) > 1e-9:
        wrong.append('measured with other weights')
    return wrong


REFUSED = {'recipe.json', 'manifest.json', 'files.json'}      # what the run is can't be guessed
SAID = {'training.pt', 'history.csv', 'stage1.safetensors'}      # costs something, and a person is told


def half_fault(folder, whole, out, name, kind):
    ("What is wrong when a damaged unfinished run is started again: the same "
     "numbers, or a refusal where nothing else is possible")
    said = []
    done, refused = quietly(lambda: load_run(run(whole.recipe, out, device='cpu', say=said.append)))
    if refused: return [] if name in REFUSED else [f'refused: {refused}']
    if name in SAID and kind != 'gone' and not said: return ['nothing was said']
    if done.metrics != whole.metrics: return ['ended with other numbers']
    if not np.array_equal(done.predictions['logits'], whole.predictions['logits']): return ['ended with other logits']
    if [(r.stage, r.epoch) for r in done.history.itertuples()] != [
        (r.stage, r.epoch) for r in whole.history.itertuples()]:
        return ['another history']
    return []


def one(kind_of_run, made, top, rng, whole):
    "Damage one file of a copy and look; returns a description and the faults"
    out = Path(tempfile.mkdtemp(dir=top))
    source = made[kind_of_run, 0]
    folder = out/Path(*source.parts[-3:])
    shutil.copytree(source, folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
    name, kind = rng.choice(names), rng.choice(KINDS)
    changed = damage(folder/name, kind, made[kind_of_run, 1]/name, rng)
    if not changed:
        wrong = []
    else:
        wrong = (
            finished_fault(folder, whole)
            if kind_of_run == 'finished'
            else half_fault(folder, whole, out, name, kind))
    shutil.rmtree(out)
    return f'{kind_of_run} {name} {kind}', wrong


def main(finished, half, seed=0):
    rng, faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as d:
        runs = made(Path(d))
        whole = load_run(runs['finished', 0])
        whole.history, whole.predictions
        for what, n in (('finished', finished), ('half', half)):
            for _ in range(n):
                try: about, wrong = one(what, runs, Path(d), rng, whole)
                except Exception as e: about, wrong = what, [repr(e)]
                if wrong: print(f'{about}: {"; ".join(wrong)}', flush=True)
                faults += bool(wrong)
    found = dict(finished=finished, unfinished=half, faults=faults)
    print(json.dumps(found))
    return found


if __name__ == '__main__': sys.exit(bool(main(*map(int, sys.argv[1:]))['faults']))
