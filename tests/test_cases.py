"""What people's own models, templates and files met: the right value, or one line that says what to do."""

import json
import random
import shutil

import pytest
import torch
from conftest import bpe, toy_model, write_csvs
from datasets import ClassLabel, Dataset, Features, Value
from test_loaders import OWN, write
from test_scripts import call, refused

from common import load_chunks, read_json, read_table, resolved, texts_of
from evaluate_mmlu import read_rows

WORDS = "moss fern otter comet river stone amber cedar pollen nerve cell lipid orbit plume".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(40)]
SPELLINGS = [space + word for word in ("yes", "no", "Yes", "No", "YES", "NO") for space in ("", " ")]
TOKENIZER = bpe([*SPELLINGS * 9, "user:\nText:\nx\n\nSo?\n", *TEXTS], size=500)


def saved(folder, model, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in open(path)]


def judged(folder, end, yes, no, scale):
    """Labels of TEXTS by a random judge that says `yes` or `no` after a chat template with this end, and what
    `generate` says. scale 0: all tokens are equally likely."""
    model, tokenizer, out = toy_model(vocab=len(TOKENIZER)), TOKENIZER, folder / "out"
    tokenizer.chat_template = "user:\n{{ messages[0].content }}\n{{ END }}".replace("END", repr(end))
    prompts = [f"user:\nText:\n{text}\n\nSo?\n{end}" for text in TEXTS]
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    H = torch.cat([model.model(x).last_hidden_state[:, -1] for x in ids]).detach()
    w = torch.linalg.svd(H - H.mean(0)).Vh[0]  # a direction along which the texts differ
    w -= (w @ H.mean(0)) / H.mean(0).square().sum() * H.mean(0)
    head = torch.nn.init.zeros_(model.lm_head.weight.data)
    for word in SPELLINGS:  # what it never says points the other way
        (row,) = tokenizer(word, add_special_tokens=False).input_ids
        sign = (1 if "y" in word.lower() else -1) * (1 if word in (yes, no) else -1e-3)
        head[row] = scale * sign * w
    pile = write(saved(folder, model, tokenizer) / "pile.jsonl", [{"text": text} for text in TEXTS])
    flags = ("--judge", folder, "--pile", pile, "--out", out, "--rows", 10)
    call("label_pile", *flags, "--question", "Text:\n{chunk}\n\nSo?")
    said = [tokenizer.decode(model.generate(x, max_new_tokens=1, do_sample=False)[0, -1]) for x in ids]
    return [row["label"] for row in rows_of(out)], said


@pytest.mark.parametrize("end", ["<|im_start|>assistant\n", "ASSISTANT: ", "Assistant:"])
@pytest.mark.parametrize("yes, no", [("Yes", "No"), (" yes", " no"), ("YES", "NO")])
def test_a_label_is_what_the_judge_says_after_its_template(tmp_path, end, yes, no, capsys):
    labels, said = judged(tmp_path, end, yes, no, scale=2000)
    assert labels == [word == yes for word in said] and {*said} == {yes, no} and 10 < sum(labels) < 30
    assert "WARNING" not in capsys.readouterr().err


def test_a_judge_that_rarely_says_yes_or_no_is_warned_about_once(tmp_path, capsys):
    judged(tmp_path, "Assistant:", " yes", " no", scale=0)
    assert capsys.readouterr().err.count("WARNING") == 1


def test_every_path_is_taken_literally(tmp_path, monkeypatch, mmlu, capsys):
    """Beside the folder is one that its name would match as a pattern, with files that cannot be read. A link
    leads to one checkpoint."""
    monkeypatch.chdir(tmp_path)
    name, chunks = "-d[12]* ?é", [{"txt_chunk": x, "label": i % 2} for i, x in enumerate(TEXTS[:8])]
    folder, other = tmp_path / name, tmp_path / "-d1x yé"
    saved(folder / "m", toy_model(vocab=len(TOKENIZER)))
    write_csvs(folder / "mmlu", mmlu)
    write(folder / "c.jsonl", chunks)
    write(folder / "c" / f"{name}.parquet", chunks)
    write(folder / "pairs.zip", [{"message_1": "q", "message_2": "a"}] * 4)
    write(folder / "q.jsonl", OWN)
    write(folder / "r.jsonl", [{"text": "retain"}] * 5)
    (folder / "f.txt").write_text("forget\n\n" * 5)
    shutil.copytree(folder, other)
    for path in other.rglob("*.*"):
        path.write_bytes(b"\xff junk")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "out").symlink_to(folder / "deep" / "er")
    short = ("--steps=1", "--batch=2", f"--model={name}/m")
    call("random_mapping", *short, f"--data={name}/c.jsonl", f"--out={name}/a")
    call("random_mapping", *short, f"--data={name}/c", f"--out={name}/b")
    call(
        "random_mapping", *short, f"--forget={name}/f.txt", f"--retain={name}/r.jsonl", f"--out={name}/out/y"
    )
    said = capsys.readouterr().out
    assert all(f"5 texts from {name}/{x}, column text" in said for x in ("f.txt", "r.jsonl"))
    a, b, out = ((folder / x / "model.safetensors").read_bytes() for x in ("a", "b", "out/y"))
    assert a == b != out
    flags = (f"--recovery={name}/pairs.zip", f"--mmlu={name}/mmlu", f"--questions={name}/q.jsonl")
    args = call("recover", f"--ckpt={name}/out/y", "--steps=1", "--batch=2", "--retain-mix=0.5", *flags)
    assert args.base == str(folder / "m") and args.retain == str(folder / "r.jsonl")  # its own
    assert resolved(read_json(folder / "out/y/args.json")["base"], f"{name}/out/y") == str(folder / "m")
    call("evaluate_mmlu", f"--ckpt={name}/out/y", f"--mmlu={name}/mmlu", f"--out={name}/scores")
    flags = (f"--pile={name}/f.txt", f"--out={name}/labels", "--no-chat", "--question={chunk}\n?")
    call("label_pile", f"--judge={name}/m", *flags)
    assert sum(load_chunks(f"{name}/labels"), []) == ["forget"] * 5
    shutil.rmtree(folder)
    capsys.readouterr()
    refused(capsys, "random_mapping", "--tiny", f"--data={name}/c.jsonl", says="no such file or folder")


@pytest.mark.parametrize("names", [["forget", "retain"], ["retain", "forget"]])
@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_classes_with_names_go_by_their_names(tmp_path, names, kind):
    features = Features(txt_chunk=Value("string"), label=ClassLabel(names=names))
    table, path = Dataset.from_dict({"txt_chunk": names, "label": [0, 1]}, features), tmp_path / f"x.{kind}"
    table.save_to_disk(path) if kind == "disk" else table.to_parquet(path)
    assert load_chunks(str(path)) == (["forget"], ["retain"])


STRINGS = ["2021-03-04", "1e5", "007", "1.10", "None", "NaN", "true", "12:30:00"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "csv", "parquet", "disk"])
def test_dates_and_numbers_in_strings_stay_strings(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", [{"text": x, "id": i} for i, x in enumerate(STRINGS)])
    assert texts_of(read_table(str(path), "--forget"), "x", "--forget") == STRINGS
    path = write(tmp_path / "q.jsonl", [OWN[0] | {"choices": STRINGS[i : i + 4]} for i in (0, 4)])
    assert sum((choices for _, (_, choices, _) in read_rows(str(path), "--questions")), []) == STRINGS


def test_meta_may_be_anything_and_change_between_rows_and_files(tmp_path):
    metas = [{}, {"page": 1}, {"page": "xii", "site": {"a": [1]}}, None, [], [{"id": 1}], "x"]
    rows = [{"text": TEXTS[i // 6], "meta": metas[i // 30]} for i in range(210)]
    pile, out = write(tmp_path / "pile.jsonl", rows), tmp_path / "out"
    call("label_pile", "--tiny", "--pile", pile, "--rows", 30, "--out", out)
    (out / "licence.txt").write_text("Text that is no data.")
    assert [row["meta"] for row in rows_of(out)] == [row["meta"] or {} for row in rows]
    assert sorted(sum(load_chunks(str(out)), [])) == sorted(row["text"] for row in rows)


PARAGRAPHS = [f"Text {i}: é,\nof two lines." for i in range(4)]
FILES = {  # name: content
    "windows.txt": "\r\n\r\n".join(x.replace("\n", "\r\n") for x in PARAGRAPHS).encode("utf-8-sig"),
    "blanks.txt": ("\n\n" + "\n \t\n \n".join(PARAGRAPHS) + "\n \n").encode(),
    "windows.jsonl": "\r\n".join(json.dumps({"text": x}) for x in PARAGRAPHS).encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_windows_and_blank_lines(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert texts_of(read_table(str(tmp_path / name), "--forget"), name, "--forget") == PARAGRAPHS
