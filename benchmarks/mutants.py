"""Small faults in the product, and which of them the tests kill.

    python -m benchmarks.mutants TREE --output benchmarks/results/mutants.json

TREE is a clean git worktree with its own .venv in which nobody works: each fault is written into
its product and taken back. The tests of the wing run, then those of `run/`, until the first
failure. A fault leaves a mark when it is run; one that no test reached does not count, and another
place is drawn. Results are saved after each fault, and a stopped run goes on.
"""

import argparse
import ast
import json
import os
import random
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from resource import RLIMIT_CPU, setrlimit

PAIRS = [("Lt", "LtE"), ("Gt", "GtE"), ("Eq", "NotEq"), ("In", "NotIn"), ("Is", "IsNot"),
         ("Add", "Sub"), ("And", "Or")]  # fmt: skip
OPPOSITE = {getattr(ast, x): getattr(ast, y) for a, b in PAIRS for x, y in ((a, b), (b, a))}
# Kind of a fault -> whether a node takes it.
KINDS = {
    "comparison": lambda node: isinstance(node, ast.Compare) and len(node.ops) == 1,
    "sign": lambda node: isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE,
    "integer": lambda node: isinstance(node, ast.Constant) and type(node.value) is int,
    "call": lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Call),
    "and, or": lambda node: isinstance(node, ast.BoolOp),
}
# Seconds of CPU that one pytest may take. A fault that takes more counts as killed.
SECONDS = 900


def places(tree):
    """`{kind: [(file, number of the node in ast.walk)]}` of all functions of the product."""
    result = {kind: [] for kind in KINDS}
    for path in sorted([*tree.glob("d2c_mlx/**/*.py"), *tree.glob("cli/**/*.py")]):
        nodes, inside, closed = list(ast.walk(ast.parse(path.read_text("utf-8")))), set(), set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside |= {id(x) for statement in node.body for x in ast.walk(statement)}
            # A pattern of `match` and the text of an f-string take no call for a constant.
            elif isinstance(node, ast.pattern | ast.FormattedValue):
                closed |= {id(x) for x in ast.walk(node)}
        for number, node in enumerate(nodes):
            for kind in (kind for kind, takes in KINDS.items() if takes(node)):
                if id(node) in inside - closed:
                    result[kind].append((str(path.relative_to(tree)), number))
    return result


class Fault(ast.NodeTransformer):
    """Changes one node, and puts the call that leaves a mark beside it."""

    def __init__(self, path, number, mark):
        module = ast.parse(path.read_text("utf-8"))
        self.node = list(ast.walk(module))[number]
        self.facts = {"line": self.node.lineno, "before": ast.unparse(self.node), "after": "pass"}
        self.mark = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        self.text = ast.unparse(self.visit(module))

    def visit(self, node):
        """Change the node that was drawn, and keep all others."""
        if node is not self.node:
            return self.generic_visit(node)
        if isinstance(node, ast.Expr):
            return ast.parse(self.mark).body[0]
        if isinstance(node, ast.Compare):
            node.ops = [OPPOSITE[type(node.ops[0])]()]
        elif isinstance(node, ast.Constant):
            node.value += 1
        else:
            node.op = OPPOSITE[type(node.op)]()
        self.facts["after"] = ast.unparse(node)
        return ast.parse(f"({self.mark}, {self.facts['after']})[1]", mode="eval").body


def failure(tree, arguments):
    """The name of the first test that fails, or None."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [tree / ".venv/bin/pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    limit = partial(setrlimit, RLIMIT_CPU, (SECONDS, SECONDS))
    done = subprocess.run(command, cwd=tree, env=environment, preexec_fn=limit,
                          capture_output=True, text=True)  # fmt: skip
    lines = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return (lines or arguments)[0] if done.returncode else None


def killer(tree, path, fault, folders):
    """The test that kills a fault, or None; the file is left as it was."""
    text, skipped = path.read_text("utf-8"), []
    try:
        for folder in filter(lambda name: (tree / name).is_dir(), folders):
            path.write_text(fault, "utf-8")
            while name := failure(tree, [folder, *skipped]):
                # On a busy machine tests of time and memory fail without a fault.
                again = failure(tree, [name])
                path.write_text(text, "utf-8")
                if again and not failure(tree, [name]):
                    return name
                path.write_text(fault, "utf-8")
                skipped += ["--deselect", name]
    finally:
        path.write_text(text, "utf-8")
    return None


def main():
    """Draw places and test them until `--count` faults were reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=lambda name: Path(name).resolve())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    tree, output, count = vars(parser.parse_args()).values()
    rows, rng = json.loads(output.read_text()) if output.exists() else [], random.Random(0)
    orders = {kind: rng.sample(every, len(every)) for kind, every in places(tree).items()}
    while sum(row["reached"] for row in rows) < count:
        kind = min(KINDS, key=lambda k: sum(row["kind"] == k and row["reached"] for row in rows))
        drawn = {row["draw"] for row in rows if row["kind"] == kind}
        draw = next(i for i in range(len(orders[kind])) if i not in drawn)
        file, number = orders[kind][draw]
        wing = file.removeprefix("d2c_mlx/").split("/")[0]
        with tempfile.TemporaryDirectory() as directory:
            mark = Path(directory) / "reached"
            fault = Fault(tree / file, number, mark)
            test = killer(tree, tree / file, fault.text, [f"tests/{wing}", "tests/run"])
            row = {"kind": kind, "draw": draw, "file": file, **fault.facts}
            rows.append({**row, "reached": mark.exists(), "killer": test})
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
