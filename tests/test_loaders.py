"""Every source of text and questions, in every layout it comes in; hub names with a local folder standing in.

Real files (../shared/data, where it is there) are read too; without them these cases skip themselves.
"""

import csv
import json
import os
import subprocess
import sys
import zipfile

import datasets
import pytest
from conftest import ROOT
from test_scripts import WORLD, refused

from common import FORGET, SUBJECTS, load_chunks, load_mmlu, load_pairs, read_rows

SHARED = ROOT.parent / "shared" / "data"
CHUNKS = [{"txt_chunk": f"<s>s{i} text</s>", "label": i % 3 == 0, "meta": {"pile_set_name": "x"}} for i in range(30)]
PAIRS = [
    {"role_1": "B", "topic;": "t", "sub_topic": "u", "message_1": f"q {i}", "message_2": f"a\n{i}"} for i in range(12)
]


def real(path):
    if not (SHARED / path).exists():
        pytest.skip(f"the real files are not here ({path})")
    return SHARED / path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def compressed(data):
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def write(path, rows):
    """Rows as the format that the path's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_bytes(compressed(jsonl(rows)) if path.suffix == ".zst" else jsonl(rows))
    return path


def camel_zip(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for i, pair in enumerate(pairs):
            z.writestr(f"{i:03}_x.json", json.dumps(pair))
    return path


# ---- labelled chunks


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst", "c.parquet", "folder/part-00000.jsonl"])
def test_labelled_chunks(tmp_path, name):
    path = write(tmp_path / name, CHUNKS)
    if "/" in name:
        (path.parent / "summary.json").write_text('{"chunks": 30}')  # beside what label_pile.py writes
        path = path.parent
    forget, retain = load_chunks(str(path))
    assert forget == [f"s{i} text" for i in range(0, 30, 3)] and len(retain) == 20  # strip("<s>") would eat the s


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst", "c.parquet"])
def test_real_pile_text_labelled_by_its_component(tmp_path, name):
    rows = [json.loads(line) for line in open(real("pile/pile_small.jsonl"))]
    biology = {"PubMed Abstracts", "PubMed Central", "NIH ExPorter"}
    rows = [{"txt_chunk": r["text"], "label": r["meta"]["pile_set_name"] in biology, "meta": r["meta"]} for r in rows]
    forget, retain = load_chunks(str(write(tmp_path / name, rows)))
    assert len(forget) + len(retain) == 400 and len(forget) > 30
    assert forget == [r["txt_chunk"].strip() for r in rows if r["label"]]


# ---- the recovery set


@pytest.mark.parametrize("form", ["zip", "folder", "jsonl"])
@pytest.mark.parametrize("source", ["made", "real"])
def test_camel_pairs(tmp_path, form, source):
    pairs = PAIRS
    if source == "real":
        with zipfile.ZipFile(real("camel_standin/biology.zip")) as z:
            pairs = [json.loads(z.read(n)) for n in sorted(z.namelist())]
    if form == "zip":
        path = camel_zip(tmp_path / "biology.zip", pairs)
    elif form == "jsonl":
        path = write(tmp_path / "p.jsonl", pairs)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        for i, pair in enumerate(pairs):
            (path / f"{i:04}.json").write_text(json.dumps(pair))
    texts = load_pairs(str(path))
    assert texts == [f"{p['message_1']}\n\n{p['message_2']}" for p in pairs] and len(texts) >= 12


# ---- MMLU


def hub_layout(folder, mmlu):
    """MMLU's parquet files as they lie in cais/mmlu, with its card's configuration."""
    for part, place in (("dev", 0), ("test", 1)):
        rows = [
            {"question": q, "subject": s, "choices": c, "answer": a}
            for s, parts in mmlu.items()
            for q, c, a in parts[place]
        ]
        write(folder / "all" / f"{part}-00000-of-00001.parquet", rows)
    splits = "".join(f"  - split: {p}\n    path: all/{p}-*\n" for p in ("dev", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{splits}---\n")
    return folder


def whole_mmlu():
    """All 57 subjects, a question each; one choice reads "None"."""
    ask = [(f"q{i}", ["None", "b", "c", f"{i}"], i % 4) for i in range(6)]
    return {s: (ask[:5], [(f"{s}?", *ask[5][1:])]) for s in sorted(SUBJECTS)}


def test_mmlu_as_parquet_is_mmlu_as_csv(tmp_path):
    mmlu = whole_mmlu()
    for s, parts in mmlu.items():
        for kind, rows in zip(("dev", "test"), parts):
            (tmp_path / "csv" / kind).mkdir(parents=True, exist_ok=True)
            with open(tmp_path / "csv" / kind / f"{s}_{kind}.csv", "w", newline="") as f:
                csv.writer(f).writerows([[q, *c, "ABCD"[a]] for q, c, a in rows])
    a, b = load_mmlu(tmp_path / "csv"), load_mmlu(str(hub_layout(tmp_path / "hub", mmlu)))
    assert a.keys() == b.keys() == set(SUBJECTS)
    for s in SUBJECTS:
        assert [(q, list(c), x) for q, c, x in a[s][1]] == [(q, list(c), x) for q, c, x in b[s][1]]
        assert a[s][1][0][1][0] == "None"


def test_real_mmlu(tmp_path):
    mmlu = load_mmlu(real("mmlu"), split="validation")
    assert set(mmlu) == set(SUBJECTS) and sum(len(q) for _, q in mmlu.values()) == 1531
    tested = load_mmlu(real("mmlu"), subjects=[*FORGET, "college_mathematics"])
    assert [len(tested[s][1]) for s in FORGET] == [310, 144]
    assert any("None" in c for _, c, _ in tested["college_mathematics"][1])


# ---- hub names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the hub: owner/name/files, in the layouts of the real repositories."""
    root, load = tmp_path / "hub", datasets.load_dataset
    write(root / "lapisrocks/pile-bio/data/train-00000-of-00001.parquet", CHUNKS)
    write(root / "monology/pile-uncopyrighted/train/00.jsonl.zst", [{"text": "t", "meta": {"pile_set_name": "x"}}] * 9)
    camel_zip(root / "camel-ai/biology/biology.zip", PAIRS)
    hub_layout(root / "cais/mmlu", whole_mmlu())

    def from_root(name, *args, **more):
        return load(str(root / name) if (root / name).is_dir() else name, *args, **more)

    monkeypatch.setattr(datasets, "load_dataset", from_root)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, repo_type: root / name / file)


def test_hub_names(hub):
    assert len(load_chunks("lapisrocks/pile-bio")[0]) == 10
    assert load_pairs("camel-ai/biology")[3] == "q 3\n\na\n3"
    assert len(load_mmlu("cais/mmlu")) == 57
    rows = read_rows("monology/pile-uncopyrighted", "--pile", ("text",), streaming=True)
    assert isinstance(rows, datasets.IterableDataset) and len(list(rows)) == 9


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("random_mapping", (), "--data lapisrocks/pile-bio"),
        ("label_pile", (), "--pile monology/pile-uncopyrighted"),
        (
            "recover",
            ("--ckpt", WORLD / "base", "--base", WORLD / "base", "--recovery", "camel-ai/biology"),
            "--recovery camel-ai/biology",
        ),
        ("evaluate_mmlu", ("--ckpt", "meta-llama/Llama-2-7b-chat-hf", "--mmlu", WORLD / "mmlu"), "hf auth login"),
    ],
)
def test_a_hub_out_of_reach_is_one_line(tmp_path, script, flags, says):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_broken_zip_and_an_empty_folder(tmp_path, capsys):
    (tmp_path / "b.zip").write_bytes(b"PK no")
    flags = ("--ckpt", WORLD / "base", "--base", WORLD / "base", "--mmlu", WORLD / "mmlu", "--out", tmp_path / "o")
    refused(capsys, "recover", *flags, "--recovery", tmp_path / "b.zip", says="broken zip", out=tmp_path / "o")
    (tmp_path / "empty").mkdir()
    refused(capsys, "recover", *flags, "--recovery", tmp_path / "empty", says="no .jsonl", out=tmp_path / "o")
