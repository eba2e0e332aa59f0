"Numbers in outputs/README.md are those of the runs that its rows name, and README.md shows some of these rows"
import json
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest

from ltbook.runs.folder import find_runs, load_run, run_id
from ltbook.runs.notebook import recipe_of
from ltbook.studies.compare import compare
from ltbook.studies.leaderboard import leaderboard, run_ids

ROOT = Path(__file__).parent.parent
MEASURES = {'many': 'many', 'medium': 'medium', 'few': 'few', 'all': 'top1', 'ECE': 'ece15', 'Brier': 'brier'}


def cells(line):
    return [cell.strip() for cell in re.split(r'(?<!\\)\|', line.strip())[1:-1]]


def tables(path, column='runs'):
    "Rows of every table that has such a column, as dictionaries."
    head = None
    for line in path.read_text().splitlines():
        if not line.startswith('|'):
            head = None
            continue
        if head is None:
            head = cells(line)
            continue
        if column in head and not set(line) <= set('|-: '):
            row = dict(zip(head, cells(line)))
            assert len(cells(line)) == len(head), line
            yield row


def named(pattern):
    "`a/{0,1}-b` -> [a/0-b, a/1-b]"
    many = re.search(r'\{([^}]*)\}', pattern)
    return [pattern.replace(many[0], one) for one in many[1].split(',')] if many else [pattern]


def shown(values):
    if not values: return 'n/a'
    text = f'{np.mean(values):.1f}'
    return f'{text} ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else text


ROWS = [
    pytest.param(row, id=f"{path.parent.name}-{i}-{row[next(iter(row))]}".replace(' ', '_'))
    for path in (ROOT/'outputs'/'README.md', )
    for i, row in enumerate(tables(path))
]
FRONT = [*tables(ROOT/'README.md', 'verdict')]


def test_there_are_rows():
    assert len(ROWS) > 20


@pytest.mark.parametrize('row', ROWS)
def test_row(row):
    runs = named(re.fullmatch(r'`([^`]+)`', row['runs'])[1])
    assert len(runs) == int(row['seeds'])
    said = re.search(r'stage\d', row[next(iter(row))])
    stage = row['stage'].strip('`') if 'stage' in row else said[0] if said else 'final'
    for column, measure in MEASURES.items():
        if not row.get(column): continue
        values = []
        for name in runs:
            assert (ROOT/'outputs'/name/'done.json').exists(), name
            metrics = json.loads((ROOT/'outputs'/name/'metrics.json').read_text())
            if metrics[stage][measure] is not None: values.append(100*metrics[stage][measure])
        assert row[column] == shown(values), (column, runs)
    if row.get('difference'):
        printed = float(row['printed'].split(',')[0])
        assert row['difference'] == f"{float(row['all'].split()[0]) - printed:+.1f}"


@pytest.mark.parametrize('row', FRONT, ids=lambda row: row['method'])
def test_the_first_page_shows_rows_of_three_seeds(row):
    "Its numbers are those of a row of outputs/README.md, and its verdict is that of `ltbook compare`"
    same = [r for r in tables(ROOT/'outputs'/'README.md')
            if len({re.split('[, ]', x['method'])[0] for x in (r, row)}) == 1 and r['seeds'] == '3'
            and all(r.get(k) == row[k] for k in ('many', 'medium', 'few', 'all', 'ECE'))]
    assert len(same) == 1, 'no such row, or several'
    runs, stage = [load_run(ROOT/'outputs'/r) for r in named(same[0]['runs'].strip('`'))], same[0]['stage'].strip('`')
    assert {r.recipe.profile for r in runs} == {'fast'} and len({r.recipe.seed for r in runs}) == 3
    table = compare(runs)
    table = table[(table.stage == stage) & (table.measure == 'top1') & (table.seeds == 3)]
    if not row['printed']:
        assert table.empty, 'a number was printed'
        return
    printed = float(row['printed'].split(',')[0])
    assert [printed] == [*table.printed.round(1).unique()] and [row['verdict']] == [*table.verdict.unique()]
    assert row['difference'] == f"{float(row['all'].split()[0]) - printed:+.1f}"


def test_the_first_page_has_rows(): assert len(FRONT) > 6


@pytest.mark.parametrize('finished', find_runs(ROOT/'outputs'), ids=lambda r: r.id)
def test_its_command_makes_the_same_run(finished):
    "Also where defaults have changed since"
    method, dataset, *words = shlex.split(finished.again)[2:]
    given = [*zip(words, words[1:])]
    changes = dict(x.split('=', 1) for w, x in given if w == '--set')
    kinds = {'--imbalance': float, '--profile': str, '--seed': int, '--from': lambda x: ROOT/x}
    words = {w[2:].replace('from', 'start'): kinds[w](x) for w, x in given if w in kinds}
    made = recipe_of(words | dict(method=method, dataset=dataset), changes)
    assert run_id(made) == finished.id


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT/'README.md').read_text()
    assert len(text.encode()) <= 6000
    for page in (ROOT/'README.md', ROOT/'outputs'/'README.md', ROOT/'CONTRIBUTING.md'):
        for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
            if not link.startswith('http'): assert (page.parent/link).exists(), (page.name, link)


def test_verdicts_of_the_fast_profile_are_of_runs_without_changes():
    table = compare(find_runs(ROOT/'outputs'))
    fast = table[table.profile == 'fast']
    own = fast.changes.map(lambda t: [c for c in t.split(', ') if c and not c.startswith('precision')])
    changed = fast[own.map(len) > 0]
    assert len(changed) and not changed.verdict.isin(['reached', 'not reached']).any()
    assert fast[own.map(len) == 0].verdict.isin(['reached', 'not reached']).any()


def test_spread_of_three_seeds():
    runs, n = {r.id: r for r in find_runs(ROOT/'outputs')}, 0
    for row in compare(runs.values()).itertuples():
        if row.seeds < 3: continue
        values = [100*runs[i].metrics[row.stage][row.measure] for i in run_ids(row.runs)]
        assert row.sd == pytest.approx(statistics.stdev(values)) and row.ours == pytest.approx(statistics.fmean(values))
        n += 1
    assert n > 10


def test_pages_of_all_runs_have_runs():
    "Their own assertions hold for an empty folder, too"
    board = leaderboard(find_runs(ROOT/'outputs', dataset='cifar100', imbalance=100., profile='fast'))
    assert len(board) > 15 and ((board.method == 'cross_entropy') & (board.changes == '')).any()
