"""What a trainer's source says, without importing it: its packages need GPUs, other Pythons or each other's absence."""

import ast
import json
from pathlib import Path

CONTRACTS = Path(__file__).parent / "contracts" / "trainers.json"


def contracts() -> dict[str, dict]:
    """By trainer: ``package`` of PyPI or ``repository``, what was ``read``, and by file the ``symbols`` that are relied on."""
    return json.loads(CONTRACTS.read_text())


def differences(root: Path, symbols: dict[str, dict[str, list[str]]]) -> list[str]:
    """What of the recorded symbols is gone or has changed in the sources under ``root``.

    A function must have exactly the recorded parameters, a class at least the recorded fields, and ``import`` lists names that
    the module itself must have.
    """
    found = []
    for file, expected in symbols.items():
        path = root / file
        if not path.exists():
            found.append(f"{file} is gone")
            continue
        tree = ast.parse(path.read_text())
        for name, wanted in expected.items():
            if name == "import":
                there = _module_names(tree)
                found += [f"{file} has no {one}" for one in wanted if one not in there]
            elif (node := _find(tree, name.split("."))) is None:
                found.append(f"{file}: {name} is gone")
            elif isinstance(node, ast.ClassDef):
                fields = _fields(node)
                found += [f"{file}: {name} has no {one}" for one in wanted if one not in fields]
            elif (has := parameters(node)) != wanted:
                found.append(f"{file}: {name}({', '.join(wanted)}) is now ({', '.join(has)})")
    return found


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names in order; ``=`` after one with a default, ``*`` before those that are by keyword only."""
    args = node.args
    plain = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    first = len(plain) - len(args.defaults)
    result = [name + "=" * (place >= first) for place, name in enumerate(plain)]
    if args.vararg or args.kwonlyargs:
        result.append(f"*{args.vararg.arg if args.vararg else ''}")
    result += [
        arg.arg + "=" * (default is not None) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return result + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def extract(path: Path, names: list[str], **known) -> dict:
    """The named functions and classes of a file, run with ``known`` for all else that they mention.

    Decorators and annotations are left out. A name ``Class.method`` takes no more of the class than the methods named.
    """
    tree = ast.parse(path.read_text())
    body: list[ast.stmt] = []
    for name in names:
        owner, _, method = name.partition(".")
        node = _find(tree, [owner])
        assert node is not None, f"{path} has no {owner}"
        if method:
            kept = next((one for one in body if isinstance(one, ast.ClassDef) and one.name == owner), None)
            if kept is None:
                kept = ast.parse(f"class {owner}: pass").body[0]
                kept.body.clear()
                body.append(kept)
            kept.body.append(_find(node, [method]))
        else:
            body.append(node)
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.decorator_list = [
                one for one in node.decorator_list if getattr(one, "id", "") in ("staticmethod", "classmethod")
            ]
            node.returns = None
            for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                arg.annotation = None
    module = ast.fix_missing_locations(ast.Module(body, []))
    result = dict(known)
    exec(compile(module, str(path), "exec"), result)  # noqa: S102
    return result


def need(root: Path | None, file: str) -> Path:
    """A file of an installed trainer, or the test is skipped."""
    import pytest

    if root is None or not (root / file).exists():
        pytest.skip(f"{file} is not there: .ci/trainers fetches it")
    return root / file


def _find(tree, names: list[str]):
    for name in names:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        tree = next((node for node in tree.body if isinstance(node, kinds) and node.name == name), None)
        if tree is None:
            return None
    return tree


def _fields(node: ast.ClassDef) -> set[str]:
    return {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}


def _module_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
