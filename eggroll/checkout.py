"""In a checkout, `import zo` is `eggroll.zo`: the same module objects under the names of the top-level folders.

`eggroll/zo`, `eggroll/kernels`, `eggroll/envs` and `eggroll/experiments` are symbolic links to those folders. The wheel holds
the files themselves and installs nothing at the top level but `eggroll`, so it never collides with another `kernels` or `envs`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any


class _Aliases(MetaPathFinder, Loader):
    """Finds `zo.x` as `eggroll.zo.x`, for every package that `alias` was called with."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        real = importlib.util.find_spec(f"eggroll.{fullname}")
        if real is None:
            return None
        return ModuleSpec(fullname, self, origin=real.origin, is_package=real.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"eggroll.{spec.name}")
        spec.loader_state = module.__spec__  # the import system overwrites it
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state if module.__spec__ else None

    def get_code(self, fullname: str) -> CodeType | None:
        """Code to run as `__main__` (`python -m`)."""
        real = importlib.util.find_spec(f"eggroll.{fullname}")
        loader: Any = real.loader if real else None
        return loader.get_code(loader.name)


_aliases = _Aliases()


def alias(package: str) -> None:
    """Make `package`, which is being imported by the name of its folder, the module `eggroll.<package>`."""
    if _aliases not in sys.meta_path:
        sys.meta_path.insert(0, _aliases)
    _aliases.packages.add(package)
    sys.modules[package] = importlib.import_module(f"eggroll.{package}")
