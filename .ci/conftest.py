"The tests of a file that share a run go to one process; the notebooks of `test_nbs.py` are spread (pytest-xdist's own groups do not work with pytest 9.2)."
import shutil, signal

import pytest
from xdist.scheduler import LoadScopeScheduling

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell lets its background jobs ignore it, and so would the processes that a test interrupts


class OneRun(LoadScopeScheduling):
    def _split_scope(self, nodeid): return nodeid if 'test_nbs.py' in nodeid else nodeid.split('::')[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log): return OneRun(config, log)


@pytest.fixture
def browser():
    "Debian's Chromium, or another that is installed"
    chromium = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    if not chromium: pytest.skip('no Chromium on this machine')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()
