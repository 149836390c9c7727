"""What a user mistypes, or could only be used in part, gets one line, exit status 2; nothing is written."""

import importlib
import json
import shutil
import sys
from functools import partial

import datasets
import huggingface_hub.constants
import pytest
import torch
from conftest import WORLD, write_csvs
from safetensors.torch import load_file, save_file
from test_loaders import OWN, hub_layout, write

CHUNK, ASK = {"txt_chunk": "Fuma fern.", "label": True}, OWN[0]
ROWS = {  # name of a file: its rows
    "two.csv": [CHUNK | {"label": 2}],
    "gap.jsonl": [CHUNK, {"label": True}],
    "other.jsonl": [{"txt": "a"}],
    "null.jsonl": [{"text": "a"}, {"text": None}],
    "kinds/a.jsonl": [CHUNK],
    "kinds/b.parquet": [CHUNK],
    "pair.jsonl": [{"message_1": "q", "message_2": "a"}],
    "letter.jsonl": [ASK, ASK | {"answer": "E"}],
    "astronomy.jsonl": [ASK, ASK],
    "list.jsonl": [ASK, ASK | {"answer": ["B"]}],
    "one.jsonl": [ASK],
    "dolly.jsonl": [{"instruction": "q", "response": "a"}],
    "begun/settings.json": [{"tokens": 1}],
    "finished/summary.json": [{}],
    "wmdp/bio/test-0.parquet": [ASK],
    "wmdp/chem/test-0.parquet": [ASK],
}
TEXT = {  # name of a file: its text, encoding
    "utf16.jsonl": ('{"txt_chunk": "café", "label": true}\n', "utf-16"),
    "utf16.txt": ("a\n\nb\n\n" * 30, "utf-16"),
    "text.txt": ("a\n\n" * 30, "ascii"),
    "blank.txt": (" \n\n\t\n", "ascii"),
    "five.csv": ("Which?,a,b,c,d,B\nWhich?,a,b,c,B\n", "ascii"),
    "commas.csv": ("text\nA, b and c\n", "ascii"),
    "data.tsv": ("text\na\n", "ascii"),
    "page.zip": ("<html>", "ascii"),
    "list.json": ('["a", "b"]', "ascii"),
}
NEEDS = "needs a question, four choices and an answer"
BAD = {  # script: {flags (@: the folder of these files and of the checkpoints below): what the line says}
    "rmat": {
        "--ouput x": "unrecognized arguments: --ouput x",
        "--K 0": "--K, --N, --warmup, --batch, --log-every start at 1",
        "--rm-lr nan": "0 < --lr, --rm-lr < 1",
        "--alpha nan": "--alpha",
    },
    "adv_probes": {"--swd --match rand": "--swd has no probes and no match text; drop --match"},
    "baselines": {
        "--method x": "--method: invalid choice: 'x'",
        "--method rmu --layer 6": "--layer 6: RMU trains it and two before; here it goes from 2 to 5",
    },
    "random_mapping": {
        "--batch 661": "the forget set has 660 texts and a step needs 661; lower --batch",
        "--out @base": "base is a finished run; choose another --out",
        "--out @text.txt": "text.txt: not empty, and no run was cut off there; choose another --out",
        "--out @text.txt/x": "text.txt/x: cannot be made ([Errno 20] Not a directory",
        "--device gpu": "--device gpu: give auto, cpu, cuda or cuda:N",
        "--out @mmlu": "mmlu: not empty, and no run was cut off there; choose another --out",
        "--model @nowhere": "--model @nowhere: no such directory; give a checkpoint directory or a hub name",
        "--model @short": "--tokens 208: --model @short reads 32; lower --tokens",
        "--model ./nowhere": "--model ./nowhere: no such directory",
        "--model owner/absent": "gated? accept the licence on its page and run `hf auth login`",
        "--model @pickled": "--model @pickled: cannot be loaded (OSError: Error no file named",
        "--model @own_code": "--model @own_code: cannot be loaded (ValueError: The repository",
        "--model @biased": "model.layers.0.mlp.up_proj.bias",
        "--model @shallow": "model.layers.1.input_layernorm.weight",
        "--model @deep": "model.layers.6.input_layernorm.weight",
        "--data nowhere.jsonl": "--data nowhere.jsonl: no such file or folder",
        "--data=": "--data : no such file or folder",
        "--data owner/absent": "--data owner/absent: cannot be read",
        "--data @kinds": "several kinds of files (.jsonl, .parquet); give one",
        "--data @text.txt": "no column txt_chunk, label; it has text",
        "--data @utf16.jsonl": "--data @utf16.jsonl: cannot be read (UnicodeDecodeError",
        "--data @two.csv": "row 0: label is 2; needs true or false, 1 or 0, forget or retain",
        "--data @gap.jsonl": "row 1: txt_chunk: no text",
        "--forget @text.txt": "--forget goes with --retain",
        "--forget @commas.csv --retain @text.txt": "more cells than columns; quote texts with commas: b",
        "--forget @data.tsv --retain @text.txt": "none of .parquet, .csv, .jsonl, .zst, .json",
        "--forget @text.txt --retain @utf16.txt": "--retain @utf16.txt: cannot be read (UnicodeDecodeError",
        "--forget @list.json --retain @text.txt": "--forget @list.json: its rows have no names; write",
        "--forget @text.txt --retain @blank.txt": "the retain set has 0 texts",
        "--forget @two.csv --retain @text.txt": "these chunks have labels; give them as --data",
        "--forget @other.jsonl --retain @text.txt": "@other.jsonl: no column text or txt_chunk; it has txt",
        "--forget @text.txt --retain @mmlu/../text.txt": "--forget and --retain are the same texts; give",
    },
    "recover": {
        "--base @nowhere": "--base @nowhere: no such directory",
        "--lr x": "--lr",
        "--lr nan": "0 < --lr",
        "--clip -1": "--clip -1.0: starts at 0",
        "--steps infx": "--steps inf: needs a number, or a multiple such as 3x",
        "--retain-mix 2": "--retain-mix",
        "--retain-mix nan": "--retain-mix",
        "--about x": "--about goes with --questions",
        "--only mix": "--only and --shard need --sweep",
        "--recovery nowhere.zip": "--recovery nowhere.zip: no such file",
        "--recovery @page.zip": "--recovery @page.zip: cannot be read (BadZipFile",
        "--recovery camel-ai/biology": "--recovery camel-ai/biology: cannot be read (LocalEntryNotFoundError",
        "--recovery @other.jsonl": "instruction or txt_chunk or text; it has txt",
        "--recovery @dolly.jsonl": "row 0: not of the form instruction (KeyError('output'));",
        "--recovery @null.jsonl": "row 1: no text; correct or drop it",
        "--recovery @pair.jsonl": "the recovery set has 1 texts and a step needs 32; lower --batch",
    },
    "evaluate_mmlu": {
        "--questions @nowhere.csv": "--questions @nowhere.csv: no such file",
        "--ckpt @nowhere --mmlu @nothing": "--ckpt @nowhere: no such directory",
        "--shots 6": "--shots: invalid choice: 6",
        "--about x": "--about goes with --questions",
        "--table x": "give --ckpt to score (one with --out, a directory), or --table",
        "--mmlu @empty": "too few questions of college_biology; see --shots, --forget-subjects",
        "--mmlu @hub --split validation": "validation",
        "--forget-subjects astronomy college_biology high_school_biology": "no subject of the retain set",
        "--questions @wmdp": "--questions @wmdp: several data sets (bio, chem); give one of them",
        "--questions @astronomy.jsonl": "astronomy is a subject of the retain set",
        "--questions @letter.jsonl": f"row 1: {NEEDS} (0 to 3, A to D); got 'Which?'",
        "--questions @list.jsonl": f"row 1: {NEEDS}",
        "--questions @five.csv": f"row 1: {NEEDS}",
        "--questions @one.jsonl": "give two questions or more",
        "--ckpt @infinite": "log-probabilities are NaN or infinite: its weights are damaged",
        "--ckpt @short": "prompts of 257 tokens, the model's context is 32; lower --shots",
        "--out @text.txt": "give --ckpt to score (one with --out, a directory)",
    },
    "label_pile": {
        "--tokens 100000": "--tokens 100000, a question of 13: --judge reads 512; shorten one",
        "--shard 2/2": "--shard 2/2: give i/n with i from 0 to n - 1",
        "--question why?": "--question needs {chunk} once, and text after it",
        "--tokenizer @nowhere": "--tokenizer @nowhere: ",
        "--out @begun": "--out @begun: was begun with other settings (settings.json); choose another --out",
        "--out @finished": "--out @finished is a finished run, or a file; choose another --out",
        "--out @text.txt": "--out @text.txt",
    },
}
SHORT = "--tiny --out out --steps 2"  # if it goes on all the same
START = {"adv_probes": SHORT, "random_mapping": SHORT, "recover": f"--ckpt {WORLD}/base --out out --steps 2"}
START |= {"evaluate_mmlu": "--ckpt @base --mmlu @mmlu --out out", "label_pile": "--tiny --out out"}
START |= {"rmat": "--tiny --out out --rm-steps 1 --N 1", "baselines": SHORT}


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder, change):
    change(tensors := load_file(path := folder / "model.safetensors"))
    save_file(tensors, path, metadata={"format": "pt"})


def pickled(folder):
    weights(folder, lambda tensors: torch.save(tensors, folder / "pytorch_model.bin"))
    (folder / "model.safetensors").unlink()


def own_code(folder):
    """It would write a file when it is run."""
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    config(folder, model_type="own", auto_map=auto)


CHECKPOINTS = {  # name: what is done to the miniature's base
    "base": lambda folder: None,
    "pickled": pickled,
    "own_code": own_code,
    "biased": lambda f: weights(f, lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(3)})),
    "infinite": lambda f: weights(f, lambda w: w["model.norm.weight"].fill_(float("inf"))),
    "shallow": partial(config, num_hidden_layers=1),
    "deep": partial(config, num_hidden_layers=7),
    "short": partial(config, max_position_embeddings=32),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, mmlu):
    folder = tmp_path_factory.mktemp("bad")
    datasets.disable_progress_bars()
    (folder / "empty").mkdir()
    for name, rows in ROWS.items():
        write(folder / name, rows)
    for name, (text, encoding) in TEXT.items():
        (folder / name).write_bytes(text.encode(encoding))
    for name, damage in CHECKPOINTS.items():
        damage(shutil.copytree(WORLD / "base", folder / name))
    write_csvs(folder / "mmlu", mmlu)
    hub_layout(folder / "hub", mmlu)
    return folder


@pytest.mark.parametrize("script, flags", [(script, flags) for script in BAD for flags in BAD[script]])
def test_one_line_and_nothing_is_written(bad, tmp_path, capsys, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    for library in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        module = importlib.import_module(script)
        module.main(module.parse_args(f"{START[script]} {flags}".replace("@", f"{bad}/").split()))
    line = capsys.readouterr().err.removesuffix("\n")
    assert stop.value.code == 2 and "\n" not in line and line.startswith(f"{script}.py: "), line
    assert BAD[script][flags].replace("@", f"{bad}/") in line and len(line) < 700, line
    assert not [*tmp_path.iterdir()] and before == {path: path.stat().st_mtime_ns for path in bad.rglob("*")}
