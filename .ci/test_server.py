"""`Server` against a well-behaved server, against one that misbehaves, and against a real one where one is there.

The first two run on loopback over a tiny random model. For the third: `python .ci/serve_vllm.py`, then
`SELFALIGN_TEST_SERVER=http://127.0.0.1:8177 python -m pytest -q .ci/test_server.py`, then
`python .ci/serve_vllm.py --stop`. Any other server of the embedded model will do (nbs/machine/18_server.ipynb has the
commands); SELFALIGN_TEST_SERVED names the model where it must be named."""
import asyncio, os, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import Fake
from selfalign.candidates import sample
from selfalign.instructions import load_instructions
from selfalign.joint import joint_answers
from selfalign.judge import DIGITS, JudgeSettings, expected_score, grade, judge_prompts
from selfalign.llm import load
from selfalign.machine.files import BadInput, read_jsonl
from selfalign.machine.sampling import Sampling
from selfalign.machine.server import Server
from selfalign.machine.tiny import tiny
from selfalign.style import load_style

greedy = Sampling(temperature=0, repetition_penalty=1., max_new_tokens=10)
answers = ['да, конечно', 'Рассеяние света.', 'Красный и синий.', 'Я.']
questions = ['Привет!', 'Почему небо голубое?', 'Назови три цвета.', 'А']
style = load_style('brief-ru')
mix = JudgeSettings(judge='mix')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny(tmp_path_factory.mktemp('server')/'tiny')


@pytest.fixture(scope='module')
def llm(folder): return load(folder, device='cpu')


@pytest.fixture
def fake(llm):
    f = Fake(llm)
    yield f
    f.shutdown()


@pytest.fixture
def ps(llm): return [llm.render(q, style.system) for q in questions]


def quick(fake, folder, **kw): return Server(fake.url, folder, **{'pause': .02, 'timeout': 10., **kw})


def heads(llm, qs=questions, xs=answers): return [judge_prompts(llm, q, a, style)[0] for q,a in zip(qs, xs)]


def tails(llm): return judge_prompts(llm, '', '', style)[1]


def candidate_rows():
    return [dict(prompt_id=str(i), sample=0, prompt=q, completion=a)
            for i,(q,a) in enumerate(zip(questions, answers))]


def scores(rows, llm, file): return [r['score'] for r in grade(rows, llm, file, style, mix)]


# a well-behaved server

def test_same_numbers(fake, folder, llm, ps):
    s, args = quick(fake, folder), (heads(llm), tails(llm), DIGITS)
    assert s.generate(ps, 2, greedy)==llm.generate(ps, 2, greedy)
    assert np.allclose(s.choice_probs(*args), llm.choice_probs(*args), atol=1e-4)
    for a,b in zip(s.logprobs(ps, answers), llm.logprobs(ps, answers)): assert np.allclose(a, b, atol=1e-4)


def test_progress_counts_what_a_model_counts(fake, folder, llm, ps):
    counts = []
    for m in quick(fake, folder), llm:
        seen = dict(choices=0, completions=0)
        def add(k, n, seen=seen): seen[k] += n
        m.choice_probs(heads(llm), tails(llm), DIGITS, on_done=lambda n, add=add: add('choices', n))
        m.logprobs(ps, answers, on_done=lambda n, add=add: add('completions', n))
        counts.append(seen)
    assert counts[0]==counts[1]==dict(choices=4, completions=4)


@pytest.mark.parametrize('knows', [(), ('structured_outputs',), ('logprob_token_ids',)])
def test_digits_are_absolute_whatever_the_server_knows(fake, folder, llm, knows):
    fake.knows = knows
    args = heads(llm, ['Кто ты?'], ['Модель.']), tails(llm), DIGITS
    got, want = quick(fake, folder).choice_probs(*args), llm.choice_probs(*args)
    listed = got>0
    assert listed.all() if knows else listed.mean()<1  # 20 tokens: what they do not list counts as nothing
    assert np.allclose(got[listed], want[listed], atol=1e-4)


def test_rows_have_seeds_of_their_own(fake, folder, ps):
    s, warm = quick(fake, folder), Sampling(max_new_tokens=8)
    a = s.generate(ps, 3, warm, seed=1)
    assert s.generate(ps[2:], 3, warm, seed=1)==a[2:] and s.generate(ps, 3, warm, seed=2)!=a
    assert len({b['seed'] for b in fake.bodies[:12]})==12


def test_grades_as_here(fake, folder, llm, tmp_path):
    rows = candidate_rows()
    a, b = (scores(rows, m, tmp_path/f'{i}.jsonl') for i,m in enumerate((quick(fake, folder), llm)))
    assert a==pytest.approx(b, abs=1e-3)
    assert len(joint_answers(rows[:2], quick(fake, folder), style, sampling=greedy))==2


def test_works_where_a_loop_is_running(fake, folder, llm, ps):
    async def notebook(): return quick(fake, folder).generate(ps, sampling=greedy)
    assert asyncio.run(notebook())==llm.generate(ps, sampling=greedy)


def test_never_more_at_once_than_allowed(fake, folder, ps):
    fake.delay = .02
    quick(fake, folder, concurrency=3).generate(ps*4, sampling=greedy)
    assert fake.most==3


# one that misbehaves

@pytest.mark.parametrize('fault', [500, 503, 429, 'cut', 'garbage', 'empty', 'wrong'])
def test_asks_again(fake, folder, llm, ps, fault):
    fake.fault = lambda n, body: fault if n%3==0 else None
    s, t = quick(fake, folder, tries=8), time.time()
    assert s.generate(ps, sampling=greedy)==llm.generate(ps, sampling=greedy)
    if fault==429: assert time.time()-t>.3  # it said Retry-After: 0.3
    args = [ps[0]], ['А'], DIGITS
    assert np.allclose(s.choice_probs(*args), llm.choice_probs(*args), atol=1e-4)


def test_hangs(fake, folder, llm, ps):
    fake.fault = lambda n, body: 'hang' if n==0 else None
    want, t = llm.generate(ps[:2], sampling=greedy), time.time()
    assert quick(fake, folder, timeout=1.).generate(ps[:2], sampling=greedy)==want
    assert time.time()-t<3


def test_what_is_done_is_on_disk_and_not_asked_again(fake, folder, tmp_path):
    rows, s = [dict(prompt_id=str(i), prompt=q) for i,q in enumerate(questions)], quick(fake, folder, tries=2)
    bad, args = s.encode(s.render(questions[1], style.system)), (tmp_path/'c.jsonl', 2, greedy, style.system, 42)
    fake.fault = lambda n, body: 500 if body['prompt']==bad else None
    with pytest.raises(BadInput, match=r'6 of 8 requests answered, 2 failed \(2 x status 500.*same command'):
        sample(rows, s, *args)
    kept = (tmp_path/'c.rows.jsonl').read_text().splitlines()
    assert len(kept)==6
    fake.fault, fake.bodies = None, []
    assert len(sample(rows, s, *args))==8
    assert (tmp_path/'c.rows.jsonl').read_text().splitlines()[:6]==kept  # the others' rows are as they were
    assert [b['prompt'] for b in fake.bodies]==[bad, bad]


def test_grades_are_kept_when_one_cannot_be_had(fake, folder, llm, tmp_path):
    rows, s = candidate_rows(), quick(fake, folder, tries=2)
    by_digits = llm.encode(heads(llm)[1])
    by_likelihood = [*llm.encode(llm.render(questions[1], style.system)), *llm.encode(answers[1])]
    def bad(n, body): return 400 if any(body['prompt'][:len(x)]==x for x in (by_digits, by_likelihood)) else None
    fake.fault = bad
    with pytest.raises(BadInput, match='5 failed.*status 400.*finished rows are kept'):
        grade(rows, s, tmp_path/'s.jsonl', style, mix)
    kept = (tmp_path/'s.rows.jsonl').read_text().splitlines()
    assert len(kept)==6 and not (tmp_path/'s.jsonl').exists()  # three rows, two methods
    fake.fault, fake.bodies = None, []
    assert scores(rows, s, tmp_path/'s.jsonl')==pytest.approx(scores(rows, llm, tmp_path/'h.jsonl'), abs=1e-3)
    assert len(fake.bodies)==7  # five criteria, with the question and without


def test_a_server_that_is_gone_is_not_asked_for_ever(fake, folder, ps):
    s = quick(fake, folder, tries=2, concurrency=4)
    fake.fault = lambda n, body: 503
    with pytest.raises(BadInput, match='not sent any more'): s.generate(ps*20, sampling=greedy)
    assert fake.asked<=2*12


def test_nobody_listens(folder):
    with pytest.raises(BadInput, match='http://127.0.0.1:9/v1: no server answers there'):
        Server('http://127.0.0.1:9', folder)


def test_another_model_is_noticed(fake):
    with pytest.raises(BadInput, match='another model'): Server(fake.url, 'embedded')


def test_rows_of_another_model_behind_the_same_name_are_not_taken(fake, folder, tmp_path):
    other = tiny(tmp_path/'other', seed=1)
    assert quick(fake, folder).fingerprint()==quick(fake, folder).fingerprint()!=quick(fake, other).fingerprint()


def test_an_address_holds_no_secret(folder):
    for u in ('http://me:sesame@127.0.0.1:9', 'http://127.0.0.1:9/v1?key=sesame'):
        with pytest.raises(BadInput, match='SELFALIGN_API_KEY') as e: Server(u, folder)
        assert 'sesame' not in str(e.value)


def test_a_wrong_key_stops_at_once(fake, folder, ps):
    fake.fault = lambda n, body: 401
    with pytest.raises(BadInput, match='set SELFALIGN_API_KEY'): quick(fake, folder).generate(ps, sampling=greedy)


def test_settings_it_does_not_know_are_left_out_and_said(fake, folder, ps, capsys):
    fake.strict = ('top_k', 'stop_token_ids')
    assert len(quick(fake, folder).generate(ps*3, sampling=greedy))==12
    assert capsys.readouterr().err.count('does not know stop_token_ids, top_k; going on without')==1
    assert not quick(fake, folder).same_sampler(greedy)  # it samples by other settings than this machine
    fake.strict = ()
    assert quick(fake, folder).same_sampler(greedy)


def test_no_logprobs_is_refused_in_one_line(fake, folder, llm, ps):
    fake.fault = lambda n, body: 'nologprobs'
    for go in (lambda s: s.choice_probs(ps[:1], ['А'], DIGITS), lambda s: s.logprobs(ps, answers)):
        with pytest.raises(BadInput, match='can answer but not grade.*judge_model.*vllm serve') as e:
            go(quick(fake, folder))
        assert '\n' not in str(e.value)


def test_without_completions_it_answers_through_chat(fake, folder, llm, ps):
    fake.fault = lambda n, body: 404 if 'prompt' in body else None
    s = quick(fake, folder)
    turns = [s.render(q, style.system) for q in questions]  # the template refuses a system role, there too
    turns[0] = s.render('Привет!<end_of_turn>', style.system)
    assert turns[0].messages==[dict(role='user', content=f'{style.system}\n\nПривет!< end_of_turn>')]
    args = turns[:1], ['А'], DIGITS
    with pytest.raises(BadInput, match='can answer but not grade'): quick(fake, folder).choice_probs(*args)
    assert s.generate(turns, sampling=greedy)==llm.generate(turns, sampling=greedy)
    for go in (lambda: s.choice_probs(*args), lambda: s.generate([turns[0]+'Да'], sampling=greedy)):
        with pytest.raises(BadInput, match='/v1/completions'): go()


def test_a_404_between_answers_is_no_lack_of_completions(fake, folder, llm, ps):
    "A proxy says so while a server starts anew: answers of two kinds would be mixed, and grading refused"
    s, begun = quick(fake, folder, concurrency=1), []
    s.generate(ps[:1], sampling=greedy)
    fake.fault = lambda n, body: 404 if begun.append(n) or len(begun)==2 else None
    assert s.generate(ps, sampling=greedy)==llm.generate(ps, sampling=greedy)
    assert not s.chat and len(begun)==len(ps)+1


def test_transformers_serve_is_asked_in_its_own_way(fake, folder, llm, ps, capsys):
    fake.like = 'transformers'
    with pytest.raises(BadInput, match=r'does not say what it serves \(status 500.*served=NAME'): quick(fake, folder)
    s = quick(fake, folder, served='tiny')
    some = Sampling(temperature=0, top_k=7, repetition_penalty=1.3, max_new_tokens=9)
    turns = [s.render(q, style.system) for q in questions]
    assert s.generate(turns, sampling=some)==llm.generate(ps, sampling=some) and not s.refused
    assert not s.same_sampler(replace(some, repetition_penalty=1.))  # the template is the server's
    assert capsys.readouterr().err.count('--set concurrency=1')==1  # one random seed for all requests under way


def test_llama_cpp_is_asked_in_its_own_way(fake, folder, llm, ps):
    fake.like = 'llamacpp'
    s = quick(fake, folder)
    some = Sampling(temperature=0, top_k=7, repetition_penalty=1.3, max_new_tokens=9)
    assert s.window==1024 and s.generate(ps, sampling=some)==llm.generate(ps, sampling=some)
    # the order of transformers, not its own
    assert fake.bodies[0]['samplers']==['penalties', 'temperature', 'top_k', 'top_p']
    assert s.same_sampler(replace(some, repetition_penalty=1.))
    args = heads(llm, ['Кто ты?'], ['Модель.']), tails(llm), DIGITS
    got, want = s.choice_probs(*args), llm.choice_probs(*args)
    assert (got>0).any() and np.allclose(got[got>0], want[got>0], atol=1e-4)
    with pytest.raises(BadInput, match='--set judge=digits'): s.logprobs(ps, answers)


def test_an_interrupt_ends_it_and_keeps_what_is_done(fake, folder, ps, tmp_path):
    fake.delay, kept = .05, []
    def stop(batch):
        kept.extend(batch)
        raise KeyboardInterrupt
    t = time.time()
    with pytest.raises(KeyboardInterrupt):
        quick(fake, folder, concurrency=2).generate(ps*50, sampling=greedy, on_batch=stop)
    assert kept and fake.asked<50 and time.time()-t<5


# a hostile one: keys, redirects, sizes, counts, times, messages

KEY = 'canary-sesame-42'


@pytest.fixture
def keys(monkeypatch):
    "Keys in the environment, as a user has them who also works with OpenAI"
    for k in ('OPENAI_API_KEY', 'OPENAI_ADMIN_KEY', 'OPENAI_ORG_ID', 'OPENAI_PROJECT_ID'):
        monkeypatch.setenv(k, f'not-for-you-{k}')
    monkeypatch.setenv('OPENAI_CUSTOM_HEADERS', 'X-Extra: not-for-you')
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9/not-for-you')
    monkeypatch.setenv('SELFALIGN_API_KEY', KEY)


def test_a_server_gets_its_own_key_and_nothing_else(fake, folder, ps, keys, monkeypatch):
    quick(fake, folder).generate(ps[:1], sampling=greedy)
    assert len(fake.heads)>=3 and {h.get('authorization') for h in fake.heads}=={f'Bearer {KEY}'}
    monkeypatch.delenv('SELFALIGN_API_KEY')
    quick(fake, folder).generate(ps[:1], sampling=greedy)
    assert fake.heads[-1].get('Authorization') is None and 'not-for-you' not in str(fake.heads)
    assert {k for h in fake.heads for k in h}<={'host', 'accept', 'accept-encoding', 'connection', 'user-agent',
                                                         'authorization', 'content-type', 'content-length'}


def test_no_key_over_plain_http(fake, folder, ps, keys, monkeypatch, capsys):
    "`localhost` counts as another machine here; what it says of the key it was not given is explained"
    from selfalign.machine import transport
    monkeypatch.setattr(transport, 'is_loopback', lambda host: False)
    monkeypatch.setattr(transport, '_said', set())
    s = quick(fake, folder)
    s.generate(ps[:2], sampling=greedy)
    assert KEY not in str(fake.heads) and {h.get('authorization') for h in fake.heads}=={None}
    err = capsys.readouterr().err
    assert err.count('going on without a key')==1 and 'use https, or an ssh tunnel' in err and KEY not in err
    fake.fault = lambda n, body: 401
    with pytest.raises(BadInput, match='refuses the key.*SELFALIGN_API_KEY is sent over https or to this machine only'):
        s.generate(ps[:1], sampling=greedy)


def test_a_key_for_openai_is_not_taken_for_ones_own(fake, folder, ps, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-not-for-you-1234')
    monkeypatch.delenv('SELFALIGN_API_KEY', raising=False)
    fake.fault = lambda n, body: 401
    with pytest.raises(BadInput, match=r'set SELFALIGN_API_KEY \(OPENAI_API_KEY is not sent to servers\)'):
        quick(fake, folder).generate(ps[:1], sampling=greedy)
    assert 'not-for-you' not in str(fake.heads)


def test_a_broken_key_is_one_line(fake, folder, monkeypatch):
    monkeypatch.setenv('SELFALIGN_API_KEY', 'two\nlines-sesame')
    with pytest.raises(BadInput, match='SELFALIGN_API_KEY: holds a space') as e: quick(fake, folder)
    assert 'sesame' not in str(e.value)


@pytest.mark.parametrize('there', ['http://localhost:{port}/v1/completions', 'http://127.0.0.1:9/', 'https://example.org/'])
def test_no_redirect_to_another_origin(fake, folder, ps, keys, there):
    "The same port under another name is another origin too"
    fake.fault = lambda n, body: there.format(port=fake.server_address[1]) if n==0 else None
    with pytest.raises(BadInput, match='sends its requests on to .*name that server if you trust it') as e:
        quick(fake, folder).generate(ps[:1], sampling=greedy)
    assert fake.asked==1 and '\n' not in str(e.value)


def test_a_redirect_within_the_server_is_followed(fake, folder, llm, ps, keys):
    fake.fault = lambda n, body: fake.url+'/v1/completions' if n==0 else None
    assert quick(fake, folder).generate(ps[:1], sampling=greedy)==llm.generate(ps[:1], sampling=greedy)
    assert {h['authorization'] for h in fake.heads}=={f'Bearer {KEY}'}
    fake.fault = lambda n, body: fake.url+'/v1/completions'
    with pytest.raises(BadInput, match='TooManyRedirects'): quick(fake, folder, tries=1).generate(ps[:1], sampling=greedy)


four = Sampling(temperature=0, repetition_penalty=1., max_new_tokens=4)


@pytest.mark.parametrize('fault,why', [('long', '4000000 characters in at most 4 tokens'), ('longer', 'longer than 4 MiB'),
                                       ('zipped', 'compressed'), ('deep', 'no JSON')])
def test_replies_have_limits(fake, folder, ps, fault, why):
    fake.fault = lambda n, body: fault
    with pytest.raises(BadInput, match=why) as e: quick(fake, folder, tries=2).generate(ps[:1], sampling=four)
    assert fake.asked==2 and len(str(e.value))<400
    fake.fault = lambda n, body: fault if n<4 else None  # it may pass
    assert quick(fake, folder, tries=4).generate(ps[:1], sampling=four)[0][0].n_tokens<=5


def test_an_answer_of_more_tokens_than_asked_for_is_none(fake, folder, ps):
    import fake_server
    fake_server.bad_replies['more'] = dict(choices=[dict(text='да '*40, finish_reason='stop')])
    fake.fault = lambda n, body: 'more'
    with pytest.raises(BadInput, match='tokens where 4 were asked for'):
        quick(fake, folder, tries=1).generate(ps[:1], sampling=four)


def test_counts_that_cannot_be_true_are_counted_here(fake, folder, llm, ps):
    fake.fault = lambda n, body: 'boast'
    c = quick(fake, folder).generate(ps[:1], sampling=four)[0][0]
    assert (c.text, c.n_tokens)==('да', len(llm.tok('да', add_special_tokens=False).input_ids)+1)


def test_a_hundred_thousand_choices_are_not_a_few(fake, folder, ps):
    fake.fault = lambda n, body: 'tops'
    with pytest.raises(BadInput, match='100000 tokens where a few'):
        quick(fake, folder, tries=1).choice_probs(ps[:1], ['А'], DIGITS)


def test_a_byte_now_and_then_is_no_reply(fake, folder, ps):
    fake.fault, t = lambda n, body: 'slow', time.time()
    with pytest.raises(BadInput, match='no answer within 0.5 s'):
        quick(fake, folder, timeout=.5, tries=1).generate(ps[:1], sampling=greedy)
    assert time.time()-t<3


def test_what_it_says_holds_no_controls_and_no_key(fake, folder, ps, keys, tmp_path):
    rows = [dict(prompt_id=str(i), prompt=q) for i,q in enumerate(questions)]
    fake.fault = lambda n, body: 'rude'
    with pytest.raises(BadInput, match=r'status 418: no \[key\]') as e:
        quick(fake, folder, tries=1).generate(ps[:1], sampling=greedy)
    assert str(e.value).isprintable() and KEY not in str(e.value)
    fake.fault = lambda n, body: 'echo'
    sample(rows, quick(fake, folder), tmp_path/'c.jsonl', 1, greedy, style.system, 42)
    assert {r['completion'] for r in read_jsonl(tmp_path/'c.jsonl')}=={'no Bearer [key]'}
    assert not [f for f in tmp_path.rglob('*') if f.is_file() and KEY in f.read_text()]


def test_a_name_that_cannot_be_printed_is_not_taken(fake, folder):
    fake.name = 'tiny\x1b[31m'
    with pytest.raises(BadInput, match='serves nothing that it names') as e: quick(fake, folder)
    assert str(e.value).isprintable()


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(fake, folder, llm, ps, monkeypatch):
    for k in ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    assert quick(fake, folder).generate(ps[:1], sampling=greedy)==llm.generate(ps[:1], sampling=greedy)


# in a run

def test_a_run_asks_the_server_and_reads_no_weights(fake, folder, tmp_path, monkeypatch):
    import selfalign.record as record
    from selfalign.recipe import read_recipe
    from selfalign.run import Run
    def never(*a, **k): raise AssertionError('weights were read')
    monkeypatch.setattr(record, 'load_model', never)
    over = dict(model=str(folder), server=fake.url, limit=8, n_prompts=3, samples=2, max_new_tokens=6, n_test=2,
                judge='mix', answer_repetition_penalty=1.)
    def runs(**kw): return Run(read_recipe('quickstart', **{**over, **kw}), tmp_path)
    steps, run = ('data', 'candidates', 'judge', 'reference'), runs()
    for step in steps: assert run.step(step)
    assert {r['model'] for r in read_jsonl(run.data/'candidates.jsonl')}=={'tiny'} and fake.asked>0
    again = runs(concurrency=4, timeout=9.)  # neither is part of a step's key
    assert not any(again.step(s) for s in steps)
    assert runs(server='').key('candidates')!=run.key('candidates')
    gone = runs(server='http://127.0.0.1:9')  # what is finished needs no server
    assert not any(gone.step(s) for s in steps)
    with pytest.raises(BadInput, match='no server answers'): gone.step('candidates', force=True)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    from selfalign.machine.cli import main
    ask = ['candidates', 'quickstart', '--server', 'http://127.0.0.1:9', '--root', str(tmp_path)]
    assert main(ask)==2
    assert main(['data', 'quickstart', '--limit', '8', '--root', str(tmp_path)])==0
    assert main(ask)==2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err)==2 and 'no server answers there' in err[1]


def test_an_audit_asks_the_server(fake, folder, tmp_path, monkeypatch, capsys):
    from selfalign.machine import cli, commands
    asked = []
    monkeypatch.setattr(commands, 'audit', lambda llm, *a, **k: asked.append(llm) or {})
    assert cli.main(['audit', '--model', str(folder), '--server', fake.url, '--json'])==0
    assert isinstance(asked[0], Server) and asked[0].name=='tiny'
    assert cli.main(['audit', '--model', str(folder), '--server', fake.url, '--adapter', str(tmp_path)])==2
    assert 'selfalign export' in capsys.readouterr().err


# a real one

@pytest.fixture(scope='module')
def real():
    url = os.environ.get('SELFALIGN_TEST_SERVER')
    if not url:
        pytest.skip('no real server to test against: start one with `python .ci/serve_vllm.py` '
                    'and set SELFALIGN_TEST_SERVER to the URL it prints')
    qs = [r['prompt'] for r in load_instructions('embedded', style)[0] if r['split']=='test'][:8]
    s = Server(url, 'embedded', os.environ.get('SELFALIGN_TEST_SERVED', ''))
    return s, load('embedded', device='cpu', dtype='float32'), qs


def can(s, verb, *args):
    "What a verb gives, or a skipped test where a server other than vLLM says that it cannot"
    try: return getattr(s, verb)(*args)
    except BadInput as e:
        refused = 'can answer but not grade' in str(e) or 'of a given text' in str(e)
        if s.owner!='vllm' and refused: pytest.skip(str(e))
        raise


def test_a_real_server_gives_our_choice_probs(real):
    s, llm, qs = real
    args = heads(llm, qs[:4], ['Потому что так устроен мир.']*4), tails(llm), DIGITS
    want, near = llm.choice_probs(*args), 5e-3 if s.owner=='llamacpp' else 1e-3  # parts of its numbers are in 16 bits
    for refused in (set(), {'logprob_token_ids'}):
        s.refused = refused
        got = can(s, 'choice_probs', *args)
        assert np.allclose(got, want, atol=near)
        assert np.allclose(expected_score(got)[0], expected_score(want)[0], atol=10*near)


def test_a_real_server_gives_our_logprobs(real):
    s, llm, qs = real
    texts = ['Потому что так устроен мир.', 'Да.', 'Нет, это не так.', 'Не знаю']
    ps = [s.render(q, style.system) for q in qs[:4]]
    for a,b in zip(can(s, 'logprobs', ps, texts), llm.logprobs(ps, texts)): assert np.allclose(a, b, atol=.01)


def test_a_real_server_answers_as_we_do(real):
    s, llm, qs = real
    ps, s.refused, ties = [s.render(q, style.system) for q in qs], set(), 2 if s.owner=='llamacpp' else 1
    for penalty in (1., 1.2):
        g = Sampling(temperature=0, repetition_penalty=penalty, max_new_tokens=24)
        same = sum(a==b for a,b in zip(s.generate(ps, sampling=g), llm.generate(ps, sampling=g)))
        assert same>=len(qs)-ties  # a tie of two tokens may fall either way
    assert not s.refused  # it took every setting
    warm = Sampling(max_new_tokens=12)
    assert len({c.text for c in s.generate(ps[:1], 4, warm)[0]})>1
