"A thousand finished runs, and the report in a browser"
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from ltbook.methods.recipe import recipe
from ltbook.runs.folder import find_runs, run_id
from ltbook.studies.report import report
from ltbook.train.processes import child_env
from watching import BROWSER, browser, pace, spent

ROOT = Path(__file__).resolve().parents[1]


def ltbook(*words):
    p = subprocess.run([sys.executable, '-m', 'ltbook', *map(str, words)], env=child_env(1) | dict(COLUMNS='200'),
                       capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


@pytest.fixture(scope='module')
def thousand(tmp_path_factory):
    "125 recipes of 8 seeds each, as folders, from a real one"
    out = tmp_path_factory.mktemp('thousand')
    like = next(r.path for r in find_runs(ROOT/'outputs') if r.recipe.dataset == 'cifar100' and not r.recipe.hold_out)
    metrics, env = json.loads((like/'metrics.json').read_text()), json.loads((like/'env.json').read_text())
    for k in range(1000):
        r = recipe('balanced_softmax', 'cifar100', 100, seed=k % 8, lr=.01*(1 + k//8))
        folder = out/run_id(r)
        (folder/'figures').mkdir(parents=True)
        for stage in (s for s in metrics.values() if 'top1' in s): stage['top1'] = .3 + k/10_000
        for name, content in (('recipe', json.loads(r.model_dump_json())), ('metrics', metrics), ('env', env),
                              ('done', {})):
            (folder/f'{name}.json').write_text(json.dumps(content))
        shutil.copy(like/'history.csv', folder)
        for f in (like/'figures').glob('*.png'): os.link(f, folder/'figures'/f.name) if same(f, folder) else None
    return out


def same(file, folder): return file.stat().st_dev == folder.stat().st_dev


def test_a_thousand_runs_are_answered_in_seconds(thousand):
    "compare, show and report each under 10 seconds at the usual pace, and under 8 MB"
    took = {}
    for words in (('compare', '--measures', 'all'), ('compare', '--leaderboard'), ('show', ), ('report', )):
        began = spent()
        said = ltbook(*words, '--out', thousand)
        took[' '.join(words)] = spent() - began
        assert len(said) > 50
    print(took)
    assert max(took.values()) < 10*pace(), (took, pace())
    assert (thousand/'report.html').stat().st_size < 8e6
    text = (thousand/'report.html').read_text()
    assert text.count('<details id=') == 1000 and 'the 75 recipes of lower accuracy' in text


def test_a_dry_run_of_ten_thousand_cells(tmp_path):
    began = spent()
    said = ltbook('sweep', '--method', 'mislas,sade', '--dataset', 'cifar100', '--imbalance', '100,50,10,20,5',
                  '--seeds', '0..999', '--dry-run', '--out', tmp_path)
    took = spent() - began
    assert '10000 cells' in said and took < 5*pace(), (took, pace())


@pytest.mark.skipif(not BROWSER, reason='needs playwright and a chromium')
def test_in_a_browser(tmp_path):
    "Sorted and filtered by keys; no error, no request, nothing wider than the window"
    file = report(find_runs(ROOT/'outputs'), tmp_path/'report.html')
    with browser() as chrome:
        for width in (1280, 390):
            page, errors, asked = chrome.new_page(viewport=dict(width=width, height=900)), [], []
            page.on('console', lambda m: errors.append(m.text))
            page.on('pageerror', lambda e: errors.append(str(e)))
            page.on('request', lambda r: asked.append(r.url))
            page.goto(file.as_uri())
            assert page.evaluate('document.documentElement.scrollWidth') == width
            column = [*page.locator('#board-table th').all_text_contents()].index('backward50') + 1
            head = page.locator(f'#board-table th:nth-child({column}) button')
            for want in ('descending', 'ascending'):
                head.focus()
                page.keyboard.press('Enter')
                assert page.locator(f'#board-table th[aria-sort={want}]').count() == 1
                cells = page.locator(f'#board-table td:nth-child({column})').all_text_contents()
                seen = [float(c.split()[0]) for c in cells if c]
                assert seen == sorted(seen, reverse=want == 'descending') and len(seen) > 20
                assert not any(cells[len(seen):])      # what is not known comes last
            page.fill('input[data-table=board-table]', 'mislas cifar100')
            rows = page.locator('#board-table tbody tr:visible').all_text_contents()
            assert rows and all('mislas' in r and 'cifar100' in r for r in rows)
            page.locator('#board-table tbody tr:visible a').first.click()
            page.locator('details[open] pre').first.wait_for()
            assert page.locator('details[open]').count() == 1
            assert not errors and {u for u in asked if not u.startswith('data:')} == {file.as_uri()}
