"What tests watch: processes of this machine, numbers of finished runs, a browser"
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ltbook.runs.folder import find_runs

CHROME = shutil.which('chromium') or shutil.which('google-chrome')
BROWSER = bool(CHROME and find_spec('playwright'))      # whether there is one to be driven


@contextmanager
def browser():
    "A browser without a window"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROME, args=['--no-sandbox'])
        try: yield chrome
        finally: chrome.close()


def processes(*words):
    "Processes whose command line has all these words, as (process, its parent)"
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            line = (p/'cmdline').read_bytes().decode().replace('\0', ' ')
            parent = int((p/'stat').read_text().rpartition(')')[2].split()[1])
        except (OSError, ValueError): continue
        if all(w in line for w in words) and int(p.name) != os.getpid(): found.append((int(p.name), parent))
    return found


def numbers(out):
    "Metrics of all finished runs by name"
    return {r.id: r.metrics for r in find_runs(out)}


def spent():
    "Seconds of a core that processes started here have taken: what a clock would say if nothing else ran"
    t = resource.getrusage(resource.RUSAGE_CHILDREN)
    return t.ru_utime + t.ru_stime


@cache
def pace():
    """How much slower than a machine on which importing torch takes 1.2 seconds of a core, and at least 1.

    Limits in seconds were set on such a machine; an older processor, for which this is 2.5, is given its time."""
    began = spent()
    subprocess.run([sys.executable, '-c', 'import torch'], check=True)
    return max(1., (spent() - began)/1.2)
