"Every setting arrives where it counts: changed, it changes the loss of a batch, the plan of a stage or the data"
import numpy as np
import pytest
import torch

from ltbook.losses.named import LossOptions, named_loss
from ltbook.measure.report import measures
from ltbook.methods import class_balanced_experts as cbe
from ltbook.methods.method import context_of, get_method
from ltbook.methods.recipe import recipe
from ltbook.methods.reweighting import weight_rule
from ltbook.methods.stages import recipe_loss
from ltbook.runs.folder import load_run
from ltbook.runs.run import run


def first_stage(method, **changes):
    r = recipe(method, 'digits', **dict(profile='smoke', epochs=10, batch_size=64) | changes)
    context = context_of(r)
    return get_method(method).stages_of(r)['stage1'](context)


def batch_loss(method, epoch=0, **changes):
    "Loss of the same 64 images under the same weights, in an epoch"
    torch.manual_seed(0)
    stage = first_stage(method, **changes)
    for p in stage.network.parameters(): torch.nn.init.normal_(p, 0, .2)
    stage.set_mode(stage.network)
    if stage.before_epoch: stage.before_epoch(epoch)
    batch = stage.view(np.arange(64)*4, np.random.default_rng(0))
    if 'count' in stage.state: stage.state['count'].steps = epoch*stage.n_batches
    if stage.draw: batch = batch | stage.draw()
    if stage.before_step: batch = stage.before_step(batch, .1)
    return stage.loss(stage.forward(stage.network, batch), batch).item()


EQUALIZED = dict(loss='equalization', equalization_threshold=.05)


@pytest.mark.parametrize('method,epoch,usual,changed', [
    ('sade', 0, {}, dict(tau=1.)), ('ride', 0, {}, dict(diversity=-.45)), ('ride', 0, {}, dict(largest_margin=.2)),
    ('ride', 9, {}, dict(temperature=.5)), ('ride', 9, {}, dict(late=1.)), ('dirmixe', 0, {}, dict(power=1.6)),
    ('dirmixe', 0, {}, dict(concentration=10.)), ('dirmixe', 0, dict(penalty_start=0.), dict(penalty=1.)),
    ('dirmixe', 0, dict(penalty_start=0.), dict(divisor='all')),
    ('supcon', 0, {}, dict(temperature=.5)), ('balpoe', 0, {}, dict(taus=(0., 0., 3.))),
    ('shike', 0, {}, dict(taus=(1., 1., 1.))), ('shike', 0, {}, dict(mutual=1.)),
    ('depth_balpoe', 0, {}, dict(taus=(1., 1., 1.))), ('depth_balpoe', 0, {}, dict(mutual=1.)),
    ('reweighting', 0, dict(weights='class_balanced'), dict(beta=.9)),
    ('reweighting', 9, dict(weights='inverse'), dict(defer=1.)),
    ('reweighting', 0, dict(weights='none'), dict(weights='inverse')),
    ('cross_entropy', 0, EQUALIZED, dict(equalization_drop=0.)),
    ('cross_entropy', 0, EQUALIZED, dict(equalization_threshold=.1)),
    ('cross_entropy', 0, dict(loss='focal'), dict(focal_gamma=3.)),
    ('cross_entropy', 0, dict(loss='logit_adjustment'), dict(adjustment_tau=2.)),
    ('cross_entropy', 0, dict(loss='ldam', head='cosine'), dict(ldam_margin=.2))])
def test_a_setting_changes_the_loss(method, epoch, usual, changed):
    before, after = batch_loss(method, epoch, **usual), batch_loss(method, epoch, **usual | changed)
    assert before == batch_loss(method, epoch, **usual) and abs(after - before) > 1e-4*abs(before)


def test_rare_classes_are_spared():
    spares, does_not = (batch_loss('cross_entropy', **EQUALIZED, equalization_drop=d) for d in (1., 0.))
    assert spares < .98*does_not


@pytest.mark.parametrize('loss,field', [('focal', 'focal_gamma'), ('logit_adjustment', 'adjustment_tau'),
                                        ('ldam', 'ldam_margin')])
def test_options_of_losses_by_name(loss, field):
    context = context_of(recipe('cross_entropy', 'digits', loss=loss, head='cosine', **{field: .3}))
    z, y = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    want = named_loss(loss, torch.as_tensor(context.trained_counts), LossOptions(**{field: .3}))(z, y)
    assert torch.equal(recipe_loss(context)[0](z, y), want)
    assert not torch.equal(want, named_loss(loss, torch.as_tensor(context.trained_counts))(z, y))


def test_exponents_of_difficulty():
    accuracy = torch.linspace(.9, .1, 10).double()
    ratio = {}
    for tau in (1, 2):
        weights = weight_rule(context_of(recipe('reweighting', 'digits', weights='cdb', tau=tau)))(accuracy, 1)
        ratio[tau] = (weights.max()/weights.min()).item()
    assert ratio[2] == pytest.approx(ratio[1]**2, rel=1e-4)


@pytest.mark.parametrize('method', ['cross_entropy', 'class_balanced_experts'])
def test_the_data_seed_draws_other_images(method):
    a, b, c = (context_of(recipe(method, 'digits', data_seed=k)).tail for k in (0, 1, 0))
    assert a.sha256 == c.sha256 != b.sha256 and (a.counts == b.counts).all()


@pytest.mark.parametrize('method,changes,part', [
    ('cross_entropy', dict(calibration=.1), 'calibration'), ('class_balanced_experts', {}, 'val')])
def test_the_data_seed_keeps_other_images_back(method, changes, part):
    "Of one and the same balanced set"
    a, b = (context_of(recipe(method, 'digits', imbalance=1, data_seed=k, **changes)) for k in (0, 1))
    images = [p.parts[part].images for p in (a, b)]
    assert len(images[0]) and (images[0].shape != images[1].shape or not torch.equal(*images))


def test_when_an_average_begins_and_how_long_it_remembers():
    swa = first_stage('cross_entropy', epochs=4, average='swa', average_start=.25)
    assert swa.average.first == 1
    assert first_stage('cross_entropy', epochs=4, average='ema', average_decay=.7).average.decay == .7


@pytest.mark.parametrize('average', ['ema', 'swa'])
def test_looks_at_the_test_part_are_at_the_average(average, tmp_path):
    done = load_run(run(recipe('cross_entropy', 'digits', profile='smoke', average=average, average_start=0., epochs=3,
                               test_every=1), tmp_path, device='cpu'))
    assert done.history.test_top1.iloc[-1] == pytest.approx(done.metrics['final']['top1'])


@pytest.mark.parametrize('rule', ['thirds', '100/20'])
def test_groups_by_the_rule_of_the_recipe_and_the_counts_of_the_tail(rule, tmp_path):
    "A tenth kept back and a meta set: what is trained on has other counts, and other groups, than the tail"
    done = load_run(run(recipe('reweighting', 'digits', profile='smoke', calibration=.1, shot_rule=rule), tmp_path,
                        device='cpu'))
    p, told = done.predictions, done.metrics['protocol']
    want = measures(torch.as_tensor(p['logits']), torch.as_tensor(p['labels']), told['train_counts'], rule)
    assert told['shot_rule'] == rule and sum(told['group_sizes'].values()) == 10
    assert {k: done.metrics['final'][k] for k in ('many', 'medium', 'few')} == {
        k: want[k] for k in ('many', 'medium', 'few')}


def test_what_experts_are_calibrated_on_and_how_the_generalist_learns():
    context = context_of(recipe('class_balanced_experts', 'digits', epochs=30, generalist_schedule='tens'))
    stage = cbe.generalist(context)
    assert [stage.lr(e)/stage.lr(0) for e in (9, 10, 20)] == pytest.approx([1, .1, .01])
    plain = cbe.generalist(context_of(recipe('class_balanced_experts', 'digits', epochs=30)))
    assert plain.lr(10) != pytest.approx(stage.lr(10))
