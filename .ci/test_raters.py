"What people's scores say of a judge: rank correlations that hold, scales and raters kept apart, nothing missing that counts."
import json, math

import numpy as np
import pandas as pd
import pytest

from selfalign import raters
from selfalign.machine.files import BadInput, read_json, repo_file
from selfalign.raters import answers_of, audit_scores, check_enough, jackknife, known_mix, ordinal_alpha, people_correlations
from selfalign.raters import rank_correlation, raters_agreement, read_scores, scores_table, scores_text, standard_ranks, too_little


@pytest.fixture(scope='module')
def style():
    from selfalign.style import load_style
    return load_style('brief-ru')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    from selfalign.machine.tiny import tiny
    return str(tiny(tmp_path_factory.mktemp('model')/'tiny', digits=.5))


@pytest.fixture(scope='module')
def judge(small):
    from selfalign.llm import load
    return load(small, device='cpu')


def cell(i, scores, criterion='correct', scale=None, prompt=None):
    return dict(prompt=f'q{i}' if prompt is None else prompt, completion=f'a{i}', criterion=criterion, scale=scale, scores=list(scores), raters=[None]*len(scores))


def heard(n, rng, **voices): return dict(length=rng.integers(5, 200, n).tolist(), **voices)


# Ranks and their correlation

def test_it_is_spearmans():
    rng = np.random.default_rng(0)
    for n in (5, 40, 300):
        x, y = rng.integers(0, 3, n), rng.normal(size=n).round(1)
        x[:3] = 0, 1, 2
        want = pd.Series(x).rank().corr(pd.Series(y).rank())
        assert rank_correlation(x, y)==pytest.approx(want, abs=1e-8) and rank_correlation(y, x)==pytest.approx(want, abs=1e-8)


def test_only_the_order_counts():
    x = np.random.default_rng(1).normal(size=50)
    assert rank_correlation(x, np.exp(5*x))==1 and rank_correlation(x, -x**3)==-1
    assert rank_correlation([1/3, 2/3, 1], [.1+.2-.3+1/3, 2/3, 1])==1  # rounding makes no order


def test_ties_share_a_rank():
    assert standard_ranks([5, 5, 1], ['']*3).tolist()==pytest.approx((np.array([2.5, 2.5, 1])-2)/np.std([2.5, 2.5, 1]))
    assert rank_correlation([1, 1, 2, 2], [1, 2, 1, 2])==0


def test_what_does_not_vary_has_no_correlation():
    for x,y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 1, 1]), ([2], [3]), ([], [])): assert rank_correlation(x, y) is None


def test_two_scales_are_ranked_apart():
    x, y, s = [0, 1, 2, 2, 3, 4], [1, 3, 2, 4, 6, 5], ['0-2']*3+['0-4']*3
    assert rank_correlation(x, y)>.8 and rank_correlation(x, y, s)==pytest.approx(.5)
    assert rank_correlation([0, 1, 2, 10, 20, 30], y, s)==rank_correlation(x, y, s)  # how high a scale goes does not matter


def test_the_partial_correlation_is_the_usual_one():
    rng = np.random.default_rng(2)
    f = rng.normal(size=200)
    x, y = f+rng.normal(size=200), f+rng.normal(size=200)
    xy, xf, yf = (rank_correlation(a, b) for a,b in ((x, y), (x, f), (y, f)))
    assert rank_correlation(x, y, fixed=f)==pytest.approx((xy-xf*yf)/math.sqrt((1-xf**2)*(1-yf**2)), abs=1e-6)
    assert rank_correlation(x, 7-2*f, fixed=f) is None and rank_correlation(f**3, y, fixed=f) is None


# Intervals

def both(x, y): return lambda k: rank_correlation(np.asarray(x)[k], np.asarray(y)[k])


def test_copies_of_an_answer_add_nothing():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 3, 40), rng.normal(size=40)
    one, two = jackknife(both(x, y), range(40)), jackknife(both(np.repeat(x, 3), np.repeat(y, 3)), np.repeat(range(40), 3))
    assert two['mean']==pytest.approx(one['mean']) and two['ci']==pytest.approx(one['ci']) and (one['n'], two['n'])==(40, 120)


def test_the_interval_covers():
    rng, hits = np.random.default_rng(4), []
    truth = 6/math.pi*math.asin(.6/2)  # Spearman's correlation of normal numbers with Pearson's .6
    for _ in range(80):
        x, y = rng.multivariate_normal([0, 0], [[1, .6], [.6, 1]], 25).T
        lo, hi = jackknife(both(x, y), range(25))['ci']
        hits.append(lo<=truth<=hi)
    assert .9<np.mean(hits)<=.995


def test_many_prompts_are_left_out_in_groups():
    rng, calls = np.random.default_rng(5), []
    x, y = rng.normal(size=(2, 600))
    b = jackknife(lambda k: calls.append(k.sum()) or rank_correlation(x[k], y[k]), range(600))
    assert len(calls)==201 and set(calls[1:])=={597}
    assert b['ci'][1]-b['ci'][0]==pytest.approx(4/math.sqrt(600), rel=.2)


def test_where_there_is_no_interval():
    none = [None, None]
    assert jackknife(both([1, 2, 3], [1, 2, 3]), 'abc')==dict(mean=1, ci=none, n=3)      # no spread
    assert jackknife(both([1, 2, 3], [1, 3, 2]), 'aaa')==dict(mean=.5, ci=none, n=3)     # one prompt
    assert jackknife(both([1, 1], [1, 2]), 'ab')==dict(mean=None, ci=none, n=2)
    assert jackknife(both([], []), [])==dict(mean=None, ci=none, n=0)


# People among themselves

observers = ['1 2 3 3 2 1 4 1 2 * * *', '1 2 3 3 2 2 4 1 2 5 * 3', '* 3 3 3 2 3 4 2 2 5 1 *', '1 2 3 3 2 4 4 1 2 5 1 *']
published = [[int(v) for v in u if v!='*'] for u in zip(*map(str.split, observers))]


def test_alpha_is_krippendorffs():
    assert ordinal_alpha([cell(i, s) for i,s in enumerate(published)])==pytest.approx(.815, abs=5e-4)
    assert ordinal_alpha([cell(i, [10*v for v in s][::-1]) for i,s in enumerate(published)])==pytest.approx(.815, abs=5e-4)


def test_alpha_of_agreement_and_of_chance():
    rng = np.random.default_rng(6)
    assert ordinal_alpha([cell(i, [i%3]*2) for i in range(12)])==1
    assert ordinal_alpha([cell(i, [1, 1]) for i in range(12)]) is None
    assert ordinal_alpha([cell(i, [i]) for i in range(12)]) is None and ordinal_alpha([]) is None
    assert abs(ordinal_alpha([cell(i, rng.integers(0, 3, 3)) for i in range(1000)]))<.06


def test_alpha_looks_within_criterion_and_scale():
    "Opposite scores within each scale: no agreement, however far apart the scales"
    low, high = ([cell(f'{s}{i}', [a, 1-a+0], scale=s) for i,a in enumerate([0, 1]*6)] for s in ('0-1', '10-11'))
    for c in high: c['scores'] = [10+x for x in c['scores']]
    assert ordinal_alpha(low+high)==pytest.approx(ordinal_alpha(low)) and ordinal_alpha(low)<-.8


def test_few_cells_have_no_alpha():
    cells = [cell(i, [i%3, i%2]) for i in range(9)]
    assert raters_agreement(cells)==dict(mean=None, ci=[None, None], n=9)
    assert raters_agreement(cells+[cell(9, [1])])['n']==9 and raters_agreement(cells+[cell(9, [1, 2])])['mean'] is not None


# Judges whose quality is known

def made(n=60, seed=7, **kw):
    rng = np.random.default_rng(seed)
    return [cell(i, [x], **kw) for i,x in enumerate(rng.integers(0, 3, n))], rng


def test_the_judge_that_people_are():
    cells, rng = made()
    for grades in ([c['scores'][0] for c in cells], [2**c['scores'][0]-9 for c in cells]):
        v = people_correlations(cells, heard(60, rng, mix=grades))['correct']['voices']
        assert v['mix']['people']==dict(mean=1, ci=[None, None], n=60) and v['mix']['at_length']['mean']==1


def test_dice():
    cells, rng = made(600)
    v = people_correlations(cells, heard(600, rng, mix=rng.normal(size=600).tolist()))['correct']['voices']['mix']
    for b in v.values(): assert abs(b['mean'])<.08 and b['ci'][0]<0<b['ci'][1] and b['n']==600


def test_a_judge_that_counts_words():
    cells, rng = made()
    h = heard(60, rng)
    v = people_correlations(cells, {**h, 'mix': [5-x/99 for x in h['length']]})['correct']['voices']
    assert v['mix']['people']['mean']==pytest.approx(-v['length']['people']['mean'])
    assert v['mix']['at_length']==dict(mean=None, ci=[None, None], n=60) and 'at_length' not in v['length']


def test_a_judge_that_sees_more_than_length():
    rng = np.random.default_rng(8)
    length, worth = rng.integers(5, 200, 80), rng.normal(size=80)
    cells = [cell(i, [int(x)]) for i,x in enumerate(np.digitize(worth+length/100, [0, 1.5]))]
    v = people_correlations(cells, dict(length=length.tolist(), mix=worth.tolist()))['correct']['voices']
    assert v['mix']['at_length']['ci'][0]>max(.3, v['mix']['people']['ci'][0])


def test_the_mean_of_several_raters_is_compared():
    cells = [cell(i, s) for i,s in enumerate([[0, 0], [0, 1], [1, 1], [1, 2, 2], [2, 2]]*3)]
    grades = [0, .5, 1, 1.7, 2]*3
    r = people_correlations(cells, heard(15, np.random.default_rng(9), mix=grades))['correct']
    assert r['voices']['mix']['people']['mean']==1 and (r['n'], r['scores'], r['raters']['n'])==(15, 33, 15)


@pytest.mark.parametrize('missing', [None, math.nan, math.inf])
def test_an_answer_without_a_grade_is_left_out(missing):
    cells, rng = made()
    grades = [float(c['scores'][0]) for c in cells]
    r = people_correlations(cells, heard(60, rng, mix=[missing]*20+grades[20:], none=[missing]*60))['correct']
    assert r['voices']['mix']['people']==dict(mean=1, ci=[None, None], n=40)
    assert r['voices']['none']['people']==dict(mean=None, ci=[None, None], n=0) and r['voices']['length']['people']['n']==60
    json.dumps(r, allow_nan=False)


def test_too_little_has_no_correlation():
    few, same, rare = [cell(i, [i%3]) for i in range(9)], [cell(i, [2], 'same') for i in range(20)], [cell(i, [int(i<4)], 'rare') for i in range(20)]
    r = people_correlations(few+same+rare, heard(20, np.random.default_rng(0), mix=list(range(20))))
    assert {c: x['why'] for c,x in r.items()}=={
        'correct': '9 answers; at least 10 are needed', 'same': 'people gave 20 of 20 answers the same score; at least 5 must differ',
        'rare': 'people gave 16 of 20 answers the same score; at least 5 must differ'}
    assert all(b['mean'] is None for x in r.values() for v in x['voices'].values() for b in v.values())
    json.dumps(r, allow_nan=False)
    with pytest.raises(BadInput, match='s.csv: no criterion allows a correlation; correct: 9 answers'): check_enough(few+same, 's.csv')
    assert check_enough(few+[cell(9, [1])], 's.csv') and not too_little([0, 1]*5, ['']*10)


def test_a_scale_on_which_people_do_not_differ_says_nothing():
    cells, rng = made(30, scale='0-2')
    grades = [c['scores'][0] for c in cells]
    more = [cell(f'm{i}', [4], scale='0-4') for i in range(30)]
    a, b = (people_correlations(cs, dict(length=list(range(n)), mix=(grades+list(range(30)))[:n]))['correct']['voices']['mix']['people']
            for cs,n in ((cells, 30), (cells+more, 60)))
    assert a==b


# The file

rows = [dict(prompt=f'Сколько будет {i}+{i}?', answer=f'{2*i}', criterion='верно', score=i%3, rater=w, scale='0-2') for i in range(12) for w in ('А', 'Б')]  # how much is i+i? correct


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'parquet', 'json'])
def test_kinds_of_files(tmp_path, kind):
    d, f = pd.DataFrame(rows), tmp_path/f's.{kind}'
    {'csv': lambda: d.to_csv(f, index=False), 'parquet': lambda: d.to_parquet(f),
     'jsonl': lambda: f.write_text('\n'.join(map(json.dumps, rows))), 'json': lambda: f.write_text(json.dumps(rows))}[kind]()
    cells = read_scores(f)
    assert len(cells)==12 and cells[1]==dict(prompt='Сколько будет 1+1?', completion='2', criterion='верно', scale='0-2', scores=[1., 1.], raters=['А', 'Б'])
    assert answers_of(cells)[1]==dict(prompt='Сколько будет 1+1?', completion='2')


def test_columns_that_may_be_missing(tmp_path):
    bare = [{k: v for k,v in r.items() if k not in ('rater', 'scale')} | {'task': 'sums', 'id': i} for i,r in enumerate(rows)]
    (tmp_path/'s.jsonl').write_text('\n'.join(map(json.dumps, bare)))
    c = read_scores(tmp_path/'s.jsonl')[2]
    assert (c['scale'], c['scores'], c['raters'])==(None, [2., 2.], [None, None])


@pytest.mark.parametrize('change,why', [
    (dict(score='хорошо'), "s.jsonl, row 3: score is 'хорошо'; it must be a number"), (dict(score=None), 'row 3: score is'),
    (dict(score=True), 'row 3: score is True'), (dict(score=[1]), r'row 3: score is \[1\]'), (dict(score=10**400), 'row 3: score is 1000'),
    (dict(prompt=' '), 'row 3: prompt is empty'), (dict(criterion=3), 'row 3: criterion is 3; it must be text'), (dict(answer=None), 'row 3: answer is')])
def test_a_bad_row_is_named(tmp_path, change, why):
    (tmp_path/'s.jsonl').write_text('\n'.join(json.dumps({**r, **(change if i==2 else {})}) for i,r in enumerate(rows)))
    with pytest.raises(BadInput, match=why): read_scores(tmp_path/'s.jsonl')


# A model, and the command

@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    rs = [dict(prompt=f'Что такое {w}?', answer=f'Это {w}. '*int(rng.integers(1, 5)), criterion=c, score=int(x))
          for w in 'соль рис лук сыр хлеб рыба суп чай мёд сок мел дом'.split() for c in ('польза', 'верно') for x in rng.integers(0, 3, 2)]  # what is salt (rice ...)? usefulness, correct
    (tmp_path/'s.jsonl').write_text('\n'.join(map(json.dumps, rs)))
    return tmp_path/'s.jsonl'


def test_a_models_voices(judge, style, table):
    cells = read_scores(table)
    found = audit_scores(judge, cells, style)
    names = ['length', 'digits', 'likelihood', 'mix', *(f'digits: {c}' for c in style.criteria)]
    assert list(found['criteria'])==['польза', 'верно'] and all(list(r['voices'])==names for r in found['criteria'].values())
    text = json.dumps(found, allow_nan=False, ensure_ascii=False)
    assert not any(c[k] in text for c in cells for k in ('prompt', 'completion')) and found['fingerprint']==judge.fingerprint()
    t = scores_table(found, dict(польза='useful'))
    assert len(t)==18 and {c for c,_ in t.index}=={'useful', 'верно'} and 'ordinal alpha' in scores_text(found)
    assert list(raters.voices(judge, answers_of(cells)[:2], style.model_copy(update=dict(measures={}))))==[n for n in names if n not in ('likelihood', 'mix')]


def test_an_interrupted_audit_goes_on(judge, style, table, tmp_path, monkeypatch):
    from selfalign import judge as page
    out, cells, real = tmp_path/'out/raters.json', read_scores(table), raters.grade
    def stops(*a, **k): real(*a, **k); raise KeyboardInterrupt
    monkeypatch.setattr(raters, 'grade', stops)
    with pytest.raises(KeyboardInterrupt): audit_scores(judge, cells, style, out=out)
    assert list(out.parent.rglob('*.rows.jsonl'))
    monkeypatch.setattr(raters, 'grade', real)
    with monkeypatch.context() as m:
        m.setattr(page, '_raw_scores', lambda *a: pytest.fail('it is computed already'))
        again = audit_scores(judge, cells, style, out=out)
    assert again==audit_scores(judge, cells, style) and not list(out.parent.iterdir())


def test_the_command(small, table, tmp_path, capsys):
    from selfalign.machine.cli import main
    out = tmp_path/'raters.json'
    assert main(['audit', '--model', small, '--scores', str(table), '--out', str(out)])==0
    said, found = capsys.readouterr().out, read_json(out)
    assert '31 answers to 12 prompts' in said and 'польза' in said and found['mode']=='scores' and found['mix'] is None
    assert main(['audit', '--model', small, '--scores', str(table), '--json'])==0
    assert json.loads(capsys.readouterr().out)==found
    assert not [f for f in tmp_path.iterdir() if f.name not in ('s.jsonl', 'raters.json')]


def test_the_mix_comes_from_an_audit_of_this_judge(style, monkeypatch):
    class llm:
        def fingerprint(self): return 'f'
    audit = dict(fingerprint='f', judge='x', style=style.record(), mix={'a': .25})
    others = {**audit, 'fingerprint': 'g'}, {**audit, 'style': dict(name='other', digest='')}
    shared = {**audit, 'mix': {'a': .25, 'consensus': .5}}  # these tables have no other answers of the model
    for found,want in ((audit, {'a': .25}), (shared, {'a': .25}), ({**audit, 'mix': None}, None), *((x, None) for x in (None, *others))):
        monkeypatch.setattr(raters, 'find_audit', lambda m, found=found: found)
        assert known_mix('x', llm(), style)==want


def test_the_committed_measurement():
    "Made of the committed judge, with the mix of its audit, and without a text of the table"
    found, audit = (read_json(repo_file(f'models/gemma3-270m-warm/{f}.json')) for f in ('raters', 'audit'))
    assert all(found[k]==audit[k] for k in ('fingerprint', 'style', 'model')) and len(found['criteria'])==5
    assert found['mix']=={c: x for c,x in audit['mix'].items() if c!='consensus'}
    voices = [b for r in found['criteria'].values() for v in r['voices'].values() for b in v.values()]
    assert all(-1<=b['ci'][0]<=b['mean']<=b['ci'][1]<=1 and b['n']>=50 for b in voices)
    assert max(map(len, found['criteria']))<60 and len(json.dumps(found))<40_000
