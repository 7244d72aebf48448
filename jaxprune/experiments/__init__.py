"""The experiments behind scripts/: train, prune, rewind, compact and compare networks.

`config` has every option. `experiment` turns a configuration into data, network, optimizer and step
(from `sources`, `network`, `optimizer` and `pruning`); `train` runs it through its `stages` and
writes `results`. `studies` compares many runs, `ahead` compiles for devices that are not there, and
`command` holds what their command lines share. The library imports nothing of this.
"""
