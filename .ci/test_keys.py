"A step is done again when something it reads has changed, and only then; and nothing is lost before everything has been checked. A tiny random model."
import contextlib, dataclasses, io, json, os, shutil

import pytest

from selfalign.machine.files import BadInput, read_json, write_json
from selfalign.recipe import Recipe, read_recipe
from selfalign.run import Run, run_all
from selfalign.steps import STEPS
from selfalign.style import Style, load_style

recipe = ('model: tiny\ndata: q.csv\njudge: likelihood\nsamples: 4\nmax_new_tokens: 48\nmargin: 0\nn_prompts: 12\nn_test: 4\nlora_r: 2\n'
          'max_length: 400\ntrain_batch: 2\nmicro_batch: 2\n')
weights = 'Полезность=2,Уместность=1,Точность и полнота=1,Краткость=1,Грамотность и доступность=1'


def quietly(f, *a, **k):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): return f(*a, **k)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A finished run of thirty instructions, some of which have gold answers"
    import transformers
    from selfalign.instructions import load_instructions
    from selfalign.machine.tiny import tiny
    transformers.utils.logging.disable_progress_bar()
    d = tmp_path_factory.mktemp('keys')
    with contextlib.chdir(d):
        tiny('tiny'); tiny('tiny2', seed=1)
        rows = [dict(id=f'p{i}', prompt=r['prompt'], gold=['да']) for i,r in enumerate(load_instructions('embedded')[0][:30])]
        write_jsonl_rows('q.jsonl', rows)
        with open('r.yml', 'w') as f: f.write(recipe.replace('q.csv', 'q.jsonl'))
        quietly(run_all, Run(read_recipe('r.yml')))
    return d


def write_jsonl_rows(path, rows):
    with open(path, 'w', encoding='utf-8') as f: f.writelines(json.dumps(r, ensure_ascii=False)+'\n' for r in rows)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "A copy of it, in another folder"
    shutil.copytree(made, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    return tmp_path/'w'


def run(**over): return Run(read_recipe('r.yml', **over))


def done(r):
    "Do the run; which steps had something to do?"
    did = []
    step = Run.step
    def noted(self, name, force=False):
        if got := step(self, name, force): did.append(name)
        return got
    Run.step = noted
    try: quietly(run_all, r)
    finally: Run.step = step
    return did


def test_a_copied_folder_is_finished(here): assert run().plan()=={} and done(run())==[]


# what a value's change does again: exactly the steps that read it, and those after them whose files change

def fits(k, x):
    try: return Recipe(**{k: x}) is not None
    except ValueError: return False


def another(k, v):
    f = Recipe.model_fields[k]
    choices = (f.json_schema_extra or {}).get('enum')
    if choices: return next(c for c in choices if c!=v)
    named = dict(style='formal-ru', data='other.jsonl', also_train={'other.jsonl': 2}, model='tiny2', judge_model='tiny2', second_judge='tiny2', device='cpu', report_to='none', strategy='all', served='x',
                 server='http://127.0.0.1:9', criteria_weights={'Полезность': 2.}, n_validation=2, n_test=3, lora_alpha=3, length_gap=-1., max_steps=1, training_seed=7)
    if k in named: return named[k]
    if isinstance(v, (bool, int)): return (not v) if isinstance(v, bool) else v+1
    return next(x for x in (.1, .95, 1.5, 2e-4) if x!=v and fits(k, x))


reads = {  # by hand, not from STEPS: which steps a setting is an input of
    'data': 'data also_train limit min_chars max_chars test_share near_duplicate seed',
    'candidates': 'samples hinted_samples temperature top_k top_p repetition_penalty max_new_tokens seed style model device dtype server',
    'judge': 'judge judge_model calibrate criteria_weights require_pmi style model device dtype server',
    'pairs': 'margin strategy pairs_per_prompt length_gap require_pmi max_length_ratio',
    'dpo': 'learning_rate lr_scheduler_type schedule_epochs epochs max_steps train_batch micro_batch lora_r lora_alpha max_length beta loss_type ld_alpha sft_weight label_smoothing bits '
           'seed training_seed style model device dtype',
    'reference': 'answer_samples answer_temperature answer_top_k answer_top_p answer_repetition_penalty max_new_tokens n_test n_validation seed style model device dtype server',
    'answer': 'answer_samples answer_temperature answer_top_k answer_top_p answer_repetition_penalty max_new_tokens seed style model device dtype',
    'evaluate': 'judge judge_model calibrate criteria_weights second_judge n_test n_validation style model device dtype server'}
none = 'name rounds served concurrency timeout batch_size save_steps keep_state report_to watch_every'.split()


@pytest.mark.parametrize('k', [k for k in Recipe.model_fields if k not in ('name', 'n_prompts')])
def test_another_value_repeats_the_steps_that_read_it(here, k):
    lines = (here/'q.jsonl').read_text().splitlines(True)
    (here/'other.jsonl').write_text(''.join(lines[:-1]))
    more = dict(served='x') if k=='server' else {}
    plan = run(**{k: another(k, getattr(run().r, k)), **more}).plan()
    want = {s for s,ks in reads.items() if k in ks.split()}
    assert {s for s,why in plan.items() if why==2}==want, k
    assert bool(want)==(k not in none)


def test_fewer_prompts_are_fewer_candidates(here): assert run(n_prompts=6).plan()=={'candidates': 2, 'judge': 1, 'pairs': 1, 'dpo': 1, 'answer': 1, 'evaluate': 1}


def test_some_candidates_are_written_with_a_hint(here):
    def texts(): return [json.loads(l)['completion'] for l in open('data/r/candidates.jsonl', encoding='utf-8')]
    plain, r = texts(), run(hinted_samples=1)
    for s in ('data', 'candidates'): quietly(r.step, s)
    hinted = texts()
    assert len(hinted)==len(plain) and all((a==b)==(i%4<3) for i,(a,b) in enumerate(zip(plain, hinted)))  # the last of four


def test_a_setting_that_an_older_version_lacked_repeats_nothing_before_it_has_a_value(here, monkeypatch):
    now = run().key('dpo')
    older = dataclasses.replace(STEPS['dpo'], settings=tuple(k for k in STEPS['dpo'].settings if k!='training_seed'))
    with monkeypatch.context() as m:
        m.setitem(STEPS, 'dpo', older)
        assert run().key('dpo')==now
    assert run(training_seed=run().r.seed).plan()['dpo']==2  # given, even as what it was: nobody has to work out why it counts


def test_the_seed_of_training_changes_the_adapter_and_not_the_candidates(here):
    def adapter(): return (here/'models/r/adapter_model.safetensors').read_bytes()
    before, files = adapter(), {f: (here/'data/r'/f).read_bytes() for f in ('candidates.jsonl', 'pairs.jsonl', 'answers_reference.jsonl')}
    assert done(run(training_seed=7))==['dpo', 'answer', 'evaluate']
    assert adapter()!=before and {f: (here/'data/r'/f).read_bytes() for f in files}==files


def test_the_plan_is_what_is_done(here):
    for over in (dict(criteria_weights={'Полезность': 5.}), dict(margin=.02), dict(beta=.5), dict(answer_top_k=5), dict(second_judge='tiny2')):
        plan = run(**over).plan()
        did = done(run(**over))
        assert {s for s,why in plan.items() if why==2}<=set(did)<=set(plan), over
        assert run(**over).plan()=={}


def test_every_declared_setting_is_read_and_no_other(here):
    "The steps run with a recipe and a style that note what is read of them"
    seen = set()
    def spied(cls):
        class Spied(cls):
            def __getattribute__(self, k):
                if k in cls.model_fields: seen.add(k)
                return super().__getattribute__(k)
        return Spied
    class R(spied(Recipe)):
        def part(self, cls): return spied(cls)(**{k: self.__dict__[k] for k in cls.model_fields})
    for d in ('data', 'models'): shutil.rmtree(d)
    r = Run(R(**read_recipe('r.yml').model_dump()))
    r.check()
    explained = {*none, 'server', 'n_prompts', 'n_test', 'n_validation', 'model', 'judge_model', 'second_judge', 'device', 'dtype', 'style', 'data', 'also_train'}  # models and rows are inputs by their contents
    looks = {'answer_samples', 'answer_temperature', 'answer_top_k', 'answer_top_p', 'answer_repetition_penalty', 'max_new_tokens'}  # of watch.jsonl
    for name,s in STEPS.items():
        r.key(name)
        seen.clear()
        quietly(s.do, r)
        assert seen-set(s.settings)<=explained|(looks if name=='dpo' else set()), name
        assert set(s.settings)-seen<={'device', 'dtype'}, name  # read when the model is loaded


shown = dict(pairs={'name', 'criteria'}, judge={'joint'}, evaluate={'joint'})  # the card of the pairs and names of strategies; a judge that no run has


def test_every_part_of_a_style_that_is_read_is_an_input(here):
    seen = set()
    class S(Style):
        def __getattribute__(self, k):
            if k in Style.model_fields: seen.add(k)
            return super().__getattribute__(k)
    for d in ('data', 'models'): shutil.rmtree(d)
    r = run()
    r.style = S(**load_style(r.r.style).__dict__)
    seen.clear()
    r.style.digest()
    judged = set(seen)
    for name,s in STEPS.items():
        r.key(name)
        seen.clear()
        quietly(s.do, r)
        declared = set(s.style)|(judged if 'digest' in s.style else set())
        assert seen-declared<=shown.get(name, set()), (name, seen-declared)


@pytest.mark.parametrize('over', [dict(batch_size=3), dict(save_steps=1), dict(watch_every=2), dict(keep_state=True)])
def test_settings_without_effect_change_no_file(made, tmp_path, monkeypatch, over):
    monkeypatch.chdir(made)
    quietly(run_all, Run(read_recipe('r.yml', **over), tmp_path))
    for f in ('candidates.jsonl', 'scores.jsonl', 'pairs.jsonl', 'answers.jsonl', 'evaluation.json'):
        assert (tmp_path/'data/r'/f).read_bytes()==(made/'data/r'/f).read_bytes(), f
    assert same_adapter(tmp_path/'models/r', made/'models/r')


def same_adapter(a, b): return (a/'adapter_model.safetensors').read_bytes()==(b/'adapter_model.safetensors').read_bytes()


# inputs that are no settings

def test_a_corrected_gold_answer_repeats_the_evaluation(here):
    assert done(run())==[]
    held = json.loads(next(l for l in (here/'data/r/instructions.jsonl').read_text().splitlines() if json.loads(l)['split']=='test'))
    text = (here/'q.jsonl').read_text()
    line = next(l for l in text.splitlines() if json.loads(l)['prompt'].strip()==held['prompt'].strip())
    (here/'q.jsonl').write_text(text.replace(line, json.dumps({**json.loads(line), 'gold': ['нет']}, ensure_ascii=False)))
    assert done(run())==['data', 'evaluate']


def test_changed_criteria_repeat_the_grades(here):
    from selfalign.machine.files import package_file
    text = package_file('styles/brief-ru.yml').read_text()
    (here/'mine.yml').write_text(text)
    same = run(style='mine.yml')
    assert same.plan()=={}  # the name and place of a style are no input
    first = text.index('criteria:')
    (here/'mine.yml').write_text(text[:first]+text[first:].replace('. ', '! ', 1))
    assert {s for s,why in run(style='mine.yml').plan().items() if why==2}=={'judge', 'evaluate'}


def test_an_audit_of_another_judge_gives_no_mix(here):
    from selfalign.machine.weights import model_key
    style = load_style('brief-ru')
    audit = dict(model=model_key('tiny2'), style=style.record(), mix=dict.fromkeys(style.criteria, 1.), mode='mix', judge='tiny2', fingerprint='x')
    write_json('data/r/audit.json', audit)
    assert run(judge='mix').mix() is None
    write_json('data/r/audit.json', {**audit, 'model': model_key('tiny')})
    assert run(judge='mix').mix()==audit['mix']
    key = run(judge='mix').key('judge')
    write_json('data/r/audit.json', {**audit, 'model': model_key('tiny'), 'mix': dict.fromkeys(style.criteria, 0.)})
    assert run(judge='mix').key('judge')!=key


def test_a_step_whose_file_is_missing_or_torn_is_done_again(here):
    files = {f: s for s,o in STEPS.items() for f in o.products if f!='models/README.md'}
    for f,s in files.items():
        p = run().path(f)
        whole = p.read_bytes()
        p.unlink()
        assert run().plan().get(s)==2, f
        if p.suffix in ('.jsonl', '.json', '.safetensors'):
            p.write_bytes(whole[:len(whole)*2//3])
            assert run().plan().get(s)==2, f
        p.write_bytes(whole)
    assert run().plan()=={}


# folders

def test_a_renamed_run_goes_on_where_it_lies(here):
    from selfalign.machine.commands import cmd_run
    os.rename('data/r', 'data/old'); os.rename('models/r', 'models/old')
    r = Run(read_recipe('data/old'))
    assert (r.r.name, str(r.data), r.plan())==('old', 'data/old', {})
    os.makedirs('away'); os.rename('data', 'away/data'); os.rename('models', 'away/models')
    assert Run(read_recipe('away/data/old'), 'away').plan()=={}
    out = io.StringIO()
    with contextlib.redirect_stdout(out): cmd_run('away/data/old', set='beta=.5', plan=True)
    assert [l.split()[0] for l in out.getvalue().splitlines() if 'finished' not in l]==['dpo', 'answer', 'evaluate']
    with pytest.raises(BadInput, match='not under --root'): cmd_run('away/data/old', root='data')


def test_the_folder_decides_where_compare_and_qa_write(here):
    from selfalign.machine.commands import cmd_compare
    os.rename('data/r', 'data/old'); os.rename('models/r', 'models/old')
    rec = read_json('data/old/run.json')
    write_json('data/old/run.json', {**rec, 'recipe': {**rec['recipe'], 'name': '../../outside'}})
    quietly(cmd_compare, 'old', sheet='s.html')
    assert (here/'s.html').exists() and not (here.parent/'outside').exists()
    for name in ('../data/old', '/etc', '..'):
        with pytest.raises(BadInput): cmd_compare(name, sheet='s.html')


def test_its_own_output_is_no_source(here):
    for fresh in (False, True):
        with pytest.raises(BadInput, match='overwrite its own instructions'): quietly(run_all, run(data='data/r/instructions.jsonl'), fresh)
    assert run().plan()=={}


@pytest.mark.parametrize('over', [dict(data='qq.jsonl'), dict(data='broken.csv'), dict(model='tinny'), dict(second_judge='/nope'), dict(train_batch=3, micro_batch=2), dict(report_to='x'),
                                  dict(strategy='wurst'), dict(limit=2), dict(n_validation=99)])
def test_fresh_with_a_mistake_removes_nothing(here, over):
    (here/'broken.csv').write_text('text\n"a')
    before = {p: p.read_bytes() for d in ('data', 'models') for p in (here/d).rglob('*') if p.is_file() and p.suffix!='.lock'}
    with pytest.raises(BadInput): quietly(run_all, run(**over), True)
    assert all(p.exists() and p.read_bytes()==b for p,b in before.items())


def test_fresh_removes_what_the_run_wrote_and_nothing_else(here):
    theirs = [here/p for p in ('data/r/note.txt', 'data/r/audit.json', 'data/r/qa_questions.jsonl', 'data/r/baselines_notes.md', 'data/r/more/x.jsonl', 'models/r/merged/model.safetensors', 'models/r/notes.md', 'models/warm/checkpoints/checkpoint-3/x')]
    for p in theirs: p.parent.mkdir(parents=True, exist_ok=True); p.write_text('mine')
    for k in ('data/r/qa_reference.jsonl', 'data/r/qa_prompt1.rows.jsonl', 'data/r/baselines.json', 'models/r/qa.train.prompt1.json', 'models/r/qa_x.json'): (here/k).write_text('its own')
    run().forget()
    left = {p for d in ('data', 'models') for p in (here/d).rglob('*') if p.is_file() and not p.name.endswith('.lock')}
    assert left==set(theirs)


def test_a_name_that_only_a_warm_start_has_used_keeps_its_checkpoints(here):
    p = here/'models/w/checkpoints/checkpoint-2/trainer_state.json'
    p.parent.mkdir(parents=True); p.write_text('{}'); (here/'models/w/checkpoints.key').write_text('x')
    run(name='w').forget()
    assert p.exists()


def test_leftovers_of_a_killed_process_are_removed_and_a_merge_beside_is_let_be(here):
    left, merging = here/'data/r/.scores.jsonl.7.tmp', here/'models/r/.merged.tmp'
    left.write_text('{'); merging.mkdir(); (merging/'config.json').write_text('{}')
    assert done(run())==[]
    assert not left.exists() and (merging/'config.json').exists()


def test_the_record_says_which_settings_each_step_had(here):
    quietly(run(margin=.02).step, 'pairs')
    rec = read_json('data/r/run.json')['steps']
    assert rec['pairs']['settings']['margin']==.02 and rec['dpo']['settings']['beta']==.1


def test_no_input_is_a_path(here):
    for s in STEPS:
        said = json.dumps(run().inputs(s), ensure_ascii=False)
        assert str(here) not in said and 'q.jsonl' not in said and '/tiny' not in said, s


def test_a_run_keeps_to_the_commit_it_began_with(here):
    r = run()
    assert r.pin('org/model', lambda n: n+'@1')=='org/model@1' and r.pin('tiny')=='tiny'
    r.save()
    assert run().pin('org/model', lambda n: n+'@2')=='org/model@1' and read_json('data/r/run.json')['commits']=={'org/model': 'org/model@1'}
    run().forget()
    assert run().pin('org/model', lambda n: n+'@2')=='org/model@2'


def test_a_data_set_of_the_hub_is_read_at_its_commit(here, monkeypatch):
    import datasets
    from selfalign import record
    asked = []
    def load_dataset(name, revision=None): asked.append((name, revision)); raise FileNotFoundError('offline')
    monkeypatch.setattr(record, 'dataset_revision', lambda n: 'abc123')
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    with pytest.raises(BadInput, match='org/data'): quietly(run(data='org/data').step, 'data')
    assert asked==[('org/data', 'abc123')]
