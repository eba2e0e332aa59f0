"What `from ltbook import ...` gives has types that a checker reads"
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = '''
from pathlib import Path
from ltbook import Run, find_runs, load_images, load_run, recipe, run
n: int = len(load_images('digits').train)
folder: Path = run(recipe('mislas', 'digits', profile='smoke'), 'outputs')
result: Run = load_run(folder)
names: list[str] = [r.id for r in find_runs('outputs')]
wrong: str = run(recipe('mislas'))
recipe(3)
'''


def test_public_names(tmp_path):
    "The right use passes, and the last two lines don't"
    pytest.importorskip('mypy')
    (tmp_path/'a.py').write_text(TEXT)
    (tmp_path/'mypy.ini').write_text('[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n'
                                     '[mypy-ltbook.*]\nfollow_imports = silent\n')
    p = subprocess.run([sys.executable, '-m', 'mypy', 'a.py'],
                       cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(MYPYPATH=str(ROOT)))
    assert re.findall(r'^a\.py:(\d+): error', p.stdout, re.M) == ['8', '9'], p.stdout


def test_lazy():
    "`import ltbook` brings no torch; a name that is not there is an AttributeError"
    code = 'import sys, ltbook; assert "torch" not in sys.modules; assert "run" in dir(ltbook)\n' \
           'from ltbook import recipe; assert recipe("mislas").method == "mislas"\n' \
           'try: ltbook.nothing\nexcept AttributeError: print("good")'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'good\n'
