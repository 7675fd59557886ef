"The demo: what it serves, to whom, that a model's words are no markup, that its verdicts are those of the sheet; in a browser where there is one."
import json
from pathlib import Path

import pytest

from fake_server import Fake
from selfalign import demo
from selfalign.demo import both_stream, demo_page, next_row, open_demo, verdicts_file, vote
from selfalign.inference import answer
from selfalign.llm import load
from selfalign.machine import cli, commands
from selfalign.machine.files import BadInput, read_json
from selfalign.machine.sampling import Sampling
from selfalign.machine.server import Server
from selfalign.machine.tiny import tiny
from selfalign.people import read_verdicts, sheet_rows
from selfalign.style import load_style

style, short, question = load_style('brief-ru'), Sampling(max_new_tokens=8), 'Почему небо голубое?'


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny(tmp_path_factory.mktemp('demo')/'tiny')


@pytest.fixture(scope='module')
def llms(folder, tmp_path_factory): return dict(reference=load(folder), policy=load(tiny(tmp_path_factory.mktemp('demo')/'b', seed=1)))


def test_each_model_says_what_it_says_alone_also_behind_a_server(llms, folder):
    fake = Fake(llms['reference'])
    both = dict(llms, reference=Server(fake.url, folder))
    last = [*both_stream(both, question, style.system, short)][-1]
    assert last=={k: answer(question, m, short, style.system) for k,m in both.items()} and last['policy']==answer(question, llms['policy'], short, style.system)
    fake.shutdown()


def test_each_piece_may_be_asked_for_from_another_thread(llms):
    "As gradio does; PyTorch's inference mode belongs to a thread"
    import threading, torch
    g, got, failed = both_stream(llms, question, style.system, short), [], []
    def one():
        try: got.append(next(g, None))
        except Exception as e: failed.append(e)
    while not failed and (not got or got[-1]):
        t = threading.Thread(target=one)
        t.start(); t.join()
    assert not failed and not torch.is_inference_mode_enabled() and got[:-1]==[*both_stream(llms, question, style.system, short)]


def test_a_run_is_demonstrated_with_its_own_settings_and_its_verdicts_are_those_of_compare(tmp_path, monkeypatch, capsys):
    from test_keys import quietly
    from selfalign.instructions import load_instructions
    from selfalign.recipe import read_recipe
    from selfalign.run import Run, run_all
    monkeypatch.chdir(tmp_path)
    tiny('tiny')
    Path('q.jsonl').write_text('\n'.join(json.dumps(dict(id=r['prompt_id'], prompt=r['prompt'], split=r['split'])) for r in load_instructions('embedded')[0][:24]), encoding='utf-8')
    Path('r.yml').write_text('model: tiny\ndata: q.jsonl\njudge: likelihood\nsamples: 4\nmax_new_tokens: 24\nmargin: 0\nn_prompts: 8\nn_test: 4\nlora_r: 2\nmax_length: 400\nmicro_batch: 2\ntrain_batch: 2\n')
    quietly(run_all, Run(read_recipe('r.yml')))
    seen = {}
    monkeypatch.setattr(commands, 'demo_page', lambda llms, style, **kw: seen.update(llms=llms, style=style, **kw))
    monkeypatch.setattr(commands, 'open_demo', lambda page, port, show: seen.update(port=port))
    assert cli.main(['demo', 'r', '--port', '7999'])==0
    assert seen['port']==7999 and seen['mode']=='likelihood' and seen['s'].max_new_tokens==24 and seen['folder']==Path('data/r')
    ref, pol = (answer(question, seen['llms'][k], short) for k in ('reference', 'policy'))
    assert (ref, pol)==tuple(answer(question, load(m), short) for m in ('tiny', 'models/r'))
    file = verdicts_file(seen['folder'], 'я')
    while (row := next_row(file, seen['rows'])[0]): vote(file, seen['rows'], 'я', row['id'], 'tie')
    capsys.readouterr()
    assert cli.main(['compare', 'r', '--verdicts', str(file), '--json'])==0 and json.loads(capsys.readouterr().out)['each'][0]['ties']==len(seen['rows'])
    for line,why in ((['demo', 'tiny'], 'no adapter, so there is no model below it'), (['demo', 'nobody'], 'no such model')):
        assert cli.main(line)==2 and why in capsys.readouterr().err, line


def test_without_gradio_one_line_says_what_to_install(llms, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gradio', None)
    with pytest.raises(BadInput, match=r'pip install "selfalign\[demo\]"'): demo_page(llms, style)


def test_memory_is_asked_for_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr('selfalign.machine.capacity.free_memory', lambda *a: 1e8)
    monkeypatch.setattr(demo, 'load', None)
    with pytest.raises(BadInput, match='both models: .* GB of memory are needed'): demo.both_models('embedded-aligned', 'embedded')


def test_of_several_answers_the_first_are_shown_once():
    made = [[dict(prompt_id=k, prompt=k, completion=f'{who}{k}{i}', sample=i) for k in 'аб' for i in range(2)] for who in 'xy']
    assert [(r['id'], {r['left'], r['right']}) for r in sheet_rows(*made)]==[(k, {f'x{k}0', f'y{k}0'}) for k in 'аб']


def test_a_name_of_a_person_is_no_path(tmp_path):
    assert len({verdicts_file(tmp_path, p) for p in ('Аня К.', 'Аня К!', 'Аня_К_', 'Аня К')})==4
    assert verdicts_file(tmp_path, '../../etc/passwd').parent==tmp_path and verdicts_file(tmp_path, ' ').name=='verdicts_anybody.json'


def test_in_a_browser_both_answer_nothing_is_fetched_and_no_markup_runs(llms, tmp_path, monkeypatch, browser):
    evil = '<img src=x onerror="document.title=1"><b>жирно</b>'
    monkeypatch.setattr(demo, 'both_stream', lambda llms, *a, **k: iter([dict(reference=evil, policy='кратко')]))
    rows = sheet_rows(*[[dict(prompt_id=str(i), prompt=evil, completion=t+evil) for i in range(2)] for t in 'аб'])
    page = demo_page(llms, style, mode='likelihood', s=short, rows=rows, folder=tmp_path)
    url = open_demo(page, port=0, wait=False)
    tab, outside, errors = browser.new_page(viewport=dict(width=400, height=800)), [], []
    tab.on('request', lambda r: outside.append(r.url) if not r.url.startswith((url, 'data:', 'blob:')) else None)
    tab.on('pageerror', lambda e: errors.append(str(e)))
    try:
        tab.goto(url)
        tab.get_by_label('Question').fill(question)
        tab.get_by_role('button', name='Ask both').click()
        tab.wait_for_selector('text=tokens,')
        assert [tab.get_by_label(k).input_value() for k in ('as it is', 'aligned')]==[evil, 'кратко']
        assert tab.evaluate('document.documentElement.scrollWidth')<=400
        tab.get_by_role('tab', name='Choose').click()
        for k,n in (('Left', 1), ('Equal', 2)):
            tab.get_by_role('button', name=k, exact=True).click()
            tab.wait_for_selector(f'text={n} of 2 chosen')
        tab.get_by_label('Your name').fill('Вера')   # without Enter: what is shown was chosen for nobody in particular
        tab.get_by_role('button', name='Left', exact=True).click()
        tab.wait_for_selector('text=0 of 2 chosen')
        assert not verdicts_file(tmp_path, 'Вера').exists()
        tab.get_by_role('button', name='Left', exact=True).click()
        tab.wait_for_selector('text=1 of 2 chosen')
        assert tab.title()!='1' and tab.locator('img[src=x]').count()==0
        assert outside==[] and errors==[]
        assert sorted(read_verdicts(verdicts_file(tmp_path, ''), rows)[1].values())[-1] in (.5, 1.) and len(read_json(verdicts_file(tmp_path, ''))['verdicts'])==2
    finally:
        tab.close()
        page.close()
