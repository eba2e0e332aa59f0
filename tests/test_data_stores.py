"Stores and named data sets: what goes in comes out, and every way a file can be wrong is told"
import hashlib, pickle, shutil, tarfile, threading, time
from pathlib import Path
import h5py, numpy as np, pytest, torch
from PIL import Image
from ltbook.data.checks import UserError
from ltbook.data.images import DATASETS, data_root, load_images
from ltbook.data import hdf5
from ltbook.data.features import check_features
from ltbook.data.stores import ImageSet, import_folder, read_h5, write_h5
from ltbook.studies.fusion import read_logits

def some(n=12, K=3, side=6, channels=3, seed=0):
    r = np.random.default_rng(seed)
    x = torch.from_numpy(r.integers(0, 256, (n, side, side, channels), dtype=np.uint8))
    return ImageSet(x, torch.arange(n) % K, tuple(f'class {k}' for k in range(K)))

@pytest.fixture
def good(tmp_path): return write_h5(tmp_path/'good.h5', some(), some(6, seed=1))

@pytest.mark.parametrize('channels', [1, 3])
def test_round_trip(tmp_path, channels):
    a, b = some(channels=channels), some(6, channels=channels, seed=1)
    train, test, _, attrs = read_h5(
        write_h5(tmp_path/'deep' / 'er' / 'x.h5', a, b, mean=[0.1] * channels, flip=True, pad=2, source='äöü'))
    for got, want in ((train, a), (test, b)):
        assert (
            torch.equal(got.images, want.images)
            and torch.equal(got.labels, want.labels)
            and got.classes == want.classes)
    assert attrs == dict(mean=[.1] * channels, flip=True, pad=2, source='äöü')

def test_writes_the_plain_layout(good):
    with h5py.File(good) as f:
        assert (
            f['train/images'].shape == (12, 6, 6, 3)
            and f['train/images'].dtype == np.uint8
            and f['train/labels'].dtype == np.int64)
        assert list(f.attrs['classes']) == ['class 0', 'class 1', 'class 2']
        assert np.array_equal(f['train/images'][3], some().images[3].numpy())

def test_reads_compressed_files_with_byte_names(tmp_path):
    a = some()
    with h5py.File(tmp_path/'z.h5', 'w') as f:
        f.attrs['classes'] = np.array([b'a', b'b', b'c'])
        for p in ('train', 'test'):
            f.create_dataset(f'{p}/images', data=a.images.numpy(), compression='gzip', chunks=(4, 6, 6, 3))
            f[f'{p}/labels'] = a.labels.numpy()
    train = read_h5(tmp_path/'z.h5')[0]
    assert torch.equal(train.images, a.images) and train.classes == ('a', 'b', 'c')

@pytest.mark.parametrize('part', [0, .01, .3, .5, .9, .999])
def test_truncated_file_is_told(good, part):
    data = good.read_bytes()
    good.write_bytes(data[:int(len(data) * part)])
    with pytest.raises(UserError, match='good.h5 cannot be read'): read_h5(good)

def test_missing_file_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(UserError, match='does not exist'): read_h5(tmp_path/'none.h5')
    (tmp_path/'text.h5').write_text('hello' * 1000)
    with pytest.raises(UserError, match='text.h5 cannot be read'): read_h5(tmp_path/'text.h5')
    with pytest.raises(UserError, match='does not exist'): read_h5(tmp_path)  # a folder

def put(key, value):
    def change(f):
        del f[key]
        if value is not None: f[key] = value
    return change
FAULTS = {
    'no names': (lambda f: f.attrs.__delitem__('classes'), '"classes"'),
    'no part': (put('test', None), 'no test/images'),
    'no images': (put('train/images', None), 'no train/images'),
    'no labels': (put('test/labels', None), 'no test/labels'),
    'group for a data set': (
        lambda f: (f.__delitem__('train/images'), f.create_group('train/images')),
        'no train/images'),
    'float images': (put('train/images', np.zeros((12, 6, 6, 3), np.float32)), 'train/images must be uint8'),
    'fractional labels': (put('train/labels', np.full(12, 1.7)), 'train/labels must be int64'),
    'labels beyond any class': (put('train/labels', np.full(12, 2**63, np.uint64)), 'beyond any class'),
    'grey without axis': (put('train/images', np.zeros((12, 6, 6), np.uint8)), 'with 4 axes'),
    'two channels': (put('train/images', np.zeros((12, 6, 5, 2), np.uint8)), '1 or 3 channels'),
    'two-dimensional labels': (put('train/labels', np.zeros((12, 1), np.int64)), 'with 1 axes'),
    'fewer labels': (put('train/labels', np.arange(11) % 3), '12 images but 11 labels'),
    'label too large': (put('test/labels', np.array([0, 1, 2, 3, 0, 1])), '0..2'),
    'label negative': (put('train/labels', np.arange(12) % 3 - 1), '0..2'),
    'class without images': (put('train/labels', np.arange(12) % 2), "'class 2' has no training images"),
    'other side in test': (put('test/images', np.zeros((6, 8, 8, 3), np.uint8)), 'differ'),
    'empty': (
        lambda f: (
            put('test/images', np.zeros((0, 6, 6, 3), np.uint8))(f),
            put('test/labels', np.zeros(0, np.int64))(f)),
        'empty')}

@pytest.mark.parametrize('fault', FAULTS)
def test_every_fault_is_a_user_error_that_names_the_file(good, fault):
    change, message = FAULTS[fault]
    with h5py.File(good, 'a') as f: change(f)
    with pytest.raises(UserError) as e: read_h5(good)
    assert 'good.h5' in str(e.value) and message in str(e.value)

@pytest.mark.parametrize('kind', [np.uint8, np.int16, np.int32, np.uint64])
def test_labels_of_any_whole_number_type(good, kind):
    with h5py.File(good, 'a') as f: put('train/labels', (np.arange(12) % 3).astype(kind))(f)
    train = read_h5(good)[0]
    assert train.labels.dtype == torch.int64 and train.counts.tolist() == [4, 4, 4]

@pytest.mark.parametrize('reader', [check_features, read_logits])
def test_every_reader_of_hdf5_lets_a_child_look_first(reader, good, monkeypatch):
    monkeypatch.setattr(hdf5, '_TRY', 'import os; os.abort()')
    with pytest.raises(UserError, match='crash'): reader(good)

def test_a_file_that_keeps_the_library_busy_or_kills_it(good, monkeypatch):
    "It is opened by a child first, with a time limit; and by no child where its hashes are known"
    monkeypatch.setattr(hdf5, '_TRY', 'print(flush=True); import time; time.sleep(60)')
    monkeypatch.setattr(hdf5.try_to_open, '__defaults__', (.5,))
    with pytest.raises(UserError, match='could not be opened within 0.5 seconds'): read_h5(good)
    monkeypatch.setattr(hdf5, '_TRY', 'import os; os.abort()')
    monkeypatch.setattr(hdf5.try_to_open, '__defaults__', (30.,))
    with pytest.raises(UserError, match='crash'): read_h5(good)
    monkeypatch.undo()
    read_h5(good)
    monkeypatch.setattr(hdf5, '_TRY', 'import os; os.abort()')
    read_h5(good)

def test_test_part_may_lack_a_class(tmp_path):
    assert read_h5(write_h5(tmp_path/'x.h5', some(), some().subset([0, 1])))[1].counts.tolist() == [1, 1, 0]

def test_failed_write_leaves_the_old_file(good):
    before = good.read_bytes()
    with pytest.raises(TypeError): write_h5(good, some(), some(), odd=object())
    assert good.read_bytes() == before and [p.name for p in good.parent.iterdir()] == ['good.h5']

def test_reader_beside_a_writer_always_finds_a_whole_file(good):
    stop = threading.Event()
    def write():
        while not stop.is_set(): write_h5(good, some(), some(6, seed=1))
    t = threading.Thread(target=write); t.start()
    try:
        end = time.time() + 0.5
        while time.time() < end:
            h5_bytes = good.read_bytes()
            assert len(h5_bytes) > 2000 and h5_bytes[:4] == b'\x89HDF'
    finally: stop.set(); t.join()

def picture(path, value, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)

def test_folder_of_class_folders(tmp_path):
    for c, n in (('b', 10), ('a', 3)):
        for i in range(n): picture(tmp_path/'src'/c/f'{i}.png', i + 100 * (c == 'b'))
    train, test, _, attrs = read_h5(import_folder(tmp_path/'src', 'own', tmp_path/'root', size=8))
    assert train.classes == ('a', 'b') and train.counts.tolist() == [2, 8] and test.counts.tolist() == [1, 2]
    seen = sorted(torch.cat([train.images, test.images])[:, 0, 0, 0].tolist())
    assert seen == [0, 1, 2, *range(100, 110)]  # every picture in one part only
    assert ((train.images[:, 0, 0, 0] >= 100) == (train.labels == 1)).all() and train.shape == (8, 8, 3)
    again = read_h5(import_folder(tmp_path/'src', 'own2', tmp_path/'root', size=8))[1]
    other = read_h5(import_folder(tmp_path/'src', 'own3', tmp_path/'root', size=8, seed=1))[1]
    assert torch.equal(again.images, test.images) and not torch.equal(other.images, test.images)
    assert load_images('own', tmp_path/'root').pad == 1

def test_folder_with_train_and_test(tmp_path):
    for part, n in (('train', 3), ('test', 2)):
        for c in 'ab':
            for i in range(n): picture(tmp_path/'src'/part/c/f'{i}.png', i)
    train, test, _, _ = read_h5(import_folder(tmp_path/'src', 'own', tmp_path))
    assert train.counts.tolist() == [3, 3] and test.counts.tolist() == [2, 2]
    picture(tmp_path/'src'/'test'/'c'/'0.png', 1)
    with pytest.raises(UserError, match='classes that .* lacks: c'): import_folder(tmp_path/'src', 'other', tmp_path)
    with pytest.raises(UserError, match='--force'): import_folder(tmp_path/'src', 'own', tmp_path)

def test_folders_that_cannot_serve(tmp_path):
    src = tmp_path/'src'
    for c in 'ab':
        for i in range(2): picture(src/c/f'{i}.png', 1)
    with pytest.raises(UserError, match='between 0 and 1'): import_folder(src, 'own', tmp_path, test_fraction=1.)
    for name in ('a/b', '..', '', '.hidden', 'x'*200, 'a\nb'):
        with pytest.raises(UserError, match='name a data set'): import_folder(src, name, tmp_path)
    for name in ('digits', 'cifar100'):
        with pytest.raises(UserError, match='built-in'): import_folder(src, name, tmp_path)
    (src/'c').mkdir()
    with pytest.raises(UserError, match='no pictures .* in c'): import_folder(src, 'own', tmp_path)
    (src/'c'/'0.png').write_bytes(b'x'); picture(src/'c'/'1.png', 1)
    with pytest.raises(UserError, match='0.png'): import_folder(src, 'own', tmp_path)
    with pytest.raises(UserError, match='not a folder'): import_folder(tmp_path/'no', 'own', tmp_path)
    assert not list(tmp_path.glob('*.h5'))

def test_digits_are_fixed_and_disjoint():
    from sklearn.datasets import load_digits
    a, b, raw = load_images('digits'), load_images('digits'), load_digits()
    assert torch.equal(a.test.images, b.test.images) and len(a.train) + len(a.test) == 1797
    assert a.test.counts.tolist() == [50] * 10 and a.train.images.shape == (1297, 8, 8, 1)
    rng, held = np.random.RandomState(0), []
    for k in range(10):
        where = np.flatnonzero(raw.target == k); rng.shuffle(where); held += where[:50].tolist()
    held = sorted(held)
    want = np.floor(raw.images[held] * 255 / 16 + .5)
    assert np.array_equal(a.test.labels, raw.target[held]) and np.abs(a.test.images[..., 0].numpy() - want).max() <= 1

def test_root_argument_then_environment_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv('LTBOOK_DATA', str(tmp_path))
    assert data_root() == tmp_path and data_root('x') == Path('x')
    monkeypatch.delenv('LTBOOK_DATA')
    assert data_root() == Path.home()/'.cache'/'ltbook'

def test_unknown_name_lists_built_in_and_present_ones(tmp_path):
    write_h5(tmp_path/'flowers.h5', some(), some())
    with pytest.raises(UserError) as e: load_images('flower', tmp_path)
    assert 'Did you mean flowers' in str(e.value) and all(n in str(e.value) for n in DATASETS)
    with pytest.raises(UserError, match='Unknown data set'): load_images('nothing', tmp_path/'no such folder')

def test_own_file_moments_are_those_of_its_training_part(tmp_path):
    a = some(40)
    write_h5(tmp_path/'own.h5', a, some(6))
    d = load_images('own', tmp_path)
    x = a.images.double() / 255
    assert np.allclose(d.mean, x.mean((0, 1, 2))) and np.allclose(d.std, x.std((0, 1, 2), correction=0))

def test_failed_download_says_where_to_put_the_file(monkeypatch, tmp_path):
    from torchvision import datasets
    def fail(*a, **k): raise RuntimeError('no network here')
    monkeypatch.setattr(datasets.CIFAR100, '__init__', fail)
    with pytest.raises(UserError) as e: load_images('cifar100', tmp_path/'new')
    assert 'no network here' in str(e.value) and 'cifar100.h5' in str(e.value) and 'LTBOOK_DATA' in str(e.value)
    assert not (tmp_path/'new').exists()      # nothing is left of a folder that was not there

def test_download_is_kept_as_one_file(monkeypatch, tmp_path):
    from torchvision import datasets
    calls = []
    class Fake(datasets.CIFAR10):
        def __init__(self, root, train, download):
            calls.append(train)
            self.data = np.full((20, 32, 32, 3), 7 + train, np.uint8)
            self.targets, self.classes = list(range(10)) * 2, [f'c{k}' for k in range(10)]
    monkeypatch.setattr(datasets, 'CIFAR10', Fake)
    a, b = load_images('cifar10', tmp_path), load_images('cifar10', tmp_path)
    assert calls == [True, False] and sorted(p.name for p in tmp_path.iterdir()) == [
        '.cifar10.h5.rows.npz',
        'cifar10.h5']
    assert (
        (a.train.images == 8).all()
        and (b.test.images == 7).all()
        and 'archive' in b.source
        and b.pad == 4
        and b.flip)

@pytest.fixture
def official(monkeypatch, tmp_path):
    "A small archive laid out as the official one of CIFAR-100, whose checksums are taken for the official ones"
    from torchvision import datasets
    folder, sums, r = tmp_path/'cifar-100-python', {}, np.random.default_rng(0)
    folder.mkdir()
    for name, n in (('train', 200), ('test', 100), ('meta', 0)):
        x, y = r.integers(0, 256, (n, 3072), dtype=np.uint8), (np.arange(n) % 100).tolist()
        content = dict(data=x, fine_labels=y, coarse_labels=y, filenames=['']*n)
        if name == 'meta': content = dict(fine_label_names=[f'name {k}' for k in range(100)], coarse_label_names=[])
        (folder/name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder/name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, 'train_list', [['train', sums['train']]])
    monkeypatch.setattr(datasets.CIFAR100, 'test_list', [['test', sums['test']]])
    monkeypatch.setattr(datasets.CIFAR100, 'meta', dict(datasets.CIFAR100.meta, md5=sums['meta']))
    def fail(*a, **k): raise AssertionError('no network is needed')
    monkeypatch.setattr(datasets.CIFAR100, '__init__', fail)
    return folder

@pytest.mark.parametrize('packed', [False, True], ids=['unpacked', 'archive'])
def test_official_files_are_used_without_a_network(official, monkeypatch, packed):
    from torchvision import datasets
    root = official.parent
    want = pickle.loads((official/'train').read_bytes())['data'].reshape(-1, 3, 32, 32)
    if packed:
        with tarfile.open(root/'cifar-100-python.tar.gz', 'w:gz') as tar: tar.add(official, official.name)
        shutil.rmtree(official)
        md5 = hashlib.md5((root/'cifar-100-python.tar.gz').read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR100, 'tgz_md5', md5)
    data = load_images('cifar100', root)
    assert np.array_equal(data.train.images.numpy().transpose(0, 3, 1, 2), want) and 'official' in data.source
    assert data.train.counts.tolist() == [2]*100 and data.test.classes[7] == 'name 7'
    assert (root/'cifar100.h5').exists() and torch.equal(load_images('cifar100', root).train.images, data.train.images)

@pytest.mark.parametrize('name', ['train', 'test', 'meta'])
def test_changed_official_files_are_refused(official, name):
    content = bytearray((official/name).read_bytes())
    content[-30] ^= 1
    (official/name).write_bytes(content)
    with pytest.raises(UserError, match=f'{name} has another checksum'): load_images('cifar100', official.parent)
    (official/name).unlink()
    with pytest.raises(UserError, match=f'{name} cannot be read'): load_images('cifar100', official.parent)
    assert not (official.parent/'cifar100.h5').exists()

def test_another_archive_is_refused(official):
    root = official.parent
    shutil.rmtree(official)
    (root/'cifar-100-python.tar.gz').write_bytes(b'another one')
    with pytest.raises(UserError, match='tar.gz has another checksum'): load_images('cifar100', root)

def test_file_with_the_wrong_number_of_classes(tmp_path):
    write_h5(tmp_path/'cifar100.h5', some(), some())
    with pytest.raises(UserError, match='3 classes'): load_images('cifar100', tmp_path)

@pytest.mark.parametrize('name,K', [('cifar10', 10), ('cifar100', 100)])
def test_cifar_whole_and_fast(name, K):
    if not (data_root()/f'{name}.h5').is_file(): pytest.skip(f'{name}.h5 is not in the data folder (LTBOOK_DATA)')
    load_images(name)  # once to bring the file into the page cache
    begin = time.perf_counter()
    d = load_images(name)
    assert time.perf_counter() - begin < 1
    assert d.train.counts.tolist() == [50000 // K] * K and d.test.counts.tolist() == [10000 // K] * K
    assert (
        d.mean == (0.4914, 0.4822, 0.4465)
        and d.std == (0.2023, 0.1994, 0.2010)
        and d.imbalance == 100
        and d.train.shape == (32, 32, 3))


@pytest.mark.parametrize('shape', [(4, 3, 8, 9), (4, 1, 8, 8), (5, 3, 2, 2), (4, 1, 5, 4), (6, 3, 32, 32)])
def test_channels_first_is_turned_where_nothing_else_can_be_meant(shape, tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    y, names = torch.arange(len(x)), tuple('abcdef')[:len(x)]
    first, last = ImageSet(x, y, names), ImageSet(x.movedim(1, 3).contiguous(), y, names)
    assert first.shape == last.shape == (*shape[2:], shape[1]) and first.sha256() == last.sha256()
    assert torch.equal(first.gather(torch.tensor([2, 0])), last.gather(torch.tensor([2, 0])))
    back = read_h5(write_h5(tmp_path/'a.h5', first, first))[0]
    assert torch.equal(back.images, last.images) and back.sha256() == last.sha256()
    with h5py.File(tmp_path/'b.h5', 'w') as f:
        f.attrs['classes'] = list(names)
        for part in ('train', 'test'): f[f'{part}/images'], f[f'{part}/labels'] = x.numpy(), y.numpy()
    assert torch.equal(read_h5(tmp_path/'b.h5')[0].images, last.images)


@pytest.mark.parametrize('shape', [(4, 8, 9, 8), (4, 2, 8, 4), (4, 4, 8, 8)])
def test_other_channels_are_refused(shape):
    with pytest.raises(UserError, match='1 or 3 channels'):
        ImageSet(torch.zeros(shape, dtype=torch.uint8), torch.arange(4), tuple('abcd'))


def test_processes_of_a_machine_share_its_cores_when_they_decode(monkeypatch):
    "As many threads as there are cores, a share of them for each of several processes, or what was asked for"
    import ltbook.data.files as files
    from ltbook.data.pictures import Reading
    from ltbook.data.streamed import placed
    monkeypatch.setattr(files, 'cores', lambda: 8)
    def threads(workers, processes):
        store = files.FileStore([Path('a.png')], Reading(8, 'crop'), workers=workers)
        made = placed(dict(train=ImageSet(store, torch.tensor([0]), ('a',))), 'cpu', processes=processes)['train']
        return made.subset(np.array([0])).store.workers
    assert [threads(None, n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1] and [threads(5, n) for n in (1, 4)] == [5, 5]
