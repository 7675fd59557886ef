"""What holds for every input: a strategy that makes inputs, and a check. `.ci/fuzz.py` runs the same checks for as long as one likes.

The inputs do not depend on chance (`derandomize`), so that a test that passes here passes everywhere. The last part checks
what holds for every step of a run, on two runs of a tiny model in two folders."""
import gzip, json, math, os, tempfile
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from selfalign.machine.files import BadInput

PROPERTIES = {}  # name: (strategy, check, number of inputs in the tests)


def holds(strategy, examples=60):
    "Register a check of one input"
    def add(check): PROPERTIES[check.__name__] = strategy, check, examples; return check
    return add


def profile(examples, **kw):
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **kw)


@contextmanager
def refused():
    "What is refused is refused in one line that says something"
    try: yield
    except BadInput as e: assert str(e).strip() and '\n' not in str(e).strip(), repr(str(e))


@cache
def here(): return Path(tempfile.mkdtemp(prefix='properties'))


def put(name, data):
    "A file with these bytes"
    p = here()/name
    p.write_bytes(data)
    return p


# Values

odd = st.sampled_from(['', ' ', '\ud800', 'a\ud83d', '\x00', '\ufeff', '\u2028', 'é', 'e\u0301', 'Ёлка', 'ёлка', 'İ', 'ß', '1e999', 'nan', '-inf', 'None', '[1', "{'a': 1}",
                       '["а", "б"]', '{"text": "Москва"}', '2024-13-45', 'yes', '9'*5000, '['*2000, '<start_of_turn>user', '١', '½', 'x'*400])
words = st.lists(st.sampled_from('да нет вода огонь зачем Как ЁЛКА 12 the cat . , ? ! \n \t'.split(' ')), max_size=9).map(' '.join)
texts = st.one_of(words, st.text(max_size=24), odd)
numbers = st.one_of(st.integers(-3, 9), st.floats(), st.just(10**400), st.integers(), st.sampled_from([math.nan, math.inf, -0., 1e-320]))
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(plain, lambda c: st.one_of(st.lists(c, max_size=3), st.dictionaries(texts, c, max_size=3)), max_leaves=6)


# Files: what is written is read, whole or not at all

def as_stored(v):
    "A value as JSON in UTF-8 can hold it: half a surrogate pair becomes `?`"
    if isinstance(v, str): return v.encode('utf-8', 'replace').decode()
    if isinstance(v, list): return [as_stored(x) for x in v]
    return {as_stored(k): as_stored(x) for k,x in v.items()} if isinstance(v, dict) else v


@holds(st.tuples(st.lists(st.dictionaries(texts, values, max_size=4), max_size=5), st.sampled_from(['a.jsonl', 'a.jsonl.gz'])), 80)
def rows_written_are_read(case):
    from selfalign.machine.files import read_jsonl, write_jsonl
    rows, name = case
    path = write_jsonl(here()/name, rows)
    assert repr(read_jsonl(path))==repr(as_stored(rows))
    assert not list(here().glob('.*.tmp'))


@holds(st.tuples(st.lists(st.dictionaries(texts, values, max_size=4), max_size=5), st.integers(0, 5)), 40)
def a_failed_write_leaves_the_old_file(case):
    from selfalign.machine.files import write_jsonl
    rows, at = case
    path = write_jsonl(here()/'old.jsonl', [dict(a=1)])
    def failing():
        yield from rows[:at]
        raise OSError(28, 'No space left on device')
    with pytest.raises(OSError): write_jsonl(path, failing())
    assert path.read_bytes()==b'{"a": 1}\n' and not list(here().glob('.*.tmp'))


@holds(st.one_of(st.binary(max_size=60), values.map(lambda v: json.dumps(v).encode())), 80)
def any_json_file_is_read_or_refused(data):
    from selfalign.machine.files import read_json, read_jsonl
    with refused(): read_json(put('x.json', data))
    with refused(): assert all(isinstance(r, dict) for r in read_jsonl(put('x.jsonl', data)))
    with refused(): read_jsonl(put('x.jsonl.gz', data))
    with refused(): read_jsonl(put('y.jsonl.gz', gzip.compress(data)[:-3]))


# Tables and messages

columns = st.sampled_from('text prompt instruction input role message_id prompt_id parent_id message_tree_id deleted rank lang labels review_result gold answers context question '
                          'id split source_split topic kind flaw answer reply replies detoxify review_count synthetic'.split())
records = st.lists(st.dictionaries(st.one_of(columns, columns, texts), st.one_of(values, words), min_size=1, max_size=6), min_size=1, max_size=6)
likely = st.lists(st.fixed_dictionaries({'text': words}, optional=dict(role=st.sampled_from(['prompter', 'assistant', '', 3]), message_id=plain, parent_id=plain, message_tree_id=plain, deleted=plain,
                  split=plain, rank=plain, lang=texts, gold=values, kind=plain)), min_size=1, max_size=12)
tables = st.one_of(records, likely)
encodings = ['utf-8', 'utf-8-sig', 'cp1251', 'koi8-r', 'latin-1', 'utf-16']


def as_csv(rows, sep):
    "Rows as CSV, badly quoted now and then"
    cols = list(dict.fromkeys(k for r in rows for k in r))
    def cell(v):
        s = '' if v is None else str(v)
        return '"'+s.replace('"', '""')+'"' if any(c in s for c in (sep, '"', '\n')) and len(s)%7 else s
    return '\n'.join([sep.join(map(cell, cols)), *(sep.join(cell(r.get(c)) for c in cols) for r in rows)])


def table_file(case):
    "A file with a table: CSV in some encoding, JSON Lines, JSON"
    rows, kind, enc, sep = case
    if kind=='csv': return put('t.csv', as_csv(rows, sep).encode(enc, 'replace'))
    if kind=='json': return put('t.json', json.dumps(rows).encode())
    return put('t.jsonl', '\n'.join(map(json.dumps, rows)).encode())


cases = st.tuples(tables, st.sampled_from(['csv', 'jsonl', 'json']), st.sampled_from(encodings), st.sampled_from(',;\t'))


@holds(cases, 120)
def any_table_is_messages_or_refused(case):
    from selfalign.machine.messages import load_messages
    with refused():
        m = load_messages(table_file(case))
        assert len(m)>=1 and m.message_id.is_unique and all(isinstance(t, str) for t in m.text)
        assert all(t==as_stored(t) for t in m.text)


@cache
def scale(name):
    from selfalign.style import load_style
    return load_style(name)


@holds(st.tuples(cases, st.integers(0, 5), st.sampled_from([None, 'brief-ru', 'brief-en']), st.sampled_from([0, .25, 1])), 120)
def every_message_is_kept_or_counted(case):
    "The funnel adds up, and no held-out instruction is a training one in other letters"
    from selfalign.instructions import InstructionSettings, load_instructions
    from selfalign.machine.duplicates import text_key
    table, limit, style, share = case
    s = InstructionSettings(limit=limit, min_chars=1, test_share=share)
    with refused():
        rows, funnel = load_instructions(table_file(table), style and scale(style), s, 3)
        assert funnel[0]['dropped']==0 and all(a['kept']==b['kept']+b['dropped'] for a,b in pairwise(funnel))
        assert len(rows)==funnel[-1]['kept'] and len({r['prompt_id'] for r in rows})==len(rows)
        train, test = ({text_key(r['prompt']) for r in rows if r['split']==k} for k in ('train', 'test'))
        assert not train & test and len(train)+len(test)==len(rows)


@holds(cases, 40)
def replies_are_those_of_kept_prompts(case):
    from selfalign.machine.messages import load_messages
    from selfalign.replies import good_replies, load_replies, reply_pairs
    with refused():
        m = load_messages(table_file(case))
        rs = load_replies(m)
        assert all(r['reply'].strip() and r['prompt_id'] in set(m.message_id) for r in rs)
        assert len(good_replies(rs))<=len(rs) and all(p['good'] is not None for p in reply_pairs(rs))


# Text

@holds(st.tuples(texts, texts), 200)
def normalising_twice_is_normalising_once(ab):
    from selfalign.candidates import repetition, tokenize_words
    from selfalign.machine.duplicates import similarity, text_key
    a, b = ab
    assert text_key(text_key(a))==text_key(a)
    assert tokenize_words(' '.join(tokenize_words(a)))==tokenize_words(a)
    assert similarity(a, a)==1 and similarity(a, b)==similarity(b, a) and 0<=similarity(a, b)<=1 and 0<=repetition(a)<=1


@holds(st.lists(texts, max_size=9), 40)
def a_repeated_text_points_to_one_that_is_kept(ts):
    from selfalign.machine.duplicates import near_duplicates, text_key
    out = near_duplicates(ts)
    assert all(o is None or (o<i and out[o] is None) for i,o in enumerate(out))
    assert near_duplicates(ts)==out
    for i,t in enumerate(ts): assert out[i] is not None or text_key(t) not in {text_key(x) for x in ts[:i]}


bits = st.sampled_from(['Оценка', 'оценка:', 'Ответ:', ' 5', '4', '3.5', '4,75', '1-5', 'от 1 до 5', ' из 5', '/5', '{', '}', '"estimate"', '"answer"', ': ', ', ', '[', ']', '"', '\\', '\n', '**',
                        'grade', 'score: ', '10', '0', 'NaN', '1e999', 'true', '٣', '2)', '\ud800', '–', 'Краткость: '])


@holds(st.tuples(st.one_of(values, st.lists(st.one_of(bits, words), max_size=20).map(''.join), st.dictionaries(st.sampled_from(['answer', 'estimate']), values).map(json.dumps)),
                 st.sampled_from(['brief-ru', 'brief-en', 'formal-ru'])), 300)
def a_joint_reply_is_read_or_left(case):
    from selfalign.joint import parse_joint
    answer, grade = parse_joint(case[0], scale(case[1]))
    assert answer is None or (isinstance(answer, str) and answer)
    assert grade is None or (isinstance(grade, float) and 1<=grade<=5)


# Pairs

scores = st.one_of(st.none(), st.sampled_from([1., 1.+1e-12, 2.5, 2.75, 3., 4.9999, 5.]), st.floats(1, 5), st.just(math.nan))
answers = st.one_of(words, words, st.sampled_from(['да', 'да ', 'нет', 'вода и огонь и вода и огонь и вода и огонь', 'yes it is', '', ' ']), texts)
graded = st.fixed_dictionaries(dict(prompt_id=st.sampled_from('abcd'), completion=answers, finished=st.booleans() | st.just(True), score=scores,
    scores=st.one_of(st.none(), st.dictionaries(st.sampled_from(['Краткость', 'Полезность']), scores)),
    features=st.one_of(st.none(), st.fixed_dictionaries({}, optional=dict(pmi=st.none() | st.floats(-50, 50))))))


def question(row): return {**row, 'prompt': {'a': 'Зачем вода?', 'b': 'Why?', 'c': '2+2', 'd': 'Как дела'}[row['prompt_id']]}


@st.composite
def pair_cases(draw):
    from selfalign.pairs import STRATEGIES, _UNUSED, PairSettings
    how = draw(st.sampled_from([*STRATEGIES, 'Краткость']))
    rules = dict(length_gap=draw(st.sampled_from([None, None, 0, -5])), require_pmi=draw(st.booleans()), max_length_ratio=draw(st.sampled_from([0, 0, .5, 1])))
    s = PairSettings(margin=draw(st.sampled_from([0, .25, 1, 4])), strategy=how, pairs_per_prompt=draw(st.integers(1, 3)),
                     **{k: v for k,v in rules.items() if k not in _UNUSED.get(how, ())})
    return draw(st.lists(graded, max_size=14).map(lambda rs: [question(r) for r in rs])), s


@holds(pair_cases(), 250)
def pairs_are_pairs(case):
    "Chosen is not rejected, fit, better by the margin; each prompt gives pairs or one counted reason; nothing held out is trained on"
    from collections import Counter
    from selfalign.pairs import build_pairs, unfit
    rows, s = case
    pairs, lost = build_pairs(rows, scale('brief-ru'), s, test_share=.5)
    by, mutual = {}, s.strategy=='mutual'
    for r in rows: by.setdefault(r['prompt_id'], {}).setdefault(r['completion'].strip(), []).append(r)
    for p in pairs:
        assert p['chosen']!=p['rejected'] and p['chosen'] and p['rejected'] and math.isfinite(p['margin'])
        others = [by[k] for k in by if (k!=p['prompt_id'])==mutual]     # mutual: rejected is an answer to another question
        chosen, rejected = by[p['prompt_id']][p['chosen']], [r for rs in others for r in rs.get(p['rejected'], [])]
        assert any(unfit(r, scale('brief-ru')) is None and r['finished'] for r in chosen) and any(r['score'] is not None for r in rejected)
        if mutual: continue
        assert p['margin']>=max(s.margin, 0)-1e-4
        if s.max_length_ratio: assert len(p['chosen'])<=s.max_length_ratio*len(p['rejected'])
        def said(rs): return [x for r in rs if (x := (r['features'] or {}).get('pmi')) is not None]
        if s.require_pmi: assert max(said(chosen))>=min(said(rejected))
    n = Counter(p['prompt_id'] for p in pairs)
    assert len(n)+sum(lost.values())==len(by) and all(isinstance(k, str) and k for k in lost)
    assert max(n.values(), default=0)<=(1 if s.strategy not in ('all', 'random') else s.pairs_per_prompt)
    split = {}
    for p in pairs: assert split.setdefault(p['prompt_id'], p['split'])==p['split']


# Caches

def made(k): return dict(completion=f'ответ {k} "и" \n {"x"*k}', n_tokens=k, finished=bool(k%2), score=k/3)


def finish(path, keys, ask):
    "Make the rows that are missing and write the file, as a step does: the bytes of the file, and which rows were made"
    from selfalign.machine.store import Rows
    with Rows(path, keys) as rows:
        todo = [i for i,k in enumerate(keys) if k not in rows]
        for i in todo: rows.add({keys[i]: ask(i)})
        rows.gather()
        rows.write([rows[k] for k in keys])
    return path.read_bytes(), todo


@cache
def cache_file():
    "An undisturbed step of six rows: its keys, its file, its kept rows"
    from selfalign.machine.store import row_key
    keys = [row_key('x', i) for i in range(6)]
    whole, _ = finish(here()/'whole.jsonl', keys, made)
    return keys, whole, (here()/'whole.rows.jsonl').read_bytes()


damages = st.one_of(st.tuples(st.just('cut'), st.floats(0, 1), st.just(0)), st.tuples(st.just('byte'), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
                    st.tuples(st.just('bit'), st.floats(0, 1, exclude_max=True), st.integers(0, 7)), st.tuples(st.just('tail'), st.floats(0, 1), st.integers(0, 255)))


@holds(st.lists(damages, min_size=1, max_size=2), 250)
def a_damaged_cache_is_a_cache(ds):
    "Any prefix of a cache, and one with a changed byte, gives the same file; whole rows of a prefix are not made again"
    import contextlib, io
    keys, whole, kept = cache_file()
    data = bytearray(kept)
    for what,where,v in ds:
        i = int(where*len(data))
        if what=='cut': data = data[:i]
        elif what=='tail': data += bytes([v])*int(9*where)
        elif i<len(data): data[i] = v if what=='byte' else data[i]^(1<<v)
    for f in here().glob('cut*'): f.unlink()
    put('cut.rows.jsonl', bytes(data))
    with contextlib.redirect_stdout(io.StringIO()): got, todo = finish(here()/'cut.jsonl', keys, made)
    assert got==whole
    if [d[0] for d in ds]==['cut']: assert len(todo)==len(keys)-bytes(data).count(b'\n')


# Settings, recipes, styles

def classes():
    from selfalign.candidates import CandidateSettings
    from selfalign.instructions import InstructionSettings
    from selfalign.recipe import Recipe
    from selfalign.sft import SFTSettings
    from selfalign.style import Style
    return [Recipe, Style, SFTSettings, InstructionSettings, CandidateSettings]


@st.composite
def keyed(draw):
    "A settings class and values for some of its keys"
    cls = draw(st.sampled_from(classes()))
    keys = st.one_of(*[st.sampled_from(sorted(cls.model_fields))]*4, texts, numbers.filter(lambda x: x==x))
    return cls, draw(st.dictionaries(keys, values, max_size=5))


@holds(keyed(), 150)
def any_mapping_is_settings_or_refused(case):
    from selfalign.machine.settings import checked
    from selfalign.recipe import RENAMED
    cls, given_ = case
    with refused():
        s = checked(cls, given_, 'x.yml', RENAMED)
        assert checked(cls, s.model_dump(by_alias=True), 'x.yml')==s


def dumped(o): return yaml.safe_dump(o, allow_unicode=True, sort_keys=False).encode('utf-8', 'replace')


@cache
def shipped(name):
    from selfalign.machine.files import package_file, read_yaml
    return read_yaml(package_file(name))


safe = st.recursive(st.one_of(st.none(), st.booleans(), numbers, words, st.text(max_size=9), odd), lambda c: st.one_of(st.lists(c, max_size=3), st.dictionaries(words, c, max_size=3)), max_leaves=5)


@st.composite
def changed(draw, name):
    "A shipped file with some keys left out, others changed"
    o = dict(shipped(name))
    for _ in range(draw(st.integers(0, 3))):
        k = draw(st.one_of(st.sampled_from(sorted(o) or ['x']), words))
        if draw(st.booleans()): o.pop(k, None)
        elif isinstance(o.get(k), dict) and draw(st.booleans()): o[k] = {**o[k], draw(st.sampled_from([*o[k], 'x'])): draw(safe)}
        else: o[k] = draw(safe)
    return o


yaml_bits = st.lists(st.sampled_from(['a: ', 'lang: ru', '\n', '  ', '- ', '&a ', '*a', '[', ']', '{', '}', '!!int ', '!!float ', '!!timestamp ', '!!binary ', '!!set ', '!!python/object:x ', '2024-13-45',
                                      '9'*5000, '.nan', '.inf', '<<: ', '? ', '|', '>-', '"', "'", '\t', '%YAML 1.1\n', '---\n', '0x', '1:99:99', '\x00', 'é', '['*3000, 'name: x\n', '1_', '_', 'y', '~']), max_size=10).map(''.join)


@holds(st.one_of(changed('styles/brief-ru.yml'), changed('styles/brief-en.yml')).map(dumped) | yaml_bits.map(str.encode) | st.binary(max_size=40), 120)
def any_style_file_is_a_style_or_refused(data):
    from selfalign.style import load_style
    path = put('s.yml', data)
    with refused():
        s = load_style(str(path))
        again = load_style(str(put('again.yml', dumped(s.model_dump(by_alias=True, mode='json')))))
        assert again==s and again.record()==s.record()


@holds(st.tuples(st.randoms(use_true_random=False), st.sampled_from(['brief-ru', 'brief-en', 'formal-ru']), st.sampled_from(['system', 'criteria', 'rubric', 'question', 'answer', 'content_free', 'measures'])), 40)
def a_digest_sees_contents_not_order(case):
    from selfalign.style import load_style
    rng, name, key = case
    o = load_style(name).model_dump(by_alias=True, mode='json')
    if not o[key]: return
    items = list(o.items())
    rng.shuffle(items)
    was = load_style(name).digest()
    assert load_style(str(put('order.yml', dumped(dict(items))))).digest()==was
    def other(v):
        if isinstance(v, str): return v+'!'
        k = rng.choice(sorted(v))
        return {**v, k: [v[k][0], v[k][1], v[k][2]+1] if isinstance(v[k], list) else other(v[k])}
    assert load_style(str(put('other.yml', dumped({**o, key: other(o[key])})))).digest()!=was


@holds(changed('recipes/brief.yml').map(dumped) | changed('recipes/gemma-2-2b-it.yml').map(dumped) | yaml_bits.map(str.encode) | st.binary(max_size=40), 120)
def any_recipe_file_is_a_recipe_or_refused(data):
    from selfalign.recipe import read_recipe
    path = put('r.yml', data)
    with refused():
        r = read_recipe(str(path))
        assert read_recipe(str(put('r.yml', dumped(r.model_dump()))))==r


# Numbers

measured = st.one_of(st.none(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 1), st.floats(-1e6, 1e6))
wins = st.sampled_from([None, math.nan, 0., .5, 1.])


def there(x): return [v for v in x if v is not None and math.isfinite(v)]


def bounded(b, x):
    "A mean lies in its interval, if there is one, and among its numbers; all are finite"
    lo, hi = b['ci']
    eps = 1e-9*(1+max(map(abs, x)))
    assert min(x)-eps<=b['mean']<=max(x)+eps
    assert (lo is None)==(hi is None) and (lo is None or (lo-eps<=b['mean']<=hi+eps and math.isfinite(lo) and math.isfinite(hi)))


def same(a, b, near): return all((p is None)==(q is None) and (p is None or abs(p-q)<=near) for p,q in zip([a['mean'], *a['ci']], [b['mean'], *b['ci']])) and a['n']==b['n']


@holds(st.tuples(st.lists(measured, max_size=20), st.randoms(use_true_random=False)), 60)
def a_mean_lies_in_its_interval(case):
    "... is that of the numbers that are there, and does not depend on their order (that of a bootstrap little)"
    from selfalign.machine import statistics as s
    x, rng = case
    xs = there(x)
    assert math.isclose(s.mean_or_none(x) or 0, sum(xs)/len(xs) if xs else 0, rel_tol=1e-9, abs_tol=1e-6) and (s.mean_or_none(x) is None)==(not xs)
    for f in (s.bootstrap, s.mean_interval):
        b = f(x)
        assert b['n']==len(xs) and (b['mean'] is None)==(not xs) and isinstance(s.interval_text(b), str) and f([*x, None, math.nan])==b
        if not xs: continue
        bounded(b, xs)
        assert math.isclose(b['mean'], s.mean_or_none(xs), rel_tol=1e-9, abs_tol=1e-6)
        near = 1e-9*(1+max(map(abs, xs)))
        assert same(f(rng.sample(x, len(x))), b, near+(.5*(b['ci'][1]-b['ci'][0]) if f is s.bootstrap else 0))


@holds(st.tuples(st.lists(wins, max_size=24), st.randoms(use_true_random=False)), 60)
def shares_stay_between_0_and_1(case):
    from selfalign.machine.statistics import share_interval
    from selfalign.win_rate import lc_win_rate, verdict
    x, rng = case
    b, xs = share_interval(x), there(x)
    assert b['n']==len(xs) and (b['mean'] is None)==(not xs) and same(share_interval(rng.sample(x, len(x))), b, 1e-9)
    if xs: bounded(b, xs); assert 0<=b['ci'][0]<b['ci'][1]<=1
    lc = lc_win_rate([v if v is None or v==v else None for v in x], [None if v is None else rng.randint(-50, 50) for v in x])
    if lc['mean'] is not None: assert 0<=lc['mean']<=1 and 0<=lc['ci'][0]<=lc['ci'][1]<=1
    assert verdict(None) is None


@holds(st.tuples(st.none() | st.floats(1, 5), st.none() | st.floats(1, 5)), 60)
def a_preference_turned_round_is_its_complement(ab):
    from selfalign.machine.statistics import preferred
    a, b = preferred(*ab), preferred(*ab[::-1])
    assert (a is None)==(b is None)==(None in ab) and (a is None or a+b==1)


@holds(st.lists(st.tuples(st.integers(0, 500) | st.none(), st.integers(0, 500) | st.none()), max_size=30), 60)
def a_ratio_lies_in_its_interval(ab):
    from selfalign.machine.statistics import ratio_interval
    both = [p for p in ab if None not in p]
    r = ratio_interval([a for a,_ in ab], [b for _,b in ab])
    assert r['n']==len(both) and (r['mean'] is None)==(not sum(a for a,_ in both))
    if r['mean'] is None: return
    assert math.isclose(r['mean'], 1-sum(b for _,b in both)/sum(a for a,_ in both), abs_tol=1e-9)
    if r['ci'][0] is not None: assert r['ci'][0]-1e-9<=r['mean']<=r['ci'][1]+1e-9<=1+2e-9


@holds(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([math.nan, 0., 1e-300, -math.inf, math.inf])), min_size=5, max_size=5), 80)
def digits_give_a_grade_or_none(p):
    from selfalign.judge import expected_score
    e, mass = expected_score(p)
    assert (math.isnan(e) or 1-1e-9<=e<=5+1e-9)


# People's verdicts, replies of a server

@cache
def sheet():
    from selfalign.people import sheet_rows
    ref, pol = ([dict(prompt_id=i, prompt=f'{i}?', completion=f'{i}{m}') for i in 'abc'] for m in 'rp')
    return sheet_rows(ref, pol)


@st.composite
def verdict_files(draw):
    from selfalign.people import sheet_digest
    return dict(sheet=draw(st.just(sheet_digest(sheet())) | values), person=draw(values),
                verdicts=draw(st.dictionaries(st.sampled_from('abc') | texts, st.sampled_from(['left', 'right', 'tie']) | values, max_size=4) | values))


@holds(verdict_files() | values, 80)
def any_file_of_verdicts_is_read_or_refused(o):
    from selfalign.people import people_summary, read_verdicts
    with refused():
        person, said = read_verdicts(put('v.json', json.dumps(o).encode()), sheet())
        assert isinstance(person, str) and set(said.values())<={0., .5, 1.}
        people_summary([(person, said), (person+'2', said)], dict(a=1., b=.5))


tokens = st.one_of(st.sampled_from(['token_id:5', 'token_id:', 'token_id:x', '5', 5]), values)
logps = st.one_of(st.floats(-50, 0), values)
lps = st.fixed_dictionaries({}, optional=dict(tokens=st.lists(tokens, max_size=3) | values, token_logprobs=st.lists(logps, max_size=3) | values,
    top_logprobs=st.lists(st.dictionaries(texts, logps, max_size=3) | values, max_size=2) | values,
    content=st.lists(st.fixed_dictionaries(dict(id=values, logprob=logps, top_logprobs=values)) | values, max_size=2) | values))
choices = st.fixed_dictionaries({}, optional=dict(text=texts | values, message=st.dictionaries(st.just('content'), texts | values) | values,
    finish_reason=st.sampled_from(['stop', 'length', None]) | values, logprobs=lps | values))
replies = st.fixed_dictionaries({}, optional=dict(choices=st.lists(choices | values, max_size=2) | values, usage=st.dictionaries(st.just('completion_tokens'), numbers) | values))


@holds(replies, 150)
def any_reply_is_read_or_garbage(o):
    "A reply of a server is read, or the one error says that it is not what the protocol promises"
    from selfalign.machine.client import Garbage, checked_read, given_logprobs, read_text, top_logprobs
    for read in (read_text, top_logprobs, lambda o: given_logprobs(o, 1, [5])):
        try: got = checked_read(read, json.loads(json.dumps(o)))
        except (Garbage, BadInput): continue
        if read is read_text: assert isinstance(got[0], str) and (got[1] is None or got[1]>=0) and isinstance(got[2], bool)
        xs = got.values() if isinstance(got, dict) else got if isinstance(got, list) else ()
        assert all(isinstance(x, float) and x<=1e-3 for x in xs)


@pytest.mark.parametrize('name', PROPERTIES)
def test_property(name):
    strategy, check, examples = PROPERTIES[name]
    profile(examples, derandomize=True)(given(strategy)(check))()


# A run, step by step

recipe = 'model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 4\nmax_new_tokens: 32\nmargin: 0\nn_prompts: 14\nn_test: 4\nlora_r: 2\nmax_length: 400\ntrain_batch: 2\n'
measured_anew = 'seconds', 'peak_gb', 'train_runtime', 'train_samples_per_second', 'train_steps_per_second'  # all that differs between two runs of the same recipe
holds_them = 'models/run.json', 'models/README.md', 'models/trainer_state.json'  # files with such a number; run.json has their digests


@pytest.fixture(scope='module')
def two_runs(tmp_path_factory):
    "The same recipe in two folders"
    from selfalign.recipe import read_recipe
    from selfalign.run import Run, run_all
    from test_kill import prepare
    roots, before = [tmp_path_factory.mktemp('runs')/n for n in ('one', 'other')], os.getcwd()
    try:
        for root in roots:
            prepare(root, recipe)
            os.chdir(root)
            run_all(Run(read_recipe('r.yml')))
    finally: os.chdir(before)
    return roots


def rows(root, name): return [json.loads(l) for l in (root/f'data/r/{name}.jsonl').read_text(encoding='utf-8').splitlines()]


def test_what_went_in_came_out_or_was_counted(two_runs):
    root = two_runs[0]
    s = json.loads((root/'data/r/run.json').read_text(encoding='utf-8'))['steps']
    files = {k: rows(root, k) for k in ('instructions', 'candidates', 'scores', 'pairs', 'answers_reference', 'answers')}
    of = {k: sum(r['split']==k for r in files['instructions']) for k in ('train', 'test')}
    assert s['data']['in']==s['data']['out']+sum(f['dropped'] for f in s['data']['funnel']) and s['data']['out']==len(files['instructions'])
    assert s['data']['train']==of['train'] and s['data']['test']==of['test'] and s['data']['in']==100
    assert s['candidates']['in']==14 and s['candidates']['out']==14*4==len(files['candidates'])
    assert s['judge']['in']==s['candidates']['out']==s['judge']['out']==len(files['scores']) and s['judge']['ungraded']==sum(r['score'] is None for r in files['scores'])
    assert s['pairs']['in']==s['candidates']['in']==s['pairs']['out']+sum(s['pairs']['lost'].values()) and s['pairs']['out']==len(files['pairs'])
    assert s['dpo']['in']==s['pairs']['train']==sum(p['split']=='train' for p in files['pairs'])==s['dpo']['out']+s['dpo']['too_long']
    assert s['reference']['in']==s['reference']['out']==4==len(files['answers_reference'])
    assert s['answer']['in']==s['reference']['out'] and s['answer']['out']==len(files['answers'])==2*s['answer']['in']
    assert s['evaluate']['in']==s['answer']['in']==s['evaluate']['out'] and s['evaluate']['ungraded']>=0
    held_out = {r['prompt'] for r in files['instructions'] if r['split']=='test'}
    assert {r['prompt'] for r in files['answers']}<=held_out
    assert not held_out & {r['prompt'] for k in ('candidates', 'scores', 'pairs') for r in files[k]}
    assert all(p['chosen']!=p['rejected'] for p in files['pairs'])


def without(o, root):
    "A record without what is measured anew, and without the digests of the files that hold it"
    if isinstance(o, list): return [without(x, root) for x in o]
    return {k: without(v, root) for k,v in o.items() if k not in (*measured_anew, *holds_them)} if isinstance(o, dict) else o


def contents(f, root):
    "What a file holds, without what is measured anew"
    data = f.read_bytes()
    if f.suffix=='.json': return without(json.loads(data), root)
    if f.name=='README.md': return [l for l in data.splitlines() if not l.startswith(b'| seconds |')]
    return data


def test_the_same_recipe_and_seed_give_the_same_bytes(two_runs):
    one, other = two_runs
    names = [sorted(str(f.relative_to(r)) for d in ('data', 'models') for f in (r/d).rglob('*') if f.is_file()) for r in two_runs]
    assert names[0]==names[1] and len(names[0])>20
    for n in names[0]: assert contents(one/n, one)==contents(other/n, other), n


def test_no_file_knows_where_it_lies(two_runs):
    for f in (f for d in ('data', 'models') for f in (two_runs[0]/d).rglob('*') if f.is_file()): assert str(two_runs[0]).encode() not in f.read_bytes(), f
