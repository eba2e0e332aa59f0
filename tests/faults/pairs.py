"""Two processes on one run folder, in many ways: nothing may be lost, wrong or half-written.

`python tests/faults/pairs.py 50` does fifty pairs and prints a line each; the tests do a few.
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ltbook.runs.folder import load_run
from ltbook.runs.keeping import verify_files
from ltbook.train.processes import child_env

MARK = 'LTBOOK_TEST_FOLDER'      # in the environment of what is started, kernels included
ROOT = Path(__file__).resolve().parents[2]
WORDS = ['run', 'mislas', 'digits', '--profile', 'smoke', '--epochs', '8', '--device', 'cpu']
ALLOWED = {'done.json', 'env.json', 'history.csv', 'manifest.json', 'metrics.json', 'predictions.h5', 'recipe.json',
           'stage1.safetensors', 'stage2.safetensors', 'run.ipynb', 'figures'}


def launch(out, bare, log):
    return subprocess.Popen(
        [sys.executable, '-m', 'ltbook', *WORDS, '--out', str(out), *['--bare'] * bare],
        cwd=ROOT,
        env=child_env(1) | {MARK: str(out)},
        stdout=open(log, 'wb'),
        stderr=subprocess.STDOUT,
        start_new_session=True)


def kernels(out):
    "Kernels that were started for this folder and still live."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if (
                b'ipykernel' in (p/'cmdline').read_bytes()
                and f'{MARK}={out}'.encode() in (p/'environ').read_bytes()):
                found.append(int(p.name))
        except OSError: continue
    return found


def whole_run(top):
    "The same run, undisturbed."
    p = launch(top/'alone', True, top/'alone.log')
    assert p.wait(300) == 0, (top/'alone.log').read_text()
    return load_run(next((top/'alone').glob('*/*/*')))


def pair(top, whole, bare=(True, True), delay=0., kill=None, how=signal.SIGKILL):
    "Two processes; the first one may be killed `kill` seconds after the second one has started. Returns what is wrong."
    out = Path(tempfile.mkdtemp(dir=top))/'outputs'
    logs = [out.parent/f'{i}.log' for i in (1, 2)]
    first = launch(out, bare[0], logs[0])
    time.sleep(delay)
    second = launch(out, bare[1], logs[1])
    late = False
    if kill is not None:
        time.sleep(kill)
        late = any(out.glob('*/*/*/done.json'))      # killed after all was done: the next command tidies up
        first.send_signal(how)
    codes = [p.wait(600) for p in (first, second)]
    if late: codes[1] = codes[1] or launch(out, True, logs[1]).wait(600)
    texts = [log.read_text() for log in logs]
    wrong = [f'traceback in process {i}: {t[t.index("Traceback"):][-3000:]}'
             for i, t in enumerate(texts, 1) if 'Traceback' in t]
    fine = {0} if kill is None else {0, -how, 128 + how}
    if codes[0] not in fine or codes[1] != 0: wrong.append(f'exit codes {codes}: {texts[1][-300:]}')
    folders = list(out.glob('*/*/*'))
    if len(folders) != 1: return wrong + [f'{len(folders)} folders']
    try: run = load_run(folders[0])
    except Exception as e: return wrong + [repr(e)]
    if verify_files(run.path)['changed']: wrong.append('changed files')
    left = {p.name for p in run.path.iterdir()} - ALLOWED
    if left: wrong.append(f'left behind: {left}')
    until = time.monotonic() + 10
    while kernels(out) and time.monotonic() < until: time.sleep(.1)
    if kernels(out): wrong.append('a kernel lives on')
    columns = ['stage', 'epoch', 'lr', 'loss']
    if not pd.DataFrame(run.history)[columns].equals(pd.DataFrame(whole.history)[columns]):
        wrong.append('another history')
    if not np.array_equal(run.predictions['logits'], whole.predictions['logits']): wrong.append('other logits')
    if run.metrics != whole.metrics: wrong.append('other metrics')
    if not all(bare) and kill is None and not (run.path/'run.ipynb').exists(): wrong.append('no notebook')
    return wrong


def main(n, seed=0):
    random.seed(seed)
    faults = 0
    with tempfile.TemporaryDirectory() as d:
        whole = whole_run(Path(d))
        for i in range(n):
            bare, delay = (random.random() < .7, random.random() < .7), random.uniform(0, 3)
            kill = random.uniform(0, 6) if random.random() < .5 else None
            wrong = pair(Path(d), whole, bare, delay, kill)
            faults += bool(wrong)
            how = ' and '.join('bare' if b else 'notebook' for b in bare)
            print(f'{i + 1:3} {how}, {delay:.1f} s apart, {"first killed" if kill is not None else "both live"}: '
                  f'{"; ".join(wrong) or "fine"}', flush=True)
    found = dict(pairs=n, faults=faults)
    print(json.dumps(found))
    return found


if __name__ == '__main__': sys.exit(bool(main(*map(int, sys.argv[1:]))['faults']))
