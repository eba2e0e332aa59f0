"The report: its keys, its agreement with the single measures, what JSON can hold, and what it costs to import."
import json
import math
import subprocess
import sys
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from ltbook.data.checks import UserError
from ltbook.data.profile import long_tail_counts, shot_groups
from ltbook.measure.calibration import calibration_error, confidences
from ltbook.measure.report import measures, protocol

KEYS = [
    'top1',
    'many',
    'medium',
    'few',
    'ece15',
    'mce15',
    'aece15',
    'cwece15',
    'ece15_many',
    'ece15_medium',
    'ece15_few',
    'nll',
    'brier',
    'per_class',
    'n']


def case(seed, n, C):
    g = torch.Generator().manual_seed(seed)
    logits, labels = 3 * torch.randn(n, C, generator=g, dtype=torch.float64), torch.randint(C, (n,), generator=g)
    return logits, labels, torch.randint(5, 300, (C,), generator=g).numpy()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 60),
    C=st.integers(2, 12),
    rule=st.sampled_from(['100/20', 'oltr', 'thirds']))
def test_report_holds_what_json_can_hold(seed, n, C, rule):
    logits, labels, counts = case(seed, n, C)
    result, groups = measures(logits, labels, counts, rule), shot_groups(counts, rule)
    assert list(result) == KEYS and json.loads(json.dumps(result, allow_nan=False)) == result
    assert result['n'] == n and [a is None for a in result['per_class']] == [k not in labels for k in range(C)]
    confidence, guess = confidences(logits)
    for name, ids in groups.items():
        known = [result['per_class'][k] for k in ids if result['per_class'][k] is not None]
        member = np.isin(labels, ids)
        assert result[name] == (pytest.approx(np.mean(known)) if known else None)
        assert result[f'ece15_{name}'] == (
            pytest.approx(calibration_error(confidence[member], (guess == labels)[member])) if known else None)
    assert protocol(labels, counts, rule) == dict(
        shot_rule=rule, group_sizes={k: len(v) for k, v in groups.items()}, bins=15, n_test=n)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), C=st.integers(2, 12))
def test_permuting_classes_changes_only_the_order(seed, n, C):
    logits, labels, counts = case(seed, n, C)
    new = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    old = new.argsort()
    before, after = measures(logits, labels, counts), measures(logits[:, old], new[labels], counts[old])
    assert after.pop('per_class') == [before['per_class'][k] for k in old]
    for k, v in after.items():
        assert v == (v if before[k] is None and v is None else pytest.approx(before[k], abs=1e-12))


def test_arrays_tensors_and_single_precision_agree():
    logits, labels, counts = case(0, 80, 6)
    a, b, c = (
        measures(z, y, n)
        for z, y, n in (
            (logits, labels, counts),
            (logits.numpy(), labels.numpy().astype('int32'), counts.tolist()),
            (logits.float(), labels, torch.tensor(counts))))
    assert a == b
    for k in KEYS: assert c[k] == pytest.approx(a[k], abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_device_does_not_matter():
    logits, labels, counts = case(3, 500, 20)
    here, there = measures(logits, labels, counts), measures(logits.cuda(), labels, counts)
    for k in KEYS: assert there[k] == pytest.approx(here[k], abs=1e-12)


def test_group_without_classes_is_none():
    counts = long_tail_counts(500, 100, 10)  # 50 images in the smallest class
    result = measures(torch.eye(100), torch.arange(100), counts)
    assert result['few'] is None and result['ece15_few'] is None and result['many'] == result['top1'] == 1
    assert protocol(torch.arange(100), counts)['group_sizes'] == dict(many=69, medium=31, few=0)


def test_bins_are_part_of_the_name():
    logits, labels, counts = case(1, 30, 4)
    result = measures(logits, labels, counts, n_bins=10)
    confidence, guess = confidences(logits)
    assert result['ece10'] == calibration_error(confidence, guess == labels, 10) and not any('15' in k for k in result)
    assert protocol(labels, counts, n_bins=10)['bins'] == 10


def test_infinite_likelihood_becomes_none():
    assert measures(torch.tensor([[0., -math.inf]]), torch.tensor([1]), [200, 5])['nll'] is None


def test_mistakes_are_refused():
    logits, labels, counts = case(2, 10, 4)
    for bad in [
        (logits * math.nan, labels, counts),
        (logits, labels, counts[:3]),
        (logits, labels, counts, 'half'),
        (logits[:5], labels, counts)]:
        with pytest.raises(UserError):
            measures(*bad)


def test_import_is_light():
    heavy = "[m for m in ('sklearn', 'torchmetrics', 'matplotlib', 'seaborn', 'scipy') if m in sys.modules]"
    code = (f"import sys, torch, pandas; before = {heavy}; import "
            f"ltbook.measure.report; assert {heavy} == before, {heavy}")
    subprocess.run([sys.executable, '-c', code], check=True)
