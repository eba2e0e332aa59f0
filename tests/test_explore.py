"Pages to play with, served by Voilà in a real browser: a slider is moved, the figure changes"
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from watching import BROWSER, browser

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (BROWSER and find_spec('voila')), reason='needs playwright, voila and a chromium')


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "Voilà on all pages"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp('voila')/'log').open('w')
    p = subprocess.Popen([sys.executable, '-m', 'voila', 'nbs/explore', f'--port={port}', '--no-browser'], cwd=ROOT,
                         stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS='1'))
    for _ in range(300):
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=1); break
        except OSError: time.sleep(.2)
    yield f'http://127.0.0.1:{port}'
    p.terminate()
    p.wait(20)


@pytest.fixture(scope='module')
def chrome():
    with browser() as b: yield b


@pytest.mark.parametrize('name, kind', [
    ('83_runs', 'text'), ('84_calibration', 'slider'), ('85_tail', 'slider'), ('86_losses', 'slider')])
def test_something_is_moved_and_the_figure_follows(served, chrome, name, kind):
    from playwright.sync_api import Error
    page, errors = chrome.new_page(viewport=dict(width=1280, height=1400)), []
    page.on('pageerror', lambda e: errors.append(str(e)))
    elsewhere = lambda url: not url.startswith(('http://127.0.0.1', 'ws:', 'data:', 'blob:'))
    page.route(elsewhere, lambda route: route.abort())
    page.goto(f'{served}/voila/render/{name}.ipynb', timeout=120_000, wait_until='commit')
    page.locator('img[src^="blob:"]').first.wait_for(timeout=120_000)
    bytes_of = """async () => Promise.all([...document.querySelectorAll('img')].filter(i => i.src.startsWith('blob:'))
        .map(async i => [...new Uint8Array(await (await fetch(i.src)).arrayBuffer())].join()))"""
    def pictures():      # what is seen, not where it lies; one may be replaced while it is read
        for _ in range(50):
            try: return page.evaluate(bytes_of)
            except Error: page.wait_for_timeout(100)
    page.wait_for_timeout(1500)
    before = pictures()
    if kind == 'text': page.locator('input[type=text]').first.fill('sade fast')
    else:
        page.locator('.noUi-handle').first.focus()
        for _ in range(12): page.keyboard.press('ArrowLeft')
    for _ in range(100):
        page.wait_for_timeout(100)
        if (now := pictures()) and now != before: break
    assert now and now != before and not errors, errors
    assert not re.search('Traceback|UserError', page.inner_text('body'))
    if place := os.environ.get('LTBOOK_PICTURES'): page.screenshot(path=f'{place}/{name}.png')
    page.close()
