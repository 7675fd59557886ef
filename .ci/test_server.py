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
    t = time.time()
    assert quick(fake, folder, timeout=1.).generate(ps[:2], sampling=greedy)==llm.generate(ps[:2], sampling=greedy)
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
        with pytest.raises(BadInput, match='OPENAI_API_KEY') as e: Server(u, folder)
        assert 'sesame' not in str(e.value)


def test_a_wrong_key_stops_at_once(fake, folder, ps):
    fake.fault = lambda n, body: 401
    with pytest.raises(BadInput, match='OPENAI_API_KEY'): quick(fake, folder).generate(ps, sampling=greedy)


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
    assert turns[0].messages==[dict(role='user', content=f'{style.system}\n\nПривет!')]
    args = turns[:1], ['А'], DIGITS
    with pytest.raises(BadInput, match='can answer but not grade'): quick(fake, folder).choice_probs(*args)
    assert s.generate(turns, sampling=greedy)==llm.generate(turns, sampling=greedy)
    for go in (lambda: s.choice_probs(*args), lambda: s.generate([turns[0]+'Да'], sampling=greedy)):
        with pytest.raises(BadInput, match='/v1/completions'): go()


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


# in a run

def test_a_run_asks_the_server_and_reads_no_weights(fake, folder, tmp_path, monkeypatch):
    import selfalign.run as run_
    from selfalign.recipe import read_recipe
    from selfalign.run import Run
    def never(*a, **k): raise AssertionError('weights were read')
    monkeypatch.setattr(run_, 'load', never)
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
    assert 'selfalign merge' in capsys.readouterr().err


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
