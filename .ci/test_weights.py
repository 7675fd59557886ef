"""What is read as a model, what identifies it, and what is refused: tiny random models, no network."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfalign.machine import capacity, hub
from selfalign.machine.files import BadInput, read_json, write_json
from selfalign.machine.tiny import tiny
from selfalign.machine.weights import (base_name, cache_dir, free_memory, model_bytes, model_key, need_memory, pinned,
                                       read_model, resolve, revision)

os.environ['HF_HUB_OFFLINE'] = '1'


@pytest.fixture(scope='module')
def made(tmp_path_factory): return tiny(tmp_path_factory.mktemp('weights')/'tiny', arch='llama')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('SELFALIGN_CACHE', str(tmp_path/'cache'))


@pytest.fixture
def folder(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'root'/'models'/'tiny'))


def lora(folder, base, **more):
    "A LoRA adapter of a tiny model"
    from peft import LoraConfig, get_peft_model
    m, _ = read_model(str(base) if Path(base).is_absolute() else str(Path(folder)/base), device='cpu')
    torch.manual_seed(0)
    p = get_peft_model(m, LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False))
    p.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base), **more)
    return Path(folder)


def change(folder, file='adapter_config.json', **more): write_json(folder/file, {**read_json(folder/file), **more})


def refused(f, *args, **kw):
    "The one line that refuses"
    with pytest.raises(BadInput) as e: f(*args, **kw)
    assert str(e.value).isprintable()
    return str(e.value)


# what identifies a model

def test_the_same_model_has_one_key_however_it_is_called(folder, tmp_path, monkeypatch):
    key = model_key(str(folder))
    monkeypatch.chdir(folder.parent.parent)
    assert [model_key(n) for n in ('models/tiny', './models/tiny/', 'models/../models/tiny', str(folder))]==[key]*4
    (tmp_path/'link').symlink_to(folder)
    assert model_key(str(tmp_path/'link'))==key==model_key(str(shutil.copytree(folder, tmp_path/'elsewhere')))
    assert str(tmp_path) not in key and 'models' not in key


def test_one_changed_tensor_changes_the_key(folder):
    "In a file far larger than samples of it"
    f = folder/'model.safetensors'
    ws = load_file(f)
    save_file({**ws, 'ballast': torch.zeros(2_000_000)}, f, metadata={'format': 'pt'})
    before = model_key(str(folder))
    ballast = torch.zeros(2_000_000)
    ballast[1_234_567] = 1
    save_file({**ws, 'ballast': ballast}, f, metadata={'format': 'pt'})
    assert model_key(str(folder))!=before


def test_a_large_file_is_read_once_and_again_when_it_has_changed(folder, monkeypatch):
    import time
    f, asked, digest = folder/'model.safetensors', [], hub.file_digest
    monkeypatch.setattr(hub, 'file_digest', lambda f: asked.append(f) or digest(f))
    past = time.time()-100
    monkeypatch.setattr(hub.time, 'time', lambda: past+200)
    first = [hub.content_digest(f, small=0) for _ in range(3)]
    assert len({*first})==1 and len(asked)==1
    data = bytearray(f.read_bytes())
    data[-1] ^= 1
    f.write_bytes(data)
    os.utime(f, (past, past))  # a date that lies: the time of the change of the entry does not
    changed = hub.content_digest(f, small=0)
    os.utime(f, (past, past))
    assert changed!=first[0] and hub.content_digest(f, small=0)==changed


def test_alpha_and_rank_are_part_of_an_adapter(folder):
    a = lora(folder.with_name('a'), folder)
    key = model_key(str(a))
    for more in dict(lora_alpha=99), dict(r=8), dict(use_rslora=True), dict(fan_in_fan_out=True):
        kept = read_json(a/'adapter_config.json')
        change(a, **more)
        assert model_key(str(a))!=key, more
        write_json(a/'adapter_config.json', kept)
    change(a, base_model_name_or_path='../tiny', peft_version='9', inference_mode=False)
    assert model_key(str(a))==key  # how it calls its base is no part


def test_a_moved_root_keeps_its_keys_and_its_models(folder, tmp_path):
    root = folder.parent.parent
    a = lora(folder.with_name('a'), folder)
    assert base_name(str(folder), a)=='../tiny' and base_name('embedded', a)=='embedded'
    change(a, base_model_name_or_path=base_name(str(folder), a))
    before, there = model_key(str(a)), tmp_path/'moved'
    root.rename(there)
    assert model_key(str(there/'models'/'a'))==before
    read_model(str(there/'models'/'a'), device='cpu')
    other = tmp_path/'other'/'models'/'b'
    assert base_name(str(there/'models'/'tiny'), other)==str((there/'models'/'tiny').resolve())


# what is refused

@pytest.mark.parametrize('base', [5, '', None, ['tiny'], {}])
def test_an_adapter_names_its_base_by_a_text(folder, base):
    a = lora(folder.with_name('a'), folder)
    change(a, base_model_name_or_path=base)
    for f in resolve, model_key, read_model: assert 'does not name the model it belongs to' in refused(f, str(a))


def test_a_base_that_is_gone_is_named_with_its_adapter(folder):
    a = lora(folder.with_name('a'), folder)
    change(a, base_model_name_or_path='../gone')
    assert 'base_model_name_or_path' in refused(resolve, str(a)) and str(a) in refused(resolve, str(a))


@pytest.mark.parametrize('device', ['meta', 'cuda:99', 'cpu:x', 'gpu', 'xla'])
def test_devices_that_are_none(folder, device): assert f'device {device!r}' in refused(read_model, str(folder), device=device)


RAN = 'ran.txt'
CODE = f"""
from pathlib import Path
Path(__file__).with_name({RAN!r}).write_text('x')
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig): model_type = 'own'
class Model(LlamaForCausalLM): config_class = Config
"""


def with_code(folder):
    (folder/'own.py').write_text(CODE)
    change(folder, 'config.json', model_type='own',
           auto_map=dict(AutoConfig='own.Config', AutoModelForCausalLM='own.Model'))
    return folder


def test_code_of_a_models_author_is_not_run_and_not_asked_for(folder, tmp_path):
    "On a terminal, where transformers would ask and a `y` is waiting"
    import pty
    say = ('import sys; from selfalign.machine.weights import read_model\n'
           'try: read_model(sys.argv[1], device="cpu")\nexcept Exception as e: print("SAID", type(e).__name__, e)')
    me, terminal = pty.openpty()
    os.write(me, b'y\ny\ny\n')
    p = subprocess.run([sys.executable, '-c', say, str(with_code(folder))], stdin=terminal, capture_output=True, text=True, timeout=120,
                       env={**os.environ, 'HF_MODULES_CACHE': str(tmp_path/'modules')})
    assert 'SAID BadInput' in p.stdout and 'code of its author, which is never run' in p.stdout
    assert '[y/N]' not in p.stdout+p.stderr and not [*tmp_path.rglob(RAN)]


def test_code_of_a_tokenizers_author_is_not_run(folder, tmp_path):
    (folder/'own.py').write_text(CODE+'class Tok: pass\n')
    change(folder, 'tokenizer_config.json', tokenizer_class='Tok', auto_map=dict(AutoTokenizer=['own.Tok', None]))
    try: read_model(str(folder), device='cpu')
    except BadInput as e: assert str(e).isprintable()
    assert not [*tmp_path.rglob(RAN)]


def test_an_attention_from_the_hub_is_code_too(folder):
    change(folder, 'config.json', attn_implementation='somebody/kernel')
    assert 'remove attn_implementation' in refused(read_model, str(folder), device='cpu')


def test_pickled_weights_are_not_read(folder):
    f = folder/'model.safetensors'
    torch.save(load_file(f), folder/'pytorch_model.bin')
    f.unlink()
    said = refused(read_model, str(folder), device='cpu')
    assert 'no safetensors' in said and 'save_pretrained' in said and str(folder) in said
    a = folder.with_name('a')
    a.mkdir()
    write_json(a/'adapter_config.json', dict(base_model_name_or_path=str(folder)))
    torch.save({}, a/'adapter_model.bin')
    for f in read_model, model_key: assert 'adapter_model.safetensors is missing' in refused(f, str(a)) or f is read_model


def broken(folder, value, name='model.norm.weight'):
    f = folder/'model.safetensors'
    ws = load_file(f)
    ws[name].view(-1)[3] = value
    save_file(ws, f, metadata={'format': 'pt'})
    return str(folder)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_no_numbers(folder, value):
    said = refused(read_model, broken(folder, value), device='cpu')
    assert 'NaN or infinity in the weights model.norm.weight' in said and 'damaged' in said


def test_an_adapter_that_diverged_is_refused_after_merging(folder):
    a = lora(folder.with_name('a'), folder)
    ws = load_file(a/'adapter_model.safetensors')
    ws[next(iter(ws))][:] = float('nan')
    save_file(ws, a/'adapter_model.safetensors', metadata={'format': 'pt'})
    assert 'NaN or infinity in the weights' in refused(read_model, str(a), device='cpu')


def test_logits_that_are_no_numbers(folder):
    "Weights that float16 can hold, and products that it cannot"
    f = folder/'model.safetensors'
    ws = load_file(f)
    ws['model.norm.weight'][:] = 60000.
    save_file(ws, f, metadata={'format': 'pt'})
    said = refused(read_model, str(folder), device='cpu', dtype='float16')
    assert 'its logits' in said and 'use dtype float32 or bfloat16' in said
    read_model(str(folder), device='cpu', dtype='float32')


def test_weights_that_are_missing_are_not_made_up(folder):
    f = folder/'model.safetensors'
    ws = load_file(f)
    ws.pop('model.layers.0.self_attn.q_proj.weight')
    save_file(ws, f, metadata={'format': 'pt'})
    assert 'lack 1 of its weights, such as model.layers.0.self_attn.q_proj.weight' in refused(read_model, str(folder), device='cpu')


# the hub, without a network: its cache has a known layout

OLD, NEW = 'a'*40, 'b'*40


@pytest.fixture
def cached(made, tmp_path, monkeypatch):
    from huggingface_hub import constants
    repo = tmp_path/'hub'/'models--org--name'
    for c in OLD, NEW: shutil.copytree(made, repo/'snapshots'/c)
    broken(repo/'snapshots'/OLD, 7.)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text(NEW)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(hub, 'offline', lambda: True)
    return 'org/name'


def test_a_hub_model_is_identified_by_its_commit(cached):
    assert revision(cached)==NEW and pinned(cached)==model_key(cached)==f'org/name@{NEW}'
    assert revision(f'{cached}@{OLD}')==OLD and pinned(f'{cached}@{OLD}')==f'org/name@{OLD}'
    assert 'not in the local cache' in refused(pinned, 'org/other')
    assert 'a revision follows a name on the hub' in refused(resolve, 'org/name@../x')
    assert model_bytes(cached, 'float32')>0==model_bytes('org/other')


def test_a_pinned_model_stays_what_it_was(cached, tmp_path):
    "In a process of its own, because the hub's library reads its environment once"
    say = ('import sys; from selfalign.machine.weights import pinned, read_model\n'
           'for n in sys.argv[1:]: print(read_model(n, device="cpu")[0].model.norm.weight[3].item(), pinned(n))')
    a = lora(tmp_path/'a', tmp_path/'hub'/'models--org--name'/'snapshots'/NEW)
    change(a, base_model_name_or_path='org/name', revision=OLD)
    p = subprocess.run([sys.executable, '-c', say, 'org/name', f'org/name@{OLD}', str(a)], capture_output=True, text=True, timeout=180,
                       env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HUB_CACHE': str(tmp_path/'hub')})
    got = [l.split() for l in p.stdout.splitlines()]
    assert got==[['1.0', f'org/name@{NEW}'], ['7.0', f'org/name@{OLD}'], ['7.0', str(a)]], p.stderr[-500:]


def test_a_data_set_has_a_commit_too(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    assert hub.dataset_revision('org/data') is None  # offline and unknown
    monkeypatch.setattr(hub, 'offline', lambda: False)
    class About: sha = OLD
    monkeypatch.setattr(HfApi, 'repo_info', lambda self, *a, **k: About if k['repo_type']=='dataset' else 1/0)
    assert hub.dataset_revision('org/data')==OLD


# room

def test_memory_is_looked_for_before_the_work(folder, monkeypatch):
    n = sum(w.numel() for w in load_file(folder/'model.safetensors').values())
    assert [model_bytes(str(folder), d) for d in ('float32', 'bfloat16')]==[4*n, 2*n]
    assert model_bytes(str(folder), 'bfloat16', bits=4)<2*n
    monkeypatch.setattr(capacity, '_group_free', lambda: [1000])
    assert free_memory('cpu')==1000
    need_memory(1000, device='cpu')
    assert 'training: 2.0 GB of memory are needed, 0.0 GB are free' in refused(need_memory, 2*10**9, 'training', 'cpu')


def test_a_limit_of_the_shell_counts():
    say = ('import resource; from selfalign.machine.capacity import free_memory; free_memory("cpu")\n'
           'resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35)); print(free_memory("cpu"))\n'
           'from selfalign.machine import capacity; print(*capacity._process_free())')
    p = subprocess.run([sys.executable, '-c', say], capture_output=True, text=True, timeout=120)
    got, mine = map(int, p.stdout.split())
    assert got<=mine<2**35, p.stderr


def test_groups_of_both_kinds_are_read(tmp_path, monkeypatch):
    real = Path
    for d,(most,used) in {'memory/a/b': ('memory.limit_in_bytes', 'memory.usage_in_bytes'), 'c/d': ('memory.max', 'memory.current')}.items():
        (tmp_path/d).mkdir(parents=True)
        (tmp_path/d/most).write_text('1000'); (tmp_path/d/used).write_text('700')
        (tmp_path/d/'memory.stat').write_text('active_file 1\ninactive_file 50\n')
    (tmp_path/'c'/'memory.max').write_text('max'); (tmp_path/'c'/'memory.current').write_text('9')
    (tmp_path/'cgroup').write_text('8:pids:/x\n4:memory:/a/b\n0::/c/d\n')
    def moved(p='.', *more):
        p = str(p).replace('/proc/self/cgroup', str(tmp_path/'cgroup')).replace('/sys/fs/cgroup', str(tmp_path))
        return real(p, *more)
    monkeypatch.setattr(capacity, 'Path', moved)
    assert [*capacity._group_free()]==[350, 350]


def test_a_model_of_a_gguf_file_is_converted_once_for_the_same_bytes(tmp_path, monkeypatch):
    from selfalign.machine import names
    made = []
    monkeypatch.setattr(names, 'convert_gguf', lambda f, out: made.append(out) or out)
    for n in 'a', 'b':
        (tmp_path/n).mkdir()
        (tmp_path/n/'x.gguf').write_bytes(b'GGUF and more')
    (tmp_path/'b'/'y.gguf').write_bytes(b'GGUF and less')
    for f in 'a/x', 'b/x', 'b/y': resolve(str(tmp_path/f'{f}.gguf'))
    assert made[0]==made[1]!=made[2] and made[0].parent==cache_dir()
