"Every exported name says what it is: counted, so that a new one that doesn't is seen"
import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

import ltbook

PACKAGE = Path(ltbook.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py'))
FROM_PAPERS = {'losses', 'measure', 'models'}      # rooms where most things were published by somebody
# what is there in addition: everybody's knowledge, or this project's own
OURS = {
    *('reduced weighted_mean LossOptions named_loss mixed inverse_frequency_weights').split(),
    *('as_predictions top1 per_class_accuracy Mixture weight_lean guarded').split(),
    *('power_prior estimate_power confidences').split(),
    *('negative_log_likelihood Scaling balanced_weights calibrated measures protocol').split(),
    *('build_backbone driver_optimum expert_heads ExpertNetwork squared_distances component_densities').split(),
    *('log_likelihood read_rows row_batches latent_plane mean_and_deviation check_members').split(),
    *('check_logits linear_head fresh_head BodyAndHead random_levels').split(),
    *('cluster_table cluster_stats imbalance_nats filter_checks FrozenResNet small_stem TimmNetwork').split(),
    *('read_weights best_prefix start_from').split()}
PROTOCOL = {'forward', 'state_dict', 'load_state_dict', 'zero_grad'}      # of PyTorch: everybody knows what they do
ARRAY = re.compile(r'^[^\[]*\b(Tensor|ndarray)\b')      # not of arrays within something
SHAPE = re.compile(r'\(|scalar|any shape')


class Module:
    "What can be known of a module without importing it"
    def __init__(self, path):
        self.name, source = path.relative_to(PACKAGE).with_suffix('').as_posix(), path.read_text()
        self.lines, self.tree, self.comments = source.splitlines(), ast.parse(source), {}
        for t in tokenize.generate_tokens(io.StringIO(source).readline):
            if t.type == tokenize.COMMENT: self.comments[t.start[0]] = t.string
        listed = [n.value.elts for n in self.tree.body if isinstance(n, ast.Assign)
                  and getattr(n.targets[0], 'id', '') == '__all__']
        names = {e.value for e in listed[0] if isinstance(e, ast.Constant)} if listed else set()
        self.exported = [
            n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]
        self.values = [(x.id, n) for n in self.tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
                       for x in (n.targets if isinstance(n, ast.Assign) else [n.target])
                       if isinstance(x, ast.Name) and x.id in names]

    def about(self, node):
        "The comments beside a parameter or a value, and in the lines above it"
        found = [self.comments[i] for i in range(node.lineno, node.end_lineno + 1) if i in self.comments]
        line = node.lineno - 1
        while line in self.comments and re.match(r'\s*#(?! %%)', self.lines[line - 1]):
            found, line = [self.comments[line], *found], line - 1
        return ' '.join(found)


def arguments(function):
    a = function.args
    return [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ('self', 'cls')]


def errors(function):
    "Does its own body, not that of a function inside, raise what is meant for users?"
    inside = {id(n) for f in ast.walk(function) if isinstance(f, (ast.FunctionDef, ast.Lambda)) and f is not function
              for n in ast.walk(f)}
    return any(isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and getattr(n.exc.func, 'id', '') == 'UserError'
               for n in ast.walk(function) if id(n) not in inside)


def is_command(function):
    "Of the command line: its help explains the words"
    return function.name[-1] == '_' != function.name[0]


def says_itself(value):
    "A method has a title, an option of the command line its help"
    return re.match(r'register\(|.*\bhelp=', ast.unparse(value), re.S)


def untold(module, f, whole, doc):
    "Parameters without a word, arrays without a shape"
    for a in arguments(f):
        said, kind = module.about(a), '' if a.annotation is None else ast.unparse(a.annotation)
        if 'typer.' in kind: continue      # its help says it
        if not said and not is_command(f) and f'`{a.arg}`' not in doc: yield f'{whole}: {a.arg} is not explained'
        if said and ARRAY.search(kind) and not SHAPE.search(said): yield f'{whole}: {a.arg} has no shape'
    if f.returns is not None and f.name != '__init__' and ARRAY.search(ast.unparse(f.returns)):
        said = ' '.join(module.comments.get(i, '') for i in range(f.returns.lineno, f.returns.end_lineno + 1))
        told = re.search(rf'{SHAPE.pattern}|\b(like|same)\b', said) or re.search(r'\(\w*,|\(\)|scalar', doc)
        if not told: yield f'{whole}: what it returns has no shape'
    is_property = any('property' in ast.unparse(d) for d in f.decorator_list)      # its docstring says it
    if f.returns is not None and ast.unparse(f.returns) == 'float' and not is_property:
        if not any(i in module.comments for i in range(f.returns.lineno, f.returns.end_lineno + 1)):
            yield f'{whole}: the number it returns has no unit and no range'


@cache
def documented():
    "Class -> names of its bases, and its methods that say what they do"
    found = {}
    for path in MODULES:
        for n in ast.walk(ast.parse(path.read_text())):
            if isinstance(n, ast.ClassDef):
                found[n.name] = {getattr(b, 'id', '') for b in n.bases}, {
                    f.name for f in n.body if isinstance(f, ast.FunctionDef) and ast.get_docstring(f)}
    return found


def said_by_a_base(bases, name):
    "Whether a class of this package that it is made of says what the method does"
    return any(b in documented() and (name in documented()[b][1] or said_by_a_base(documented()[b][0], name))
               for b in bases)


def lacks(module):
    "What is missing in a module, as sentences"
    for name, n in module.values:
        if not module.about(n) and not says_itself(n.value): yield f'{name} has no word beside or above it'
    for n in module.exported:
        doc = ast.get_docstring(n) or ''
        if not doc: yield f'{n.name} has no docstring'
        if module.name.split('/')[0] in FROM_PAPERS and n.name not in OURS and not re.search(r'\b(19|20)\d\d\b', doc):
            yield f'{n.name} has no source: author and year, or a place in OURS'
        functions = [f for f in n.body if isinstance(f, ast.FunctionDef)] if isinstance(n, ast.ClassDef) else [n]
        bases = {getattr(b, 'id', '') for b in n.bases} if isinstance(n, ast.ClassDef) else set()
        for f in functions:
            whole, own = f'{n.name}.{f.name}' if f is not n else n.name, ast.get_docstring(f) or ''
            if f is not n and f.name != '__init__':
                known = f.name.startswith('_') or f.name in PROTOCOL or said_by_a_base(bases, f.name)
                if not (own or known): yield f'{whole} has no docstring'
                if not f.name.startswith('_'):
                    if errors(f) and 'UserError' not in own + doc:
                        yield f'{whole} raises UserError and does not say so'
                    if not known: yield from untold(module, f, whole, own + doc)
                continue
            if errors(f) and not is_command(f) and 'UserError' not in own + doc:
                yield f'{whole} raises UserError and does not say so'
            yield from untold(module, f, whole, own + doc)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(PACKAGE).with_suffix('').as_posix())
def test_every_exported_name_is_explained(path): assert [*lacks(Module(path))] == []


def test_how_many_there_are():
    "The test sees them, and sees what is missing"
    modules = [Module(p) for p in MODULES]
    assert sum(len(m.exported) for m in modules) > 700 and sum(len(m.values) for m in modules) > 80
    assert OURS <= {n.name for m in modules if m.name.split('/')[0] in FROM_PAPERS for n in m.exported}


BAD = '''
__all__ = ['f', 'A', 'g_', 'h', 'N', 'M']
def f(x: Tensor,  # logits
      y) -> Tensor:
    if x: raise UserError('no')
class A:
    "Of something."
    def __init__(self, n): pass
    def act(self): return 1
    def do(self, k): "Do it."
def g_(word): "A verb."
def h() -> float: "How much."
N = 1
M = 2      # of something
'''


def test_what_it_finds(tmp_path, monkeypatch):
    import sys
    (tmp_path/'bad.py').write_text(BAD)
    monkeypatch.setattr(sys.modules[__name__], 'PACKAGE', tmp_path)
    assert [*lacks(Module(tmp_path/'bad.py'))] == [
        'N has no word beside or above it', 'f has no docstring', 'f raises UserError and does not say so',
        'f: x has no shape', 'f: y is not explained', 'f: what it returns has no shape',
        'A.__init__: n is not explained', 'A.act has no docstring', 'A.do: k is not explained',
        'h: the number it returns has no unit and no range']
    monkeypatch.setattr(sys.modules[__name__], 'FROM_PAPERS', {'bad'})
    assert 'h has no source: author and year, or a place in OURS' in [*lacks(Module(tmp_path/'bad.py'))]
