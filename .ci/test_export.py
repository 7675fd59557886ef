"An exported model: whole or not there, what goes to the hub and what does not, a hub on this machine, Gemma-2's own vocabulary for llama.cpp."
import base64, hashlib, json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from selfalign.export import export_gguf, export_merged, export_ollama, merged_card, ollama_template, prefix_of, push, stage
from selfalign.llm import load
from selfalign.machine import cli
from selfalign.machine.files import BadInput, read_json, repo_file, write_json
from selfalign.machine.sampling import Sampling
from selfalign.machine.tiny import tiny

BRIEF = repo_file('models/qwen2.5-coder-1.5b-brief')


@pytest.fixture(scope='module')
def adapter(tmp_path_factory):
    "A tiny random model and an adapter on it that changes its answers"
    import torch
    from peft import LoraConfig, get_peft_model
    d = tmp_path_factory.mktemp('export')
    m = load(tiny(d/'base')).model
    torch.manual_seed(0)
    p = get_peft_model(m, LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM'))
    for k,w in p.named_parameters():
        if 'lora_B' in k: torch.nn.init.normal_(w, std=.5)
    p.save_pretrained(d/'models/tuned')
    write_json(d/'models/tuned/adapter_config.json', {**read_json(d/'models/tuned/adapter_config.json'), 'base_model_name_or_path': str(d/'base')})
    write_json(d/'models/tuned/run.json', dict(system='Коротко.'))
    (d/'models/tuned/README.md').write_text('---\nx\n---\n\n# t\n\n```python\nload()\n```\n\nIt is shorter.\n\n## Training\n\n| beta | 1 |\n', encoding='utf-8')
    (d/'models/tuned/checkpoints').mkdir()
    (d/'models/tuned/checkpoints/README.md').write_text('old')
    return d


def said(model): return [c.text for c, in load(model).generate([f'<bos><start_of_turn>user\n{q}<end_of_turn>\n' for q in ('Почему?', 'Где он?', 'Кто это')], 1, Sampling(temperature=0, repetition_penalty=1., max_new_tokens=24))]


def test_a_merged_model_says_what_the_adapter_says_and_its_card_what_to_say_before(adapter, tmp_path):
    out = export_merged(str(adapter/'models/tuned'), tmp_path/'a/whole', system=prefix_of(adapter/'models/tuned'))
    assert said(out)==said(adapter/'models/tuned')!=said(adapter/'base')
    card = (out/'README.md').read_text(encoding='utf-8')
    assert '`Коротко.`' in card and 'It is shorter.' in card and 'beta' not in card and 'vllm serve whole' in card
    assert '`base` with an adapter' in card and str(adapter) not in card  # the base lies on this machine
    assert prefix_of(out)=='Коротко.' and 'It was trained with' not in merged_card(str(adapter/'base'), 'x', 'Коротко.')
    assert [p.name for p in (tmp_path/'a').iterdir()]==['whole'] and not (out/'adapter_config.json').exists()
    with pytest.raises(BadInput, match='whole: is there already'): export_merged(str(adapter/'base'), out)


def test_the_command_names_a_run_and_what_is_missing(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(adapter)
    assert cli.main(['export', 'tuned', '--out', str(tmp_path/'w')])==0 and said(tmp_path/'w')==said(adapter/'models/tuned')
    assert f'vllm serve {tmp_path/"w"}' in capsys.readouterr().out
    for line,why in ((['export', 'tuned'], '--out must say where to'), (['export', 'tuned', '--to', 'hub'], '--repo must say where to'),
                     (['export', 'tuned', '--to', 'hub', '--repo', 'me/x', '--dry-run'], 'which the hub does not have'),
                     (['export', 'instruct-aligned', '--to', 'hub', '--repo', 'me/x'], 'only a folder goes to the hub')):
        assert cli.main(line)==2 and why in capsys.readouterr().err, line


def test_a_converter_that_fails_leaves_nothing(adapter, tmp_path):
    with pytest.raises(BadInput, match='converter does not take it'): export_gguf(str(adapter/'base'), tmp_path/'x.gguf')
    with pytest.raises(BadInput, match='converter does not take it'): export_ollama(str(adapter/'base'), tmp_path/'o')
    assert list(tmp_path.iterdir())==[]


@pytest.fixture(scope='module')
def gemma2(tmp_path_factory):
    "A tiny random Gemma-2, soft-capping and sliding window included, with a SentencePiece vocabulary as the real one has"
    import io, sentencepiece, torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    from selfalign.instructions import load_instructions
    from selfalign.machine.templates import GEMMA_TURNS
    d, m = tmp_path_factory.mktemp('gemma2'), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([r['prompt'] for r in load_instructions('embedded')[0]]), model_writer=m, vocab_size=600, model_type='bpe', byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name='identity', pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece='<pad>',
        eos_piece='<eos>', bos_piece='<bos>', unk_piece='<unk>', user_defined_symbols=['<start_of_turn>', '<end_of_turn>'], minloglevel=2)
    (d/'tokenizer.model').write_bytes(m.getvalue())
    write_json(d/'tokenizer_config.json', dict(tokenizer_class='GemmaTokenizer', bos_token='<bos>', eos_token='<eos>', pad_token='<pad>', unk_token='<unk>', chat_template=GEMMA_TURNS))
    write_json(d/'config.json', dict(model_type='gemma2'))
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=len(AutoTokenizer.from_pretrained(d)), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                   head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=2048, sliding_window=16, bos_token_id=2, eos_token_id=1, pad_token_id=0)).save_pretrained(d)
    return d


def test_llama_cpp_says_what_a_tiny_gemma_2_says(gemma2, tmp_path):
    import xllamacpp
    from selfalign.machine.server import Server
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity, p.cpuparams.n_threads = str(export_gguf(gemma2, tmp_path/'g.gguf', 'f32')), 512, 1, False, -1, 1
    engine, asked = xllamacpp.Server(p), ('Почему небо голубое?', 'Кто написал «Войну и мир»?', 'Сколько будет 17 и 25?')
    def said(llm): return [c.text for c, in llm.generate([llm.render(q, 'Отвечай кратко.') for q in asked], 1, Sampling(temperature=0, repetition_penalty=1., max_new_tokens=24))]
    here = said(load(gemma2))
    assert said(Server(engine.listening_address, gemma2))==here and len({*here})==3


def test_a_gemma_s_card_has_its_terms():
    assert 'Gemma Terms of Use' in merged_card('embedded-aligned', 'x', '') and 'Gemma' not in merged_card('instruct-aligned', 'x', '')


def test_a_template_that_writes_turns_unlike_is_refused():
    tok = load('embedded-base').tok
    tok.chat_template = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(BadInput, match='no such form'): ollama_template(tok)


def test_only_what_belongs_on_the_hub_is_staged(tmp_path):
    files = stage(BRIEF, tmp_path/'s', 'me/brief')
    assert {p.name for p in files.iterdir()}=={'README.md', 'adapter_config.json', 'adapter_model.safetensors', 'baselines.json', 'evaluation.json'}
    assert read_json(files/'adapter_config.json')['base_model_name_or_path']=='Qwen/Qwen2.5-Coder-1.5B-Instruct'
    assert read_json(BRIEF/'adapter_config.json')['base_model_name_or_path']=='embedded-instruct'  # the original is as it was
    card = (files/'README.md').read_text(encoding='utf-8')
    assert 'from_pretrained("me/brief")' in card and 'selfalign.llm' not in card and card.count('## Training')==1


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as an upload asks for: make a repository, say how files travel, take large files and commits"
    def reply(self, o, code=200):
        body = json.dumps(o).encode()
        self.send_response(code); self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
    def body(self): return self.rfile.read(int(self.headers['Content-Length'] or 0))
    def do_GET(self): self.reply({'sha': '0'*40, 'id': 'me/brief', 'siblings': []})
    def do_PUT(self):
        b = self.body()
        self.server.large[hashlib.sha256(b).hexdigest()] = b
        self.send_response(200); self.send_header('Content-Length', '0'); self.end_headers()
    def do_POST(self):
        s, b = self.server, self.body()
        s.asked.append((self.path, self.headers.get('authorization')))
        if s.refuses: return self.reply({'error': 'You need write access'}, 403)
        if self.path=='/api/repos/create': s.made.append(json.loads(b)); self.reply({'url': f'{s.url}/me/brief', 'name': 'me/brief'})
        elif '/preupload/' in self.path:
            self.reply({'files': [{'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular', 'shouldIgnore': False} for f in json.loads(b)['files']]})
        elif self.path.endswith('/objects/batch'):
            self.reply({'transfer': 'basic', 'objects': [{'oid': o['oid'], 'size': o['size'], 'actions': {'upload': {'href': f'{s.url}/large/{o["oid"]}'}}} for o in json.loads(b)['objects']]})
        elif '/commit/' in self.path:
            for line in map(json.loads, b.splitlines()):
                v = line['value']
                if line['key']=='file': s.files[v['path']] = base64.b64decode(v['content'])
                if line['key']=='lfsFile': s.files[v['path']] = s.large[v['oid']]
            self.reply({'commitUrl': f'{s.url}/me/brief/commit/0', 'commitOid': '0'*40, 'success': True})
        else: self.reply({})
    def log_message(self, *a): pass


@pytest.fixture
def hub():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    s.url, s.asked, s.made, s.files, s.large, s.refuses = f'http://127.0.0.1:{s.server_port}', [], [], {}, {}, False
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()


def pushed(hub, *args):
    "`selfalign export` in a process of its own: the hub's address is read once, when its library is imported"
    env = {k: v for k,v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'HF_TOKEN')}
    env.update(HF_ENDPOINT=hub.url, HF_TOKEN='hf_secretsecret', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='*')
    return subprocess.run([sys.executable, '-m', 'selfalign.machine.cli', 'export', str(BRIEF), '--to', 'hub', '--repo', 'me/brief', *args], capture_output=True, text=True, env=env, timeout=300)


def test_an_upload_brings_every_file_as_it_is_and_shows_the_token_to_the_hub_alone(hub, tmp_path):
    got = pushed(hub)
    assert got.returncode==0, got.stderr
    staged = stage(BRIEF, tmp_path/'s', 'me/brief')
    assert {k: v for k,v in hub.files.items() if k!='.gitattributes'}=={p.name: p.read_bytes() for p in staged.iterdir()}
    assert 'private' in str(hub.made[0]) and {a for _,a in hub.asked if a}=={'Bearer hf_secretsecret'}
    assert 'hf_secret' not in got.stdout+got.stderr and re.search(r'model me/brief +adapter_model.safetensors +18,516,064', got.stdout)


def test_a_dry_run_asks_nobody_and_a_refusal_is_one_line(hub):
    got = pushed(hub, '--dry-run')
    assert got.returncode==0 and 'adapter_model.safetensors' in got.stdout and hub.asked==[]
    hub.refuses = True
    got = pushed(hub)
    assert got.returncode==2 and 'me/brief: the hub does not let you write there' in got.stderr and 'Traceback' not in got.stderr and 'hf_secret' not in got.stderr


def test_pairs_of_another_run_with_the_same_folder_name_stay_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('data/qwen2.5-coder-1.5b-brief').mkdir(parents=True)
    for f in ('pairs.jsonl', 'README.md'): Path('data/qwen2.5-coder-1.5b-brief', f).write_text('{"prompt": "secret"}\n')
    line = ['export', str(BRIEF), '--to', 'hub', '--repo', 'me/brief', '--dry-run']
    assert cli.main(line)==0 and 'pairs' not in capsys.readouterr().out
    Path('models').mkdir()
    Path('models/qwen2.5-coder-1.5b-brief').symlink_to(BRIEF)   # its own
    assert cli.main(line)==0 and 'pairs.jsonl' in capsys.readouterr().out


def test_a_name_on_the_hub_is_checked_before_anything():
    with pytest.raises(BadInput, match='org/name'): push(BRIEF, 'brief', dry_run=True)
