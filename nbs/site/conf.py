"Sphinx settings of the site; `build.py` prepares what is built here, see `make docs`."
import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

project, author, copyright = 'ltbook', 'ltbook authors', '2026 onwards, ltbook authors'
extensions = ['myst_nb']
html_theme, html_title = 'furo', 'ltbook'
html_static_path, html_css_files = ['_static'], ['site.css']
html_show_sphinx = html_copy_source = html_show_sourcelink = False
nb_execution_mode = 'off'
nb_merge_streams = True
nb_code_prompt_show = 'Imports, or checks'
nb_code_prompt_hide = 'Fold'
nb_mime_priority_overrides = [('html', 'text/html', 50)]
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
smartquotes = False      # or --set becomes a dash
suppress_warnings = ['misc.highlighting_failure', 'mystnb.unknown_mime_type']
exclude_patterns = ['_static']
python_use_unqualified_type_names = True
EXPORTED = json.loads((Path(__file__).parent/'exported.json').read_text())      # name -> module.name


def link_names(app, tree):
    "Every name in backticks that the package exports leads to its entry."
    for node in list(tree.findall(nodes.literal)):
        target = EXPORTED.get(node.astext().removesuffix('()'))
        if not target or isinstance(node.parent, (nodes.reference, pending_xref)): continue
        ref = pending_xref('', refdomain='py', reftype='obj', reftarget=target, refexplicit=True, refwarn=False)
        node.replace_self(ref)
        ref += node


def as_mathml(app, tree):
    "Formulas as MathML, which browsers draw by themselves."
    from latex2mathml.converter import convert
    for kind, display in ((nodes.math, 'inline'), (nodes.math_block, 'block')):
        for node in list(tree.findall(kind)):
            # two things that latex2mathml leaves as they are: named delimiters of a given size, and the name arg
            text = re.sub(r'\\[bB]igg?[lrm]?\s*(?=\\(?:[lr]angle|[lr]floor|[lr]?Vert|\|))', '', node.astext())
            text = re.sub(r'\\arg\b', r'\\mathrm{arg}', text)
            node.replace_self(nodes.raw('', convert(text, display=display), format='html'))


def setup(app):
    app.connect('doctree-read', link_names)
    app.connect('doctree-read', as_mathml)
