"""A run that is killed and started again: nothing finished is lost, and the numbers are those of an undisturbed run.

`python tests/faults/kills.py 500` kills at every write of a run, one after the other, and then at random moments.
"""
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from ltbook.methods.recipe import recipe
from ltbook.runs.folder import load_run, run_id
from ltbook.runs.keeping import PASSING, verify_files
from ltbook.runs.run import run

RECIPE = dict(profile='smoke', epochs=4, stage2_epochs=2)
EVENTS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.link', 'os.truncate')
SAME = ['stage', 'epoch', 'lr', 'loss']


def _writes(event, args):
    "Whether something on the disk is about to change."
    if event != 'open': return event in EVENTS
    mode, flags = args[1], args[2] if len(args) > 2 else 0
    return bool(set(mode or '') & set('wax+')) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def fork(out, say_to=None, die_at=None):
    "Start the run in a copy of this process, which may end itself at its `die_at`-th write; returns its number."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        seen = 0
        def hook(event, args):
            nonlocal seen
            if not _writes(event, args) or str(out) not in str(args[0]): return
            if seen == die_at: os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        if die_at is not None: sys.addaudithook(hook)
        warnings.simplefilter('ignore')
        run(recipe('mislas', 'digits', **RECIPE), out, device='cpu', say=lambda text: None)
        if say_to: say_to.write_text(str(seen))
        code = 0
    except BaseException as e:
        if say_to: say_to.write_text(f'{type(e).__name__}: {e}')
    finally:
        os._exit(code)


def ended(pid, seconds=120.):
    "How a process ended: its exit code, or minus its signal; None for one that hangs, which is then killed."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.005)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)


def whole_run(top):
    "The undisturbed run, the number of its writes and its seconds."
    began = time.monotonic()
    assert ended(fork(top/'whole', top/'writes', 10**9)) == 0, (top/'writes').read_text()
    found = load_run(next((top/'whole').glob('*/*/*')))
    found.history, found.predictions
    return found, int((top/'writes').read_text()), time.monotonic() - began


def finished_stages(folder): return {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}


def trial(top, whole, when, out=None):
    """Kill once for every entry of `when` (a number of writes, or seconds as a float), then let it end.

    Returns how often it was really killed, and what is wrong."""
    out = out or Path(tempfile.mkdtemp(dir=top))
    folder, killed, wrong = out/run_id(whole.recipe), 0, []
    for at in when:
        before = finished_stages(folder)
        pid = fork(out, top/'said', at if isinstance(at, int) else None)
        if isinstance(at, float):
            time.sleep(at)
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code is None: wrong.append('hangs')
        if code == 1: wrong.append((top/'said').read_text())
        killed += code == -signal.SIGKILL
        after = finished_stages(folder)
        if any(after.get(k) != v for k, v in before.items()): wrong.append('a finished stage is lost')
    code = ended(fork(out, top/'said'))
    if code != 0: return killed, wrong + ['hangs' if code is None else (top/'said').read_text()]
    run_ = load_run(folder)
    if verify_files(folder)['changed']: wrong.append('changed files')
    left = [p.name for q in PASSING for p in folder.glob(q)]
    if left: wrong.append(f'left behind: {left}')
    if run_.metrics != whole.metrics: wrong.append('other metrics')
    if not run_.history[SAME].equals(whole.history[SAME]): wrong.append('another history')
    if not np.array_equal(run_.predictions['logits'], whole.predictions['logits']): wrong.append('other logits')
    if finished_stages(folder) != finished_stages(whole.path): wrong.append('other weights')
    shutil.rmtree(out)
    return killed, wrong


def main(n, seed=0):
    "At least `n` kills; returns trials and faults"
    rng, kills, trials, faults = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as d:
        whole, writes, seconds = whole_run(Path(d))
        plan = [[k] for k in range(writes)] if n >= writes else [[k] for k in rng.sample(range(writes), n)]
        while kills < n:
            when = plan[trials] if trials < len(plan) else [
                rng.uniform(0, 1.2*seconds) if rng.random() < .7 else rng.randrange(writes)
                for _ in range(rng.randint(1, 3))]
            killed, wrong = trial(Path(d), whole, when)
            kills, trials, faults = kills + killed, trials + 1, faults + bool(wrong)
            if wrong: print(f'{when}: {"; ".join(wrong)}', flush=True)
            assert trials < 20*n + 20, 'the run is never killed'
    found = dict(kills=kills, runs=trials, writes=writes, faults=faults)
    print(json.dumps(found))
    return found


if __name__ == '__main__': sys.exit(bool(main(*map(int, sys.argv[1:]))['faults']))
