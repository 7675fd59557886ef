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
