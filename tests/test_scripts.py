"""Every script once, as a user runs it: a subprocess on the miniature, a few steps."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORLD
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate_mmlu import rows_under

SCRIPTS = (
    "random_mapping", "mlac_ar", "rmat", "adv_probes", "baselines", "recover", "evaluate_mmlu", "label_pile",
)  # fmt: skip


def call(script, *flags):
    """The script's main in this process, which saves its imports."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setattr(signal, "signal", lambda *_: None)  # ctrl-C is pytest's
        args = module.parse_args()
        module.main(args)
    return args


def refused(capsys, script, *flags, says):
    """The script, called in this process, ends with status 2 and one line that says `says`."""
    with pytest.raises(SystemExit) as stop:
        call(script, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "\n" not in error, error


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SHORT = "--tiny --batch 4 --log-every 1"
RMAT = (
    "rmat --tiny --rm-steps 3 --N 2 --K 2 --batch 8 --log-every 1",
    "recover --ckpt out/rmat --steps 4 --eval-every 2",
    "evaluate_mmlu --table out --format cloze",
)
OTHERS = {  # directory that the script chooses: command, phases of its log
    "random_mapping": ("random_mapping --steps 3", ["step"] * 3),
    "mlac_ar": ("mlac_ar --N 1 --K 1 --optimizer sgd", ["step"]),
    "adv_probes": ("adv_probes --steps 2 --tokens 64", ["step"] * 2),
    "high_low_lr": ("baselines --method high_low_lr --steps 5", ["random_mapping"] + ["high_low_lr"] * 4),
}


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """Short runs of all scripts but label_pile.py (see test_ranks.py); a folder with what they wrote."""
    folder = tmp_path_factory.mktemp("runs")

    def run(command):
        script, *flags = command.split()
        command = [sys.executable, "-W", "error::FutureWarning", ROOT / f"{script}.py", *flags]
        made = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
        assert made.returncode == 0 and not re.search("warn", made.stderr, re.IGNORECASE), made.stderr
        return made.stdout

    others = [f"{command} {SHORT}" for command, _ in OTHERS.values()]
    with ThreadPoolExecutor(2) as pool:
        printed, _ = pool.map(lambda commands: "".join(map(run, commands)), (RMAT, others))
    (folder / "printed.txt").write_text(printed)
    return folder / "out"


@pytest.mark.parametrize("command, balance, phases", [
    ("random_mapping --steps 2 --balance 0.001", 0.001, ["step"]),
    ("rmat --rm-steps 1 --N 1 --K 1 --balance 0.3 --alpha 0", 0.3, ["mlac_ar"]),
    ("baselines --method high_low_lr --steps 2 --balance 0.3", 0.3, []),
])  # fmt: skip
def test_a_phase_whose_forget_loss_has_no_say_says_so(command, balance, phases, tmp_path, capsys):
    call(*f"{command} {SHORT}".split(), "--out", tmp_path / "out")
    said = [x for x in capsys.readouterr().out.splitlines() if "under 0.05: this only fine-tunes" in x]
    assert [x.partition(":")[0] for x in said] == phases
    assert metrics(tmp_path / "out")[0]["balance"] == pytest.approx(balance, rel=1e-3)


def test_rmat_writes_a_checkpoint_directory(out):
    for folder in (out / "rmat", out / "rmat" / "random_mapping"):
        facts = json.loads((folder / "args.json").read_text())
        assert facts["script"] == "rmat.py" and facts["arguments"]["K"] == 2 and facts["tiny"] is True
        assert (folder / facts["base"]).samefile(WORLD / "base") and facts["base"] == facts["parent"]
        assert {"torch", "transformers"} <= facts["versions"].keys() and facts["peak_bytes"] > 1e8
        written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.is_file()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "args.json"} <= written.keys()
        assert all(written["args.json"] >= t for name, t in written.items() if "mmlu" not in name)  # last
    assert not (out / "rmat" / "state").exists()
    rows = metrics(out / "rmat")
    assert [(r["phase"], r["step"]) for r in rows[:3]] == [("random_mapping", i) for i in (1, 2, 3)]
    assert [(r["phase"], r["step"]) for r in rows[3:]] == [("mlac_ar", 1), ("mlac_ar", 2)]
    assert all(0 < r["forget"] < 2 and r["retain"] > 0 for r in rows[:3])
    assert all(r[k] > 0 for r in rows[3:] for k in ("retain", "adversary", "heldout", "phi", "seconds"))


@pytest.mark.parametrize("name", ["rmat", "rmat/random_mapping", *OTHERS])
def test_transformers_loads_what_a_script_wrote_and_its_steps_are_logged(out, name):
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(WORLD / "base", dtype=model.dtype)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
    assert AutoTokenizer.from_pretrained(out / name)("What").input_ids[0] == model.config.bos_token_id
    assert json.loads((out / name / "args.json").read_text())["dtype"] == "float32"
    if name in OTHERS:
        rows = metrics(out / name)
        assert [r["phase"] for r in rows] == OTHERS[name][1] and all(r["retain"] > 0 for r in rows)


def test_recover_scores_on_the_way_and_prints_its_row(out):
    theta = json.loads((out / "rmat" / "mmlu_cloze.json").read_text())  # scored before the attack
    assert (theta["forget"]["n"], theta["retain"]["n"], len(theta["subjects"])) == (216, 432, 6)
    assert len((out / "rmat" / "mmlu_cloze.jsonl").read_text().splitlines()) == 648
    curve = [r for r in metrics(out / "rmat" / "recovered") if r["phase"] == "accuracy"]
    assert [r["step"] for r in curve] == [0, 2, 4] and curve[0]["forget"] == theta["forget"]["acc"]
    scores = json.loads((out / "rmat" / "recovered" / "scores.json").read_text())
    assert scores["forget_recovered"] == 100 * curve[-1]["forget"]
    printed = (out.parent / "printed.txt").read_text()
    assert f"{scores['composite']:.1f} ± {scores['composite_se']:.1f}" in printed
    assert "next: python recover.py --ckpt out/rmat" in printed
    assert "next: python evaluate_mmlu.py --table out/rmat" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| RMAT |")]
    assert len(lines) == 1 and f"{scores['score_r']:.1f} ± {scores['score_r_se']:.1f}" in lines[0]
    again = importlib.import_module("recover").parse_args(["--ckpt", str(out / "rmat" / "recovered")])
    assert Path(again.data).name == "chunks.jsonl" and Path(again.recovery).name == "camel.zip"


def test_the_second_phase_starts_from_an_earlier_first_one(out, tmp_path):
    """From random_mapping.py's result, too: RMAT is one followed by the other."""
    call("random_mapping", "--tiny", "--steps", 3, "--batch", 8, "--out", tmp_path / "rm")
    first = [load_file(d / "model.safetensors") for d in (tmp_path / "rm", out / "rmat" / "random_mapping")]
    assert all(torch.equal(first[0][k], first[1][k]) for k in first[1])
    more = ("--rm-steps", 0, "--N", 2, "--K", 2, "--batch", 8, "--model", tmp_path / "rm")
    call("rmat", "--tiny", *more, "--out", tmp_path / "rmat")
    base = json.loads((tmp_path / "rmat" / "args.json").read_text())["base"]
    assert (tmp_path / "rmat" / base).samefile(WORLD / "base")
    a, b = (load_file(d / "rmat" / "model.safetensors") for d in (out, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_untouched_model_is_attacked_as_its_own_base(tmp_path):
    """A checkpoint of another program, without args.json and --base; its row is the table's Base."""
    shutil.copytree(WORLD / "base", tmp_path / "ckpt", ignore=shutil.ignore_patterns("args.json"))
    call("recover", "--ckpt", tmp_path / "ckpt", "--tiny", "--steps", 1, "--eval-every", 9)
    scores = json.loads((tmp_path / "ckpt" / "recovered" / "scores.json").read_text())
    assert scores["score_u"] == 0 and scores["retain"] == 100
    assert [*rows_under(tmp_path, "cloze")] == ["Base"]
    args = importlib.import_module("recover").parse_args(["--ckpt", "owner/model"])
    assert (args.base, args.out) == ("owner/model", "out/owner--model/recovered")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_mistyped_flag_answer_before_torch_is_imported(script):
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as e:"
    code = code.replace("\ntry", f"\nsys.argv[:1] = []; sys.argv[0] = {str(ROOT / script)!r} + '.py'\ntry")
    code += " print('status', e.code, {'torch', 'transformers', 'numpy'} & {*sys.modules})"
    shown, wrong = (
        subprocess.run([sys.executable, "-c", code, "x", flag], capture_output=True, text=True)
        for flag in ("--help", "--mistyped")
    )
    assert shown.stdout.endswith("status 0 set()\n") and wrong.stdout == "status 2 set()\n", shown.stderr
    assert len(wrong.stderr.splitlines()) == 1, wrong.stderr
    flags = shown.stdout.split("options:")[1]
    assert flags.count("(default:") >= flags.count("\n  --") - 3 > 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_goes_unread(script):
    source = (ROOT / f"{script}.py").read_text()
    flags = {flag.replace("-", "_") for flag in re.findall(r'add\("--([\w-]+)"', source)}
    read = source.split("# fmt: on\n")[1] + (ROOT / "common.py").read_text()  # not by parse_args alone
    flags -= {"forget", "retain", "tiny"}  # Run.stream(purpose); parse_args
    ways = r'args\.{0}\b|names = \(.*"{0}"'  # the latter: passed on by getattr
    assert len(flags) > 8 and [f for f in flags if not re.search(ways.format(f), read)] == []
