"""Faults of the rules of compaction: each breaks one of them, and a test has to notice."""

import importlib
import inspect
import pkgutil
import textwrap
from typing import NamedTuple

from jaxprune import structure


class Fault(NamedTuple):
    """A different text for a part of a function, or of a string, of `jaxprune.structure`."""

    place: str  # module.function, module.Class.method or module.name of a string; rules too
    old: str
    new: str
    focus: tuple = ()  # operations of random programs that make it likely to show
    seen: tuple = ()  # a program that has shown it: seed and steps
    case: str = ""  # or the test of structure/test_operations.py that shows it


def modules():
    found = pkgutil.walk_packages(structure.__path__, f"{structure.__name__}.")
    return [importlib.import_module(module.name) for module in found]


def install(monkeypatch, fault):
    """Puts the fault in place of the rule, wherever the rule is known."""
    module, *names = fault.place.split(".")
    module = next(own for own in modules() if own.__name__.endswith(f".{module}"))
    owner = module if len(names) == 1 else getattr(module, names[0])
    original = getattr(owner, names[-1])
    source = original if isinstance(original, str) else textwrap.dedent(inspect.getsource(original))
    assert source.count(fault.old) == 1, f"{fault.place} has changed: adapt this fault to it"
    source = source.replace(fault.old, fault.new)
    if isinstance(original, str):
        monkeypatch.setattr(owner, names[-1], source)
        return
    made = {}
    exec(compile(source, f"<fault in {fault.place}>", "exec"), module.__dict__, made)
    faulty = made[names[-1]]
    if owner is not module:
        monkeypatch.setattr(owner, names[-1], faulty)
        return
    for other in modules():
        for name, value in list(vars(other).items()):
            if value is original:
                monkeypatch.setattr(other, name, faulty)
    analysis = importlib.import_module(f"{structure.__name__}._analysis")
    for name, rule in list(analysis.RULES.items()):
        if original in rule:
            changed = [faulty if own is original else own for own in rule]
            monkeypatch.setitem(analysis.RULES, name, type(rule)(*changed))


FAULTS = {
    # ---- entry by entry
    "exp keeps zeros": Fault(
        "elementwise._zeros",
        "in _FIRST:",
        "in {*_FIRST, 'exp'}:",
        ("unary", "exp"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "logistic keeps zeros": Fault(
        "elementwise._zeros",
        "in _FIRST:",
        "in {*_FIRST, 'logistic'}:",
        ("unary", "sigmoid"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "cos keeps zeros": Fault(
        "elementwise._zeros",
        "in _FIRST:",
        "in {*_FIRST, 'cos'}:",
        ("unary", "cos"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "comparisons keep zeros": Fault(
        "elementwise._zeros",
        "in _FIRST:",
        "in {*_FIRST, 'lt', 'gt', 'eq'}:",
        ("unary", "mask of two", "equal", "not"),
        seen=(14, (0, 1, 2, 3)),
    ),
    "a sum is 0 if one term is": Fault(
        "elementwise._zeros",
        "if name in _ALL:\n        return functools.reduce(np.bitwise_and, facts)",
        "if name in _ALL:\n        return functools.reduce(np.bitwise_or, facts)",
        ("binary", "residual"),
        seen=(2, (0, 2)),
    ),
    "a maximum with any number keeps zeros": Fault(
        "elementwise._zeros",
        "sign * number <= 0",
        "True",
        ("unary", "max of more", "min of less"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "clamp keeps zeros": Fault(
        "elementwise._zeros",
        "low <= 0 <= high",
        "True",
        ("unary", "clamp above", "clamp below"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "a quotient is always 0": Fault(
        "elementwise._zeros",
        "return facts[0] & ~facts[1]",
        "return every",
        ("unary", "inverse"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "select looks at one case": Fault(
        "elementwise._zeros",
        "facts[1:])",
        "facts[1:2])",
        ("unary", "where less"),
        seen=(3, (0, 1, 2, 3, 4)),
    ),
    "operands are not united": Fault(
        "elementwise._analyze",
        "analysis.unite(first, value.nodes[dimension])",
        "pass",
        ("residual",),
        seen=(0, (1,)),
    ),
    "everything is alike": Fault(
        "elementwise._analyze",
        "functools.reduce(np.bitwise_and, facts) & ALWAYS_SAME",
        "ALWAYS_SAME",
        ("numbers", "norm"),
        seen=(6, (0, 1, 2, 3)),
    ),
    "what is spread is 0": Fault(
        "elementwise._facts",
        "return np.full(size, ALWAYS_SAME, np.uint8)",
        "return np.full(size, ALWAYS_ZERO, np.uint8)",
        ("binary", "normalized"),
        seen=(14, (0, 1, 2, 3)),
    ),
    # ---- places
    "a spread dimension is another one": Fault(
        "shapes._broadcast",
        "out.nodes.append(value.nodes[at])",
        "out.nodes.append(_new(analysis, size))",
        seen=(3, (1,)),
    ),
    "a new dimension is 0": Fault(
        "shapes._broadcast",
        "np.full(size, ALWAYS_SAME, np.uint8)",
        "np.full(size, ALWAYS_ZERO, np.uint8)",
        ("numbers", "expand"),
        seen=(37, (0, 1, 2)),
    ),
    "transposed facts": Fault(
        "shapes._pick_into",
        "value.facts[dimension] for dimension in dimensions",
        "value.facts[dimension] for dimension in sorted(dimensions)",
        ("transpose",),
        seen=(0, (1,)),
    ),
    "a flip flips nothing": Fault(
        "shapes._reverse",
        "value.nodes[dimension][::-1]",
        "value.nodes[dimension]",
        ("flip",),
        seen=(19, (0, 1, 2, 3)),
    ),
    "a flip flips no facts": Fault(
        "shapes._reverse",
        "value.facts[dimension][::-1]",
        "value.facts[dimension]",
        case="test_two_widths_in_one",
    ),
    "a split unites nothing": Fault(
        "shapes._split",
        "analysis.unite(np.repeat(first, rows.shape[1] - 1), rows[:, 1:].reshape(-1))",
        "pass",
        ("split", "reshape", "heads"),
        seen=(0, (0,)),
    ),
    "facts of a split are those of one": Fault(
        "shapes._split",
        "np.bitwise_and.reduce(row_facts, axis=1)",
        "row_facts[:, 0]",
        case="test_two_widths_in_one",
    ),
    "a merge leaves both free": Fault(
        "shapes._merge",
        """analysis.freeze(loser, f"merged with another free dimension by `reshape` {op.where}")""",
        "pass",
        ("merge", "outer", "linear_to_two"),
        seen=(3, (1, 2, 4)),
    ),
    "facts of a merge are the inner ones": Fault(
        "shapes._merge",
        "np.where(fixed, np.broadcast_to(facts[:, None], shape), inner_facts[None])",
        "np.broadcast_to(inner_facts[None], shape)",
        case="test_two_widths_in_one",
    ),
    "concatenation in another order": Fault(
        "shapes._concatenate",
        "np.concatenate([value.nodes[axis] for value in op.ins])",
        "np.concatenate([value.nodes[axis] for value in op.ins[::-1]])",
        ("concatenate", "roll"),
        seen=(10, (0, 1)),
    ),
    "concatenated facts are those of the first": Fault(
        "shapes._concatenate",
        "functools.reduce(np.bitwise_and, facts)",
        "facts[0]",
        ("concatenate",),
        seen=(2, (0, 1, 2, 3)),
    ),
    "concatenation unites nothing": Fault(
        "shapes._concatenate",
        "analysis.unite(first, value.nodes[dimension])",
        "pass",
        ("concatenate",),
        seen=(1, (0, 1, 2)),
    ),
    "a stack unites nothing": Fault(
        "shapes._stack",
        "analysis.unite(first, value.nodes[dimension])",
        "pass",
        ("stack", "two_widths"),
        seen=(0, (1,)),
    ),
    "stacked facts are those of the first": Fault(
        "shapes._stack",
        "functools.reduce(np.bitwise_and, facts)",
        "facts[0]",
        ("stack", "two_widths"),
        seen=(2, (0, 1, 2, 3)),
    ),
    "padding is always 0": Fault(
        "shapes._pad", "if op.ins[1].number == 0", "if True", ("pad",), seen=(11, (0, 2, 3, 4))
    ),
    "padding of one dimension leaves others 0": Fault(
        "shapes._pad",
        "if filler == NOTHING and any(",
        "if False and any(",
        ("pad",),
        seen=(19, (0, 1, 2, 3)),
    ),
    "padding inside is free": Fault(
        "shapes._pad", "(between or low < 0", "(low < 0", ("pad",), seen=(2, (3,))
    ),
    "a tile repeats each": Fault(
        "shapes._tile",
        "np.tile(value.nodes[dimension], times)",
        "np.repeat(value.nodes[dimension], times)",
        ("repeat",),
    ),
    "a slice forgets its start": Fault(
        "shapes._slice",
        "value.nodes[dimension][slice(*ends)]\n        out.facts",
        "value.nodes[dimension][: out.shape[dimension]]\n        out.facts",
        ("slices", "evens"),
    ),
    "a slice takes the first that are left": Fault(
        "shapes._run_slice",
        "(np.cumsum(kept) - 1)[wanted[kept[wanted]]]",
        "np.arange(kept[wanted].sum())",
        ("slices", "evens", "halves"),
    ),
    "a split axis starts over": Fault(
        "shapes._split_axis", "start += size", "pass", ("halves", "heads")
    ),
    "positions are counted anew": Fault(
        "shapes._run_made",
        "[run.take(run.bind(op, arrays)[0], op.outs[0])]",
        "[op.primitive.bind(*arrays, **op.params | {'shape': run.shape(op.outs[0])})]",
        ("numbers", "dropout", "place_mask"),
    ),
    # ---- products
    "a contraction needs nothing": Fault(
        "products._contract",
        "analysis.need(a.nodes[at], a.facts[at] | b.facts[bt], ZERO, reason)",
        "pass",
        ("product", "attention"),
    ),
    "a contraction unites nothing": Fault(
        "products._contract", "analysis.unite(a.nodes[at], b.nodes[bt])", "pass"
    ),
    "what is batched is 0": Fault(
        "products._multiply",
        "zero_only(a.facts[at] | b.facts[bt])",
        "zero_only(a.facts[at] | 255)",
        ("product", "linear_per_group"),
    ),
    "batches are not united": Fault(
        "products._multiply", "analysis.unite(a.nodes[at], b.nodes[bt])", "pass", ("product",)
    ),
    "a grouped convolution unites nothing": Fault(
        "products._convolution", "analysis.unite(ins[:, 0], column)", "pass", ("convolution",)
    ),
    "a group is 0 if one input is": Fault(
        "products._convolution",
        "np.bitwise_and.reduce(zeros, axis=1)",
        "np.bitwise_or.reduce(zeros, axis=1)",
        case="test_two_widths_in_one",
    ),
    "space of a convolution is free": Fault(
        "products._convolution",
        'analysis.freeze(value.nodes[dimension], f"a convolution slides over it {op.where}")',
        "pass",
        ("convolution",),
    ),
    "inputs of a grouped convolution are free": Fault(
        "products._convolution",
        'analysis.freeze(kernel.nodes[kernel_in], f"inputs of a grouped convolution {op.where}")',
        "pass",
        ("convolution",),
    ),
    "nothing consumes": Fault(
        "products._consume",
        "analysis.consumers |=",
        "ignored =",
        case="test_what_produces_and_what_consumes",
    ),
    # ---- sums
    "a sum needs nothing": Fault(
        "reductions._reduce_one",
        'analysis.need(nodes, facts, SAME, f"{reason}, and pruned entries would differ")',
        "pass",
        ("reduction", "numbers"),
    ),
    "two sums at once": Fault(
        "reductions._reduce_one",
        "free.any() and corrected is None",
        "free.any()",
        ("linear_to_two", "exp", "unary", "reduction"),
    ),
    "a common value is counted once": Fault(
        "reductions._completed",
        "gone = gone * jnp.asarray(removed, gone.dtype)",
        "pass",
        ("reduction", "norm"),
    ),
    "a maximum forgets the common value": Fault(
        "reductions._completed",
        'if not removed or (name == "reduce_sum" and run.is_zero(value, axis)):',
        "if not removed or run.is_zero(value, axis):",
        ("reduction",),
    ),
    "ties share as if one was removed": Fault(
        "reductions._completed",
        "gone = jnp.repeat(gone, removed, axis) if alike else gone",
        "pass",
        case="test_what_is_removed_shares_in_ties",
    ),
    "a product is a sum": Fault(
        "reductions._reduce_one",
        "if name not in _SUMMARIES:",
        "if False:",
        ("reduction", "product", "any above", "all above"),
    ),
    "an order is free": Fault(
        "reductions._along",
        'analysis.freeze(other.nodes[axis], f"`{op.name}` along it {op.where}")',
        "pass",
        ("order",),
    ),
    "a window is free": Fault("reductions._window", "if alone:", "if True:", ("pool",)),
    # ---- look-ups
    "a look-up is free": Fault(
        "indexing._gather",
        'analysis.freeze(value.nodes[dimension], f"`gather` looks up in it {op.where}")',
        "pass",
        ("look_up", "embedding"),
    ),
    "indices are free": Fault(
        "indexing._gather",
        'analysis.freeze(nodes, f"indices of `gather` {op.where}")',
        "pass",
        ("look_up", "embedding"),
    ),
    "a computed slice is free": Fault(
        "indexing._dynamic_slice",
        'analysis.freeze(value.nodes[dimension], f"`dynamic_slice` along it {op.where}")',
        "out.nodes[dimension] = value.nodes[dimension][:size]",
        ("dynamic",),
    ),
    "what is scattered is 0 where the array is": Fault(
        "indexing._scatter",
        "value.facts[dimension] & updates.facts[own]",
        "value.facts[dimension]",
        ("scatter", "cache"),
    ),
    "a scatter is free": Fault(
        "indexing._scatter",
        "            analysis.freeze(value.nodes[dimension], reason)",
        "            out.nodes[dimension] = value.nodes[dimension]",
        ("scatter",),
    ),
    # ---- functions
    "a loop is followed once": Fault(
        "control.loop", "if settled:", "if True:", ("scan_chain", "scan_rows", "loop")
    ),
    "a loop keeps the facts of its start": Fault(
        "control.loop",
        "[a & zero_only(b) for a, b in zip(own, out.facts, strict=True)]",
        "own",
        ("scan_chain", "scan_rows", "loop"),
    ),
    "a carry is not united": Fault(
        "control.loop", "_unite_all(analysis, value, out)", "pass", ("scan_rows", "loop")
    ),
    "rows of a scan are free": Fault(
        "scans._scan",
        'analysis.freeze(value.nodes[0], f"`scan` runs over it {op.where}")',
        "pass",
        ("scan_rows",),
    ),
    "one branch counts": Fault(
        "control._cond",
        "for other in inner[1:]:",
        "for other in inner[:0]:",
        ("branch", "branch_of_two"),
    ),
    "facts of one branch count": Fault(
        "control._cond",
        "out.facts = [a & zero_only(b) for a, b in zip(out.facts, other.facts, strict=True)]",
        "pass",
        ("branch", "branch_of_two"),
    ),
    "a rule moves only what is not 0": Fault(
        "control._custom_jvp",
        "own & zero_only(moving) for",
        "own for",
        case="test_straight_through_gates",
    ),
    "a backward rule moves only what is not 0": Fault(
        "control._custom_vjp",
        "_trust(analysis, op, pairs)",
        "pass",
        case="test_straight_through_gates",
    ),
    # ---- the analysis
    "what is needed does not freeze": Fault(
        "_analysis.Analysis.need",
        "self.freeze(nodes[bad], reason)",
        "pass",
        ("product", "reduction", "numbers"),
    ),
    "every group is exact": Fault(
        "_analysis.Analysis.need",
        "self.inexact.append((nodes[unless], reason))",
        "pass",
        ("unary",),
    ),
    "every group has gates": Fault(
        "_analysis.Analysis.need", "self.ungated.append(", "str(", ("scale_and_shift",)
    ),
    "a product rests on any factor": Fault(
        "_analysis.Analysis._support",
        "if self._makes_zero(value, out)]",
        "]",
        ("scale_and_shift",),
    ),
    "a sum rests on one operand": Fault(
        "_analysis.Analysis._support",
        "return frozenset().union(*[value.support for value in op.ins])",
        "return op.ins[0].support",
        ("scale_and_shift",),
    ),
    "what is unknown is free": Fault(
        "_analysis.Analysis._follow",
        'self.freeze_all(op, f"primitive `{op.name}` is not understood")',
        "for out in op.outs:\n            value = op.ins[-1]\n"
        "            out.like(value) if out.shape == value.shape else self.fix(out)",
        ("order", "scatter", "loop"),
    ),
    "one column may go": Fault(
        "_analysis.Analysis._follow",
        "if size == 1:",
        "if False:",
        ("slices", "expand", "concatenate"),
    ),
    "state is 0 where it is removed": Fault(
        "_analysis.Analysis.leaf",
        "facts = NOTHING\n",
        "facts = ALWAYS_ZERO\n",
        ("running_statistics",),
    ),
    "data is free": Fault(
        "_analysis.Analysis.data",
        "self.fix(value)",
        "self.fix(value)\n    value.nodes = [self.nodes.new(n) for n in value.shape]",
        (),
    ),
    "what consumes is 0 without being masked": Fault(
        "_analysis.Analysis.leaf", "facts = ZERO | SAME", "facts = ALWAYS_ZERO", ("unary",)
    ),
    # ---- traces and groups
    "outputs are free": Fault(
        "_traces.analyze", 'analysis.freeze(nodes, "an output has it")', "pass"
    ),
    "updates are not united": Fault(
        "_traces.analyze", "analysis.unite(nodes, own)", "pass", ("running_statistics", "cache")
    ),
    "caches stay 0": Fault(
        "_traces.broken_caches", "if path in model.caches", "if False", ("cache",)
    ),
    "only the first trace counts": Fault(
        "_joining._join_nodes", "for analysis in analyses:", "for analysis in analyses[:1]:", ()
    ),
    "inexact in the first trace only": Fault(
        "_joining.join",
        "inexact[number].add(reason)",
        "pass",
        ("unary",),
    ),
    "leaves that nothing reads are free": Fault(
        "_joining._join_nodes",
        "nodes.unite(idle, np.full_like(idle, FROZEN))",
        "pass",
        case="test_leaves_that_nothing_reads",
    ),
    # ---- running
    "nothing is added for what is removed": Fault(
        "_execution.Execution.is_zero",
        "return bool((value.facts[dimension][removed] & ZERO).all())",
        "return True",
        ("norm", "reduction"),
    ),
}
