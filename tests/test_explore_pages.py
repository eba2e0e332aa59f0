"Pages to play with, without a browser: every control at every choice or both ends, on what people have"
import json
import shutil
from pathlib import Path

import ipywidgets as w
import matplotlib
import pytest

import ltbook.plots.live as live_page
from ltbook.methods.recipe import recipe
from ltbook.runs.run import run

matplotlib.use('agg')
ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p.stem for p in (ROOT/'nbs'/'explore').glob('8[3-7]_*.ipynb'))


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "Folders of runs: none, two with logits, one whose logits are damaged"
    top = tmp_path_factory.mktemp('places')
    (top/'none').mkdir()
    for r in (recipe('sade', profile='smoke'), recipe('mislas', profile='smoke', calibration=.2),
              recipe('difficulty_net', profile='smoke')):
        run(r, top/'own', device='cpu')
    shutil.copytree(top/'own', top/'damaged')
    for f in (top/'damaged').glob('*/*/*/predictions.h5'): f.write_bytes(b'no file of this kind')
    return dict(none=top/'none', own=top/'own', damaged=top/'damaged', committed=ROOT/'outputs')


def choices(control):
    "All of a short list, both ends of a range"
    if isinstance(control, w.SelectMultiple):
        every = [v for _, v in control._options_full]
        return [(), tuple(every[:1]), tuple(every)]
    if hasattr(control, '_options_full'): return [v for _, v in control._options_full][:8]
    if isinstance(control, w.FloatRangeSlider): return [(control.min, control.max), (control.max, control.max)]
    if isinstance(control, w.FloatLogSlider): return [control.base**control.min, control.base**control.max]
    if isinstance(control, w.Checkbox): return [True, False]
    return [control.min, control.max] if hasattr(control, 'min') else ['digits', 'no such word']


@pytest.mark.parametrize('place', ['none', 'own', 'damaged', 'committed'])
@pytest.mark.parametrize('page', PAGES)
def test_every_control(page, place, places, monkeypatch):
    shown, real = [], live_page.live
    def live(draw, **controls):
        shown.append((draw, controls, real(draw, **controls)))
        return shown[-1][2]
    monkeypatch.setattr(live_page, 'live', live)
    monkeypatch.setattr('IPython.display.display', lambda *a: None)
    monkeypatch.setenv('LTBOOK_OUTPUTS', str(places[place]))
    space = {}
    for c in json.loads((ROOT/'nbs'/'explore'/f'{page}.ipynb').read_text())['cells']:
        if c['cell_type'] == 'code': exec(''.join(c['source']), space)
    assert shown
    for draw, controls, box in shown:
        def look(): assert 'could not be drawn' not in box.children[1].value, (draw.__name__, box.children[1].value)
        look()
        for control in controls.values():
            before = control.value
            for value in choices(control):
                control.value = value
                look()
            control.value = before
    seen = {draw.__name__: len(box.children[0].value) for draw, _, box in shown}
    if place == 'own': assert all(v or d in ('bin_images', 'keeps') for d, v in seen.items()), seen      # two are words
