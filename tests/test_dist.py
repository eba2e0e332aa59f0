"What users install: wheel and sdist outside the checkout, every help text, methods from other packages and files"
import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = '''
"A method of somebody else: cross-entropy with a smaller rate"
from ltbook.methods.method import Method, Settings, register
from ltbook.methods.stages import representation_stage

def stage1(context): return representation_stage(context)

register(Method('{name}', 'somebody else', 'nobody', dict(stage1=stage1), Settings, smoke=dict(lr=.01)))
'''
VERBS = ['bench', 'compare', 'doctor', 'eval', 'export', 'features', 'import', 'list', 'new', 'pack', 'predict',
         'report', 'rm', 'run', 'shift', 'show', 'sweep', 'verify']


def call(python, *words, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'LTBOOK_IMPORT')}
    return subprocess.run(
        [str(python), *map(str, words)],
        cwd=cwd,
        env=clean | dict(OMP_NUM_THREADS='1', COLUMNS='200', MPLBACKEND='agg') | env,
        capture_output=True,
        text=True)


def environment(folder, *packages):
    ("A fresh environment with these files installed; what they require is "
     "borrowed from this one, so nothing is downloaded")
    venv.create(folder, with_pip=False)
    python = folder/'bin'/'python'
    inside = Path(
        call(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder).stdout.strip())
    (inside/'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    p = call(
        sys.executable,
        '-m',
        'pip',
        '--python',
        python,
        'install',
        '-q',
        '--no-build-isolation',
        '--no-index',
        '--force-reinstall',
        '--no-deps',
        *packages,
        cwd=folder)
    assert p.returncode == 0, p.stderr
    return python


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Wheel and sdist of the committed and uncommitted files of this checkout"
    top = tmp_path_factory.mktemp('dist')
    source = top/'source'
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '--', ':!outputs'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True)
    for name in names.stdout.splitlines():
        if not (ROOT/name).is_file(): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        (source/name).write_bytes((ROOT/name).read_bytes())
    p = call(sys.executable, '-m', 'build', '-q', '--no-isolation', '--outdir', top/'files', source, cwd=top)
    assert p.returncode == 0, p.stdout + p.stderr
    return next((top/'files').glob('*.whl')), next((top/'files').glob('*.tar.gz'))


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory): return environment(tmp_path_factory.mktemp('wheel')/'env', built[0])


def ltbook(python, *words, cwd, **env): return call(python.parent/'ltbook', *words, cwd=cwd, **env)


def test_wheel_runs_from_an_empty_folder(installed, tmp_path):
    "With notebook and figures, and not from the checkout"
    where = call(installed, '-c', 'import ltbook; print(ltbook.__file__)', cwd=tmp_path).stdout
    assert str(ROOT) not in where and 'site-packages' in where
    p = ltbook(installed, 'run', 'mislas', 'digits', '--profile', 'smoke', cwd=tmp_path)
    assert p.returncode == 0, p.stdout + p.stderr
    folder = next(tmp_path.glob('outputs/digits/mislas/*'))
    assert (
        (folder/'run.ipynb').exists()
        and len(list(folder.glob('figures/*.png'))) >= 4
        and 'reliability.png' in p.stdout)
    assert ltbook(installed, 'verify', cwd=tmp_path).returncode == 0


def test_sdist_can_be_installed_and_runs(built, tmp_path):
    python = environment(tmp_path/'env', built[1])
    (tmp_path/'empty').mkdir()
    p = ltbook(python, 'run', 'mislas', 'digits', '--profile', 'smoke', cwd=tmp_path/'empty')
    assert p.returncode == 0 and next(tmp_path.glob('empty/outputs/digits/mislas/*/figures/reliability.png')), (
        p.stdout + p.stderr)


def test_every_help(installed, tmp_path):
    "Exit 0, and the text; also as a module"
    from ltbook.cli.main import app
    assert VERBS == sorted(c.name for c in app.registered_commands)
    top = ltbook(installed, '--help', cwd=tmp_path)
    assert top.returncode == 0 and all(v in top.stdout for v in VERBS)
    assert call(installed, '-m', 'ltbook', '--help', cwd=tmp_path).stdout == top.stdout
    code = (
        'from typer.testing import CliRunner; from ltbook.cli.main import app\n'
        f'for v in {VERBS}:\n'
        '    p = CliRunner().invoke(app, [v, "--help"]); print(v, '
        'p.exit_code, "Usage" in p.output, "Failed" in p.output)')
    lines = call(installed, '-c', code, cwd=tmp_path).stdout.splitlines()
    assert lines == [f'{v} 0 True False' for v in VERBS]
    assert ltbook(installed, 'run', '--help', cwd=tmp_path).returncode == 0


def imported(file):
    "Packages that a module imports anywhere"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


def test_requirements_are_declared():
    "Everything the package imports is required by it, and what is required is imported"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    wanted = {re.split('[<>=]', r)[0].lower() for r in cfg['DEFAULT']['requirements'].split()}
    # of papermill
    optional = {re.split('[<>=]', r)[0].lower() for r in cfg['DEFAULT']['workbook_requirements'].split()} | {
        'nbclient',
        'ipython',
        'traitlets',
        'pyzmq',
        'timm', 'ray', 'submitit', 'onnx', 'onnxscript', 'mlflow', 'wandb', 'torchcodec'}      # extras
    used = {name for file in (ROOT/'ltbook').rglob('*.py') for name in imported(file)} - {
        *sys.stdlib_module_names,
        'ltbook'}
    known = packages_distributions()
    packages = {name: {d.lower() for d in known.get(name, [name])} for name in used}
    assert not {name for name, p in packages.items() if not p & (wanted | optional)}
    assert not wanted - set().union(*packages.values())


def test_a_method_of_another_package(built, tmp_path):
    "Found by its entry point: listed, run through the notebook, shown, evaluated, shifted, drawn"
    package = tmp_path/'package'
    (package/'rare').mkdir(parents=True)
    (package/'rare'/'__init__.py').write_text(METHOD.format(name='rare'))
    (package/'setup.py').write_text(
        "from setuptools import setup\nsetup(name='rare', version='1', "
        "packages=['rare'], entry_points={'ltbook.methods': ['rare = rare']})\n")
    python = environment(tmp_path/'env', built[0], package)
    (tmp_path/'empty').mkdir()
    everything(python, 'rare', tmp_path/'empty')


def test_a_method_of_a_file(installed, tmp_path):
    (tmp_path/'own.py').write_text(METHOD.format(name='own'))
    p = ltbook(installed, 'run', 'own', 'digits', cwd=tmp_path)
    assert p.returncode == 2 and 'Unknown method' in p.stderr
    everything(installed, 'own', tmp_path, '--import', 'own.py')
    p = ltbook(installed, 'list', 'methods', '--import', 'nothing.py', cwd=tmp_path)
    assert p.returncode == 2 and 'There is no file nothing.py' in p.stderr


SEVERAL = """
import json, sys
from ltbook.cli.main import main
done = 0
for words in json.loads(sys.argv[1]):
    sys.argv = ['ltbook', *words]
    try: main()
    except SystemExit as e: assert not e.code, (words, e.code)
    done += 1
print(done, 'done', file=sys.stderr)
"""


def everything(python, name, cwd, *more):
    p = ltbook(python, 'run', name, 'digits', '--profile', 'smoke', *more, cwd=cwd)
    assert p.returncode == 0, p.stdout + p.stderr
    folder = next(cwd.glob(f'outputs/digits/{name}/*'))
    assert (folder/'figures'/'reliability.png').exists() and name in (folder/'env.json').read_text()
    assert not more or '--import' in (folder/'env.json').read_text()
    verbs = [['list', 'methods'], ['show', folder], ['eval', folder, '--weights', '--device', 'cpu'],
             ['shift', folder, '--draws', '1'], ['verify']]
    p = call(python, '-c', SEVERAL, json.dumps([[*map(str, words), *more] for words in verbs]), cwd=cwd)
    assert p.returncode == 0 and p.stderr.splitlines()[-1] == f'{len(verbs)} done', p.stdout + p.stderr
    assert name in p.stdout and (folder/'shift'/'shift.png').exists()
