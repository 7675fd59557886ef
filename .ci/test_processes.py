"Two processes of `accelerate launch` (CPU, gloo) and one make the same files and the same adapter; a failure of one ends both. A tiny random Gemma-2."
import socket, subprocess, sys, time

import pytest

from test_kill import environment, files, prepare, selfalign

recipe = 'model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 3\nmax_new_tokens: 40\nmargin: 0\nn_prompts: 13\nn_test: 4\nlora_r: 2\nmax_length: 400\ntrain_batch: 2\nmicro_batch: 1\nepochs: 2\nsave_steps: 2\nbatch_size: 6\n'


def two(root, *args):
    "The same command in two processes: (exit code, what they say)"
    with socket.socket() as s: s.bind(('', 0)); port = s.getsockname()[1]
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port)]
    r = subprocess.run([*launch, '-m', 'selfalign.machine.cli', *args], cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90)
    return r.returncode, r.stdout


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "A run of one process"
    root = prepare(tmp_path_factory.mktemp('processes')/'one', recipe)
    out, _ = (p := selfalign(root, 'run', 'r.yml')).communicate(timeout=120)
    assert p.returncode==0, out[-3000:]
    return root


@pytest.fixture(scope='module')
def both(one):
    "A run of two"
    root = prepare(one.with_name('two'), recipe)
    code, out = two(root, 'run', 'r.yml')
    assert code==0, out[-3000:]
    (root/'stdout').write_text(out)
    return root


def test_the_same_rows_and_the_same_adapter(one, both):
    import numpy as np
    (a, wa, _), (b, wb, _) = files(one), files(both)
    for f in ('instructions.jsonl', 'candidates.jsonl', 'scores.jsonl', 'pairs.jsonl'): assert a[f]==b[f], f
    assert a['pairs.jsonl'].count('"split": "train"')%2==0  # or the last step would differ
    worst = max(np.abs(wa[k]-wb[k]).max() for k in wa)
    print(f'adapter: largest difference {worst:.1e}, largest weight {max(np.abs(w).max() for w in wa.values()):.1e}')
    assert set(wa)==set(wb) and worst<1e-4


def test_each_process_did_its_share_and_one_spoke(both):
    n = [len((both/f'data/r/candidates.rows{k}.jsonl').read_text().splitlines()) for k in ('', '.1')]
    assert sum(n)==13*3 and min(n)>=15
    assert (both/'stdout').read_text().count('candidates  ...')==1


def test_what_two_have_begun_one_goes_on_with(one, both, tmp_path):
    root = prepare(tmp_path/'r', recipe)
    (root/'data/r').mkdir(parents=True)
    for f in both.glob('data/r/candidates.rows*.jsonl'): (root/'data/r'/f.name).write_text(''.join(f.read_text().splitlines(keepends=True)[:8]))
    (root/'data/r/instructions.jsonl').write_bytes((both/'data/r/instructions.jsonl').read_bytes())
    out, _ = selfalign(root, 'candidates', 'r.yml').communicate(timeout=60)
    assert '16 of 39 answers were there already' in out, out
    assert files_equal(root, one, 'candidates.jsonl')


def files_equal(a, b, f): return (a/'data/r'/f).read_bytes()==(b/'data/r'/f).read_bytes()


def test_the_first_fails_alone(both):
    "In a step of its own, while the other waits"
    scores = both/'data/r/scores.jsonl'
    kept = scores.read_bytes()
    try:
        scores.write_text('not JSON\n')
        code, out = two(both, 'pairs', 'r.yml')
    finally: scores.write_bytes(kept)
    assert code and 'selfalign: scores.jsonl, line 1: not JSON' in out and 'process 1:' not in out


def test_the_second_fails_alone(both):
    from filelock import FileLock
    with FileLock(both/'data/r/.candidates.rows.1.lock'):
        t = time.time()
        code, out = two(both, 'candidates', 'r.yml')
    assert code and 'selfalign: process 1:' in out and 'another process' in out and time.time()-t<60


def test_a_batch_that_cannot_be_shared(both):
    code, out = two(both, 'dpo', 'r.yml', '--set', 'train_batch=3')
    assert code and 'train_batch is 3; it must be a multiple of the number of processes, 2' in out
