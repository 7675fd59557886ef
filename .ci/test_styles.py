"A style nobody here wrote, and one that is not about length, go through the whole loop from the command line."
import json
import shutil
import string

import pytest

from test_run import rows, selfalign

mine = '''name: pirate
lang: en
system: Answer like a pirate.
criteria:
  Pirate talk: Every sentence sounds like a pirate. 5 is a true pirate; 1 is a clerk.
  Usefulness: The answer solves the task. 5 is fully useful; 1 has nothing to do with the question.
'''
verbs, foods = 'cook buy keep clean serve choose'.split(), 'rice beans eggs fish soup bread cheese apples onions tea'.split()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Sixty English instructions, a style of four keys, a tiny model with Latin letters"
    from selfalign.machine.tiny import tiny
    d = tmp_path_factory.mktemp('style')
    tiny(d/'TINY', letters=string.ascii_letters, digits=.3, spread=30)
    (d/'mine.yml').write_text(mine)
    (d/'en.csv').write_text('text\n'+''.join(f'What is the best way to {v} {f} at home?\n' for v in verbs for f in foods))
    return d


def test_four_keys_are_a_style(root):
    r = selfalign('run', 'quickstart', '--model', 'TINY', '--data', 'en.csv', '--set', 'style=mine.yml margin=.02', cwd=root)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-2000:]
    scores = rows(root/'data/quickstart/scores.jsonl')
    assert all(list(s['scores'])==['Pirate talk', 'Usefulness'] and s['features'] is None for s in scores)
    assert sum(s['score'] is not None for s in scores)>len(scores)/2
    assert (root/'data/quickstart/report.md').exists()
    assert json.loads((root/'data/quickstart/run.json').read_text())['style']['name']=='pirate'


def test_instructions_in_another_language_are_refused(root):
    r = selfalign('run', 'quickstart', '--model', 'TINY', '--data', 'en.csv', '--root', 'x', cwd=root)
    assert r.returncode==2 and 'none of its 60 instructions is in the language of the style brief-ru' in r.stderr, r.stderr


def test_a_judge_taught_another_style_is_warned_about(root):
    "The embedded judge was taught and audited with brief-ru"
    from selfalign.audit import audit_misfit, find_audit, training_misfit
    from selfalign.style import load_style
    brief, formal = load_style('brief-ru'), load_style('formal-ru')
    found = find_audit('embedded')
    assert not audit_misfit(found, found['fingerprint'], brief) and not training_misfit('embedded', brief)
    assert 'formal-ru' in audit_misfit(found, found['fingerprint'], formal) and 'formal-ru' in training_misfit('embedded', formal)


def test_ask_and_chat_say_the_prefix_of_the_training(root, monkeypatch):
    "They said the Russian prefix of the default style to every model"
    from selfalign.machine import commands
    said = []
    monkeypatch.chdir(root)
    monkeypatch.setattr(commands, 'stream', lambda llm, text, s, seed: said.append(text) or ())
    monkeypatch.setattr(commands, 'chat', lambda llms, lines, system, **kw: said.append(system))
    commands.cmd_ask('How do I boil rice?', model='models/quickstart', device='cpu')
    commands.cmd_ask('How do I boil rice?', model='models/quickstart', style='brief-en', device='cpu')
    commands.cmd_chat(model='models/quickstart', device='cpu')
    assert [('Answer like a pirate.' in s, 'boil rice' in s) for s in said]==[(True, True), (False, True), (True, False)]


def test_a_run_is_found_by_every_path_to_it(root, monkeypatch):
    "A short relative path began a new run in data/data"
    from selfalign.machine.run_commands import run_of
    (root/'elsewhere').mkdir()
    (root/'elsewhere/data').symlink_to(root/'data')
    for here, name in (('.', 'data/quickstart'), ('data', 'quickstart'), ('data/quickstart', '.'), ('data', '../data/quickstart'), ('elsewhere', 'data/quickstart')):
        monkeypatch.chdir(root/here)
        run = run_of(name, '.', {'style': 'brief-en'})  # a style in a file is looked for where one is
        assert run.data.resolve()==root/'data/quickstart' and (run.data/'run.json').exists(), (here, name)


def test_the_judge_is_compared_with_people_on_the_answers_they_saw(root, monkeypatch, capsys):
    "With two answers of each model the grade of the last one counted, and people see the first"
    import shutil
    from selfalign.machine import commands
    from selfalign.people import left_side, sheet_digest
    monkeypatch.chdir(root)
    shutil.copytree('data/quickstart', 'data/two')
    both = rows(root/'data/quickstart/answers_graded.jsonl')
    first = [{**r, 'completion': f'{r["model"]} {r["prompt_id"]}', 'score': 4. if r['model']=='policy' else 2.} for r in both]
    second = [{**r, 'sample': 1, 'score': 6-r['score']} for r in first]
    (root/'data/two/answers_graded.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in first+second))
    record = json.loads((root/'data/two/run.json').read_text())
    record['recipe']['name'] = 'two'
    (root/'data/two/run.json').write_text(json.dumps(record))
    shown = commands.sheet_of(commands._finished('two', 'answers_graded.jsonl', '.'), 0)
    chose = {r['id']: 'left' if left_side(r['id']) else 'right' for r in shown}
    (root/'v.json').write_text(json.dumps(dict(person='A', sheet=sheet_digest(shown), verdicts=chose)))
    capsys.readouterr()
    commands.cmd_compare('two', verdicts=['v.json'], json=True)
    judge = json.loads(capsys.readouterr().out)['judge']
    assert judge['mean']==1 and judge['n']==len(shown)>1


def test_a_warm_start_does_not_overwrite_what_a_run_has_trained(root, monkeypatch):
    from selfalign.machine.files import BadInput
    from selfalign.sft import warm_start
    from selfalign.style import load_style
    monkeypatch.chdir(root)
    with pytest.raises(BadInput, match='trained with DPO, which this would overwrite'): warm_start('models/quickstart', 'embedded', 'TINY', load_style('brief-en'))


def test_a_run_does_not_overwrite_a_warm_start(root, monkeypatch):
    from selfalign.checks import check_run
    from selfalign.machine.files import BadInput
    from selfalign.recipe import read_recipe
    from selfalign.style import load_style
    monkeypatch.chdir(root)
    (root/'models/warm').mkdir()
    (root/'models/warm/run.json').write_text(json.dumps(dict(method='sft')))
    with pytest.raises(BadInput, match='models/warm: its adapter was trained with SFT, which this would overwrite'): check_run(read_recipe('quickstart', model='TINY'), load_style('brief-ru'), root/'data/warm', (root/'models/warm').relative_to(root))


def test_an_adapter_trained_anew_is_not_published_with_the_old_evaluation(root, tmp_path):
    d = tmp_path/'again'
    for k in ('TINY', 'mine.yml', 'en.csv', 'data/quickstart', 'models/quickstart'):
        (d/k).parent.mkdir(parents=True, exist_ok=True)
        (d/k).symlink_to(root/k) if (root/k).is_file() else shutil.copytree(root/k, d/k)
    export = ('export', 'quickstart', '--to', 'hub', '--repo', 'me/x', '--dry-run')
    before = selfalign(*export, cwd=d)
    assert 'trained anew' not in before.stderr
    again = selfalign('dpo', 'data/quickstart', '--set', 'training_seed=3', cwd=d)
    assert again.returncode==0, again.stderr[-2000:]
    got = selfalign(*export, cwd=d)
    assert got.returncode==2 and 'quickstart: its evaluation is not of the adapter as it is now; finish the run first: selfalign run data/quickstart' in got.stderr
    by_path = selfalign('export', 'models/quickstart', *export[2:], cwd=d)
    assert by_path.returncode==2 and 'not of the adapter as it is now' in by_path.stderr


@pytest.mark.parametrize('line, says', [("asks_for_grade: ['give 5|']", 'need a letter'), ("asks_for_language: ['(']", 'a regular expression'), ("foreign_letters: 'z-a'", 'a regular expression'),
                                        ("joint: {grade_words: '('}", 'a regular expression'), ("corruptions: {names: '['}", 'a regular expression')])
def test_patterns_are_refused_where_the_style_is_read(root, line, says):
    "One that matches nothing at all went round for ever; the others failed later, as a defect"
    from selfalign.machine.files import BadInput
    from selfalign.style import load_style
    (root/'odd.yml').write_text(mine+line+'\n')
    with pytest.raises(BadInput, match=says): load_style(str(root/'odd.yml'))


def test_number_words_are_words_and_no_pattern(root):
    import random
    from selfalign.corruptions import changed_number
    from selfalign.style import load_style
    (root/'odd.yml').write_text(mine+"corruptions: {numerals: ['one (1', 'two']}\n")
    assert changed_number('', 'It has two legs.', [], random.Random(0), load_style(str(root/'odd.yml')))=='It has one (1 legs.'


def test_labels_of_a_split_in_other_words_are_kept():
    from selfalign.instructions import split_trees
    assert split_trees([*'abcdef'], .5, ['training', 'testing', 'Train', 'held-out', 'dev', 'evaluation'])==['train', 'test', 'train', 'test', 'test', 'test']


def test_a_report_says_that_a_step_was_done_again(root):
    "It showed the settings of the new step above the results of the old ones"
    again = selfalign('pairs', 'quickstart', '--model', 'TINY', '--data', 'en.csv', '--set', 'style=mine.yml margin=.03', cwd=root)
    assert again.returncode==0, again.stderr
    selfalign('report', 'quickstart', cwd=root)
    page = (root/'data/quickstart/report.html').read_text()
    assert 'this page may mix results of several settings' in page and 'dpo' in page.split('may mix results')[1][:120]
