"""Prints what walks over values along some of the axes, between the passes over the elements."""

from typing import Any

from heavyball.compiler.cpp.printer import Printer, _kind, refuse_codes
from heavyball.compiler.frontend.graph import Ref, Value
from heavyball.compiler.passes.axes import Frame, is_along
from heavyball.compiler.passes.stages import Pass, summed


class ArrayPrinter(Printer):
    """Prints with the sizes of the runs in each row of the table, see `passes/axes.py`.

    Values along some axes that are needed later are kept in `memory`, one array each.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        refuse_codes(
            self, "walked by rows, where a block of it may begin in one and end in the next"
        )
        starts = self.graph.starts
        assert starts is not None
        self.leading = ("numel", "group", "stream", *(f"axis {k}" for k in starts[1:]))
        self.frame = Frame(starts, self.graph.levels, lambda k: f"N{k}", "/")

    def source(self) -> str:
        """The whole file."""
        text = super().source()
        return text.replace("#include <limits>", "#include <limits>\n#include <vector>")

    def _row(self) -> str:
        frame, lines = self.frame, [super()._row()]
        for column, k in enumerate(frame.all[1:], start=len(Printer.leading)):
            lines.append(f"#define N{k} (row[{column}])")
        lines.append(f"#define N0 (row[0] / {frame.size(frame.all[1:])})")
        lines.append(f"#define KEPT ({self._before(None)} + 1)")
        return "\n".join(lines)

    # ---- where values are

    def _level(self, index: int) -> str:
        return self.graph.values[index].level

    def _size(self, level: str) -> str:
        return self.frame.size(self.frame.runs(level))

    def _before(self, index: int | None) -> str:
        """The size of the arrays that are kept before the one of this value."""
        kept = self.plan.kept if index is None else self.plan.kept[: self.plan.kept.index(index)]
        return self.frame.sizes(map(self._level, kept))

    def _memory(self) -> list[str]:
        """Names for the arrays of kept values."""
        return [
            f"    T* __restrict m{i} = memory + {self._before(i)}; (void)m{i};"
            for i in self.plan.kept
        ]

    def _count(self, value: Value) -> str:
        if value.op != "members":
            return super()._count(value)
        return f"(double){self.frame.members(*value.args)}"

    def _reduced(self, planned: Pass, source: str) -> list[int]:
        """The sums of a pass over values of a level that belong to some of the axes."""
        values = self.graph.values
        return [
            i
            for i in planned.reductions
            if is_along(values[i].level) and self._level(values[i].args[0].index) == source
        ]

    # ---- values along some axes

    def _vectors(self, k: int, planned: Pass) -> str:
        """The function that computes them before a pass, the shorter arrays first."""
        head = f"PART void vectors_{k}(const int64_t* row, double* s, T* memory) {{"
        lines = [head, *self._memory()]
        for level in self.frame.levels:
            lines += self._along(planned, level)
        return "\n".join([*lines, "}\n"])

    def _along(self, planned: Pass, level: str) -> list[str]:
        values = self.graph.values
        nodes = [i for i in planned.vectors if values[i].level == level]
        sums = [
            i
            for i in planned.reductions
            if values[i].level == "scalar" and self._level(values[i].args[0].index) == level
        ]
        tensors = self.graph.tensors
        stores = {n: i for n, i in planned.vector_stores.items() if tensors[n] == level}
        body, used = self._vector_body(nodes, sums, stores, level)
        lines = []
        if body:
            lines += ["    {", *self._keys(stores)]
            lines += [self._constant(i) for i in sorted(used)]
            lines += [f"    double r{i} = 0;" for i in sums]
            lines += [f"    for (int64_t i = 0; i < {self._size(level)}; ++i) {{"]
            lines += [f"        {line}" for line in body]
            lines += ["    }", *(f"    s[{i}] = r{i};" for i in sums), "    }"]
        for i in self._reduced(planned, level):
            lines += self._summed(i, level)
        return lines

    def _vector_body(
        self, nodes: list[int], sums: list[int], stores: dict[str, int], level: str
    ) -> tuple[list[str], set[int]]:
        names, here, used, lines = self._names(), set(nodes), set[int](), list[str]()
        values = self.graph.values

        def read(index: int) -> None:
            if values[index].level == "scalar":
                used.add(index)
            elif index not in here:
                here.add(index)
                runs = self.frame.runs
                place = self.frame.place("i", runs(level), runs(values[index].level))
                kind = _kind(self.graph, index)
                lines.append(f"const {kind} {names[index]} = m{index}[{place}];")

        for i in nodes:
            v = values[i]
            for a in v.args:
                if isinstance(a, Ref):
                    read(a.index)
            is_load = v.op == "load"
            text = (
                self._load(v.args[0], self._tensor)
                if is_load
                else self._expression(v, names, self.compute)
            )
            lines.append(f"const {_kind(self.graph, i)} {names[i]} = {text};")
            if i in self.plan.kept:
                lines.append(f"m{i}[i] = {names[i]};")
        for i in sums:
            source = values[values[i].args[0].index]
            read(values[i].args[0].index)
            if source.op in ("square", "to_float"):  # taken from what they were made of
                read(source.args[0].index)
            lines.append(self._accumulate(i, names))
        for name, i in stores.items():
            read(i)
            lines.append(self._store(name, names[i], self._tensor))
        return lines, used

    def _summed(self, i: int, level: str) -> list[str]:
        """A sum of values of a level that leaves some of their axes."""
        frame, source = self.frame, summed(self.graph, i)
        mine, inside = frame.runs(self._level(i)), frame.runs(level)
        gone = frame.missing(self._level(i), inside)
        place = f"{frame.place('i', mine, inside)} + {frame.place('j', gone, inside)}"
        value = f"(double)m{source}[{place}]"
        squared = source != self.graph.values[i].args[0].index
        return [
            f"    for (int64_t i = 0; i < {frame.size(mine)}; ++i) {{",
            "        double total = 0;",
            f"        for (int64_t j = 0; j < {frame.size(gone)}; ++j) {{",
            f"            const double x = {value};",
            f"            total += {'x * x' if squared else 'x'};",
            "        }",
            f"        m{i}[i] = (T)total;",
            "    }",
        ]
