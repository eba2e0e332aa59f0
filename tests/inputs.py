"""Every kind of input, what is done to it, and words of the sentence that says so.

The tests follow this table (`test_inputs.py`), and the page "What ltbook reads" prints it with what really happened.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import h5py
import numpy as np
import torch
from PIL import Image

from ltbook.cli.words import parse_changes
from ltbook.data.checks import UserError
from ltbook.data.features import check_features
from ltbook.data.images import load_images, read_arrays
from ltbook.data.stores import ImageSet, import_folder, read_h5, write_h5
from ltbook.methods.recipe import recipe
from ltbook.studies.fusion import read_logits

AS_IS, SAID, REFUSED = 'read as it is', 'converted, and said', 'refused'


@dataclass(frozen=True)
class Input:
    kind: str  # pictures, folders, image sets, features, logits, words
    what: str  # in words
    outcome: str  # AS_IS, SAID or REFUSED
    words: str  # of what is said
    read: Callable[[Path, list], object]  # (empty folder, list for what is said) -> whatever was read


def picture(image, **options):
    "A class folder with one picture among usual ones"
    def read(folder, said):
        for c in 'ab':
            (folder/'s'/c).mkdir(parents=True)
            for i in range(3): Image.new('RGB', (12, 12), (40*i, 9, 9)).save(folder/'s'/c/f'{i}.png')
        image(folder/'s'/'a') if callable(image) else image[0].save(folder/'s'/'a'/image[1], **image[2])
        return imported(folder, said, **options)
    return read


def imported(folder, said, **options):
    told = []
    file = import_folder(folder/'s', 'x', folder, 8, say=told.append, **options)
    said += [t for t in told if not t.startswith('  ') and ' images to train on ' not in t]
    return read_h5(file)


def of(mode, name, **how):
    if mode in ('I;16', 'I', 'F'):
        kind = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
        return Image.fromarray((np.arange(144).reshape(12, 12)*400).astype(kind)), name, how
    return Image.new('RGB', (12, 12), (200, 30, 90)).convert(mode), name, how


def turned():
    im = Image.new('RGB', (12, 12))
    im.getexif()[0x0112] = 6
    return im, 'x.jpg', dict(exif=im.getexif())


def tree(**files):
    "A folder of pictures: place -> number of them"
    def read(folder, said):
        (folder/'s').mkdir()
        for place, n in files.items():
            here = folder/'s'/place.replace('__', '/')
            here.mkdir(parents=True)
            for i in range(n): Image.new('RGB', (12, 12), (20*i, 9, 9)).save(here/f'{i}.png')
        return imported(folder, said)
    return read


def left_by_systems(a):
    (a/'._0.png').write_bytes(b'x'); (a/'Thumbs.db').write_bytes(b'x'); (a/'.DS_Store').write_bytes(b'x')
    (a.parent/'__MACOSX'/'a').mkdir(parents=True)
    (a.parent/'__MACOSX'/'a'/'._0.png').write_bytes(b'x')


def some(n=9, shape=(6, 5, 3), classes=3):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8))
    return ImageSet(x, torch.arange(n) % classes, tuple(f'class {k}' for k in range(classes)))


def image_set(change=lambda f: None, made=some, **attrs):
    def read(folder, said):
        path = write_h5(folder/'x.h5', made(), made(), **attrs)
        with h5py.File(path, 'a') as f: change(f)
        return read_h5(path)
    return read


def put(key, value, attr=False):
    def change(f):
        where = f.attrs if attr else f
        if key in where: del where[key]
        if value is not None: where[key] = value
    return change


def outside(f):
    del f['train/images']
    f['train/images'] = h5py.ExternalLink('/etc/hostname', '/x')


def system_file(f):
    del f['train/images']
    f.create_dataset('train/images', (9, 6, 5, 3), 'u1', external=[('/etc/passwd', 0, 810)])


def declared(f):
    del f['train/labels']
    f.create_dataset('train/labels', (10**9,), 'i8', chunks=(1024,))


def cut(folder, said):
    path = write_h5(folder/'x.h5', some(), some())
    path.write_bytes(path.read_bytes()[:900])
    return read_h5(path)


def official(folder, said):
    (folder/'cifar-10-batches-py').mkdir()
    for n in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta'):
        (folder/'cifar-10-batches-py'/n).write_bytes(b'other content')
    return load_images('cifar10', folder)


def features(**arrays):
    def read(folder, said):
        with h5py.File(folder/'f.h5', 'w') as f:
            usual = dict(features=np.ones((6, 4), 'f4'), labels=np.arange(6) % 3)
            for k, v in (usual | arrays).items():
                if v is not None: f[k] = v
        if faults := check_features(folder/'f.h5'): raise UserError(faults[0])
    return read


def logits(**arrays):
    def read(folder, said):
        with h5py.File(folder/'l.h5', 'w') as f:
            usual = dict(logits=np.ones((6, 3), 'f4'), labels=np.arange(6) % 3, class_mask=np.ones(3, bool))
            for k, v in (usual | arrays).items():
                if v is not None: f[k] = v
        return read_logits(folder/'l.h5')
    return read


def words(*pairs, method='mislas', dataset='digits', **given):
    return lambda folder, said: recipe(method, dataset, **given | parse_changes(list(pairs)))


class Evil:
    def __reduce__(self): return print, ('obeyed',)


def evil(folder, said):
    import pickle
    return read_arrays(pickle.dumps(dict(data=Evil())))


CUT = b'\xff\xd8\xff\xe0' + bytes(30)


def written(name, content): return lambda a: (a/name).write_bytes(content)


DEEP = [Input('pictures', f'{w}, {k}', SAID, 'scaled to 0 to 255', picture(of(m, n)))
        for w, k, m, n in (('16 bits', 'PNG', 'I;16', 'x.png'), ('32 bits', 'TIFF', 'I', 'x.tif'),
                           ('floats', 'TIFF', 'F', 'x.tif'))]
MODES = [Input('pictures', w, SAID, 'converted to RGB', picture(of(m, n))) for w, m, n in (
    ('grey', 'L', 'x.png'), ('black and white', '1', 'x.png'), ('with a palette', 'P', 'x.gif'),
    ('CMYK', 'CMYK', 'x.jpg'), ('LAB', 'LAB', 'x.tif'), ('YCbCr', 'YCbCr', 'x.tif'))]

INPUTS = [
    *[Input('pictures', f'RGB, {n[2:].upper()}', AS_IS, '', picture(of('RGB', n)))
      for n in ('x.jpg', 'x.png', 'x.webp', 'x.bmp', 'x.tif', 'x.ppm')],
    *MODES, *DEEP,
    Input('pictures', 'transparent', SAID, 'put on white', picture(of('RGBA', 'x.png'))),
    Input('pictures', 'transparent grey, on black', SAID, 'put on black',
          picture(of('LA', 'x.png'), background='black')),
    Input('pictures', 'turned by an EXIF tag', SAID, 'turned upright', picture(turned())),
    Input('pictures', 'several frames', SAID, 'first is used', picture(
        (Image.new('RGB', (12, 12)), 'x.gif', dict(save_all=True, append_images=[Image.new('RGB', (12, 12), 'red')])))),
    Input('pictures', 'half as wide again as high', SAID, 'cuts off',
          picture((Image.new('RGB', (18, 12)), 'x.png', {}))),
    Input('pictures', 'three times as wide as high', REFUSED, '--fit letterbox',
          picture((Image.new('RGB', (36, 12)), 'x.png', {}))),
    Input('pictures', 'three times as wide as high, --fit letterbox', AS_IS, '',
          picture((Image.new('RGB', (36, 12)), 'x.png', {}), fit='letterbox')),
    Input('pictures', 'cut short', REFUSED, '--skip-broken', picture(written('x.jpg', CUT))),
    Input('pictures', 'cut short, --skip-broken', SAID, 'Left out',
          picture(written('x.jpg', CUT), skip_broken=True)),
    Input('pictures', 'empty', REFUSED, '--skip-broken', picture(written('x.png', b''))),
    Input('pictures', 'background that is no colour', REFUSED, 'is no colour',
          picture(of('RGB', 'x.png'), background='moss-ish')),
    Input('folders', 'a folder a class', AS_IS, '', tree(a=4, b=3)),
    Input('folders', 'train/ and test/', AS_IS, '', tree(train__a=2, train__b=2, test__a=1, test__b=1)),
    Input('folders', 'train/ and val/', SAID, 'part for testing', tree(train__a=2, train__b=2, val__a=1, val__b=1)),
    Input('folders', 'train/, val/ and test/', SAID, 'to validate on',
          tree(train__a=2, train__b=2, val__a=1, val__b=1, test__a=1, test__b=1)),
    Input('folders', 'a class without pictures to test', SAID, 'No pictures to test b',
          tree(train__a=2, train__b=2, train__c=2, test__a=1, test__c=1)),
    Input('folders', 'a class of one picture', SAID, 'not tested', tree(a=5, b=1)),
    Input('folders', 'what Mac and Windows leave behind', AS_IS, '', picture(left_by_systems)),
    Input('folders', 'a class to test that is not trained', REFUSED, 'add or remove them',
          tree(train__a=2, train__b=2, test__a=1, test__b=1, test__c=1)),
    Input('folders', 'no pictures at all', REFUSED, 'picture', tree()),
    Input('folders', 'no folder', REFUSED, 'is not a folder', lambda f, s: import_folder(f/'none', 'x', f)),
    Input('folders', 'a name that leaves the folder', REFUSED, 'cannot name a data set',
          lambda f, s: import_folder(f, '../x', f)),
    Input('image sets', 'HDF5, (N, H, W, C) bytes', AS_IS, '', image_set()),
    Input('image sets', 'one channel', AS_IS, '', image_set(made=lambda: some(shape=(6, 5, 1)))),
    Input('image sets', 'channels first', AS_IS, '', image_set(
        lambda f: [put(f'{p}/images', np.zeros((9, 3, 6, 5), np.uint8))(f) for p in ('train', 'test')])),
    Input('image sets', 'ten thousand classes', AS_IS, '',
          image_set(made=lambda: some(10_000, (2, 2, 1), 10_000))),
    Input('image sets', 'labels of 8 to 64 bits', AS_IS, '',
          image_set(put('train/labels', (np.arange(9) % 3).astype(np.uint8)))),
    Input('image sets', 'two channels', REFUSED, '1 or 3 channels',
          image_set(put('train/images', np.zeros((9, 6, 5, 2), np.uint8)))),
    Input('image sets', 'float pixels', REFUSED, 'must be uint8',
          image_set(put('train/images', np.zeros((9, 6, 5, 3))))),
    Input('image sets', 'labels such as 1.7', REFUSED, 'must be int64',
          image_set(put('train/labels', np.full(9, 1.7)))),
    Input('image sets', 'a label beyond the classes', REFUSED, '0..2', image_set(put('test/labels', np.full(9, 3)))),
    Input('image sets', 'a class without images to train on', REFUSED, 'no training images',
          image_set(put('train/labels', np.arange(9) % 2))),
    Input('image sets', "flip = 'no'", REFUSED, 'true or false', image_set(put('flip', 'no', True))),
    Input('image sets', 'a mean from 0 to 255', REFUSED, 'from 0 to 1', image_set(put('mean', [120.]*3, True))),
    Input('image sets', 'a standard deviation of 0', REFUSED, 'above 0', image_set(put('std', [0.]*3, True))),
    Input('image sets', 'a mean that is NaN', REFUSED, 'from 0 to 1', image_set(put('mean', [np.nan]*3, True))),
    Input('image sets', 'a padding of 1000', REFUSED, 'whole number', image_set(put('pad', 1000, True))),
    Input('image sets', 'a class name that is there twice', REFUSED, 'twice',
          image_set(put('classes', ['a', 'a', 'b'], True))),
    Input('image sets', 'a link to another file', REFUSED, 'link', image_set(outside)),
    Input('image sets', 'pixels in a file of the system', REFUSED, 'other files', image_set(system_file)),
    Input('image sets', 'a thousand million declared labels', REFUSED, 'declares', image_set(declared)),
    Input('image sets', 'cut short', REFUSED, 'damaged', cut),
    Input('image sets', 'the official archive, other content', REFUSED, 'checksum', official),
    Input('image sets', 'a pickle that calls a function', REFUSED, 'it asks for', evil),
    Input('features', 'HDF5, floats (N, D)', AS_IS, '', features()),
    Input('features', 'with a head', AS_IS, '',
          features(head_weight=np.ones((3, 4), 'f4'), head_bias=np.ones(3, 'f4'))),
    Input('features', 'no labels', REFUSED, 'missing', features(labels=None)),
    Input('features', 'fewer labels than rows', REFUSED, 'every row needs one', features(labels=np.arange(5) % 3)),
    Input('features', 'NaN', REFUSED, 'not finite', features(features=np.full((6, 4), np.nan, 'f4'))),
    Input('features', 'labels such as 1.7', REFUSED, 'whole numbers', features(labels=np.full(6, 1.7))),
    Input('logits', 'HDF5: logits, labels, class_mask', AS_IS, '', logits()),
    Input('logits', 'no class_mask', REFUSED, 'no class_mask', logits(class_mask=None)),
    Input('logits', 'labels such as 1e300', REFUSED, 'whole numbers', logits(labels=np.full(6, 1e300))),
    Input('logits', 'NaN', REFUSED, 'NaN', logits(logits=np.full((6, 3), np.nan, 'f4'))),
    *[Input('words', f'--set {w}', AS_IS, '', words(w)) for w in (
        'lr=.1', 'lr=1e-1', 'epochs=12', 'epochs=1.2e1', 'nesterov=True', 'nesterov=yes', 'max_steps=none')],
    *[Input('words', f'--set {w}', REFUSED, k, words(w)) for w, k in (
        ('epochs=1.5', 'integer'), ('lr=nan', 'lr'), ('weight_decay=inf', 'weight_decay'), ('nesterov=maybe', 'bool'),
        ('epoch=5', 'did you mean epochs'), ('lr', 'key=value'))],
    Input('words', 'CIFAR-100 for cifar100', REFUSED, 'Did you mean',
          lambda f, s: load_images('CIFAR-100', f)),
    Input('words', 'an imbalance of .5', REFUSED, 'from 1 on', words(imbalance=.5)),
    Input('words', 'a data set named ../digits', REFUSED, 'cannot name', words(dataset='../digits'))]


def happened(entry: Input, folder: Path) -> tuple[str, str]:
    "What is really done to an input, in an empty folder: the outcome, and what is said, with the folder left out"
    said = []
    try: entry.read(folder, said)
    except UserError as e: outcome, text = REFUSED, str(e)
    else: outcome, text = SAID if said else AS_IS, ' '.join(said)
    return outcome, text.replace(str(folder), '…')
