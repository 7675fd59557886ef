"What commands print: JSON alone where it is asked for, tables that fit a terminal, and what a shell completes."
import json, os, pty, re, shlex, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

from test_kill import prepare
from selfalign.machine import cli
from selfalign.machine.files import read_json

RECIPE = ('model: tiny\ndata: q.csv\njudge: likelihood\nmax_new_tokens: 24\nmargin: 0\nn_prompts: 8\nn_test: 4\nlora_r: 2\n'
          'max_length: 400\nmicro_batch: 2\ntrain_batch: 2\n')


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder with a tiny random model, a recipe and questions with gold answers"
    folder, before = prepare(tmp_path_factory.mktemp('output')/'here', RECIPE), os.getcwd()
    os.chdir(folder)
    Path('g.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'Сколько ног у {k} пауков?', gold=str(8*k))) for k in range(2, 30)), encoding='utf-8')
    yield folder
    os.chdir(before)


def told(capsys, *line):
    "What a command says on both outputs"
    capsys.readouterr()
    assert cli.main(list(line))==0
    return capsys.readouterr()


@pytest.fixture(scope='module')
def finished(here):
    "What `run --json` prints, in a process of its own"
    r = subprocess.run([sys.executable, '-m', 'selfalign.machine.cli', 'run', 'r.yml', '--json'], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    return r


def test_a_run_prints_its_record_and_evaluation_and_says_the_rest_elsewhere(finished):
    found = json.loads(finished.stdout)
    assert found['evaluation']==read_json('data/r/evaluation.json') and found['steps']==read_json('data/r/run.json')['steps']
    assert Path(found['report']).exists() and found['adapter']=='models/r'
    assert re.search(r'^dpo ', finished.stderr, re.M) and 'talk to it' in finished.stderr


@pytest.fixture(scope='module')
def verdicts(finished):
    "A file of verdicts as the demo saves it"
    from selfalign.demo import next_row, sheet_of, verdicts_file, vote
    from selfalign.recipe import read_recipe
    from selfalign.run import Run
    rows, file = sheet_of(Run(read_recipe('r.yml'))), verdicts_file(Path('data/r'), 'я')
    while (row := next_row(file, rows)[0]): vote(file, rows, 'я', row['id'], 'left')
    return file


@pytest.mark.parametrize('line', ['evaluate r.yml', 'pairs r.yml', 'qa r --data g.jsonl --limit 4', 'compare r --verdicts data/r/verdicts_я.json', 'doctor quickstart',
    'bench sampling --model tiny --limit 2 --rounds 1', 'audit --model tiny --mode likelihood --limit 4', 'export r --out whole', 'frontier r.yml --grid beta=.5 --n_validation 3',
    'baselines r.yml --only "prompt 1"'], ids=lambda l: l.split()[0])
def test_json_is_the_whole_output(verdicts, capsys, line):
    said = told(capsys, *shlex.split(line), '--json')
    assert json.loads(said.out) and len(said.out.splitlines())==1, said.out


def test_people_get_words(verdicts, capsys):
    said = told(capsys, 'compare', 'r', '--verdicts', str(verdicts)).out
    assert 'я: ' in said and 'win rate of the aligned model: ' in said and '{' not in said
    assert 'measure' in told(capsys, 'qa', 'r', '--data', 'g.jsonl', '--limit', '4').out
    said = told(capsys, 'frontier', 'r.yml', '--grid', 'beta=.3', '--n_validation', '1').out   # one instruction has no interval
    assert '1 of 1: r.frontier.beta0.3: ' in said and 'no interval' in said and 'beta=0.3' in said


def test_only_some_baselines_keep_the_others_of_the_same_evaluation(tmp_path):
    from types import SimpleNamespace
    from selfalign.baselines import _with_earlier
    from selfalign.machine.files import write_json
    run = SimpleNamespace(data=tmp_path, style=SimpleNamespace(hints=['Кратко.']))
    def after(*names):
        rows = _with_earlier(run, [dict(name=n) for n in names], ['as it is', 'prompt 1', 'DPO'])
        write_json(tmp_path/'baselines.json', rows)
        return [r['name'] for r in rows]
    write_json(tmp_path/'evaluation.json', dict(n=1))
    assert after('DPO', 'as it is')==['as it is', 'DPO'] and after('prompt 1')==['as it is', 'prompt 1', 'DPO']
    run.style.hints = ['Короче.']
    assert after('prompt 1')==['prompt 1']
    write_json(tmp_path/'evaluation.json', dict(n=2))
    assert after('DPO')==['DPO']


def test_a_process_without_a_record_prints_no_json(monkeypatch, capsys):
    "Of several processes the first alone keeps the record"
    from types import SimpleNamespace
    from selfalign.machine import run_commands
    monkeypatch.setattr(run_commands, 'rank', lambda: 1)
    run_commands._one_step(SimpleNamespace(step=lambda *args, **kw: None, record={}), 'pairs', True)
    assert capsys.readouterr().out==''


def test_two_files_of_questions_with_one_name_have_two_results(finished):
    "And the same file again has the same result file"
    from selfalign.recipe import read_recipe
    from selfalign import run as run_module
    from selfalign.run import Run
    Path('other').mkdir()
    Path('other/g.jsonl').write_text(json.dumps(dict(prompt='Сколько рогов у козы?', gold='2'))+'\n', encoding='utf-8')
    run = Run(read_recipe('data/r'))
    first, second, again = [run.qa(f, limit=2)[1] for f in ('g.jsonl', 'other/g.jsonl', 'g.jsonl')]
    assert first==again!=second and [read_json(f)['n'] for f in (first, second)]==[2, 1]
    hub = [run_module._source_mark(d) for d in ('one/exam', 'two/exam')]   # a mark is part of a file's name
    assert hub[0]!=hub[1] and all(re.fullmatch(r'\d{6}', m) for m in hub)


def test_one_person_is_not_counted_twice(verdicts, capsys):
    "A browser saves the same file again as `verdicts (1).json`"
    again = shutil.copy(verdicts, 'again.json')
    capsys.readouterr()
    assert cli.main(['compare', 'r', '--verdicts', str(verdicts), again])==2
    assert "two files hold verdicts of 'я'" in capsys.readouterr().err


def in_terminal(argv, err=subprocess.DEVNULL, rc=0, until=None, **env):
    "What a command writes to a terminal 60 columns wide; it is interrupted when it has written `until`"
    import fcntl, struct, termios
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 60, 0, 0))
    keep = {k: v for k,v in os.environ.items() if k not in ('COLUMNS', 'NO_COLOR', 'TERM')}
    p = subprocess.Popen([sys.executable, '-m', 'selfalign.machine.cli', *argv], stdout=theirs, stderr=theirs if err is None else err, env={**keep, 'TERM': 'xterm-256color', **env})
    os.close(theirs)
    said = b''
    while True:
        try: more = os.read(mine, 65536)
        except OSError: break
        if not more: break
        said += more
        if until and re.search(until, said):
            p.send_signal(signal.SIGINT)
            until = None
    os.close(mine)
    assert p.wait()==rc, said.decode()
    return said.decode()


def test_a_table_fits_its_terminal_and_has_no_colours_where_they_are_not_wanted(finished):
    argv = ['qa', 'r', '--data', 'g.jsonl', '--limit', '4']
    said = in_terminal(argv)
    table = re.sub(r'\x1b\[[\d;]*m', '', said).splitlines()
    rule = [i for i,l in enumerate(table) if '──' in l][0]
    assert '\x1b[' in said and all(len(l)<=60 for l in table[:rule+4])
    assert '\x1b[' not in in_terminal(argv, TERM='dumb') and '\x1b[3' not in in_terminal(argv, NO_COLOR='1')


def test_a_terminal_gets_a_bar_and_its_cursor_back(finished):
    "Where training is interrupted in the middle too"
    argv = ['run', 'r.yml', '--set', 'name=bar', '--fresh']
    said = in_terminal(argv, None, TQDM_DISABLE='')
    assert said.count('\x1b[?25l')==said.count('\x1b[?25h')>2 and re.search(r'dpo  *\d+/\d+.*left .*loss=', re.sub(r'\x1b\[[?\d;]*[a-zA-Z]', '', said))
    stopped = in_terminal([*argv[:3], 'name=bar epochs=90'], None, 130, rb'dpo .*\d/\d.*loss=', TQDM_DISABLE='')
    assert stopped.count('\x1b[?25l')==stopped.count('\x1b[?25h')>0 and 'Traceback' not in stopped
    assert '\x1b' not in in_terminal(argv, None, TQDM_DISABLE='', TERM='dumb') and '\x1b[3' not in in_terminal(argv, None, TQDM_DISABLE='', NO_COLOR='1')


def test_bash_completes_commands_options_recipes_and_files(finished, tmp_path, capsys):
    script = tmp_path/'selfalign.bash'
    script.write_text(told(capsys, 'completion', 'bash').out)
    def tries(*words):
        line = f'source {script}; COMP_WORDS=({" ".join(words)} {chr(39)*2 if len(words)<3 else ""}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _shtab_selfalign; echo "${{COMPREPLY[@]}}"'
        return subprocess.run(['bash', '--norc', '-c', line], capture_output=True, text=True, check=True).stdout.split()
    assert {'run', 'completion'}<={*tries('selfalign')}
    assert {'quickstart', 'instruct', 'r.yml'}<={*tries('selfalign', 'run')}
    assert tries('selfalign', 'run', '--li')==['--limit'] and tries('selfalign', 'export', '--to')==['--to']


@pytest.mark.parametrize('shell', ['zsh', 'fish'])
def test_other_shells_get_a_script_that_names_every_command(shell, capsys, tmp_path):
    said = told(capsys, 'completion', shell).out
    assert all(re.search(rf'\b{c}\b', said) for c in cli.ABOUT)
    if shutil.which(shell):
        (tmp_path/'s').write_text(said)
        assert subprocess.run([shell, '-n', str(tmp_path/'s')], capture_output=True).returncode==0


def test_a_tracker_gets_the_share_of_gold_answers():
    from selfalign.machine.files import repo_file
    from selfalign.tracking import scalars
    ev = read_json(repo_file('models/gemma3-270m-brief/evaluation.json'))
    assert scalars(ev)['evaluation/after/gold']==ev['policy']['measures']['gold']['mean']


def test_a_plot_that_fails_leaves_no_figure_open():
    import matplotlib.pyplot as plt
    from selfalign.report import drawn
    def fails(): plt.figure(); raise ValueError('a damaged file')
    before = plt.get_fignums()
    with pytest.raises(ValueError): drawn(fails, says='nothing')
    assert plt.get_fignums()==before


def test_a_file_of_bench_keeps_every_topic_and_every_machine(tmp_path, monkeypatch, capsys):
    from selfalign.machine import cli, commands
    machine = dict(processor='P', flags=[], threads=2)
    monkeypatch.setattr(commands, 'bench', lambda topic, *a: dict(speedup_vs_x={'sampling': 2., 'grading': 3.}[topic], measured_on=dict(machine)))
    monkeypatch.setattr(commands, 'load', lambda *a: None)
    out = tmp_path/'bench.json'
    assert cli.main(['bench', 'sampling', 'grading', '--out', str(out)])==0
    assert {k: v['speedup_vs_x'] for k,v in json.loads(out.read_text()).items()}==dict(sampling=2., grading=3.)
    machine['threads'] = 8
    assert cli.main(['bench', 'grading', '--out', str(out)])==0
    kept = json.loads(out.read_text())
    assert kept['grading']['measured_on']['threads']==2 and [r['measured_on']['threads'] for r in kept['elsewhere']['grading']]==[8]
    assert cli.main(['bench', '--out', str(out), 'startdup'])==2 and json.loads(out.read_text())==kept
