"""Mutation testing: would the tests notice a mistake in the code that they guard?

    python tools/mutate.py [PART ...]     # default: every part; goes on where it was stopped

A mutant is the package with one change: a comparison or an arithmetic sign turned, a number moved
by one, a condition negated, a statement left out. Of all changes that are possible in the files of
a part, 150 are drawn with a fixed seed, and each is shown to the tests of this part alone. A mutant
that makes a test fail or hang is killed; the others are listed in notebooks/results/mutation.json,
where `why` is written by hand and kept. Texts of errors, docstrings and types are not changed.

This is what mutmut and cosmic-ray do; here one process imports PyTorch and each mutant is a fork of
it, which takes seconds less a mutant than a process of its own, and a copy of the checkout holds
the changed file, so that processes started by tests see it as well.
"""

import argparse
import ast
import compileall
import contextlib
import copy
import gc
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from inspect import CO_OPTIMIZED
from pathlib import Path
from py_compile import PycInvalidationMode
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "notebooks" / "results" / "mutation.json"
SEED, MUTANTS = 0, 150
ROOM = 12 * 2**30
"""Bytes of address space that a mutant may take; the libraries need half of it."""
LONGEST = 3.0
"""CPU seconds of a test that takes part."""
PARTS = {
    "sampling": (["models/sampling.py"], ["unit/test_sampling"]),
    "evaluation": (
        ["analysis/evaluate.py", "analysis/metrics.py"],
        ["unit/test_metrics", "unit/test_evaluate"],
    ),
    "annotation reader": (
        ["data/annotations.py", "data/coco_file.py", "data/coco.py"],
        ["unit/test_coco", "unit/test_hub", "unit/test_checks"],
    ),
    "run directory": (
        ["training/run.py", "training/checkpoints.py", "training/owner.py"],
        ["unit/test_job", "unit/test_training", "faults/test_runs"],
    ),
}
"""Part -> its files in the package, and its tests."""
OPTIONS = ["-q", "-p", "no:cacheprovider"]
HEAVY = "numpy pandas pytest torch torchvision timm datasets msgspec hypothesis pycocotools.mask"
SWAPS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.RShift: (ast.LShift,),
    ast.LShift: (ast.RShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Break: (ast.Continue,),
    ast.Continue: (ast.Break,),
}


def with_fields(node: ast.AST, **fields: Any) -> ast.AST:
    """A copy with these fields."""
    changed = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become, one change at a time."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in SWAPS[type(op)]:
                    yield with_fields(node, ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            for other in SWAPS.get(type(op), ()):
                yield with_fields(node, op=other())
        case ast.Break() | ast.Continue():
            yield SWAPS[type(node)][0]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Constant(value=str(value)) if value:
            yield ast.Constant(value + "X")
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Expr(value=ast.Call()) | ast.Assert():
            yield ast.Pass()
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield with_fields(node, test=ast.UnaryOp(ast.Not(), test))


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes whose change could be noticed: no docstrings, types, texts of errors."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "exc", "cause", "msg"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_silent(child):
                yield from walk(child)


def is_silent(node: ast.AST) -> bool:
    """Docstrings, f-strings, type aliases, what is imported for types alone."""
    match node:
        case ast.JoinedStr() | ast.Expr(value=ast.Constant()):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign() | ast.AnnAssign():
            names = (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))
            return "Literal" in names
    return False


def sites(source: str) -> list[tuple[int, int]]:
    """Every possible change of a file: number of the node, number of its change."""
    nodes = enumerate(walk(ast.parse(source)))
    return [(place, i) for place, node in nodes for i, _ in enumerate(changes(node))]


@cache
def change(source: str, place: int, number: int) -> tuple[int, str, str]:
    """(line, change in words, changed source)."""
    tree = ast.parse(source)
    old = list(walk(tree))[place]
    new = list(changes(old))[number]
    before, after = (ast.unparse(node).splitlines()[0] for node in (old, new))

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is old else self.generic_visit(node)

    changed = ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))
    line = getattr(old, "lineno", 1)
    return line, f"{before} -> {after} in {source.splitlines()[line - 1].strip()}", changed


class Tests:
    """A plugin of pytest that shows the mutants of functions to tests that are collected once.

    Each mutant is a fork, in which the functions of the file get their new code in place. The tests
    that take half a second and more come last, those above LONGEST are left out.
    """

    def __init__(self, part: "Part") -> None:
        self.part = part
        self.seconds: dict[str, float] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        part, files = self.part, [item.path for item in session.items]
        noted = Path("seconds.json").resolve()
        part.seconds = self.fork(session, 3600, noted).seconds("survived")
        self.seconds.update(json.loads(noted.read_text()))
        session.items = [item for item in session.items if self.seconds[item.nodeid] < LONGEST]
        session.items.sort(
            key=lambda item: (
                self.seconds[item.nodeid] > 0.5,
                files.index(item.path),
                self.seconds[item.nodeid],
            )
        )
        for mutant in part.waiting():
            codes = part.codes(mutant)
            if codes is not None:
                part.note(mutant, self.fork(session, part.limit, None, codes))
        return True

    def fork(self, session: Any, limit: float, noted: Path | None, codes: Any = None) -> "Fork":
        def run() -> int:
            put_in_place(codes or {})
            for item, after in zip(session.items, [*session.items[1:], None], strict=True):
                before = sum(os.times()[:4])
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                self.seconds[item.nodeid] = sum(os.times()[:4]) - before
                if session.testsfailed:
                    return 1
            if noted:
                noted.write_text(json.dumps(self.seconds))
            return 0

        return Fork(run, limit)


class Fork:
    """Runs a function in a fork. limit: CPU seconds it may take; waiting may take five times as
    long. `outcome` is "survived" where it returned 0, else "killed" or "timeout"."""

    def __init__(self, run: Callable[[], int], limit: float) -> None:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            own = Path("tmp", str(os.getpid())).resolve()
            own.mkdir(parents=True)
            os.environ |= {"TMPDIR": str(own), "MIMDET_CACHE": str(own)}
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
            resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
            output = os.open("output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            with contextlib.suppress(BaseException):
                code = run()
            os._exit(code)
        status = None
        while status is None and time.monotonic() - began < 5 * limit:
            time.sleep(0.05)
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        shutil.rmtree(Path("tmp", str(child)), ignore_errors=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        hung = status is None or os.WIFSIGNALED(status)
        self.outcome = "survived" if status == 0 else "timeout" if hung else "killed"

    def seconds(self, outcome: str) -> float:
        """What it took; ends this program where it had another outcome."""
        if self.outcome != outcome:
            raise SystemExit(f"{self.outcome} without any change: see {Path.cwd()}/output.txt")
        return self.used


Mutant = tuple[str, int, int]
"""File, number of the node, number of its change."""


class Part:
    """The mutants of a part and what is known of them.

    A mutant that was killed stays so while its file is the same; one that survived is tried again
    when the tests are others.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.files, names = PARTS[name]
        self.tests = [f"tests/{test}.py" for test in names]
        self.source = {
            file: Path("mimdet", file).read_text(encoding="utf-8") for file in self.files
        }
        self.of_tests = digest("".join(Path(test).read_text("utf-8") for test in self.tests))
        self.progress = folder / f"{name.replace(' ', '_')}.json"
        text = self.progress.read_text() if self.progress.exists() else "{}"
        self.known: dict[str, list[str]] = json.loads(text)
        every = [(file, *site) for file in self.files for site in sites(self.source[file])]
        self.mutants = random.Random(f"{SEED} {name}").sample(every, min(MUTANTS, len(every)))
        self.seconds = 0.0
        for file, source in self.source.items():  # so that compiled code can be compared
            Path("mimdet", file).write_text(ast.unparse(ast.parse(source)), encoding="utf-8")

    @property
    def limit(self) -> float:
        return 20 + 4 * self.seconds

    def key(self, mutant: Mutant) -> str:
        file, place, number = mutant
        return f"{digest(self.source[file])} {place} {number}"

    def outcome(self, mutant: Mutant) -> str:
        return self.known.get(self.key(mutant), [""])[0]

    def waiting(self) -> Iterator[Mutant]:
        for mutant in self.mutants:
            if self.known.get(self.key(mutant)) in (None, *self.outdated()):
                file, place, number = mutant
                path, text = Path("mimdet", file), ast.unparse(ast.parse(self.source[file]))
                path.write_text(change(self.source[file], place, number)[2], encoding="utf-8")
                yield mutant
                path.write_text(text, encoding="utf-8")

    def outdated(self) -> list[list[str]]:
        survivors = (found for found in self.known.values() if found[0] == "survived")
        return [found for found in survivors if found[1] != self.of_tests]

    def codes(self, mutant: Mutant) -> dict[tuple[str, str], CodeType] | None:
        """(file, name) -> new code of its functions; None where something else changed."""
        path = Path("mimdet", mutant[0]).resolve()
        old = compile(ast.unparse(ast.parse(self.source[mutant[0]])), str(path), "exec")
        new = compile(path.read_text(encoding="utf-8"), str(path), "exec")
        if frame_of(old) != frame_of(new):
            return None
        return {(str(path), code.co_qualname): code for code in functions_of(new)}

    def note(self, mutant: Mutant, fork: Fork) -> None:
        self.known[self.key(mutant)] = [fork.outcome, self.of_tests]
        self.progress.write_text(json.dumps(self.known))
        line, text, _ = change(self.source[mutant[0]], *mutant[1:])
        say(f"{fork.used:6.1f} s {fork.outcome:8} {mutant[0]}:{line} {text}")

    def run(self) -> None:
        def collect() -> int:
            import pytest

            return int(pytest.main([*OPTIONS, "-s", *self.tests], plugins=[Tests(self)]))

        def alone() -> int:
            import pytest

            return int(pytest.main([*OPTIONS, "-x", *self.tests]))

        Fork(collect, 10**6).seconds("survived")
        self.known = json.loads(self.progress.read_text()) if self.progress.exists() else {}
        for mutant in self.waiting():  # of constants, classes, defaults: what is read at import
            self.note(mutant, Fork(alone, max(self.limit, 120)))


def functions_of(code: CodeType) -> Iterator[CodeType]:
    """The functions of a module and of its classes."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & CO_OPTIMIZED:
                yield inner
            else:
                yield from functions_of(inner)


def frame_of(code: CodeType) -> list[Any]:
    """All of a module that is no function with a name: what runs when it is imported."""
    found: list[Any] = [code.co_code, code.co_names]
    for inner in code.co_consts:
        if not isinstance(inner, CodeType):
            found.append(repr(inner))
        elif inner.co_name.startswith("<") or not inner.co_flags & CO_OPTIMIZED:
            found += frame_of(inner)
        else:
            found.append(inner.co_qualname)
    return found


def put_in_place(codes: dict[tuple[str, str], CodeType]) -> None:
    """Give the functions that exist their new code."""
    for function in gc.get_objects():
        if type(function) is FunctionType:
            code = function.__code__
            new = codes.get((code.co_filename, code.co_qualname))
            if new is not None and new.co_freevars == code.co_freevars:
                function.__code__ = new


def say(text: str) -> None:
    with (ROOT / "build" / "mutation" / "log.txt").open("a", encoding="utf-8") as log:
        log.write(text + "\n")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(part: Part) -> None:
    """The counts and the survivors; the reasons that are written there stay."""
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"parts": {}}
    old = content["parts"].get(part.name, {"survivors": []})["survivors"]
    why = {(entry["file"], entry["change"]): entry["why"] for entry in old}
    outcomes = Counter(part.outcome(mutant) for mutant in part.mutants)
    survivors = []
    for mutant in part.mutants:
        if part.outcome(mutant) == "survived":
            line, text, _ = change(part.source[mutant[0]], *mutant[1:])
            reason = why.get((mutant[0], text), "")
            survivors.append({"file": mutant[0], "line": line, "change": text, "why": reason})
    content |= {"command": "python tools/mutate.py", "seed": SEED}
    content["parts"][part.name] = {
        "files": {file: digest(part.source[file]) for file in part.files},
        "tests": part.tests,
        "mutants": len(part.mutants),
        "killed": outcomes["killed"] + outcomes["timeout"],
        "of these by the time limit": outcomes["timeout"],
        "survivors": survivors,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    RESULT.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or list(PARTS)
    folder = ROOT / "build" / "mutation"
    place = folder / f"checkout-{os.getpid()}"
    for name in ("mimdet", "tests", "tools", "docs", "notebooks/results", "notebooks/py"):
        shutil.copytree(ROOT / name, place / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place / name)
    os.chdir(place)
    sys.path[:] = [
        str(place),
        *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT),
    ]
    os.environ |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"MIMDET_DATA": "", "MIMDET_GOLDEN": ""}  # as for who has none of them
    sys.dont_write_bytecode = True
    compileall.compile_dir(place, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    for name in HEAVY.split():
        importlib.import_module(name)
    for name in chosen:
        part = Part(name, folder)
        say(f"{name}: {' '.join(part.tests)}")
        part.run()
        write(part)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
