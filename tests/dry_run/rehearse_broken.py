"""Rehearses a run in which one line of one file reads otherwise.

python rehearse_broken.py FILE OLD NEW [flags]
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path

from megatron_pdmd.planning import fake_cuda


class Breaking(MetaPathFinder, SourceFileLoader):
    """Finds one module, and replaces a text in its source."""

    def __init__(self, path: Path, module: str, old: str, new: str):
        SourceFileLoader.__init__(self, module, str(path))
        self._old, self._new = old, new

    def find_spec(self, name, folders, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, name):
        source = self.get_source(name)
        assert source.count(self._old) == 1, f"{self._old!r} stands {source.count(self._old)} times in {self.path}"
        return compile(source.replace(self._old, self._new), self.path, "exec")


def main() -> int:
    file, old, new, *flags = sys.argv[1:]
    module = file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, Breaking(Path(file).resolve(), module, old, new))
    fake_cuda.install()
    from megatron_pdmd.dry_run import rehearsal

    return rehearsal.main(flags)


if __name__ == "__main__":
    sys.exit(main())
