"What a run answers under label shift, each by hand, and adapted to the images it may adapt to"
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ltbook.data.shift import PROTOCOLS, ratio_shifts, reference_shifts
from ltbook.measure.aggregation import guarded, learn_weights, mix
from ltbook.measure.label_shift import (
    estimate_power, estimate_prior, estimate_prior_by_confusion, power_prior, replace_prior)
from ltbook.measure.post_hoc import balanced_weights, fit_scaling
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from ltbook.studies import shift as shifts
from ltbook.studies.answers import KeptBack, answers

K, COUNTS = 10, torch.tensor([200, 150, 110, 80, 60, 45, 33, 25, 18, 13])


def drawn(labels, seed=0):
    "Logits of three experts on images of these classes"
    noise = torch.randn(len(labels), 3, K, generator=torch.Generator().manual_seed(seed))
    return 1.5*noise + 2*torch.nn.functional.one_hot(labels, K)[:, None]


LABELS = torch.arange(K).repeat(100)
EXPERTS = drawn(LABELS)
LOGITS = EXPERTS.mean(1)
HELD = torch.repeat_interleave(torch.arange(K), (COUNTS/10).ceil().long())
KEPT = KeptBack.of({'stage1/calibration_logits': drawn(HELD, 1).mean(1).numpy(), 'calibration_labels': HELD.numpy()},
                   'stage1')
SHIFTS = {s.name: s for s in ratio_shifts(LABELS.numpy(), COUNTS.numpy(), (50,))}
PRIORS = dict(train=(COUNTS.double(), 1.), uniform=(torch.ones(K).double(), 0.))


def same(a, b): return torch.allclose(a.double(), b.double(), atol=1e-4)


@pytest.mark.parametrize('name', ['forward-50', 'uniform', 'backward-50'])
@pytest.mark.parametrize('of', PRIORS)
def test_priors(name, of):
    s, (source, power) = SHIFTS[name], PRIORS[of]
    found, z, i = answers(LOGITS, s, COUNTS, kept=KEPT), LOGITS, s.indices
    change = lambda z, q: z.double() + (q/q.sum()).log() - (source/source.sum()).log()
    q = torch.as_tensor(s.counts).double()
    assert same(found[f'true prior ({of})'], change(z[i], q))
    assert same(found[f'EM ({of})'], change(z[i], estimate_prior(z[i], source).clamp_min(1e-12)))
    assert same(found[f'power ({of})'], change(z[i], power_prior(COUNTS, estimate_power(z[i], COUNTS, power))))
    calm = KEPT.scalings[of]
    assert same(found[f'calibrated EM ({of})'], change(calm(z[i]), estimate_prior(calm(z[i]), source).clamp_min(1e-12)))
    q = estimate_prior_by_confusion(calm(z[i]), calm(KEPT.logits), KEPT.labels).clamp_min(.1/K)
    assert same(found[f'BBSE ({of})'], change(calm(z[i]), q))


def test_temperatures_of_images_that_were_kept_back():
    plain, weighed = (fit_scaling(KEPT.logits, KEPT.labels, weights=w) for w in (None, balanced_weights(KEPT.labels)))
    assert KEPT.scalings['train'].temperature == plain.temperature
    assert KEPT.scalings['uniform'].temperature == weighed.temperature != plain.temperature


@pytest.mark.parametrize('name', SHIFTS)
def test_mixtures(name):
    s, w = SHIFTS[name], torch.tensor([.2, .3, .5]).double()
    found, e = answers(LOGITS, s, COUNTS, EXPERTS, w.numpy()), EXPERTS[s.indices]
    assert same(found['adapted'], mix(e, w)) and same(found['expert 2'], e[:, 1])
    assert same(found['guarded'], mix(e, guarded(w, estimate_power(LOGITS[s.indices], COUNTS, 0.))))


def test_the_published_draws_adapt_to_their_own_images(monkeypatch):
    s = next(s for s in reference_shifts(LABELS.numpy(), COUNTS.numpy(), 50)
             if not np.array_equal(np.sort(s.adapt_indices), np.sort(s.indices)))
    want = estimate_prior(LOGITS[s.adapt_indices], COUNTS.double()).clamp_min(1e-12)
    found = answers(LOGITS, s, COUNTS)['EM (train)']
    assert same(found, replace_prior(LOGITS[s.indices], COUNTS, want))
    other = estimate_prior(LOGITS[s.indices], COUNTS.double()).clamp_min(1e-12)
    assert not same(found, replace_prior(LOGITS[s.indices], COUNTS, other))
    seen, views = [], (EXPERTS, EXPERTS + 1)
    monkeypatch.setattr(shifts, 'learn_weights', lambda v, *_, **__: seen.extend(v))
    shifts._learn(s, [views], 0, SimpleNamespace(lr=.1, weight_decay=0., batch_size=64, entropy=0.))
    assert all(torch.equal(a, b[s.adapt_indices]) for a, b in zip(seen[0], views))


def test_the_protocol_of_a_data_set_reaches_who_learns_and_who_looks(tmp_path, monkeypatch):
    monkeypatch.setitem(shifts.PROTOCOLS, 'digits', replace(PROTOCOLS['inaturalist2018'], ratios=(10.,), p_blur=.5))
    place = run(recipe('sade', 'digits', profile='smoke', calibration=.1), tmp_path, device='cpu')
    asked, looked, view_logits = [], [], shifts.view_logits
    def learn(v, rng, *a, **k):
        asked.append((a, k))
        return learn_weights(v, rng, *a, **k)
    def look(*a, **k):
        looked.append(k['protocol'])
        return view_logits(*a, **k)
    monkeypatch.setattr(shifts, 'learn_weights', learn)
    monkeypatch.setattr(shifts, 'view_logits', look)
    table = shifts.shift(place, draws=0, device='cpu')
    how = PROTOCOLS['inaturalist2018']
    words = dict(weight_decay=how.weight_decay, batch_size=how.batch_size, entropy=how.entropy)
    assert asked == [((how.lr, ), words)]*3
    assert looked[0].p_blur == .5 and {*table['shift']} == {'forward-10', 'uniform', 'backward-10'}
    assert {'BBSE (train)', 'BBSE (uniform)', 'calibrated EM (train)', 'calibrated EM (uniform)'} <= {*table.answer}
