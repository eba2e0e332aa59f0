__version__ = "0.1.0"

# what most people need, by its plain name; imported when it is asked for, so that `import ltbook` stays quick
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltbook.data.images import load_images as load_images
    from ltbook.methods.method import get_method as get_method
    from ltbook.methods.recipe import recipe as recipe
    from ltbook.runs.estimator import LongTailClassifier as LongTailClassifier
    from ltbook.runs.export import from_export as from_export
    from ltbook.runs.folder import Run as Run, find_runs as find_runs, load_run as load_run
    from ltbook.runs.run import run as run

_PLACES = dict(
    load_images='data.images', get_method='methods.method', recipe='methods.recipe', from_export='runs.export',
    LongTailClassifier='runs.estimator', Run='runs.folder', find_runs='runs.folder', load_run='runs.folder',
    run='runs.run')
__all__ = [*_PLACES]


def __getattr__(name: str):
    if name not in _PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_PLACES[name]}'), name)


def __dir__(): return sorted([*globals(), *_PLACES])
