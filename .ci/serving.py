"""Does `transformers serve` answer as the folder does here? `python .ci/serving.py FOLDER [N]` compares N greedy answers (10).

FOLDER is what `selfalign export NAME --to merged --out FOLDER` wrote. The server listens on this machine only, and is ended afterwards."""
import os, socket, subprocess, sys
from pathlib import Path

from serve_vllm import ready

os.environ.setdefault('HF_HUB_OFFLINE', '1')


def main(folder, n=10):
    from selfalign.instructions import load_instructions
    from selfalign.llm import load
    from selfalign.machine.sampling import Sampling
    from selfalign.machine.server import Server
    from selfalign.style import load_style
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    folder, s, system = str(Path(folder).resolve()), Sampling(temperature=0, max_new_tokens=48), load_style().system
    asked = [r['prompt'] for r in load_instructions('embedded')[0] if r['split']=='test'][:int(n)]
    command = [str(Path(sys.executable).with_name('transformers')), 'serve', folder, '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not ready(port, server): sys.exit('transformers serve did not start')
        there = Server(f'http://127.0.0.1:{port}', folder, folder, concurrency=1)
        said = [m.generate([m.render(q, system) for q in asked], 1, s) for m in (load(folder, dtype='float32'), there)]
    finally: server.terminate()
    same = sum(a[0].text==b[0].text for a,b in zip(*said))
    print(f'{same} of {len(asked)} greedy answers are the same')
    return int(same!=len(asked))


if __name__=='__main__': sys.exit(main(*sys.argv[1:]))
