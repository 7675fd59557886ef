"The tests of `test_run.py` share one run: they go to one process, everything else is spread (pytest-xdist's own groups do not work with pytest 9.2)."
import pytest
from xdist.scheduler import LoadScopeScheduling


class OneRun(LoadScopeScheduling):
    def _split_scope(self, nodeid): return 'run' if 'test_run.py' in nodeid else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log): return OneRun(config, log)
