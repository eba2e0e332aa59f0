"""Everything of this folder, one after the other, into `outputs/faults/table.json`, with date, commit and machine.

`python tests/faults/watch.py` is the long form (hours); `watch.py 0.01` does a hundredth of it and writes nothing.
"""
import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from fuzz import READERS

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT/'outputs'/'faults'/'table.json'
LONG = dict(kills=500, pairs=50, disk=20, damage=500, fuzz=1_000_000, guided=32_000)


def git(*words): return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def rows_of(what, n):
    "The rows of the table that a program of this folder prints, as JSON, one a line"
    stamp = dict(what=what, date=datetime.now(timezone.utc).date().isoformat(), commit=git('rev-parse', 'HEAD'))
    if what == 'guided': return [stamp | r for r in guided(n)]
    words = [-(-4*n//5), n//5] if what == 'damage' else [n]
    p = subprocess.run([sys.executable, f'{what}.py', *map(str, words)], cwd=Path(__file__).parent,
                       capture_output=True, text=True)
    rows = [json.loads(line) for line in p.stdout.splitlines() if line.startswith('{"')]
    if p.returncode or not rows: print(p.stdout[-3000:], p.stderr[-3000:], sep='\n')
    return [stamp | r for r in rows]


def guided(n):
    "A row for every reader, whose inputs atheris chose"
    for name in READERS:
        p = subprocess.run([sys.executable, 'fuzz.py', '--atheris', str(-(-n//len(READERS))), name],
                           cwd=Path(__file__).parent, capture_output=True, text=True)
        done = re.search(r'number_of_executed_units: (\d+)', p.stderr)
        found = re.search(r'new_units_added: *(\d+)', p.stderr)
        if p.returncode or not done: print(p.stdout[-3000:], p.stderr[-3000:])
        yield dict(reader=name, inputs=int(done[1]) if done else 0, new=int(found[1]) if found else 0,
                   faults=int(bool(p.returncode or not done)))


def main(share=1., *only):
    for what, n in LONG.items():
        if only and what not in only: continue
        rows = rows_of(what, max(1, round(share*n)))
        print('\n'.join(json.dumps(r) for r in rows), flush=True)
        if share < 1: continue
        FILE.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(FILE.read_text()) if FILE.exists() else []
        FILE.write_text(json.dumps([r for r in old if r['what'] != what] + rows, indent=1) + '\n')


if __name__ == '__main__': main(*map(float, sys.argv[1:2]), *sys.argv[2:])
