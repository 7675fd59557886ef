"Killed at any moment and started again, a run ends as if nothing had happened. A tiny random Gemma-2, the command line, SIGKILL."
import json, os, random, signal, subprocess, sys, time

import pytest

recipe = 'model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 6\nmax_new_tokens: 48\nmargin: 0\nn_prompts: 80\nn_test: 4\nlora_r: 2\nmax_length: 400\ntrain_batch: 2\nsave_steps: 2\nbatch_size: 18\n'


def environment(): return {**os.environ, 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8'}


def selfalign(root, *args):
    return subprocess.Popen([sys.executable, '-m', 'selfalign.machine.cli', *args], cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def prepare(root, recipe=recipe):
    from selfalign.instructions import load_instructions
    from selfalign.machine.tiny import tiny
    root.mkdir()
    tiny(root/'tiny')
    (root/'r.yml').write_text(recipe)
    rows = [r['prompt'] for r in load_instructions('embedded')[0]][:100]
    (root/'q.csv').write_text('text\n'+'\n'.join(json.dumps(r, ensure_ascii=False).replace('\\"', '""') for r in rows), encoding='utf-8')
    return root


def files(root):
    "What a run leaves behind, without times and paths"
    from safetensors.numpy import load_file
    d, m = root/'data/r', root/'models/r'
    res = {f: (d/f).read_text(encoding='utf-8') for f in ('instructions.jsonl', 'candidates.jsonl', 'scores.jsonl', 'pairs.jsonl', 'answers.jsonl')}
    return res, load_file(m/'adapter_model.safetensors'), json.loads((d/'evaluation.json').read_text())['policy']


def lines(f): return f.read_bytes().splitlines(keepends=True) if f.exists() else []


def checkpoint(root):
    "Number of the last whole checkpoint"
    from selfalign.machine.trainer import last_checkpoint
    return int((last_checkpoint(root/'models/r') or '-0').split('-')[-1])


def progress(root, step):
    "How far a step has come: whole rows on the disk, or steps of training"
    return checkpoint(root) if step=='dpo' else sum(l.endswith(b'\n') for l in lines(root/f'data/r/{kept[step]}'))


kept = dict(candidates='candidates.rows.jsonl', judge='scores.rows.jsonl')


def killed(root, step, rng, sooner):
    "Start the run and kill it: when it has come further in the step, or sooner (as soon as it says the step's name), and a moment later"
    p, had, t = selfalign(root, 'run', 'r.yml'), progress(root, step), time.time()
    for l in p.stdout:
        if l.startswith(f'{step:<11} ...'): break
    while p.poll() is None and not sooner and progress(root, step)<=had: assert time.time()-t<120; time.sleep(.01)
    time.sleep(rng.random()*(1. if sooner else .2))
    p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    return p.returncode==-signal.SIGKILL


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = prepare(tmp_path_factory.mktemp('kill')/'whole')
    p = selfalign(root, 'run', 'r.yml')
    out, _ = p.communicate(timeout=600)
    assert p.returncode==0, out[-3000:]
    return root


def test_killed_at_twenty_moments(whole, tmp_path):
    import numpy as np
    root, rng, seen = prepare(tmp_path/'cut'), random.Random(0), dict.fromkeys(kept, [])
    for step,times in dict(candidates=8, judge=5, dpo=7).items():
        for i in range(times):
            at = checkpoint(root)
            assert killed(root, step, rng, sooner=i%3==2), step
            for s,f in kept.items():  # nothing on the disk is done again
                now = lines(root/'data/r'/f)
                before, seen[s] = seen[s], [l for l in now if l.endswith(b'\n')]
                assert seen[s][:len(before)]==before
            assert checkpoint(root)>=at
        print(step, {s: len(v) for s,v in seen.items()}, 'training step', checkpoint(root))
    at = checkpoint(root)
    out, _ = (p := selfalign(root, 'run', 'r.yml')).communicate(timeout=600)
    assert p.returncode==0, out[-3000:]
    for f in kept.values():
        keys = [json.loads(l)['key'] for l in lines(root/'data/r'/f)]
        assert len(keys)==len(set(keys))==len(lines(whole/'data/r'/f))
    assert at and json.loads((root/'models/r/run.json').read_text())['resumed_from']==f'checkpoint-{at}'
    (a, wa, ea), (b, wb, eb) = files(whole), files(root)
    for f in a: assert a[f]==b[f], f
    for k in wa: assert np.allclose(wa[k], wb[k], atol=1e-6), k
    assert ea==eb


def test_a_second_process_does_not_write_into_the_same_folder(whole):
    from filelock import FileLock
    with FileLock(whole/'data/r/.lock'):
        p = selfalign(whole, 'pairs', 'r.yml')
        out, _ = p.communicate(timeout=120)
    why, *rest = out.strip().splitlines()  # one line why not, before anything is begun
    assert p.returncode==2 and not rest and 'another selfalign is at work' in why
