"""Method files repeat each other on purpose; the rule is: same name, same text."""

import ast

from conftest import ROOT

METHODS = ("random_mapping", "mlac_ar", "rmat", "adv_probes", "baselines", "recover")


def functions(name):
    """{name: source, decorators and comments included} of a file's top-level functions and classes."""
    source, found = (ROOT / f"{name}.py").read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("parse_args", "main"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = source.splitlines()[first - 1 : node.end_lineno]
    return found


def test_same_name_same_text():
    known = {}
    for file in METHODS:
        for name, text in functions(file).items():
            assert known.setdefault(name, text) == text, f"{file}.py: {name}"


def test_rmat_is_random_mapping_followed_by_mlac_ar():
    assert functions("rmat") == functions("random_mapping") | functions("mlac_ar")
