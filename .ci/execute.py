"""Run notebooks and store their outputs: `python .ci/execute.py [nbs/loop/10_pairs.ipynb ...]` (all of nbs/ when none is named).

Cells that the tests skip (`#| eval: false`, and the flags of `tst_flags` unless named in $NB_FLAGS) keep the outputs they have.
Each notebook has a process of its own; plots are PNG; the result is as nbdev_clean leaves it, so a second run changes nothing."""
import os, subprocess, sys, time
from pathlib import Path

quiet = {'TQDM_DISABLE': '1', 'HF_DATASETS_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_OFFLINE': '1',
         'TRANSFORMERS_VERBOSITY': 'error', 'COLUMNS': '100'}


def skipped(fn, cfg):
    "Ids of the cells that are not to be run"
    from nbdev.process import NBProcessor
    off = set(cfg.tst_flags.split()) - set(os.environ.get('NB_FLAGS', '').split())
    def no(c):
        d = getattr(c, 'directives_', None) or {}
        return c.cell_type!='code' or 'nbdev_export(' in c.source or d.get('eval:', [''])[0].lower()=='false' or bool(off & d.keys())
    return {c.id for c in NBProcessor(fn, rm_directives=False, process=True).nb.cells if no(c)}


def run(fn):
    "Run one notebook in this process and write it back"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    cfg, fn = get_config(), fn.resolve()
    sys.path.insert(0, str(cfg.config_path))
    skip, nb = skipped(fn, cfg), read_nb(fn)
    for c in nb.cells:
        if c.id not in skip: c.outputs = []
    os.chdir(fn.parent)
    k = CaptureShell(fn, mpl_format='png')
    try: k.run_all(nb, exc_stop=True, preproc=lambda c: c.id in skip)
    except Exception: sys.exit(k.prettytb(fname=fn))
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())
    write_nb(nb, fn)


if __name__=='__main__':
    if sys.argv[1:2]==['--one']: sys.exit(run(Path(sys.argv[2])))
    bad = 0
    for fn in sys.argv[1:] or sorted(map(str, Path('nbs').rglob('*.ipynb'))):
        t = time.time()
        r = subprocess.run([sys.executable, __file__, '--one', fn], env={**os.environ, **quiet})
        bad += r.returncode!=0
        print(f'{"FAIL" if r.returncode else "ok  "} {time.time()-t:6.1f} s  {fn}', flush=True)
    sys.exit(bool(bad))
