"One model in memory at a time, and the peak of each step."
import gc, string, weakref

import pytest
from selfalign import record
from selfalign.machine.capacity import begin_peak, peak_memory
from selfalign.machine.files import read_json
from selfalign.machine.tiny import tiny
from selfalign.recipe import read_recipe
from selfalign.record import Run
from selfalign.run import run_all


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp('memory')
    for name,seed in (('one', 0), ('two', 1)): tiny(d/name, seed=seed, letters=string.ascii_letters, digits=.3, spread=30)
    (d/'q.csv').write_text('text\n'+'\n'.join(f'Is {i} a number of {w}?' for i in range(12) for w in ('cats', 'dogs')))
    (d/'s.yml').write_text('name: s\nlang: en\nsystem: ""\ncriteria:\n  Brevity: 5 is short.\n  Use: 5 is useful.\nmeasures:\n  Use: [pmi, 0, 20]\n')
    (d/'r.yml').write_text(f'model: {d/"one"}\ndata: {d/"q.csv"}\nstyle: {d/"s.yml"}\nsamples: 4\nmax_new_tokens: 8\nmargin: 0.0\n'
                           f'judge: digits\nn_test: 4\nepochs: 1\ntrain_batch: 2\nmicro_batch: 1\nmax_length: 128\nlora_r: 2\n')
    return d


@pytest.fixture
def watched(monkeypatch):
    "Every model that is read, and those that were still there when the next was read"
    read, alive, real = [], [], record.load_model
    def load(*a, **k):
        gc.collect()
        alive.append([n for n,r in read if r() is not None])
        llm = real(*a, **k)
        read.append((str(a[0]), weakref.ref(llm.model)))
        return llm
    monkeypatch.setattr(record, 'load_model', load)
    return read, alive


def test_a_model_is_gone_before_the_next_is_read(root, watched):
    run = Run(read_recipe(str(root/'r.yml')), root)
    run.model()
    run.load(model=str(root/'two'))
    assert watched[1]==[[], []]


@pytest.mark.parametrize('over', [{}, dict(judge_model='two'), dict(second_judge='two')])
def test_a_whole_run_holds_one_model(root, watched, over):
    over = {k: str(root/v) for k,v in over.items()}
    run = Run(read_recipe(str(root/'r.yml'), name='m'+''.join(over), **over), root)
    run_all(run)
    read, alive = watched
    assert len(read)>=3 and alive==[[]]*len(read), alive
    del run
    gc.collect()
    assert [n for n,r in read if r() is not None]==[]
    steps = read_json(root/'data'/f'm{"".join(over)}'/'run.json')['steps']
    assert all(0<s['peak_gb']<20 for s in steps.values())


def test_a_peak_begins_anew():
    big = bytearray(300_000_000)
    high = peak_memory()
    del big
    begin_peak()
    assert high>300_000_000 and peak_memory()<=high
