"Packaging of ltbook: every value is read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
name, workbook, dev = cfg['lib_name'], cfg['workbook_requirements'].split(), cfg['dev_requirements'].split()

setup(
    name=name, version=cfg['version'], description=cfg['description'], author=cfg['author'], author_email=cfg['author_email'],
    url=cfg['git_url'], keywords=cfg['keywords'], license=cfg['license'].upper(), python_requires='>=' + cfg['min_python'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[name, name + '.*']), package_data={name: ['runs/*.csv']}, include_package_data=True,
    install_requires=cfg['requirements'].split(), extras_require={'workbook': workbook, 'dev': workbook + dev},
    entry_points={'console_scripts': [f'{name}={name}.runs.cli:main'], 'nbdev': [f'{name}={name}._modidx:d']},
    zip_safe=False)
