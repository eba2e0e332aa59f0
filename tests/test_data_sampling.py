"Samplers against a literal re-telling of the endless cycles, against frequencies, and through JSON"
import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ltbook.data.checks import UserError
from ltbook.data.profile import long_tail_counts
from ltbook.data.sampling import (
    SAMPLERS, ClassAwareSampler, ClassProbability, InstanceBalanced, ProgressivelyBalanced, class_uniform,
    power_law, reversed_frequency, square_root)

TAIL = np.repeat(np.arange(10), long_tail_counts(60, 10, 12))
def make(name, labels, seed=0):
    return SAMPLERS[name](labels, seed=seed, **({'epochs': 5} if name == 'progressive' else {}))

@pytest.mark.parametrize('name', SAMPLERS)
def test_state_through_json_continues_exactly(name):
    a, b = make(name, TAIL, 1), make(name, TAIL, 2)
    a.epoch()
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert all(np.array_equal(a.epoch(), b.epoch()) for _ in range(3))

@pytest.mark.parametrize('name', SAMPLERS)
def test_saved_state_is_not_touched_by_later_epochs(name):
    a = make(name, TAIL); a.epoch()
    state = a.state_dict(); frozen = json.dumps(state)
    b = make(name, TAIL, 9); b.load_state_dict(state); want = b.epoch(); a.epoch()
    assert json.dumps(state) == frozen
    c = make(name, TAIL, 4); c.load_state_dict(state)
    assert np.array_equal(c.epoch(), want)

@pytest.mark.parametrize('name', SAMPLERS)
def test_epochs_are_positions_of_the_promised_number(name):
    s = make(name, torch.from_numpy(TAIL))
    e = s.epoch()
    assert e.dtype == np.int64 and e.shape == (len(s),) and 0 <= e.min() and e.max() < len(TAIL)
    assert all(type(i) is int for i in s) and not np.array_equal(e, s.epoch())
    assert np.array_equal(make(name, TAIL, 3).epoch(), make(name, TAIL, 3).epoch())
    assert not np.array_equal(make(name, TAIL, 3).epoch(), make(name, TAIL, 4).epoch())

def test_samplers_leave_global_generators_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for name in SAMPLERS: make(name, TAIL).epoch()
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.get_rng_state())

def cycle(items, shuffle):
    "An endless cycle through `items`, shuffled anew at the start of each round"
    items = list(items)
    while True:
        shuffle(items)
        yield from items

@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    repeat=st.integers(1, 5),
    draws=st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_class_aware_cycles(counts, repeat, draws):
    ("Split the stream into turns; each class stream must be rounds of all "
     "its images, the class stream rounds of all classes")
    labels = np.repeat(np.arange(len(counts)), counts)
    s, images, turns = (
        ClassAwareSampler(labels, seed=sum(counts), repeat=repeat),
        {k: [] for k in range(len(counts))},
        [])
    for n in draws:
        s.n_draws = n
        e = s.epoch()
        assert len(e) == n
        for i in range(0, n, repeat):
            run = e[i : i + repeat]
            assert len(set(labels[run])) == 1
            turns.append(labels[run[0]])
            images[turns[-1]] += run.tolist()

    def rounds(stream, n):
        return all(len(set(stream[i : i + n])) == len(stream[i : i + n]) for i in range(0, len(stream), n))

    assert rounds(turns, len(counts)) and all(rounds(v, counts[k]) for k, v in images.items())

def test_class_aware_uses_the_same_rule_as_plain_generators():
    "With one generator for everything, our stream equals nested Python generators fed by it"
    labels = np.array([0, 0, 0, 1, 1, 2])
    s, rng = ClassAwareSampler(labels, seed=7, n_draws=48), np.random.default_rng(7)
    def shuffle(items):
        a = np.array(items); rng.shuffle(a); items[:] = a.tolist()
    classes, own = cycle(range(3), shuffle), [cycle(np.flatnonzero(labels == k), shuffle) for k in range(3)]
    want = []
    while len(want) < 96:
        k = next(classes)
        want += [next(own[k]) for _ in range(4)]
    assert np.concatenate([s.epoch(), s.epoch()]).tolist() == want

@pytest.mark.parametrize('imbalance,batches', [(100, 86), (50, 100), (10, 154)])
def test_class_aware_published_epochs_on_cifar100(imbalance, batches):
    labels = np.repeat(np.arange(100), long_tail_counts(500, 100, imbalance))
    assert -(-len(labels) // 128) + 1 == batches
    s = ClassAwareSampler(labels, n_draws=batches * 128)
    got = np.bincount(labels[s.epoch()], minlength=100)
    assert set(got) <= {batches * 128 // 400 * 4, batches * 128 // 400 * 4 + 4}
    if imbalance == 100: assert (got.min(), got.max()) == (108, 112)
    whole = ClassAwareSampler(labels)
    assert len(whole) == 50000 and np.bincount(labels[whole.epoch()]).tolist() == [500] * 100

@pytest.mark.parametrize('maker,q', [(class_uniform, 0), (square_root, .5), (reversed_frequency, -1), (power_law, 1)])
def test_family_frequencies(maker, q):
    n = np.bincount(TAIL).astype(float)
    s = maker(TAIL, 5, 200_000)
    e = s.epoch()
    p = n ** q / (n ** q).sum()
    assert np.allclose(s.probabilities, p)
    per_image, share = np.bincount(e, minlength=len(TAIL)), (p / n)[TAIL]
    z = (per_image - len(e) * share) / np.sqrt(len(e) * share)
    assert abs(z).max() < 5 and 0.7 < z.std() < 1.3  # single images, not just classes

def test_progressive_goes_from_images_to_classes():
    s, T = ProgressivelyBalanced(TAIL, 8, n_draws=100), 8
    n = np.bincount(TAIL)
    for t in range(11):
        s.epoch()
        u = min(t / T, 1)
        assert np.allclose(s.probabilities, (1 - u) * n / n.sum() + u / 10)

def test_states_of_others_are_refused():
    s = ClassAwareSampler(TAIL)
    for other in (InstanceBalanced(TAIL), ProgressivelyBalanced(TAIL, 3), ClassAwareSampler([0, 1])):
        with pytest.raises(UserError, match='belongs to'): s.load_state_dict(other.state_dict())

@pytest.mark.parametrize(
    'bad',
    [
        lambda: InstanceBalanced([0, 2]),
        lambda: InstanceBalanced([]),
        lambda: InstanceBalanced([0, -1]),
        lambda: ClassAwareSampler([1]),
        lambda: ClassAwareSampler([0], n_draws=0),
        lambda: ClassAwareSampler([0], repeat=0),
        lambda: ClassProbability([0, 1], [1, np.inf]),
        lambda: ClassProbability([0, 1], [[1, 1]]),
        lambda: ProgressivelyBalanced([0, 1], 0),
        lambda: square_root([0, 3])])
def test_impossible_samplers_are_refused(bad):
    with pytest.raises(UserError):
        bad()
