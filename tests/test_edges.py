"What measures, losses and plots make of nothing, of what is no number, and of the ends of their ranges"
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from ltbook.data.checks import UserError
from ltbook.losses.dirichlet import DirichletPool
from ltbook.losses.flow_losses import purity_loss
from ltbook.losses.smoothing import smoothing_strength
from ltbook.measure.accuracy import per_class_accuracy, top1
from ltbook.measure.aggregation import learn_weights
from ltbook.measure.calibration import calibration_bins, confidences
from ltbook.plots.filter import plot_likelihoods
from ltbook.plots.history import plot_history
from ltbook.plots.live import live

NAN = float('nan')


def test_an_answer_that_is_no_number_is_wrong():
    z, y = torch.tensor([[NAN, NAN], [2., 1.], [NAN, 0.]]), torch.tensor([0, 0, 0])
    assert top1(z, y) == pytest.approx(1/3)
    assert per_class_accuracy(z, y, 2).tolist()[0] == pytest.approx(1/3)


@pytest.mark.parametrize('logits', [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3)*NAN])
def test_confidences_of_nothing(logits):
    with pytest.raises(UserError): confidences(logits)


@pytest.mark.parametrize('bins', [15., NAN, float('inf'), 0, True])
def test_the_number_of_bins_is_a_whole_number(bins):
    with pytest.raises(UserError, match='number of bins'): calibration_bins([.5], [1], bins)


def test_weights_are_not_learned_from_what_is_no_number():
    views = [(torch.randn(8, 3, 4), torch.full((8, 3, 4), NAN))]
    with pytest.raises(UserError, match='diverged'): learn_weights(views, np.random.default_rng(0))


def test_a_pool_of_fresh_draws_has_no_size():
    pool = DirichletPool(np.full((3, 4), .25), 10., draws=20, size=1, fresh=True)
    first, second = pool.take(), pool.take()
    assert first[1].shape == second[1].shape == (20, 4) and not np.array_equal(first[1], second[1])


@pytest.mark.parametrize('power', [0, -1, NAN, float('inf')])
def test_powers_of_smoothing(power):
    with pytest.raises(UserError, match='power'): smoothing_strength([5, 1], .4, .1, 'power', power)


@pytest.mark.parametrize('margin', [0., -1., 1.])
def test_floors_of_purity(margin):
    with pytest.raises(UserError, match='floor'): purity_loss(torch.randn(4, 3), torch.randn(4, 3), margin=margin)


def test_a_figure_that_was_begun_is_closed_when_drawing_fails():
    widgets = pytest.importorskip('ipywidgets')
    def draw(x):
        plt.subplots()
        raise UserError(f'not {x}')
    before, slider = plt.get_fignums(), widgets.IntSlider()
    box = live(draw, x=slider)
    slider.value = 3
    assert plt.get_fignums() == before and box.children[1].value == 'not 3'


def test_lines_of_train_and_test_images_are_told_apart():
    ax = plot_history(pd.DataFrame(dict(top1=[.1, .2], test_top1=[.1, .1], test_few=[0., .1])))
    styles = {line.get_label(): line.get_linestyle() for line in ax.get_lines()}
    plt.close(ax.figure)
    assert styles == {'top1': '-', 'test_top1': '--', 'few': '-'}


def test_the_area_of_a_density_is_the_share_that_is_seen():
    rng = np.random.default_rng(0)
    ax = plot_likelihoods(dict(train=rng.normal(0, 1, 2000), test=np.concatenate([[-50.]*900, [0.]*100]), none=[-50.]))
    def under(x, y): return abs(((y[1:] + y[:-1])/2*np.diff(x)).sum())
    area = {p.get_label(): under(*p.get_xy().T) for p in ax.patches}
    plt.close(ax.figure)
    assert area['train'] == pytest.approx(.95, abs=.01) and area['test'] == pytest.approx(.1) and area['none'] == 0
