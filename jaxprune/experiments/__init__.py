"""The experiments behind scripts/: train, prune, rewind, compact and compare networks.

`config` has every option. `experiment` turns a configuration into data, network, optimizer and step
(from `sources`, `network`, `optimizer` and `pruning`); `train` runs it through its `stages` and
writes `results`. `studies` compares many runs, `ahead` compiles for devices that are not there, and
`command` holds what their command lines share. The library imports nothing of this.
"""

from importlib.util import find_spec

_NEEDED = ("matplotlib", "orbax", "rich", "sklearn", "tensorboardX", "tyro")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"`jaxprune.experiments` needs {', '.join(_missing)}; `pip install 'jaxprune[train]'` "
        "installs what is missing.",
        name=_missing[0],
    )
