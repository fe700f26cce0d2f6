"""On PYTHONPATH, Python is as where torch is not installed; `transformers` imports it if it is."""

from importlib.machinery import PathFinder

_find = PathFinder.find_spec


def _find_other(name, path=None, target=None):
    return None if name == "torch" else _find(name, path, target)


PathFinder.find_spec = _find_other
