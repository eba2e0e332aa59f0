"Packaging of ltbook: every value is read from settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
name, workbook, dev = cfg['lib_name'], cfg['workbook_requirements'].split(), cfg['dev_requirements'].split()


class WithNotebook(build_py):
    "The experiment notebook travels inside the package, so that an installed one can draw its figures."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        inside = Path(self.build_lib)/name/'notebooks'
        inside.mkdir(parents=True, exist_ok=True)
        for page in Path('nbs/experiments').glob('*.ipynb'): self.copy_file(str(page), str(inside/page.name))


setup(
    name=name, version=cfg['version'], description=cfg['description'], author=cfg['author'],
    author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'], license=cfg['license'].upper(),
    python_requires='>=' + cfg['min_python'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[name, name + '.*']), package_data={name: ['runs/*.csv', 'py.typed']},
    include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require={'workbook': workbook, 'dev': workbook + dev, 'timm': ['timm>=1.0'],
                    'torchcodec': ['torchcodec>=0.16'],
                    'ray': ['ray>=2.40'], 'slurm': ['submitit>=1.5,<2'],
                    'onnx': ['onnx>=1.16', 'onnxscript>=0.3'],
                    'tensorboard': ['tensorboard>=2.14'], 'mlflow': ['mlflow>=2.10'], 'wandb': ['wandb>=0.16'],
                    'lab': workbook + ['voila>=0.5'],
                    'docs': ['sphinx>=8', 'myst-nb>=1.2', 'furo', 'latex2mathml>=3.77']},
    entry_points={'console_scripts': [f'{name}={name}.cli.main:main'], 'nbdev': [f'{name}={name}._modidx:d']},
    cmdclass={'build_py': WithNotebook}, zip_safe=False)
