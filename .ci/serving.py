"""Does a server answer as the folder does here? `python .ci/serving.py FOLDER [N] [URL] [DTYPE]` compares N greedy answers (10).

FOLDER is what `selfalign export NAME --to merged --out FOLDER` wrote. Without a URL `transformers serve` is started on this machine, and
ended afterwards; `python .ci/serve_vllm.py --model FOLDER` prints the URL of a vLLM. DTYPE (float32) is the precision here."""
import os, socket, subprocess, sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

from serve_vllm import ready

os.environ.setdefault('HF_HUB_OFFLINE', '1')


@contextmanager
def transformers_serve(folder):
    "The address of `transformers serve` with a folder, ended afterwards"
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name('transformers')), 'serve', folder, '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not ready(port, server): sys.exit('transformers serve did not start')
        yield f'http://127.0.0.1:{port}'
    finally: server.terminate()


def main(folder, n=10, url='', dtype='float32'):
    from selfalign.instructions import load_instructions
    from selfalign.llm import load
    from selfalign.machine.sampling import Sampling
    from selfalign.machine.server import Server
    from selfalign.style import load_style
    folder, s, system = str(Path(folder).resolve()), Sampling(temperature=0, max_new_tokens=48), load_style().system
    asked = [r['prompt'] for r in load_instructions('embedded')[0] if r['split']=='test'][:int(n)]
    def said(m): return [a.text for a, in m.generate([m.render(q, system) for q in asked], 1, s)]
    with nullcontext(url) if url else transformers_serve(folder) as at:
        there = said(Server(at, folder, '' if url else folder, concurrency=1))
    here = said(load(folder, dtype=dtype))
    print(f'{sum(a==b for a,b in zip(here, there))} of {len(asked)} greedy answers are the same')
    for q,a,b in zip(asked, here, there):
        if a!=b: print(f'\n{q}\nhere:  {a!r}\nthere: {b!r}')
    return int(here!=there)


if __name__=='__main__': sys.exit(main(*sys.argv[1:]))
