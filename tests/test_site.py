"What the site and the help tell people to type: every command exists, those for the authors' users run at a small size"
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ltbook.cli.main
from ltbook.cli.words import app
from ltbook.methods.recipe import recipe
from ltbook.runs.folder import run_id

SITE = Path(__file__).resolve().parents[1]/'nbs'/'site'
LINES = [(p.name, line.strip()) for p in sorted(SITE.glob('*.md')) for block in re.findall(
    r'^```\n(.*?)^```', p.read_text(), re.S | re.M) for line in block.splitlines() if line.startswith('ltbook ')]
ROWS = [w for row in (SITE/'authors.md').read_text().splitlines() if row.startswith('|')
        for w in re.findall(r'`(ltbook [^`]+)`', row.split('|')[3])]


@pytest.mark.parametrize('page, line', LINES, ids=lambda v: v if v.endswith('.md') else '')
def test_commands_exist(page, line):
    "Verb, options and number of arguments are those of the command line"
    verb, *words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    if '--import' in words: del words[words.index('--import'):words.index('--import') + 2]
    assert verb in command.commands, line
    command.commands[verb].make_context(verb, words)      # raises for what it doesn't know


@pytest.mark.parametrize('verb', [None, *typer.main.get_command(app).commands])
def test_help(verb):
    "Fits 100 columns, and ends with examples that the command line understands"
    words = [verb, '--help'] if verb else ['--help']
    p = CliRunner().invoke(app, words, env=dict(COLUMNS='100', TERMINAL_WIDTH='100', FORCE_COLOR=''))
    assert p.exit_code == 0 and max(map(len, p.output.splitlines())) <= 100, p.output
    examples = [line.strip() for line in p.output.partition('Examples:')[2].splitlines() if line.strip()]
    assert examples and all(e.startswith(f'ltbook {verb or ""}') for e in examples), p.output
    if verb:
        for line in examples: test_commands_exist('help', line)
        runs = re.findall(r'\bdigits/\S+', ' '.join(examples))      # what `make run` leaves, or its next seed
        assert {*runs} <= {run_id(recipe('mislas', 'digits', profile='paper', seed=s)) for s in (0, 1)}


def test_links_of_the_site(tmp_path):
    "Kept between its pages, plain words outside, and known where they lead nowhere"
    spec = importlib.util.spec_from_file_location('build', SITE/'build.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.SRC = tmp_path
    assert build.relinked('[walk](walk.md)', 'nbs/site') == '[walk](walk.md)'
    assert build.relinked('[page](../methods/52_mislas.ipynb#x)', 'nbs/site') == '[page](methods/52_mislas.ipynb#x)'
    assert build.relinked('[setup](../../setup.py)', 'nbs/site') == 'setup' and build.GONE == []
    assert build.relinked('[gone](../methods/0_gone.ipynb)', 'nbs/site') == 'gone' and len(build.GONE) == 1
    for file in SITE.glob('*.md'):
        if file.name not in ('papers.md', 'differences.md'): build.relinked(file.read_text(), 'nbs/site')
    assert len(build.GONE) == 1, build.GONE


@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('authors')


def call(*words):
    p = CliRunner().invoke(app, [*map(str, words)], env=dict(COLUMNS='300'))
    assert p.exit_code == 0, p.output
    return p.output


@pytest.mark.parametrize('row', ROWS)
def test_rows_for_the_authors_users_run(row, place):
    "On digits, a smoke run each"
    _, verb, *words = shlex.split(row)
    method = words[0] if verb == 'run' else 'sade' if verb == 'shift' else 'mislas'
    small = ['--profile', 'smoke', '--bare', '--out', place]
    if method == 'dlsa':      # NAME is what `features` has written
        call('features', *found('mislas', place, small), '--data-root', place/'data')
        name = next(p.name for p in (place/'data').iterdir() if p.is_dir())
        call('run', 'dlsa', name, '--data-root', place/'data', *small)
        return
    if 'RUN' in words: words[words.index('RUN')] = found(method, place, small)[0]
    for w in ('--imbalance', '--profile'):
        if w in words: del words[words.index(w):words.index(w) + 2]
    words = ['digits' if w in ('cifar100', 'imagenet_lt') else w for w in words]
    call(verb, *words, *(small if verb == 'run' else ['--out', place]))


def found(method, place, small):
    if not (runs := sorted(place.glob(f'digits/{method}/*/done.json'))):
        call('run', method, 'digits', *small)
        runs = sorted(place.glob(f'digits/{method}/*/done.json'))
    return [runs[0].parent]
