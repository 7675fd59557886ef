"Each notebook of nbs/ is one test, run as nbdev_test runs it (`NB_FLAGS=slow` runs the slow cells too); package and notebooks agree."
import os, shutil, subprocess, sys

import pytest
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config()
nbs = sorted(nbglob(cfg.nbs_path, as_path=True))
one = 'from nbdev.test import nbdev_test as f; import sys; f.__wrapped__(path=sys.argv[1], flags=sys.argv[2])'
export = 'from nbdev.doclinks import nbdev_export as f; f.__wrapped__()'


def python(code, *args, cwd=cfg.config_path):
    return subprocess.run([sys.executable, '-c', code, *args], cwd=cwd, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize('fn', nbs, ids=lambda p: str(p.relative_to(cfg.nbs_path)))
def test_notebook(fn):
    r = python(one, str(fn), os.environ.get('NB_FLAGS', ''))
    assert r.returncode==0, f'{fn.name} failed:\n{r.stdout[-2000:]}{r.stderr[-6000:]}'


def test_export_in_sync(tmp_path):
    "The package is what the notebooks export, no more and no less"
    for o in ('nbs', 'settings.ini'):
        src = cfg.config_path/o
        (shutil.copytree if src.is_dir() else shutil.copy)(src, tmp_path/o)
    r = python(export, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    def modules(d): return {p.relative_to(d).as_posix(): p.read_text() for p in (d/'selfalign').rglob('*.py')}
    made, kept = modules(tmp_path), modules(cfg.config_path)
    assert sorted(made)==sorted(kept)
    for n in made: assert made[n]==kept[n], f'{n}: run nbdev_export'


@pytest.mark.parametrize('fn', nbs, ids=lambda p: str(p.relative_to(cfg.nbs_path)))
def test_notebook_is_clean(fn):
    nb = read_nb(fn)
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())
    assert nb2str(nb)==fn.read_text(), f'{fn.name}: run nbdev_clean'


def test_readme_is_fresh():
    r = subprocess.run([sys.executable, cfg.config_path/'.ci/readme.py', '--check'], cwd=cfg.config_path, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
