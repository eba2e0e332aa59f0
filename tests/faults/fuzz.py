"""Whatever is put before a reader: an answer or one documented error, in less than five seconds, in bounded memory.

`python tests/faults/fuzz.py 1000000` shares a million inputs among all readers; `fuzz.py 5000 stores` takes one of
them; `fuzz.py --atheris 100000 stores` lets atheris (`pip install atheris`) look for new paths through the code instead
of drawing changes by lot. Inputs that once failed are kept in `corpus/`, one folder a reader, and come first.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

if '--atheris' in sys.argv:      # sees which lines of ltbook an input reaches
    import atheris
    with atheris.instrument_imports(include=['ltbook']): import ltbook.cli.main, ltbook.studies.fusion

import ltbook.runs.run
from ltbook.cli.main import app
from ltbook.cli.words import parse_changes
from ltbook.data import hdf5, images, stores
from ltbook.data.checks import UserError, check_name, printable
from ltbook.data.features import check_features, describe_features
from ltbook.data.images import read_arrays
from ltbook.data.sampling import InstanceBalanced
from ltbook.data.pictures import Reading, Seen, read_square, scale_of
from ltbook.data.stores import ImageSet, read_h5, write_h5
from ltbook.methods.method import methods
from ltbook.methods.recipe import Recipe, recipe
from ltbook.runs.folder import load_run
from ltbook.runs.keeping import owned, read_manifest, recover
from ltbook.runs.run import run
from ltbook.studies.fusion import Logits, read_logits, write_logits
from ltbook.studies.grid import parse_seeds
from ltbook.train import loop
from ltbook.train.stage import Stage
from ltbook.train.files import listing, load_weights, parse_json, read_rows, save_state, save_weights

SECONDS, GROWTH = 5., 1000      # of one input; MiB, of all inputs of a reader
CORPUS = Path(__file__).parent/'corpus'
WORDS = [b'', b'0', b'-1', b'1e400', b'nan', b'inf', b'-0.0', b'null', b'none', b'true', b'[]', b'{}', b'[[[[', b'"',
         b'\x00', b'\xff\xfe', b'\x1b[31m', b'../', b'/', b'9'*400, b'99999999999999999999', b'1_0', b'\xe2\x80\xae',
         b'=', b'\n', b',', b'{"a":', b'3.5', b'\\', b"'; ls", b'$(ls)', b'%s', b'digits', b'cifar100', b'0.5', b'1']


class Lab:
    "Valid inputs for every reader, in a folder of its own."
    def __init__(self, top):
        self.top, self.place = top, top/'place'
        self.place.mkdir()
        self.done = run(recipe('mislas', 'digits', profile='smoke'), top/'out', device='cpu', say=lambda t: None)
        self.json = {p.name: p.read_bytes() for p in self.done.glob('*.json')}
        self.history = (self.done/'history.csv').read_bytes()
        self.predictions = (self.done/'predictions.h5').read_bytes()
        x = torch.arange(9*4*5*3).reshape(9, 4, 5, 3).to(torch.uint8)
        some = ImageSet(x, torch.arange(9) % 3, ('ant', 'bee', 'cat'))
        usual = dict(mean=[.5]*3, std=[.2]*3, pad=1, flip=True, source='x')
        self.store = write_h5(top/'a.h5', some, some, **usual).read_bytes()
        z = Logits('a', torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), np.ones(3, bool))
        self.logits = write_logits(top/'b.h5', z).read_bytes()
        with h5py.File(top/'c.h5', 'w') as f:
            f['features'], f['labels'] = np.ones((6, 4), 'f4'), np.arange(6) % 3
            f['head_weight'], f['head_bias'] = np.ones((3, 4), 'f4'), np.ones(3, 'f4')
        self.features = (top/'c.h5').read_bytes()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.weights = save_weights(top/'d.safetensors', self.network).read_bytes()
        self.stage, self.optimizer, self.rng = self.fresh()
        state = loop.snapshot(self.stage, self.optimizer, self.rng, 2, {})
        self.state = save_state(top/'e.pt', state).read_bytes()
        self.rows = b'stage,epoch,lr,loss\n' + b''.join(b'stage1,%d,0.1,2.5\n' % i for i in range(2))
        self.pictures = []
        for mode, kind in (('RGB', 'png'), ('L', 'jpeg'), ('P', 'gif'), ('RGBA', 'png'), ('I;16', 'png'), ('F', 'tiff'),
                           ('1', 'bmp'), ('RGB', 'webp'), ('RGB', 'ppm')):
            deep = Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7)*900)
            im = deep if mode == 'I;16' else Image.new('RGB', (7, 5), (10, 200, 30)).convert(mode)
            im.save(b := io.BytesIO(), kind)
            self.pictures.append(b.getvalue())
        self.pickle = pickle.dumps(dict(data=np.arange(6, dtype=np.uint8), fine_labels=[1, 2], fine_label_names=['a']))

    def fresh(self):
        "A stage that could go on."
        stage = Stage('stage1', nn.Linear(3, 2), InstanceBalanced([0, 1, 0, 1]), None, None, lambda e: .1, 5, 2)
        return stage, stage.optimizer(), np.random.default_rng(0)


SERVER = """
import os, resource, signal, sys, time, h5py
look = compile(sys.argv[1].split(chr(10), 4)[4], 'look', 'exec')
for line in sys.stdin:
    pid, sys.argv = os.fork(), ['-c', line[:-1]]
    if not pid:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            exec(look, dict(sys=sys, h5py=h5py))
        finally: os._exit(0)
    until = time.monotonic() + 3
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until: time.sleep(.0003)
    if not ended[0]: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    print('hangs' if not ended[0] else 'crash' if os.WIFSIGNALED(ended[1]) else 'fine', flush=True)
"""


def quick_child(path, stamp, seconds):
    "The look of a child process at an HDF5 file, as in `hdf5`, without starting Python anew for each"
    global server
    if server is None:
        look = hdf5._TRY.replace('print(flush=True)', '')
        server = subprocess.Popen([sys.executable, '-c', SERVER, look], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
    print(path, file=server.stdin, flush=True)
    answer = server.stdout.readline().strip()
    if answer != 'fine': raise UserError(f'{path}: {answer}')


server = None


def stop_server():
    "An answer that nobody waited for must not be taken for the next one"
    global server
    if server is not None: server.kill(); server.wait()
    server = None


def put(lab, name, data):
    path = lab.place/name
    path.write_bytes(data)
    return path


def words_of_a_recipe(lab, data):
    method, dataset, *pairs = (data.decode('utf-8', 'surrogateescape').split('\n') + ['', ''])[:12]
    changes = parse_changes([p for p in pairs if p])
    for k in ('method', 'dataset'): changes.pop(k, None)
    recipe(method, dataset, **changes).model_dump_json()


def command_line(lab, data):
    line = data.decode('utf-8', 'replace').split('\n')[:14]
    env = dict(COLUMNS='100', LTBOOK_DATA=str(lab.top/'none'), LTBOOK_IMPORT='')      # and as it was, afterwards
    p = CliRunner().invoke(app, line, env=env)
    if p.exception and not isinstance(p.exception, SystemExit): raise p.exception
    if p.exit_code not in (0, 1, 2): raise AssertionError(f'exit code {p.exit_code}')
    if 'Traceback' in p.output or '\x1b' in p.output: raise AssertionError(p.output[:300])


def small_words(lab, data):
    text = data.decode('utf-8', 'surrogateescape')
    assert printable(text).isprintable() or not text
    for f in (lambda t: check_name(t, 'run'), parse_seeds, lambda t: parse_json(t)):
        with contextlib.suppress(UserError, ValueError): f(text)


def run_folder(lab, data):
    "One JSON file of a finished run, of the kind that has no hashes"
    name, _, content = data.partition(b'\n')
    files = lab.json | {'done.json': b'{"run": %s}' % json.dumps('/'.join(lab.done.parts[-3:])).encode()}
    for k, v in files.items(): put(lab, k, content if k.encode() == name else v)
    found = load_run(lab.place)
    found.again, found.stages, found.data, found.id


def history(lab, data): read_rows(put(lab, 'history.csv', data))


def file_list(lab, data):
    put(lab, 'done.json', data)
    try: listing(lab.place)
    finally: (lab.place/'done.json').unlink()


def manifest(lab, data): put(lab, 'manifest.json', data); read_manifest(lab.place)


def unfinished_folder(lab, data):
    "What is left of a run that was killed, one file of it another"
    name, _, content = data.partition(b'\n')
    here = Path(tempfile.mkdtemp(dir=lab.top))
    files = {'recipe.json': lab.json['recipe.json'], 'manifest.json': lab.json['manifest.json'],
             'history.csv': lab.history, 'files.json': b'{}', 'training.pt': lab.state}
    for k, v in files.items(): (here/k).write_bytes(content if k.encode() == name else v)
    try: recover(here, ['stage1', 'stage2'], lambda text: None)
    finally:
        for p in here.iterdir(): p.unlink()
        here.rmdir()


def weights(lab, data): load_weights(put(lab, 'stage1.safetensors', data), lab.network)


def resume_file(lab, data):
    put(lab, 'history.csv', lab.rows); put(lab, 'training.pt', data)
    try: done, _, rows = loop.go_on(lab.place, *lab.fresh(), say=lambda text: None)
    finally: (lab.place/'training.pt').unlink(); (lab.place/'history.csv').unlink()
    assert 0 <= done <= 5 and len(rows) == done


def store(lab, data):
    train, test, _, attrs = read_h5(put(lab, 's.h5', data))
    assert (train.counts > 0).all() and len(train.gather(torch.tensor([0])))
    images._own(train, attrs)


def features(lab, data):
    path = put(lab, 'f.h5', data)
    if not check_features(path): describe_features(path)


def logits(lab, data): read_logits(put(lab, 'l.h5', data))


def archive(lab, data): read_arrays(data)


def picture(lab, data):
    path = put(lab, 'p.png', data)
    read_square(path, Reading(16, 'letterbox'), scale_of([path]), Seen())


def lock(lab, data):
    "What stands in a lock that nobody holds; a live owner is waited for, so that is taken away"
    path = put(lab, '.lock', data)
    os.utime(path, (1, 1))
    def waiting(text): raise UserError(text)
    try:
        with owned(lab.place, waiting): pass
    finally: path.unlink(missing_ok=True)


def _pairs():
    out = [b'mislas\ndigits\n', b'balanced_softmax\ncifar100\nimbalance=50\nprofile=fast']
    values = [b'0.5', b'1', b'true', b'none', b'"x"', b'[1,2]', b'1e-3', b'sgd']
    for i, m in enumerate(methods()):
        fields = [*Recipe.model_fields, *methods()[m].settings.model_fields]
        for j in range(0, len(fields), 4):
            text = b'\n'.join(f.encode() + b'=' + values[(i + j + k) % 8] for k, f in enumerate(fields[j:j + 4]))
            out.append(m.encode() + b'\ndigits\n' + text)
    return out


LINES = [b'run\nmislas\ndigits\n--profile\nsmoke\n--set\nlr=0.1', b'run\ncrt\ncifar10\n--from\nx\n--seeds\n0..3',
         b'show', b'show\nx\n--out\no', b'list\nmethods', b'list\nrecipes', b'eval\nx\n--shot-rule\nthirds\n--weights',
         b'shift\nx\n--ratios\n50,2\n--draws\n3', b'features\nx\n--stage\nstage1', b'doctor\ndata\ndigits',
         b'doctor\nfeatures\nx.h5', b'sweep\ndifficulty_net\nablation\n--dry-run', b'verify\nx', b'import\nf\nbirds',
         b'--help', b'run\n--help', b'--import\nnothing\nlist', b'bench\n--only\nx\n--seconds\n0']


def _inside(lab, files, names): return [n.encode() + b'\n' + files[n] for n in names]


# name -> (its share of the inputs, valid ones, the reader)
READERS = dict(
    words_of_a_recipe=(24, lambda lab: _pairs(), words_of_a_recipe),
    command_line=(3, lambda lab: LINES, command_line),
    small_words=(15, lambda lab: [b'0..7', b'0,1,2', b'{"a": [1, {"b": null}]}', b'birds-2', 'ü \u202e'.encode()],
                 small_words),
    run_folder=(10, lambda lab: _inside(
        lab, lab.json | {'done.json': b'{}'}, ('recipe.json', 'metrics.json', 'env.json', 'done.json')), run_folder),
    file_list=(12, lambda lab: [lab.json['done.json'], b'{"run": "x", "files": {"a": "b"}}'], file_list),
    manifest=(8, lambda lab: [lab.json['manifest.json']], manifest),
    history=(7, lambda lab: [lab.history, lab.rows], history),
    unfinished_folder=(4, lambda lab: _inside(
        lab, lab.json | {'history.csv': lab.history, 'files.json': b'{"history.csv": "00"}'},
        ('recipe.json', 'manifest.json', 'history.csv', 'files.json')), unfinished_folder),
    weights=(5, lambda lab: [lab.weights], weights),
    resume_file=(3, lambda lab: [lab.state], resume_file),
    store=(.7, lambda lab: [lab.store], store),
    features=(.7, lambda lab: [lab.features], features),
    logits=(.7, lambda lab: [lab.logits], logits),
    archive=(4, lambda lab: [lab.pickle], archive),
    picture=(2, lambda lab: lab.pictures, picture),
    lock=(1, lambda lab: [b'{"pid": 1, "hostname": "x"}', b''], lock))


def mutated(rng, valid):
    "A few changes of an input: bits, pieces taken out, doubled or swapped, odd words put in"
    data = bytearray(rng.choice(valid))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        n, what = len(data), rng.randrange(8)
        i, j = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
        j = min(j, i + rng.choice((1, 4, 16, 64)))
        if what == 0 and n: data[rng.randrange(n)] ^= 1 << rng.randrange(8)
        elif what == 1 and n: data[rng.randrange(n)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif what == 2: del data[i:j]
        elif what == 3: data[i:i] = data[i:j]
        elif what == 4: data[i:j] = rng.choice(WORDS)
        elif what == 5: data[i:i] = rng.choice(WORDS)
        elif what == 6: data[i:j] = rng.choice(valid)[i:j]
        elif n > 8: data = data[:i] if rng.random() < .3 else data
    return bytes(data)


class Hang(BaseException): pass


def look(reader, lab, data):
    "What is wrong with a reader's answer; None for nothing"
    def late(*_): raise Hang
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: reader(lab, data)
    except UserError: pass
    except Hang:
        stop_server()
        return f'hangs: {traceback.format_exc(limit=-3)}'
    except Exception as e: return f'{type(e).__name__}: {e} {traceback.format_exc(limit=-2)}'
    finally: signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def bench(top):
    "The readers' place, where nothing is trained, downloaded or imported"
    def none(*a, **k): raise UserError('Nothing is run here.')
    lab = Lab(Path(top))
    import ltbook.bench.table, ltbook.cli.sweep, ltbook.runs.notebook
    kept = [(ltbook.runs.run, 'prepare'), (ltbook.runs.run, 'run'), (ltbook.cli.sweep, 'run_cells'),
            (ltbook.bench.table, 'cli_bench'), (stores, 'import_folder'), (images, '_download_cifar'),
            (hdf5, '_tried')]
    was, here = [(m, k, getattr(m, k)) for m, k in kept], os.getcwd()
    for m, k in kept: setattr(m, k, quick_child if k == '_tried' else none)
    os.chdir(lab.top)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield lab
    finally:
        os.chdir(here)
        for m, k, v in was: setattr(m, k, v)


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10


def fuzz(lab, name, n, seed=0):
    "`n` inputs for one reader; returns a row of the table"
    _, corpus, reader = READERS[name]
    valid, rng, faults = corpus(lab), random.Random(f'{name} {seed}'), {}
    for data in valid: assert look(reader, lab, data) is None, (name, data[:200], look(reader, lab, data))
    kept = [p.read_bytes() for p in sorted((CORPUS/name).glob('*'))]
    before, began, longest = peak(), time.monotonic(), 0.
    for i in range(n):
        data = kept[i] if i < len(kept) else mutated(rng, valid)
        at = time.monotonic()
        wrong = look(reader, lab, data)
        longest = max(longest, time.monotonic() - at)
        if wrong and wrong not in faults:
            faults[wrong] = data
            print(f'{name}: {wrong}\n   {data[:300]!r}', flush=True)
            if len(faults) > 20: break
    return dict(reader=name, inputs=i + 1, kept=len(kept), faults=len(faults), longest_seconds=round(longest, 2),
                growth_mb=round(peak() - before), seconds=round(time.monotonic() - began)), faults


def shares(n, names):
    whole = sum(READERS[k][0] for k in names)
    return {k: math.ceil(n*READERS[k][0]/whole) for k in names}


def guided(name, n):
    "Let atheris choose the inputs of one reader; ends the process"
    with tempfile.TemporaryDirectory() as d, bench(d) as lab:
        (seeds := Path(d)/'seeds').mkdir()
        for i, data in enumerate(READERS[name][1](lab)): (seeds/str(i)).write_bytes(data)
        def one(data):
            wrong = look(READERS[name][2], lab, data)
            if wrong: raise AssertionError(wrong)
        atheris.Setup([sys.argv[0], str(seeds), f'-runs={n}', f'-timeout={SECONDS:g}', '-rss_limit_mb=4000',
                       f'-artifact_prefix={d}/', '-verbosity=0', '-print_final_stats=1'], one)
        atheris.Fuzz()


def one_reader(name, n, seed=0):
    "A reader in a process of its own; what it failed on is kept"
    with tempfile.TemporaryDirectory() as d, bench(d) as lab: row, faults = fuzz(lab, name, n, seed)
    for data in faults.values():
        (CORPUS/name).mkdir(parents=True, exist_ok=True)
        (CORPUS/name/hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return row


def main(n, names=None, seed=0):
    "Share `n` inputs among readers; returns their rows"
    rows = []
    for name, k in shares(n, names or [*READERS]).items():
        with ProcessPoolExecutor(1, get_context('spawn')) as pool:
            try: rows.append(pool.submit(one_reader, name, k, seed).result())
            except BrokenProcessPool: rows.append(dict(reader=name, inputs=k, faults=1, crashed=True))
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == '__main__':
    words = sys.argv[1:]
    if words[0] == '--atheris': guided(words[2], int(words[1]))
    sys.exit(bool(sum(r['faults'] for r in main(int(words[0]), words[1:]))))
