"""What the command line says to bad input: every entry of `.ci/bad_inputs/*.yml` is a case.

A case has a name (`case`) and one of
  run      a command without `selfalign`, done in this process
  shell    lines for bash, where `selfalign` is the command line; for limits, pipes and terminals
and, as needed,
  files    name: text, or {b64: ...}, {json: ...}, {rows: [...]} (JSON Lines), {recipe: {...}} (over the base recipe),
           {repeat: [text, times]}, {folder: true}, {copy: name}, {gone: true}, {tiny: {width: 64}} (a model, by the arguments of `tiny`)
  env      environment variables; empty text removes one
  stdin    what the command reads
  server   what a server on loopback answers: a list of [status, body], the last one for ever; its address is {server}
  signal   INT or TERM, to the command of `shell`, as soon as the file `when` is there
  needs    `mount` or `fewer_rights`: what the machine must allow, or the case is left out
  code     the exit code, 2 unless given
  says     a pattern that the one line on standard error must match; null: nothing may be said
  traceback  true: there must be one before that line
  writes   a file that must be there afterwards
Whatever happens: no traceback, and no file of the finished run beside it, `data/mine` and `models/mine`, changes."""
import base64, io, json, os, re, shlex, shutil, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest, yaml

here = Path(__file__).parent
cases = [dict(c, file=f.stem) for f in sorted((here/'bad_inputs').glob('*.yml')) for c in yaml.safe_load(f.read_text(encoding='utf-8'))]
base = dict(model='tiny', data='q.csv', judge='likelihood', samples=3, max_new_tokens=24, margin=0, n_prompts=6, n_test=4, lora_r=2,
            max_length=400, train_batch=2, near_duplicate=1, epochs=1)
quiet = dict(HF_HUB_OFFLINE='1', TQDM_DISABLE='1', OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8')
asks = [f'Как правильно {v} {o}?' for v in ('варить', 'хранить', 'мыть', 'резать') for o in 'рис лук сыр хлеб рыбу суп'.split()]  # how does one boil (store, wash, cut) rice (onions ...)?


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "A tiny model, a table, a recipe, and a finished run of it called mine"
    from selfalign.machine.cli import main
    from selfalign.machine.tiny import tiny
    d = tmp_path_factory.mktemp('home')
    (d/'q.csv').write_text('text\n'+'\n'.join(asks)+'\n', encoding='utf-8')
    for name in ('mine', 'r'): (d/f'{name}.yml').write_text(yaml.safe_dump(base, allow_unicode=True))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(d)
        for k,v in quiet.items(): m.setenv(k, v)
        m.setenv('HF_HUB_DISABLE_PROGRESS_BARS', '1')
        tiny(d/'tiny')
        assert main(['run', 'mine.yml'])==0
    return d


def put(path, what):
    "Write a file of a case"
    if isinstance(what, str): return path.write_text(what, encoding='utf-8')
    (kind, v), = what.items()
    if kind=='folder': return path.mkdir()
    if kind=='gone': return path.unlink()
    if kind=='copy': return (shutil.copytree if (path.parent/v).is_dir() else shutil.copy)(path.parent/v, path)
    if kind=='b64': return path.write_bytes(base64.b64decode(v))
    if kind=='tiny': from selfalign.machine.tiny import tiny; return tiny(path, **v)
    text = dict(json=lambda: json.dumps(v, ensure_ascii=False), repeat=lambda: v[0]*v[1], recipe=lambda: yaml.safe_dump({**base, **v}, allow_unicode=True),
                rows=lambda: '\n'.join(json.dumps(r) for r in v)+'\n')[kind]()
    path.write_text(text, encoding='utf-8')


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    "A folder of its own with the same files, to work in"
    shutil.copytree(home, tmp_path/'w', symlinks=True, ignore=lambda d,_: ['tiny'] if d==str(home) else [])
    (tmp_path/'w/tiny').symlink_to(home/'tiny')
    monkeypatch.chdir(tmp_path/'w')
    for k,v in quiet.items(): monkeypatch.setenv(k, v)
    for k in ('OPENAI_API_KEY', 'SELFALIGN_API_KEY', 'SELFALIGN_DEBUG'): monkeypatch.delenv(k, raising=False)
    return tmp_path/'w'


def kept(d): return {str(p.relative_to(d)): p.read_bytes() for w in ('data/mine', 'models/mine') for p in sorted((d/w).rglob('*')) if p.is_file() and not p.name.startswith('.')}


def serve(replies):
    "A server that gives these replies in turn, and the last one for ever"
    left = list(replies)
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get('content-length') or 0))
            status, body = left.pop(0) if len(left)>1 else left[0]
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status); self.send_header('content-length', str(len(data))); self.end_headers(); self.wfile.write(data)
        do_GET = do_POST
        def log_message(self, *_): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.handle_error = lambda *_: None  # a client that hangs up is not the server's mistake
    threading.Thread(target=s.serve_forever, args=(.05,), daemon=True).start()
    return s


def can(what):
    "Does this machine allow it?"
    if what=='fewer_rights': return os.geteuid()!=0
    return not what or subprocess.run(['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True).returncode==0


def in_shell(c, place):
    "Exit code and standard error of lines for bash"
    intro = f'set -o pipefail; selfalign() {{ {shlex.quote(sys.executable)} -m selfalign.machine.cli "$@"; }}; export -f selfalign; python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    run = dict(executable='/bin/bash', shell=True, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if 'signal' not in c: r = subprocess.run(intro+c['shell'], timeout=120, **run); return r.returncode, r.stderr
    p = subprocess.Popen([sys.executable, '-m', 'selfalign.machine.cli', *shlex.split(c['shell'])], cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.time()+60
    while not list(place.glob(c['when'])) and p.poll() is None and time.time()<end: time.sleep(.02)
    p.send_signal(getattr(signal, f'SIG{c["signal"]}'))
    err = p.communicate(timeout=60)[1]
    return p.returncode, err


@pytest.mark.parametrize('c', cases, ids=lambda c: f'{c["file"]}: {c["case"]}')
def test_bad_input(c, place, capfd, monkeypatch):
    from selfalign.machine.cli import main
    if not can(c.get('needs')): pytest.skip(f'not allowed here: {c["needs"]}')
    for name,what in c.get('files', {}).items(): (place/name).parent.mkdir(parents=True, exist_ok=True); put(place/name, what)
    for k,v in c.get('env', {}).items(): monkeypatch.setenv(k, v) if v else monkeypatch.delenv(k, raising=False)
    before, server = kept(place), serve(c['server']) if 'server' in c else None
    try:
        url = f'http://127.0.0.1:{server.server_address[1]}' if server else ''
        if '--server' in c.get('run', ''): monkeypatch.setattr('selfalign.machine.client.retry_delay', lambda *_: None)  # or it would ask again for half a minute
        if 'stdin' in c: monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(c['stdin'].encode('latin-1'))))
        if 'run' in c: code, err = main(shlex.split(c['run'].replace('{server}', url))), capfd.readouterr().err
        else: code, err = in_shell(c, place)
    finally: server and (server.shutdown(), server.server_close())
    lines, want = [l for l in err.splitlines() if l.strip()], c.get('code', 2)
    assert code==want and ('Traceback' in err)==c.get('traceback', False), (code, err[-3000:])
    if c.get('traceback'): lines = lines[-1:]
    if c.get('says') is None: assert not lines, err
    else: assert len(lines)==1 and lines[0].startswith('selfalign: ') and re.search(c['says'], lines[0]), err[-3000:]
    assert {k: v for k,v in kept(place).items() if k in before}==before
    if 'writes' in c: assert list(place.glob(c['writes']))


def test_there_are_many_and_each_has_a_name_of_its_own():
    names = [(c['file'], c['case']) for c in cases]
    assert len(cases)>=200 and len(set(names))==len(names)


def test_a_card_says_how_its_run_is_repeated(place, capfd):
    from selfalign.machine.cli import main
    command = re.search('Reproduce: `selfalign ([^`]+)`', (place/'models/mine/README.md').read_text(encoding='utf-8'))[1]
    assert command=='run data/mine' and main(command.split())==0 and capfd.readouterr().out.count('finished before')==8
