"Pictures as people have them: every mode by its values, every layout, whatever systems leave behind, and broken ones"
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_image

import ltbook.data.pictures as pictures
from ltbook.data.checks import UserError
from ltbook.data.folders import class_folders, find_parts
from ltbook.data.pictures import FITS, Reading, Seen, fit_square, full_scale, read_square, scale_of, to_rgb
from ltbook.data.stores import import_folder, read_h5

LEVELS = (0, 1, 64, 127, 128, 200, 254, 255)


def flat(value, mode='RGB', size=(6, 5)):
    "A picture of one grey level."
    grey = Image.new('L', size, value)
    if mode == 'LAB':
        lab, rgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
        return ImageCms.applyTransform(grey.convert('RGB'), ImageCms.buildTransform(rgb, lab, 'RGB', 'LAB'))
    return grey.convert('RGB').convert(mode) if mode in ('HSV', 'RGBX') else grey.convert(mode)


@pytest.mark.parametrize('value', LEVELS)
@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'P', 'RGBX', 'LAB'])
def test_grey_stays_grey_in_every_mode(mode, value):
    got = np.asarray(to_rgb(flat(value, mode))).astype(int)
    assert got.shape == (5, 6, 3) and np.abs(got - value).max() <= (3 if mode == 'LAB' else 1)


@pytest.mark.parametrize('value', LEVELS)
@pytest.mark.parametrize(
    'kind,top', [(np.uint16, 65535), (np.int32, 65535), (np.uint16, 4095), (np.float32, 1), (np.float32, 255)])
def test_deep_values_keep_their_share_of_the_scale(kind, top, value, tmp_path):
    share = value / 255
    a = np.full((5, 6), share * top).astype(kind)
    full = np.full((5, 6), top).astype(kind)
    ext = 'png' if kind == np.uint16 else 'tif'
    for name, x in (('a', a), ('full', full)):
        Image.fromarray(x).save(tmp_path / f'{name}.{ext}')
    files = [tmp_path / f'a.{ext}', tmp_path / f'full.{ext}']
    scale = scale_of(files)
    assert scale == (0, top)
    seen = Seen()
    got = [read_square(f, Reading(8), scale, seen) for f in files]
    assert abs(int(got[0][0, 0, 0]) - value) <= 1 and (got[1] == 255).all()
    assert len(seen.kinds) == 1 and 'scaled to 0 to 255' in next(iter(seen.kinds))


def test_big_endian_and_negative(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, '>u2')).save(tmp_path/'big.tif')
    assert scale_of([tmp_path/'big.tif']) == (0, 1023)
    assert (read_square(tmp_path/'big.tif', Reading(4), (0, 1023), Seen()) == 249).all()
    Image.fromarray(np.array([[-10, 10]]*2, np.float32)).save(tmp_path/'minus.tif')
    low, high = scale_of([tmp_path/'minus.tif'])
    assert (low, high) == (-10, 255)
    assert full_scale(0, 70000) == (0, 70000)
    with pytest.raises(UserError, match='no numbers'):
        to_rgb(Image.fromarray(np.array([[np.inf, 0]], np.float32)))


def test_black_and_white_and_palettes():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert('1')
    assert np.asarray(to_rgb(bits))[..., 0].tolist() == [[0, 255], [255, 0]]
    p = Image.new('P', (2, 1))
    p.putpalette([10, 20, 30, 200, 100, 50] + [0]*762)
    p.putdata([0, 1])
    assert np.asarray(to_rgb(p)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    p.info['transparency'] = 1
    assert np.asarray(to_rgb(p, (1, 2, 3))).tolist() == [[[10, 20, 30], [1, 2, 3]]]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA'])
@pytest.mark.parametrize('background', [(255, 255, 255), (0, 0, 0), (9, 99, 199)])
def test_transparency_shows_the_background(mode, background):
    clear = Image.new('RGBA', (3, 3), (120, 120, 120, 0)).convert(mode)
    if mode == 'PA':
        clear = Image.new('P', (3, 3))
        clear.putalpha(0)
    assert clear.mode == mode
    assert np.asarray(to_rgb(clear, background)).reshape(-1, 3).tolist() == [list(background)]*9


@pytest.mark.parametrize('tag', range(1, 9))
def test_exif_orientation(tag, tmp_path):
    "A red corner ends up where the camera saw it, whichever way the file lies"
    a = np.zeros((4, 6, 3), np.uint8)
    a[0, 0] = 255, 0, 0
    seen_as = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
        8: np.rot90}[tag]
    im = Image.fromarray(a)
    im.getexif()[0x0112] = tag
    im.save(tmp_path/'x.png', exif=im.getexif())
    with Image.open(tmp_path/'x.png') as again: assert np.array_equal(np.asarray(to_rgb(again)), seen_as(a))


@pytest.mark.parametrize('how', FITS)
@pytest.mark.parametrize('size', [(40, 10), (10, 40), (16, 16), (1, 30)])
def test_squares(how, size):
    got = fit_square(Image.new('RGB', size, (10, 20, 30)), 8, how, (255, 255, 255))
    assert got.shape == (8, 8, 3) and got.dtype == np.uint8 and [10, 20, 30] in got.reshape(-1, 3).tolist()
    if how != 'letterbox': assert (got == (10, 20, 30)).all()


def save(path, value=90, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value, value, value)).save(path)


def test_long_pictures_need_a_word(tmp_path):
    for c in 'ab':
        for i in range(3): save(tmp_path/'s'/c/f'{i}.png', size=(200, 20))
    with pytest.raises(UserError, match='90 % off .*--fit letterbox or --fit squash'):
        import_folder(tmp_path/'s', 'x', tmp_path)
    for how in FITS: assert import_folder(tmp_path/'s', f'x-{how}', tmp_path, fit=how).exists()
    assert not (tmp_path/'x.h5').exists()
    for c in 'cd':
        for i in range(3): save(tmp_path/'t'/c/f'{i}.png', size=(30, 20))
    said = []
    import_folder(tmp_path/'t', 'y', tmp_path, say=said.append)      # a usual photograph loses a third, which is said
    assert any('cuts off 33 %' in text for text in said)


BROKEN = dict(
    empty=b'', text=b'no picture', cut=None, header=b'\x89PNG\r\n\x1a\n' + bytes(40), gif=b'GIF89a' + bytes(9),
    tif=b'II*\x00' + b'\xff'*20, jpg=b'\xff\xd8\xff\xe0' + bytes(30))


@pytest.mark.parametrize('kind', BROKEN)
def test_broken_pictures(kind, tmp_path):
    for c in 'ab':
        for i in range(4): save(tmp_path/'s'/c/f'{i}.png', 40*i)
    whole = (tmp_path/'s'/'a'/'0.png').read_bytes()
    (tmp_path/'s'/'a'/'bad.png').write_bytes(whole[:len(whole)//2] if kind == 'cut' else BROKEN[kind])
    with pytest.raises(UserError, match=r'bad\.png cannot be read .*--skip-broken'):
        import_folder(tmp_path / 's', 'x', tmp_path)
    assert not (tmp_path/'x.h5').exists()
    said = []
    train, test, _, _ = read_h5(import_folder(tmp_path/'s', 'x', tmp_path, skip_broken=True, say=said.append))
    assert len(train) + len(test) == 8 and any('Left out' in text and 'bad.png' in text for text in said)


def test_a_small_file_that_unfolds_into_a_huge_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for c in 'ab':
        for i in range(3): save(tmp_path/'s'/c/f'{i}.png')
    save(tmp_path/'s'/'a'/'huge.png', size=(60, 60))
    with pytest.raises(UserError, match='huge.png'): import_folder(tmp_path/'s', 'x', tmp_path)


def test_what_systems_leave_behind(tmp_path):
    for c in 'ab':
        for i in range(3):
            save(tmp_path/'s'/c/f'{i}.PNG')
            (tmp_path/'s'/c/f'._{i}.PNG').write_bytes(b'\0\5\26\7meta')
        for name in ('Thumbs.db', '.DS_Store', 'desktop.ini', 'notes.txt'): (tmp_path/'s'/c/name).write_bytes(b'x')
    for name in ('__MACOSX/a', '.git/a', '@eaDir/a'):
        (tmp_path/'s'/name).mkdir(parents=True)
        (tmp_path/'s'/name/'._0.png').write_bytes(b'x')
    train, test, _, _ = read_h5(import_folder(tmp_path/'s', 'x', tmp_path))
    assert train.classes == ('a', 'b') and train.counts.tolist() == [2, 2] and test.counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    'names,tested,said',
    [
        (['train', 'test'], 'test', ''),
        (['train', 'val'], 'val', 'val/ is the part for testing'),
        (['train', 'validation'], 'validation', 'validation/ is the part'),
        (['train', 'val', 'test'], 'test', 'val/ is kept')])
def test_layouts(tmp_path, names, tested, said):
    for k, part in enumerate(names):
        for c in 'ab':
            for i in range(2 + k):
                save(tmp_path / 's' / part / c / f'{i}.png', 10 * k)
    save(tmp_path / 's' / 'train' / 'c' / '0.png')
    heard = []
    train, test, val, _ = read_h5(import_folder(tmp_path / 's', 'x', tmp_path, say=heard.append))
    n = 2 + names.index(tested)
    assert train.counts.tolist() == [2, 2, 1] and test.counts.tolist() == [n, n, 0]
    assert (val.counts.tolist() if val else None) == ([3, 3, 0] if len(names) == 3 else None)
    assert said in '\n'.join(heard) and 'No pictures to test c' in '\n'.join(heard)


def ltbook(*words, cwd):
    env = os.environ | dict(OMP_NUM_THREADS='1', COLUMNS='200')
    return subprocess.run(
        [sys.executable, '-m', 'ltbook', *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        errors='replace')


def test_a_class_of_one_picture_trains_at_the_command_line(tmp_path):
    "Imported with a sentence, then trained on and measured; odd names are printed, not obeyed"
    for c, n in (('oak', 9), ('elm', 6), ('rare', 1), ('caf\udce9', 4), ('x\x1b[31m', 4)):
        for i in range(n): save(tmp_path/'s'/c/f'{i}.png', 20*i)
    p = ltbook('import', 's', 'trees', '--size', 12, '--data-root', 'd', cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert (
        'not tested: rare' in p.stdout
        and 'imbalance 7' in p.stdout
        and '\x1b[31m' not in p.stdout
        and 'caf\\udce9' in p.stdout)
    p = ltbook('run', 'mislas', 'trees', '--profile', 'smoke', '--bare', '--data-root', 'd', '--out', 'o', cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert 'Traceback' not in p.stderr and next(tmp_path.glob('o/trees/mislas/*/done.json'))


def test_a_table_gives_what_folders_give(tmp_path, monkeypatch):
    "The same pictures by class folders and by a CSV, in memory and through a file, are the same set to the byte"
    rng, rows = np.random.default_rng(0), ['path,label']
    for k, n in dict(wren=7, crow=4).items():
        (tmp_path/'set'/k).mkdir(parents=True)
        for i in range(n):
            name = f'{k}/{i}.png'
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path/'set'/name)
            rows.append(f'{name},{k}')
    (tmp_path/'set'/'table.csv').write_text('\n'.join(rows))
    one = read_h5(import_folder(tmp_path/'set', 'one', tmp_path, 16))
    room = pictures._room
    monkeypatch.setattr(pictures, '_room', lambda n, side: room(n, side, 0))
    two = read_h5(import_folder(tmp_path/'set'/'table.csv', 'two', tmp_path, 16))
    for a, b in zip(one[:2], two[:2]):
        assert a.classes == b.classes and torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)


@pytest.mark.parametrize('end', ['jpg', 'png', 'tif'])
def test_a_part_of_a_picture_that_lies_on_its_side(end, tmp_path):
    "Left half red, right half blue, once it is turned upright; a part is cut out of what one sees"
    x = np.zeros((60, 160, 3), np.uint8)
    x[:30, :, 2], x[30:, :, 0] = 200, 200      # turned by 90 degrees clockwise, red is left
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x).save(tmp_path/f'x.{end}', exif=exif, **(dict(quality=95) if end == 'jpg' else {}))
    sizes = []
    def part(wide, high):
        sizes.append((wide, high))
        return 0, 0, wide//2, high
    left = read_square(tmp_path/f'x.{end}', Reading(16, 'crop'), None, Seen(), part).astype(int)
    assert sizes == [(60, 160)] and (left[:, :13, 0] > 150).all() and (left[:, :13, 2] < 60).all()


def test_folders_in_a_class_folder_belong_to_the_class(tmp_path):
    for place in ('a', 'a/2019', 'a/2020/may', 'b'):
        (tmp_path/'s'/place).mkdir(parents=True)
        for i in range(2): save(tmp_path/'s'/place/f'{i}.png')
    assert {k: len(v) for k, v in class_folders(tmp_path/'s').items()} == dict(a=6, b=2)


def test_a_validation_folder_that_is_none_is_left_aside(tmp_path):
    for part in ('train', 'test'):
        for c in 'ab':
            for i in range(2): save(tmp_path/'s'/part/c/f'{i}.png')
    save(tmp_path/'s'/'val'/'0.png')
    said = []
    assert read_h5(import_folder(tmp_path/'s', 'x', tmp_path, 16, say=said.append))[2] is None
    assert any('val/ is left aside' in t for t in said)


def test_16_bits_without_a_scale(tmp_path):
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(tmp_path/'x.png')
    assert (read_square(tmp_path/'x.png', Reading(8, 'crop'), None, Seen()) == 255).all()


def test_parts_by_any_usual_name_and_none_taken_for_a_class(tmp_path):
    for part in ('Training', 'Test'):
        for c in 'ab':
            for i in range(2): save(tmp_path/'s'/part/c/f'{i}.png')
    assert [len(v) for v in find_parts(tmp_path/'s')['test'].values()] == [2, 2]
    (tmp_path/'s'/'Test').rename(tmp_path/'s'/'dev')
    with pytest.raises(UserError, match='has Training/ with folders in it, and no other part'): find_parts(tmp_path/'s')


XMP = (b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
       b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
       b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>')


@pytest.mark.parametrize(
    'kind', [dict(), dict(progressive=True), dict(subsampling=0), dict(subsampling=1), dict(keep_rgb=True),
             dict(restart_marker_blocks=4), dict(turned=6), dict(turned=5), dict(turned=3),
             dict(noted=3), dict(noted=6), dict(mode='L'), dict(mode='CMYK')], ids=str)
def test_torchcodec_and_pillow_give_the_same_parts(kind, tmp_path, monkeypatch):
    """Whole files and broken ones: the same bytes, or the same sentence. Pillow alone reads what lies on its side, by
    EXIF or by XMP, and what is not in colour."""
    pytest.importorskip('torchcodec')
    real, calls, exif, file = pictures.torchcodec_jpeg(), [], Image.Exif(), tmp_path/'x.jpg'
    def decode(data):
        pixels = real(data)
        calls.append(tuple(pixels.shape))
        return pixels
    monkeypatch.setattr(pictures, 'torchcodec_jpeg', lambda: decode)
    alone = {'turned', 'noted', 'mode'} & kind.keys()
    if 'turned' in kind: exif[0x0112] = kind['turned']
    photo = Image.fromarray(load_sample_image('flower.jpg')).crop((100, 50, 433, 271))
    ways = {k: v for k, v in kind.items() if k not in ('mode', 'noted', 'turned')}
    photo.convert(kind.get('mode', 'RGB')).save(file, exif=exif, quality=85, **ways)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    if 'noted' in kind:
        note = XMP % kind['noted']
        whole = whole[:2] + b'\xff\xe1' + (len(note) + 2).to_bytes(2, 'big') + note + whole[2:]
    some = [whole, whole + b'more', whole[:-30], whole[:len(whole)//2], whole[:700]]
    for k in range(12):
        damaged = bytearray(whole)
        for at in rng.integers(700, len(whole), 3): damaged[at] ^= int(rng.integers(1, 256))
        some.append(bytes(damaged))
    def read(data):
        file.write_bytes(data)
        try: return read_square(file, Reading(120, 'crop'), None, Seen(), lambda w, h: (7, 20, w - 3, h - 40)).tolist()
        except UserError as e: return str(e)
    quick = [read(data) for data in some]
    assert calls[:2] == ([] if alone else [(3, 221, 333)]*2)
    monkeypatch.setattr(pictures, 'torchcodec_jpeg', lambda: None)
    assert quick == [read(data) for data in some] and isinstance(quick[0], list) and 'truncated' in quick[2]
