"""Modules that are imported when they are first used."""

import subprocess
import sys

import pytest

from eggroll.envs.suites.deferred import deferred

NAMES = ("wsgiref", "wsgiref.util", "no_such_module")  # of the standard library; nothing else imports them


@pytest.fixture
def not_imported(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("wsgiref")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("not_imported")
def test_a_module_is_imported_when_a_name_of_it_is_used():
    with deferred(*NAMES):
        import wsgiref.util as used
        from wsgiref import util

        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            import no_such_module  # noqa: F401
    assert used is util and not any(name.startswith("wsgiref") for name in sys.modules)
    assert used.guess_scheme({}) == "http" and sys.modules["wsgiref.util"].guess_scheme is used.guess_scheme


@pytest.mark.usefixtures("not_imported")
def test_other_submodules_and_uses_within_the_context_work():
    with deferred(*NAMES):
        import wsgiref.headers
        import wsgiref.util as used

        assert used.guess_scheme({}) == "http" and wsgiref.headers.Headers().items() == []
    assert sys.modules["wsgiref.util"].guess_scheme is used.guess_scheme


@pytest.mark.slow
def test_gymnax_imports_neither_seaborn_nor_matplotlib():
    unused = {"matplotlib", "pandas", "seaborn"}
    code = f"import sys; from eggroll import envs; envs.make('CartPole-v1'); print(*{unused} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
