"Killed at any moment and started again, a run ends as if nothing had happened. A tiny random Gemma-2, the command line, SIGKILL."
import json, os, random, signal, subprocess, sys, time

import pytest

recipe = 'model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 3\nmax_new_tokens: 60\nmargin: 0\nn_prompts: 12\nn_test: 4\nlora_r: 2\nmax_length: 400\ntrain_batch: 2\nepochs: 3\nsave_steps: 2\nbatch_size: 6\n'


def environment(): return {**os.environ, 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8'}


def selfalign(root, *args):
    return subprocess.Popen([sys.executable, '-m', 'selfalign.run', *args], cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def prepare(root, recipe=recipe):
    from selfalign.data import load_instructions
    from selfalign.llm import tiny
    root.mkdir()
    tiny(root/'tiny')
    (root/'r.yml').write_text(recipe)
    rows = [r['prompt'] for r in load_instructions('embedded')[0]][:30]
    (root/'q.csv').write_text('text\n'+'\n'.join(json.dumps(r, ensure_ascii=False).replace('\\"', '""') for r in rows), encoding='utf-8')
    return root


def files(root):
    "What a run leaves behind, without times and paths"
    from safetensors.numpy import load_file
    d, m = root/'data/r', root/'models/r'
    res = {f: (d/f).read_text(encoding='utf-8') for f in ('instructions.jsonl', 'candidates.jsonl', 'scores.jsonl', 'pairs.jsonl', 'answers.jsonl')}
    return res, load_file(m/'adapter_model.safetensors'), json.loads((d/'evaluation.json').read_text())['policy']


def wait_for(p, root, files, timeout=240):
    "Until one of the files is there, or the process has ended"
    t = time.time()
    while p.poll() is None and not any((root/f).exists() for f in files):
        assert time.time()-t<timeout
        time.sleep(.05)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = prepare(tmp_path_factory.mktemp('kill')/'whole')
    p = selfalign(root, 'run', 'r.yml')
    out, _ = p.communicate(timeout=600)
    assert p.returncode==0, out[-3000:]
    return root


def test_killed_in_every_step(whole, tmp_path):
    import numpy as np
    root, rng = prepare(tmp_path/'cut'), random.Random(0)
    for step in (['data/r/candidates.jsonl.part'], ['data/r/scores.jsonl.part'], ['models/r/checkpoints/checkpoint-4'], ['data/r/answers_reference.jsonl.part', 'data/r/answers_reference.jsonl']):
        p = selfalign(root, 'run', 'r.yml')
        wait_for(p, root, step)
        time.sleep(rng.random()*.3)
        p.send_signal(signal.SIGKILL); p.wait()
    p = selfalign(root, 'run', 'r.yml')
    out, _ = p.communicate(timeout=600)
    assert p.returncode==0, out[-3000:]
    (a, wa, ea), (b, wb, eb) = files(whole), files(root)
    for f in a: assert a[f]==b[f], f
    for k in wa: assert np.allclose(wa[k], wb[k], atol=1e-6), k
    assert ea==eb


def test_a_second_process_does_not_write_into_the_same_folder(whole):
    from filelock import FileLock
    with FileLock(whole/'data/r/.lock'):
        p = selfalign(whole, 'pairs', 'r.yml')
        out, _ = p.communicate(timeout=120)
    step, *rest = out.strip().splitlines()  # the step it was about to do, and one line why not
    assert p.returncode==2 and step.startswith('pairs') and len(rest)==1 and 'another selfalign is at work' in rest[0]
