"A run folder has one owner and checks itself: two processes, damage, signals, full and read-only disks"
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent/'faults'))
import damage
import pairs
from ltbook.data.checks import UserError
from ltbook.cli.main import app
from ltbook.runs.folder import load_run, run_id, scan_runs
from ltbook.runs.keeping import LEASE, LOCKS, PASSING, owned, still_owned, verify_files
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.train.files import write_json
from ltbook.train.processes import child_env

ENV = dict(COLUMNS='400')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run of `pairs`, undisturbed"
    top = tmp_path_factory.mktemp('pairs')
    return top, pairs.whole_run(top)


@pytest.mark.parametrize('bare, delay, kill', [
    ((True, True), .5, 4.), ((False, False), .3, None), ((True, False), .5, None), ((False, True), 2., 5.)])
def test_two_processes_on_one_folder(whole, bare, delay, kill):
    assert pairs.pair(*whole, bare, delay, kill) == []


def test_damaged_folders(tmp_path):
    "A few of each; `python tests/faults/damage.py 400 100` is the long form"
    runs, rng = damage.made(tmp_path), random.Random(5)
    intact = load_run(runs['finished', 0])
    intact.history, intact.predictions
    for what, n in (('finished', 20), ('half', 10)):
        for _ in range(n):
            about, wrong = damage.one(what, runs, tmp_path, rng, intact)
            assert not wrong, (about, wrong)


@pytest.fixture
def finished(tmp_path): return load_run(run(recipe('mixup', profile='smoke'), tmp_path/'out', device='cpu'))


def test_an_edited_accuracy_is_refused(finished):
    m = json.loads((finished.path/'metrics.json').read_text())
    m['final']['top1'] = m['stage1']['top1'] = .99
    (finished.path/'metrics.json').write_text(json.dumps(m))
    for verb in ('show', 'eval', 'verify'):
        p = CliRunner().invoke(app, [verb, str(finished.path)], env=ENV)
        assert p.exit_code in (1, 2) and 'metrics.json' in p.output and '99.0' not in p.output


def test_an_edited_recipe_is_refused(finished, tmp_path):
    "In a finished folder, in one without hashes, and in one that would go on"
    def edit(folder):
        r = json.loads((folder/'recipe.json').read_text())
        (folder/'recipe.json').write_text(json.dumps(r | dict(lr=.5)))
    edit(finished.path)
    with pytest.raises(UserError, match='recipe.json'): load_run(finished.path)
    done = json.loads((finished.path/'done.json').read_text())
    (finished.path/'done.json').write_text(json.dumps(dict(run=done['run'], files={})))
    with pytest.raises(UserError, match='not that of'): load_run(finished.path)
    class Stop(Exception): pass
    def stop(row): raise Stop
    for hashes in (True, False):
        out = tmp_path/f'half{hashes}'
        with pytest.raises(Stop): run(finished.recipe, out, device='cpu', report=stop)
        edit(out/run_id(finished.recipe))
        if not hashes: (out/run_id(finished.recipe)/'files.json').unlink()
        with pytest.raises(UserError, match='recipe.json'): run(finished.recipe, out, device='cpu')


def test_done_lists_every_file(finished):
    found = verify_files(finished.path)
    assert (
        not found['changed']
        and not found['absent']
        and not found['unlisted']
        and 'stage1.safetensors' in found['same'])
    assert {p.name for p in finished.path.iterdir()} == {*found['same'], 'done.json'}


def test_verify_names_the_file(finished):
    out = str(finished.path.parents[2])
    assert CliRunner().invoke(app, ['verify', '--out', out], env=ENV).exit_code == 0
    weights = finished.path/'stage1.safetensors'
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(bytes(content))
    p = CliRunner().invoke(app, ['verify', '--out', out], env=ENV)
    assert p.exit_code == 1 and 'stage1.safetensors was changed' in p.output
    p = CliRunner().invoke(app, ['eval', str(finished.path), '--weights', '--device', 'cpu'], env=ENV)
    assert p.exit_code == 2 and 'stage1.safetensors' in p.output


def test_one_bad_folder_is_one_line(finished):
    bad = finished.path.parent/'1-00000000'
    bad.mkdir()
    for name in ('done', 'recipe', 'metrics', 'env'): (bad/f'{name}.json').write_text('['*5000)
    runs, reasons = scan_runs(finished.path.parents[2])
    assert [r.id for r in runs] == [finished.id] and list(reasons) == [bad]
    p = CliRunner().invoke(app, ['show', '--out', str(finished.path.parents[2])], env=ENV)
    assert p.exit_code == 0 and finished.id in p.output and p.output.count('left out') == 1


@pytest.mark.parametrize('what', [
    'unfinished', 'damaged', 'method of somebody else', 'without its recipe', 'hardly begun'])
def test_rm_takes_what_cannot_be_read(finished, what, monkeypatch):
    file, out = finished.path/'recipe.json', str(finished.path.parents[2])
    if what == 'unfinished': (finished.path/'done.json').unlink()
    elif what == 'damaged': (finished.path/'metrics.json').write_text('{}')
    elif what == 'without its recipe': file.unlink()
    elif what == 'hardly begun':
        for p in finished.path.iterdir(): p.unlink() if p.is_file() else shutil.rmtree(p)
        (finished.path/'files.json').write_text('{}')
    else: monkeypatch.delitem(sys.modules['ltbook.methods.registry']._methods, 'mixup')
    p = CliRunner().invoke(app, ['show', str(finished.path)], env=ENV)
    assert p.exit_code == 2 and ('add --import' in p.output) == (what == 'method of somebody else'), p.output
    typo = CliRunner().invoke(app, ['show', finished.id + '0', '--out', out], env=ENV).output
    assert 'Warning' not in typo and (f'Did you mean {finished.id}?' in typo) == file.exists()
    assert CliRunner().invoke(app, ['rm', str(finished.path), '--yes'], env=ENV).exit_code == 0
    assert not finished.path.exists()


@pytest.mark.parametrize('content', ['{}', '[]'])
def test_rm_takes_nothing_else(finished, content):
    "Not a folder of runs, whatever lies in it, and not one that is called something else"
    place = finished.path.parents[2]
    (place/'recipe.json').write_text(content)
    (place/'done.json').write_text(content)
    for words in ([str(place)], ['digits', '--out', str(place)], [str(finished.path.parent)]):
        assert CliRunner().invoke(app, ['rm', *words, '--yes'], env=ENV).exit_code == 2
    assert finished.path.exists()


def test_a_module_that_fails_says_so(finished, tmp_path, monkeypatch):
    (tmp_path/'broken.py').write_text('(')
    monkeypatch.setenv('LTBOOK_IMPORT', '')      # what the verb adds is gone afterwards
    p = CliRunner().invoke(app, ['show', str(finished.path), '--import', str(tmp_path/'broken.py')], env=ENV)
    assert p.exit_code == 2 and 'broken.py' in p.output and 'SyntaxError' in p.output, p.output


def test_doctor_knows_features_by_their_name(finished, tmp_path):
    root = ('--data-root', str(tmp_path/'data'))
    said = CliRunner().invoke(app, ['features', str(finished.path), *root], env=ENV).output
    name = said.partition('ltbook run dlsa ')[2].split()[0]
    for words in ([name], ['features', name]):
        p = CliRunner().invoke(app, ['doctor', *words, *root], env=ENV)
        assert p.exit_code == 0 and 'feature_train.h5' in p.output and 'feature_test.h5' in p.output, p.output
    assert name in CliRunner().invoke(app, ['doctor', *root], env=ENV).output


def test_left_overs_of_a_finished_run(finished):
    "Killed just after the end: the next call takes them away"
    for name in (
        'training.pt',
        'sessions.json',
        'files.json',
        'progress.json',
        '.history.csv.99999999.part',
        '.run-99999999.part.ipynb',
        'failed.ipynb',
        '.lock'):
        (finished.path / name).write_text('{}')
    assert run(finished.recipe, finished.path.parents[2], device='cpu') == finished.path
    assert (
        not [p for q in (*PASSING, *LOCKS) for p in finished.path.glob(q)]
        and load_run(finished.path).metrics == finished.metrics)


@pytest.mark.parametrize('bare', [True, False], ids=['bare', 'notebook'])
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end(tmp_path, bare, how):
    "The sentence and the exit code, no kernel left, and the next call ends it without leftovers"
    words = [
        'run',
        'mislas',
        'digits',
        '--profile',
        'smoke',
        '--epochs',
        '20',
        '--device',
        'cpu',
        '--out',
        str(tmp_path),
        *['--bare'] * bare]
    folder = tmp_path/run_id(recipe('mislas', profile='smoke', epochs=20))
    log = tmp_path/'log'
    p = subprocess.Popen(
        [sys.executable, '-m', 'ltbook', *words],
        env=child_env(1) | {pairs.MARK: str(folder)},
        stdout=log.open('wb'),
        stderr=subprocess.STDOUT,
        start_new_session=True)
    while not (folder/'history.csv').exists():
        assert p.poll() is None, log.read_text()
        time.sleep(.05)
    p.send_signal(how)
    assert p.wait(60) == 128 + how
    assert 'Stopped. The same command goes on where it was.' in log.read_text() and 'Traceback' not in log.read_text()
    until = time.monotonic() + 10
    while pairs.kernels(folder) and time.monotonic() < until: time.sleep(.1)
    assert not pairs.kernels(folder)
    assert (
        len(load_run(run(recipe('mislas', profile='smoke', epochs=20), tmp_path, device='cpu')).history) == 21
        and {q.name for q in folder.iterdir()} <= pairs.ALLOWED)


def test_orphaned_kernel(tmp_path):
    "The notebook's process is killed outright: its kernel ends, or is waited for, and the run ends as it should"
    words = [
        'run',
        'mislas',
        'digits',
        '--profile',
        'smoke',
        '--epochs',
        '20',
        '--device',
        'cpu',
        '--out',
        str(tmp_path)]
    folder = tmp_path/run_id(recipe('mislas', profile='smoke', epochs=20))
    p = subprocess.Popen(
        [sys.executable, '-m', 'ltbook', *words],
        env=child_env(1) | {pairs.MARK: str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    while not (folder/'history.csv').exists():
        assert p.poll() is None
        time.sleep(.05)
    p.kill(); p.wait()
    assert run(recipe('mislas', profile='smoke', epochs=20), tmp_path, device='cpu') == folder
    assert len(load_run(folder).history) == 21
    until = time.monotonic() + 10
    while pairs.kernels(folder) and time.monotonic() < until: time.sleep(.1)
    assert not pairs.kernels(folder)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of its own, with so many bytes; skips where none can be mounted"
    place = tmp_path/'disk'
    place.mkdir()
    def mount(size):
        if (
            os.geteuid()
            or subprocess.run(
                ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(place)], capture_output=True).returncode):
            pytest.skip('no file system can be mounted here')
        return place
    yield mount
    while subprocess.run(['umount', str(place)], capture_output=True).returncode == 0: pass


@pytest.mark.parametrize('size', ['4k', '500k', '3m', '5m', '6m'])
def test_full_disk(small_disk, tmp_path, size):
    ("Full at one file or another: a sentence, nothing half-written, and with "
     "room the same command goes on to the same numbers")
    place, r = small_disk(size), recipe('mislas', profile='smoke')
    with pytest.raises(UserError, match='Cannot (write|make)'): run(r, place/'out', device='cpu')
    assert not list(place.rglob('*.part'))
    subprocess.run(['mount', '-o', 'remount,size=200m', str(place)], check=True)
    assert (
        load_run(run(r, place/'out', device='cpu')).metrics
        == load_run(run(r, tmp_path/'whole', device='cpu')).metrics)


def test_full_disk_for_a_notebook(small_disk):
    place = small_disk('3m')
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'ltbook',
            'run',
            'mislas',
            'digits',
            '--profile',
            'smoke',
            '--out',
            str(place/'out')],
        env=child_env(1),
        capture_output=True,
        text=True)
    assert p.returncode == 2 and 'Cannot' in p.stderr and 'Traceback' not in p.stderr, p.stderr


def test_read_only_disk(small_disk, finished):
    place = small_disk('50m')
    subprocess.run(['cp', '-r', str(finished.path.parents[2]), str(place/'out')], check=True)
    subprocess.run(['mount', '-o', 'remount,ro', str(place)], check=True)
    assert run(finished.recipe, place/'out', device='cpu').name == finished.path.name, 'a finished run can be read'
    with pytest.raises(UserError, match='Cannot (write|make)'):
        run(recipe('mislas', profile='smoke'), place/'out', device='cpu')


def test_another_owner_is_named(tmp_path):
    "Who waits says for whom, and goes on when the other one has ended"
    r = recipe('mixup', profile='smoke')
    folder = tmp_path/run_id(r)
    folder.mkdir(parents=True)
    code = (f'import time; from pathlib import Path; from ltbook.runs.keeping import owned\n'
            f'with owned(Path({str(folder)!r})): print("mine", flush=True); time.sleep(2)')
    p = subprocess.Popen([sys.executable, '-c', code], env=child_env(1), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'mine\n'
    said = []
    assert load_run(run(r, tmp_path, device='cpu', say=said.append)).recipe == r
    assert f'process {p.pid} on ' in said[0] and 'waiting' in said[0]
    p.wait()


def test_a_stolen_folder_is_left(tmp_path, monkeypatch):
    "A process that was taken for dead must not go on writing"
    import ltbook.runs.keeping as keeping
    from types import SimpleNamespace
    r, steps = recipe('mixup', profile='smoke'), []
    lost = property(lambda self: SimpleNamespace(reason='owner-changed') if steps else None)
    monkeypatch.setattr(keeping.SoftFileLease, 'compromise', lost)
    with pytest.raises(UserError, match='taken over'):
        run(r, tmp_path, device='cpu', on_step=lambda *a: steps.append(a))
    assert len(steps) == 1 and not (tmp_path/run_id(r)/'history.csv').exists()


def test_checks_cost_little(tmp_path, finished):
    "A hundred runs are checked in well under a second more than they are read"
    for seed in range(100):
        folder = tmp_path/'many'/'digits'/'mixup'/f'{seed}-{finished.path.name.split("-")[1]}'
        folder.mkdir(parents=True)
        r = finished.recipe.model_copy(update=dict(seed=seed))
        # as it was before there were lists
        protocol = {k: v for k, v in finished.metrics['protocol'].items() if k != 'data'}
        texts = dict(
            recipe=r.model_dump_json(),
            metrics=json.dumps(finished.metrics | dict(protocol=protocol)),
            env=json.dumps(finished.env))
        for k, text in texts.items(): (folder/f'{k}.json').write_text(text)
        write_json(folder/'done.json', dict(run=run_id(r)))
    began = time.process_time()
    assert len(scan_runs(tmp_path/'many')[0]) == 100
    without = time.process_time() - began
    for folder in (tmp_path/'many').glob('*/*/*'):
        from ltbook.runs.keeping import _hashes
        write_json(folder/'done.json', dict(run=f'digits/mixup/{folder.name}', files=_hashes(folder)))
    began = time.process_time()
    assert len(scan_runs(tmp_path/'many')[0]) == 100
    assert time.process_time() - began - without < .2


def test_an_absent_manifest_is_not_made_anew(tmp_path):
    "An unfinished run whose manifest is gone can't know its data"
    class Stop(Exception): pass
    def stop(row): raise Stop
    r = recipe('mixup', profile='smoke')
    with pytest.raises(Stop): run(r, tmp_path, device='cpu', report=stop)
    (tmp_path/run_id(r)/'manifest.json').unlink()
    with pytest.raises(UserError, match='manifest.json'): run(r, tmp_path, device='cpu')
    assert not (tmp_path/run_id(r)/'manifest.json').exists()


def test_a_list_that_is_gone_is_noticed(finished):
    "Without its list a new run would pass for one that is older than lists"
    (finished.path/'done.json').write_text(json.dumps(dict(run=finished.id)))
    with pytest.raises(UserError, match='lost the hash of recipe.json'): load_run(finished.path)
    assert CliRunner().invoke(app, ['verify', str(finished.path)], env=ENV).exit_code == 1


def test_a_list_that_was_emptied_is_noticed(finished):
    "An edited accuracy does not pass with its hash taken out"
    file = finished.path/'done.json'
    done = json.loads(file.read_text())
    for files in ({}, {k: v for k, v in done['files'].items() if k != 'metrics.json'}):
        file.write_text(json.dumps(done | dict(files=files)))
        with pytest.raises(UserError, match='lost the hash'): load_run(finished.path)
        assert CliRunner().invoke(app, ['verify', str(finished.path)], env=ENV).exit_code == 1


def test_a_copy_under_another_name_is_no_second_run(finished):
    "Neither counted twice nor shown as another seed"
    out = finished.path.parents[2]
    copy = finished.path.parent/finished.path.name.replace('0-', '1-')
    shutil.copytree(finished.path, copy)
    runs, bad = scan_runs(out)
    assert [r.id for r in runs] == [finished.id] and 'under another name' in bad[copy]
    with pytest.raises(UserError, match='under another name'):
        run(finished.recipe.model_copy(update=dict(seed=1)), out, device='cpu')


def test_an_unfinished_copy_is_no_other_seed(tmp_path):
    class Stop(Exception): pass
    def stop(row): raise Stop
    r = recipe('mixup', profile='smoke')
    with pytest.raises(Stop): run(r, tmp_path, device='cpu', report=stop)
    other = r.model_copy(update=dict(seed=1))
    shutil.copytree(tmp_path/run_id(r), tmp_path/run_id(other))
    with pytest.raises(UserError, match='another seed'): run(other, tmp_path, device='cpu')


def test_names_are_printed_as_they_are(finished):
    "Square brackets in a path or a reason are no markup"
    odd = finished.path.parents[2]/'a[b]'/'c[red]'
    (odd/'0-12345678').mkdir(parents=True)
    (odd/'0-12345678'/'done.json').write_text('{}')
    (odd/'0-12345678'/'recipe.json').write_text('{"method": "[/b]"}')
    p = CliRunner().invoke(app, ['show', '--out', str(finished.path.parents[2])], env=ENV)
    assert p.exit_code == 0 and 'a[b]/c[red]' in p.output


def test_killed_before_a_file_got_its_name(tmp_path):
    "The list knows a recipe and a manifest that are not there yet: the run has not begun"
    r = recipe('mixup', profile='smoke')
    folder = tmp_path/run_id(r)
    folder.mkdir(parents=True)
    write_json(folder/'files.json', {'recipe.json': '0'*64, 'manifest.json': '0'*64})
    assert load_run(run(r, tmp_path, device='cpu')).id == run_id(r)


def test_a_lock_without_an_owner_is_taken(tmp_path):
    "As a cut of the power can leave it"
    r = recipe('mixup', profile='smoke')
    (tmp_path/run_id(r)).mkdir(parents=True)
    lock = tmp_path/run_id(r)/'.lock'
    lock.touch()
    os.utime(lock, (time.time() - 120,)*2)
    assert load_run(run(r, tmp_path, device='cpu')).id == run_id(r)


def test_a_lock_without_an_owner_is_taken_while_one_waits(tmp_path):
    "Left not a minute ago by a process that was killed before it wrote its name"
    (tmp_path/'.lock').touch()
    os.utime(tmp_path/'.lock', (time.time() - LEASE + 3,)*2)
    said, began = [], time.monotonic()
    with owned(tmp_path, said.append): pass
    assert len(said) == 1 and 'another process' in said[0] and 1 < time.monotonic() - began < 20


def test_a_robbed_owner_knows_at_once(tmp_path):
    "A process that stood still longer than its lease reads who has the folder now, before it writes"
    with owned(tmp_path) as lock:
        still_owned(lock)
        text = (tmp_path/'.lock').read_text().replace(str(os.getpid()), '1')
        (tmp_path/'.lock').write_text(text)
        with pytest.raises(UserError, match='taken over'): still_owned(lock)


def test_a_damaged_manifest_is_told(tmp_path):
    class Stop(Exception): pass
    def stop(row): raise Stop
    r = recipe('mixup', profile='smoke')
    with pytest.raises(Stop): run(r, tmp_path, device='cpu', report=stop)
    (tmp_path/run_id(r)/'files.json').unlink()
    for text in ('{}', '{"a": 1}', '{"sha256": "x", "data": [1]}'):
        (tmp_path/run_id(r)/'manifest.json').write_text(text)
        with pytest.raises(UserError, match='manifest.json'): run(r, tmp_path, device='cpu')
