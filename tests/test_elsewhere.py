"Everything that trains or measures runs where the processor's tensors are not, as on a GPU"
import numpy as np
import pytest
import torch

import ltbook.data.sampling as sampling
import ltbook.data.views as views
import ltbook.runs.run as running
import ltbook.train.loop as loop
from ltbook.data.auto_augment import AutoAugment
from ltbook.methods.method import methods
from ltbook.runs.evaluate import logits_from_weights
from ltbook.studies.features import export_features
from ltbook.runs.folder import load_run
from ltbook.studies.fusion import logits_on
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.studies.shift import shift
from ltbook.train.files import load_state

from elsewhere import DEVICE, Elsewhere, mark, there

STRONG = dict(auto_augment=True, cutout_side=4, pad_mode='reflect+constant')
CASES = [(m, {}) for m in methods()] + [
    ('mislas', dict(capture=True, first_side=4, epochs=3, test_every=1, precision='bf16')),
    ('dirmixe', dict(capture=True)),
    ('ride', dict(capture=True, epochs=3)),
    ('difficulty_net', dict(capture=True, loss='equalization', select='val', **STRONG)),
    ('difficulty_net', dict(meta_grad='none', meta_precision='bf16')),
    ('reweighting', dict(loss='ldam', head='cosine', weights='cdb')),
    ('reweighting', dict(loss='logit_adjustment', weights='class_balanced', defer=0.5))]



class Killed(Exception): pass


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(running, 'find_device', lambda name: DEVICE if name == 'auto' else torch.device(name))
    # files are read by the processor
    for place in (running, loop): monkeypatch.setattr(place, 'load_state', lambda path: mark(load_state(path), False))
    monkeypatch.setattr(views, 'AutoAugment', lambda *a: AutoAugment(*a, dense=True))
    return Elsewhere()


@pytest.mark.parametrize('method, changes', CASES, ids=['-'.join([m, *map(str, c.values())]) for m, c in CASES])
def test_runs(method, changes, elsewhere, tmp_path):
    "Killed after an epoch, resumed, and in the end the numbers of the processor"
    r, rows = recipe(method, profile='smoke', **changes), []
    def kill(row):
        rows.append(row)
        if len(rows) == 1: raise Killed
    with elsewhere:
        with pytest.raises(Killed): run(r, tmp_path/'far', report=kill)
        far = load_run(run(r, tmp_path/'far'))
    near = load_run(run(r, tmp_path/'near', device='cpu'))
    assert far.env['device'] == str(DEVICE) and near.env['device'] == 'cpu'
    assert [s['captured'] for s in far.env['sessions']] == ([['stage1'], far.stages] if r.capture else [[], []])
    for k, v in near.predictions.items(): np.testing.assert_allclose(far.predictions[k], v, rtol=1e-5, atol=1e-5)


def test_what_is_done_with_a_run(elsewhere, tmp_path):
    "Measured from its weights, its features written, asked about other images, its experts adapted"
    with elsewhere:
        first, experts = (
            load_run(run(recipe('mislas', profile='smoke'), tmp_path)),
            load_run(run(recipe('sade', profile='smoke'), tmp_path)))
        again = logits_from_weights(first)
        np.testing.assert_allclose(again['stage2/logits'], first.predictions['logits'], rtol=1e-5, atol=1e-5)
        assert all(p.exists() for p in export_features(first, tmp_path/'features'))
        images = running.make_context(first.recipe, device='cpu').train
        assert logits_on(first, images).logits.shape == (len(images), 10)
        table = shift(experts.path, only=['uniform'], draws=1)
        assert len(table) and not table.top1.isna().any()


def test_mistakes_are_noticed(elsewhere, monkeypatch, tmp_path):
    "Labels that numpy takes, a prior that stayed behind, a network that was not moved"
    def labels_to_numpy(self, labels, *a, **k): np.asarray(labels, dtype=np.int64)
    with elsewhere:
        x = torch.ones(3, device=DEVICE)
        assert (
            there(x)
            and there(x + 1)
            and there(torch.zeros_like(x))
            and not there(x.cpu())
            and x.device == DEVICE
            and there(x.cpu().to(DEVICE)))
        # indices and single numbers may come from the processor
        assert (x[torch.tensor([0, 1])] + torch.tensor(2.)).sum() == 6
        with pytest.raises(TypeError): x.numpy()
        with pytest.raises(TypeError): np.asarray(x)
        with pytest.raises(RuntimeError, match='two devices'): x[None] + torch.ones(3)
        with pytest.raises(RuntimeError, match='two devices'):
            torch.nn.functional.cross_entropy(x[None], torch.tensor([0]))
        with pytest.raises(RuntimeError, match='two devices'): torch.nn.Linear(3, 2)(x[None])
        assert torch.nn.Linear(3, 2).to(DEVICE)(x[None]).shape == (1, 2)
        monkeypatch.setattr(sampling.Sampler, '__init__', labels_to_numpy)
        with pytest.raises(TypeError, match='elsewhere'): run(recipe('cross_entropy', profile='smoke'), tmp_path)
