"How much memory a run takes: one model at a time, and a refusal before the start where it cannot suffice."
import gc, os, subprocess, sys, weakref

import pytest

from selfalign import record
from selfalign.checks import check_memory, check_run, step_memory, training_bytes
from selfalign.machine import capacity
from selfalign.machine.capacity import begin_peak, free_heap, peak_memory
from selfalign.machine.files import BadInput, read_json
from selfalign.machine.tiny import tiny
from selfalign.recipe import read_recipe
from selfalign.run import STEPS, Run, run_all
from selfalign.style import load_style
from test_kill import prepare

recipe = ('model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 3\nmax_new_tokens: 32\nmargin: 0\nn_prompts: 8\nn_test: 3\n'
          'lora_r: 2\nmax_length: 400\ntrain_batch: 2\nmax_steps: 2\n')


def followed(root, monkeypatch, more=''):
    "A run in `root`: for every model that was read, its name, and which of the earlier ones were alive then; which after each step"
    prepare(root, recipe+more)
    tiny(root/'other', arch='llama', seed=3)
    monkeypatch.chdir(root)
    read, alive, after, load = [], [], {}, record.load_model
    def still(): return [name for name,m in read if m() is not None]
    def reads(model, adapter=None, *args):
        alive.append((f'{model}+lora' if adapter else model, still()))
        llm = load(model, adapter, *args)
        read.append((alive[-1][0], weakref.ref(llm.model)))
        return llm
    monkeypatch.setattr(record, 'load_model', reads)
    run = Run(read_recipe('r.yml'))
    gc.disable()  # what dies only by the collector must be collected by the run
    try:
        for s in STEPS: run.step(s); after[s] = still()
        run.release()
    finally: gc.enable()
    return run, alive, after, still()


def test_one_model_at_a_time(tmp_path, monkeypatch):
    run, alive, after, left = followed(tmp_path/'r', monkeypatch)
    assert [name for name,_ in alive]==['tiny', 'tiny', 'tiny+lora', 'tiny'] and not any(others for _,others in alive) and not left
    assert [after[s] for s in ('data', 'candidates', 'judge', 'dpo', 'reference', 'answer', 'evaluate')]==[[], ['tiny'], ['tiny'], [], ['tiny'], [], ['tiny']]


def test_nor_with_three(tmp_path, monkeypatch):
    "Another judge and a second judge are read when they are needed, and none beside another"
    run, alive, after, left = followed(tmp_path/'r', monkeypatch, 'judge_model: other\nsecond_judge: tiny\n')
    assert [name for name,_ in alive]==['tiny', 'other', 'tiny', 'tiny', 'tiny+lora', 'tiny', 'other'] and not any(others for _,others in alive) and not left
    assert read_json(run.data/'evaluation.json')['second']['judge']=='tiny:likelihood'


def test_a_whole_run_leaves_none(tmp_path, monkeypatch):
    prepare(tmp_path/'r', recipe)
    monkeypatch.chdir(tmp_path/'r')
    run = run_all(Run(read_recipe('r.yml')))
    assert run.llm is None and run.frozen is None
    steps = read_json(run.file)['steps']
    assert all(steps[s]['peak_gb']>0 for s in STEPS)
    assert run.model().model is run.model().model  # and it is read again where somebody wants it


def test_the_peak_can_begin_anew():
    import torch
    free_heap(); begin_peak()
    before, x = peak_memory(), torch.ones(2**26)
    held = peak_memory()
    assert held-before>2e8
    del x
    free_heap(); begin_peak()
    if os.access('/proc/self/clear_refs', os.W_OK): assert peak_memory()<held-2e8


def test_without_glibc_nothing_happens(monkeypatch):
    import ctypes
    def none(name): raise OSError(name)
    monkeypatch.setattr(ctypes, 'CDLL', none)
    capacity.keep_heap(); free_heap()


# the estimate

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny(tmp_path_factory.mktemp('m')/'tiny')


class Sizes:
    def __init__(self, **kw): self.__dict__.update(dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=150000), **kw)


def test_more_rows_tokens_words_layers_need_more():
    def need(item=2, again=False, sizes=None, **keys):
        return training_bytes(Sizes(**(sizes or {})), read_recipe('quickstart', **{**dict(train_batch=8, micro_batch=2, max_new_tokens=128, max_length=256), **keys}), item, again)
    for grows in ([need(micro_batch=m) for m in (1, 2, 4, 8)], [need(max_length=m, max_new_tokens=999) for m in (64, 256, 1024)],
                  [need(max_new_tokens=m) for m in (16, 64, 128)], [need(lora_r=m) for m in (4, 16)], [need(item=i) for i in (2, 4)],
                  [need(sizes=dict(vocab_size=v)) for v in (1000, 8000, 32000)], [need(sizes=dict(num_hidden_layers=n)) for n in (2, 28)]):
        assert grows==sorted(grows) and len({*grows})==len(grows)
    assert need(micro_batch=8, train_batch=2)==need(micro_batch=2, train_batch=2)  # no more rows than there are
    assert need(sizes=dict(vocab_size=10**6))==need()                              # logits come in blocks
    assert need(again=True)<need()/5


def test_sizes_of_other_architectures():
    r = read_recipe('quickstart')
    no_mlp, lists, none = Sizes(), Sizes(intermediate_size=[8960, 8960]), Sizes()
    del no_mlp.intermediate_size; none.__dict__.clear()
    assert training_bytes(lists, r, 2)==training_bytes(Sizes(), r, 2)
    assert training_bytes(no_mlp, r, 2)==training_bytes(Sizes(intermediate_size=4*1536), r, 2)
    assert training_bytes(none, r, 2)==0


def test_each_step_counts_the_models_it_uses(folder):
    def need(**keys): return step_memory(read_recipe('quickstart', **{'model': str(folder), **keys}))
    plain = need()
    assert plain['dpo']==max(plain.values()) and plain['candidates']==plain['judge']==plain['answer']==plain['evaluate']>0
    served = need(server='http://127.0.0.1:9')
    assert served['candidates']==served['judge']==served['evaluate']==0 and served['answer']==plain['answer']
    assert need(dtype='bfloat16')['answer']<plain['answer'] and need(bits=4)['dpo']<plain['dpo']


def refused(r):
    with pytest.raises(BadInput) as e: check_memory(r)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_too_little_memory_is_said_before_the_start(folder, monkeypatch, tmp_path):
    r = read_recipe('quickstart', model=str(folder), device='cpu', max_new_tokens=600, max_length=700)
    need = step_memory(r)
    monkeypatch.setattr(capacity, '_group_free', lambda: [need['dpo']])
    check_memory(r)
    monkeypatch.setattr(capacity, '_group_free', lambda: [need['dpo']-1])
    told = refused(r)
    assert told.startswith('quickstart: the step dpo: ') and 'lower micro_batch, max_new_tokens or max_length, or take dtype bfloat16' in told
    one = read_recipe('quickstart', model=str(folder), device='cpu', max_new_tokens=600, max_length=700, micro_batch=1)
    check_memory(one)  # as it said
    monkeypatch.setattr(capacity, '_group_free', lambda: [need['answer']-1])
    assert 'take a smaller model, dtype bfloat16 or bits 4' in refused(r) and 'micro_batch' not in refused(one)
    (tmp_path/'q.csv').write_text('text\nWhy?\n')
    with pytest.raises(BadInput, match='the step dpo'):
        check_run(read_recipe('quickstart', model=str(folder), device='cpu', data=str(tmp_path/'q.csv')), load_style('brief-ru'), tmp_path/'d', tmp_path/'m')
    assert not (tmp_path/'d').exists() and not (tmp_path/'m').exists()


def test_the_estimate_is_no_step_key(folder):
    "What a machine has, and what a step took of it, decides nothing about a result"
    assert not any('peak' in k or 'memory' in k for s in STEPS.values() for k in s.settings)


GROWTH = '''
import ctypes, os, torch
from selfalign.machine.capacity import pick_device
def rss(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS'))
pick_device('cpu')
w = torch.randn(1536, 4096, dtype=torch.bfloat16)
torch.randn(1, 1536, dtype=torch.bfloat16)@w
before = rss()
for n in range(64, 364): torch.randn(n, 1536, dtype=torch.bfloat16)@w
ctypes.CDLL('libc.so.6').malloc_trim(0)
print(rss()-before)
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads the memory of a process as Linux tells it')
def test_shapes_that_differ_do_not_fill_the_memory():
    "oneDNN keeps a kernel for each shape: 430 MB for these 300 where the CPU multiplies in bfloat16"
    env = {k: v for k,v in os.environ.items() if k!='ONEDNN_PRIMITIVE_CACHE_CAPACITY'}
    r = subprocess.run([sys.executable, '-c', GROWTH], capture_output=True, text=True, env=env)
    assert r.returncode==0, r.stderr
    assert int(r.stdout)<300_000
