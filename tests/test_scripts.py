"""Every script once, as a user runs it: a subprocess on the miniature, a few steps, and what bad input gets."""

import importlib
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

WORLD = ROOT / "tests" / "tiny" / "world0"
SCRIPTS = ("random_mapping", "mlac_ar", "rmat", "adv_probes", "baselines", "recover", "evaluate_mmlu")


def run(script, *flags, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """A short RMAT run and its recovery, shared by the tests below."""
    out = tmp_path_factory.mktemp("out")
    made = run(
        "rmat",
        "--tiny",
        "--format",
        "letter",
        "--rm-steps",
        6,
        "--N",
        2,
        "--K",
        2,
        "--batch",
        8,
        "--log-every",
        1,
        "--out",
        out / "rmat",
    )
    assert made.returncode == 0, made.stderr
    attacked = run("recover", "--ckpt", out / "rmat", "--steps", 4, "--eval-every", 2)
    assert attacked.returncode == 0, attacked.stderr
    (out / "printed.txt").write_text(made.stdout + attacked.stdout)
    return out


def test_rmat_writes_a_checkpoint_directory(out):
    facts = json.loads((out / "rmat" / "args.json").read_text())
    assert facts["script"] == "rmat.py" and facts["arguments"]["K"] == 2 and facts["tiny"] is True
    assert facts["base"] == str(WORLD / "base") == facts["parent"]
    assert {"torch", "transformers"} <= facts["versions"].keys() and facts["seconds"] > 0 and facts["peak_bytes"] > 1e8
    rows = [json.loads(line) for line in (out / "rmat" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "random_mapping"] == list(range(1, 7))
    mlac = [r for r in rows if r["phase"] == "mlac_ar"]
    assert len(mlac) == 2 and {"retain", "adversary", "heldout", "bounded"} <= mlac[0].keys()
    scores = json.loads((out / "rmat" / "mmlu.json").read_text())
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
    rows = [json.loads(s) for s in (out / "rmat" / "recovered" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "accuracy"] == [0, 2, 4]
    scores = json.loads((out / "rmat" / "recovered" / "scores.json").read_text())
    assert {"forget", "retain", "score_u", "forget_recovered", "retain_recovered", "score_r", "composite"} <= {
        k.removesuffix("_se") for k in scores
    }
    printed = (out / "printed.txt").read_text()
    assert f"{scores['composite']:.1f} ± {scores['composite_se']:.1f}" in printed
    assert "next: python recover.py" in printed and "next: python evaluate_mmlu.py --table" in printed


def test_the_table_has_a_row_a_run(out):
    printed = run("evaluate_mmlu", "--table", out)
    assert printed.returncode == 0, printed.stderr
    lines = [line for line in printed.stdout.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| base |") and lines[2].startswith("| RMAT |") and len(lines) == 3
    assert "baselines.py --method max_entropy" in printed.stdout  # a row of the paper that is not there yet
    scores = json.loads((out / "rmat" / "recovered" / "scores.json").read_text())
    assert f"{scores['score_r']:.1f} ± {scores['score_r_se']:.1f}" in lines[2]


def test_the_second_phase_starts_from_an_earlier_first_one(out):
    first = run("random_mapping", "--tiny", "--steps", 6, "--batch", 8, "--out", out / "rm")
    assert first.returncode == 0, first.stderr
    more = ("--rm-steps", 0, "--N", 2, "--K", 2, "--batch", 8, "--model", out / "rm")
    second = run("rmat", "--tiny", *more, "--out", out / "rmat2")
    assert second.returncode == 0, second.stderr
    assert json.loads((out / "rmat2" / "args.json").read_text())["base"] == str(WORLD / "base")
    a, b = load_file(out / "rmat" / "model.safetensors"), load_file(out / "rmat2" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # so RMAT is one followed by the other


def test_mlac_ar_runs(out):
    made = run("mlac_ar", "--tiny", "--N", 1, "--K", 1, "--optimizer", "sgd", "--dtype", "bfloat16", "--out", out / "m")
    assert made.returncode == 0, made.stderr
    assert json.loads((out / "m" / "args.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "script, flags",
    [
        ("adv_probes", ()),
        ("adv_probes", ("--probe-steps", 3, "--match", "rand", "--no-freeze")),
        ("adv_probes", ("--swd",)),
        ("baselines", ("--method", "min_posterior")),
        ("baselines", ("--method", "max_entropy")),
        ("baselines", ("--method", "high_low_lr")),
    ],
)
def test_every_other_method_ends_in_a_scored_checkpoint(tmp_path, monkeypatch, capsys, script, flags):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    args = module.parse_args(["--tiny", "--steps", "5", "--batch", "4", "--log-every", "1", *map(str, flags)])
    module.main(args)
    folder = tmp_path / args.out
    assert folder == tmp_path / "out" / (args.method if script == "baselines" else "adv_probes")
    summary = json.loads((folder / "mmlu_cloze.json").read_text())
    assert summary["forget"]["n"] == 216 and "next: python recover.py --ckpt" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if script == "adv_probes":
        assert {"wasserstein", "retain", "critic_steps"} <= rows[-1].keys() and len(rows) == 5
        assert rows[-1]["critic_steps"] == (0 if args.swd else 5 * args.probe_steps)
    else:
        phases = [r["phase"] for r in rows]
        high = ["random_mapping"] if args.method == "high_low_lr" else []
        assert phases == high + [args.method] * (5 - len(high))
    a, b = load_file(folder / "model.safetensors"), load_file(WORLD / "base" / "model.safetensors")
    moved = {k for k in b if not torch.equal(a[k], b[k])}
    assert ("model.embed_tokens.weight" in moved) == (script == "baselines" or not args.freeze) and len(moved) > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_shows_every_default(script):
    start = time.perf_counter()
    shown = run(script, "--help")
    assert time.perf_counter() - start < 0.5 and shown.returncode == 0
    flags = shown.stdout.split("options:")[1]
    assert flags.count("(default:") >= flags.count("\n  --") - 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_goes_unread(script):
    source = (ROOT / f"{script}.py").read_text()
    common = (ROOT / "common.py").read_text()
    flags = [line.split('"--')[1].split('"')[0].replace("-", "_") for line in source.splitlines() if 'add("--' in line]
    assert len(flags) > 8
    body = source.split("return args", 1)[1]
    unread = [f for f in flags if f"args.{f}" not in body and f"args.{f}" not in common and f not in ("tiny",)]
    assert [f for f in unread if f"args.{f}" not in source] == []


# ---- bad input: one line, exit status 2, no traceback, nothing written


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def foreign_tokenizer(folder):
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] |= {f"new{i}": len(facts["model"]["vocab"]) + i for i in range(5)}
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncated, "cannot be loaded"),
        (with_nan, "NaN"),
        (without_a_weight, "missing"),
        (foreign_tokenizer, "tokenizer"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (shutil.rmtree, "no such directory"),
    ],
)
def test_an_unfit_checkpoint(tmp_path, damage, says, capsys):
    shutil.copytree(WORLD / "base", tmp_path / "ckpt")
    damage(tmp_path / "ckpt")
    refused(
        capsys,
        "rmat",
        "--tiny",
        "--model",
        tmp_path / "ckpt",
        "--out",
        tmp_path / "out",
        says=says,
        out=tmp_path / "out",
    )


def refused(capsys, script, *flags, says, out=None):
    """The script, called in this process to save its imports, ends with status 2 and one line that says `says`."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([str(f) for f in flags]))
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
def test_unfit_data(tmp_path, rows, says, capsys):
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ("--data", tmp_path / "chunks.jsonl", "--out", tmp_path / "out")
    refused(capsys, "random_mapping", "--tiny", *flags, says=says, out=tmp_path / "out")


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--K", "0"), "--K"),
        (("--lr", "-1"), "--lr"),
        (("--N", "x"), "invalid int"),
        (("--lrate", "1"), "--lrate"),
        (("--data", "nowhere.jsonl"), "no such file"),
        (("--mmlu", "/nowhere/mmlu"), "no such file"),
        (("--device", "cuda"), "no GPU"),
    ],
)
def test_bad_flags(tmp_path, flags, says, capsys):
    if says == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(capsys, "rmat", "--tiny", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("adv_probes", ("--probe-steps", "0"), "--probe-steps"),
        ("adv_probes", ("--match", "joke"), "--match"),
        ("adv_probes", ("--probe-lr", "2"), "--probe-lr"),
        ("baselines", ("--method", "hope"), "--method"),
        ("baselines", ("--lr", "0.5"), "--lr"),
        ("baselines", ("--steps", "1"), "--steps"),
    ],
)
def test_bad_flags_of_the_other_methods(tmp_path, script, flags, says, capsys):
    refused(capsys, script, "--tiny", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


def test_figures_need_a_table(capsys):
    refused(capsys, "evaluate_mmlu", "--tiny", "--figures", says="--table")


def test_a_finished_run_is_not_overwritten(out):
    before = (out / "rmat" / "args.json").read_bytes()
    result = run("rmat", "--tiny", "--out", out / "rmat")  # as a user runs it: no traceback either
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert "finished run" in result.stderr
    assert (out / "rmat" / "args.json").read_bytes() == before


def test_a_checkpoint_that_is_not_there(capsys):
    refused(capsys, "recover", "--ckpt", "out/never-made", says="no such directory")


def test_a_checkpoint_of_another_program_is_asked_for_its_base(tmp_path, capsys):
    shutil.copytree(WORLD / "base", tmp_path / "ckpt", ignore=shutil.ignore_patterns("args.json", "mmlu*"))
    refused(capsys, "recover", "--ckpt", tmp_path / "ckpt", says="--base")


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_weights(tmp_path, monkeypatch, capsys):
    import random_mapping

    calls, loss = [], random_mapping.next_token_loss

    def third_is_nan(*x):
        calls.append(x)
        return loss(*x) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(random_mapping, "next_token_loss", third_is_nan)
    args = random_mapping.parse_args(["--tiny", "--steps", "9", "--batch", "4", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        random_mapping.main(args)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "step 3" in error and "last_good" in error and "\n" not in error
    assert not (tmp_path / "out" / "args.json").exists()
    good, base = (load_file(d / "model.safetensors") for d in (tmp_path / "out" / "last_good", WORLD / "base"))
    assert all(torch.isfinite(w).all() for w in good.values())
    assert any(not torch.equal(good[k], base[k]) for k in good)  # the two good steps are in them
