"""`eggroll.llm` as library users import it: its example runs, and nothing optional is needed to import it."""

import doctest
import subprocess
import sys

from eggroll import llm

OPTIONAL = ("jinja2", "safetensors", "tokenizers", "torch", "transformers", "matplotlib", "tyro", "eggroll.experiments")


def test_the_example_runs():
    failed, attempted = doctest.testmod(llm)
    assert failed == 0 < attempted


def test_it_is_imported_without_optional_packages():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    done = subprocess.run([sys.executable, "-c", f"{blocked}; from eggroll.llm import *"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
