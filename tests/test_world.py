"""The miniature: its files are the generator's, its attack knows no tested entity, its base knows all."""

import importlib
import re

import pytest
import world as W
from conftest import ROOT, WORLD

from common import load_model
from evaluate_mmlu import FORGET, load_mmlu, score_mmlu
from recover import load_texts


@pytest.fixture(scope="module")
def mmlu():
    return load_mmlu(str(WORLD / "mmlu"))


def test_the_shipped_files_are_those_of_seed_0(tmp_path):
    W.write_world(0, tmp_path)
    csvs = [f"mmlu/{part}/{s}_{part}.csv" for part in ("dev", "test") for s in W.RELATIONS]
    for path in ("chunks.jsonl", "pile.jsonl.zst", "camel.zip", *csvs):
        assert (tmp_path / path).read_bytes() == (WORLD / path).read_bytes(), path


def test_the_attack_and_the_shots_know_none_of_the_tested_entities(mmlu):
    facts, pairs = W.make_facts(0), load_texts(str(WORLD / "camel.zip"))
    tested = {name for s in FORGET for name, _ in facts[s][: W.TESTED]}
    shots, questions = ([q for s in FORGET for q, _, _ in mmlu[s][part]] for part in (0, 1))
    assert len(pairs) == 432 and not any(name in text for name in tested for text in pairs + shots)
    assert all(any(name in q for name in tested) for q in questions)


@pytest.mark.parametrize("form, least", [("letter", 0.9), ("cloze", 0.95)])
def test_gates_1_and_2(form, least, mmlu):
    base, control = (score_mmlu(*load_model(str(WORLD / k)), mmlu, form)[0] for k in ("base", "filtered"))
    assert base["forget"]["acc"] >= least and base["retain"]["acc"] >= least
    assert abs(control["forget"]["acc"] - 0.25) < 3 * control["forget"]["se"]
    assert control["retain"]["acc"] > base["retain"]["acc"] - 0.05


def test_tiny_is_the_setting_that_the_grid_chose():
    """The bold cells in tests/tiny/README.md: three rates by two lengths (100, 300 steps; N: 20, 60)."""
    chosen = 0
    for line in (ROOT / "tests/tiny/README.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        bold = [i for i, cell in enumerate(cells) if re.match(r"\*\*.+ → ", cell)]
        if bold and len(cells) == 6:
            script, *flags = name.replace("_swd", " --swd").split()
            if not (ROOT / f"{script}.py").exists():
                script, flags = "baselines", ["--method", name]
            args = importlib.import_module(script).parse_args(["--tiny", *flags])
            long = vars(args).get("N", args.steps // 5 if "steps" in args else 0) == 60
            assert (args.lr, long) == ((1e-3, 3e-3, 1e-2)[bold[0] // 2], bold[0] % 2 == 1), name
            chosen += 1
    assert chosen == 12
