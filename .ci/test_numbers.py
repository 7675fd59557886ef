"Numbers one can believe: nothing missing counts, intervals hold, gold answers are compared alike, and no held-out row is chosen or trained on."
import json, math, re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from selfalign.machine.files import BadInput, read_json, read_jsonl, repo_file
from selfalign.machine.statistics import bootstrap, finite, interval_text, mean_interval, mean_or_none, preferred
from selfalign.machine.statistics import ratio_interval, share_interval

bad = [None, math.nan, math.inf, -math.inf, np.float32('nan')]
feature = dict(pmi=10., pmi_per_token=.5, logp_new=-2., logp_prior=-3., logp_end=-1., repetition=0.)


@pytest.fixture(scope='module')
def style():
    from selfalign.style import load_style
    return load_style('brief-ru')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    from selfalign.llm import load
    from selfalign.machine.tiny import tiny
    return load(tiny(tmp_path_factory.mktemp('model')/'tiny', digits=.5), device='cpu')


# What is missing is no grade, no win and no part of a mean

@pytest.mark.parametrize('x', bad)
def test_a_feature_that_is_no_number_is_no_grade(style, x):
    from selfalign.judge import combine, likelihood_scores, _score_row
    for m in {m for m,_,_ in style.measures.values()}:
        grades = likelihood_scores({**feature, m: x}, style)
        assert all((g is None)==(style.measures[c][0]==m) for c,g in grades.items())
        row = dict(digits=dict.fromkeys(style.criteria, 3.), likelihood=grades)
        assert combine(row, 'mix', style)[1] is None and combine(row, 'likelihood', style)[1] is None
    found = dict(digits=None, mass=None, likelihood=None, joint=None, features={**feature, 'pmi': x})
    class judge: name = 'x'
    assert _score_row({}, found, judge, 'digits', style, None, None)['features']['pmi'] is None


def test_finite_features_keep_their_grades(style):
    from selfalign.judge import likelihood_scores
    for c,(m,lo,hi) in style.measures.items():
        for x in (lo, hi, (lo+hi)/2, lo-9, hi+9):
            assert likelihood_scores({**feature, m: x}, style)[c]==1+4*min(1., max(0., (x-lo)/(hi-lo)))


@pytest.mark.parametrize('x', bad)
def test_digits_that_are_no_numbers_are_no_grade(style, x):
    from selfalign.judge import combine, digit_scores, mean_score
    p = np.full((1, len(style.criteria), 5), .2)
    p[0, 0, 2] = np.nan if x is None else x
    (grades, mass), = digit_scores(p, style)
    assert [g is None for g in grades.values()]==[True]+[False]*(len(grades)-1)
    assert None not in list(mass.values())[1:] and list(mass.values())[0] is None
    json.dumps([grades, mass], allow_nan=False)
    row = dict(digits=dict.fromkeys(style.criteria, x), likelihood=None, joint=x)
    assert combine(row, 'digits', style)[1] is None and combine(row, 'joint', style)[1] is None
    assert mean_score(dict(a=3., b=x)) is None


def test_digits_and_calibration():
    from selfalign.judge import calibrated, expected_score
    assert expected_score([0, 0, 0, .5, .5])[0]==4.5 and calibrated([.1, .1, .1, .1, .6], temperature=2.)[4]<.6


@pytest.mark.parametrize('x', bad)
def test_no_verdict_and_no_part_of_a_mean(x):
    from selfalign.people import people_summary
    from selfalign.win_rate import lc_win_rate, verdict
    assert finite(x) is None and verdict(x) is None and preferred(x, 1) is None and preferred(1, x) is None
    assert mean_or_none([x, 2, 4])==3 and mean_or_none([x]) is None
    for f in (share_interval, mean_interval, bootstrap):
        assert f([x, 1, 0, 1])==f([1, 0, 1]) and f([x])==f([])==dict(mean=None, ci=[None, None], n=0)
    assert ratio_interval([1, 2, x, 4], [1, 1, 1, 1])==ratio_interval([1, 2, 4], [1, 1, 1])
    wins, gaps = [1, 0, 1, .5]*12, list(range(-20, 28))
    assert lc_win_rate([*wins, x, 1], [*gaps, 3, x])==lc_win_rate(wins, gaps)
    said = people_summary([('A', dict(p=1., q=x)), ('B', dict(p=0., q=x))], dict(p=1., q=x))
    assert said['win_rate']==.5 and said['n']==1 and [e['win_rate'] for e in said['each']]==[1, 0]


def test_nothing_at_all_has_no_mean():
    from selfalign.win_rate import lc_win_rate
    assert ratio_interval([], [])['mean'] is None and ratio_interval([0, 0], [1, 2])['mean'] is None
    assert lc_win_rate([], [])['mean'] is None
    assert mean_interval([3])==dict(mean=3, ci=[None, None], n=1) and '(no interval)' in interval_text(mean_interval([3]))


# Intervals

def test_six_of_six_is_not_certainty():
    from selfalign.evaluate import win_text
    lo, hi = share_interval([1]*6)['ci']
    assert .5<lo<.62 and hi==1
    assert share_interval([.5]*6)['ci'][0]<.4 and share_interval([[1, 1]]*6)['ci'][0]<.62
    b = share_interval([1]*6)
    ev = dict(n=6, win_rate=b['mean'], win_rate_ci=b['ci'], ties=0, ungraded=0, lc_win_rate=None, lc=dict(doubts=[]))
    assert '100% (56% to 100%)' in win_text(ev, 'x')


def binomial(n, p):
    k = np.arange(n+1)
    logs = [math.lgamma(n+1)-math.lgamma(i+1)-math.lgamma(n-i+1)+i*math.log(p)+(n-i)*math.log(1-p) for i in k]
    return np.exp(logs)


@pytest.mark.parametrize('n', [5, 6, 10, 20, 32, 64, 128, 512])
def test_a_share_is_covered(n):
    "Exactly, for every share from .5 to .99"
    ends = [share_interval([1]*k+[0]*(n-k))['ci'] for k in range(n+1)]
    for p in np.arange(.5, .995, .01):
        covers = sum(w for w,(lo,hi) in zip(binomial(n, p), ends) if lo<=p<=hi)
        assert covers>.9, (n, p, covers)
    if n==32: assert sum(w for w,(lo,hi) in zip(binomial(n, .97), ends) if lo<=.97<=hi)>.94


def test_the_interval_of_shares_knows_prompts_and_ties():
    rng = np.random.default_rng(0)
    def width(x): lo, hi = share_interval(x)['ci']; return hi-lo
    x = rng.integers(0, 2, 40).astype(float)
    assert width(np.repeat(x[:, None], 5, 1))==pytest.approx(width(x))   # copies of one outcome add nothing
    assert width([.5]*30+[1]*5+[0]*5)<width([1]*20+[0]*20)
    assert share_interval([-1, 0, 1], -1)['ci']==pytest.approx([2*e-1 for e in share_interval([0, .5, 1])['ci']])
    with pytest.raises(ValueError, match='not between 0 and 1'): share_interval([2, 3])


def test_the_t_interval_is_students():
    assert mean_interval([1, 2, 3, 4, 5])['ci']==pytest.approx([3-2.77645*.5**.5, 3+2.77645*.5**.5], abs=1e-4)


def test_every_share_of_the_project_has_it(style):
    from selfalign import agreement, audit, biases, evaluate, people
    for m in (agreement, audit, biases, evaluate, people): assert not hasattr(m, 'bootstrap'), m.__name__
    pairs = [dict(prompt_id=i, prompt='q', good='a', bad='b', flaw=None) for i in range(6)]
    scored = [dict(digits=dict.fromkeys(style.criteria, x), likelihood=None) for x in (5, 1)*6]
    s = agreement.agreement_summary(agreement.agreement(pairs, scored, style, 'digits'), style)
    assert s['agreement']==1 and s['ci'][0]<.62
    rows = [dict(prompt='q', completion='a', corruption=k, of=i, digits=dict.fromkeys(style.criteria, 1 if k else 5),
                 likelihood=None) for i in range(6) for k in (None, 'cut')]
    test = audit.corruption_test(rows, style, 'digits')
    assert test['all']['mean']==1 and test['all']['ci'][0]<.62


# The evaluation's table

def answers(model, scores, texts=None):
    return [dict(prompt_id=str(i), prompt='Вопрос?', completion=texts[i] if texts else 'да нет', model=model, n_tokens=3+i, finished=True,
                 score=s, features=None if s is None else dict(pmi=s, pmi_per_token=s)) for i,s in enumerate(scores)]


def test_a_row_stands_on_one_set_of_instructions(style):
    from selfalign.evaluate import MEASURES, compare, red_flags, table, win_text
    ref = answers('reference', [1., 2., None, 3., 2.], ['да', '1', 'да', 'yes', 'да'])
    pol = answers('policy', [2., math.nan, 4., 5., 2.], ['да', 'да', '2', 'да', 'да'])
    ev = compare(ref, pol, style, {'0': ['да'], '1': ['?']})
    for k in MEASURES:
        x, y, d = ev['reference']['measures'][k], ev['policy']['measures'][k], ev['difference'][k]
        assert x['n']==y['n']==d['n'] and (not d['n'] or d['mean']==pytest.approx(y['mean']-x['mean'])), k
    t = table(ev, style)
    assert t.loc['mean grade by the judge, 1 to 5'][['n', 'none']].tolist()==[3, 2]
    assert t.loc['share mostly in Cyrillic script'][['n', 'none']].tolist()==[3, 2]
    assert t.loc['share that holds the gold answer'][['n', 'none']].tolist()==[1, 4]
    assert ev['ungraded']==2 and '2 of 5 had no verdict' in win_text(ev, 'x')
    flags = ' '.join(red_flags(ev, pol, style))
    assert '2 of 5 pairs have no verdict, more than 10%' in flags and '1 questions have gold answers without a word' in flags
    none = compare(answers('reference', [None]*24), answers('policy', [None]*24), style)
    assert none['win_rate'] is None and '24 of 24 had no verdict' in win_text(none, 'x')
    json.dumps(ev, allow_nan=False)


def test_one_pair_of_answers_is_compared(style, tmp_path):
    "Without an interval nothing breaks: table, warnings, figure, report"
    from selfalign.evaluate import compare, length_text, plot_evaluation, red_flags, report_md, table
    ref, pol = answers('reference', [1.]), answers('policy', [2.])
    ev = compare(ref, pol, style)
    assert 'no interval: n is 1' in length_text(ev['shorter']) and len(table(ev, style)) and report_md(ev, ref, pol, style)
    red_flags(ev, pol, style); plot_evaluation(ev, ref, pol, style)


def test_model_text_is_no_markdown(style):
    from selfalign.evaluate import compare, report_md
    evil = '<script>alert(1)</script> ![x](https://a.b/c.png) [y](https://a.b) `|` <!--'
    ref, pol = answers('reference', [1., 2.], [evil]*2), answers('policy', [1., 2.], [evil]*2)
    ref[0]['prompt'] = evil
    md = report_md(compare(ref, pol, style), ref, pol, style)
    assert not re.search(r'<script|<!--|!\[x\]|\]\(https', md) and 'alert(1)' in md


# A length effect that is bent at equal length

def doubts(judge, n=128, rounds=100):
    from selfalign.win_rate import lc_win_rate
    rng, found = np.random.default_rng(0), []
    for _ in range(rounds):
        g = rng.normal(-1, 1, n)
        wins = np.where(rng.random(n)<.1, .5, rng.random(n)<1/(1+np.exp(-judge(g))))
        found.append(any('two slopes' in d for d in lc_win_rate(wins, 20*g)['doubts']))
    return np.mean(found)


def test_a_bent_length_effect_raises_a_doubt():
    assert doubts(lambda g: .5-2*np.maximum(g, 0))>.45 and doubts(lambda g: .5-2*np.maximum(g, 0), 300)>.8
    assert doubts(lambda g: .5-g)<.2 and doubts(lambda g: 0*g)<.2


# Gold answers

def test_gold_answers_are_compared_alike():
    from selfalign.gold import gold_found, qa_scores
    for a,b in [('Королёв', 'Королев'), ('Москва\u0301', 'москва'), ('４２', '42'), ('ﬁn', 'FIN'), ('Café', 'cafe'), ('Моск\u00adва', 'Москва')]:
        for t,g in ((a, b), (b, a)):
            s = qa_scores(t, [g])
            assert [gold_found(t, [g]), s['em'], s['f1'], round(s['chrf'])]==[1, 1, 1, 100], (t, g)
    for t,g in [('C', 'C++'), ('C++', 'C'), ('C#', 'C++'), ('18', '8'), ('5', '−5'), ('-5', '5'), ('мой', 'мои')]:
        assert gold_found(t, [g])==0 and qa_scores(t, [g])['em']==0, (t, g)
    assert gold_found('Это C++.', ['c++'])==1 and gold_found('Это было -5 градусов', ['−5'])==1


def test_two_texts_without_a_word_are_not_equal():
    from selfalign.gold import gold_found, qa_scores
    none = dict(em=None, f1=None, chrf=None)
    assert gold_found('!', ['?']) is None and qa_scores('!', ['?'])==none and qa_scores('', ['…', ''])==none
    assert gold_found('!', ['?', 'да'])==0 and qa_scores('!', ['?', 'да'])['em']==0


def test_a_text_is_one_gold_answer():
    from selfalign.machine.tables import _gold
    shapes = ['Москва', ['Москва'], {'text': 'Москва'}, {'text': ['Москва'], 'answer_start': [0]}, [{'text': 'Москва'}],
              "{'text': 'Москва'}", '{"answer_start": [0], "text": ["Москва"]}', '["Москва"]', {'text': np.array(['Москва'])}]
    assert [_gold(v) for v in shapes]==[['Москва']]*len(shapes)
    assert [_gold(v) for v in (None, '', [], {'text': []}, {'text': None}, math.nan)]==[None]*6 and _gold(8)==['8']


def test_questions_with_one_answer_as_text(tmp_path):
    from selfalign.machine.messages import load_messages
    f = tmp_path/'q.jsonl'
    f.write_text(json.dumps(dict(id='a', context='Москва — столица.', question='Столица?', answers={'text': 'Москва'}), ensure_ascii=False))
    assert list(load_messages(str(f)).gold)==[['Москва']]


# Choices and measures of a text

def spaced(*pieces):
    "A tokenizer that begins every text with a space"
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = ['<unk>', '\n', 'a', ':', '1', '2', '▁', *pieces]
    t = tokenizers.Tokenizer(tokenizers.models.Unigram([(p, -len(letters)+len(p)*3.) for p in letters], 0))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>')


@pytest.mark.parametrize('pieces', [('▁1', '▁2'), ()])
def test_the_token_that_follows_the_prompt(pieces):
    from selfalign.machine.scoring import choice_ids
    tok = spaced(*pieces)
    assert tok.convert_ids_to_tokens(choice_ids(tok, ['1', '2'], 'a:\n'))==['1', '2']
    with pytest.raises(BadInput, match="'12' is . tokens"): choice_ids(tok, ['12'], 'a:\n')


def test_choices_without_a_suffix(small):
    heads, digits = ['Оцени:\n', 'Оцени ещё раз:\n'], ['1', '2']
    assert small.choice_probs(heads, [], digits).shape==(2, 0, 2)
    p = small.choice_probs(heads, ['', 'да:\n', ''], digits)
    assert np.allclose(p[:, 0], small.choice_probs(['Оцени', 'Оцени ещё раз'], [':\n'], digits)[:, 0], atol=1e-5)
    assert (p[:, 0]==p[:, 2]).all() and np.allclose(p[:, 1], small.choice_probs(heads, ['да:\n'], digits)[:, 0], atol=1e-5)


def test_the_measure_of_a_long_text(small, style):
    "PMI per token is over the tokens that were read, also where a text exceeds half the window"
    from selfalign.likelihood import answer_features, new_tokens, pmi, token_texts
    from selfalign.machine.scoring import answer_ids
    row = dict(prompt='Да?', completion=' '.join(f'слово{i} да' for i in range(120)))
    with patch.object(type(small), 'window', 128):
        ids = answer_ids(small, row['completion'])
        assert len(ids)==64<len(small.encode(row['completion']))
        f, = answer_features(small, [row], style)
        (info, lp), = pmi(small, [row['prompt']], [row['completion']], style)
    new = new_tokens(*(token_texts(small, i) for i in (small.encode(row['prompt']), ids)))
    assert len(lp)==len(ids)+1 and f['pmi']==pytest.approx(sum(g for g,n in zip(info.tolist(), new) if n))
    assert f['pmi_per_token']==pytest.approx(f['pmi']/64)
    assert f['logp_new']==pytest.approx(np.mean([x for x,n in zip(lp.tolist(), new) if n]))


# The sheet

def test_an_answer_cannot_break_the_sheet(style, tmp_path):
    from selfalign.people import write_sheet
    evil = [dict(id='1', prompt='<!-- <script>', left='</script><b>', right='<!--')]
    html = write_sheet(evil, tmp_path/'s.html', style).read_text(encoding='utf-8')
    assert html.count('<script>')==html.count('</script>')==1 and '<!--' not in html and '<b>' not in html
    assert json.loads(re.search('const D = (.*), T = D.text', html)[1])['rows']==evil


# Held-out rows reach no choice and no training

@pytest.fixture(scope='module')
def splits(style):
    from selfalign.instructions import load_instructions
    rows = load_instructions('embedded', style)[0]
    return {s: {k: {r[k] for r in rows if r['split']==s} for k in ('prompt_id', 'prompt')} for s in ('train', 'test')}


def test_an_audit_chooses_on_training_rows(style, splits, small):
    from selfalign.audit import audit, audit_data, chosen_on
    good, ranked, _, chooses = audit_data('embedded', 8, 0, style)
    for rows,split in ((good, 'test'), (ranked, 'test'), (chooses, 'train')):
        assert rows and {r['prompt_id'] for r in rows}<=splits[split]['prompt_id']
    with patch('selfalign.audit.choose_mix', side_effect=choose) as seen:
        found = audit(small, good[:3], style, 'mix', pairs=ranked[:2], chooses=chooses[:2])
    assert {r['prompt'] for call in seen.call_args_list for r in call.args[0]}<=splits['train']['prompt']
    assert set(found['chosen']['prompt_ids'])<=splits['train']['prompt_id'] and found['chosen']['split']==['train']
    assert set(found['reported']['prompt_ids'])<=splits['test']['prompt_id'] and found['n']==3
    assert chosen_on(found)=='reported on 3 held-out answers; the mix was chosen on 2 training answers'
    with pytest.raises(BadInput, match='chosen on and reported on'): audit(small, good[:3], style, chooses=good[:1])


def choose(scored, style):
    import pandas as pd
    return dict.fromkeys(style.criteria, .5), pd.DataFrame({.5: dict.fromkeys(style.criteria, .5)})


def test_the_committed_audit_chose_on_training_rows(splits):
    found = read_json(repo_file('models/gemma3-270m-warm/audit.json'))
    assert set(found['chosen']['prompt_ids'])<=splits['train']['prompt_id']
    assert set(found['reported']['prompt_ids'])<=splits['test']['prompt_id']


def test_a_warm_start_trains_on_training_rows(style, splits, small):
    "No held-out instruction is in its rows: those that `warm_start` builds, whatever trains on them"
    from selfalign import sft
    seen = []
    class Stop(Exception): pass
    def stop(*a, **kw): raise Stop
    def spy(f): return lambda *a, **kw: seen.append(r := f(*a, **kw)) or r
    with (patch.object(sft, 'answer_rows', spy(sft.answer_rows)), patch.object(sft, 'grading_rows', spy(sft.grading_rows)),
          patch.object(sft, 'load', lambda *a, **kw: small), patch.object(sft, 'as_tokens', stop),
          patch.object(sft, 'run_trainer', stop)):
        with pytest.raises(Stop):
            sft.warm_start(Path(small.name).parent/'warm', 'embedded', small.name, style, sft.SFTSettings(grading_rows=40))
    text = json.dumps(seen, ensure_ascii=False, default=str)
    assert len(seen)==2 and any(json.dumps(p, ensure_ascii=False)[1:-1] in text for p in splits['train']['prompt'])
    for p in splits['test']['prompt']:
        if len(p)>25: assert json.dumps(p, ensure_ascii=False)[1:-1] not in text, p


def test_a_run_and_a_frontier_choose_on_training_rows():
    "Instructions of `n_validation` and of candidates are training ones, and apart from each other"
    from selfalign.steps import test_rows, train_rows
    rows = [dict(prompt_id=str(i), prompt=str(i), split='test' if i%3==0 else 'train') for i in range(60)]
    class r: name, n_prompts, n_test = 'x', 0, 50
    class run: data = Path('.')
    run.r = r
    with patch('selfalign.steps.read_jsonl', lambda f, *_: rows):
        r.n_validation = 0
        train, held = train_rows(run), test_rows(run)
        r.n_validation = 10
        some, aside = train_rows(run), test_rows(run)
    assert {x['split'] for x in train+some+aside}=={'train'} and {x['split'] for x in held}=={'test'}
    assert len(aside)==10 and not {x['prompt_id'] for x in some} & {x['prompt_id'] for x in aside}


def test_settings_are_not_compared_on_held_out_rows(tmp_path):
    from selfalign.results import frontier
    for kw in (dict(n_validation=0), dict(grid='n_validation=0,10')):
        with pytest.raises(BadInput, match='n_validation'): frontier('brief', **{'grid': 'beta=.1,.5', **kw}, root=tmp_path)


def test_a_sweep_can_take_a_value_away(tmp_path, monkeypatch):
    "`length_gap=` means none, not the recipe's"
    from selfalign import results
    from selfalign.recipe import read_recipe
    seen = []
    def caught(base, one, steps): seen.append((one.r.length_gap, one.r.beta)); raise BadInput('enough')
    monkeypatch.setattr(results, 'train_beside', caught)
    monkeypatch.setattr(results.Run, 'step', lambda *a, **k: None)
    rows = results.frontier('brief', 'length_gap=,-3; beta=.5', tmp_path, 8)
    assert read_recipe('brief').length_gap==-20 and seen==[(None, .1), (-3, .1), (-20, .5)] and [r['failed'] for r in rows]==['enough']*3


def test_the_committed_choices_are_of_training_rows(splits):
    "The frontier's settings were compared on training instructions; the answers that are reported are held out"
    folder = repo_file('models/gemma3-270m-brief')
    assert {r['prompt_id'] for r in read_jsonl(folder/'answers_graded.jsonl')}<=splits['test']['prompt_id']
    for r in read_json(folder/'frontier_120.json'): assert r['n']==40
