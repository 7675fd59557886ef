"""Inputs by the thousand: the checks of `test_properties.py` on random inputs, and real files with changed bytes.

`python .ci/fuzz.py --seconds 60 --seed 0 [--only parquet gguf] [--out .ci/reliability.json]`. Nothing but `BadInput` may be
raised, no process may die, no input may take a minute. Each target runs in a process of its own, so that a crash of a
library is seen too. The inputs of a target depend on the seed and their number alone. Exit code 1 if anything was found."""
import argparse, contextlib, io, json, multiprocessing, os, random, resource, shutil, sys, tempfile, time, traceback, warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TQDM_DISABLE='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', TRANSFORMERS_VERBOSITY='critical')
sys.path.insert(0, str(Path(__file__).parent))
from hypothesis import Phase, given, seed as with_seed
import test_properties as tp
from selfalign.machine.files import BadInput

SLOW, MEMORY = 60., 12<<30  # seconds an input may take; bytes a target may map


# Changed bytes

tokens = [b'', b'\0', b'\xff', b'\n', b'"', b"'", b',', b';', b'\t', b'{', b'}', b'[', b'[[[[[[[[', b']', b':', b'null', b'NaN', b'1e999', b'-1', b'9'*40, b'true', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\\ud800',
          b'../', b'<script>', b'&a', b'*a', b'!!int ', b'- ', b'\xff\xff\xff\xff\xff\xff\xff\x7f', b'\0\0\0\0\0\0\0\x80', 'ё'.encode(), b'\x1b[31m']


def mutated(data, rng, head=0):
    "Some bytes with one to four changes, most of them in the first `head`"
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        n = min(len(data), head) if head and rng.random()<.9 else len(data)
        i, k = rng.randrange(n+1), rng.randint(1, 16)
        what = rng.randrange(7)
        if what==0: data[i:i+1] = bytes([rng.randrange(256)])
        elif what==1: data[i:i+1] = bytes([(data[i] if i<len(data) else 0)^(1<<rng.randrange(8))])
        elif what==2: del data[i:i+k]
        elif what==3: data[i:i] = data[i:i+k]*rng.choice([1, 1, 2, 50])
        elif what==4: data[i:i+rng.choice([0, 0, k])] = rng.choice(tokens)
        elif what==5: data = data[:i] if rng.random()<.3 else data[:i]+data[i+rng.randint(0, 200):]
        else: j = rng.randrange(n+1); data[i:i+k] = data[j:j+k]
    return bytes(data)


# Targets: a function of a folder that prepares one and returns a function of a random generator, called for each input

TARGETS = {}


def target(f): TARGETS[f.__name__] = f; return f


def files_of(folder, seeds, read, head=0):
    "Read changed copies of files: name to bytes"
    names = sorted(seeds)
    def one(rng):
        n = rng.choice(names)
        data = mutated(seeds[n], rng, head)
        (folder/n).write_bytes(data)
        yield data
        read(folder/n)
    return one


def instructions():
    from selfalign.machine.files import read_jsonl, repo_file
    from selfalign.machine.messages import EMBEDDED
    return read_jsonl(repo_file(EMBEDDED))[:12]


def usable(f):
    from selfalign.instructions import InstructionSettings, load_instructions
    rows, funnel = load_instructions(f, None, InstructionSettings(min_chars=1))
    assert len(rows)==funnel[-1]['kept']
    return rows


@target
def csv(folder):
    texts = '\n'.join('"'+r['text'].replace('"', '""')+'",'+str(i) for i,r in enumerate(instructions()))
    return files_of(folder, {'a.csv': f'text,rank\n{texts}\n'.encode(), 'b.csv': f'prompt;answer\n{texts}\n'.replace(',', ';').encode('cp1251', 'replace')}, usable)


@target
def jsonl(folder):
    import gzip
    data = ''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in instructions()).encode()
    tree = json.dumps(dict(message_tree_id='t', prompt=dict(message_id='t', text='Зачем?', role='prompter', replies=[dict(message_id='u', text='Так', rank=0, replies=[])]))).encode()
    return files_of(folder, {'a.jsonl': data, 'b.jsonl.gz': gzip.compress(data, mtime=0), 'c.jsonl': tree*3}, usable)


@target
def json_tables(folder):
    squad = dict(data=[dict(title='t', paragraphs=[dict(context='Столица России - Москва.', qas=[dict(id=str(i), question=f'Столица {i}?', answers=[dict(text='Москва', answer_start=0)]) for i in range(3)])])])
    rows = [dict(instruction='Назови', input='столицу', output='Москва', gold=['Москва'])]*2
    return files_of(folder, {'a.json': json.dumps(squad, ensure_ascii=False).encode(), 'b.json': json.dumps(rows).encode()}, usable)


@target
def parquet(folder):
    import pandas as pd
    pd.DataFrame(instructions())[['text', 'role', 'message_id', 'lang']].to_parquet(folder/'x.parquet')
    pd.DataFrame(dict(prompt=['а', 'б'], gold=[['в'], ['г', 'д']])).to_parquet(folder/'y.parquet', compression=None)
    return files_of(folder, {f'{n}.parquet': (folder/f'{n}.parquet').read_bytes() for n in 'xy'}, usable)


@target
def yaml(folder):
    from selfalign.machine.files import package_file
    from selfalign.recipe import read_recipe
    from selfalign.style import load_style
    seeds = {f'{n}.yml': package_file(f'styles/{n}.yml').read_bytes() for n in ('brief-ru', 'brief-en', 'formal-ru')}
    seeds.update({f'r-{n}.yml': package_file(f'recipes/{n}.yml').read_bytes() for n in ('brief', 'quickstart', 'gemma-2-2b-it')})
    return files_of(folder, seeds, lambda f: (read_recipe if f.name.startswith('r-') else load_style)(str(f)))


def tiny_gguf(path, width=32, heads=2):
    "A Llama of one layer in a GGUF file"
    import gguf, numpy as np
    w, rng = gguf.GGUFWriter(path, 'llama'), np.random.default_rng(0)
    w.add_context_length(128); w.add_embedding_length(width); w.add_block_count(1); w.add_feed_forward_length(2*width)
    w.add_head_count(heads); w.add_head_count_kv(heads); w.add_layer_norm_rms_eps(1e-6); w.add_rope_dimension_count(width//heads)
    letters = [*map(chr, range(97, 123))]
    toks = ['<unk>', '<s>', '</s>', *letters, *(a+b for a in letters[:5] for b in letters[:7])]
    w.add_vocab_size(len(toks)); w.add_tokenizer_model('gpt2'); w.add_token_list(toks)
    w.add_token_merges([f'{t[0]} {t[1]}' for t in toks if len(t)==2]); w.add_bos_token_id(1); w.add_eos_token_id(2)
    square = {f'blk.0.attn_{n}': (width, width) for n in ('q', 'k', 'v', 'output')}
    shapes = {'token_embd': (len(toks), width), 'output_norm': (width,), 'output': (len(toks), width), 'blk.0.attn_norm': (width,), 'blk.0.ffn_norm': (width,), **square,
              'blk.0.ffn_gate': (2*width, width), 'blk.0.ffn_up': (2*width, width), 'blk.0.ffn_down': (width, 2*width)}
    for n,s in shapes.items(): w.add_tensor(f'{n}.weight', rng.normal(0, .02, s).astype(np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


@target
def gguf(folder):
    from selfalign.machine.names import convert_gguf
    def read(f):
        shutil.rmtree(folder/'out', ignore_errors=True)
        convert_gguf(str(f), folder/'out')
    read(tiny_gguf(folder/'tiny.gguf'))
    return files_of(folder, {'m.gguf': (folder/'tiny.gguf').read_bytes()}, read, head=2500)


@target
def model_folder(folder):
    "safetensors, config, tokenizer and template of a model, changed one at a time"
    from selfalign.llm import load
    from selfalign.machine.tiny import tiny
    whole = tiny(folder/'whole')
    names = ['model.safetensors', 'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']
    def one(rng):
        n = rng.choice(names)
        data = mutated((whole/n).read_bytes(), rng, 2500)
        shutil.rmtree(folder/'m', ignore_errors=True)
        shutil.copytree(whole, folder/'m')
        (folder/'m'/n).write_bytes(data)
        yield n.encode()+b': '+data
        llm = load(str(folder/'m'), device='cpu')
        llm.render('Зачем?')
    return one


@target
def run_json(folder):
    "The record of a finished run, its audit, its adapter's configuration and the files of its steps"
    from selfalign.recipe import read_recipe
    from selfalign.run import Run, run_all
    from test_kill import prepare
    root = prepare(folder/'run', tp.recipe)
    os.chdir(root)
    run_all(Run(read_recipe('r.yml')))
    shutil.copytree(root, folder/'kept')
    audit = dict(judge='tiny', model='', fingerprint='', style=dict(name='brief-ru', digest=''), mix={'Краткость': .5}, mode='mix', methods={}, criteria={}, findings=[])
    (folder/'kept/data/r/audit.json').write_text(json.dumps(audit, ensure_ascii=False))
    names = ['data/r/run.json']*3+['data/r/audit.json']*2+['models/r/adapter_config.json', 'models/r/run.json', 'data/r/instructions.jsonl', 'data/r/scores.jsonl', 'data/r/answers_graded.jsonl', 'data/r/evaluation.json', 'q.csv']
    def one(rng):
        n = rng.choice(names)
        data = mutated((folder/'kept'/n).read_bytes(), rng)
        shutil.rmtree(root); shutil.copytree(folder/'kept', root); os.chdir(root)
        (root/n).write_bytes(data)
        yield n.encode()+b': '+data
        from selfalign.machine.commands import _finished
        run = Run(read_recipe('r.yml', judge=rng.choice(['likelihood', 'mix'])))
        if hasattr(run, 'plan'): run.plan()
        run.mix()
        _finished('r', 'answers_graded.jsonl', '.')
    return one


@target
def verdicts(folder):
    from selfalign.people import read_verdicts, sheet_digest
    o = dict(person='Аня', sheet=sheet_digest(tp.sheet()), verdicts=dict(a='left', b='tie', c='right'))
    return files_of(folder, {'v.json': json.dumps(o, ensure_ascii=False).encode()}, lambda f: read_verdicts(f, tp.sheet()))


@target
def replies(folder):
    "Replies of a server: every one is changed, whatever is asked"
    import fake_server as fs
    from selfalign.judge import DIGITS, judge_prompts
    from selfalign.llm import load
    from selfalign.machine.sampling import Sampling
    from selfalign.machine.server import Server
    from selfalign.machine.tiny import tiny
    model, change, seen = tiny(folder/'tiny'), [None], []
    llm = load(str(model), device='cpu')
    true = fs.Handler.reply
    def reply(self, o, code=200, **headers):
        data = o if isinstance(o, bytes) else json.dumps(o).encode()
        if change[0] and self.command=='POST': seen.append(data := mutated(data, change[0]))
        return true(self, data, code, **headers)
    fs.Handler.reply = reply
    fake = fs.Fake(llm)
    s = Server(fake.url, str(model), pause=.001, tries=1, timeout=8.)
    ps, greedy = [llm.render('Привет!')], Sampling(temperature=0, repetition_penalty=1., max_new_tokens=4)
    head, tails = judge_prompts(llm, 'Зачем?', 'Так', tp.scale('brief-ru'))
    asks = [lambda: s.generate(ps, 1, greedy), lambda: s.choice_probs([head], tails[:1], DIGITS), lambda: s.logprobs(ps, ['да'])]
    def one(rng):
        seen.clear()
        change[0], ask = rng, rng.choice(asks)
        yield b''
        try:
            with contextlib.redirect_stderr(io.StringIO()): ask()
        except BaseException as e: e.add_note(repr(seen[-1:])[:300]); raise
        finally: change[0] = None
    return one


# Running

def where(e):
    "The kind of an error and the last line of ours on the way to it"
    if isinstance(e, BaseExceptionGroup): return ' + '.join(sorted({where(x) for x in e.exceptions}))
    ours = [f for f in traceback.extract_tb(e.__traceback__) if '/selfalign/' in f.filename or 'test_properties' in f.filename]
    at = f'{Path(ours[-1].filename).name}:{ours[-1].lineno}' if ours else '?'
    return f'{type(e).__name__} at {at}'


class Tally:
    "What a target has done: inputs, seconds, the slowest, and each kind of finding once, with an input"
    def __init__(self): self.n, self.seconds, self.slowest, self.refused, self.found = 0, 0., 0., 0, {}
    def add(self, seconds, e=None, data=b''):
        self.n += 1
        self.seconds += seconds
        self.slowest = max(self.slowest, seconds)
        if seconds>SLOW: self.found.setdefault(f'{seconds:.0f} s for an input', repr(data)[:300])
        if isinstance(e, BadInput): self.refused += 1
        elif e is not None: self.found.setdefault(where(e), f'{str(e)[:120]} ... {data!r} {" ".join(getattr(e, "__notes__", []))}'[:400])


def run_files(make, folder, n, seconds, seed, tally):
    "Changed files until the time is over"
    one, i = make(folder), 0
    end = time.time()+seconds
    while time.time()<end:
        rng, data, e, t = random.Random(f'{seed}:{n}:{i}'), b'', None, time.time()
        try:
            for x in one(rng): data = x
        except (KeyboardInterrupt, SystemExit): raise
        except BaseException as x: e = x  # Rust's panics too
        tally.add(time.time()-t, e, data)
        i += 1


def run_property(name, seconds, seed, tally):
    "A property on random inputs until the time is over"
    strategy, check, _ = tp.PROPERTIES[name]
    end, k = time.time()+seconds, 0
    def one(case):
        t, e = time.time(), None
        try: check(case)
        except Exception as x: e = x
        tally.add(time.time()-t, e, case)
    while time.time()<end:
        with_seed(seed*10**6+k)(tp.profile(50, phases=[Phase.generate])(given(strategy)(one)))()
        k += 1


def work(name, seconds, seed, pipe):
    "One target, in a process of its own"
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder, tally = Path(tempfile.mkdtemp(prefix=f'fuzz-{name}-')), Tally()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if name in TARGETS: run_files(TARGETS[name], folder, name, seconds, seed, tally)
            else: run_property(name, seconds, seed, tally)
        pipe.send(dict(inputs=tally.n, seconds=round(tally.seconds, 1), refused=tally.refused, slowest=round(tally.slowest, 2), found=tally.found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def fuzz(name, seconds, seed):
    "The figures of one target; a process that dies is a finding"
    ours, its = multiprocessing.Pipe(False)
    p = multiprocessing.get_context('fork').Process(target=work, args=(name, seconds, seed, its))
    p.start(); its.close()
    try: res = ours.recv() if ours.poll(seconds+240) else None
    except EOFError: res = None
    p.join(5)
    if res is None:
        why = f'the process died ({p.exitcode})' if p.exitcode is not None else 'the process hung'
        if p.is_alive(): p.kill(); p.join()
        res = dict(inputs=0, seconds=seconds, refused=0, slowest=0, found={why: ''})
    return res


def main():
    a = argparse.ArgumentParser()
    a.add_argument('--seconds', type=float, default=60, help='for all targets together')
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--only', nargs='*', help='names of targets')
    a.add_argument('--out', help='JSON file that keeps the figures, beside what is there')
    a = a.parse_args()
    names = a.only or [*TARGETS, *tp.PROPERTIES]
    res, t = {}, time.time()
    for n in names:
        res[n] = r = fuzz(n, a.seconds/len(names), a.seed)
        print(f'{n:<45} {r["inputs"]:>8} inputs {r["refused"]:>8} refused {r["seconds"]:>7.1f} s  slowest {r["slowest"]:.2f} s  {len(r["found"])} found', flush=True)
        for k,v in r['found'].items(): print('   ', k, '\n       ', v, flush=True)
    total, found = sum(r['inputs'] for r in res.values()), sum(len(r['found']) for r in res.values())
    print(f'{total} inputs, {time.time()-t:.0f} s, {found} found')
    if a.out:
        f = Path(a.out)
        old = json.loads(f.read_text(encoding='utf-8')) if f.exists() else {}
        about = dict(seed=a.seed, seconds=round(time.time()-t), inputs=total, targets=res)
        f.write_text(json.dumps({**old, 'fuzz': about}, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    return 1 if found else 0


if __name__=='__main__': sys.exit(main())
