"Class counts, subsets and shot groups against plain re-implementations, and their properties"
import hashlib, json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ltbook.data.checks import UserError
from ltbook.data.profile import SHOT_RULES, LongTail, long_tail, long_tail_counts, shot_groups

TABLE = {
    (5000, 10, 100): 12406,
    (5000, 10, 50): 13996,
    (5000, 10, 10): 20431,
    (500, 100, 100): 10847,
    (500, 100, 50): 12608,
    (500, 100, 10): 19573}

@pytest.mark.parametrize('setting', TABLE, ids=str)
def test_counts_truncate_the_float64_power(setting):
    n_max, K, imbalance = setting
    want = [math.floor(n_max * math.pow(1 / imbalance, k / (K - 1))) for k in range(K)]
    got = long_tail_counts(n_max, K, imbalance)
    assert got.tolist() == want and got.sum() == TABLE[setting] and got.dtype == np.int64

@given(
    n_max=st.integers(1, 3000),
    K=st.integers(2, 60),
    imbalance=st.floats(1, 1000),
    kind=st.sampled_from(['exp', 'step']))
@settings(deadline=None, max_examples=150)
def test_counts_fall_from_n_max_and_are_never_empty(n_max, K, imbalance, kind):
    try:
        c = long_tail_counts(n_max, K, imbalance, kind)
    except UserError as e:
        assert int(n_max * (1 / imbalance)) < 1 and 'without images' in str(e)
    else:
        assert (
            len(c) == K
            and c[0] == n_max
            and (np.diff(c) <= 0).all()
            and c[-1] == int(n_max * (1 / imbalance)) >= 1)

@pytest.mark.parametrize('imbalance', [0.01, 0.999, 0, -5, float('inf'), float('nan')])
def test_imbalance_below_one_or_endless_is_refused(imbalance):
    with pytest.raises(UserError, match='at least 1'): long_tail_counts(500, 100, imbalance)

def test_empty_class_unknown_kind_and_single_class_are_refused():
    with pytest.raises(UserError, match='without images'): long_tail_counts(5, 10, 6)
    with pytest.raises(UserError, match='step'): long_tail_counts(5, 10, 2, 'steps')
    with pytest.raises(UserError, match='2 classes'): long_tail_counts(5, 1, 2)

def published_choice(labels, counts):
    "The global legacy generator, seeded once, as released code does it; its state is put back"
    before = np.random.get_state()
    np.random.seed(0)
    keep = []
    for k, n in enumerate(counts):
        where = np.where(labels == k)[0]
        np.random.shuffle(where)
        keep.extend(where[:n])
    np.random.set_state(before)
    return np.array(keep)

@pytest.mark.parametrize('K,per_class,imbalance', [(10, 5000, 100), (100, 500, 50), (4, 9, 3)])
def test_choice_is_the_published_one(K, per_class, imbalance):
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(K), per_class))
    lt = long_tail(torch.from_numpy(labels), imbalance)
    assert np.array_equal(lt.indices, published_choice(labels, long_tail_counts(per_class, K, imbalance)))
    assert np.bincount(labels[lt.indices]).tolist() == lt.counts.tolist() and len(set(lt.indices)) == len(lt)
    assert (np.diff(labels[lt.indices]) >= 0).all()

def test_choice_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    long_tail(np.repeat([0, 1], 20), 4)
    assert np.array_equal(before, np.random.get_state()[1])

def test_smaller_tail_is_part_of_a_larger_one():
    labels = np.repeat(np.arange(5), 40)
    big, small = long_tail(labels, 2), long_tail(labels, 10)
    assert set(small.indices) < set(big.indices)

def test_manifest_is_json_and_the_fingerprint_sees_every_position():
    labels = np.repeat(np.arange(5), 40)
    lt = long_tail(labels, 10)
    d = json.loads(json.dumps(lt.to_dict()))
    assert (
        d['sha256'] == lt.sha256
        and len(d['sha256']) == 64
        and d['counts'] == lt.counts.tolist()
        and 'indices' not in d)
    assert lt.sha256 == hashlib.sha256(b''.join(int(i).to_bytes(8, 'little') for i in lt.indices)).hexdigest()
    other = lt.indices.copy(); other[-1] += 1
    assert LongTail(other, lt.counts, 10., 'exp', 0).sha256 != lt.sha256
    # bytes are little-endian on every machine
    assert LongTail(lt.indices.astype('>i8'), lt.counts, 10., 'exp', 0).sha256 == lt.sha256
    assert long_tail(labels, 10, data_seed=1).sha256 != lt.sha256

def test_no_imbalance_keeps_everything_in_order():
    lt = long_tail([1, 0, 1, 1])
    assert (
        lt.indices.tolist() == [0, 1, 2, 3]
        and lt.counts.tolist() == [1, 3]
        and lt.imbalance is None
        and lt.kind == 'all')

def test_labels_that_cannot_serve_are_refused():
    with pytest.raises(UserError, match='Class 1 has no images'): long_tail([0, 2, 2], 1)
    with pytest.raises(UserError, match='lower n_max'): long_tail(np.repeat([0, 1], 5), 1, n_max=6)
    with pytest.raises(UserError, match='without images'): long_tail(np.repeat([0, 1], 5), 50)

@given(
    counts=st.lists(st.integers(1, 300), min_size=3, max_size=40),
    rule=st.sampled_from(['100/20', 'oltr', 'thirds']),
    seed=st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_groups_partition_and_follow_the_classes(counts, rule, seed):
    counts = np.array(counts)
    g = shot_groups(counts, rule)
    assert list(g) == ['many', 'medium', 'few'] and sorted(np.concatenate(list(g.values()))) == list(
        range(len(counts)))

    def lows(a, b):
        return not len(g[a]) or not len(g[b]) or counts[g[a]].min() >= counts[g[b]].max()

    assert lows('many', 'medium') and lows('medium', 'few')
    perm = np.random.default_rng(seed).permutation(len(counts))
    if (
        len(set(counts.tolist())) == len(counts) or rule != 'thirds'
    ):  # without ties renaming classes renames the groups
        moved = shot_groups(counts[perm], rule)
        assert all(sorted(perm[moved[k]]) == g[k].tolist() for k in g)

@pytest.mark.parametrize(
    'rule,sizes',
    [
        ('100/20', [(35, 35, 30), (41, 41, 18), (69, 31, 0)]),
        ('mislas', [(36, 35, 29)] * 3),
        ('thirds', [(34, 33, 33)] * 3)])
def test_group_sizes_on_cifar100(rule, sizes):
    assert [
        tuple(map(len, shot_groups(long_tail_counts(500, 100, i), rule).values())) for i in (100, 50, 10)
    ] == sizes

def test_borders_and_unknown_rules():
    assert [len(v) for v in shot_groups([101, 100, 20, 19]).values()] == [1, 2, 1]
    assert [len(v) for v in shot_groups([101, 100, 20, 19], 'oltr').values()] == [2, 1, 1]
    with pytest.raises(UserError): shot_groups([1, 2], 'many')
    with pytest.raises(UserError, match='thirds'): shot_groups(np.ones(37), 'mislas')
    assert [len(v) for v in shot_groups([190, 189, 95, 94], 'difficulty_net').values()] == [1, 2, 1]
    assert [len(v) for v in shot_groups([1001, 1000, 200, 199], '1000/200').values()] == [1, 2, 1]
    assert set(SHOT_RULES) == {'100/20', '1000/200', 'difficulty_net', 'oltr', 'mislas', 'thirds'}
