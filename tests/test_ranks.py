"""Several processes for one run: the same numbers, one writer, and nothing lost with a process."""
import os, signal, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from torch.nn import functional as F
from ltbook.data.images import load_images
from ltbook.data.views import Augmentation, TrainView
from ltbook.methods.recipe import recipe
from ltbook.runs.folder import load_run, run_id
from ltbook.runs.run import make_context, run
from ltbook.train import ranks
from ltbook.train.ranks import Sharing
from ltbook.train.stage import drawn_with, pieces

QUIET = dict(say=lambda text: None)
LTBOOK = [sys.executable, '-m', 'ltbook']


def in_ranks(tmp_path, body: str, count: int, **names) -> list:
    "Run a function body in `count` processes (1: here alone) and return what each of them returns."
    store = tmp_path/f'store{count}'
    code = textwrap.dedent('''
        import sys, torch
        from ltbook.train import ranks
        {body}
        rank, count, store, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
        if count == 1: torch.save(work(), out)
        else:
            with ranks.joined(rank, count, torch.device('cpu'), store): torch.save(work(), out)
        ''').replace('{body}', textwrap.dedent(body))
    file = tmp_path/f'body{count}.py'
    file.write_text(code)
    outs = [tmp_path/f'{count}-{r}.pt' for r in range(count)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    all_ = [subprocess.Popen([sys.executable, file, str(r), str(count), store, o], env=env) for r, o in enumerate(outs)]
    assert [p.wait(120) for p in all_] == [0]*count
    return [torch.load(o) for o in outs]


GRADIENTS = '''
    from torch.nn import functional as F
    from ltbook.models.backbones import build_backbone
    def work():
        torch.manual_seed(0)
        net = build_backbone('resnet32', 7, 3, 'linear').double().train()
        ranks.sync_batchnorm(net)
        opt = torch.optim.SGD(net.parameters(), .1)
        x, y = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10) % 7
        for _ in range(2):
            ranks.weigh(10)
            mine = torch.from_numpy(ranks.part(10))
            opt.zero_grad()
            loss = ranks.here().weight*F.cross_entropy(net(x[mine]), y[mine])
            loss.backward()
            opt.step()
        return dict(net.state_dict()) | dict(loss=ranks.mean(loss))
'''


def test_two_to_four_processes_step_as_one_does(tmp_path):
    "In fp64, so that nothing but rounding is left: a ResNet-32 with BatchNorm, parts of 5 to 2 of ten images."
    (alone,) = in_ranks(tmp_path, GRADIENTS, 1)
    for n in (2, 3, 4):
        shared = in_ranks(tmp_path, GRADIENTS, n)
        for k, v in alone.items():
            assert all(torch.equal(s[k], shared[0][k]) for s in shared), f'{k}: the ranks differ'
            torch.testing.assert_close(shared[0][k], v, atol=1e-9, rtol=1e-9, msg=lambda m: f'{n} ranks, {k}: {m}')


def test_parts_make_the_whole_and_are_never_empty():
    try:
        for count in (2, 3, 5):
            for n in (1, 2, 2*count - 1, 2*count, 7*count + 1):
                parts, weights = [], []
                for r in range(count):
                    ranks._here.append(ranks.Ranks(r, count))
                    ranks.weigh(n)
                    parts.append(ranks.part(n)); weights.append(ranks.here().weight)
                    ranks._here.pop()
                if n < 2*count: assert all(p.tolist() == list(range(n)) for p in parts) and weights == [1.]*count
                else:
                    assert np.concatenate(parts).tolist() == list(range(n)) and min(map(len, parts)) >= 2
                    assert np.allclose(weights, [len(p)*count/n for p in parts]) and np.isclose(np.mean(weights), 1)
    finally: del ranks._here[1:]


@pytest.mark.parametrize('more', [dict(), dict(mixup_alpha=1.), dict(cutout_side=3, rotation=5., jitter=.2),
                                  dict(grey=.5, blur=.5), dict(crop='resized', side=6, pad=0),
                                  dict(rand_augment=2, rand_magnitude=20)])
def test_a_part_of_a_plan_is_the_plan_of_a_part(more):
    data = load_images('digits').train
    view, index = TrainView(data, Augmentation(**dict(pad=1, flip=True) | more)), np.arange(20, 33)
    plan = view.plan(index, np.random.default_rng(3))
    whole = view.apply(view.load(plan))
    parts = [view.apply(view.load(view.part(plan, rows, 13))) for rows in np.array_split(np.arange(13), 3)]
    assert torch.equal(torch.cat([p['y'] for p in parts]), whole['y'])
    assert torch.equal(torch.cat([p['x'] for p in parts]), whole['x'])
    if 'mixup_alpha' in more:      # partners are those of the whole batch
        assert torch.equal(torch.cat([p['y_mix'] for p in parts]), whole['y_mix'])
        assert all(p['lam'] == whole['lam'] for p in parts)


def test_pieces_add_up_to_the_gradient_of_the_batch():
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(5, 3).double(), torch.randn(11, 5).double(), torch.arange(11) % 3
    F.cross_entropy(net(x), y).backward()
    want, net.weight.grad = net.weight.grad, None
    cut = list(pieces(dict(x=x, y=y, lam=torch.tensor(.5)), 4))
    for share, b in cut: (share*F.cross_entropy(net(b['x']), b['y'])).backward()
    assert [len(b['y']) for _, b in cut] == [3, 3, 3, 2] and all(b['lam'] == .5 for _, b in cut)
    torch.testing.assert_close(net.weight.grad, want)
    assert [s for s, _ in pieces(dict(y=y[:3]), 4)] == [1.0]      # no piece of one image, for BatchNorm
    # what a stage draws for the whole batch is no sample's, as many as there may be of it
    batch = drawn_with(dict(x=x, y=y), dict(q=torch.arange(len(y)), late=True))
    assert all(len(p['q']) == len(y) and p['late'] and len(p['x']) < len(y) for _, p in pieces(batch, 4))


STATISTICS = '''
    import numpy as np
    from ltbook.methods.method import get_method
    from ltbook.methods.recipe import recipe
    from ltbook.runs.run import make_context
    from ltbook.train.loop import train_epoch
    from ltbook.train.ranks import Sharing
    def work():
        c = make_context(recipe('cross_entropy', profile='smoke'), device='cpu', sharing=Sharing(2, 1, {kind!r}))
        stage = get_method('cross_entropy').stages['stage1'](c)
        stage.prepare(c.compute)
        train_epoch(stage, 0, stage.optimizer(), np.random.default_rng(0), c.compute)
        return {k: v for k, v in stage.network.state_dict().items()}
    '''


def test_statistics_of_batchnorm_end_alike_whether_synced_or_not(tmp_path):
    "With `each`, every process has its own within an epoch, and in the end all have one"
    found = {}
    for kind in ('each', 'synced'):
        (tmp_path/kind).mkdir()
        a, b = in_ranks(tmp_path/kind, STATISTICS.replace('{kind!r}', repr(kind)), 2)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        found[kind] = a
    assert any(not torch.equal(found['each'][k], v) for k, v in found['synced'].items() if 'running_var' in k)


def test_accumulating_takes_the_same_steps_where_nothing_looks_at_a_whole_batch(tmp_path):
    "A step of a network whose BatchNorm is in eval mode; in train mode every piece is normalised by itself."
    def after(accumulate):
        sharing = Sharing(accumulate=max(accumulate, 1))
        c = make_context(recipe('cross_entropy', profile='smoke'), device='cpu', sharing=sharing)
        stage = c_stage(c)
        optimizer = stage.optimizer()
        for g in optimizer.param_groups: g['lr'] = .1
        stage.network.eval()
        if accumulate: stage.update(stage.view(np.arange(30), np.random.default_rng(0)), optimizer, c.compute)
        return torch.cat([p.detach().reshape(-1) for p in stage.network.parameters()])
    from ltbook.methods.method import get_method
    c_stage = get_method('cross_entropy').stages['stage1']
    torch.testing.assert_close(after(1), after(5), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after(1), after(0), atol=1e-4)      # and it is a step


@pytest.mark.parametrize('bad', [['--processes', '0'], ['--accumulate', '-1'], ['--batchnorm', 'none'],
                                 ['--processes', '2', '--seeds', '0,1']])
def test_mistakes_have_a_sentence(tmp_path, bad):
    done = subprocess.run([*LTBOOK, 'run', 'cross_entropy', 'digits', '--profile', 'smoke', *bad, '--out', tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('Error: ') and not list(tmp_path.iterdir())


@pytest.mark.parametrize('method', ['mislas', 'difficulty_net', 'dirmixe', 'class_balanced_experts', 'supcon'])
def test_methods_run_with_two_processes(tmp_path, method):
    "Every kind of stage: two stages, a meta step with an optimizer of its own, experts, two views of an image."
    r = recipe(method, profile='smoke')
    result = load_run(run(r, tmp_path, sharing=Sharing(2), **QUIET))
    alone = load_run(run(r, tmp_path/'alone', **QUIET))
    assert result.stages == alone.stages and result.id == alone.id
    assert sorted(p.name for p in result.path.iterdir()) == sorted(p.name for p in alone.path.iterdir())
    assert result.env['sessions'][0]['sharing']['processes'] == 2
    assert np.isfinite(result.predictions['logits']).all()
    assert np.array_equal(result.predictions['labels'], alone.predictions['labels'])


def begin(tmp_path, *words):
    return subprocess.Popen(
        [*LTBOOK, 'run', 'mislas', 'digits', '--epochs', '3', '--set', 'stage2_epochs=1', '--bare', '--out', tmp_path,
         *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))


def helpers_of(pid: int) -> list[int]:
    return [int(p.name) for p in Path('/proc').iterdir() if p.name.isdigit() and (p/'stat').exists()
            and (p/'stat').read_text().rsplit(')', 1)[1].split()[1] == str(pid)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run of two processes that nobody disturbs"
    out = tmp_path_factory.mktemp('whole')
    assert begin(out, '--processes', '2').wait(120) == 0
    return load_run(out/run_id(recipe('mislas', epochs=3, stage2_epochs=1)))


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
@pytest.mark.parametrize('whom', ['helper', 'first'])
def test_a_lost_process_ends_all_and_the_same_command_goes_on(tmp_path, whole, whom):
    words = ['--processes', '2']
    r = recipe('mislas', epochs=3, stage2_epochs=1)
    p, history = begin(tmp_path/'a', *words), tmp_path/'a'/run_id(r)/'history.csv'
    until = time.monotonic() + 90
    while not history.exists() and time.monotonic() < until: time.sleep(.02)
    (helper,) = helpers_of(p.pid)
    os.kill(helper if whom == 'helper' else p.pid, signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    if whom == 'helper':
        assert p.returncode == 2, err
        assert err.startswith('Error: Process 2 of the 2 of this run was lost') and err.count('\n') == 1
    until = time.monotonic() + 60
    while Path(f'/proc/{helper}').exists() and time.monotonic() < until: time.sleep(.05)
    assert not Path(f'/proc/{helper}').exists(), 'a helper outlives its run'
    assert not (history.parent/'done.json').exists()
    again = begin(tmp_path/'a', *words)
    assert again.wait(120) == 0
    a = load_run(tmp_path/'a'/run_id(r))
    assert a.metrics == whole.metrics and len(a.env['sessions']) == 2
    for s in ('stage1', 'stage2'):
        mine, theirs = (load_file(x.path/f'{s}.safetensors') for x in (a, whole))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    class Stop(Exception): pass
    def stop(row): raise Stop
    r = recipe('balanced_softmax', epochs=2, max_steps=2)
    with pytest.raises(Stop): run(r, tmp_path, report=stop, **QUIET)
    result = load_run(run(r, tmp_path, sharing=Sharing(2), **QUIET))
    sessions = result.env['sessions']
    assert [s['epochs_before'] for s in sessions] == [0, 1]
    assert [s['sharing']['processes'] for s in sessions] == [1, 2] and len(result.history) == 2


def torchrun(out, *words):
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--rdzv-backend', 'c10d',
         '--rdzv-endpoint', 'localhost:0', '-m', 'ltbook', 'run', 'mislas', 'digits', '--bare', '--out', out, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_torchrun_gives_the_same_run(tmp_path):
    p = torchrun(tmp_path/'a', '--profile', 'smoke')
    said, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    assert said.count('top-1') == 1      # one of them speaks
    r = recipe('mislas', profile='smoke')
    run(r, tmp_path/'b', sharing=Sharing(2), **QUIET)
    a, b = (load_file(tmp_path/x/run_id(r)/'stage2.safetensors') for x in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
@pytest.mark.parametrize('whom', [0, 1])
def test_a_process_of_torchrun_is_lost_and_the_same_command_goes_on(tmp_path, whole, whom):
    words, r = ['--epochs', '3', '--set', 'stage2_epochs=1'], recipe('mislas', epochs=3, stage2_epochs=1)
    p, history = torchrun(tmp_path, *words), tmp_path/run_id(r)/'history.csv'
    until = time.monotonic() + 90
    while not history.exists() and time.monotonic() < until: time.sleep(.02)
    ranks_ = sorted(helpers_of(p.pid))
    os.kill(ranks_[whom], signal.SIGKILL)
    said, err = p.communicate(timeout=90)
    # what the other one says, unless torchrun has ended it before it noticed
    assert 'Error: Another process of this run was lost' in err or 'Stopped' in err, err
    assert 'The same command goes on' in err, err
    assert p.returncode != 0 and not any(Path(f'/proc/{i}').exists() for i in ranks_), 'somebody outlives the run'
    assert not (history.parent/'done.json').exists()
    again = torchrun(tmp_path, *words)
    said, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert load_run(tmp_path/run_id(r)).metrics == whole.metrics


WHOLE = '''
    from pathlib import Path
    from safetensors.torch import load_file
    from torch import nn
    from ltbook.models.backbones import BACKBONES
    from ltbook.models.heads import HEADS
    from ltbook.methods.recipe import recipe
    from ltbook.runs.folder import load_run
    from ltbook.runs.run import run
    class Small(nn.Module):
        "Two convolutions; statistics of a group of channels of one image, or of all images"
        def __init__(self, n_classes, in_channels, head, norm):
            super().__init__()
            self.n_features, self.head = 16, HEADS[head](16, n_classes)
            self.body = nn.Sequential(
                nn.Conv2d(in_channels, 16, 3, padding=1), norm(), nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1), norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        def features(self, x): return self.body(x)
        def forward(self, x): return self.head(self.features(x))
    def frozen():
        "BatchNorm as a frozen body has it"
        m = nn.BatchNorm2d(16)
        m.train = lambda mode=True: nn.Module.train(m, False)
        return m.eval()
    NORMS = dict(group=lambda: nn.GroupNorm(4, 16), frozen=frozen, batch=lambda: nn.BatchNorm2d(16))
    def work():
        found = {{}}
        for norm, make in NORMS.items():
            BACKBONES['small'] = lambda n, c, head, make=make: Small(n, c, head, make)
            r = recipe('mislas', epochs=15, stage2_epochs=2, backbone='small', lr=.05)
            folder = run(r, Path('{out}')/norm, say=lambda text: None)
            found[norm] = {{f'{{s}}.{{k}}': v for s in ('stage1', 'stage2')
                            for k, v in load_file(folder/f'{{s}}.safetensors').items()}}
            found[norm]['top1'] = torch.tensor(load_run(folder).metrics['final']['top1'])
        return found
'''


def test_whole_runs_of_1_2_and_4_processes_agree(tmp_path):
    """MiSLAS, both stages, 45 steps. With GroupNorm or frozen BatchNorm only rounding is left, and stays small;
    BatchNorm over all processes divides by what it measured and makes more of it."""
    found = {n: in_ranks(tmp_path, WHOLE.format(out=tmp_path/str(n)), n)[0] for n in (1, 2, 4)}
    for norm, bound in dict(group=1e-5, frozen=1e-5, batch=.05).items():
        alone = found[1][norm]
        assert alone['top1'] > .15, 'it learns'
        for n in (2, 4):
            far = {k: (found[n][norm][k] - v).abs().max().item() for k, v in alone.items() if v.is_floating_point()}
            assert max(far.values()) < bound, (norm, n, far)
            assert abs(found[n][norm]['top1'] - alone['top1']) < (.03 if norm == 'batch' else .005)
