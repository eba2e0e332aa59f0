"Pages to play with, by Voilà and in JupyterLab, in a real browser: a slider is moved, the figure changes"
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from ltbook.methods.recipe import recipe
from ltbook.runs.run import run
from watching import BROWSER, browser

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (BROWSER and find_spec('voila')), reason='needs playwright, voila and a chromium')


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    "The committed runs, and one of three experts with its logits"
    out = tmp_path_factory.mktemp('outputs')
    for place in (ROOT/'outputs').glob('*/*/'):
        (out/place.parent.name).mkdir(exist_ok=True)
        if place.parts[-2:] != ('digits', 'sade'): (out/place.parent.name/place.name).symlink_to(place)
    return run(recipe('sade', epochs=8, batch_size=64, lr=.05), out, device='cpu').parents[2]


def serve(log, outputs, *words):
    "A server on a free port, ready to answer, and its address"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS='1', LTBOOK_OUTPUTS=str(outputs), JUPYTER_CONFIG_DIR=str(log.parent))
    p = subprocess.Popen([sys.executable, '-m', *words, f'--port={port}', '--no-browser'], cwd=ROOT, env=env,
                         stdout=log.open('w'), stderr=subprocess.STDOUT)
    for _ in range(300):
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=1); break
        except OSError: time.sleep(.2)
    return p, f'http://127.0.0.1:{port}'


@pytest.fixture(scope='module')
def served(outputs, tmp_path_factory):
    "Voilà on all pages"
    p, address = serve(tmp_path_factory.mktemp('voila')/'log', outputs, 'voila', 'nbs')
    yield address
    p.terminate()
    p.wait(20)


@pytest.fixture(scope='module')
def chrome():
    with browser() as b: yield b


def local_only(page):
    "Nothing from elsewhere"
    here = 'http://127.0.0.1', 'ws:', 'data:', 'blob:'
    page.route(lambda url: not url.startswith(here), lambda route: route.abort())


SOURCES = "[...document.querySelectorAll('img.live')].map(i => i.src)"


def pictures(page):
    "What is seen, not where it lies; one may be replaced while it is read"
    from playwright.sync_api import Error
    for _ in range(50):
        try: return page.evaluate(SOURCES)
        except Error: page.wait_for_timeout(100)


def moved(page, slider=0):
    "The pictures before and after a slider is moved (None: after words are typed)"
    before = still(page)
    if slider is None: page.locator('input[type=text]').first.fill('sade fast')
    else:
        page.locator('.noUi-handle').nth(slider).focus()
        for _ in range(12): page.keyboard.press('ArrowLeft')
    for _ in range(100):
        page.wait_for_timeout(100)
        if (now := pictures(page)) and now != before: break
    return before, now


def still(page):
    "The pictures once none has come or changed for a second and a half, so that a late one is not taken for a move"
    seen, since = pictures(page), time.monotonic()
    while time.monotonic() < since + 1.5:
        page.wait_for_timeout(100)
        if (now := pictures(page)) != seen: seen, since = now, time.monotonic()
    return seen


def there(link, served):
    "Whether it leads to a page that is served"
    path = link.removeprefix(f'{served}/voila/render/').partition('#')[0]
    return path != link and (ROOT/'nbs'/path).exists()


@pytest.mark.parametrize('name, slider', [
    ('83_runs', None), ('84_calibration', 0), ('85_tail', 0), ('86_losses', 0), ('87_experts', 0)])
def test_something_is_moved_and_the_figure_follows(served, chrome, name, slider):
    page, errors = chrome.new_page(viewport=dict(width=1280, height=2600)), []
    page.on('pageerror', lambda e: errors.append(str(e)))
    local_only(page)
    page.goto(f'{served}/voila/render/explore/{name}.ipynb', timeout=120_000, wait_until='commit')
    page.locator('img.live').first.wait_for(timeout=120_000)
    before, now = moved(page, slider)
    assert now and now != before and not errors, errors
    told = page.eval_on_selector_all('img.live', 'all => all.map(i => i.alt)')
    assert all(len(words) > 20 for words in told), told
    assert not re.search('Traceback|UserError', page.inner_text('body'))
    links = [a for a in page.eval_on_selector_all('a[href]', 'all => all.map(a => a.href)') if '.ipynb' in a]
    assert links and all(there(a, served) for a in links), links
    if name in ('84_calibration', '85_tail'):      # images of digits with what was said about them
        assert page.locator('figure img[src^="data:image/png"]').count()
        assert re.search(r'"\d", \d+%', ' '.join(page.locator('figcaption').all_inner_texts()))
    if place := os.environ.get('LTBOOK_PICTURES'): page.screenshot(path=f'{place}/{name}.png', full_page=True)
    page.close()


@pytest.mark.skipif(not find_spec('jupyterlab'), reason='needs jupyterlab')
def test_in_jupyterlab(outputs, chrome, tmp_path):
    "The page is opened, all its cells are run, a slider is moved, the figure follows"
    for p in (ROOT/'nbs'/'explore').glob('*.ipynb'): shutil.copy(p, tmp_path)      # it saves what it opens
    server, address = serve(
        tmp_path/'log', outputs, 'jupyterlab', '--allow-root', '--IdentityProvider.token=', '--ServerApp.ip=127.0.0.1',
        f'--ServerApp.root_dir={tmp_path}')
    try:
        page = chrome.new_page(viewport=dict(width=1280, height=1400))
        local_only(page)
        page.goto(f'{address}/lab/tree/87_experts.ipynb?reset', timeout=120_000, wait_until='commit')
        page.locator('.jp-Notebook').wait_for(timeout=120_000)
        page.get_by_text('| Idle').wait_for(timeout=120_000)      # the kernel is there
        page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
        page.locator('.lm-Menu-itemLabel', has_text='Run All Cells').first.click()
        try: page.locator('img.live').first.wait_for(timeout=60_000)
        finally:
            if place := os.environ.get('LTBOOK_PICTURES'): page.screenshot(path=f'{place}/lab.png')
        before, now = moved(page)
        assert now and now != before and not page.locator('.jp-RenderedText[data-mime-type*=error]').count()
    finally:
        server.terminate()
        server.wait(20)
