"""The paper's scores; Tables 1 and 2 and Figures 2 and 3 from run directories, each row with its command."""

import importlib
import json
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, real

import evaluate_mmlu as E
import figures
from evaluate_mmlu import paper_scores

COMMANDS = {**E.TABLE_1, **E.TABLE_2}


def summary(forget, retain, se=0.03):
    return {side: {"acc": acc, "se": se, "n": 200} for side, acc in (("forget", forget), ("retain", retain))}


def test_scores_in_closed_form():
    """Each term counts once and in percent; Score_R, as the paper's, does not see damage after the attack."""
    row, damaged = (
        paper_scores(summary(0.5, 0.4), summary(0.3, 0.37), summary(0.45, r)) for r in (0.39, 0.1)
    )
    expected = {"forget": 30, "retain_recovered": 39, "score_u": 20 - 3, "score_r": 5, "composite": 11}
    assert {k: row[k] for k in expected} == pytest.approx(expected) and damaged["score_r"] == row["score_r"]
    untouched = paper_scores(*[summary(0.5, 0.4)] * 3)
    assert [untouched[k] for k in ("score_u", "score_r", "composite")] == [0, 0, 0]


def test_scores_are_those_of_the_papers_tables():
    printed = json.loads(real("paper_tables.json").read_text())
    rows = [dict(zip(printed["columns"], row)) for t in "12" for row in printed[f"table{t}"].values()]
    for row in rows:
        pairs = (rows[0], ""), (row, ""), (row, "_recovered")  # the first row is the base
        found = paper_scores(
            *(summary(r["forget" + when] / 100, r["retain" + when] / 100) for r, when in pairs)
        )
        assert {k: found[k] for k in row} == pytest.approx(row, abs=0.11)  # all are rounded to 0.1


def test_standard_errors_against_simulation():
    torch.manual_seed(0)
    means, se = torch.tensor([[0.5, 0.4], [0.3, 0.38], [0.45, 0.39]]), 0.02
    draws = [
        paper_scores(*(summary(*m) for m in (means + se * torch.randn(3, 2)).tolist())) for _ in range(4000)
    ]
    row = paper_scores(*(summary(*m, se) for m in means.tolist()))
    for k in ("score_u", "score_r", "composite"):
        assert row[k + "_se"] == pytest.approx(statistics.stdev(draw[k] for draw in draws), rel=0.05)


def test_average_is_mean_and_standard_error():
    rows = [paper_scores(summary(1, 1), summary(0.3, 0.9), summary(x, 0.8)) for x in (0.4, 0.5, 0.9)]
    row, se = E.average(rows), statistics.stdev([40, 50, 90]) / 3**0.5
    assert (row["forget_recovered"], row["forget_recovered_se"]) == (pytest.approx(60), pytest.approx(se))
    assert E.average(rows[:1]) == rows[0]


def put(folder, facts, scores):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(facts))
    (folder / "mmlu_cloze.json").write_text(json.dumps(scores))


def facts_of(command, *more):
    script, *flags = command.split()
    args = importlib.import_module(script.removesuffix(".py")).parse_args([*flags, *map(str, more)])
    return {"script": script, "arguments": vars(args)}


def attack(victim, folder, forget, lr="1e-3"):
    base = victim.parent / "base"
    facts = facts_of("recover.py", "--ckpt", victim, "--base", base, "--lr", lr, "--format", "cloze")
    put(folder, facts | {"parent": str(victim), "base": str(base)}, summary(forget, 0.9))
    log = [{"phase": "step", "step": s, "loss": 3.0 - s / 100 - forget} for s in range(10, 50, 10)]
    log += [{"phase": "accuracy", "step": s, "forget": 0.25 + (forget - 0.25) * s / 40} for s in (0, 20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two worlds, each with the runs of all commands, attacked, and a control that never knew."""
    root = tmp_path_factory.mktemp("tables")
    for w in (0, 1):
        world = root / f"world{w}"
        for name, forget in (("base", 1.0 - 0.02 * w), ("filtered", 0.25)):
            trained = {
                "script": "tests/tiny/train.py",
                "arguments": {"filtered": name == "filtered", "seed": w},
            }
            put(world / name, trained, summary(forget, 1.0))
        attack(world / "filtered", world / "filtered" / "recovered", 0.24)
        for i, command in enumerate(COMMANDS.values()):
            run = world / f"run{i}"
            put(
                run,
                facts_of(command, "--seed", w) | {"base": str(world / "base")},
                summary(0.3 + 0.01 * i, 0.98),
            )
            attack(run, run / "recovered", 0.4 + 0.03 * i + 0.1 * w)
    return root


def cells(text):
    """{table: {row: its cells}} of printed Markdown, without the heads."""
    found = {}
    for part in text.split("Table ")[1:]:
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:2] == "| "
        ]
        found[int(part[0])] = {name: row for name, *row in lines[1:]}
    return found


def test_the_tables_have_all_rows_of_the_paper_named_by_their_commands(worlds):
    assert [E.title(facts_of(command)) for command in COMMANDS.values()] == [*COMMANDS]
    text = E.tables(E.rows_under(worlds, "cloze"))
    one, two = cells(text)[1], cells(text)[2]
    assert list(one) == ["base", *E.TABLE_1, E.CONTROL] and list(two) == ["base", *E.TABLE_2]
    assert len(one) + len(two) == 16 and "missing" not in text  # 14, the control, and the base once more
    assert one["RMAT"][3] == "63.0 ± 5.0" and one["RMAT"][-1] == "2"  # run 6: 58 and 68 in worlds 0 and 1
    assert one["base"][0] == "99.0 ± 1.0" and one[E.CONTROL][3] == "24.0 ± 0.0"


def test_a_single_run_has_the_errors_of_its_questions_and_missing_rows_their_commands(worlds):
    assert cells(E.tables(E.rows_under(worlds / "world1", "cloze")))[1]["RMAT"][3] == "68.0 ± 3.0"
    only = E.tables({"RMAT": E.rows_under(worlds, "cloze")["RMAT"]})
    assert "Table 2" not in only and all((c in only) == (n != "RMAT") for n, c in E.TABLE_1.items())


def test_an_attack_written_elsewhere_is_in_its_victims_row_and_two_attacks_are_two_rows(worlds, tmp_path):
    victim = worlds / "world0" / "run6"
    attack(victim, tmp_path / "mine", 0.7)
    ((name, (run,)),) = E.rows_under(tmp_path, "cloze").items()
    assert name == "RMAT" and run["attack"] == (tmp_path / "mine").resolve()
    attack(victim, tmp_path / "harder", 0.8, lr="3e-3")
    assert set(E.rows_under(tmp_path, "cloze")) == {"RMAT (run6, mine)", "RMAT (run6, harder)"}


def test_figures_are_drawn_and_the_same_each_time(worlds):
    """Drawn twice: by the function, and as a user runs the script."""
    pytest.importorskip("matplotlib")

    def drawn():
        return {p.name: p.read_bytes() for p in (worlds / "figures").iterdir()}

    rows = E.rows_under(worlds, "cloze")
    figures.figures(worlds, rows, "cloze")
    made = drawn()
    assert set(made) == {f"figure{n}.{kind}" for n in (2, 3) for kind in ("png", "svg")}
    assert all(len(data) > 10000 for data in made.values())
    command = [sys.executable, ROOT / "tests" / "figures.py", worlds, "--format", "cloze"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "figure3.svg" in done.stdout, done.stderr
    assert drawn() == made
    steps, means, errors = zip(*figures.curves(rows["RMAT"], "accuracy", "forget"))
    assert steps == (0, 20, 40) and (means[-1], errors[-1]) == pytest.approx((0.63, 0.05))


def test_figures_without_matplotlib_are_one_line(worlds, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        figures.figures(worlds, E.rows_under(worlds, "cloze"), "cloze")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and "pip install -r tests/requirements.txt" in error
