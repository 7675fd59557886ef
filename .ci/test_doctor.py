"The doctor finds what is missing, says what to do, does nothing, and shows no secret."
import json

import pytest

from selfalign.machine import cli, doctor
from selfalign.machine.doctor import doctor_text, machine_findings, package_findings, recipe_findings


def told(*argv): return cli.main(['doctor', *argv])


def test_a_missing_package_is_named_with_its_command():
    rows = package_findings(['torch>=2', 'pandas>=99', 'no-such-thing>=1.5', 'neither; extra == "wings"', 'numpy; extra == "wings"'])
    by = {r['what']: r for r in rows}
    assert by['torch']['fine'] and not by['torch']['do'] and by['pandas']['fine'] is False and by['pandas']['do']=='pip install "pandas>=99"'
    assert by['no-such-thing']['found']=='not installed' and by['[wings]']==dict(what='[wings]', found='1 of 2 packages are missing: neither', fine=None, do='pip install "selfalign[wings]"')
    assert 'NO  no-such-thing' in doctor_text(rows) and 'pip install "no-such-thing>=1.5"' in doctor_text(rows)


def test_in_order_it_ends_well_and_prints_json(capsys):
    assert told('quickstart', '--json')==0
    rows = json.loads(capsys.readouterr().out)
    assert {'what', 'found', 'fine', 'do'}=={*rows[0]} and all(r['fine'] is not False for r in rows)


def test_too_little_memory_and_a_model_that_cannot_be_fetched_end_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'free_memory', lambda *a: 1e8)
    assert told('quickstart')==2
    said = capsys.readouterr()
    assert 'NO  quickstart: memory' in said.out and 'lower micro_batch' in said.out and said.err.strip()=='selfalign: doctor: not in order: quickstart: memory'
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    rows = recipe_findings('gemma-2-2b-it')
    assert rows==[dict(what='gemma-2-2b-it: google/gemma-2-2b-it', found='not here yet', fine=False, do='unset HF_HUB_OFFLINE, or name a local folder')]


def test_an_unknown_recipe_is_a_finding(capsys):
    assert told('quickstrat')==2 and 'did you mean "quickstart"' in capsys.readouterr().out


@pytest.mark.parametrize('offline', ['0', '1'])
def test_no_token_is_shown(monkeypatch, offline):
    monkeypatch.setenv('HF_TOKEN', 'hf_verysecret')
    monkeypatch.setenv('HF_HUB_OFFLINE', offline)
    said = doctor_text(machine_findings())
    assert 'hf_very' not in said and ('with a token' in said or 'switched off' in said)


def time_of(tmp_path, **keys):
    "What is found about the time of a recipe"
    (tmp_path/'r.yml').write_text(json.dumps(dict(model='embedded', data='embedded', n_prompts=8, n_test=4, max_new_tokens=32, **keys)))
    return next(r for r in recipe_findings(str(tmp_path/'r.yml')) if r['what']=='r: time')


def test_a_slower_machine_takes_longer(monkeypatch, tmp_path):
    from selfalign.machine import hours
    from selfalign.recipe import read_recipe
    r = read_recipe('quickstart')
    fast, slow = hours.step_seconds(r, lambda dtype: 2e11), hours.step_seconds(r, lambda dtype: 5e10)
    assert fast.keys()==slow.keys() and all(abs(slow[k]/fast[k]-4)<1e-6 for k in fast)
    assert time_of(tmp_path)['found'].startswith(('about ', 'less than a minute'))
    monkeypatch.setattr(hours, 'pick_device', lambda *a: ('cuda', None))
    assert time_of(tmp_path)==dict(what='r: time', found='not known: no run was timed on a GPU', fine=None, do='')


@pytest.mark.parametrize('keys,said', [(dict(also_train='OpenAssistant/oasst1'), 'before the instructions are here'), (dict(server='http://127.0.0.1:9'), 'a server answers')])
def test_nothing_is_fetched_or_asked_for_an_estimate(monkeypatch, tmp_path, keys, said):
    from selfalign.machine import hours
    monkeypatch.setattr(hours, 'Run', lambda *a: pytest.fail('the run was made'))
    found = time_of(tmp_path, **keys)
    assert found['fine'] is None and said in found['found']


def test_instructions_that_are_not_there_are_a_finding(tmp_path):
    from selfalign.machine.doctor import _time_finding
    from selfalign.recipe import read_recipe
    found = _time_finding(read_recipe('quickstart', data='nowhere.csv'))
    assert found['fine'] is False and 'nowhere.csv' in found['do']
