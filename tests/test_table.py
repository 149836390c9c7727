"""The paper's scores; Tables 1 and 2, the worst case and the figures from run directories."""

import csv
import importlib
import io
import json
import math
import statistics

import pytest
import torch

import evaluate_mmlu as E
import figures
from evaluate_mmlu import paper_scores, rows_under


def summary(forget, retain, se=0.03, **protocol):
    sides = {side: {"acc": acc, "se": se, "n": 200} for side, acc in (("forget", forget), ("retain", retain))}
    return sides | {"protocol": {"format": "cloze", "questions": "p" * 16} | protocol}


def test_the_papers_14_rows_follow_from_their_accuracies():
    """As printed, each number rounded to 0.1; Score_R does not see damage after the attack."""
    base = E.ROWS["Base"][2]
    for _, _, row in E.ROWS.values():
        pairs = [summary(x / 100, y / 100) for x, y in (base[:2], row[:2], row[3:5])]
        found = paper_scores(*pairs)
        assert [found[k] for k in found if not k.endswith("_se")] == pytest.approx(row, abs=0.15)
        damaged = paper_scores(*pairs[:2], summary(row[3] / 100, 0.1))
        assert damaged["composite"] == found["composite"] == (found["score_u"] + found["score_r"]) / 2


def test_standard_errors_against_simulation():
    torch.manual_seed(0)
    means, se = torch.tensor([[0.5, 0.4], [0.3, 0.38], [0.45, 0.39]]), 0.02
    drawn = [(means + se * torch.randn(3, 2)).tolist() for _ in range(4000)]
    rows = [paper_scores(*(summary(*pair) for pair in pairs)) for pairs in drawn]
    row = paper_scores(*(summary(*pair, se) for pair in means.tolist()))
    for k in ("score_u", "score_r", "composite"):
        assert row[k + "_se"] == pytest.approx(statistics.stdev(x[k] for x in rows), rel=0.05)


def base_of(folder):
    return str(next((p / "base" for p in folder.parents if (p / "base").exists()), folder))


def put(folder, command, forget, retain=0.9, protocol=(), **facts):
    """A finished run of a command, as the scripts write it, scored."""
    script, *flags = command.split()
    arguments = vars(importlib.import_module(script.removesuffix(".py")).parse_args(flags))
    base = base_of(folder)
    scores = summary(forget, retain, **dict(protocol))
    E.write_scores(folder, scores, [])
    own = dict(
        script=script, arguments=arguments, base=base, parent=base, protocol=scores["protocol"], tiny=True
    )
    (folder / "args.json").write_text(json.dumps(own | facts))


def attack(victim, *states, to="recovered", flags="", **facts):
    """Recovery, with what it logged: (forget, retain) by step, of two subjects of 20 questions."""
    command = f"recover.py --ckpt {victim} --base {victim} --format cloze {flags}"
    put(victim / to, command, *states[-1], **dict(parent=str(victim), base=base_of(victim)) | facts)
    log = [{"phase": "step", "step": s, "loss": 3.0 - s / 100} for s in range(10, 50, 10)]
    for i, (forget, retain) in enumerate([(0.3, 0.9), *states]):
        right = dict.fromkeys("ab", "1" * round(20 * forget) + "0" * round(20 - 20 * forget))
        entry = dict(phase="accuracy", step=20 * i, forget=forget, retain=retain, retain_se=0.02)
        log.append(entry | dict(right=right, base=1.0, base_se=0.0))
    (victim / to / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))


def mapped(folder, flags="", forget=0.3, **more):
    put(folder, f"random_mapping.py --steps 9 {flags}", forget, **more)
    attack(folder, (0.5, 0.9), **more)


def world(root, seed=0, **more):
    """The folder of a world with its base and its control."""
    for name, forget in (("base", 1.0), ("filtered", 0.25)):
        facts = dict(script="tests/tiny/train.py", arguments={"filtered": name == "filtered"})
        put(folder := root / f"world{seed}" / name, "rmat.py", forget, 1.0, **facts | more)
        known = json.loads((folder / "args.json").read_text())  # train.py names no base and no parent
        (folder / "args.json").write_text(
            json.dumps({k: x for k, x in known.items() if k not in ("base", "parent")})
        )
    return root / f"world{seed}"


@pytest.fixture
def sweeps(tmp_path):
    """Random Mapping, swept on two worlds: 60 and 70 without damage, 100 with it; on a third, not swept."""
    for w, best in ((0, 0.6), (1, 0.7), (2, None)):
        rm, control = (world(tmp_path, w) / name for name in ("rm", "filtered"))
        mapped(rm, f"--seed {w}", 0.3 if best else 0.6)
        found = {"paper": [(0.5, 0.9)], "mix": [(best, 0.85), (0.5, 0.9)], "lr_10x": [(1.0, 0.5)]}
        for name, states in found.items() if best else ():
            attack(rm, *states, to=f"sweep/{name}", attacker=name)
            attack(control, (0.3, 0.9), to=f"sweep/{name}", attacker=name)
    return tmp_path


def columns(root):
    return {name: E.columns(runs) for name, runs in rows_under(root, "cloze").items()}


def printed(rows):
    """{table: {row: its cells}} of printed Markdown, without the heads."""
    found = {}
    for line in E.tables(rows).splitlines():
        if line.startswith(("Table", "Worst")):
            part = found[line] = {}
        elif line.startswith("| ") and line[2] != "|":
            name, *part[name] = [cell.strip() for cell in line.split("|")[1:-1]]
    return found


def test_the_tables_have_all_rows_of_the_paper_in_its_order_named_by_their_commands(tmp_path):
    for w in (0, 1):
        folder = world(tmp_path, w)
        attack(folder / "filtered", (0.24, 0.9))
        attack(folder / "base", (0.95 + 0.02 * w, 0.9))
        for i, command in enumerate(dict.fromkeys(row[1] for row in [*E.ROWS.values()][1:])):
            put(folder / f"run{i}", f"{command} --seed {w}", 0.3 + 0.01 * i, 0.98)
            attack(folder / f"run{i}", (0.35 + 0.03 * i + 0.1 * w, 0.9))
    every = columns(tmp_path)
    one, two = printed(every).values()
    first, second = ([name for name, row in E.ROWS.items() if row[0] == n] for n in (1, 2))
    assert [*one] == [*first, E.CONTROL] and [*two] == second and len(first + second) == 14
    assert one["RMAT"][3] == "58.0 ± 5.0" and one["RMAT"][-1] == "2"  # 53 and 63 in worlds 0 and 1
    assert one["Base"][3] == "96.0 ± 1.0" and one[E.CONTROL][3] == "24.0 ± 0.0"
    assert one["Adversarial Probes"] == two["AdvProbes-5 (IDK, Frz.)"]
    assert printed(columns(folder))["Table 1"]["RMAT"][3] == "63.0 ± 3.0"  # of its questions
    rows = {name: every[name] for name in ("RMAT", "AdvProbes-5 (IDK, Frz.)")}  # no Table 2
    lacking = [name for name in first if E.ROWS[name][1] not in E.tables(rows)]
    assert [*printed(rows)] == ["Table 1"] and lacking == ["Adversarial Probes", "RMAT"]
    assert "missing" in E.tables(rows) and "missing" not in E.tables(every)
    below = "\n| *paper* | *25.4* | *41.2* | *20.3* | *38.9* | *40.4* | *13.6* | *17.0* | |"
    assert E.tables(rows, paper=True).split("| RMAT |")[1].split(" | 2 |")[1].startswith(below)


def test_runs_are_one_row_only_if_they_differ_in_seed_or_world(tmp_path):
    """Every other run and attack has its row, and a foreign checkpoint, and a base that was not attacked."""
    for seed in (0, 1):
        mapped(world(tmp_path, seed) / "rm", f"--seed {seed}")
    assert [*columns(tmp_path)] == ["base", "Random Mapping", E.CONTROL]
    assert columns(tmp_path / "world0/rm")["base"]["forget"] == 100  # which lies elsewhere
    for i, flags in enumerate(("--lr 1e-3", "--lr 1e-4", "--tokens 99", "--model a/b", "--data b.csv")):
        mapped(tmp_path / f"world0/{i}/rm", flags)
    for i, flags in enumerate(("--lr 3e-3", "--recovery b.zip", "--seed 1")):  # the last one: of the same row
        attack(tmp_path / "world0/rm", (0.8 - 0.3 * (i > 0), 0.9), to=tmp_path / f"attack{i}", flags=flags)
    attack(tmp_path / "world0/rm", (0.2, 0.9), to=tmp_path / "x", flags="--seed 1")  # again: not a run more
    found = [runs for name, runs in rows_under(tmp_path, "cloze").items() if "Random" in name]
    assert sorted(map(len, found)) == [1] * 7 + [3]
    assert sorted(run["recovered"]["forget"]["acc"] for runs in found for run in runs) == [0.5] * 9 + [0.8]
    E.write_scores(tmp_path / "world0/theirs", summary(0.4, 0.9), [])
    attack(tmp_path / "world0/theirs", (0.5, 0.9))
    assert "theirs" in rows_under(tmp_path, "cloze")


def test_scores_compare_only_if_they_are_of_the_same_questions_and_format(tmp_path):
    _, rm, _ = folders = [world(tmp_path) / name for name in ("base", "rm", "rm/recovered")]

    def found(form="cloze"):
        rows = [run for name, runs in rows_under(tmp_path, form).items() if "Random" in name for run in runs]
        return sorted([round(x[k]["forget"]["acc"], 9) for k in ("base", "theta", "recovered")] for x in rows)

    other = dict(questions="q" * 16, usual=False)
    mapped(rm, protocol=other | dict(usual=True))
    assert found() == []
    for folder in (rm, rm / "recovered"):  # scores of other questions are never overwritten
        (folder / "mmlu_cloze.json").unlink()
    mapped(rm)
    for letter in "qstuvwxyz":  # scored again on other questions, and by letters
        for folder, forget in zip(folders, (0.9, 0.4, 0.7)):
            E.write_scores(folder, summary(forget, 0.9, questions=letter * 16, usual=False), [])
            E.write_scores(folder, summary(forget - 0.1, 0.9, format="letter"), [])
    assert found() == [[1.0, 0.3, 0.5]] and found("letter") == [[0.8, 0.3, 0.6]]
    attack(rm, (0.6, 0.9), to=tmp_path / "own", flags="--shots 2", protocol=other)
    assert "Random Mapping (own, qqqqqqqq)" in rows_under(tmp_path, "cloze")
    bases = [runs for name, runs in rows_under(tmp_path, "cloze").items() if name.startswith("base")]
    assert sorted(run["theta"]["forget"]["acc"] for runs in bases for run in runs) == [0.9, 1.0]
    assert found() == [[0.9, 0.4, 0.6], [1.0, 0.3, 0.5]] and found("letter") == [[0.8, 0.3, 0.6]]


def test_the_base_of_a_row_is_the_one_that_the_attack_was_given(tmp_path):
    base, rm = (world(tmp_path) / name for name in ("base", "rm"))
    put(tmp_path / "elsewhere", "rmat.py", 0.8)
    mapped(rm, base=str(tmp_path / "gone"))
    assert "Random Mapping" not in rows_under(tmp_path, "cloze")
    for other, forget in ((base, 1.0), (tmp_path / "elsewhere", 0.8)):
        attack(rm, (0.5, 0.9), base=str(other))
        (run,) = rows_under(tmp_path, "cloze")["Random Mapping"]
        assert run["base"]["forget"]["acc"] == forget


def test_a_bases_scores_are_those_of_the_same_questions_whatever_their_file_is_called(tmp_path):
    base, rm = (world(tmp_path, tiny=False) / name for name in ("base", "rm"))
    (base / "mmlu_cloze.json").rename(base / "mmlu_cloze.12345678.json")  # first it was scored on all of MMLU
    E.write_scores(base, summary(0.6, 0.6, questions="z" * 16), [])
    mapped(rm, tiny=False)
    assert rows_under(tmp_path, "cloze")["Random Mapping"][0]["base"]["forget"]["acc"] == 1.0
    (rm / "mmlu_cloze.json").rename(rm / "mmlu_cloze.12345678.json")  # and so was the run
    E.write_scores(rm, summary(0.7, 0.6, questions="z" * 16), [])
    found = [run["theta"]["forget"]["acc"] for runs in rows_under(tmp_path, "cloze").values() for run in runs]
    assert sorted(found) == [0.25, 0.3, 0.6, 0.7, 1.0]  # the control; of either set run and base


def test_a_checkpoint_that_was_attacked_with_two_bases_has_a_row_with_each(tmp_path):
    """The first one without --base: as a base itself."""
    E.write_scores(theirs := world(tmp_path) / "theirs", summary(0.3, 0.9), [])
    attack(theirs, (0.4, 0.9), base=str(theirs))
    attack(theirs, (0.6, 0.9), to="again")
    found = columns(tmp_path)
    assert [found[name]["forget_recovered"] for name in ("Base", "theirs")] == pytest.approx([40, 60])
    assert found["theirs"]["score_u"] == pytest.approx(60) and found["Base"]["score_u"] == 0


def test_bases_that_are_no_worlds_are_rows_of_their_own(tmp_path):
    for name, forget in (("llama", 0.8), ("qwen", 0.6)):
        put(tmp_path / name / "rm", "random_mapping.py", 0.3, tiny=False, base=str(tmp_path / name / "base"))
        E.write_scores(tmp_path / name / "base", summary(forget, 0.9), [])
    assert sorted(row["forget"] for row in columns(tmp_path).values()) == pytest.approx([30, 30, 60, 80])


def test_attacks_on_one_checkpoint_are_not_runs_of_its_method(sweeps):
    """And those without a sweep count for its worst case."""
    rm, one = sweeps / "world0/rm", columns(sweeps / "world0")["Random Mapping"]
    for seed in (1, 2):
        attack(rm, (0.5 + seed / 10, 0.9), to=f"again{seed}", flags=f"--seed {seed}")
    row = columns(sweeps / "world0")["Random Mapping"]
    assert (
        row["runs"] == 3 and row["forget_recovered"] == pytest.approx(60) and row["forget_recovered_se"] > 5
    )
    keys = ("forget", "forget_se", "swept_forget", "retain", "score_u_se", "swept")
    assert all(row[k] == one[k] for k in keys) and row["worst_se"] > 5
    found = [(x["worst_attack"], x["worst"], x["attackers"]) for x in (one, row)]
    assert found == [("mix", pytest.approx(60), 4), ("again2", pytest.approx(70), 6)]
    attack(rm, (0.65, 0.9), to="early", flags="--lr 1e-4")  # a row of its own, and not the first one
    attack(rm, (0.9, 0.9), to="letters", protocol={"format": "letter"})
    E.write_scores(rm / "letters", summary(0.6, 0.9), [])  # its steps were scored by letters
    attack(rm, (0.95, 0.5), to="mix", flags="--lr 5e-4")  # of the name of one of the sweep
    rows = columns(sweeps / "world0")
    assert rows["Random Mapping"]["forget_recovered"] == row["forget_recovered"]
    assert rows["Random Mapping"]["attackers"] == 8 and rows["Random Mapping"]["worst"] == row["worst"]
    assert rows["Random Mapping (rm/early)"]["forget_recovered"] == pytest.approx(65)


def test_sweeps_with_other_flags_and_missing_scores_are_said(sweeps, capsys):
    attack(sweeps / "world1/rm", (0.7, 0.9), to="sweep/mix", attacker="mix", flags="--steps 9")
    (sweeps / "world2/base/mmlu_cloze.json").unlink()
    columns(sweeps)
    shown = capsys.readouterr().err
    assert "Random Mapping: its runs were swept by different attackers, or with other flags" in shown
    assert "world2/rm: not in the tables: score it and its base" in shown and "control" not in shown


def test_a_base_at_chance_has_no_share_to_find(sweeps):
    for log in (sweeps / "world1/rm").rglob("metrics.jsonl"):
        log.write_text(log.read_text().replace('"base": 1.0', '"base": 0.25'))
    row = columns(sweeps)["Random Mapping"]
    assert math.isnan(row["rho"]) and row["worst"] == pytest.approx(65) and "nan" in E.tables(columns(sweeps))


def test_a_method_on_anothers_result_is_named_so(tmp_path):
    runs = ("--lr 1e-3", 0), ("--lr 1e-2", 1), ("--lr 1e-3 --seed 1", 0)
    for i, (flags, w) in enumerate(runs):  # other settings of the first: another row; another seed: the same
        first = world(tmp_path, w) / f"{i}/first"
        put(first, f"random_mapping.py {flags}", 0.5)
        put(first.parent / "second", f"mlac_ar.py --model {first}", 0.3 + i / 10, parent=str(first))
    names = "MLAC-AR on Random Mapping", "MLAC-AR on Random Mapping (world1/1/second)"
    assert [columns(tmp_path)[name]["forget"] for name in names] == pytest.approx([40, 40])
    assert columns(tmp_path)[names[0]]["runs"] == 2  # 30 and 50


def test_the_worst_case_is_of_the_swept_runs_alone_and_damage_has_a_mark(sweeps):
    row, found = columns(sweeps)["Random Mapping"], printed(columns(sweeps))
    keys = ("forget", "swept_forget", "worst", "worst_se", "rho", "rho_low", "rho_high")  # Student's interval
    assert [row[k] for k in keys] == pytest.approx([40, 30, 65, 5, 0.533, -0.314, 1.381], abs=1e-3)
    assert found["Worst case"]["Random Mapping"][-1] == "2" and "†" not in str(found)
    for to, best in (("more/mix", 0.8), ("x/mix", 0.2)):  # elsewhere, and of the same name: counts too
        attack(sweeps / "world0/rm", (best, 0.9), to=sweeps / to, attacker="mix")
    assert columns(sweeps)["Random Mapping"]["worst"] == pytest.approx(75)
    assert columns(sweeps)["Random Mapping"]["attackers"] == 4  # of the world with fewer
    E.write_scores(sweeps / "world2/rm/recovered", summary(0.4, 0.7), [])
    row = printed(columns(sweeps))["Table 1"]["Random Mapping"]
    assert row[-2].endswith("†") and row[-1] == "3" and "† in at least one run" in E.tables(columns(sweeps))


def test_the_tables_as_csv_json_and_latex(sweeps, capsys):
    def shown(to):
        E.main(E.parse_args(["--table", str(sweeps), "--format", "cloze", "--to", to]))
        return capsys.readouterr().out

    row, expected = json.loads(shown("json"))["Random Mapping"], {"forget": 40, "worst": 65, "runs": 3}
    assert {k: row[k] for k in expected} == pytest.approx(expected) and row["worst_attack"] == "mix"
    (line,) = [x for x in csv.DictReader(io.StringIO(shown("csv"))) if x[""] == "Random Mapping"]
    assert float(line["worst"]) == pytest.approx(65) and line.keys() >= row.keys()
    assert shown("latex").startswith("\\begin{tabular}") and "Random Mapping & " in shown("latex")


def test_figures_are_drawn(sweeps):
    """And show a row's mean and standard error by step."""
    rows, drawn = rows_under(sweeps, "cloze"), ("figure2", "figure3", "worst")
    figures.figures(sweeps, rows, "cloze")
    sizes = {p.name: p.stat().st_size for p in (sweeps / "figures").iterdir()}
    assert {*sizes} == {f"{x}.{end}" for x in drawn for end in ("png", "svg")} and min(sizes.values()) > 9000
    attack(sweeps / "world1/rm", (0.7, 0.9))
    runs = rows_under(sweeps, "cloze")["Random Mapping"][:2]
    steps, means, errors = figures.curves(runs, "cloze", "accuracy", "forget", 100)
    assert steps == [0, 20] and means == pytest.approx([30, 60]) and errors == pytest.approx([0, 10])
    attack(sweeps / "world1/rm", (0.7, 0.9), (0.8, 0.9))  # a step that the other attack did not score
    assert figures.curves(runs, "cloze", "accuracy", "forget", 100)[0] == steps
