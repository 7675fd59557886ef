"pyproject.toml is there for nbdev 3 and says nothing else than settings.ini; both versions write the same modules, where nbdev 3 is at hand."
import filecmp, os, re, shutil, subprocess, tomllib
from pathlib import Path

import pytest
from nbdev.config import get_config

root = Path(__file__).resolve().parent.parent
cfg, toml = get_config(), tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


def test_what_stands_twice_is_the_same():
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert [project[k] for k in ('name', 'description')]==[cfg.lib_name, cfg.description]
    assert project['urls']=={'Repository': cfg.git_url}
    assert nbdev==dict(title=cfg.title, tst_flags=cfg.tst_flags, custom_sidebar=cfg.custom_sidebar,
                       allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())


def test_all_else_comes_from_setup_py():
    "A field that setup.py sets and that is not dynamic here would be dropped without a word"
    names = dict(version='version', keywords='keywords', author='authors', license='license', classifiers='classifiers',
                 python_requires='requires-python', long_description='readme', install_requires='dependencies',
                 extras_require='optional-dependencies', entry_points='entry-points')
    said = (root/'setup.py').read_text(encoding='utf-8')
    assert {v for k,v in names.items() if re.search(rf'\b{k}=', said)} | {'scripts'}=={*toml['project']['dynamic']}


@pytest.mark.skipif(not os.environ.get('NBDEV3'), reason='NBDEV3 names no folder with the commands of nbdev 3')
def test_nbdev_3_writes_the_same_modules_and_pages(tmp_path):
    tree = tmp_path/'tree'
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns('.git', '.venv', '_docs', '_proc*', 'data', 'models', '__pycache__'))
    for c in ('nbdev-export', 'nbdev-clean'): subprocess.run([str(Path(os.environ['NBDEV3'])/c)], cwd=tree, check=True)
    files = [p.relative_to(root) for f,pat in (('selfalign', '*.py'), ('nbs', '*.ipynb')) for p in (root/f).rglob(pat)]
    assert not filecmp.cmpfiles(root, tree, map(str, files), shallow=False)[1]
