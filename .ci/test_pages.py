"Pages stay readable, and the house keeps its two wings."
import ast, json, re
from pathlib import Path

import pages
import pytest

root = Path(__file__).resolve().parent.parent
nbs = sorted((root/'nbs').rglob('*.ipynb'))
on_top = 'run_commands', 'commands', 'cli', 'bench', 'bench_precision', 'bench_training', 'doctor', 'hours'  # of both wings
measured = {fn: pages.page(fn) for fn in nbs}


def imports(py):
    "`(wing, module)` of every module of the package that a module imports"
    for n in ast.walk(ast.parse(py.read_text(encoding='utf-8'))):
        if isinstance(n, ast.ImportFrom) and n.level:
            names = [n.module] if n.module and n.module!='machine' else [f'{n.module or ""}.{a.name}'.strip('.') for a in n.names]
            for m in names:
                here = 'machine.' if n.level==1 and py.parent.name=='machine' and not m.startswith('machine.') else ''
                yield from [tuple((here+m).split('.')[-2:]) if '.' in here+m else ('loop', m)]


def order(wing):
    "Module: its place in the reading order"
    return {re.sub(r'^\d+[a-z]*_', '', p.stem): i for i,p in enumerate(sorted((root/'nbs'/wing).glob('*.ipynb')))}


@pytest.mark.parametrize('fn', nbs, ids=lambda p: str(p.relative_to(root/'nbs')))
def test_page_keeps_its_limits(fn): assert not list(pages.faults(fn, measured[fn]))


@pytest.mark.parametrize('fn', [p for p in nbs if p.parent.name=='loop'], ids=lambda p: p.stem)
def test_a_page_of_the_loop_ends_with_three_exercises(fn):
    "Each a task and a solution, which is folded in the docs, in Jupyter and in Colab"
    cs = json.loads(fn.read_text(encoding='utf-8'))['cells']
    start = [i for i,c in enumerate(cs) if ''.join(c['source']).startswith('## Exercises')]
    assert len(start)==1
    ex = cs[start[0]:-1]
    assert [c['cell_type'] for c in ex]==['markdown', 'code']*3
    assert all(f'**{k}.** ' in ''.join(c['source']) for k,c in enumerate(ex[::2], 1))
    for c in ex[1::2]:
        assert ''.join(c['source']).startswith('#| code-fold: true\n#| code-summary: Solution\n')
        assert c['metadata']=={'cellView': 'form', 'jupyter': {'source_hidden': True}}
        assert not re.search(r'^(import|from) ', ''.join(c['source']), re.M)  # the docs would run the cell; imports are above


@pytest.mark.parametrize('fn', [p for p in nbs if p.parent.name in ('loop', 'machine')], ids=lambda p: p.stem)
def test_a_page_installs_the_package_in_colab_and_nowhere_else(fn):
    from nbdev.config import get_config
    cs = pages.cells(fn)
    title = next(i for i,(kind,_) in enumerate(cs) if kind=='markdown')
    assert [i for i,(_,s) in enumerate(cs) if 'google.colab' in s]==[title+1] and cs[title+1][1]==pages.in_colab(get_config().git_url)


@pytest.mark.parametrize('wing', ['loop', 'machine'])
def test_each_page_leads_to_the_next(wing):
    "Several pages led past the page after them, one back to the page before"
    in_order = [p for p in nbs if p.parent.name==wing]
    def said(fn): return [l for kind,s in pages.cells(fn) if kind=='markdown' for l in s.splitlines() if re.search('Next: |^The next page', l)]
    assert [a.stem for a,b in zip(in_order, in_order[1:]) if not any(f']({b.name})' in l for l in said(a))]==[]


def test_the_loop_explains_itself():
    t = pages.together([m for fn,m in measured.items() if fn.parent.name=='loop'])
    assert t['median']<=pages.loop['median'] and t['words']>=pages.loop['words'] and t['used']>=pages.loop['used'], t


def test_no_line_of_the_package_is_too_long():
    lines = [(p.name, l) for p in (root/'selfalign').rglob('*.py') if p.name!='_modidx.py'
             for l in p.read_text(encoding='utf-8').splitlines()]
    assert not [(f, l) for f,l in lines if len(l)>pages.most['width'] and not l.startswith('__all__')]  # nbdev's own line


def test_no_language_in_the_code():
    "Texts of a language stand in styles and language files"
    found = [f'{p.name}: {l}' for p in (root/'selfalign').rglob('*.py') for l in p.read_text(encoding='utf-8').splitlines()
             if re.search('[\u0400-\u04ff]', l)]
    assert not found, found


def test_the_machine_room_never_imports_the_loop():
    for p in sorted((root/'selfalign/machine').glob('*.py')):
        if p.stem in on_top or p.stem=='__init__': continue
        assert not [m for wing,m in imports(p) if wing!='machine'], p.name


@pytest.mark.parametrize('wing', ['loop', 'machine'])
def test_no_arrow_back(wing):
    "A page imports only pages before it"
    places = order(wing)
    folder = root/'selfalign'/('machine' if wing=='machine' else '')
    for p in sorted(folder.glob('*.py')):
        if p.stem not in places: continue
        late = [m for w,m in imports(p) if w==wing and places.get(m, -1)>=places[p.stem]]
        assert not late, (p.name, late)


def test_every_name_is_importable_from_its_page():
    "The short names that users rely on"
    import importlib
    for m in order('loop'):
        if (root/f'selfalign/{m}.py').exists(): importlib.import_module(f'selfalign.{m}')


@pytest.mark.parametrize('fn', ['09b_biases', '09c_begging'])
def test_slow_outputs_are_of_the_audit_of_today(fn):
    "Tests do not run slow cells, so their stored tables could be of a mix that the audit has not chosen any more"
    from selfalign.audit import find_audit
    cells = json.loads((root/f'nbs/loop/{fn}.ipynb').read_text(encoding='utf-8'))['cells']
    said, = [''.join(c['outputs'][0]['data']['text/plain']) for c in cells if 'which the audit chose' in ''.join(c['source']) and c['cell_type']=='code']
    assert ast.literal_eval(said)==find_audit('embedded')['mix']
