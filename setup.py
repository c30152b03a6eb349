"""Hands settings.ini, the one place where pins live, to pip."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

ini = ConfigParser(interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], packages=[cfg['lib_path']],
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
      entry_points={'console_scripts': ['facegen=facegen.study:main']},
      extras_require={'dev': cfg['dev_requirements'].split(), 'inception': cfg['inception_requirements'].split()})
