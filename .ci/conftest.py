"The tests of a file that share a run go to one process; the notebooks of `test_nbs.py` are spread (pytest-xdist's own groups do not work with pytest 9.2)."
import pytest
from xdist.scheduler import LoadScopeScheduling


class OneRun(LoadScopeScheduling):
    def _split_scope(self, nodeid): return nodeid if 'test_nbs.py' in nodeid else nodeid.split('::')[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log): return OneRun(config, log)
