"""A disk that is full at one file or another: a sentence, nothing half-written, and with room the same numbers.

`sudo python tests/faults/disk.py 20` mounts twenty small file systems, one after the other.
"""
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import kills


def mounted(place, *options):
    "Whether a file system in memory could be mounted there."
    return subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(place)],
                          capture_output=True).returncode == 0


def trial(top, whole, size):
    "A run on a disk of so many bytes, and again with room; returns whether it was full, and what is wrong"
    place, wrong = Path(tempfile.mkdtemp(dir=top)), []
    if not mounted(place, f'size={size}'): raise SystemExit('No file system can be mounted here: are you root?')
    try:
        code = kills.ended(kills.fork(place/'out', top/'said'))
        said = (top/'said').read_text()
        if code is None: wrong.append('hangs')
        if code == 1 and not said.startswith('UserError: Cannot '): wrong.append(said)
        if list(place.rglob('*.part')): wrong.append('half-written files')
        subprocess.run(['mount', '-o', 'remount,size=200m', str(place)], check=True)
        return code == 1, wrong + kills.trial(place, whole, [], place/'out')[1]
    finally:
        while subprocess.run(['umount', str(place)], capture_output=True).returncode == 0: pass


def main(n, seed=0):
    rng, disks, faults = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as d:
        whole = kills.whole_run(Path(d))[0]
        used = sum(-(-p.stat().st_size//4096)*4096 for p in whole.path.rglob('*') if p.is_file())
        while disks < n:
            size = rng.randrange(4096, int(1.5*used), 4096)
            full, wrong = trial(Path(d), whole, size)
            disks, faults = disks + full, faults + bool(wrong)
            if wrong: print(f'{size} bytes: {"; ".join(wrong)}', flush=True)
    found = dict(disks=disks, faults=faults)
    print(json.dumps(found))
    return found


if __name__ == '__main__': sys.exit(bool(main(*map(int, sys.argv[1:]))['faults']))
