"""The paper's scores; Tables 1 and 2 and Figures 2 and 3 from run directories, each row with its command."""

import csv
import importlib
import io
import json
import math
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, real

import evaluate_mmlu as E
import figures
import tables as T
from evaluate_mmlu import paper_scores

COMMANDS = {name: row[1] for name, row in E.ROWS.items() if name not in ("Base", "Adversarial Probes")}


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


def test_the_papers_rows_follow_from_their_accuracies():
    """All 14 rows, each number rounded to 0.1."""
    base = E.ROWS["Base"][2]
    for _, _, row in E.ROWS.values():
        pairs = (base[0], base[1]), (row[0], row[1]), (row[3], row[4])
        found = paper_scores(*(summary(forget / 100, retain / 100) for forget, retain in pairs))
        assert [found[k] for k in found if not k.endswith("_se")] == pytest.approx(row, abs=0.15)


def test_the_papers_rows_are_as_printed():
    printed = json.loads(real("paper_tables.json").read_text())
    names = {"Base Llama-2-7b-Chat": "Base"}
    rows = {names.get(name, name): tuple(row) for t in "12" for name, row in printed[f"table{t}"].items()}
    assert rows == {name: row[2] for name, row in E.ROWS.items()} and len(rows) == 14


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


def attack(victim, folder, forget, lr="1e-3", base=None, protocol=None, name=None):
    base = base or victim.parent / "base"
    flags = (
        "--ckpt",
        victim,
        "--base",
        base,
        "--lr",
        lr,
        "--format",
        "cloze",
        *(("--name", name) if name else ()),
    )
    scores = summary(forget, 0.9) | ({"protocol": protocol} if protocol else {})
    put(folder, facts_of("recover.py", *flags) | {"parent": str(victim), "base": str(base)}, scores)
    log = [{"phase": "step", "step": s, "loss": 3.0 - s / 100 - forget} for s in range(10, 50, 10)]
    for s in (0, 20, 40):
        log += [{"phase": "accuracy", "step": s, "forget": 0.25 + (forget - 0.25) * s / 40, "retain": 0.9}]
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
        attack(world / "base", world / "base" / "recovered", 0.96)
        for i, (name, command) in enumerate(COMMANDS.items()):
            run = world / name.replace("/", "-")
            facts = facts_of(command, "--seed", w) | {"base": str(world / "base")}
            put(run, facts, summary(0.3 + 0.01 * i, 0.98))
            attack(run, run / "recovered", 0.35 + 0.03 * i + 0.1 * w)
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


def test_the_tables_have_all_rows_of_the_paper_in_its_order_named_by_their_commands(worlds):
    assert [E.title(facts_of(command)) for command in COMMANDS.values()] == [*COMMANDS][:6] + [*COMMANDS][6:]
    rows = E.rows_under(worlds, "cloze")
    one, two = cells(E.tables(rows))[1], cells(E.tables(rows))[2]
    paper = {t: [name for name, row in E.ROWS.items() if row[0] == t] for t in (1, 2)}
    assert list(one) == [*paper[1], E.CONTROL] and list(two) == paper[2] and "missing" not in E.tables(rows)
    assert one["RMAT"][3] == "55.0 ± 5.0" and one["RMAT"][-1] == "2"  # 50 and 60 in worlds 0 and 1
    assert one["Base"][0] == "99.0 ± 1.0" and one["Base"][3] == "96.0 ± 0.0"
    assert one[E.CONTROL][3] == "24.0 ± 0.0"
    assert one["Adversarial Probes"] == two["AdvProbes-5 (IDK, Frz.)"]
    printed = E.tables(rows, paper=True).splitlines()
    below = printed[next(i for i, line in enumerate(printed) if line.startswith("| RMAT |")) + 1]
    assert below == "| *paper* | *25.4* | *41.2* | *20.3* | *38.9* | *40.4* | *13.6* | *17.0* | |"


def test_a_single_run_has_the_errors_of_its_questions_and_missing_rows_their_commands(worlds):
    assert cells(E.tables(E.rows_under(worlds / "world1", "cloze")))[1]["RMAT"][3] == "60.0 ± 3.0"
    only = E.tables({"RMAT": E.rows_under(worlds, "cloze")["RMAT"]})
    commands = {name: row[1] for name, row in E.ROWS.items() if row[0] == 1}
    assert "Table 2" not in only and all((c in only) == (n != "RMAT") for n, c in commands.items())


def test_an_attack_written_elsewhere_is_in_its_victims_row_and_two_attacks_are_two_rows(worlds, tmp_path):
    victim = worlds / "world0" / "RMAT"
    attack(victim, tmp_path / "mine", 0.7)
    ((name, (run,)),) = E.rows_under(tmp_path, "cloze").items()
    assert name == "RMAT" and run["attack"] == (tmp_path / "mine").resolve()
    attack(victim, tmp_path / "harder", 0.8, lr="3e-3")
    assert set(E.rows_under(tmp_path, "cloze")) == {"RMAT (RMAT, mine)", "RMAT (RMAT, harder)"}


P = {"format": "cloze", "questions": "p" * 16}


def method(folder, base, *flags, protocol=P, forget=0.3):
    """A Random Mapping run from `base`, attacked, all scored with a protocol."""
    facts = facts_of("random_mapping.py", "--model", base, *flags)
    facts |= {"base": str(base), "parent": str(base), "data": facts["arguments"]["data"]}
    put(folder, facts, summary(forget, 0.9) | {"protocol": protocol})
    attack(folder, folder / "recovered", 0.5, base=base, protocol=protocol)


def test_runs_are_one_row_only_if_they_differ_in_seed_or_world(tmp_path):
    for w in (0, 1):
        base = tmp_path / f"world{w}" / "base"
        put(base, {"script": "tests/tiny/train.py", "arguments": {"filtered": False}}, summary(1, 1))
        method(tmp_path / f"world{w}" / "rm", base, "--seed", w, protocol=None)
    rows = E.rows_under(tmp_path, "cloze")
    assert {name: len(runs) for name, runs in rows.items()} == {"Random Mapping": 2}
    for name in ("llama", "mistral"):  # other base models: rows of their own, and every run is in one
        put(tmp_path / name, {"script": "x.py", "arguments": {}}, summary(0.6, 0.5) | {"protocol": P})
        (tmp_path / name / "args.json").unlink()
        method(tmp_path / f"of_{name}" / "rm", tmp_path / name)
    method(tmp_path / "of_llama" / "seed1", tmp_path / "llama", "--seed", 1, "--save-every", 3)
    method(tmp_path / "of_llama" / "data", tmp_path / "llama", "--data", "other")
    method(tmp_path / "of_llama" / "lr", tmp_path / "llama", "--lr", "1e-3")
    rows = E.rows_under(tmp_path, "cloze")
    assert sorted(map(len, rows.values())) == [1, 1, 1, 2, 2] and len(set(rows)) == 5


def test_a_run_whose_scores_are_of_other_questions_is_left_out(tmp_path, capsys):
    base = tmp_path / "base"
    put(
        base,
        {"script": "tests/tiny/train.py", "arguments": {"filtered": False}},
        summary(1, 1) | {"protocol": {"questions": "q"}},
    )
    method(tmp_path / "rm", base, protocol=P)
    assert E.rows_under(tmp_path, "cloze") == {} and "other questions" in capsys.readouterr().err


def test_a_foreign_checkpoint_has_a_row_under_its_directorys_name_or_its_own(tmp_path):
    for name in ("theirs", "base"):
        put(tmp_path / name, {}, summary(0.4, 0.9))
        (tmp_path / name / "args.json").unlink()
    attack(tmp_path / "theirs", tmp_path / "theirs" / "recovered", 0.5, base=tmp_path / "base")
    assert list(E.rows_under(tmp_path, "cloze")) == ["theirs"]
    attack(tmp_path / "theirs", tmp_path / "again", 0.5, base=tmp_path / "base", name="RMU")
    assert set(E.rows_under(tmp_path, "cloze")) == {"theirs", "RMU"}


def test_a_run_that_was_attacked_in_the_other_format_is_a_row_without_the_attack(tmp_path):
    base = tmp_path / "base"
    put(base, {"script": "tests/tiny/train.py", "arguments": {"filtered": False}}, summary(1, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.json").write_text('{"of": "another program"}')
    method(tmp_path / "rm", base, protocol=None)
    (tmp_path / "rm" / "recovered" / "mmlu_cloze.json").unlink()
    ((name, (run,)),) = E.rows_under(tmp_path, "cloze").items()
    assert name == "Random Mapping" and run["attack"] is None and "| – |" in E.tables({name: [run]})


def test_scores_of_a_part_or_of_other_questions_do_not_replace_the_tables(tmp_path):
    whole, other = (summary(0.5, 0.5) | {"protocol": {"format": "cloze", "questions": q * 16}} for q in "ab")
    assert E.write_scores(tmp_path, whole, []) == tmp_path / "mmlu_cloze.json"
    before = (tmp_path / "mmlu_cloze.json").read_bytes()
    for more in ({}, {"part": True}):
        assert E.write_scores(tmp_path, other, [], **more) == tmp_path / "mmlu_cloze.bbbbbbbb.json"
    assert E.write_scores(tmp_path, whole, [], part=True) == tmp_path / "mmlu_cloze.aaaaaaaa.json"
    assert (tmp_path / "mmlu_cloze.json").read_bytes() == before
    assert E.write_scores(tmp_path, whole, []) == tmp_path / "mmlu_cloze.json"  # measured again: replaced


def test_the_rule_takes_the_gentlest_setting_that_forgets_and_keeps_the_retain_set():
    def found(**scores):
        order = dict(zip("abcdef", T.grid("random_mapping")))  # gentlest first
        assert [math.prod(s) for s in order.values()] == sorted(map(math.prod, order.values()))
        return {order[k]: summary(f, r) for k, (f, r) in scores.items()}, order

    known = summary(1.0, 1.0), summary(0.25, 1.0)  # base and control, each with an error of 3 points
    for expected, scores in (
        ("c", {"a": (0.9, 1.0), "c": (0.33, 0.95), "d": (0.25, 1.0), "f": (0.2, 0.99)}),  # within two errors
        ("d", {"a": (0.9, 1.0), "c": (0.34, 1.0), "d": (0.33, 1.0), "f": (0.2, 1.0)}),  # just outside them
        ("d", {"a": (0.9, 1.0), "c": (0.25, 0.94), "d": (0.25, 0.96)}),  # c costs too much
        ("b", {"a": (0.9, 1.0), "b": (0.6, 0.97), "c": (0.7, 1.0), "f": (0.3, 0.9)}),  # none: the nearest
        ("e", {"a": (0.9, 0.5), "e": (0.9, 0.94), "f": (0.25, 0.6)}),  # none is cheap: the cheapest
    ):
        summaries, order = found(**scores)
        assert T.choose(summaries, *known) == order[expected], scores
    summaries, order = found(a=(0.25, 1.0), b=(0.25, 0.98), e=(0.25, 0.96), f=(0.2, 0.94))
    assert T.choose(summaries, *known, second=True) == order["e"]
    assert T.grid("rmat")[0] == (1e-3, 20) and len(T.grid("rmat")) == len(T.grid("adv_probes")) == 6


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
    assert steps == (0, 20, 40) and (means[-1], errors[-1]) == pytest.approx((0.55, 0.05))


def test_figures_without_matplotlib_are_one_line(worlds, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        figures.figures(worlds, E.rows_under(worlds, "cloze"), "cloze")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and "pip install -r tests/requirements.txt" in error


def swept(victim, folder, found):
    """A sweep on a victim: {attacker: [(forget, retain) by step]}, two subjects of 20 questions."""
    base = victim.parent / "base"
    for name, states in found.items():
        attack(victim, folder / name, states[-1][0])
        facts = json.loads((folder / name / "args.json").read_text()) | {"attacker": name}
        (folder / name / "args.json").write_text(json.dumps(facts))
        log = [{"phase": "accuracy", "step": 0, "forget": 0.3, "retain": 0.9, "base": 1.0, "base_se": 0.0}]
        for i, (forget, retain) in enumerate(states):
            right = "1" * round(40 * forget) + "0" * (40 - round(40 * forget))
            right = {"a": right, "b": right}
            accuracies = {"forget": forget, "retain": retain, "retain_se": 0.02}
            log += [{"phase": "accuracy", "step": i + 1, **accuracies, "right": right}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    return base


@pytest.fixture
def two_sweeps(tmp_path):
    """Random Mapping on two worlds, swept: 60 and 70 without damage, 100 with it."""
    for w, best in ((0, 0.6), (1, 0.7)):
        world = tmp_path / f"world{w}"
        put(world / "base", {"script": "x/train.py", "arguments": {"filtered": False}}, summary(1, 1))
        facts = facts_of("random_mapping.py", "--seed", w) | {"base": str(world / "base")}
        put(world / "rm", facts, summary(0.3, 0.9))
        found = {"paper": [(0.4, 0.9)], "mix": [(best, 0.85), (0.5, 0.9)], "lr_10x": [(1.0, 0.5)]}
        swept(world / "rm", world / "rm" / "sweep", found)
    return tmp_path


def test_the_worst_case_of_swept_rows(two_sweeps):
    rows = E.rows_under(two_sweeps, "cloze")
    text = E.tables(rows)
    first = cells(text.split("Worst")[0])[1]
    assert first["Random Mapping"][3] == "40.0 ± 0.0"  # its attack is the sweep's "paper"
    line = next(x for x in text.split("Worst case")[1].splitlines() if x.startswith("| Random Mapping"))
    line = [cell.strip() for cell in line.split("|")[1:-1]]
    assert line[1:6] == ["30.0 ± 0.0", "90.0 ± 0.0", "mix x2", "65.0 ± 5.0", "85.0 ± 0.0"]
    low, high = map(float, line[7].split(" to "))
    assert line[6] == "0.53" and low < 0.53 < high and line[8:] == ["65.0", "2 of 6", "2"]
    assert E.rows_under(two_sweeps, "letter") == {}


def test_a_damaged_composite_has_a_mark(two_sweeps):
    assert "†" not in E.tables(E.rows_under(two_sweeps, "cloze"))
    path = two_sweeps / "world0" / "rm" / "sweep" / "paper" / "mmlu_cloze.json"
    path.write_text(json.dumps(summary(0.4, 0.7)))
    text = E.tables(E.rows_under(two_sweeps, "cloze"))
    assert next(x for x in text.splitlines() if x.startswith("| Random Mapping")).endswith("† | 2 |")
    assert "† in at least one run, the attack cost more than 10 points" in text


def test_the_tables_as_csv_json_and_latex(two_sweeps, capsys):
    rows = E.rows_under(two_sweeps, "cloze")
    (found,) = json.loads(E.export(rows, "json"))
    expected = {"row": "Random Mapping", "runs": 2, "forget": 30, "worst": 65, "worst_attack": "mix x2"}
    assert {k: found[k] for k in expected} == expected and found["rho"] == pytest.approx(0.5333, abs=1e-3)
    (line,) = csv.DictReader(io.StringIO(E.export(rows, "csv")))
    assert line["composite"] == str(found["composite"]) and line.keys() == found.keys()
    latex = E.export(rows, "latex")
    assert latex.startswith(r"\begin{tabular}{l") and r"$65.0 \pm 5.0$" in latex and r"$0.53 \pm " in latex
    assert {x.count("&") for x in latex.splitlines() if "&" in x} == {latex.splitlines()[0].count("r") - 1}
    E.main(E.parse_args(["--table", str(two_sweeps), "--format", "cloze", "--to", "csv"]))
    assert capsys.readouterr().out.rstrip() == E.export(rows, "csv")


def test_a_model_card_says_what_is_known_and_leaves_a_users_own(two_sweeps):
    folder = two_sweeps / "world0" / "rm"
    E.show_sweep(folder / "sweep", ["paper", "mix", "lr_10x"])
    E.write_card(folder)
    text = (folder / "README.md").read_text()
    assert "# Random Mapping of" in text and "tags:\n- unlearning" in text and "lapisrocks/pile-bio" in text
    assert "| this model, scored by cloze | 30.0 ± 3.0 | 90.0 ± 3.0 |" in text
    assert "| after the worst of 3 attacks, mix | 60.0 ±" in text and str(two_sweeps) not in text
    (folder / "README.md").write_text("mine")
    E.write_card(folder)
    assert (folder / "README.md").read_text() == "mine"
    for other in (two_sweeps / "world0" / "base", folder / "sweep" / "paper"):  # no method's
        E.write_card(other)
        assert not (other / "README.md").exists()


def test_a_foreign_checkpoint_swept_in_part_is_a_row_of_its_own(tmp_path):
    for name in ("base", "theirs"):
        put(tmp_path / name, {"other": "program"}, summary(0.5, 0.9))
    swept(tmp_path / "theirs", tmp_path / "theirs" / "sweep", {"mix": [(0.6, 0.9)]})
    ((name, (run,)),) = E.rows_under(tmp_path, "cloze").items()
    assert name == "theirs" and run["recovered"] is None and run["sweep"].keys() == {"mix"}


def test_sweeps_of_one_checkpoint_in_two_folders_are_one_and_other_questions_another(two_sweeps, tmp_path):
    victim = tmp_path / "world0" / "rm"
    swept(victim, tmp_path / "more", {"lora": [(0.8, 0.9)]})
    attack(victim, tmp_path / "own", 0.5, protocol=P)  # one attack on other questions
    for folder in (victim, tmp_path / "world0" / "base"):
        scores = summary(0.4, 0.9) | {"protocol": P}
        (folder / f"mmlu_cloze.{P['questions'][:8]}.json").write_text(json.dumps(scores))
    runs = [run for runs in E.rows_under(tmp_path, "cloze").values() for run in runs]
    mine = {run["attack"].name: run for run in runs if run["folder"] == victim.resolve()}
    assert mine["paper"]["worst"]["attack"] == "lora" and mine["paper"]["worst"]["attackers"] == 4
    assert mine["own"]["worst"] is None and mine["own"]["theta"]["protocol"] == P


def test_passes_of_a_chain_of_runs(tmp_path):
    """A forward pass counts 1, a backward pass 2: RMAT's 300 and 20 steps at K = 4 are 2,340."""
    runs = {  # name: script, arguments, parent
        "base": ("tests/tiny/train.py", {}, "base"),
        "first": ("random_mapping.py", {"steps": 300}, "../base"),
        "second": ("rmat.py", {"rm_steps": 0, "K": 4, "N": 20}, "../first"),
        "whole": ("rmat.py", {"rm_steps": 300, "K": 4, "N": 20}, "../base"),
        "false": ("baselines.py", {"method": "overwriting", "steps": 1000}, "../base"),
        "hub": ("baselines.py", {"method": "max_entropy", "steps": 10}, "owner/model"),
    }
    for name, (script, arguments, parent) in runs.items():
        (tmp_path / name).mkdir()
        facts = {"script": script, "arguments": arguments, "parent": parent, "base": parent}
        (tmp_path / name / "args.json").write_text(json.dumps(facts))
    found = {name: figures.passes(tmp_path / name) for name in runs}
    assert found == {"base": 0, "first": 1800, "second": 2340, "whole": 2340, "false": 8000, "hub": 60}
