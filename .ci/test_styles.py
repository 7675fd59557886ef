"A style nobody here wrote, and one that is not about length, go through the whole loop from the command line."
import json
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
