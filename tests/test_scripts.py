"""Every script once, as a user runs it: a subprocess on the miniature, a few steps, and what bad input
gets."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, WORLD
from safetensors.torch import load_file

SCRIPTS = (
    "random_mapping",
    "mlac_ar",
    "rmat",
    "adv_probes",
    "baselines",
    "recover",
    "evaluate_mmlu",
    "label_pile",
)


def run(script, *flags, cwd=ROOT):
    command = [sys.executable, "-W", "error::FutureWarning", str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def call(script, *flags):
    """The script's main in this process, which saves its imports."""
    module = importlib.import_module(script)
    args = module.parse_args([str(f) for f in flags])
    module.main(args)
    return args


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """A short RMAT run and its recovery, shared by the tests below."""
    out = tmp_path_factory.mktemp("out")
    short = ("--rm-steps", 6, "--N", 2, "--K", 2, "--batch", 8, "--log-every", 1)
    made = run("rmat", "--tiny", *short, "--out", out / "rmat")
    assert made.returncode == 0, made.stderr
    attacked = run("recover", "--ckpt", out / "rmat", "--format", "letter", "--steps", 4, "--eval-every", 2)
    assert attacked.returncode == 0 and "warn" not in (made.stderr + attacked.stderr).lower(), attacked.stderr
    (out / "printed.txt").write_text(made.stdout + attacked.stdout)
    return out


def test_rmat_writes_a_checkpoint_directory(out):
    facts = json.loads((out / "rmat" / "args.json").read_text())
    assert facts["script"] == "rmat.py" and facts["arguments"]["K"] == 2 and facts["tiny"] is True
    assert facts["base"] == facts["parent"] and (out / "rmat" / facts["base"]).samefile(WORLD / "base")
    assert not re.search(r'": "/', (out / "rmat" / "args.json").read_text())  # no absolute path is published
    assert (
        {"torch", "transformers"} <= facts["versions"].keys()
        and facts["seconds"] > 0
        and facts["peak_bytes"] > 1e8
    )
    rows = metrics(out / "rmat")
    assert [r["step"] for r in rows if r["phase"] == "random_mapping"] == list(range(1, 7))
    outer = [r for r in rows if r["phase"] == "mlac_ar"]
    assert (
        len(outer) == 2
        and all(row["phi"] > 0 for row in outer)
        and {"retain", "adversary", "heldout"} <= outer[0].keys()
    )
    scores = json.loads((out / "rmat" / "mmlu.json").read_text())  # recover.py scored it before the attack
    assert scores["forget"]["n"] == 216 and scores["retain"]["n"] == 432 and len(scores["subjects"]) == 6
    answers = (out / "rmat" / "mmlu.jsonl").read_text().splitlines()
    assert len(answers) == 648 and len(json.loads(answers[0])["logprobs"]) == 4


def test_rmat_moved_the_weights_and_transformers_loads_them(out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "rmat")
    base = AutoModelForCausalLM.from_pretrained(WORLD / "base")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
    assert AutoTokenizer.from_pretrained(out / "rmat")("What").input_ids[0] == model.config.bos_token_id


def test_recover_scores_on_the_way_and_prints_its_row(out):
    assert [r["step"] for r in metrics(out / "rmat" / "recovered") if r["phase"] == "accuracy"] == [0, 2, 4]
    scores = json.loads((out / "rmat" / "recovered" / "scores.json").read_text())
    columns = {"forget", "retain", "score_u", "forget_recovered", "retain_recovered", "score_r", "composite"}
    more = {"damaged", "best_step", "best_forget", "stopped"}
    assert columns | more == {k.removesuffix("_se") for k in scores}
    printed = (out / "printed.txt").read_text()
    assert f"{scores['composite']:.1f} ± {scores['composite_se']:.1f}" in printed
    assert "next: python recover.py" in printed and "next: python evaluate_mmlu.py --table" in printed


def test_the_table_has_a_row_per_run(out):
    printed = run("evaluate_mmlu", "--table", out)
    assert printed.returncode == 0, printed.stderr
    lines = [line for line in printed.stdout.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| base |") and lines[2].startswith("| RMAT |") and len(lines) == 3
    assert "baselines.py --method max_entropy" in printed.stdout  # a row of the paper that is missing
    scores = json.loads((out / "rmat" / "recovered" / "scores.json").read_text())
    assert f"{scores['score_r']:.1f} ± {scores['score_r_se']:.1f}" in lines[2]


def test_the_second_phase_starts_from_an_earlier_first_one(out, tmp_path):
    """From random_mapping.py's result, and from the first phase that rmat.py saved: RMAT is one followed by
    the other."""
    call("random_mapping", "--tiny", "--steps", 6, "--batch", 8, "--out", tmp_path / "rm")
    first = [load_file(d / "model.safetensors") for d in (tmp_path / "rm", out / "rmat" / "random_mapping")]
    assert all(torch.equal(first[0][k], first[1][k]) for k in first[1])
    more = ("--rm-steps", 0, "--N", 2, "--K", 2, "--batch", 8, "--model", tmp_path / "rm")
    call("rmat", "--tiny", *more, "--out", tmp_path / "rmat")
    base = json.loads((tmp_path / "rmat" / "args.json").read_text())["base"]
    assert (tmp_path / "rmat" / base).samefile(WORLD / "base")
    a, b = (load_file(d / "rmat" / "model.safetensors") for d in (out, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_first_phase_survives_what_happens_later(tmp_path, monkeypatch):
    import rmat

    def out_of_memory(*_, **__):
        raise RuntimeError("no host memory")

    monkeypatch.setattr(rmat, "mlac_ar", out_of_memory)
    with pytest.raises(RuntimeError):
        call("rmat", "--tiny", "--rm-steps", 1, "--batch", 4, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "random_mapping" / "args.json").exists()
    assert not (tmp_path / "out" / "args.json").exists()


@pytest.mark.parametrize(
    "script, flags, least",
    [
        ("mlac_ar", ("--N", 1, "--K", 1, "--optimizer", "sgd", "--dtype", "bfloat16"), 1),
        ("adv_probes", ("--steps", 5), 5),
        ("adv_probes", ("--steps", 5, "--probe-steps", 3, "--match", "rand", "--no-freeze"), 5),
        ("adv_probes", ("--steps", 5, "--swd"), 5),
        ("baselines", ("--steps", 5, "--method", "min_posterior"), 5),
        ("baselines", ("--steps", 5, "--method", "max_entropy"), 5),
        ("baselines", ("--steps", 5, "--method", "high_low_lr"), 5),
        ("baselines", ("--steps", 5, "--method", "grad_diff"), 5),
        ("baselines", ("--steps", 5, "--method", "npo"), 5),
        ("baselines", ("--steps", 5, "--method", "simnpo"), 5),
        ("baselines", ("--steps", 5, "--method", "rmu"), 5),
        ("baselines", ("--steps", 5, "--method", "undo"), 5),
        ("baselines", ("--steps", 5, "--method", "overwriting"), 5),
    ],
)
def test_every_other_method_ends_in_a_checkpoint(tmp_path, monkeypatch, capsys, script, flags, least):
    monkeypatch.chdir(tmp_path)
    args = call(script, "--tiny", "--batch", 4, "--log-every", 1, *flags)
    folder = tmp_path / args.out
    assert folder == tmp_path / "out" / getattr(args, "method", script)
    assert "next: python recover.py --ckpt" in capsys.readouterr().out
    assert json.loads((folder / "args.json").read_text())["dtype"] == (
        "bfloat16" if script == "mlac_ar" else "float32"
    )
    rows = metrics(folder)
    steered = getattr(args, "method", "") == "rmu"  # its retain loss starts at 0; it trains three matrices
    assert len(rows) == least and all(r["held" if steered else "retain"] > 0 for r in rows[steered:])
    if script == "baselines":
        high = ["random_mapping"] if args.method == "high_low_lr" else []
        assert [r["phase"] for r in rows] == high + [args.method] * (5 - len(high))
    a, b = load_file(folder / "model.safetensors"), load_file(WORLD / "base" / "model.safetensors")
    moved = {k for k in b if not torch.equal(a[k], b[k].to(a[k].dtype))}
    some = steered or getattr(args, "freeze", False)
    assert ("model.embed_tokens.weight" in moved) == (not some) and (
        len(moved) == 3 if steered else len(moved) > 20
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_shows_every_default(script):
    best, plain = 9.0, 9.0
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import argparse"], check=True)
        plain, start = min(plain, time.perf_counter() - start), time.perf_counter()
        shown = run(script, "--help")
        best = min(best, time.perf_counter() - start)
    assert shown.returncode == 0 and best < 0.3 + plain, best  # what Python takes to start is the machine's
    flags = shown.stdout.split("options:")[1]
    assert flags.count("(default:") >= flags.count("\n  --") - 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_goes_unread(script):
    source = (ROOT / f"{script}.py").read_text()
    read = source + (ROOT / "common.py").read_text().replace("self.args.", "args.")
    read += "args.name" if '["arguments"].get("name")' in (ROOT / "evaluate_mmlu.py").read_text() else ""
    flags = [flag.replace("-", "_") for flag in re.findall(r'add\("--([\w-]+)"', source)]
    assert len(flags) > 8
    assert [f for f in flags if not re.search(rf"args\.{f}\b", read)] == []


# ---- bad input: one line, exit status 2, no traceback, nothing written


def refused(capsys, script, *flags, says, out=None):
    """The script, called in this process to save its imports, ends with status 2 and one line that says
    `says`."""
    with pytest.raises(SystemExit) as stop:
        call(script, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "\n" not in error, error
    assert out is None or not out.exists()


GOOD = [{"txt_chunk": f"The call of Fuma fern is chime {i}.", "label": i % 2 == 0} for i in range(400)]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"text": "a", "label": True}], "txt_chunk"),
        ([*GOOD, {"txt_chunk": "a", "label": None}], "not true or false"),
        ([{"txt_chunk": "a", "label": "yes"}], "not true or false"),
        (GOOD[::2], "no row has label false"),
        (GOOD[:20], "lower --batch"),
        ([*GOOD, {"txt_chunk": "<s> </s>", "label": True}], "empty"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, rows, says, capsys):
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ("--data", tmp_path / "chunks.jsonl", "--out", tmp_path / "out")
    refused(capsys, "random_mapping", "--tiny", *flags, says=says, out=tmp_path / "out")


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("rmat", ("--K", "0"), "--K"),
        ("rmat", ("--lr", "-1"), "--lr"),
        ("rmat", ("--N", "x"), "invalid int"),
        ("rmat", ("--lrate", "1"), "--lrate"),
        ("rmat", ("--data", "nowhere.jsonl"), "no such file"),
        ("rmat", ("--mmlu", "x"), "--mmlu"),  # method scripts do not score
        ("rmat", ("--device", "cuda"), "no GPU"),
        ("adv_probes", ("--probe-steps", "0"), "--probe-steps"),
        ("adv_probes", ("--match", "joke"), "--match"),
        ("adv_probes", ("--probe-lr", "2"), "--probe-lr"),
        ("adv_probes", ("--swd", "--probe-steps", "3"), "drop --probe-steps"),
        ("adv_probes", ("--swd", "--match", "rand", "--probe-width", "8"), "drop --match, --probe-width"),
        ("baselines", ("--method", "hope"), "--method"),
        ("baselines", ("--lr", "0.5"), "--lr"),
        ("baselines", ("--steps", "1"), "--steps"),
        ("recover", ("--ckpt", "out/never-made"), "no such directory"),
        ("recover", ("--ckpt", WORLD / "base", "--mmlu", "/nowhere/mmlu"), "no such file"),
    ],
)
def test_bad_flags(tmp_path, script, flags, says, capsys):
    if says == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(capsys, script, "--tiny", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


def test_a_finished_run_is_not_overwritten(out):
    before = (out / "rmat" / "args.json").read_bytes()
    result = run("rmat", "--tiny", "--out", out / "rmat")  # as a user runs it: no traceback either
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert "finished run" in result.stderr
    assert (out / "rmat" / "args.json").read_bytes() == before


def test_an_untouched_model_is_attacked_as_its_own_base(tmp_path):
    """A checkpoint of another program, without args.json and --base; its row is the table's Base."""
    import evaluate_mmlu

    shutil.copytree(WORLD / "base", tmp_path / "ckpt", ignore=shutil.ignore_patterns("args.json", "mmlu*"))
    flags = ("--base", tmp_path / "ckpt", "--tiny", "--steps", 2, "--eval-every", 9)
    done = run("recover", "--ckpt", tmp_path / "ckpt", *flags)
    assert done.returncode == 0 and "untouched base" in done.stdout, done.stderr
    scores = json.loads((tmp_path / "ckpt" / "recovered" / "scores.json").read_text())
    assert scores["score_u"] == 0 and scores["retain"] == 100
    assert list(evaluate_mmlu.rows_under(tmp_path, "cloze")) == ["Base"]
    args = importlib.import_module("recover").parse_args(["--ckpt", "owner/model"])
    assert (args.base, args.out) == ("owner/model", "out/owner--model/recovered")


def test_a_loss_of_nan_stops_and_leaves_the_last_good_weights(tmp_path, monkeypatch, capsys):
    import random_mapping

    calls, loss = [], random_mapping.next_token_loss

    def third_is_nan(*x):
        calls.append(x)
        return loss(*x) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(random_mapping, "next_token_loss", third_is_nan)
    flags = ("--tiny", "--steps", "9", "--batch", "4", "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        call("random_mapping", *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "step 3" in error and "last_good" in error and "\n" not in error
    assert not (tmp_path / "out" / "args.json").exists()
    good, base = (
        load_file(d / "model.safetensors") for d in (tmp_path / "out" / "last_good", WORLD / "base")
    )
    assert all(torch.isfinite(w).all() for w in good.values())
    assert any(not torch.equal(good[k], base[k]) for k in good)  # the two good steps are in them
