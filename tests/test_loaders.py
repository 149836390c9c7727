"""Every source of text and questions, in every layout it comes in; a local folder stands in for the hub."""

import json
import zipfile

import datasets
import pytest
import zstandard
from conftest import WORLD, write_csvs

from common import load_chunks, read_table
from evaluate_mmlu import FORGET, load_mmlu
from recover import load_texts


def write(path, rows):
    """Rows in the format that the name says; a name without an ending: a folder of one-object JSON files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    data = "".join(lines).encode()
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif path.suffix == ".csv":
        path.write_text("".join(",".join(map(str, x)) + "\n" for x in (rows[0], *(r.values() for r in rows))))
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


@pytest.mark.parametrize("labels", [(1, 0), ("true", "False"), (True, False), ("forget", "retain")])
@pytest.mark.parametrize("name", ["x.csv", "x.disk", "x.jsonl", "x.jsonl.zst", "x.parquet", "x/part-0.jsonl"])
def test_labelled_chunks(tmp_path, labels, name, capsys):
    texts = ["<s>some text</s>", "None", "c"]
    path = write(tmp_path / name, [{"txt_chunk": x, "label": labels[i % 2]} for i, x in enumerate(texts)])
    if "/" in name:
        (path.parent / "summary.json").write_text('{"chunks": 30}')  # beside what label_pile.py writes
        path = path.parent
    assert load_chunks(str(path)) == (["some text", "c"], ["None"])  # strip("<s>") would eat the s
    assert f"2 forget, 1 retain texts from {path}" in capsys.readouterr().out


OWN = [{"question": "Which?", "choices": ["None", "b", "c", "d"], "answer": 1}] * 3


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet", "q.csv", "q", "wmdp/chem", "wmdp:chem"])
def test_questions_of_ones_own(tmp_path, name):
    for n, config in enumerate(("bio", "chem"), 2):  # as in a clone from the hub
        write(tmp_path / "wmdp" / config / "test-00000-of-00001.parquet", OWN[:n])
    if name == "q.csv":
        (tmp_path / name).write_text("Which?,None,b,c,d,B\n" * 2 + "Which?,None,b,c,d,1\n")
    elif name[0] == "q":
        write(tmp_path / name, [row | {"answer": "B"} for row in OWN] if name == "q.jsonl" else OWN)
    mmlu = load_mmlu(WORLD / "mmlu", questions=f"{tmp_path}/{name}", about="this")
    assert mmlu["this"] == ([], [("Which?", ["None", "b", "c", "d"], 1)] * 3)
    assert mmlu.forget == ("this",) and mmlu.protocol("letter")["usual"] is False
    assert not set(FORGET) & set(mmlu) and len(mmlu) == 5 and len(mmlu["astronomy"][0]) == 5


FORMS = [  # a row to train on, --column, the texts
    ({"message_1": "q", "message_2": "a\nb"}, None, ["q\n\na\nb"]),
    ({"messages": [{"content": "q"}, {"content": "a"}]}, None, ["q\n\na"]),
    ({"instruction": "q", "input": "", "output": "a"}, None, ["q\n\na"]),
    ({"instruction": "q", "input": "i", "output": "a"}, None, ["q\n\ni\n\na"]),
    ({"txt_chunk": "<s> a", "label": "forget"}, None, ["a"]),
    ({"txt_chunk": "a", "label": 0}, None, []),  # retain text
    ({"message_1": "q", "message_2": "a"}, "message_2", ["a"]),
]


@pytest.mark.parametrize("row, column, texts", FORMS)
def test_rows_become_texts_to_train_on(tmp_path, row, column, texts):
    assert load_texts(str(write(tmp_path / "r.jsonl", [row] * 2)), column) == texts * 2


def hub_layout(folder, mmlu):
    """MMLU's parquet files as they lie in cais/mmlu."""
    for place, part in enumerate(("dev", "test")):
        asked = [(s, *question) for s, parts in mmlu.items() for question in parts[place]]
        rows = [{"question": q, "subject": s, "choices": choices, "answer": a} for s, q, choices, a in asked]
        write(folder / "all" / f"{part}-00000-of-00001.parquet", rows)
    return str(folder)


def test_mmlu_as_parquet_is_mmlu_as_csv(tmp_path, mmlu):
    write_csvs(tmp_path / "csv", mmlu)
    write(tmp_path / "hub" / "astronomy" / "test-00000-of-00001.parquet", OWN)  # the clone's other configs
    a, b = load_mmlu(tmp_path / "csv"), load_mmlu(hub_layout(tmp_path / "hub", mmlu))
    assert a == b == mmlu and a.protocol("letter") == b.protocol("letter")
    for n, name in enumerate(("dev.jsonl", "test.jsonl")):
        write(tmp_path / "splits" / name, OWN[n:])
    assert len([*read_table(str(tmp_path / "splits"), "--mmlu", split="test")]) == 2
    write_csvs(tmp_path / "val", mmlu, "val")
    assert load_mmlu(tmp_path / "val", split="validation") == mmlu


def test_hub_names(tmp_path, monkeypatch, mmlu):
    """With a folder in place of the hub: owner/name/files, in the layouts of the real repositories."""
    load, documents = datasets.load_dataset, [{"text": f"s{i} text", "meta": {"i": i}} for i in range(30)]
    chunks = [{"txt_chunk": f"text {i}", "label": i > 20} for i in range(30)]
    write(tmp_path / "lapisrocks/pile-bio/data/train-00000-of-00001.parquet", chunks)
    write(tmp_path / "monology/pile-uncopyrighted/train/00.jsonl.zst", documents)
    pairs = [{"topic;": "t", "message_1": f"q {i}", "message_2": f"a\n{i}"} for i in range(12)]
    write(tmp_path / "camel-ai/biology/biology.zip", pairs)
    write(tmp_path / "cais/wmdp/wmdp-bio/test-00000-of-00001.parquet", OWN)
    hub_layout(tmp_path / "cais/mmlu", mmlu)

    def from_folder(name, config=None, *, split, streaming):
        assert streaming == ("pile-uncopyrighted" in name)
        files = {"data_files": {split: f"{config}/{split}-*"}} if config else {}
        return load(str(tmp_path / name), split=split, streaming=streaming, **files)

    monkeypatch.setattr("recover.hf_hub_download", lambda name, file, **_: str(tmp_path / name / file))
    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(load_chunks("lapisrocks/pile-bio")[0]) == 9
    assert load_texts("camel-ai/biology")[3] == "q 3\n\na\n3"
    exam = load_mmlu("cais/mmlu", questions="cais/wmdp:wmdp-bio")
    assert exam["astronomy"] == mmlu["astronomy"] and len(exam["wmdp_bio"][1]) == 3 and len(exam) == 2
    rows = read_table("monology/pile-uncopyrighted", "--pile", ("text",), streaming=True)
    assert [*rows] == documents
