"""The supply chain: keys of the environment and of the hub's login reach no file, log or message, whatever runs and whatever
fails; no code, no pickles; licences of what is installed. A tiny random model, a fake server on loopback, no network."""
import ast, base64, csv, json, os, re, subprocess, sys, urllib.parse
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import licences
from fake_server import Fake
from selfalign.llm import load
from selfalign.machine.clean import clean_message, secrets
from selfalign.machine.tiny import tiny

package = Path(__file__).resolve().parent.parent/'selfalign'
names = ('HF_TOKEN', 'SELFALIGN_API_KEY', 'OPENAI_API_KEY', 'WANDB_API_KEY', 'HUGGING_FACE_HUB_TOKEN', 'COMET_API_KEY')
canaries = {k: f'canary-{i}-{"q7Zt"*6}' for i,k in enumerate(names)}
canaries['login'] = 'hf_canaryL0g1nQ7ZtQ7ZtQ7Zt'
recipe = ('model: tiny\ndata: q.csv\njudge: mix\nsamples: 3\nmax_new_tokens: 8\nmargin: 0\nn_prompts: 8\nn_test: 3\nlora_r: 2\n'
          'max_length: 400\ntrain_batch: 2\nbatch_size: 8\n')


def forms(secret):
    "A secret as it may be written"
    b = secret.encode()
    return {b, base64.b64encode(b), urllib.parse.quote(secret, safe='').encode(), b.hex().encode()}


def leaks(*texts, folders=()):
    "Where a canary is found"
    found = []
    for where,data in [*((f'text {i}', t.encode()) for i,t in enumerate(texts)), *((str(f), f.read_bytes()) for d in folders for f in d.rglob('*')
                       if f.is_file() and f.name!='the-login')]:
        found += [(where, k) for k,v in canaries.items() for s in forms(v) if s in data]
    return found


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "A folder to work in, a home with a login, and the keys in the environment"
    root, home = (tmp_path_factory.mktemp(n) for n in ('root', 'home'))
    tiny(root/'tiny', digits=.5)
    (root/'r.yml').write_text(recipe)
    questions = [f'Почему {w} бывает {v}?' for w in ('небо', 'море', 'снег', 'лист') for v in ('синим', 'белым', 'тихим', 'разным')]
    with open(root/'q.csv', 'w', encoding='utf-8', newline='') as f: csv.writer(f).writerows([['text'], *[[q] for q in questions]])
    (home/'hf').mkdir()
    (home/'the-login').write_text(canaries['login'])
    env = {k: v for k,v in os.environ.items() if not k.startswith(('HF_', 'SELFALIGN'))} | {k: canaries[k] for k in names}
    env |= dict(HOME=str(home), XDG_CACHE_HOME=str(home/'cache'), HF_HOME=str(home/'hf'), HF_TOKEN_PATH=str(home/'the-login'), HF_HUB_OFFLINE='1',
                TQDM_DISABLE='1', OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', WANDB_MODE='offline', OPENAI_LOG='debug')
    return root, home, env


def say(house, *args, code=0):
    "What a command says"
    root, _, env = house
    p = subprocess.run([sys.executable, '-m', 'selfalign.machine.cli', *args], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode==code, (args, p.stdout[-1500:], p.stderr[-1500:])
    return p.stdout+p.stderr


def test_a_run_tells_no_key(house):
    out = say(house, 'run', 'r.yml')
    assert (house[0]/'data/r/report.md').exists() and (house[0]/'models/r/run.json').exists()
    assert not leaks(out, folders=house[:2])


@pytest.mark.parametrize('args', [
    ['run', 'r.yml', '--data', 'org/no-such-data'], ['ask', 'Кто?', '--model', 'org/no-such-model'], ['run', 'r.yml', '--set', 'report_to=wandb'],
    ['ask', 'Кто?', '--model', 'tiny', '--device', 'meta'], ['run', 'no-such-recipe', '--debug'],
    ['candidates', 'r.yml', '--server', 'http://127.0.0.1:9'], ['candidates', 'r.yml', '--server', f'http://me:{canaries["WANDB_API_KEY"]}@127.0.0.1:9'],
    ['run', 'r.yml', '--set', 'name=other bertscore=org/no-such-bert']], ids=lambda a: ' '.join(a).split(' --')[-1][:24])
def test_an_error_tells_no_key(house, args):
    root, _, env = house
    p = subprocess.run([sys.executable, '-m', 'selfalign.machine.cli', *args], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode, p.stdout[-1500:]
    assert not leaks(p.stdout+p.stderr, folders=house[:2])


@pytest.mark.parametrize('fault', ['rude', 'echo', 401])
def test_a_server_that_repeats_the_key_tells_it_to_nobody(house, fault):
    "It gets one of them, in one header, and repeats it"
    root = house[0]
    f = Fake(load(root/'tiny', device='cpu'))
    f.fault = lambda n, body: fault if n%2 else None
    try:
        name = f'server-{fault}'.lower()
        (root/f'{name}.yml').write_text(recipe)
        say(house, 'data', f'{name}.yml')
        out = say(house, 'candidates', f'{name}.yml', '--server', f.url, code=2 if fault in ('rude', 401) else 0)
    finally: f.shutdown()
    assert {h.get('authorization') for h in f.heads}=={f'Bearer {canaries["SELFALIGN_API_KEY"]}'}
    assert not leaks(json.dumps(f.bodies), out, folders=house[:2])
    sent = [{k: v for k,v in h.items() if k!='authorization'} for h in f.heads]
    assert not leaks(json.dumps(sent))
    if fault=='echo': assert '[key]' in (root/f'data/{name}/candidates.jsonl').read_text()


def test_keys_are_known_by_name_and_by_shape(monkeypatch, tmp_path):
    for k in names: monkeypatch.setenv(k, canaries[k])
    (tmp_path/'token').write_text(canaries['login']+'\n')
    monkeypatch.setenv('HF_TOKEN_PATH', str(tmp_path/'token'))
    assert {*secrets()}>={*canaries.values()}
    for v in canaries.values(): assert clean_message(f'a {v[:9]}\x1b[0m{v[9:]} b')=='a [key] b' and v[:12] not in clean_message('x'*10+v, 20)
    assert clean_message('Authorization: Bearer eyJhbGciOi.x, sk-proj-abcdefghijklmnop')=='Authorization: [key], [key]'
    assert clean_message('data/sk_instructions_2024.csv: no such file; hf_abcdefghijklmnop.')=='data/sk_instructions_2024.csv: no such file; [key].'


# what is read as data stays data

def calls(name):
    "Every call of a method of that name in the package: file, line, source"
    for f in sorted(package.rglob('*.py')):
        src = f.read_text(encoding='utf-8')
        for n in ast.walk(ast.parse(src)):
            if isinstance(n, ast.Call) and getattr(n.func, 'attr', getattr(n.func, 'id', ''))==name:
                yield f.name, n.lineno, ast.get_source_segment(src, n)


def test_every_model_is_read_without_its_authors_code():
    "`hub_args` says `trust_remote_code=False`; peft and the settings of sampling have no code of their own"
    found = [*calls('from_pretrained')]
    assert len(found)>=6
    open_ = [c for c in found if not any(s in c[2] for s in ('hub_args(', '**args', 'PeftModel', 'GenerationConfig', 'trust_remote_code=False'))]
    assert not open_, open_


@pytest.mark.parametrize('name', ['eval', 'exec', 'system', 'popen', 'Unpickler', '__import__'])
def test_nothing_is_executed(name): assert not [c for c in calls(name) if not c[2].startswith(('re.', 'm.eval', 'self.model.eval', 'model.eval'))]


def test_no_pickles():
    for f in package.rglob('*.py'):
        src = f.read_text(encoding='utf-8')
        assert not re.search(r'import pickle|torch\.load\(|trust_remote_code=True|yaml\.load\((?!.*SafeLoader)', src), f


# licences

def test_every_licence_is_known():
    rows = licences.table()
    assert len(rows)>50 and {'torch', 'transformers', 'openai', 'peft'}<={r[0] for r in rows}
    assert not [r for r in rows if not licences.allowed(r[0], r[2])]


@pytest.mark.parametrize('text,ok', [('MIT', True), ('Apache-2.0 AND MIT', True), ('AGPL-3.0-only', False), ('', False), ('MIT OR GPL-3.0', True),
                                     ('MIT AND GPL-3.0', False), ('Apache-2.0 OR BSD-3-Clause', True), ('Proprietary', False)])
def test_a_licence_that_is_neither_permissive_nor_known_fails(text, ok): assert licences.allowed('some-package', text)==ok
