"""Tables 1 and 2 and Figures 2 and 3 from run directories; every row of the paper has a command that makes it."""

import importlib
import json
import statistics

import pytest

import evaluate_mmlu as E
from common import paper_scores

COMMANDS = {**E.TABLE_1, **E.TABLE_2}


def summary(forget, retain):
    side = {"se": 0.03, "n": 200}
    return {"forget": {"acc": forget, **side}, "retain": {"acc": retain, **side}}


def put(folder, facts, scores):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(facts))
    (folder / "mmlu_cloze.json").write_text(json.dumps(scores))


def facts_of(command, *more):
    script, *flags = command.split()
    args = importlib.import_module(script.removesuffix(".py")).parse_args([*flags, *map(str, more)])
    return {"script": script, "arguments": vars(args)}


def attack(victim, folder, forget, lr="1e-3"):
    facts = facts_of("recover.py", "--ckpt", victim, "--base", victim.parent / "base", "--lr", lr, "--format", "cloze")
    put(folder, facts | {"parent": str(victim), "base": str(victim.parent / "base")}, summary(forget, 0.9))
    log = [{"phase": "step", "step": s, "loss": 3.0 - s / 100 - forget} for s in range(10, 50, 10)]
    log += [{"phase": "accuracy", "step": s, "forget": 0.25 + (forget - 0.25) * s / 40} for s in (0, 20, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two worlds, each with the runs of all commands, attacked, and a control that never knew."""
    root = tmp_path_factory.mktemp("tables")
    for w in (0, 1):
        world = root / f"world{w}"
        trained = {"script": "tests/tiny/train.py", "arguments": {"filtered": False, "seed": w}}
        put(world / "base", trained, summary(1.0 - 0.02 * w, 1.0))
        put(world / "filtered", {**trained, "arguments": {"filtered": True, "seed": w}}, summary(0.25, 1.0))
        attack(world / "filtered", world / "filtered" / "recovered", 0.24)
        for i, command in enumerate(COMMANDS.values()):
            facts = facts_of(command, "--seed", w) | {"base": str(world / "base")}
            put(world / f"run{i}", facts, summary(0.3 + 0.01 * i, 0.98))
            attack(world / f"run{i}", world / f"run{i}" / "recovered", 0.4 + 0.03 * i + 0.1 * w)
    return root


def cells(text):
    """{table: {row: its cells}} of printed Markdown."""
    found = {}
    for part in text.split("Table ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        found[int(part[0])] = {
            c[1].strip(): [x.strip() for x in c[2:-1]] for c in (x.split(" | ") for x in map(pad, lines))
        }
    return found


def pad(line):
    return " | " + line.strip("| ") + " | "


@pytest.mark.parametrize("name", COMMANDS)
def test_each_row_of_the_paper_is_named_by_its_command(name):
    assert E.title(facts_of(COMMANDS[name])) == name


def test_the_tables_have_all_rows_of_the_paper(worlds):
    assert len(E.TABLE_1) + 1 + len(E.TABLE_2) == 14  # with the base; the best probes stand in both
    text = E.tables(E.rows_under(worlds, "mmlu_cloze"))
    found = cells(text)
    assert list(found[1])[1:] == ["base", *E.TABLE_1, E.CONTROL] and list(found[2])[1:] == ["base", *E.TABLE_2]
    assert "not there yet" not in text
    mean = f"{100 * statistics.mean([0.46 + 0.12, 0.56 + 0.12]):.1f} ± 5.0"
    assert found[1]["RMAT"][3] == mean and found[1]["RMAT"][-1] == "2"  # run 6 of worlds 0 and 1
    assert found[1]["base"][0] == "99.0 ± 1.0" and found[1][E.CONTROL][3] == "24.0 ± 0.0"


def test_a_single_run_has_the_errors_of_its_questions_and_missing_rows_their_commands(worlds):
    text = E.tables(E.rows_under(worlds / "world1", "mmlu_cloze"))
    assert cells(text)[1]["RMAT"][3] == "68.0 ± 3.0"
    only = E.tables({"RMAT": E.rows_under(worlds, "mmlu_cloze")["RMAT"]})
    assert "Table 2" not in only and all(c in only for n, c in E.TABLE_1.items() if n != "RMAT")


def test_average_is_mean_and_standard_error():
    rows = [paper_scores(summary(1, 1), summary(0.3, 0.9), summary(x, 0.8)) for x in (0.4, 0.5, 0.9)]
    row = E.average(rows)
    assert abs(row["forget_recovered"] - 60) < 1e-9
    assert abs(row["forget_recovered_se"] - statistics.stdev([40, 50, 90]) / 3**0.5) < 1e-9
    assert E.average(rows[:1]) == rows[0]


def test_an_attack_written_elsewhere_stands_in_its_victims_row_and_two_attacks_are_two_rows(worlds, tmp_path):
    victim = worlds / "world0" / "run6"
    attack(victim, tmp_path / "mine", 0.7)
    (row,) = E.rows_under(tmp_path, "mmlu_cloze").items()
    assert row[0] == "RMAT" and row[1][0]["attack"] == (tmp_path / "mine").resolve()
    attack(victim, tmp_path / "harder", 0.8, lr="3e-3")
    assert set(E.rows_under(tmp_path, "mmlu_cloze")) == {"RMAT (run6, mine)", "RMAT (run6, harder)"}


def test_figures_are_drawn_and_the_same_each_time(worlds, capsys):
    pytest.importorskip("matplotlib")
    made = []
    for _ in range(2):
        E.figures(worlds, E.rows_under(worlds, "mmlu_cloze"), "cloze")
        made.append({p.name: p.read_bytes() for p in (worlds / "figures").iterdir()})
    assert set(made[0]) == {f"figure{n}.{kind}" for n in (2, 3) for kind in ("png", "svg")} and made[0] == made[1]
    assert all(len(data) > 10000 for data in made[0].values()) and "figure3.svg" in capsys.readouterr().out
    points = E.curves(E.rows_under(worlds, "mmlu_cloze")["RMAT"], "accuracy", "forget")
    assert (
        [p[0] for p in points] == [0, 20, 40] and abs(points[-1][1] - 0.63) < 1e-9 and abs(points[-1][2] - 0.05) < 1e-9
    )


def test_figures_without_matplotlib_are_one_line(worlds, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        E.figures(worlds, E.rows_under(worlds, "mmlu_cloze"), "cloze")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and "pip install -r tests/requirements.txt" in error
