"Large sets: the same numbers by every path, real lists, packing that is killed, full disks, two processes"
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import ltbook.data.pack as packing
from ltbook.cli.main import app
from ltbook.data.checks import UserError
from ltbook.data.files import FileStore, file_set
from ltbook.data.images import ImageData, data_root, load_images
from ltbook.data.large import declare_files, pack_large, read_lists
from ltbook.data.lists import LARGE, ImageList, by_count, category_names, read_list, recognised
from ltbook.data.pack import pack
from ltbook.data.pictures import Reading
from ltbook.data.profile import long_tail, long_tail_counts
from ltbook.data.stores import ImageSet, read_h5, write_h5
from ltbook.methods import method
from ltbook.methods.recipe import recipe
from ltbook.runs.folder import load_run
from ltbook.runs.evaluate import evaluate
from ltbook.runs.run import make_context, run
from ltbook.train.feed import feed

sys.path.insert(0, str(Path(__file__).parent/'faults'))
import disk

LISTS = data_root()/'lists.zip'
COUNTS = dict(train=(40, 25, 12, 5), test=(6, 6, 6, 6))


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Squares of 32 pixels as PNG files with lists: (folder of images, folder of lists)"
    top, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    (top/'lists').mkdir()
    for part, counts in COUNTS.items():
        lines = []
        for k, n in enumerate(counts):
            for i in range(n):
                file = top/'images'/part/f'kind {k}'/f'{i}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                x = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(30*k)
                Image.fromarray(x).save(file)
                lines.append(f'{part}/kind {k}/{i}.png {k}\n')
        (top/'lists'/f'{part}.txt').write_text(''.join(lines))
    return top/'images', top/'lists'


def sets_of(photographs, workers=1):
    listed = read_lists('photographs', photographs[1])
    return [file_set(listed.parts[k], photographs[0], listed.classes, Reading(32), workers) for k in COUNTS]


def by_path(path, photographs, folder):
    "Both parts in memory, from a packed file, or from the pictures with some threads"
    train, test = sets_of(photographs, path if isinstance(path, int) else 1)
    if path == 'memory': return [ImageSet(s.gather(torch.arange(len(s))), s.labels, s.classes) for s in (train, test)]
    if path == 'packed': return read_h5(pack(folder/'x.h5', train, test))[:2]
    return train, test


@pytest.mark.parametrize('name', ['mislas', 'class_balanced_experts'])
def test_the_same_weights_by_every_path(name, photographs, tmp_path, monkeypatch):
    "An epoch with crops, mirrors and mixup from memory, from a packed file, and from files with one and two threads"
    changes = dict(class_balanced_experts=dict(splits='quantile', ratios=(2, 2, 2), expert_epochs=(1, 1, 1)))
    found = {}
    for path in ('memory', 'packed', 1, 2):
        parts = by_path(path, photographs, tmp_path)
        mean = dict(mean=(.5,)*3, std=(.25,)*3)
        parts = [ImageSet(p.store, p.labels, p.classes, **mean) for p in parts]
        data = ImageData('photographs', *parts, 4, True, None, '')
        monkeypatch.setattr(method, 'load_images', lambda *a, **k: data)
        r = recipe(name, 'photographs', profile='smoke', epochs=1, max_steps=None, batch_size=32,
                   **changes.get(name, {}))
        done = run(r, tmp_path/str(path), device='cpu', say=lambda text: None)
        found[path] = {f'{p.name} {k}': v for p in done.glob('*.safetensors') for k, v in load_file(p).items()}
    first = found.pop('memory')
    assert first and all(torch.equal(first[k], other[k]) for other in found.values() for k in first)


@pytest.mark.skipif(not (data_root()/'cifar100.h5').is_file(), reason='cifar100.h5 is not in the data folder')
def test_cifar_as_files_gives_the_same_weights(tmp_path, monkeypatch):
    """CIFAR-100-LT as PNG files with a list, as a packed file and in memory: the same images, batches and weights of
    MiSLAS. A few steps on an eighth of it, or with LTBOOK_WHOLE=1 a whole epoch on all of it."""
    whole, root, lists = os.environ.get('LTBOOK_WHOLE') == '1', tmp_path/'images', tmp_path/'lists'
    real = load_images('cifar100')
    train = real.train.subset(long_tail(real.train.labels, 100).indices)
    test = real.test
    if not whole:       # at least one image of every class
        train, test = (p.subset(np.concatenate([np.flatnonzero(p.labels.numpy() == k)[::step] for k in range(100)]))
                       for p, step in ((train, 8), (test, 50)))
    lists.mkdir()
    for part, data in dict(train=train, test=test).items():
        (root/part).mkdir(parents=True)
        pixels, lines = data.gather(torch.arange(len(data))).numpy(), []
        for i, (x, k) in enumerate(zip(pixels, data.labels.tolist())):
            Image.fromarray(x).save(root/part/f'{i}.png', compress_level=1)
            lines.append(f'{part}/{i}.png {k}\n')
        (lists/f'{part}.txt').write_text(''.join(lines))
    found, sums, batches = {}, set(), {}
    for path in ('memory', 'packed', 1, 2):
        parts = (train, test) if path == 'memory' else by_path(path, (root, lists), tmp_path)
        parts = [ImageSet(p.gather(torch.arange(len(p))) if path == 'memory' else p.store, p.labels, train.classes,
                          mean=real.train.mean, std=real.train.std) for p in parts]
        sums.add(tuple(p.sha256() for p in parts))
        data = ImageData('cifar100', *parts, 4, True, None, '')
        monkeypatch.setattr(method, 'load_images', lambda *a, **k: data)
        r = recipe('mislas', 'as_files', profile='smoke', epochs=1, max_steps=None if whole else 4,
                   **({} if whole else dict(batch_size=48)))
        context = make_context(r, device='cpu')
        if whole: assert np.array_equal(context.trained_counts, long_tail_counts(500, 100, 100))
        rng = np.random.default_rng(5)
        order = rng.permutation(len(train))[:320]
        view = context.view()
        batches[path] = [view.apply(b) for b in feed(view, order, 64, rng, workers=2 if path == 2 else 0)]
        done = run(r, tmp_path/str(path), device='cpu', say=lambda text: None)
        found[path] = {f'{p.name} {k}': v for p in done.glob('*.safetensors') for k, v in load_file(p).items()}
    first, mixed = found.pop('memory'), batches.pop('memory')
    assert len(sums) == 1 and first and len(mixed) == 5 and set(mixed[0]) == {'x', 'y', 'y_mix', 'lam'}
    for other in batches.values():
        assert all(torch.equal(a[k], b[k]) for a, b in zip(mixed, other, strict=True) for k in a)
    assert all(torch.equal(first[k], other[k]) for other in found.values() for k in first)


def packer(out, photographs, slowly=.02):
    "Packing in a copy of this process, slowly enough to be killed"
    pid = os.fork()
    if pid: return pid
    try:
        packing.PIECE = 5
        pack(out, *sets_of(photographs), lambda done, of: time.sleep(slowly))
    finally: os._exit(0)


@pytest.mark.parametrize('seed', range(3))
def test_killed_while_packing(seed, photographs, tmp_path, monkeypatch):
    whole = pack(tmp_path/'whole.h5', *sets_of(photographs)).read_bytes()
    rng, told = random.Random(seed), []
    for _ in range(3):
        pid = packer(tmp_path/'x.h5', photographs)
        time.sleep(rng.uniform(.02, .2))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert pack(tmp_path/'x.h5', *sets_of(photographs), lambda done, of: told.append(done)).read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir() if '.part' in p.name or 'note' in p.name) == []


def test_other_pictures_are_not_mixed_with_what_was_packed(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, 'PIECE', 10)
    train, test = sets_of(photographs)
    class Stop(Exception): pass
    def stop(done, of): raise Stop
    with pytest.raises(Stop): pack(tmp_path/'x.h5', train, test, stop)
    other, told = ImageSet(train.store, train.labels.flip(0), train.classes), []
    pack(tmp_path/'x.h5', other, test, lambda done, of: told.append(done))
    assert told[0] == 10 and torch.equal(read_h5(tmp_path/'x.h5')[0].labels, other.labels)


def with_validation(photographs, top):
    "The same photographs and lists, and a third list of two pictures a class"
    images, lists = top/'images', top/'lists'
    shutil.copytree(photographs[1], lists)
    lines = []
    for part in ('train', 'test'): shutil.copytree(photographs[0]/part, images/part)
    for k in range(4):
        for i in range(2):
            file = images/'train'/f'kind {k}'/f'v{i}.png'
            Image.new('RGB', (32, 32), (60*k, 90*i, 9)).save(file)
            lines.append(f'{file.relative_to(images)} {k}\n')
    (lists/'val.txt').write_text(''.join(lines))
    return images, lists


def test_a_validation_list_becomes_a_third_part(photographs, tmp_path, monkeypatch):
    "Packed with a stop on the way, and left as files; it is neither trained nor tested on"
    images, lists = with_validation(photographs, tmp_path)
    pack_large('once', images, lists, tmp_path/'d', Reading(16))
    once = load_images('once', tmp_path/'d')
    assert once.val.counts.tolist() == [2]*4 and len(once.train) == 82 and len(once.test) == 24
    monkeypatch.setattr(packing, 'PIECE', 5)
    class Stop(Exception): pass
    def stop(done, of):
        assert of == 82 + 24 + 8
        if done > 106: raise Stop
    with pytest.raises(Stop): pack_large('twice', images, lists, tmp_path/'d', Reading(16), progress=stop)
    told = []
    pack_large('twice', images, lists, tmp_path/'d', Reading(16), progress=lambda done, of: told.append(done))
    assert told == [114], 'five of the validation images were there'
    declare_files('files', images, lists, tmp_path/'d', Reading(16))
    for name in ('twice', 'files'):
        other = load_images(name, tmp_path/'d')
        assert {k: p.sha256() for k, p in other.parts.items()} == {k: p.sha256() for k, p in once.parts.items()}
    p = CliRunner().invoke(app, ['doctor', 'files', '--data-root', str(tmp_path/'d')], env=dict(COLUMNS='200'))
    assert 'val    8 images' in p.output and p.exit_code == 0
    r = recipe('difficulty_net', 'once', n_meta=1, auto_augment=False, cutout_side=0)
    context = make_context(r, tmp_path/'d')
    assert {k: len(p) for k, p in context.parts.items()} == dict(train=82, meta=4, val=4, test=24)
    assert context.tail.of == 'val'


def test_crops_of_whole_photographs_are_other_data(photographs, tmp_path):
    "A run that was begun on a packed set does not go on with the files it was made of, whose crops are others"
    pack_large('x', *photographs, tmp_path/'d', Reading(32))
    declare_files('x', *photographs, tmp_path/'e', Reading(32))
    for crop in ('shift', 'resized'):
        r = recipe('mislas', 'x', profile='smoke', crop=crop, side=16)
        said = [make_context(r, tmp_path/d).fingerprint for d in 'de']
        assert [s.pop('crops', '') for s in said] == (['squares', 'whole'] if crop == 'resized' else ['', ''])
        assert said[0] == said[1]
    run(r, tmp_path/'o', tmp_path/'d', say=lambda text: None)
    folder = run(r, tmp_path/'o', tmp_path/'d', say=lambda text: None)
    assert evaluate(load_run(folder), weights=True, root=tmp_path/'e').metrics, 'a test has no random crops'
    (folder/'done.json').unlink()
    (folder/'metrics.json').unlink()
    with pytest.raises(UserError, match='crops squares then, whole now'): run(r, tmp_path/'o', tmp_path/'e')


@pytest.mark.parametrize('at', ['', 'a folder too high', 'a folder too deep'])
def test_doctor_knows_the_other_layout_and_other_folders(at, tmp_path, monkeypatch):
    "Lists of Places-LT for the archive at 256 pixels, images from the one in class folders"
    listed = ImageList(('data_256/a/abbey/1.jpg', 'data_256/b/beach/1.jpg'), np.array([0, 1]), 'train')
    s = replace(LARGE['places_lt'], n_classes=2, parts=dict(train=(2, 1, 1), test=(1, 1, 1)))
    monkeypatch.setitem(LARGE, 'places_lt', s)
    (tmp_path/'lists').mkdir()
    (tmp_path/'lists'/'train.txt').write_text(''.join(f'{f} {k}\n' for f, k in zip(listed.files, listed.labels)))
    (tmp_path/'lists'/'test.txt').write_text('val_256/1.jpg 0\n')
    root = tmp_path/'places'
    files = [*listed.files, 'val_256/1.jpg'] if at else ['train/abbey/1.jpg', 'train/beach/1.jpg', 'val/abbey/2.jpg']
    for f in files:
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 9)).save(root/f)
    here = {'': root, 'a folder too high': tmp_path, 'a folder too deep': root/'data_256'}[at]
    p = CliRunner().invoke(app, ['doctor', 'places_lt', '--images', str(here), '--lists', str(tmp_path/'lists')],
                           env=dict(COLUMNS='400'))
    said = f'--images {root}' if at else 'use lists whose paths begin with train/'
    assert p.exit_code == 1 and '2 of 2 of train' in p.output and said in p.output, p.output


def test_two_processes_pack_one_file(photographs, tmp_path):
    pid = packer(tmp_path/'x.h5', photographs, slowly=1.)
    until = time.monotonic() + 20
    while not (tmp_path/'.x.h5.note.json').exists() and time.monotonic() < until: time.sleep(.01)
    with pytest.raises(UserError, match='packed by another process'): pack(tmp_path/'x.h5', *sets_of(photographs))
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert pack(tmp_path/'x.h5', *sets_of(photographs)).exists()


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from PIL import Image
from ltbook.data.checks import UserError
from ltbook.data.features import write_features
from ltbook.data.files import file_set
from ltbook.data.lists import ImageList
from ltbook.data.pack import pack
from ltbook.data.pictures import Reading
from ltbook.data.stores import ImageSet, write_h5
from ltbook.runs.measured import write_predictions
top, y, rng = Path(sys.argv[1]), torch.arange(64) % 4, np.random.default_rng(0)
for i in range(64): Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(top/f'{i}.png')
files = file_set(ImageList(tuple(f'{i}.png' for i in range(64)), y.numpy(), 'list'), top, 'abcd', Reading(16))
memory = ImageSet(files.gather(torch.arange(64)), y, tuple('abcd'))
z = rng.normal(size=(64, 100)).astype(np.float32)
context = SimpleNamespace(parts=dict(test=memory), fingerprint={}, tail=SimpleNamespace(counts=np.arange(4)),
                          logits=dict(stage1=dict(logits=z), stage2=dict(logits=z)))
writers = dict(
    set=lambda p: write_h5(p, memory, memory), packed=lambda p: pack(p, files, files),
    features=lambda p: write_features(p, [(torch.from_numpy(z), y)]*3, rows=192),
    streamed=lambda p: write_features(p, [(torch.from_numpy(z), y)]*3),
    predictions=lambda p: write_predictions(p, context))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name, write in writers.items():
    said, path = set(), top/f'{name}.h5'
    full = write(path).stat().st_size
    path.unlink()
    for least in (*range(0, 12_000, 500), *range(12_000, full, 7_000), full - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, resource.RLIM_INFINITY))
        try: write(path); raise SystemExit(f'{name} was written to {least} of {full} bytes')
        except UserError as e: said.add(str(e).split(': ')[-1])
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
        assert not path.exists()
    assert write(path).stat().st_size == full
    print(name, full, said)
"""


def test_no_writer_crashes_where_there_is_no_room(tmp_path):
    "Files that may have so many bytes and no more, as on a full disk; the HDF5 library alone ends the process"
    p = subprocess.run([sys.executable, '-c', SMALL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 0, (p.returncode, p.stdout, p.stderr[-2000:])
    assert len(p.stdout.splitlines()) == 5 and not p.stderr


@pytest.mark.parametrize('reserves', [True, False])
def test_a_full_disk(reserves, photographs, tmp_path, monkeypatch):
    """Met before the first picture where a file system can keep room, else on the way; with room the same file.
    What was packed before is not packed again."""
    monkeypatch.setattr(packing, 'PIECE', 5)
    if not reserves: monkeypatch.delattr(os, 'posix_fallocate')
    place = tmp_path/'disk'
    place.mkdir()
    if os.geteuid() or not disk.mounted(place, 'size=100k'): pytest.skip('no file system can be mounted here')
    told = []
    try:
        with pytest.raises(UserError, match='Cannot write'):
            pack(place/'x.h5', *sets_of(photographs), lambda done, of: told.append(done))
        assert bool(told) != reserves and not (place/'x.h5').exists()
        before = told[-1] if told else 0
        told.clear()
        subprocess.run(['mount', '-o', 'remount,size=9m', str(place)], check=True)
        pack(place/'x.h5', *sets_of(photographs), lambda done, of: told.append(done))
        assert told[0] == before + 5 and told[-1] == sum(map(sum, COUNTS.values()))
        assert (place/'x.h5').read_bytes() == pack(tmp_path/'x.h5', *sets_of(photographs)).read_bytes()
    finally: subprocess.run(['umount', str(place)], check=True)


@pytest.mark.parametrize('end', ['png', 'jpg'])
def test_a_broken_picture_is_named_and_its_repair_is_enough(end, photographs, tmp_path):
    train, test = sets_of(photographs)
    whole, bad = tmp_path/f'whole.{end}', tmp_path/f'bad.{end}'
    Image.open(train.store.files[50]).save(whole)
    bad.write_bytes(whole.read_bytes()[:-200])
    files = train.store.files.copy()
    files[50] = bad
    broken = ImageSet(train.store.like(files), train.labels, train.classes)
    with pytest.raises(UserError, match=f'bad.{end}'): pack(tmp_path/'x.h5', broken, test)
    assert not (tmp_path/'x.h5').exists()
    bad.write_bytes(whole.read_bytes())
    packed, want = read_h5(pack(tmp_path/'x.h5', broken, test))[0].images, train.gather(torch.arange(len(train)))
    want[50] = torch.from_numpy(np.array(Image.open(whole)))
    assert torch.equal(packed, want)


def test_from_lists_to_a_run_at_the_command_line(photographs, tmp_path, monkeypatch):
    images, lists = map(str, photographs)
    monkeypatch.chdir(tmp_path)
    def ltbook(*words): return CliRunner().invoke(app, [*words], env=dict(COLUMNS='300'))
    p = ltbook('doctor', 'photographs', '--images', images, '--lists', lists, '--deep')
    assert p.exit_code == 0 and 'train     82 images, 4 classes, 40 to 5 a class' in p.output
    command = p.output.split('Pack them: ltbook ')[1].split()
    p = ltbook(*command, '--size', '24', '--data-root', 'd')
    assert p.exit_code == 0 and 'ltbook run mislas photographs' in p.output, p.output
    assert 'replace it with --force' in ltbook(*command, '--data-root', 'd').output
    p = ltbook('run', 'mislas', 'photographs', '--profile', 'smoke', '--bare', '--data-root', 'd')
    assert p.exit_code == 0, p.output
    assert read_h5(tmp_path/'d'/'photographs.h5')[0].shape == (24, 24, 3)
    packed = load_run(next((tmp_path/'outputs'/'photographs'/'mislas').glob('*')))
    p = ltbook(*command, '--size', '24', '--data-root', 'e', '--as-files')
    assert p.exit_code == 0 and sorted(q.name for q in (tmp_path/'e').iterdir()) == [
        '.photographs.files.json.rows.npz', 'photographs.files.json'], p.output
    p = ltbook('run', 'mislas', 'photographs', '--profile', 'smoke', '--bare', '--data-root', 'e', '--out', 'o')
    files = load_run(next((tmp_path/'o'/'photographs'/'mislas').glob('*')))
    assert p.exit_code == 0 and files.data == packed.data, p.output
    assert np.array_equal(files.predictions['logits'], packed.predictions['logits']), 'to the bit'
    # in the place of a packed set it is what is read from now on
    p = ltbook(*command, '--size', '16', '--data-root', 'd', '--as-files', '--force')
    assert p.exit_code == 0 and load_images('photographs', tmp_path/'d').train.shape == (16, 16, 3), p.output
    for words, told in ((('doctor', 'places_lt'), '--images FOLDER --lists FOLDER'),
                        (('doctor', 'places_lt', '--images', images), 'needs both'),
                        (('doctor', 'data'), 'ltbook doctor data NAME'),
                        (('pack', 'x', '--images', images, '--lists', 'none'), 'is not a folder'),
                        (('pack', 'cifar10', '--images', images, '--lists', lists), 'built-in'),
                        (('pack', 'places_lt', '--images', images, '--lists', lists), 'no train list of Places-LT')):
        p = ltbook(*words)
        assert p.exit_code == 2 and told in p.output, (words, p.output)


def test_a_list_of_another_folder_names_the_first_missing_file(photographs, tmp_path):
    with pytest.raises(UserError, match='82 of 82 pictures of .*train.txt are not in .* is train/kind 0/0.png'):
        pack_large('photographs', tmp_path, photographs[1], tmp_path)
    assert not (tmp_path/'photographs.h5').exists()


@pytest.mark.parametrize('seed', range(3))
def test_by_count_is_stable(seed):
    counts = np.random.default_rng(seed).integers(1, 9, 50)
    order = by_count(counts)
    assert sorted(order.tolist()) == [*range(50)]
    assert all((counts[a], -a) >= (counts[b], -b) for a, b in zip(order, order[1:]))


@pytest.mark.skipif(not LISTS.is_file(), reason='the published lists are not here')
def test_published_lists_are_recognised(tmp_path):
    with zipfile.ZipFile(LISTS) as z: z.extractall(tmp_path)
    parts = {'train': 'train', 'test': 'test', 'val': 'val', 'forward': 'forward', 'backward': 'backward'}
    seen = set()
    for path in sorted(tmp_path.glob('*.txt')):
        key = next(k for p, k in (('ImageNet', 'imagenet_lt'), ('Places', 'places_lt'), ('iNat', 'inaturalist2018'))
                   if path.name.startswith(p))
        part = next(v for k, v in parts.items() if k in path.name)
        name, which, layout = recognised(read_list(path))
        assert name == key and part in which, path.name
        seen.add((name, layout.name))
    assert len(seen) == 5, 'one layout of ImageNet and of iNaturalist, three of Places'
    assert len(category_names(tmp_path/'iNaturalist18_categories.json')) == 8142


@pytest.mark.skipif(not LISTS.is_file(), reason='the published lists are not here')
def test_doctor_takes_all_lists_of_a_set(tmp_path):
    "Shifted lists are parts of the test list, and no mistake; one with a picture of its own is"
    with zipfile.ZipFile(LISTS) as z:
        for name in z.namelist():
            if name.startswith('Places_LT_v2'): z.extract(name, tmp_path/'lists')
    words = ['doctor', 'places_lt', '--images', str(tmp_path), '--lists', str(tmp_path/'lists')]
    p = CliRunner().invoke(app, words, env=dict(COLUMNS='400'))
    assert p.exit_code == 1 and '62,500 of 62,500 of train' in p.output and 'Places365-Standard' in p.output, p.output
    for part, n in dict(train=62_500, val=7_300, test=36_500, forward=8_989, backward=8_989).items():
        assert f'{part:9} {n:,} images, 365 classes' in p.output
    file = tmp_path/'lists'/'Places_LT_v2_forward50.txt'
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([*lines[:-1], 'val_256/none.jpg ' + lines[-1].split()[-1]]))
    p = CliRunner().invoke(app, words, env=dict(COLUMNS='400'))
    assert p.exit_code == 2 and f'line {len(lines)}: val_256/none.jpg is not in' in p.output, p.output


@pytest.mark.skipif(not LISTS.is_file(), reason='the published lists are not here')
def test_a_published_list_that_lacks_a_line_is_not_taken_for_it(tmp_path):
    with zipfile.ZipFile(LISTS) as z: lines = z.read('Places_LT_v2_val.txt').decode().splitlines()
    (tmp_path/'a.txt').write_text('\n'.join(lines[:-1]))
    assert recognised(read_list(tmp_path/'a.txt')) is None


@pytest.mark.parametrize('n_classes,largest,smallest,total', [(1000, 1280, 5, 115_846), (8142, 1000, 2, 437_513)])
def test_full_counts_take_seconds(n_classes, largest, smallest, total, tmp_path):
    "A list of the published size is read, checked and recognised quickly"
    counts = np.full(n_classes, smallest)
    counts[0], left = largest, total - largest - smallest*(n_classes - 1)
    for k in range(1, n_classes - 1):
        more = min(left, largest - smallest)
        counts[k], left = counts[k] + more, left - more
    prefix = 'train/n' if n_classes == 1000 else 'train_val2018/'
    with (tmp_path/'train.txt').open('w') as f:
        for k, n in enumerate(counts): f.writelines(f'{prefix}{k}/{k}_{i}.jpg {k}\n' for i in range(n))
    began = time.monotonic()
    part = read_list(tmp_path/'train.txt')
    assert len(part) == total and recognised(part)[1] == ('train',)
    assert time.monotonic() - began < 30
    assert isinstance(part, ImageList) and by_count(part.counts)[0] == 0


def test_nothing_of_it_is_read_before_it_is_asked_for(photographs, tmp_path, monkeypatch):
    "A part of a part is a list of files, and so is the set on another device"
    train, _ = sets_of(photographs)
    def none(self, i): raise AssertionError('a picture was read')
    monkeypatch.setattr(FileStore, 'read', none)
    part = train.subset([3, 1, 2]).subset([2, 0])
    assert len(part) == 2 and part.shape == (32, 32, 3) and len(part.store.to('meta')[torch.tensor([1])]) == 1
    monkeypatch.undo()
    assert write_h5(tmp_path/'x.h5', train, train).exists()
