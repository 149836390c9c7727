"""What is wrong in files of texts and recovery pairs, and in what label_pile.py is given: one line that says
what, and nothing is written. Each table's row: name, what is made, what the line must say."""

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import struct
import zipfile

import pytest
from conftest import WORLD, load_texts
from test_label import chat_tokenizer, files, flags, labelled
from test_scripts import refused, run

import label_pile as L
from common import load_chunks


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def stopped(capsys, says, function, *args):
    """function(*args) ends the program with status 2 and one line: a fault, which `says` is of, and a
    remedy."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in line and "; " in line and "\n" not in line, line
    assert len(line) < 500, line


CHUNK = {"txt_chunk": "Fuma fern.", "label": True}
DATA = [
    ("latin.jsonl", '{"txt_chunk": "café", "label": true}\n'.encode("latin1"), "Invalid UTF8"),
    ("latin.csv", "txt_chunk,label\ncafé,true\n".encode("latin1"), "UnicodeDecodeError"),
    ("half.jsonl", jsonl(CHUNK) + b'{"txt_chunk": "b', "Missing a closing quotation mark"),
    ("ragged.csv", b'txt_chunk,label\na,1\n"b', "EOF inside string"),
    ("empty.jsonl", b"", "is empty"),
    ("empty.csv", b"", "is empty"),
    ("blank.jsonl", b"\n\n", "is empty"),
    ("null.jsonl", b"null\n", "does not begin with a JSON object"),  # pyarrow dies of a SIGSEGV
    ("scalars.jsonl", b"5\n6\n", "does not begin with a JSON object"),
    ("lists.jsonl", b"[1]\n[2]\n", "cannot be read (ValueError: Trailing data"),
    ("junk.parquet", b"junk", "Parquet file size is 4 bytes"),
    ("junk.jsonl.zst", b"junk", "zstd decompress error"),
    ("a.txt", b"text", "no .jsonl"),
    ("number.jsonl", jsonl(CHUNK | {"txt_chunk": 5}), "txt_chunk is empty, or of the wrong type, in 5"),
    ("list.jsonl", jsonl(CHUNK, CHUNK | {"txt_chunk": ["a"]}), "row 1: txt_chunk is empty, or"),
    ("gap.jsonl", jsonl(CHUNK, {"label": True}), "row 1: txt_chunk is empty, or"),
    ("nan.jsonl", b'{"txt_chunk": "a", "label": NaN}\n', "row 0: label is"),
    ("two.csv", b"txt_chunk,label\na,2\n", "row 0: label is 2"),
    ("maybe.jsonl", jsonl(CHUNK | {"label": "maybe\x1b[2J" + "e" * 999}), "label is 'maybe\\x1b"),
]


@pytest.mark.parametrize("name, data, says", DATA, ids=[row[0] for row in DATA])
def test_labelled_chunks_that_cannot_be_used(tmp_path, capsys, name, data, says):
    (tmp_path / name).write_bytes(data)
    stopped(capsys, says, load_chunks, str(tmp_path / name))


def test_a_path_that_is_none(capsys):
    for path in ("", "/" + 300 * "x"):
        stopped(capsys, "no such file or folder", load_chunks, path)


def zipped(patch=lambda data: data, **entries):
    """A zip of NAME.json with these bytes, and what `patch` makes of the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries.items():
            z.writestr(f"{name.replace('__MACOSX', '__MACOSX/')}.json", data)
    return patch(file.getvalue())


def encrypted(data):
    """With the bit set in both headers of the only entry that says so."""
    data, directory = bytearray(data), data.index(b"PK\1\2")
    data[6] |= 1
    data[directory + 8] |= 1
    return bytes(data)


def claiming(size):
    """A patch: the directory says that each entry has so many bytes."""

    def patch(data):
        first, *rest = data.split(b"PK\1\2")
        return b"PK\1\2".join([first, *(x[:20] + struct.pack("<I", size) + x[24:] for x in rest)])

    return patch


PAIR = {"message_1": "q", "message_2": "a"}
RECOVERY = [
    ("latin.txt", "café".encode("latin1"), "UnicodeDecodeError"),
    ("empty.txt", b" \n", "it has no rows"),
    (
        "half.zip",
        zipped(a=b'{"text": "\\ud800"}'),
        "row 0: text or its answer is empty, or of the wrong type",
    ),
    ("number.jsonl", jsonl({"text": 5}), "text or its answer is empty, or of the wrong type, in {'text': 5}"),
    ("null.jsonl", jsonl({"text": "a"}, {"text": None}), "row 1: text or its answer"),
    ("question.jsonl", jsonl(PAIR | {"message_1": " "}), "row 0: message_1 or its answer"),
    ("answer.jsonl", jsonl(PAIR, PAIR | {"message_2": "\t"}), "row 1: message_1 or its answer"),
    ("numbers.jsonl", jsonl({"message_1": 1, "message_2": 2}), "row 0: message_1 or its answer"),
    ("lists.jsonl", jsonl({"message_1": ["q"], "message_2": ["a"]}), "row 0: message_1 or its answer"),
    ("nulls.jsonl", jsonl(PAIR | {"message_1": None}), "row 0: message_1 or its answer"),
    ("half.jsonl", jsonl({"message_1": "q"}), "row 0: message_1 or its answer"),
    ("words.jsonl", jsonl({"messages": ["q", "a"]}), "row 0: messages or its answer"),
    ("word.jsonl", jsonl({"messages": "q"}), "row 0: messages or its answer"),
    ("count.jsonl", jsonl({"messages": 2}), "row 0: messages or its answer"),
    ("empties.jsonl", jsonl({"messages": [{"content": None}]}), "row 0: messages or its answer"),
    ("output.jsonl", jsonl({"instruction": "q", "output": 0}), "row 0: instruction or its answer"),
    ("maybe.jsonl", jsonl(CHUNK | {"label": "maybe"}), "row 0: txt_chunk or its answer"),
    ("list.zip", zipped(a=b"[1]"), "a.json is no JSON object"),
    ("null.zip", zipped(a=jsonl(PAIR), b=b"null"), "b.json is no JSON object"),
    ("half.zip", zipped(a=b'{"message'), "JSONDecodeError"),
    ("encrypted.zip", zipped(encrypted, a=jsonl(PAIR)), "encrypted"),
    ("bomb.zip", zipped(a=b" " * 65_000_000), "0.1 GB of JSON when unpacked"),
    ("bombs.zip", zipped(claiming(60_000_000), **{f"a{i}": b"{}" for i in range(40)}), "2.4 GB of JSON"),
    ("none.zip", zipped(), "no .json file"),
    ("mac.zip", zipped(__MACOSX=b"{}"), "no .json file"),
]


@pytest.mark.parametrize("name, data, says", RECOVERY, ids=[row[0] for row in RECOVERY])
def test_recovery_texts_that_cannot_be_used(tmp_path, capsys, name, data, says):
    (tmp_path / name).write_bytes(data)
    stopped(capsys, says, load_texts, str(tmp_path / name))


def test_what_only_looks_wrong_is_read(tmp_path):
    """A byte order mark is no part of a text, and a Mac's zip has entries that are no JSON."""
    bom, text = b"\xef\xbb\xbf", {"text": "Fuma fern."}
    (tmp_path / "a.txt").write_bytes(bom + b"Fuma fern.")
    (tmp_path / "a.csv").write_bytes(bom + b'"text"\n"Fuma fern."\n')
    (tmp_path / "a.jsonl").write_bytes(bom + jsonl(text))
    (tmp_path / "a.zip").write_bytes(zipped(a=bom + jsonl(text), __MACOSX=b"\0\5\x16\7"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.jsonl").write_bytes(b"\n")  # an empty part
    (tmp_path / "folder" / "1.jsonl").write_bytes(jsonl(text))
    for name in ("a.txt", "a.csv", "a.jsonl", "a.zip", "folder"):
        assert load_texts(str(tmp_path / name)) == ["Fuma fern."], name


def test_a_full_cache_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "c.jsonl").write_bytes(jsonl(*[CHUNK] * 9999))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # a file may not grow, as on a full disk
    try:
        stopped(capsys, "File too large", load_chunks, str(tmp_path / "c.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_libraries_add_no_lines_and_an_absent_hub_is_told_soon(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(jsonl(CHUNK) + b'{"txt_chunk": "b')
    for data, says in (
        (tmp_path / "c.jsonl", "closing quotation"),
        ("owner/absent", "check name and network"),
    ):
        done = run("random_mapping", "--tiny", "--data", data, "--out", tmp_path / "out")
        line = done.stderr.strip()
        assert done.returncode == 2 and says in line and "\n" not in line, line
    assert not (tmp_path / "out").exists()


# ---- label_pile.py


LABEL = [
    (("--max-chunks", "0"), "--max-chunks 0"),
    (("--per-class", "0"), "--per-class 0"),
    (("--max-bytes", "0"), "--max-bytes 0"),
    (("--max-bytes", "9" * 400), "--max-bytes 9"),
    (("--concept", ""), "--concept"),
    (("--concept", "{chunk}"), "--concept"),
    (("--tokens", "100000"), "--tokens 100000: --judge reads"),
    (("--tokenizer", "nowhere/"), "--tokenizer nowhere/: cannot be read"),
    (("--tokenizer", b"{"), "cannot be read"),
    (("--pile", jsonl({"text": ""}, {"text": " \n"})), "no text to label"),
    (("--pile", jsonl({"text": 5})), "document 0: text is 5"),
    (("--pile", '{"text": "café"}\n'.encode("latin1")), "UnicodeDecodeError"),
    (("--out", ""), "--out is empty"),
    (("--out", 300 * "x"), "File name too long"),
    (("--out", WORLD / "pile.jsonl.zst"), "Not a directory"),
]


@pytest.mark.parametrize("more, says", LABEL, ids=[f"{row[0][0]} {row[0][1]!s:.12}" for row in LABEL])
def test_label_pile_refuses(tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    flag, value = more
    if isinstance(value, bytes):
        name = {"--pile": "pile.jsonl", "--tokenizer": "judge/tokenizer.json"}[flag]
        (tmp_path / "judge").mkdir()
        (tmp_path / name).write_bytes(value)
        value = tmp_path / name if flag == "--pile" else tmp_path / "judge"
    refused(capsys, "label_pile", *flags(tmp_path / "out"), flag, value, says=says, out=tmp_path / "out")


TEMPLATES = [
    ("{% for m in messages %}{{ m.content", "TemplateSyntaxError"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("GPT4 Correct Assistant:", "loses or repeats"),
    ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "loses or repeats"),
]


@pytest.mark.parametrize("template, says", TEMPLATES, ids=[says for _, says in TEMPLATES])
def test_a_judge_with_a_broken_template(capsys, template, says):
    stopped(capsys, says, L.frame, chat_tokenizer(template), L.QUESTION, "biology", True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Three parts of 20 rows of a run that was cut off before its summary."""
    out = tmp_path_factory.mktemp("begun") / "out"
    labelled(out, "--max-chunks", "60")
    (out / "summary.json").unlink()
    return out


def edit(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


FOLDERS = [
    ("junk", edit("part-00001.jsonl", lambda data: b"\xff\0junk"), "part-00001.jsonl is broken"),
    ("half a line", edit("part-00002.jsonl", lambda data: data[:-30]), "part-00002.jsonl is broken"),
    ("empty", edit("part-00000.jsonl", lambda data: b""), "part-00000.jsonl is broken"),
    ("columns", edit("part-00001.jsonl", replaced(b'"txt_chunk"', b'"text"')), "part-00001.jsonl is broken"),
    ("scalar", edit("part-00001.jsonl", lambda data: data + b"5\n"), "part-00001.jsonl is broken"),
    ("label", edit("part-00001.jsonl", replaced(b'"label": ', b'"label": 1')), "part-00001.jsonl is broken"),
    ("id", edit("part-00001.jsonl", replaced(b'"id": "', b'"id": "x')), "part-00001.jsonl is broken"),
    ("gap", lambda f: (f / "part-00001.jsonl").unlink(), "part-00001.jsonl is missing"),
    (
        "lost rows",
        edit("part-00001.jsonl", lambda data: b"".join(data.splitlines(True)[:7])),
        "00001.jsonl is",
    ),
    (
        "twice",
        lambda f: shutil.copy(f / "part-00000.jsonl", f / "part-00001.jsonl"),
        "part-00001.jsonl is broken",
    ),
    ("settings", edit("settings.json", lambda data: data[:20]), "settings.json is broken"),
    ("other", edit("settings.json", replaced(b"207", b"208")), "other settings"),
    ("none", lambda f: (f / "settings.json").unlink(), "no settings.json"),
]


@pytest.mark.parametrize("change, says", [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_folder_that_someone_changed_is_left_alone(begun, tmp_path, capsys, change, says):
    shutil.copytree(begun, tmp_path / "out")
    change(tmp_path / "out")
    before = files(tmp_path / "out")
    refused(capsys, "label_pile", *flags(tmp_path / "out", "--max-chunks", "80"), says=says)
    assert files(tmp_path / "out") == before


def test_a_shard_that_another_process_writes(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "out")
    with open(tmp_path / "out" / "part.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(capsys, "label_pile", *flags(tmp_path / "out", "--max-chunks", "80"), says="another process")
    assert len(labelled(tmp_path / "out", "--max-chunks", "80")) == 80  # control: it was the lock


def test_shards_that_start_together(begun, tmp_path, capsys):
    """Each sees an empty place; the first one's settings stay, and a part is never written twice."""
    settings, rows = {"tokens": 207}, [json.loads(line) for line in open(begun / "part-00000.jsonl")]
    shards = [L.Parts(tmp_path / "out", (i, 3), settings) for i in (0, 1, 1)]
    other = L.Parts(tmp_path / "out", (2, 3), {"tokens": 1})
    for parts in shards[:2]:
        parts.begin()
    stopped(capsys, "other settings", other.begin)
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == settings
    shards[1].write(rows)
    stopped(capsys, "rerun the same command", shards[2].begin)
    assert not [*(tmp_path / "out").glob("*.draft")]


def test_a_full_disk_costs_one_part(begun, tmp_path, capsys, monkeypatch):
    left, fsync = iter(range(2)), os.fsync

    def full(file):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(L.os, "fsync", full)
    stopped(capsys, "the first 40 rows are kept", labelled, tmp_path / "out", "--max-chunks", "60")
    monkeypatch.undo()
    labelled(tmp_path / "out", "--max-chunks", "60")
    assert files(tmp_path / "out") == files(begun)
