"The shipped questions with gold answers, consensus, and the test of right and wrong answers."
import pytest
from selfalign.consensus import consensus
from selfalign.gold import gold_found
from selfalign.instructions import load_instructions
from selfalign.judge import add_consensus, combine
from selfalign.machine.duplicates import near_duplicates
from selfalign.machine.files import read_jsonl, repo_file
from selfalign.machine.messages import SHIPPED, load_messages
from selfalign.replies import load_replies
from selfalign.style import load_style
from selfalign.truth import both_kinds, choose_consensus, marked, natural_errors, praised, right_above_wrong


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
    assert choose_consensus(graded)[0] in ((0., .25) if share==0 else (.75, 1.))


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
