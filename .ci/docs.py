"""Build the docs site without Quarto: `python .ci/docs.py [out]`.

nbdev turns nbs/ into _proc/ (hidden cells dropped, show_doc run, names linked), and smalldocs renders that with the
same nbs/_quarto.yml that Quarto reads. `nbdev_docs` builds the same site where Quarto is installed."""
import functools, json, os, re, shutil, subprocess, sys, tarfile, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.cli import main as smalldocs

katex, cdn = 'katex@0.16.11', 'https://cdn.jsdelivr.net/npm/katex@0.16.11/dist'
dunder = re.compile(r'^(#+ )(\S*__\S*?)\s*$', re.M)


def front(src):
    m = re.match(r'---\n(.*?)\n---', src, re.S)
    return yaml.safe_load(m.group(1)) if m else {}


def link_to(href, page, names):
    "Where a link of a page leads after renaming; `names`: old path below the root of the site to the new one"
    if ':' in href or href.startswith('/'): return href
    path, _, anchor = href.partition('#')
    old = os.path.normpath((page.parent/path).as_posix())
    new = names.get(old)
    return href if new is None else os.path.relpath(new, page.parent)+('#'+anchor if anchor else '')


def fix_md(s, page, names):
    "Links to `NN_name.ipynb` become links to `name.ipynb`; dunder names and names in a signature stay as they are; one link a name"
    s = re.sub(r'\[\[(`[^`]+`)\]\(([^)\s]+)\)\]\([^)\s]+\)', r'[\1](\2)', s)  # nbdev links a name within a link
    s = re.sub(r'```.*?```', lambda m: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]), s, flags=re.S)
    s = re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({link_to(m[1], page, names)})', s)
    return dunder.sub(lambda m: m[1]+m[2].replace('_', r'\_')+f' {{#{m[2].lower()}}}', s)


def fix_cell(c, page, names):
    "One cell of a staged page"
    src = ''.join(c['source'])
    if c['cell_type']=='raw': src = re.sub(r'^output-file:.*\n', '', src, flags=re.M)
    c['source'] = fix_md(src, page, names) if c['cell_type']=='markdown' else src
    for o in c.get('outputs', []):
        d = o.get('data', {})
        if 'text/markdown' in d: d['text/markdown'] = fix_md(''.join(d['text/markdown']), page, names)


def to_run(p, cfg):
    "A line with links to a page's notebook, to be run in Colab or downloaded"
    repo, at = re.sub('^https://github.com/', '', cfg.git_url), f'blob/{cfg.branch}/nbs/{p.as_posix()}'
    said = f'[Open in Colab](https://colab.research.google.com/github/{repo}/{at}) · [the notebook]({cfg.git_url}/{at})'
    return dict(cell_type='markdown', metadata={}, source=f'::: {{.to-run}}\n{said}\n:::')


def stage(proc, dest, cfg):
    "Copy `proc` to `dest`, naming each notebook after the page that nbdev's links point to (its `output-file`)"
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(proc, dest, ignore=shutil.ignore_patterns('_docs', '_site'))
    nbs = {p.relative_to(dest): json.loads(p.read_text()) for p in sorted(dest.rglob('*.ipynb'))}
    def called(p, nb): return p.with_name(Path(front(''.join(nb['cells'][0]['source'])).get('output-file', p.name)).stem+'.ipynb')
    names = {p.as_posix(): called(p, nb).as_posix() for p,nb in nbs.items()}
    for p,nb in nbs.items():
        for c in nb['cells']: fix_cell(c, p, names)
        if p.parent.name in ('loop', 'machine'): nb['cells'].insert(1, to_run(p, cfg))
        (dest/p).unlink()
        (dest/names[p.as_posix()]).write_text(json.dumps(nb))
    yml = (dest/'_quarto.yml').read_text()
    for a,b in names.items(): yml = re.sub(rf'(?<![\w/]){re.escape(a)}\b', b, yml)
    (dest/'_quarto.yml').write_text(yml)


def local_katex(out):
    "Serve KaTeX from the site itself, so maths needs no network"
    lib = out/'site_libs/katex'
    with tempfile.TemporaryDirectory() as td:
        tgz = subprocess.run(['npm', 'pack', '-s', katex], cwd=td, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(td)/tgz) as t: t.extractall(td, filter='data')
        dist = Path(td)/'package/dist'
        for f in [*dist.glob('fonts/*.woff2'), dist/'katex.min.css', dist/'katex.min.js', dist/'contrib/auto-render.min.js', dist.parent/'LICENSE']:
            d = lib/(f.relative_to(dist) if dist in f.parents else f.name)
            d.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, d)
    for p in out.rglob('*.html'): p.write_text(p.read_text().replace(cdn, '../'*(len(p.relative_to(out).parts)-1)+'site_libs/katex'))
    for p in out.rglob('*.css'): p.write_text(re.sub(r'@import url\(https?://fonts[^)]*\);?', '', p.read_text()))


class Tags(HTMLParser):
    "Ids, links and pictures of a page"
    def __init__(self): super().__init__(); self.ids, self.links, self.pictures = set(), [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag=='img': self.pictures.append(a)


def tags(p):
    t = Tags()
    t.feed(p.read_text())
    return t


def leads(page, href, out):
    "The file and the anchor of a link within the site; None for one that leaves it"
    if re.match(r'[a-z]+:', href): return None
    path, _, anchor = href.partition('#')
    f = (out/unquote(path).lstrip('/') if path.startswith('/') else page.parent/unquote(path)).resolve() if path else page
    return (f/'index.html' if f.is_dir() else f), unquote(anchor)


def drop_anchors(out):
    "nbdev links every name to an anchor; a private name has none, so its link leads to the page"
    known = {p.resolve(): tags(p).ids for p in out.rglob('*.html')}
    def kept(m, page):
        to = leads(page, m[1]+'#'+m[2], out.resolve())
        return m[0] if not to or to[0] not in known or to[1] in known[to[0]] else f'href="{m[1]}"'
    for p in known: p.write_text(re.sub(r'href="([^"#]+)#([^"]+)"', functools.partial(kept, page=p), p.read_text()))


def short_cells(out):
    "Short cells of tables, such as `58 (45-70)`, stay on one line: a table that is too wide scrolls by itself"
    short = functools.partial(re.sub, r'<td>([^<]{1,24})</td>', r'<td class="text-nowrap">\1</td>')
    for p in out.rglob('*.html'): p.write_text(short(p.read_text()))


def llms(proc, out, cfg):
    "llms.txt: what the project is, and a line for each page, for programs that read the site (llmstxt.org)"
    yml = yaml.safe_load((proc/'_quarto.yml').read_text())['website']['sidebar']['contents']
    def line(nb):
        said = ''.join(json.loads((proc/nb).read_text())['cells'][0]['source'])
        fm = front(said)
        page = Path(fm.get('output-file', Path(nb).stem+'.html')).stem
        return f'- [{fm["title"]}]({(Path(nb).parent/page).as_posix()}.html): {fm.get("description", "")}'
    head, parts = line('index.ipynb'), []
    for p in yml:
        if isinstance(p, str): parts.append(line(p))
        else: parts += ['', f'## {p["section"]}', '', *map(line, p['contents']), '']
    (out/'llms.txt').write_text('\n'.join([f'# {cfg.title}', '', f'> {head.partition(": ")[2]}', '', *parts]).rstrip()+'\n')


def found(out, pattern, kinds):
    "Every match of `pattern` in the site's files, with its page"
    return [f'{p.name}: {m}' for k in kinds for p in out.rglob(k) for m in re.findall(pattern, p.read_text())]


if __name__=='__main__':
    cfg = get_config()
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=2, force=True)
    st = cfg.config_path/'_proc_smalldocs'
    stage(proc, st, cfg)
    if smalldocs(['check', str(st)]) or smalldocs(['render', '--strict', '-q', str(st)]): sys.exit(1)
    out = cfg.config_path/(sys.argv[1] if len(sys.argv)>1 else cfg.doc_path.name)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(st/cfg.doc_path.name, out)
    local_katex(out)
    drop_anchors(out)
    short_cells(out)
    llms(Path(proc), out, cfg)
    if left := found(out, r'https://(?:cdn|fonts)[^"\')]*', ['*.html', '*.css']): sys.exit('pages need the network: '+', '.join(left))
    if refs := found(out, r'(?<![\w.])@(?:fig|tbl|sec|eq|lst)-[\w-]+', ['*.html']): sys.exit('cross-references that only Quarto resolves (link to the #id instead): '+', '.join(refs))
    print(f'{len(list(out.rglob("*.html")))} pages in {out.name}')
