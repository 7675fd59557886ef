"""The limits a page keeps, so that it can be read: `python .ci/pages.py [nbs/loop/06_judge.ipynb ...]` (all pages unless named).

Code lines are counted without blank lines, comments, directives, the folded solutions of exercises and the
cell for Colab; words are those of the prose cells."""
import ast, hashlib, json, re, statistics, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
most = dict(width=120, page=400, function=45, cell=60)
loop = dict(median=4, words=3.5, used=.70)
directive = re.compile(r'^\s*#\|')
solution = re.compile(r'^#\| code-summary: Solution$', re.M)
export = re.compile(r'^\s*#\|\s*exports?\b', re.M)


def in_colab(url):
    "The cell that installs the package in Colab, after the title of a page; `python .ci/pages.py --colab` writes it into all of them"
    return ("#| hide\n#| eval: false\n# in Colab: the package and the embedded model\nif 'google.colab' in str(get_ipython()):\n"
            f"    get_ipython().system('pip install -q \"selfalign[embedded] @ git+{url}\"')")


def write_colab(fn, url):
    "Put that cell after the title, in the place of an older one"
    from execnb.nbio import mk_cell, read_nb, write_nb
    nb, cell = read_nb(fn), mk_cell(in_colab(url), cell_type='code')
    at = next(i for i,c in enumerate(nb.cells) if c.cell_type=='markdown')+1
    nb.cells = nb.cells[:at]+[c for c in nb.cells[at:] if 'google.colab' not in c.source]
    cell['id'] = hashlib.sha1(str(fn.relative_to(root)).encode()).hexdigest()[:8]
    nb.cells.insert(at, cell)
    write_nb(nb, fn)


def cells(fn):
    "`(kind, source)` of each cell"
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(Path(fn).read_text(encoding='utf-8'))['cells']]


def code_lines(src): return [l for l in src.splitlines() if l.strip() and not l.strip().startswith('#')]


def tree(src):
    "The syntax tree of a cell; None where IPython's own syntax stands in it"
    try: return ast.parse(src)
    except SyntaxError: return None


def functions(src):
    "`(name, lines)` of every function in a cell"
    t = tree(src)
    return [(n.name, n.end_lineno-n.lineno+1) for n in ast.walk(t)
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))] if t else []


def exported(src):
    "Public functions and classes that a cell adds to the package"
    t = tree(src) if export.search(src) else None
    return [n.name for n in t.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not n.name.startswith('_')] if t else []


def page(fn):
    "What is measured of a page"
    cs = cells(fn)
    codes = [s for k,s in cs if k=='code' and 'google.colab' not in s]
    sizes = [len(code_lines(s)) for s in codes]
    names = [(n, codes[i+1] if i+1<len(codes) else '') for i,s in enumerate(codes) for n in exported(s)]
    folded = sum(n for n,s in zip(sizes, codes) if solution.search(s))
    return dict(page=sum(sizes)-folded, cell=max(sizes, default=0), sizes=[n for n in sizes if n],
                words=sum(len(s.split()) for k,s in cs if k=='markdown'),
                function=max((f for s in codes for f in functions(s)), key=lambda f: f[1], default=('', 0)),
                wide=[l for s in codes for l in s.splitlines() if len(l)>most['width']],
                names=len(names), used=[n for n,after in names if re.search(rf'\b{re.escape(n)}\b', after)],
                unused=[n for n,after in names if not re.search(rf'\b{re.escape(n)}\b', after)])


def faults(fn, m):
    "What is too large on a page"
    if m['page']>most['page']: yield f'{m["page"]} lines of code, at most {most["page"]}'
    if m['cell']>most['cell']: yield f'a cell of {m["cell"]} lines of code, at most {most["cell"]}'
    if m['function'][1]>most['function']: yield f'{m["function"][0]} has {m["function"][1]} lines, at most {most["function"]}'
    if m['wide']: yield f'{len(m["wide"])} lines over {most["width"]} characters, such as {m["wide"][0][:50]!r}'


def together(ms):
    "Median cell, words a line of code, share of exported names used in the next cell, over several pages"
    sizes = [n for m in ms for n in m['sizes']]
    names = sum(m['names'] for m in ms)
    return dict(median=statistics.median(sizes or [0]), words=sum(m['words'] for m in ms)/max(1, sum(m['page'] for m in ms)),
                used=sum(len(m['used']) for m in ms)/max(1, names))


def main(args):
    "Print the measures; exit code 1 if a limit is broken"
    if args==['--colab']:
        from nbdev.config import get_config
        for fn in [*(root/'nbs/loop').glob('*.ipynb'), *(root/'nbs/machine').glob('*.ipynb')]: write_colab(fn, get_config().git_url)
        return 0
    pages = [Path(a) for a in args] or sorted((root/'nbs').rglob('*.ipynb'))
    ms = {fn: page(fn) for fn in pages}
    bad = 0
    for fn,m in ms.items():
        t, fs = together([m]), list(faults(fn, m))
        bad += len(fs)
        print(f'{fn.stem:<18} {m["page"]:4} lines  median {t["median"]:<4} {t["words"]:5.1f} words/line  used next {len(m["used"])}/{m["names"]}'
              +(f'  not used next: {", ".join(m["unused"])}' if args and m['unused'] else '')+''.join(f'\n    {f}' for f in fs))
    inside = [m for fn,m in ms.items() if fn.resolve().parent.name=='loop']
    if inside and not args:
        t = together(inside)
        print(f'the loop: median {t["median"]}, {t["words"]:.2f} words a line of code, {t["used"]:.0%} of the names used in the next cell')
        bad += t['median']>loop['median'] or t['words']<loop['words'] or t['used']<loop['used']
    return int(bool(bad))


if __name__=='__main__': sys.exit(main(sys.argv[1:]))
