"""Damaged files: bytes that a disk might give back, and JSON that somebody might write."""

import json
import random

# What stands in place of a value.
ODD = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), "",
    "a", "0", "../a", "\ud800", [], [0], [[]], [None], {}, {"a": 0}, "9" * 400,
)  # fmt: skip


def damaged(content, seed):
    """The bytes with a flip, a cut, other bytes, or parts that moved, were lost or doubled."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2)) if data else (0, 0)
        small = data[at : at + rng.randrange(1, 33)]
        match rng.randrange(8):
            case 0 | 1 | 2 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                del data[at:]
            case 4:
                data[at : at + len(small)] = rng.randbytes(len(small))
            case 5:
                data[at : at + len(small)] = bytes(len(small))
            case 6:
                del data[at : min(to, at + 64)]
            case _:
                data[to:to] = small
    return bytes(data)


def changed(value, seed):
    """A JSON value with one of its parts replaced, renamed, removed, doubled or negated."""
    rng = random.Random(seed)
    value = json.loads(json.dumps(value))
    parts = list(_parts(value))
    holder, key = rng.choice(parts)
    kind, old = rng.randrange(6), holder[key]
    if kind == 0 and isinstance(holder, dict):
        holder[rng.choice(["", "a", key + "x", key.upper() + "/"])] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, old)
    elif kind == 3 and isinstance(old, int | float):
        holder[key] = rng.choice([-old - 1, old + 1, float(old), str(old), bool(old), old * 10**6])
    elif kind == 4:
        other, name = rng.choice(parts)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else old))
    else:
        holder[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def _parts(value):
    """Every place in a value: what holds it, and its name or index there."""
    names = value if isinstance(value, dict) else range(len(value))
    for name in list(names):
        yield value, name
        if isinstance(value[name], dict | list) and value[name]:
            yield from _parts(value[name])
