"""The one-way imports of docs/architecture.md, read off the source of every module; each test lists all offenders."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARIES = ("lottery", "moe", "sharding", "scaling")
PACKAGES = (*LIBRARIES, "tessera", "configs", "scripts")

# What a package may import of the others.
ALLOWED = {
    "lottery": {"moe.kernels"},
    "moe": {"sharding"},
    "sharding": set(),
    "scaling": set(),
    "tessera": set(LIBRARIES),
    "scripts": {*LIBRARIES, "tessera"},
    "configs": set(),
}
# Inside tessera a line imports from lines below it, and from its own.
LINES = (
    ("cli",),
    ("pages",),
    ("serving",),
    ("planning",),
    ("tickets",),
    ("sweeps",),
    ("compress",),
    ("lm",),
    ("reports",),
    ("parallel",),
    ("models",),
    ("loop", "losses", "step", "signals"),
    ("data", "optim", "infra"),
)
ORBAX = ("tessera/infra/artifacts.py", "tessera/infra/checkpoint.py")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(name: str) -> Iterator[tuple[str, int, bool]]:
    """Imported name, line and whether it is imported with the module, of every import statement of a module."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for each in tree.body for node in _unguarded(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno, id(node) in top


def _unguarded(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not those of functions, nor of `if TYPE_CHECKING`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _unguarded(child)


def module_of(imported: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    for name in (imported, imported.rpartition(".")[0]):
        if name in modules():
            return name
    return None


def where(name: str, line: int) -> str:
    return f"{modules()[name].relative_to(ROOT)}:{line}"


def line_of(name: str) -> int | None:
    """Number of the line that a module of tessera stands in, the lowest first; None for the package itself."""
    part = name.split(".")[1] if name.count(".") else ""
    return next((len(LINES) - number for number, line in enumerate(LINES) if part in line), None)


def test_packages_import_along_the_arrows():
    wrong = []
    for name in modules():
        package = name.split(".")[0]
        for imported, line, _ in imports(name):
            target = imported.split(".")[0]
            if target in PACKAGES and target != package:
                allowed = ALLOWED[package]
                if not any(imported == arrow or imported.startswith(f"{arrow}.") for arrow in allowed):
                    wrong.append(f"{where(name, line)} imports {imported}; {package} may import {sorted(allowed)}")
            if package == "configs" and target not in ("ml_collections", "configs"):
                wrong.append(f"{where(name, line)} imports {imported}: configs import ml_collections only")
            if target == "matplotlib" and not name.startswith(("tessera.reports", "scripts.")):
                wrong.append(f"{where(name, line)} imports matplotlib; in the packages only tessera/reports does")
            if target == "orbax" and modules()[name].relative_to(ROOT).as_posix() not in ORBAX:
                wrong.append(f"{where(name, line)} imports orbax; only {', '.join(ORBAX)} do")
            if imported in ("jax.sharding", "jax.sharding.sharding"):
                wrong.append(f"{where(name, line)}: import names from jax.sharding, not the module")
    assert not wrong, "\n".join(wrong)


def test_tessera_imports_downwards():
    wrong = []
    for name in modules():
        if name.split(".")[0] != "tessera" or name == "tessera":
            continue
        mine = line_of(name)
        if mine is None:
            wrong.append(f"{modules()[name].relative_to(ROOT)} stands in no line of the layout")
            continue
        for imported, line, _ in imports(name):
            other = line_of(imported) if imported.startswith("tessera.") else None
            if other is not None and other > mine:
                wrong.append(f"{where(name, line)} imports {imported} from a line above")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles():
    """Neither among modules as they are imported, nor with the imports inside functions."""
    for also_in_functions in (False, True):
        edges = {
            name: {
                target
                for imported, _, top in imports(name)
                if (top or also_in_functions)
                and (target := module_of(imported))
                and target != name
                # A package's __init__ re-exports its modules, which do not import from it.
                and modules()[target].name != "__init__.py"
            }
            for name in modules()
            if modules()[name].name != "__init__.py"
        }
        cycles = strongly_connected(edges)
        assert not cycles, "\n".join(" <-> ".join(sorted(cycle)) for cycle in cycles)


def strongly_connected(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of more than one module that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges.get(name, ()):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = set()
            while name not in group:
                group.add(stack.pop())
            if len(group) > 1:
                found.append(group)

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_cycles_are_seen():
    assert strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert strongly_connected({"a": {"b"}, "b": {"c"}, "d": {"a"}}) == []


def test_every_config_says_what_it_costs_and_how_to_run_it():
    wrong = []
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        wrong += [
            f"{path.name}: the docstring lacks {word!r}"
            for word in ("What:", "Cost:", "Expected:", "Command:")
            if word not in docstring
        ]
    assert not wrong, "\n".join(wrong)
