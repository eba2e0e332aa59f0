"""The site from the notebooks as they are: `python nbs/site/build.py [_docs]`. Nothing is run, nothing is fetched.

Pages lose what is not for readers (hidden cells, directives), imports and plain assertions are folded, and every
exported name gets an entry with its parameters. Ends with exit code 1 for a warning or a broken link.
"""
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from fastcore.docments import docments

from ltbook.methods.method import Method, methods
from ltbook.runs.folder import find_runs
from ltbook.studies.compare import compare, formatted, short

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = dict(
    data='Data', models='Networks', losses='Losses', measure='Measures', train='Training', methods='Methods',
    runs='Runs', studies='Many runs', plots='Figures', bench='Speed', cli='Command line', experiments='Experiments',
    analysis='Analyses', explore='To play with')
TEXTS = {'LOG.md': 'log.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md',
         'outputs/README.md': 'results.md'}
DIRECTIVE = re.compile(r'^#\|\s*(\w+).*\n?', re.M)


def words_of(cell):
    return {m.group(1) for m in DIRECTIVE.finditer(''.join(cell['source']))}


def for_readers(nb):
    "A notebook without what only machines need, with imports and assertions folded."
    cells, before = [], title_of(nb)
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': before = plain_words(''.join(cell['source'])) or before
        if cell['cell_type'] == 'code':
            said, text = words_of(cell), DIRECTIVE.sub('', ''.join(cell['source'])).strip()
            if said & {'hide', 'default_exp'} or not text: continue
            lines = [line for line in text.splitlines() if line[:1] not in ('', ' ', ')', '#')]
            plain = all(line.startswith(('import ', 'from ')) for line in lines)
            proof = not cell['outputs'] and all(line.startswith(('assert', 'with pytest')) for line in lines)
            tags = ['hide-input'] if plain or proof else []
            picture = dict(image=dict(alt=f'{title_of(nb)}. {before}'))
            cell = cell | dict(source=text, metadata=dict(tags=tags, mystnb=picture))
        cells.append(cell)
    return nb | dict(cells=cells)


def plain_words(text):
    "The last paragraph of a text, for those who can't see the figure below it."
    paragraph = [p for p in text.strip().split('\n\n') if p[:1].isalpha()][-1:]
    words = re.sub('[`$*]', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', ''.join(paragraph)))
    return ' '.join(words.split())[:240]


GONE = []      # links of the sources that lead nowhere


def relinked(text, at):
    "Links of a page that lead out of the site become plain words; those to texts of the project find their place."
    def link(m):
        label, target = m.group(1), m.group(2)
        if target.startswith('#'): return f'[{label}]({target.lower()})'
        if target.startswith(('http', 'data:')): return m.group()
        place = (ROOT/at/unquote(target.partition('#')[0])).resolve()
        try: inside = place.relative_to(ROOT).as_posix()
        except ValueError: return label
        up = '../' if at.startswith('nbs/') and at != 'nbs/site' else ''
        anchor = '#' + target.partition('#')[2].lower() if '#' in target else ''      # as headings are called here
        if inside in TEXTS: return f'[{label}]({up}{TEXTS[inside]}{anchor})'
        if inside.startswith('nbs/') and place.suffix == '.ipynb' and place.exists():
            return f'[{label}]({up}{inside.removeprefix("nbs/")}{anchor})'
        if inside.startswith('nbs/site/') and place.suffix == '.md' and place.exists():
            return f'[{label}]({up}{place.name}{anchor})'
        if place.suffix == '.png' and place.exists(): return f'[{label}]({up}{picture(place)})'
        if not place.exists(): GONE.append(f'{at}: {target}')
        return label
    return re.sub(r'\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)', link, text)


def picture(place):
    "Copy a picture of a run, and say where to."
    name = '-'.join(place.relative_to(ROOT).parts[-5:])
    (SRC/'pictures').mkdir(exist_ok=True)
    shutil.copy(place, SRC/'pictures'/name)
    return f'pictures/{name}'


def title_of(nb):
    return ''.join(nb['cells'][0]['source']).splitlines()[0].removeprefix('# ')


def copy_pages():
    "Notebooks by folder, with a contents page for each."
    for part, title in PARTS.items():
        names = []
        for file in sorted((ROOT/'nbs'/part).glob('*.ipynb'), key=lambda p: p.name.split('_')[0].ljust(4, '0')):
            nb = for_readers(json.loads(file.read_text()))
            for cell in nb['cells']:
                if cell['cell_type'] == 'markdown':
                    cell['source'] = relinked(''.join(cell['source']), f'nbs/{part}')
            (SRC/part).mkdir(exist_ok=True)
            (SRC/part/file.name).write_text(json.dumps(nb))
            names.append(file.name)
        contents(SRC/part/'index.md', title, names)


def contents(file, title, names, text=''):
    listed = '\n'.join(names)
    file.write_text(f'# {title}\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n')


def explained(thing):
    "Parameters with their comments, as far as its source can be read."
    try: return docments(thing, full=True)
    except Exception: return {}


def said_of(name, source):
    "The comment above a value in a module, or beside it."
    m = re.search(rf'(?:^# (?!%%)(.*)\n)?^{name}\b[^=\n]*=.*?(?:\s# (.*))?$', source, re.M)
    return (m and (m.group(1) or m.group(2)) or '').strip()


def entry(name, thing, kind, source=''):
    "One exported name: signature, what it does, every parameter with its comment, what comes back."
    lines = []
    try: signature = re.sub(r" at 0x[0-9a-f]+", '', str(inspect.signature(thing)))
    except (TypeError, ValueError): signature = ''
    if len(signature) > 600 or '<' in signature: signature = '(...)'
    text = said_of(name, source) if kind == 'data' else inspect.cleandoc(thing.__doc__ or '')
    if isinstance(thing, Method): text = f'{thing.title} ({thing.paper})'
    head = name + (signature if kind in ('function', 'class') else '')
    lines += [f'````{{py:{kind}}} {head}', '', text, '']
    about = explained(thing) if kind in ('function', 'class') else {}
    rows = [(k, v.docment) for k, v in about.items() if k not in ('self', 'return') and getattr(v, 'docment', None)]
    if rows: lines += [f'- `{k}`: {v}' for k, v in rows] + ['']
    back = about.get('return')
    if back is not None and getattr(back, 'docment', None): lines += [f'Returns {back.docment}', '']
    if kind == 'class':
        for k, m in vars(thing).items():
            known, call = isinstance(m, (property, cached_property)), '()' if callable(m) else ''
            if k.startswith('_') or not (known or call) or not getattr(m, '__doc__', None): continue
            lines += [f'- `{k}{call}`: {" ".join(inspect.cleandoc(m.__doc__).split())}']
            lines += [f'  - `{x}`: {v.docment}' if x != 'return' else f'  - returns {v.docment}'
                      for x, v in explained(m).items() if x != 'self' and getattr(v, 'docment', None)]
        lines += ['']
    return '\n'.join([*lines, '````', ''])


def api():
    "A page a module, from what it exports; and where every name is."
    places, names, twice = [], {}, set()
    (SRC/'api').mkdir()
    for file in sorted((ROOT/'ltbook').rglob('*.py')):
        module = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
        code = file.read_text()
        source = re.search(r'File to edit: .*?nbs/(\S+\.ipynb)', code)
        if not source: continue
        m = importlib.import_module(module)
        exported = [n for n in getattr(m, '__all__', []) if hasattr(m, n)]
        if not exported: continue
        about = relinked(inspect.cleandoc(m.__doc__ or ''), f'nbs/{Path(source.group(1)).parent}')
        text = [f'# {module}', '', about, '', f'Page: [{source.group(1)}](../{source.group(1)})', '',
                f'```{{py:module}} {module}', '```', '']
        for n in exported:
            thing = getattr(m, n)
            kind = 'class' if inspect.isclass(thing) else 'function' if callable(thing) else 'data'
            text.append(entry(n, thing, kind, code))
            if n in names: twice.add(n)
            names[n] = names[f'{module}.{n}'] = f'{module}.{n}'
        (SRC/'api'/f'{module}.md').write_text('\n'.join(text))
        places.append(f'{module}.md')
    for n in twice: del names[n]
    contents(SRC/'api'/'index.md', 'API', places, 'Every public name, by module. Each module is written from one page.')
    (SRC/'exported.json').write_text(json.dumps(names))


def equations(nb, at):
    "The displayed equations of a page, each under its heading and between the paragraphs around it."
    out, heading = [], ''
    for cell in nb['cells']:
        if cell['cell_type'] != 'markdown': continue
        parts = re.split(r'\n\s*\n', ''.join(cell['source']))
        shown = [k for k, p in enumerate(parts) if '$$' in p]
        kept = {j for k in shown for j in (k - 1, k, k + 1) if 0 <= j < len(parts)}
        for k, p in enumerate(parts):
            if p.startswith('#'): heading = '**' + p.splitlines()[0].lstrip('# ') + '**'
            elif k in kept:
                if heading: out.append(heading)
                out, heading = [*out, re.sub(r'\]\(#', f']({Path(at).name}#', p)], ''
    return relinked('\n\n'.join(out), str(Path(at).parent))


def papers():
    "A page a paper: commands, equations, and what was printed beside what the runs of this repository reached."
    table = compare([r for r in find_runs(ROOT/'outputs') if not r.recipe.hold_out], missing=False)
    table = table[table.measure.isin(('top1', 'ece15')) & (table.changes == '')]
    known, names = methods(), []
    (SRC/'papers').mkdir()
    for file in sorted((ROOT/'nbs'/'methods').glob('*.ipynb'), key=lambda p: p.name.split('_')[0].ljust(4, '0')):
        nb = json.loads(file.read_text())
        found = re.findall(r"register\(\s*Method\(\s*'(\w+)'", '\n'.join(''.join(c['source']) for c in nb['cells']))
        mine = [known[n] for n in found if n in known and not known[n].hidden]
        if not mine: continue
        text = [f'# {title_of(nb)}', '']
        for m in mine:
            text += [f'{m.title[0].upper()}{m.title[1:]} ({m.paper}):', '', '```', f'ltbook run {m.name} '
                     + ('FEATURES' if m.name == 'dlsa' else 'cifar100 --imbalance 100'), '```', '']
        text += [f'[The page with code and checks](../methods/{file.name})', '', '## Equations', '',
                 equations(nb, f'nbs/methods/{file.name}'), '', '## Printed and measured', '']
        rows = table[table.method.isin([m.name for m in mine])]
        if len(rows):
            s = short(rows.sort_values(['method', 'dataset', 'imbalance', 'profile', 'stage']))[
                ['method', 'setting', 'recipe', 'measure', 'printed', 'ours', 'seeds', 'verdict']]
            text += [formatted(rows, 'markdown', s.drop_duplicates())]
        else: text += ['No finished run is in this repository.']
        (SRC/'papers'/f'{file.stem}.md').write_text('\n'.join(text))
        names.append(f'{file.stem}.md')
    text = relinked((HERE/'papers.md').read_text(), 'nbs/methods')      # the folder lies beside it
    contents(SRC/'papers'/'index.md', 'Methods and papers', names, text)


def differences():
    "Cells that are tagged `paper-and-code`, under the titles of their pages."
    text = ['# Where papers and code differ', '', (HERE/'differences.md').read_text(), '']
    for file in sorted((ROOT/'nbs').glob('*/*.ipynb')):
        nb = json.loads(file.read_text())
        found = [''.join(c['source']) for c in nb['cells'] if 'paper-and-code' in c['metadata'].get('tags', ())]
        if not found: continue
        at = f'{file.parent.name}/{file.name}'
        text += [f'## {title_of(nb)}', '', f'From [this page]({at}).', '']
        for cell in found:      # links as on their page, headings as plain words
            moved = re.sub(r'\]\((\.\./)+', '](', re.sub(r'\]\((\d+\w*\.ipynb)', fr']({file.parent.name}/\1', cell))
            text += [re.sub(r'^#+ (.*)$', r'**\1**', moved, flags=re.M), '']
    (SRC/'differences.md').write_text('\n'.join(text))


class Links(HTMLParser):
    def __init__(self): super().__init__(); self.ids, self.to = set(), []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.to += [a[k] for k in ('href', 'src') if a.get(k)]


def broken(site):
    "Links of the built pages that lead nowhere, pages that ask another place for anything, formulas left as they were."
    read = {}
    for file in site.rglob('*.html'):
        read[file.resolve()] = page = Links()
        page.feed(file.read_text())
    for file, page in read.items():
        for link in page.to:
            target, _, anchor = unquote(link).partition('#')
            if re.match(r'[a-z]+:', target): continue
            place = (file.parent/target.partition('?')[0]).resolve() if target else file
            if place.is_dir(): place = place/'index.html'
            if not place.exists(): yield f'{file.relative_to(site.resolve())}: {link}'
            elif anchor and place in read and anchor not in read[place].ids:
                yield f'{file.relative_to(site.resolve())}: {link}'
    for file in read:
        text = file.read_text()
        for m in re.finditer(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text):
            if 'rel="canonical"' not in m.group(): yield f'{file.name} asks {m.group(1)}'
        for m in re.finditer(r'<m[a-z]+[^>]*>\\[^<]*', text): yield f'{file.name} shows {m.group()}'


def main(out):
    global SRC
    if out.is_dir() and any(out.iterdir()) and not (out/'objects.inv').exists():
        print(f'{out} holds something that is no site: name a folder that may be replaced.', file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as d:
        SRC = Path(d)/'src'
        SRC.mkdir()
        copy_pages()
        api()
        papers()
        differences()
        for name, to in TEXTS.items():
            text = relinked((ROOT/name).read_text(), str(Path(name).parent))
            (SRC/to).write_text(text)
        for file in (*HERE.glob('*.md'), HERE/'conf.py'):
            if file.name in ('papers.md', 'differences.md'): continue      # the first lines of a page that is made
            text = file.read_text()
            (SRC/file.name).write_text(relinked(text, 'nbs/site') if file.suffix == '.md' else text)
        (SRC/'_static').mkdir()
        shutil.copy(HERE/'site.css', SRC/'_static')
        built = subprocess.run([sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-W', '--keep-going', '-j', 'auto',
                                '-d', f'{d}/doctrees', str(SRC), f'{d}/site'])
        if (Path(d)/'site').exists():      # only then the old one goes
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(f'{d}/site', out)
        bad = sorted(set(broken(Path(out)))) if Path(out).exists() else ['nothing was built']
    bad += sorted(set(GONE))
    for line in bad: print('broken:', line)
    pages = len([*Path(out).rglob('*.html')])
    print(f'{pages} pages in {out}, {len(bad)} broken links, open {out}/index.html')
    return int(built.returncode != 0 or bool(bad))


if __name__ == '__main__': sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs').absolute()))
