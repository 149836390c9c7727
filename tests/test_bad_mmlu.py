"""Scoring with bad input: questions, flags, and files that a checkpoint brings along. One line, exit status
2; a table leaves out what is broken and prints the rest."""

import errno
import json
import os
import re
import shutil

import pytest
from conftest import WORLD, toy_model, write_csvs
from test_loaders import hub_layout
from test_mmlu import bpe, words
from test_scripts import call, refused
from test_table import facts_of, method, put, summary, swept

import evaluate_mmlu as E
import recover as R

BASE = WORLD / "base"
ROW = {"question": "Which?", "choices": ["a", "None", "c", "d"], "answer": 1}
LINE = b"Which?,a,None,c,d,B\n"


def csvs(folder, mmlu, data):
    """MMLU as CSVs, the test questions of astronomy being `data`."""
    write_csvs(folder, mmlu)
    (folder / "test" / "astronomy_test.csv").write_bytes(data)


def parquet(folder, mmlu, row):
    """MMLU in the hub's layout, one test question being `row`; letters for answers if its answer is one."""
    question = tuple((ROW | row).values())
    kind = (lambda answer: "ABCD"[answer]) if isinstance(question[2], str) else int
    whole = {s: [[(q, c, kind(a)) for q, c, a in part] for part in parts] for s, parts in mmlu.items()}
    whole["astronomy"][1][2] = question
    hub_layout(folder, whole)


def folder_of(make):
    """Flags for MMLU in a folder in which make(folder) wrote it."""

    def flags(folder, mmlu):
        make(folder)
        return "--mmlu", folder

    return flags


def own(row, name="q.jsonl"):
    """Flags for questions of one's own, the second of them `row`."""

    def flags(folder, mmlu):
        write_csvs(folder / "mmlu", mmlu)
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in (ROW, ROW | row)))
        return "--mmlu", folder / "mmlu", "--questions", folder / name

    return flags


def made(maker, value):
    """Flags for the MMLU that a maker wrote with a bad value."""

    def flags(folder, mmlu):
        maker(folder, mmlu, value)
        return "--mmlu", folder

    return flags


def with_flags(*more, skip=()):
    """Flags beside those of a good MMLU without the files in `skip`."""

    def flags(folder, mmlu):
        write_csvs(folder, mmlu)
        for name in skip:
            (folder / name).unlink()
        return "--mmlu", folder, *more

    return flags


NEEDS = "needs a question, four choices, an answer"
FILES = {  # name: flags, what the line says
    "csv: five columns": (made(csvs, LINE + b"Which?,a,b,c,B\n"), f"astronomy_test.csv: row 1: {NEEDS}"),
    "csv: an empty line": (made(csvs, LINE + b"\n" + LINE), f"row 1: {NEEDS}"),
    "csv: an empty choice": (made(csvs, LINE.replace(b"None", b" ")), f"row 0: {NEEDS}"),
    "csv: a number": (made(csvs, LINE.replace(b"B", b"1")), f"row 0: {NEEDS}"),
    "csv: empty": (made(csvs, b""), "astronomy_test.csv: no questions in it"),
    "csv: a field of 200 kB": (made(csvs, LINE.replace(b"c", b"c" * 200_000)), "field larger"),
    "csv: Latin-1": (made(csvs, LINE.replace(b"a", b"\xe9")), "astronomy_test.csv: cannot be read ('utf-8'"),
    "parquet: three choices": (made(parquet, {"choices": ["a", "b", "c"]}), f"test: row 14: {NEEDS}"),
    "parquet: a null choice": (made(parquet, {"choices": ["a", None, "c", "d"]}), f"test: row 14: {NEEDS}"),
    "parquet: null choices": (made(parquet, {"choices": None}), f"test: row 14: {NEEDS}"),
    "parquet: null question": (made(parquet, {"question": None}), f"test: row 14: {NEEDS}"),
    "parquet: answer -1": (made(parquet, {"answer": -1}), f"test: row 14: {NEEDS}"),
    "parquet: answer 7": (made(parquet, {"answer": 7}), f"test: row 14: {NEEDS}"),
    "parquet: answer null": (made(parquet, {"answer": None}), f"test: row 14: {NEEDS}"),
    "parquet: answer '7'": (made(parquet, {"answer": "7"}), f"test: row 14: {NEEDS}"),
    "json: answer 'E'": (own({"answer": "E"}), f"q.jsonl: row 1: {NEEDS}"),
    "json: answer '7'": (own({"answer": "7"}), f"q.jsonl: row 1: {NEEDS}"),
    "json: answer 1.5": (own({"answer": 1.5}), f"q.jsonl: row 1: {NEEDS}"),
    "json: three choices": (own({"choices": ["a", "b", "c"]}), f"q.jsonl: row 1: {NEEDS}"),
    "json: a blank question": (own({"question": " \n"}), f"q.jsonl: row 1: {NEEDS}"),
    "folder: empty": (folder_of(lambda folder: None), "neither dev/SUBJECT_dev.csv nor all/*.parquet"),
    "folder: no layout": (
        folder_of(lambda f: (f / "x.csv").write_bytes(LINE)),
        "neither dev/SUBJECT_dev.csv",
    ),
    "folder: a subject missing": (
        with_flags(skip=["dev/college_biology_dev.csv"]),
        "biology_dev.csv is missing",
    ),
    "no such folder": (lambda *_: ("--mmlu", "./nowhere"), "no such file or folder"),
    "split": (with_flags("--split", "validation"), "astronomy_val.csv is missing"),
    "subject": (with_flags("--subjects", "alchemy"), "alchemy_dev.csv is missing"),
    "forget subject": (with_flags("--forget-subjects", "alchemy"), "alchemy_dev.csv is missing"),
    "all forget": (
        with_flags("--forget-subjects", "astronomy", "college_biology", "high_school_biology"),
        "no subject of the retain set",
    ),
    "a retain subject's name": (own({}, "astronomy.jsonl"), "astronomy is a subject of the retain set"),
}


@pytest.mark.parametrize("name", FILES)
def test_questions_that_cannot_be_used(tmp_path, mmlu, name, capsys):
    make, says = FILES[name]
    (tmp_path / "in").mkdir()
    flags = make(tmp_path / "in", mmlu)
    capsys.readouterr()  # what the making printed
    flags = ("--ckpt", BASE, *flags, "--out", tmp_path / "out")
    refused(capsys, "evaluate_mmlu", *flags, says=says, out=tmp_path / "out")


def test_a_missing_split_of_parquet_and_a_byte_order_mark(tmp_path, mmlu, capsys):
    parquet(tmp_path / "hub", mmlu, {})
    flags = ("--ckpt", BASE, "--mmlu", tmp_path / "hub", "--split", "validation")
    refused(capsys, "evaluate_mmlu", *flags, says="all/validation-*.parquet is missing")
    csvs(tmp_path / "csv", mmlu, b"\xef\xbb\xbf" + LINE)
    assert E.load_mmlu(tmp_path / "csv")["astronomy"][1] == [("Which?", ["a", "None", "c", "d"], 1)]


FLAGS = {  # of a good checkpoint and a good MMLU
    "--out ''": (("--out", ""), "--out ''"),
    "--out, a file": (("--out", "FOLDER/file"), "choose another"),
    "--out, in a file": (("--out", "FOLDER/file/x"), "choose another"),
    "--out, a name of 300": (("--out", "x" * 300), "choose another"),
    "--shots": (("--shots", "6"), "--shots goes from 0 to 5"),
    "--tokens": (("--tokens", "0"), "--tokens starts at 1"),
    "two, the second broken": (("--ckpt", BASE, "FOLDER"), "no config.json"),
    "--ckpt, a name of 300": (("--ckpt", "x" * 300), "File name too long"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_cannot_be_used(tmp_path, mmlu, name, capsys, monkeypatch):
    flags, says = FLAGS[name]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(E, "score_mmlu", lambda *_: pytest.fail("scored before all was checked"))
    flags = [str(flag).replace("FOLDER", str(tmp_path)) for flag in flags]
    refused(capsys, "evaluate_mmlu", "--tiny", "--ckpt", BASE, *flags, says=says)


def test_a_table_of_a_directory_that_is_not_there(tmp_path, capsys):
    refused(capsys, "evaluate_mmlu", "--table", tmp_path / "x", says="no such directory")


def test_prompts_longer_than_the_context_are_refused_before_the_first_pass(mmlu, capsys):
    tokenizer = bpe(words(mmlu))
    model = toy_model(vocab=len(tokenizer), max_position_embeddings=100)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    short = {"zoology": ([], [("Which?", ["a", "b", "c", "d"], 1)])} | mmlu  # the first subject fits
    with pytest.raises(SystemExit) as stop:
        E.score_mmlu(model, tokenizer, short)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    assert "high_school_biology: prompts of" in error and "context is 100; lower --shots" in error


BROKEN = {  # an args.json
    "broken JSON": b"{",
    "empty": b"",
    "binary": bytes(range(128, 256)),
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a number": b"7",
    "arguments null": b'{"script": "rmat.py", "arguments": null}',
    "base a number": b'{"script": "rmat.py", "arguments": {}, "base": 7}',
    "base a NUL": b'{"script": "rmat.py", "arguments": {}, "base": "\\u0000", "tiny": true}',
}


@pytest.mark.parametrize("script", ["evaluate_mmlu", "recover"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_with_a_broken_args_json(tmp_path, script, name, capsys):
    (tmp_path / "args.json").write_bytes(BROKEN[name])
    refused(capsys, script, "--ckpt", tmp_path, says="restore or delete it")


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--lr", "nan"), "--lr"),
        (("--lr", "infx"), "--lr"),
        (("--steps", "infx"), "--steps inf"),
        (("--retain-mix", "nan"), "--retain-mix"),
        (("--weight-decay", "inf"), "--weight-decay"),
        (("--clip", "nan"), "--clip"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**63)), "--seed"),
        (("--shots", "6"), "--shots"),
        (("--tokens", "0"), "--tokens"),
        (("--out", ""), "--out"),
        (("--sweep", "--shard", "²/2"), "--shard"),
        (("--tiny", "--ckpt", "FOLDER"), "is not the miniature's; give --base"),
        (("--tiny", "--ckpt", "owner/model"), "is not the miniature's; give --base"),
    ],
)
def test_flags_of_recover(tmp_path, flags, says, capsys):
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    refused(capsys, "recover", "--ckpt", BASE, *flags, says=says)


def test_another_programs_args_json_says_nothing_about_a_base(tmp_path):
    (tmp_path / "args.json").write_text('{"base": 7, "arguments": null}')
    assert R.parse_args(["--ckpt", str(tmp_path)]).base == str(tmp_path)
    assert R.parse_args(["--ckpt", str(tmp_path), "--tiny", "--base", "x"]).base == "x"
    assert E.parse_args(["--ckpt", str(tmp_path)]).mmlu == "cais/mmlu"


# ---- scores that cannot be written where the model is


def locked(monkeypatch, *folders):
    """As if these directories could only be read: root may write anywhere."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) not in map(str, folders) and real(path, mode)
    )


def test_scores_of_a_directory_that_cannot_be_written_are_kept_under_out(tmp_path, mmlu, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "base"
    shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("mmlu*", "README.md"))
    before, (_, other) = sorted(model.iterdir()), E.places(model)
    locked(monkeypatch, model)
    few = ("--subjects", *E.FORGET, "astronomy")
    call("evaluate_mmlu", "--ckpt", model, "--mmlu", WORLD / "mmlu", *few)
    assert sorted(model.iterdir()) == before and other.name.startswith("base-") and other.parts[0] == "out"
    (found,) = other.glob("mmlu.*.json")
    assert str(found) in capsys.readouterr().out and not [*other.glob("*.draft")]
    mine = json.loads(found.read_text())["protocol"]
    assert E.kept_scores(model, mine, "letter") == found and len(E.read_answers(found)) == 324
    shutil.copy(found, model)  # a directory that can only be read may have scores of its own
    assert E.kept_scores(model, mine, "letter") == model / found.name
    shutil.copytree(model, tmp_path / "x" / "base")  # another one of that name
    assert E.places(tmp_path / "x" / "base")[1] != other


def test_scores_of_a_base_that_cannot_be_written_are_in_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "base", {"script": "x/train.py", "arguments": {}}, summary(1, 1))
    method(tmp_path / "rm", tmp_path / "base", protocol=None)
    place = E.places(tmp_path / "base")[1]
    place.mkdir(parents=True)
    (tmp_path / "base" / "mmlu_cloze.json").rename(place / "mmlu_cloze.json")
    locked(monkeypatch, tmp_path / "base")
    assert list(E.rows_under(tmp_path / "rm", "cloze")) == ["Random Mapping"]


def test_scores_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(E, "write_text", full)
    with pytest.raises(SystemExit) as stop:
        call("evaluate_mmlu", "--tiny", "--ckpt", BASE, "--subjects", *E.FORGET, "--out", tmp_path / "out")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and "NOT WRITTEN" in out and "\n" not in error.strip()
    kept = json.loads(error[error.index("{") :])
    assert "No space left" in error and kept["forget"]["n"] == 216
    assert not [*(tmp_path / "out").iterdir()]


def test_the_answers_are_there_before_the_scores_and_neither_in_part(tmp_path, monkeypatch):
    order, real = [], type(tmp_path).replace
    whole = summary(0.5, 0.5) | {"protocol": {"format": "letter", "questions": "a"}}
    monkeypatch.setattr(type(tmp_path), "replace", lambda p, q: (order.append(p.name), real(p, q))[1])
    E.write_scores(tmp_path, whole, [{"subject": "a"}])
    assert [name.split(".")[1] for name in order] == ["jsonl", "json"]
    assert all(str(os.getpid()) in name for name in order)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmlu.json", "mmlu.jsonl"]


# ---- tables of directories with broken files

SCORES = {
    "broken JSON": b'{"forget": ',
    "binary": bytes(range(128, 256)),
    "a list": b"[1]",
    "no retain": b'{"forget": {"acc": 0.5, "se": 0.1}}',
    "NaN": json.dumps(summary(float("nan"), 0.9)).encode(),
    "huge": json.dumps(summary(10**400, 0.9)).encode(),
    "a text": json.dumps(summary("high", 0.9)).encode(),
    "a path as format": json.dumps(
        summary(0.5, 0.5) | {"protocol": {"format": "x/../../../NAME", "questions": "p"}}
    ).encode(),
    "a path as questions": json.dumps(
        summary(0.5, 0.5) | {"protocol": {"format": "cloze", "questions": "/../x"}}
    ).encode(),
}


@pytest.fixture
def runs(tmp_path):
    """A base and two runs from it, rmat's and `rm`, both attacked."""
    put(tmp_path / "base", {"script": "x/train.py", "arguments": {}}, summary(1, 1))
    method(tmp_path / "rm", tmp_path / "base", protocol=None)
    put(tmp_path / "rmat", facts_of("rmat.py") | {"base": str(tmp_path / "base")}, summary(0.3, 0.9))
    return tmp_path


def table(capsys, folder):
    """Rows of the first table and the lines on standard error."""
    E.main(E.parse_args(["--table", str(folder), "--format", "cloze"]))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    return [line.split("|")[1].strip() for line in out.splitlines() if line[:2] == "| "][1:], err.splitlines()


@pytest.mark.parametrize("name", [n for n in BROKEN if n != "a NUL"])
def test_a_run_with_a_broken_args_json_is_left_out_of_the_table(runs, name, capsys):
    assert table(capsys, runs) == (["base", "Random Mapping", "RMAT"], [])
    (runs / "rmat" / "args.json").write_bytes(BROKEN[name])
    rows, (line,) = table(capsys, runs)
    assert rows == ["base", "Random Mapping"] and line.startswith(f"left out: {runs / 'rmat'}: args.json")


@pytest.mark.parametrize("name", SCORES)
def test_a_run_with_broken_scores_is_left_out_of_the_table(runs, name, capsys):
    (runs / "rmat" / "mmlu_cloze.json").write_bytes(SCORES[name])
    rows, (line,) = table(capsys, runs)
    assert rows == ["base", "Random Mapping"] and line.startswith(
        f"left out: {runs / 'rmat'}: mmlu_cloze.json"
    )
    (runs / "rm" / "recovered" / "mmlu_cloze.json").write_bytes(SCORES[name])  # its attack's
    rows, lines = table(capsys, runs)
    assert rows == ["base", "Random Mapping"] and str(runs / "rm" / "recovered") in "".join(lines)


LOGS = {
    "torn": lambda text: text[:-9],
    "binary": lambda text: "\x00\x01",
    "empty": lambda text: "",
    "a list": lambda text: "[]\n",
    "an accuracy of 7": lambda text: text.replace('"forget": 0.6', '"forget": 7'),
    "no answers": lambda text: re.sub(r'"right": {[^}]*}', '"right": {}', text),
    "a null accuracy": lambda text: text.replace('"forget": 0.6', '"forget": null'),
    "other questions": lambda text: text.replace('"b": "', '"b": "1'),
    "other answers": lambda text: text.replace('"b": "1', '"b": "2'),
}


@pytest.mark.parametrize("name", LOGS)
def test_an_attacker_with_a_broken_log_is_left_out_of_the_sweep(runs, name, capsys):
    swept(runs / "rm", runs / "rm" / "sweep", {"a": [(0.5, 0.9)], "mix": [(0.6, 0.9)]})
    assert E.rows_under(runs, "cloze")["Random Mapping"][0]["sweep"].keys() == {"a", "mix"}  # control
    path = runs / "rm" / "sweep" / "mix" / "metrics.jsonl"
    path.write_text(LOGS[name](path.read_text()))
    found = E.rows_under(runs, "cloze")["Random Mapping"][0]
    (line,) = capsys.readouterr().err.splitlines()
    assert found["sweep"].keys() == {"a"} and found["worst"]["attack"] == "a"
    assert line.startswith(f"left out: {path.parent}: metrics.jsonl")
    assert "attackers: a at step" in E.show_sweep(runs / "rm" / "sweep", ["a", "mix"])


def test_a_copy_of_an_attack_is_no_attacker(runs):
    swept(runs / "rm", runs / "rm" / "sweep", {"a": [(0.5, 0.9)], "zz_copy": [(0.9, 0.9)]})
    assert "worst case of 1 attackers: a at step" in E.show_sweep(runs / "rm" / "sweep", ["a", "mix"])


def test_an_answer_is_no_truth_value_and_one_question_is_no_test(tmp_path, capsys):
    for answer, says in ((True, "needs a question"), (1, "one question has no")):
        row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": answer}
        (tmp_path / "q.json").write_text(json.dumps([row]))
        flags = ("--ckpt", BASE, "--questions", tmp_path / "q.json", "--out", tmp_path / "out")
        refused(capsys, "evaluate_mmlu", *flags, "--mmlu", f"{BASE}/../mmlu", says=says)


def test_names_out_of_files_cannot_reach_the_terminal_or_other_files(runs, capsys):
    bad = "\x1b[2J\x07\ud800"
    facts = facts_of("rmat.py") | {"base": str(runs / "base"), "script": f"{bad}.py"}
    facts["arguments"]["format"] = "x/../../../NAME"
    facts["arguments"]["data"] = f"me/{bad}"
    (runs / "rmat" / "args.json").write_text(json.dumps(facts))
    before = sorted(runs.rglob("*"))
    rows, lines = table(capsys, runs)
    assert r"\x1b[2J\x07\ud800" in rows and not lines and sorted(runs.rglob("*")) == before
    E.write_card(runs / "rmat")
    text = (runs / "rmat" / "README.md").read_text()
    assert r"# \x1b[2J\x07\ud800 of base" in text and r"me/\x1b" in text and "\x1b" not in text
    assert {*sorted(runs.rglob("*"))} - {*before} == {runs / "rmat" / "README.md"}
    assert "\x1b" not in E.visible(f"x{bad}") and E.visible("ρ, é, 🌱 x") == "ρ, é, 🌱 x"


def test_a_card_is_not_written_where_it_cannot_be(runs, monkeypatch, capsys):
    locked(monkeypatch, runs / "rmat")
    E.write_card(runs / "rmat")
    assert not (runs / "rmat" / "README.md").exists() and capsys.readouterr().err == ""
    (runs / "rm" / "README.md").write_bytes(b"\xff of the user")
    E.write_card(runs / "rm")
    assert (runs / "rm" / "README.md").read_bytes() == b"\xff of the user"


def test_broken_answers_are_one_line(tmp_path, capsys):
    for text in ('{"subject": "a", "prediction": "A"', '{"subject": "a", "prediction": 1, "answer": "A"}'):
        (tmp_path / "mmlu.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stop:
            E.read_answers(tmp_path / "mmlu.json")
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "restore or delete it" in error and "\n" not in error
