"""A server that speaks OpenAI's protocol on loopback, with any `LLM` behind it, to test `Server`. It fails on request.

`fault(n, body)` says what happens to the n-th request: None (an answer), a status (with `Retry-After` for 429), or one
of `hang`, `cut` (the connection breaks inside the reply), `garbage` (no JSON), `empty` (no choices), `wrong` (wrong
types), `nologprobs`; from a hostile server `long` (4 million characters), `longer` (20 MB), `boast` (10^12 tokens),
`deep` (nested JSON), `tops` (100000 log-probabilities), `zipped` (a compressed gigabyte), `slow` (a byte now and then),
`rude` (a refusal with control characters and the key that came), `echo` (an answer with them), or an address to
redirect to. With `like='transformers'` or `like='llamacpp'` it takes and refuses the fields, and words its
replies, as `transformers serve` or llama.cpp's server does."""
import gzip, json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from selfalign.machine.sampling import Sampling, row_noise
from selfalign.machine.textmodel import pad_left


class Fake(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, llm, name='tiny', knows=('logprob_token_ids', 'structured_outputs'), delay=0.):
        super().__init__(('127.0.0.1', 0), Handler)
        self.llm, self.name, self.knows, self.delay = llm, name, knows, delay
        self.fault, self.strict, self.like = None, (), 'vllm'
        self.asked = self.now = self.most = 0
        self.bodies, self.heads, self.lock, self.model = [], [], threading.Lock(), threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        threading.Thread(target=self.serve_forever, args=(.05,), daemon=True).start()

    def handle_error(self, request, client_address): pass  # a client that went away

    def logits(self, ids):
        x = pad_left([ids], 0, 'cpu')
        with torch.inference_mode(): return self.llm.model(**x, use_cache=False).logits[0].float().log_softmax(-1)

    def answer(self, body, ids):
        "Text, tokens and end of an answer; greedy or by the seed"
        s = Sampling(body['temperature'], max(0, body.get('top_k') or 0), body['top_p'],
                     body.get('repetition_penalty') or 1., body['max_tokens'])
        noise = row_noise(body['seed'], '', 0, s.max_new_tokens)[None]
        c = self.llm.completion([t for _,(t,) in self.llm.decode([ids], noise, s)])
        return c.text, dict(finish_reason='stop' if c.finished else 'length'), c.n_tokens

    def next_token(self, body, logp):
        "Log-probabilities of the next token, among the allowed choices alone if the body names them"
        only = body.get('structured_outputs', {}).get('choice') if 'structured_outputs' in self.knows else None
        if not only: return logp
        keep = [self.llm.tok(c, add_special_tokens=False).input_ids[0] for c in only]
        return torch.full_like(logp, -torch.inf).index_copy(0, torch.tensor(keep), logp[keep].log_softmax(-1))

    def scored(self, body, ids):
        "One more token with its log-probabilities, after the repeated prompt if `echo` asks for that"
        lp, by_id = self.logits(ids), body.get('return_tokens_as_token_ids')
        last = self.next_token(body, lp[-1])
        def text(i): return self.llm.tok.decode([i])
        def name(i): return f'token_id:{i}' if by_id else text(i)
        named = body.get('logprob_token_ids') if 'logprob_token_ids' in self.knows else None
        best = named or last.topk(body['logprobs']).indices.tolist()
        new = last.argmax().item()
        if self.like=='llamacpp':
            tops = [dict(id=i, token=text(i), logprob=last[i].item()) for i in best]
            return dict(content=[dict(id=new, logprob=last[new].item(), top_logprobs=tops)])
        tops = {name(i): last[i].item() for i in best if last[i]>-torch.inf}
        before = [None, *lp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()] if body.get('echo') else []
        return dict(tokens=[*map(name, ids if before else []), name(new)], token_logprobs=[*before, last[new].item()],
                    top_logprobs=[*[{}]*len(before), tops])


wrong = dict(text=7, finish_reason=None, logprobs=dict(top_logprobs=['x'], token_logprobs='no'))
tops = {str(i): -1. for i in range(100000)}
bad_replies = dict(
    garbage=b'<html>Bad gateway</html>', empty=dict(choices=[]), wrong=dict(choices=[wrong]),
    long=dict(choices=[dict(text='a'*4_000_000, finish_reason='stop')]),
    longer=dict(choices=[dict(text='a'*20_000_000, finish_reason='stop')]),
    boast=dict(choices=[dict(text='да', finish_reason='stop')], usage=dict(completion_tokens=10**12)),
    deep=b'{"choices": '+b'['*200_000+b']'*200_000+b'}',
    tops=dict(choices=[dict(text='a', finish_reason='length', logprobs=dict(top_logprobs=[tops]))]))
transformers_fields = {'model', 'messages', 'max_tokens', 'temperature', 'top_p', 'seed', 'generation_config'}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass

    def reply(self, o, code=200, **headers):
        data = o if isinstance(o, bytes) else json.dumps(o).encode()
        headers = {'Content-Type': 'application/json', 'Content-Length': str(len(data)), **headers}
        self.send_response(code)
        for k,v in headers.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, txt, code=400): self.reply(dict(error=dict(message=txt)), code)

    def do_GET(self):
        self.server.heads.append({k.lower(): v for k,v in self.headers.items()})
        like, about = self.server.like, dict(id=self.server.name, object='model', owned_by=self.server.like)
        if self.path!='/v1/models': return self.reply({}, 404)
        if like=='transformers': return self.reply({}, 500)
        room = dict(max_model_len=2048) if like=='vllm' else dict(meta=dict(n_ctx=1024))
        self.reply(dict(object='list', data=[{**about, **room}]))

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        s.heads.append({k.lower(): v for k,v in self.headers.items()})
        if isinstance(body.get('prompt'), str):  # how many tokens is this? Neither counted nor hindered
            n = len(s.llm.tok(body['prompt']).input_ids)
            return self.reply(dict(choices=[dict(text='', finish_reason='length')],
                                   usage=dict(prompt_tokens=n, completion_tokens=1)))
        with s.lock:
            n, s.asked, s.now = s.asked, s.asked+1, s.now+1
            s.most = max(s.most, s.now)
            s.bodies.append(body)
        fault = s.fault(n, body) if s.fault else None
        try: self.misbehave(fault) if fault and fault!='nologprobs' else self.behave(s, body, fault)
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with s.lock: s.now -= 1

    def misbehave(self, fault):
        if isinstance(fault, int):
            more = {'Retry-After': '0.3'} if fault==429 else {}
            return self.reply(dict(error=dict(message=f'told to say {fault}')), fault, **more)
        if fault.startswith('http'):
            self.send_response(307)
            self.send_header('Location', fault); self.send_header('Content-Length', '0'); self.end_headers()
            return
        said = f'\x1b]0;title\x07\x1b[31mno \u202e{self.headers["Authorization"]}'
        if fault=='rude': return self.refuse(said, 418)
        if fault=='echo': return self.reply(dict(choices=[dict(text=said, finish_reason='stop')]))
        if fault=='zipped': return self.reply(gzip.compress(bytes(10**7)), **{'Content-Encoding': 'gzip'})
        if fault=='slow':
            self.send_response(200); self.send_header('Content-Length', '1000'); self.end_headers()
            for _ in range(100): self.wfile.write(b' '); time.sleep(.1)
        elif fault=='hang': time.sleep(3)
        elif fault=='cut':
            self.send_response(200); self.send_header('Content-Length', '1000'); self.end_headers()
            self.wfile.write(b'{"choices": [')
        else: return self.reply(bad_replies[fault])
        self.close_connection = True

    def as_transformers(self, body):
        "The body as `transformers serve` takes it; None if it refuses"
        if not isinstance(body.get('prompt', ''), str): return self.reply(dict(detail='prompt must be a string.'), 400)
        more = {*body}-transformers_fields
        if more: return self.reply(dict(detail=f'Unexpected fields in the request: {more}'), 422)
        return {**json.loads(body['generation_config']), **body}

    def as_llamacpp(self, body):
        "The body as llama.cpp's server takes it; None if it refuses"
        if body.get('repeat_last_n', 0)<0:
            return self.refuse("Field 'repeat_last_n': Value must be between 0 <= value <= 2147483647, but got -1")
        known = {k: v for k,v in body.items() if k not in ('echo', 'logprob_token_ids', 'structured_outputs')}
        return {**known, 'repetition_penalty': body.get('repeat_penalty', 1.)}

    def behave(self, s, body, fault):
        time.sleep(s.delay)
        named = [k for k in s.strict if k in body]
        if named: return self.refuse(f'Extra inputs are not permitted: {", ".join(named)}')
        if s.like=='transformers': body = self.as_transformers(body)
        if s.like=='llamacpp': body = self.as_llamacpp(body)
        if body is None: return
        chat, tok = self.path=='/v1/chat/completions', s.llm.tok
        ids = body['prompt'] if not chat else tok(
            tok.apply_chat_template(body['messages'], tokenize=False, add_generation_prompt=True),
            add_special_tokens=False).input_ids
        with s.model:
            if body.get('logprobs') is None: txt, more, k = s.answer(body, ids)
            else:
                scored = None if fault=='nologprobs' else s.scored(body, ids)
                txt, more, k = '?', dict(finish_reason='length', logprobs=scored), 1
        choice = dict(message=dict(role='assistant', content=txt)) if chat else dict(text=txt)
        usage = dict(prompt_tokens=len(ids), completion_tokens=k)
        self.reply(dict(choices=[{**choice, **more}], usage=usage))
