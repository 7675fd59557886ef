"Packaging of selfalign. Every setting is in settings.ini: edit there, not here."
import shutil
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']
licenses = {'apache2': 'Apache-2.0'}
statuses = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
shipped = ['data/ru_instructions.jsonl', 'data/ru_gold.jsonl', 'data/ru_translation.jsonl', 'data/README.md', 'models']


class BuildWithFiles(build_py):
    "A wheel also carries the embedded data set and adapters (in `selfalign/_files`); a clone reads them where they lie"
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        for name in shipped:
            src, dst = here/name, Path(self.build_lib)/lib/'_files'/name
            dst.parent.mkdir(parents=True, exist_ok=True)
            if src.is_dir(): shutil.copytree(src, dst, dirs_exist_ok=True)
            else: shutil.copy(src, dst)


dev = split(cfg['dev_requirements'])
extras = {k: split(cfg[f'{k}_requirements']) for k in ('embedded', 'qlora', 'bertscore', 'server', 'export', 'demo', 'tracking')}
instruct = split(cfg['instruct_requirements'])  # a gigabyte: not part of `dev`
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license=licenses.get(cfg['license'].lower(), cfg['license']),
    classifiers=['Development Status :: '+statuses[cfg['status']], 'Intended Audience :: '+cfg['audience'],
                 'Natural Language :: '+cfg['language'], 'Natural Language :: Russian', 'Programming Language :: Python :: 3'],
    packages=find_packages(include=[lib, lib+'.*']), include_package_data=True, cmdclass={'build_py': BuildWithFiles},
    python_requires='>='+cfg['min_python'],
    install_requires=split(cfg['requirements']),
    extras_require={'dev': sum(extras.values(), dev), 'instruct': instruct, **extras},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': split(cfg['console_scripts']), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
