"The shipped questions with gold answers, consensus, and the test of right and wrong answers."
import contextlib, io, re
import pandas as pd, pytest
from selfalign.consensus import consensus
from selfalign.gold import gold_found, gold_questions
from selfalign.instructions import InstructionSettings, load_instructions
from selfalign.judge import add_consensus, combine
from selfalign.machine.duplicates import near_duplicates
from selfalign.machine.files import BadInput, read_jsonl, repo_file, write_jsonl
from selfalign.machine.messages import SHIPPED, load_messages
from selfalign.replies import load_replies
from selfalign.style import load_style
from selfalign.truth import both_kinds, choose_voices, marked, natural_errors, praised, right_above_wrong


@pytest.fixture(scope='module')
def asked(): return load_messages('embedded-gold').query('role=="prompter"')


def test_every_good_reply_holds_its_gold_answer(asked):
    gold, replies = dict(zip(asked.message_id, asked.gold)), load_replies(load_messages('embedded-gold'))
    assert len(replies)==len(asked)>=240
    assert [r['prompt'] for r in replies if gold_found(r['reply'], gold[r['prompt_id']])!=1]==[]


def test_what_must_be_worked_out_does_not_stand_in_the_question(asked):
    worked = asked[~asked.kind.isin(('extraction', 'shortening', 'ordering', 'counting'))]
    assert len(worked)>100
    assert [t for t,g in zip(worked.text, worked.gold) if gold_found(t, g)]==[]


def test_what_is_read_off_a_passage_stands_in_it(asked):
    read = asked[asked.kind.isin(('extraction', 'shortening'))]
    assert len(read)>100 and [t for t,g in zip(read.text, read.gold) if not gold_found(t, g)]==[]


def test_the_programs_print_their_gold_answer(asked):
    for text,gold in asked[asked.kind=='code_output'][['text', 'gold']].values:
        out = io.StringIO()
        with contextlib.redirect_stdout(out): exec(re.search(r'```python\n(.*?)```', text, re.S)[1], {})
        assert out.getvalue().strip()==gold[0], text


def test_halves_and_counts(asked):
    n = asked.groupby(['kind', 'split']).size().unstack()
    assert (n.train==n.test).all() and (asked.gold.map(lambda g: bool(g))).all()
    card = repo_file('data/README.md').read_text(encoding='utf-8')
    for kind,k in n.iterrows(): assert f'| {kind} | {k.train} | {k.test} | {k.sum()} |' in card, kind
    assert f'{len(asked)} questions' in card


def test_nothing_stands_twice(asked):
    first = [r['text'] for r in read_jsonl(repo_file(SHIPPED['embedded'])) if not r['parent_id']]
    found = near_duplicates(first+list(asked.text), .8)
    assert [i for i in found[len(first):] if i is not None]==[]


def test_the_halves_are_read_as_they_are():
    rows, _ = load_instructions('embedded-gold', load_style('brief-ru'))
    assert {s: sum(r['split']==s for r in rows) for s in ('train', 'test')}==dict(train=145, test=145)
    assert all(r['gold'] for r in rows)


def test_translations_are_held_out_new_and_in_another_script():
    style, rows = load_style('brief-ru'), gold_questions('embedded-translation', load_style('brief-ru'))
    assert len(rows)==48 and {r['split'] for r in rows}=={'test'} and not any(gold_found(r['prompt'], r['gold']) for r in rows)
    assert not any(style.in_script(w) for r in rows for w in r['gold'])
    first = [r['text'] for r in read_jsonl(repo_file(SHIPPED['embedded'])) if not r['parent_id']]
    assert not {r['prompt'] for r in rows} & {*first}


def test_requests_for_another_language_to_train_on_are_like_no_held_out_one():
    style, every = load_style('brief-ru'), list(read_jsonl(repo_file(SHIPPED['embedded-translation'])))
    new, held = ([r['prompt'] for r in every if r['split']==s] for s in ('train', 'test'))
    held += [r['prompt'] for r in load_instructions('embedded', style)[0] if r['split']=='test']
    assert len(new)==16 and all(map(style.wants_another_language, new)) and near_duplicates(held+new, .8)[len(held):]==[None]*16
    assert not {w for r in every if r['split']=='train' for w in r['gold']} & {w for r in every if r['split']=='test' for w in r['gold']}-{'thank', 'thanks'}


def test_a_second_source_adds_training_rows_and_moves_no_held_out_one(tmp_path):
    style, first = load_style('brief-ru'), [dict(id=i, prompt=f'Какая река течёт через город номер {i}?', split='test' if i<2 else 'train') for i in range(8)]
    more = [dict(id=0, prompt='Какая река течёт через город номер 0?', split='train'),  # held out in the first
            dict(id=1, prompt='Назови три породы собак, которые не линяют', split='train'), dict(id=2, prompt='Зачем нужен корвалол?', split='test'),
            dict(id=30, prompt='Чем отличается кофе от какао?')]
    a, b = write_jsonl(tmp_path/'a.jsonl', first), write_jsonl(tmp_path/'b.jsonl', more)
    alone, (rows, funnel) = load_instructions(a, style)[0], load_instructions(a, style, also_train=b)
    assert rows[2:]==alone and [(r['prompt'][:6], r['split'], r['source']) for r in rows[:2]]==[('Назови', 'train', 'b.jsonl'), ('Чем от', 'train', 'b.jsonl')]
    assert len({r['prompt_id'] for r in rows})==10 and funnel[-1]==dict(step='2 added for training', kept=10, dropped=0)
    one, (two, funnel) = load_instructions(a, style, also_train={b: 1})[0], load_instructions(a, style, also_train={b: None, 'embedded-gold': 9})
    assert one[1:]==alone and one[0] in rows[:2]
    assert [r['source'] for r in two]==['b.jsonl']*2+['embedded-gold']*9+['a.jsonl']*8 and funnel[-1]['step']=='11 added for training'
    ids = [r['prompt_id'] for r in load_instructions(a, style, also_train={b: None, write_jsonl(tmp_path/'c.jsonl', [{**r, 'prompt': r['prompt'][::-1]} for r in more]): None})[0]]
    assert len(ids)==len(set(ids))>10
    drawn = load_instructions(a, style, seed=7, also_train={'embedded-gold': 9})[0][:9]
    assert [r['prompt_id'] for r in drawn]!=[r['prompt_id'] for r in two[2:11]] and {r['split'] for r in drawn}=={'train'}
    few = load_instructions(a, style, InstructionSettings(limit=5), also_train=b)[0]
    assert len(few)==5 and sum(r['split']=='test' for r in few)==2
    with pytest.raises(BadInput, match='b.jsonl: no instruction for training that is not there already'): load_instructions(b, style, also_train=b)


def test_a_file_without_a_split_is_asked_whole(tmp_path):
    f = write_jsonl(tmp_path/'q.jsonl', [dict(id=i, prompt=f'Какая река течёт через город номер {i}?', gold=['Нева']) for i in range(30)])
    assert len(gold_questions(f, load_style('brief-ru')))==30
    left = gold_questions(f, trained=['какая река течёт через город номер 7', 'Другое?'])
    assert len(left)==29 and not any('номер 7?' in r['prompt'] for r in left)
    assert {r['split'] for r in left}=={'test'} and gold_questions(f, split='train')==[]


def test_questions_to_choose_by_are_of_the_training_half_and_not_trained_on():
    held, train = gold_questions('embedded-gold'), gold_questions('embedded-gold', split='train')
    assert len(held)==len(train)==145 and not {r['prompt_id'] for r in held}&{r['prompt_id'] for r in train}
    assert len(gold_questions('embedded-gold', trained=[r['prompt'] for r in train[:40]], split='train'))==105


@pytest.mark.parametrize('said,gold,found', [
    ('Это 7,5 км', '7', 0), ('Это 7,5 км', '7.5', 1), ('Это 7,5км', '7', 0), ('Это 8.0', '8', 1), ('[4,8,15]', '8', 1), ('[4,8]', '8', 1), ('[4,8]', '[4, 8]', 1), ('(3,5)', '(3, 5)', 1), ('3, 700', '3', 1),
    ('54 520 рублей', '54520', 1), ('54520', '54 520', 1), ('равно 3,700 м', '3700', 1), ('1,000,000', '1000000', 1), ('1 000 000', '1,000,000', 1), ('12 500,5', '12500', 0), ('89 144 233', '144', 1),
    ('100 200 300', '100, 200, 300', 1), ('до 18.10.2024', '18.10', 1), ('в 18.30', '18:30', 1), ('в 18:30', '18.00', 0), ('12.7, 5.3', '7.5', 0), ('2.5 и 3.7', '2.5 и 3', 0), ('Ответ: 7.', '7', 1), ('от 3 до −5', '-5', 1)])
def test_a_number_is_found_as_a_whole(said, gold, found):
    assert gold_found(said, [gold])==found


def sberquad(n, answered=True):
    "Rows as the hub gives SberQuAD's"
    return pd.DataFrame([dict(id=n*100+i, title='SberChallenge', context=f'В городе {n}{i} живут 500 человек. Мэра зовут Пётр.',
                              question='Как зовут мэра?', answers=dict(text=['Пётр' if answered else ''], answer_start=[39 if answered else -1]))
                         for i in range(5)])


def test_sberquad_asks_its_validation_half(tmp_path, monkeypatch):
    import datasets
    class Split:
        def __init__(self, df): self.df = df
        def to_pandas(self): return self.df
    got = dict(train=Split(sberquad(1)), validation=Split(sberquad(2)), test=Split(sberquad(3, False)))
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **kw: got)
    asked = gold_questions('kuznetsoffandrey/sberquad', load_style('brief-ru'))
    assert [r['prompt_id'] for r in asked]==[f'20{i}' for i in range(5)] and all(r['gold']==['Пётр'] for r in asked)
    assert asked[0]['prompt']=='В городе 20 живут 500 человек. Мэра зовут Пётр.\n\nКак зовут мэра?'
    sberquad(4).to_parquet(tmp_path/'s.parquet')
    sberquad(4).to_json(tmp_path/'s.jsonl', orient='records', lines=True, force_ascii=False)
    a, b = (gold_questions(tmp_path/f's.{kind}') for kind in ('parquet', 'jsonl'))
    assert [(r['prompt'], r['gold']) for r in a]==[(r['prompt'], r['gold']) for r in b] and len(a)==5


@pytest.mark.parametrize('row,says', [
    (dict(prompt='Кто?', gold={'txt': 'я'}), r'q\.jsonl, row 2, column gold: cannot be read'),
    (dict(prompt=5, gold=['я']), r'q\.jsonl, row 2, column prompt: cannot be read'),
    (dict(context='Он.', question='Кто он?', answers={'answer_start': [0]}), r'q\.jsonl, row 2, column answers: cannot be read')])
def test_bad_rows_are_named(tmp_path, row, says):
    good = {k: {'text': ['я']} if k=='answers' else ['я'] if k=='gold' else 'Кто это сделал?' for k in row}
    with pytest.raises(BadInput, match=says): gold_questions(write_jsonl(tmp_path/'q.jsonl', [good, row]))


def test_no_gold_answer_no_question(tmp_path):
    f = write_jsonl(tmp_path/'q.jsonl', [dict(prompt='Как ваши дела сегодня?'), dict(prompt='Что нового у вас?', gold=[])])
    assert gold_questions(f)==[]


def rows(texts, prompt='q', **kw): return [dict(prompt_id=prompt, prompt=prompt, completion=t, sample=i, **kw)
                                           for i,t in enumerate(texts)]


def test_consensus_reads_words_and_leaves_the_answer_itself_out():
    a, b, c = consensus(rows(['one two', 'One, two!', 'three']))
    assert (a, b, c)==(.5, .5, 0)
    assert consensus(rows(['x'])+rows(['x'], 'other'))==[None, None]
    given = rows(['one two', 'three'])
    assert consensus(given, among=given[:1])==[None, 0]            # one answer, and nothing but itself to compare with


def test_a_share_of_consensus_needs_a_consensus():
    style, row = load_style('brief-ru'), dict(digits=dict.fromkeys(load_style('brief-ru').criteria, 4.), likelihood=None, joint=None)
    half = dict.fromkeys(style.criteria, 1)|{'consensus': .5}
    assert combine({**row, 'consensus': 2.}, 'mix', style, half)[1]==3
    assert combine({**row, 'consensus': None}, 'mix', style, half)[1] is None
    assert combine({**row, 'consensus': None}, 'mix', style, {**half, 'consensus': 0})[1]==4
    assert combine({**row, 'consensus': float('nan')}, 'mix', style, half)[1] is None
    assert add_consensus(None, dict(consensus=3.), .5) is None


def test_no_criterion_is_called_consensus(tmp_path):
    f = tmp_path/'s.yml'
    f.write_text('name: s\nlang: en\nsystem: ""\ncriteria:\n  consensus: x\n')
    with pytest.raises(Exception, match='voice of the judge'): load_style(str(f))


def test_right_against_wrong_within_a_question_only():
    two = marked(rows(['yes', 'no'], 'a')+rows(['yes', 'yes'], 'b'), [dict(prompt_id=p, gold=['yes']) for p in 'ab'])
    assert [r['prompt_id'] for r in both_kinds(two)]==['a', 'a']
    found = right_above_wrong(two, [5., 1., 0., 0.])
    assert (found['mean'], found['n'], found['pairs'])==(1, 1, 1)
    assert right_above_wrong(two, [None]*4)['mean'] is None
    assert right_above_wrong(two, [3., 3., 0, 0])['mean']==.5
    assert praised(two, [5., 4., 5., 5.])['n']==1


@pytest.mark.parametrize('knows,share', [('score', 0.), ('consensus', 1.)])
def test_the_share_follows_the_voice_that_knows(knows, share):
    graded = [r for p in 'abcdef' for r in marked(rows(['yes', 'no', 'no'], p), [dict(prompt_id=p, gold=['yes'])])]
    other = 'consensus' if knows=='score' else 'score'
    graded = [{**r, knows: 2.+2*r['right'], other: 5.-4*r['right']} for r in graded]
    found = choose_voices(graded, {'a': [r['score'] for r in graded]})
    assert found[:2] in ([('a', 0.)] if share==0 else [('a', .75), ('a', 1.)])


def test_a_voice_that_does_harm_is_left_out_and_the_style_keeps_what_costs_no_truth():
    graded = [r for p in 'abcdef' for r in marked(rows(['yes', 'no', 'no'], p), [dict(prompt_id=p, gold=['yes'])])]
    graded = [{**r, 'consensus': 2.+2*r['right']} for r in graded]
    harm, good, none = ([3.+s*r['right'] for r in graded] for s in (-1, 1, 0))
    assert choose_voices(graded, dict(both=harm, digits=good))[:2]==('digits', 0.)
    assert choose_voices(graded, dict(both=good, digits=good))[:2]==('both', 0.)  # where nothing speaks against it
    assert choose_voices(graded, dict(both=harm, digits=none))[:2]==('digits', .25)
    assert choose_voices([{**r, 'right': 1} for r in graded], dict(both=harm, digits=good))[:2]==('both', 0.)


def test_held_out_questions_choose_nothing(tmp_path, monkeypatch):
    "The share is the same whatever the held-out answers are"
    import selfalign.truth as page
    style, qs = load_style('brief-ru'), [dict(prompt_id=f'{s}{i}', prompt=f'{s}{i}', split=s, gold=['yes'])
                                         for s in ('train', 'test') for i in range(3)]
    def run(held_right):
        def graded(llm, questions, folder, *a):
            good = questions[0]['split']=='train' or held_right
            said = [r for q in questions for r in marked(rows(['yes', 'no'], q['prompt_id']), [q])]
            out = [{**r, 'score': 3., 'consensus': 4. if bool(r['right'])==good else 2.} for r in said]
            return said, dict(digits=out, mix=out)
        monkeypatch.setattr(page, '_graded', graded)
        return natural_errors(None, qs, tmp_path, style)
    a, b = run(True), run(False)
    assert a['share']==b['share']>0 and a['voices']['consensus']['mean']==1 and b['voices']['consensus']['mean']==0
