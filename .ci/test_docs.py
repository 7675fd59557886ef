"The built site (`make docs`): no dead link, every picture described; in a browser: nothing fetched elsewhere, nothing cut at 400 px, the search finds a function, day and night."
import functools, re, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from docs import leads, tags

out = Path(__file__).resolve().parent.parent/'_docs'
pytestmark = pytest.mark.skipif(not (out/'index.html').exists(), reason='the docs are not built: make docs')


@pytest.fixture(scope='module')
def pages(): return {p.resolve(): tags(p) for p in sorted(out.rglob('*.html'))}


def test_every_link_leads_somewhere(pages):
    dead = []
    for p,t in pages.items():
        for href in t.links:
            to = leads(p, href, out.resolve())
            if to and (not to[0].exists() or (to[1] and to[0] in pages and to[1] not in pages[to[0]].ids)): dead.append((p.name, href))
    assert len(pages)>60 and dead==[]


def test_no_link_stands_within_a_link(pages):
    "nbdev links the name of a function; where it is a link already, the outer one was left as text"
    assert [p.name for p in pages if re.search(r'</a>\]\(', p.read_text(encoding='utf-8'))]==[]


def test_every_picture_is_described(pages): assert [(p.name, a.get('src', '')[:40]) for p,t in pages.items() for a in t.pictures if not a.get('alt')]==[]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *a): pass


@pytest.fixture(scope='module')
def site():
    s = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=out))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()


def watched(browser, site, **kw):
    "A tab, and what goes wrong in it"
    tab, wrong = browser.new_page(**kw), []
    tab.on('request', lambda r: wrong.append(('elsewhere', r.url)) if not r.url.startswith((site, 'data:', 'blob:')) else None)
    tab.on('response', lambda r: wrong.append((r.status, r.url)) if r.status>=400 and 'favicon' not in r.url else None)
    tab.on('pageerror', lambda e: wrong.append(('script', str(e))))
    return tab, wrong


def test_every_page_opens_without_a_fault_and_fits_a_telephone(browser, site, pages):
    tab, wrong = watched(browser, site, viewport=dict(width=400, height=800))
    wide = []
    for p in pages:
        tab.goto(f'{site}/{p.relative_to(out.resolve()).as_posix()}')
        if (w := tab.evaluate('document.documentElement.scrollWidth'))>400: wide.append((p.name, w))
    tab.close()
    assert wrong==[] and wide==[]


@pytest.mark.parametrize('width', [1000, 1200, 1440])
def test_code_and_tables_have_room(browser, site, width):
    "The text had 364 px of 1000 and 760 of 1440, and intervals were broken at their dash"
    tab, wrong = watched(browser, site, viewport=dict(width=width, height=800))
    tab.goto(f'{site}/loop/results.html')
    room = tab.evaluate('document.querySelector("main").clientWidth')
    lines = 'd => { const r = document.createRange(); r.selectNodeContents(d); return r.getClientRects().length }'
    tall = tab.evaluate(f'[...document.querySelectorAll("td.text-nowrap")].filter(d => ({lines})(d)>1).map(d => d.textContent)')
    many = tab.evaluate('document.querySelectorAll("td.text-nowrap").length')
    tab.close()
    assert wrong==[] and room>.55*width and many>50 and tall==[]


def test_the_search_finds_a_function(browser, site):
    tab, wrong = watched(browser, site, viewport=dict(width=1200, height=800))
    tab.goto(f'{site}/index.html')
    tab.locator('input[type=search]').first.fill('load_instructions')
    tab.wait_for_selector('.smalldocs-search-results a >> text=/instructions/i')
    tab.locator('.smalldocs-search-results a').first.click()
    tab.wait_for_url('**/instructions.html*')
    tab.close()
    assert wrong==[]


def test_it_is_dark_at_night(browser, site):
    def lightness(scheme):
        tab, wrong = watched(browser, site, color_scheme=scheme)
        tab.goto(f'{site}/loop/pairs.html')
        c = tab.evaluate('[document.body, document.querySelector("main pre"), document.querySelector("main p")].map((e, i) => getComputedStyle(e)[i==2 ? "color" : "backgroundColor"])')
        tab.close()
        assert wrong==[]
        return c
    day, night = lightness('light'), lightness('dark')
    def sum_of(c): return sum(map(float, c[c.index('(')+1:-1].split(',')[:3]))
    assert sum_of(day[0])>600>300>sum_of(night[0]) and sum_of(day[2])<400<sum_of(night[2])
