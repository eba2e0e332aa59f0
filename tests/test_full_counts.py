"""The three large sets at their published sizes, without their images: lists, samplers, shot groups, the hash of what
is trained on, measures, and writing and reading of predictions. A process of its own does it all, and its time and
memory are counted. Class counts are generated: published totals, largest and smallest class, sizes of the groups."""
import json, os, subprocess, sys, time

import numpy as np, pytest, torch

from ltbook.data.lists import LARGE
from ltbook.data.stores import ImageSet, write_h5
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.train import loop
from watching import pace

# classes, train images, largest, smallest, (many, medium, few) by 100/20, test images, beginning of a path
SETS = dict(
    imagenet_lt=(1000, 115_846, 1280, 5, (385, 479, 136), 50_000, 'train/n'),
    places_lt=(365, 62_500, 4980, 5, (131, 163, 71), 36_500, 'train/a/'),
    inaturalist2018=(8142, 437_513, 1000, 2, (842, 3701, 3599), 24_426, 'train_val2018/'))


def generated(n_classes, total, largest, smallest, groups):
    "Falling class counts with these group sizes and this sum"
    ends = ((largest, 101), (100, 20), (19, smallest))
    def profile(p):
        parts = [low + (high - low)*np.linspace(1, 0, n)**p for (high, low), n in zip(ends, groups)]
        return np.concatenate(parts).round().astype(int)
    low, high = .01, 60.
    for _ in range(100):
        low, high = (m, high) if profile(m := (low + high)/2).sum() > total else (low, m)
    counts = profile(high)
    i = 1
    while counts.sum() < total:      # the rounding
        if counts[i] < counts[i - 1] and counts[i] not in (100, 19): counts[i] += 1
        i = i % (n_classes - 2) + 1
    assert counts.sum() == total and counts[0] == largest and counts[-1] == smallest
    return counts


CHILD = '''
import json, resource, sys, time, tracemalloc
from pathlib import Path
from types import SimpleNamespace
began = time.process_time()
import numpy as np, torch
from ltbook.data.large import read_lists
from ltbook.data.lists import by_count, recognised
from ltbook.data.profile import LongTail, shot_groups
from ltbook.data.sampling import ClassAwareSampler, InstanceBalanced
from ltbook.runs.folder import Run
from ltbook.runs.measured import stage_measures, write_predictions
place, n_test, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
listed = read_lists(name, place/'lists')
part = listed.parts['train']
counts, order = part.counts, by_count(part.counts)
found = dict(total=len(part), parts={k: len(v) for k, v in listed.parts.items()}, known=recognised(part) is not None,
              stable=bool((np.diff(counts[order]) <= 0).all()))
found['groups'] = [len(v) for v in shot_groups(counts, '100/20').values()]
tail = LongTail(np.arange(len(part)), counts, None, 'exp', 0)
found['sha256'] = tail.sha256
for sampler in (InstanceBalanced(part.labels, 0), ClassAwareSampler(part.labels, 0, len(part))):
    start = time.process_time()
    drawn = sampler.epoch()
    found.setdefault('epoch_seconds', []).append(time.process_time() - start)
    found.setdefault('drawn', []).append(len(drawn))
C = len(counts)
labels = torch.arange(n_test) % C
z = torch.empty(n_test, C).normal_(generator=torch.Generator().manual_seed(0))
z[torch.arange(n_test), labels] += 5
context = SimpleNamespace(
    logits=dict(stage1=dict(logits=z.numpy())), parts=dict(test=SimpleNamespace(labels=labels)), tail=tail,
    fingerprint={}, recipe=SimpleNamespace(shot_rule='100/20'))
m = stage_measures(context, context.logits['stage1']['logits'])
tracemalloc.start()
write_predictions(place/'predictions.h5', context)
read = Run(place, None, {}, {}).predictions
found['same'] = all(bool((read[k][-5:] == z[-5:].numpy()).all()) for k in ('logits', 'stage1/logits'))
found['copied'] = tracemalloc.get_traced_memory()[1]/2**20
tracemalloc.stop()
found |= dict(top1=m['top1'], few=m['few'], seconds=time.process_time() - began,
              memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
print(json.dumps(found))
'''


@pytest.mark.parametrize('name', SETS)
def test_everything_but_the_images_at_full_size(name, tmp_path):
    n_classes, total, largest, smallest, groups, n_test, prefix = SETS[name]
    counts = generated(n_classes, total, largest, smallest, groups)
    (tmp_path/'lists').mkdir()
    each = LARGE[name].parts
    sizes = {k: [n//n_classes]*n_classes for k, (n, *_) in each.items() if k in ('val', 'test')}
    for part, of in (sizes | dict(train=counts)).items():
        lines = [(f'{prefix}{k}/{part}{k}_{i}.jpg', k) for k, n in enumerate(of) for i in range(n)]
        if name == 'inaturalist2018':
            (tmp_path/'lists'/f'{part}.json').write_text(json.dumps(dict(
                images=[dict(id=i, file_name=f) for i, (f, _) in enumerate(lines)],
                annotations=[dict(id=i, image_id=i, category_id=k) for i, (_, k) in enumerate(lines)],
                categories=[dict(id=k, name=f'kind {k}') for k in range(n_classes)])))
        else: (tmp_path/'lists'/f'{part}.txt').write_text(''.join(f'{f} {k}\n' for f, k in lines))
    p = subprocess.run([sys.executable, '-c', CHILD, tmp_path, str(n_test), name], capture_output=True, text=True,
                       env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert p.returncode == 0, p.stderr[-2000:]
    found = json.loads(p.stdout)
    assert found['parts'] == {k: v[0] for k, v in each.items() if k in ('train', 'val', 'test')}
    assert found['total'] == total and found['groups'] == list(groups) and found['known']
    assert found['stable'] and found['same']
    assert found['drawn'] == [total, total] and len(found['sha256']) == 64
    assert max(found['epoch_seconds']) < pace(), 'overhead of an epoch'
    assert found['copied'] < 10, 'MiB: logits of 795 MB are written and read where they lie'
    assert found['seconds'] < 60*pace() and found['memory'] < 3000, found
    assert .5 < found['top1'] <= 1 and abs(found['few'] - found['top1']) < .1


def test_an_epoch_costs_less_than_a_second_beside_its_steps(tmp_path, monkeypatch):
    """Orders of 437,513 images by instance and by class, and a checkpoint with heads of 8,142 classes, in epochs of two
    steps on pictures of 8 pixels"""
    n_classes, total, largest, smallest, groups, *_ = SETS['inaturalist2018']
    names, of = tuple(map(str, range(n_classes))), np.repeat(
        np.arange(n_classes), generated(n_classes, total, largest, smallest, groups))
    def pictures(labels): return ImageSet(torch.zeros(len(labels), 8, 8, 1, dtype=torch.uint8), labels, names)
    write_h5(tmp_path/'big.h5', pictures(torch.from_numpy(of)), pictures(torch.arange(n_classes)))
    save, ends, sizes = loop.save_state, [], []
    def saved(path, state):
        save(path, state)
        sizes.append(path.stat().st_size)
        ends.append((path.name, time.process_time()))
        return path
    monkeypatch.setattr(loop, 'save_state', saved)
    r = recipe('crt', 'big', imbalance=None, backbone='resnet10', side=8, pad=0, epochs=3, stage2_epochs=3, max_steps=2)
    run(r, tmp_path/'out', root=tmp_path, device='cpu')
    assert len(ends) == 6 and min(sizes) > 4*512*n_classes      # as many as epochs, each with a whole head
    for part in (ends[:3], ends[3:]):      # seconds of a core, as other processes may be at work
        assert min(b - a for (_, a), (_, b) in zip(part, part[1:])) < pace(), (ends, pace())
