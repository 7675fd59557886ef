"The command line on the real embedded model, end to end, with few prompts: no cached answers, no network."
import csv, html, json, os, re, subprocess, sys

import pytest

questions = ['Почему зимой дни короче, чем летом?', 'Как быстро почистить чеснок?', 'Что такое фотосинтез?', 'Придумай название для кафе у моря', 'Сколько минут в сутках?',
             'чем отличается кит от рыбы', 'Как завязать галстук?', 'Напиши короткое поздравление с днём рождения для коллеги', 'Зачем нужен пароль из разных символов?',
             'Кто написал «Войну и мир»?', 'Как объяснить ребёнку, что такое деньги?', 'Какая планета самая большая?']


def selfalign(*args, cwd):
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1', 'PYTHONIOENCODING': 'utf-8'}
    return subprocess.run([sys.executable, '-m', 'selfalign.machine.cli', *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def rows(path): return [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A run of quickstart on a table with a `text` column"
    d = tmp_path_factory.mktemp('run')
    with open(d/'q.csv', 'w', encoding='utf-8', newline='') as f: csv.writer(f).writerows([['text'], *[[q] for q in questions]])
    r = selfalign('run', 'quickstart', '--data', 'q.csv', '--limit', '12', cwd=d)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-3000:]
    (d/'stdout').write_text(r.stdout, encoding='utf-8')
    return d


def test_every_file_is_there_and_fits_the_one_before(root):
    d = root/'data/quickstart'
    ins, cands, scores, pairs, ans = (rows(d/f'{n}.jsonl') for n in ('instructions', 'candidates', 'scores', 'pairs', 'answers'))
    train, test = ({r['prompt_id'] for r in ins if r['split']==s} for s in ('train', 'test'))
    assert train and test and not train & test
    assert {r['prompt_id'] for r in cands}==train and len(cands)==5*len(train)
    assert [(r['prompt_id'], r['sample'], r['completion']) for r in scores]==[(r['prompt_id'], r['sample'], r['completion']) for r in cands]
    assert all(r['score'] is None or 1<=r['score']<=5 for r in scores)
    assert {p['prompt_id'] for p in pairs}<=train and all(p['chosen']!=p['rejected'] and p['chosen'] and p['margin']>0 for p in pairs)
    assert {r['prompt_id'] for r in ans}==test and len(ans)==2*len(test)
    assert (root/'models/quickstart/adapter_model.safetensors').exists()


def test_training_starts_at_the_reference_and_moves_the_answers(root):
    log = rows(root/'models/quickstart/log.jsonl')
    assert abs(log[0]['rewards/margins'])<1e-3 and abs(log[0]['rewards/chosen'])<1e-3  # so DPO's part of the loss is ln 2
    assert log[-1]['rewards/margins']>.01 and log[-1]['loss']<log[0]['loss']
    ans = rows(root/'data/quickstart/answers.jsonl')
    by = {m: [r['completion'] for r in ans if r['model']==m] for m in ('reference', 'policy')}
    assert by['reference']!=by['policy']


def test_the_end_says_what_happened(root):
    out = (root/'stdout').read_text(encoding='utf-8')
    for part in ('before (', 'after  (', 'length in tokens', 'held-out instructions', 'report'): assert part in out
    ev = json.loads((root/'data/quickstart/evaluation.json').read_text(encoding='utf-8'))
    assert ev['n']>=2 and ev['reference']['mean_tokens']>0 and len(ev['win_rate_ci'])==2


def test_it_ends_in_one_page_that_needs_nothing_else(root):
    page = root/'data/quickstart/report.html'
    assert 'report.html' in (root/'stdout').read_text(encoding='utf-8')
    txt = page.read_text(encoding='utf-8')
    assert len(txt)<3e6 and not re.search(r'<(script|link|img|iframe)\b|(src|href)="(?!#)', txt)
    asked = {r['prompt'] for r in rows(root/'data/quickstart/answers.jsonl')}
    assert any(q in html.unescape(txt) for q in asked)
    page.unlink()
    r = selfalign('report', 'quickstart', cwd=root)
    assert r.returncode==0 and page.exists(), r.stderr
    r = selfalign('report', 'other', cwd=root)
    assert r.returncode==2 and 'finish the run first' in r.stderr and len(r.stderr.splitlines())==1


def test_started_again_nothing_is_repeated(root):
    before = (root/'data/quickstart/candidates.jsonl').stat().st_mtime_ns
    r = selfalign('run', 'quickstart', '--data', 'q.csv', '--limit', '12', cwd=root)
    assert r.returncode==0 and r.stdout.count('finished before')==8
    assert (root/'data/quickstart/candidates.jsonl').stat().st_mtime_ns==before


def test_ask_the_new_model(root):
    r = selfalign('ask', 'Сколько ног у паука?', '--model', 'models/quickstart', '--max_new_tokens', '24', cwd=root)
    assert r.returncode==0 and r.stdout.strip()
