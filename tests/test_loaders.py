"""Every source of text and questions, in every layout it comes in; hub names with a local folder standing in.

Real files (../shared/data, where it is there) are read too; without them these cases skip themselves.
"""

import json
import zipfile

import datasets
import pytest
import zstandard
from conftest import WORLD, load_texts, real, write_csvs
from test_scripts import call, refused, run

from common import load_chunks, read_rows
from evaluate_mmlu import FORGET, load_mmlu, own_questions, protocol


CHUNKS = [
    {"text": f"s{i} text", "meta": {"pile_set_name": ("NIH ExPorter", "", "")[i % 3]}} for i in range(30)
]
PAIRS = [{"role_1": "B", "topic;": "t", "message_1": f"q {i}", "message_2": f"a\n{i}"} for i in range(12)]


def write(path, rows):
    """Rows in the format that the name says; a name without an ending: a folder of one-object JSON files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    data = "".join(lines).encode()
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for i, line in enumerate(lines):
                z.writestr(f"{i:03}_x.json", line)
    elif path.suffix:
        path.write_bytes(zstandard.ZstdCompressor().compress(data) if path.suffix == ".zst" else data)
    else:
        for i, row in enumerate(rows):
            write(path / f"{i:04}.json", [row])
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst", "c.parquet", "folder/part-00000.jsonl"])
@pytest.mark.parametrize("source", ["made", "real"])
def test_labelled_chunks(tmp_path, name, source):
    rows = CHUNKS
    if source == "real":
        rows = [json.loads(line) for line in open(real("pile/pile_small.jsonl"))]
    biology = {"PubMed Abstracts", "PubMed Central", "NIH ExPorter"}
    rows = [
        {"txt_chunk": f"<s>{r['text']}</s>", "label": r["meta"]["pile_set_name"] in biology} for r in rows
    ]
    path = write(tmp_path / name, rows)
    if "/" in name:
        (path.parent / "summary.json").write_text('{"chunks": 30}')  # beside what label_pile.py writes
        path = path.parent
    texts = [[r["txt_chunk"][3:-4].strip() for r in rows if r["label"] is label] for label in (True, False)]
    assert (
        load_chunks(str(path)) == tuple(texts) and min(map(len, texts)) >= 10
    )  # strip("<s>") would eat the s


@pytest.mark.parametrize("labels", [(1, 0), ("true", "false"), ("1", "0"), (True, False)])
@pytest.mark.parametrize("kind", ["csv", "disk", "jsonl"])
def test_labels_that_are_numbers_or_words(tmp_path, labels, kind, capsys):
    rows = [{"txt_chunk": text, "label": labels[i % 2]} for i, text in enumerate(["a", "None", "c"])]
    path = tmp_path / f"rows.{kind}"
    if kind == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "csv":
        path.write_text("txt_chunk,label\n" + "".join(f"{r['txt_chunk']},{r['label']}\n" for r in rows))
    else:
        write(path, rows)
    assert load_chunks(str(path)) == (["a", "c"], ["None"])
    assert f"2 forget and 1 retain texts from {path}" in capsys.readouterr().out


def test_two_corpora_in_place_of_labels(tmp_path, capsys):
    (tmp_path / "f.txt").write_text("\n\n".join(f"forget {i}" for i in range(9)))
    write(tmp_path / "r.jsonl", [{"text": f"retain {i}"} for i in range(9)])
    given = str(tmp_path / "f.txt"), str(tmp_path / "r.jsonl")
    flags = ("--tiny", "--batch", 4, "--steps", 1, "--out", tmp_path / "out", "--forget", given[0])
    refused(capsys, "random_mapping", *flags, says="--retain", out=tmp_path / "out")
    call("random_mapping", *flags, "--retain", given[1])
    printed = capsys.readouterr().out
    assert all(f"9 texts from {path}, column text" in printed for path in given)
    facts = json.loads((tmp_path / "out" / "args.json").read_text())
    assert facts["data"] is None and facts["arguments"]["retain"] == "../r.jsonl"
    flags = ["--ckpt", str(tmp_path / "out"), "--steps", "2", "--batch", "4", "--retain-mix", "0.5"]
    call("recover", *flags)  # the retain text to mix in is the checkpoint's own
    assert f"9 texts from {given[1]}, column text" in capsys.readouterr().out


OWN = [{"question": "Which?", "choices": ["None", "b", "c", "d"], "answer": 1}] * 3


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet", "q.csv", "q"])
def test_questions_of_ones_own(tmp_path, name, capsys):
    path = tmp_path / name
    if name == "q.csv":
        path.write_text("Which?,None,b,c,d,B\n" * 3)
    else:
        write(path, [row | {"answer": "B"} for row in OWN] if name == "q.jsonl" else OWN)
    assert own_questions(str(path)) == [("Which?", ["None", "b", "c", "d"], 1)] * 3
    mmlu = load_mmlu(WORLD / "mmlu", questions=str(path), about="this")
    assert mmlu.forget == ("q",) and mmlu["q"][0] == [] and mmlu.about == {"q": "this"}
    assert not set(FORGET) & set(mmlu) and len(mmlu) == 5 and len(mmlu["astronomy"][0]) == 5
    assert "forget set: 3 questions about this, no shots" in capsys.readouterr().out


def test_questions_on_the_hub_with_a_config(tmp_path, monkeypatch):
    load, seen = datasets.load_dataset, []

    def from_folder(name, config=None, **more):
        seen.append((name, config, more["split"]))
        return load("json", data_files=str(write(tmp_path / "w.jsonl", OWN)), split="train")

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    mmlu = load_mmlu(WORLD / "mmlu", questions="cais/wmdp:wmdp-bio", about="biology")
    assert seen == [("cais/wmdp", "wmdp-bio", "test")] and len(mmlu["wmdp_bio"][1]) == 3


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, "row 0: needs a question, four choices"),
        ({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 4}, "an answer (0 to 3, A to D)"),
        ({"question": "Which?", "choices": ["a", "b", "c", "d"]}, "no column answer"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, row, says, capsys):
    write(tmp_path / "q.jsonl", [row])
    flags = ("--ckpt", WORLD / "base", "--questions", tmp_path / "q.jsonl")
    refused(capsys, "evaluate_mmlu", *flags, says=says)


@pytest.mark.parametrize("name", ["biology.zip", "folder", "pairs.jsonl"])
@pytest.mark.parametrize("source", ["made", "real"])
def test_camel_pairs(tmp_path, name, source):
    pairs = PAIRS
    if source == "real":
        with zipfile.ZipFile(real("camel_standin/biology.zip")) as z:
            pairs = [json.loads(z.read(n)) for n in sorted(z.namelist())]
    texts = load_texts(str(write(tmp_path / name, pairs)))
    assert texts == [f"{p['message_1']}\n\n{p['message_2']}" for p in pairs] and len(texts) >= 12


@pytest.mark.parametrize("name, says", [("b.zip", "not a zip file"), ("empty", "no .jsonl")])
def test_a_broken_zip_and_an_empty_folder(tmp_path, name, says, capsys):
    (tmp_path / "b.zip").write_bytes(b"PK no")
    (tmp_path / "empty").mkdir()
    flags = ("--ckpt", WORLD / "base", "--base", WORLD / "base", "--recovery", tmp_path / name)
    refused(capsys, "recover", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


def hub_layout(folder, mmlu):
    """MMLU's parquet files as they lie in cais/mmlu, with its card's configuration."""
    for place, part in enumerate(("dev", "test")):
        asked = [(s, *question) for s, parts in mmlu.items() for question in parts[place]]
        rows = [{"question": q, "subject": s, "choices": choices, "answer": a} for s, q, choices, a in asked]
        write(folder / "all" / f"{part}-00000-of-00001.parquet", rows)
    splits = "".join(f"  - split: {p}\n    path: all/{p}-*\n" for p in ("dev", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{splits}---\n")
    return str(folder)


def whole_mmlu():
    """57 subjects, a question each, of two lines with a comma; one choice reads "None"."""
    shots = [(f"q{i}", ["None", "b", "c", f"{i}"], i % 4) for i in range(5)]
    names = sorted([*FORGET, *(f"subject_{i}" for i in range(55))])
    return {s: (shots, [(f"{s},\nwhich?", ["None", "b", "c", "5"], 1)]) for s in names}


def test_mmlu_as_parquet_is_mmlu_as_csv(tmp_path, capsys):
    mmlu, hub = whole_mmlu(), hub_layout(tmp_path / "hub", whole_mmlu())
    write_csvs(tmp_path / "csv", mmlu)
    a, b = load_mmlu(tmp_path / "csv"), load_mmlu(hub)
    assert a == b == mmlu and len(a) == 57 and protocol(a, "letter") == protocol(b, "letter")
    assert capsys.readouterr().out == ""  # nothing is missing
    assert load_mmlu(hub, subjects=["college_biology"]) == {"college_biology": mmlu["college_biology"]}
    assert "1 of the 57 subjects" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        load_mmlu(hub, subjects=["alchemy"])
    assert "no questions of alchemy" in capsys.readouterr().err


def test_real_mmlu():
    mmlu = load_mmlu(real("mmlu"), split="validation")
    assert len(mmlu) == 57 and set(FORGET) < set(mmlu) and sum(len(q) for _, q in mmlu.values()) == 1531
    tested = load_mmlu(real("mmlu"), subjects=[*FORGET, "college_mathematics"])
    assert [len(tested[s][1]) for s in FORGET] == [310, 144]
    assert any("None" in choices for _, choices, _ in tested["college_mathematics"][1])


def test_hub_names(tmp_path, monkeypatch):
    """With a folder in place of the hub: owner/name/files, in the layouts of the real repositories."""
    load = datasets.load_dataset
    chunks = [{"txt_chunk": f"text {i}", "label": i > 20} for i in range(30)]
    write(tmp_path / "lapisrocks/pile-bio/data/train-00000-of-00001.parquet", chunks)
    write(tmp_path / "monology/pile-uncopyrighted/train/00.jsonl.zst", CHUNKS)
    write(tmp_path / "camel-ai/biology/biology.zip", PAIRS)
    hub_layout(tmp_path / "cais/mmlu", whole_mmlu())

    def from_folder(name, *args, **more):
        return load(str(tmp_path / name) if (tmp_path / name).is_dir() else name, *args, **more)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: tmp_path / name / file)
    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache"
    )  # keyed by the folder's name
    assert len(load_chunks("lapisrocks/pile-bio")[0]) == 9
    assert load_texts("camel-ai/biology")[3] == "q 3\n\na\n3"
    assert load_mmlu("cais/mmlu") == whole_mmlu()
    rows = read_rows("monology/pile-uncopyrighted", "--pile", ("text",), streaming=True)
    assert isinstance(rows, datasets.IterableDataset) and [r["text"] for r in rows] == [
        c["text"] for c in CHUNKS
    ]


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("random_mapping", ("--model", WORLD / "base"), "--data lapisrocks/pile-bio"),
        ("label_pile", (), "--pile monology/pile-uncopyrighted"),
        ("recover", ("--ckpt", WORLD / "base", "--recovery", "camel-ai/biology"), "camel-ai"),
        (
            "evaluate_mmlu",
            ("--ckpt", "meta-llama/Llama-2-7b-chat-hf", "--mmlu", WORLD / "mmlu"),
            "hf auth login",
        ),
    ],
)
def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch, script, flags, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
        done.stderr
    )
