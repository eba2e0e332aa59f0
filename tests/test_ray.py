"Every method on digits, two seeds: on this machine and on two Ray nodes, through kills of all kinds, the same numbers"
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest

import ltbook
from ltbook.methods.method import methods
from ltbook.runs.folder import find_runs, load_run
from ltbook.studies.on_ray import run_there, unpacked
from ltbook.studies.report import report
from ltbook.train.processes import child_env
from watching import numbers, processes

pytestmark = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
METHODS = sorted(m.name for m in methods().values() if m.name != 'dlsa')      # it needs features of a run


def begin(out, *more):
    return subprocess.Popen(
        [sys.executable, '-m', 'ltbook', 'sweep', '--method', ','.join(METHODS), '--seeds', '0..1',
         '--profile', 'smoke', '--bare', '--out', str(out), *more],
        env=child_env(1) | dict(COLUMNS='300'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(what, seconds=240):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.05)
    return found


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "On the local engine: SIGKILL of a cell, then of the sweep, then the same command"
    out = tmp_path_factory.mktemp('here')
    first = begin(out)
    os.kill(until(lambda: processes('ltbook run', str(out)))[0][0], signal.SIGKILL)
    until(lambda: len(list(out.glob('*/*/*/done.json'))) > 3)
    first.kill()
    first.wait()
    second = begin(out)
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0 and len(numbers(out)) == 2*len(METHODS), said
    return out


@pytest.fixture(scope='module')
def cluster():
    pytest.importorskip('ray')
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    from ray.cluster_utils import Cluster
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    yield c
    c.shutdown()


def test_two_nodes_lose_a_worker_a_node_and_the_sweep(here, cluster, tmp_path):
    node = cluster.add_node(num_cpus=1)
    words = '--engine', 'ray', '--engine-set', f'address={cluster.address}'
    done = lambda: len(list(tmp_path.glob('*/*/*/done.json')))
    first = begin(tmp_path, *words)
    both = until(lambda: len(p := processes('ltbook run', str(tmp_path))) == 2 and p)      # one on each node
    os.kill(both[0][1], signal.SIGKILL)      # the worker, whose training is left alone
    os.kill(both[1][0], signal.SIGKILL)      # the training, whose worker is left alone
    until(lambda: done() > 3)
    cluster.remove_node(node, allow_graceful=False)
    before = done()
    until(lambda: done() > before)
    first.kill()
    first.wait()
    second = begin(tmp_path, *words)
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0, said
    assert numbers(tmp_path) == numbers(here) and len(numbers(here)) == 2*len(METHODS)
    text = report(find_runs(tmp_path), tmp_path/'report.html').read_text()
    assert all(f'>{m}</a>' in text for m in METHODS) and text.count('<details id=') == 2*len(METHODS)
    left = [p.name for p in tmp_path.rglob('.*') if p.is_dir() or p.parent == tmp_path]
    assert len(left) == 1 and left[0].startswith('.seen-'), left      # of the sweep that was killed


def test_a_node_that_shares_no_folder_sends_the_run(here, tmp_path):
    "The same numbers, whole, under the same name, and nothing else is left"
    was = load_run(next(here.glob('digits/mixup/0-*')))
    words = ['run', 'mixup', 'digits', '--profile', 'smoke', '--seed', '0', '--bare', '--out', str(tmp_path/'nowhere')]
    code, archive = run_there(words, was.id, 'no-such-token', ltbook.__version__, 1)
    assert code == 0 and not (tmp_path/'nowhere').exists()
    unpacked(archive, tmp_path/was.id)
    assert load_run(tmp_path/was.id).metrics == was.metrics
    assert [p.name for p in (tmp_path/was.id).parent.iterdir()] == [(tmp_path/was.id).name]
