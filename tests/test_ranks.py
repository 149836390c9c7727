"""Several GPUs and micro-batches: what two processes on the CPU compute is what one does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import ranks
import torch
from conftest import ROOT, WORLD, bpe, toy_model
from safetensors.torch import load_file

import common
import mlac_ar

SHORT = "--tiny --device cpu --batch 8 --tokens 64 --log-every 1".split()


def torchrun(*command, wait=True):
    """Two processes; one line of the log is read at a time where the test goes on meanwhile (wait=False)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, command)]
    if any(".py" in x and "/" not in x for x in command):
        command = [str(ROOT / x) if x.endswith(".py") else x for x in command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if not wait:
        more = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        return subprocess.Popen(command, **more)
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


def alone(*command):
    command = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def farthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---- every method


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Weights after each case, of one process and of two, and the first weights. 257 tokens, 33 units and
    two processes: shards of unequal size."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), bpe(["a few words"] * 3, size=60)
    sizes = dict(vocab=len(tokenizer), intermediate_size=33, num_hidden_layers=3)
    kinds = {"own_head": {}, "tied_checkpointing": dict(tie_word_embeddings=True)}
    kinds["tied_checkpointing_micro"] = kinds["tied_checkpointing"]
    for name, more in kinds.items():
        toy_model("llama", **sizes, **more).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    wide = dict(vocab=257, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    toy_model("llama", **wide).save_pretrained(folder / "wide" / "model")
    tokenizer.save_pretrained(folder / "wide" / "model")
    run = torchrun(ROOT / "tests" / "ranks.py", folder)
    assert run.returncode == 0, run.stderr[-3000:]
    first = {name: load_file(folder / name / "model.safetensors") for name in kinds}
    return ranks.weights(folder), torch.load(folder / "weights.pt"), first, folder / "wide" / "model"


def compare(a, b, first):
    """The same weights and the same log, and as a control the first weights: they trained."""
    (one, log), (two, other) = a, b
    assert farthest(one, two) < 1e-6
    moved, off = (sum(float((one[k] - x[k]).square().sum()) for k in first) ** 0.5 for x in (first, two))
    assert off < 2e-3 * moved
    assert farthest(first, {k: one[k] for k in first}) > 9e-6
    assert len(log) == len(other)
    for step, same in zip(log, other):
        assert step == pytest.approx(same, rel=1e-4, abs=1e-6)


KINDS = {"own_head": ranks.CASES, "tied_checkpointing": ranks.CASES, "tied_checkpointing_micro": ranks.FEW}


@pytest.mark.parametrize("kind, case", [(kind, case) for kind, cases in KINDS.items() for case in cases])
def test_two_processes_end_in_the_weights_of_one(both, kind, case):
    compare(both[0][case, kind], both[1][case, kind], both[2][kind])


@pytest.mark.parametrize("case", ranks.CASES)
def test_micro_batches_end_in_the_weights_of_the_whole_batch(both, case):
    kind = "tied_checkpointing"
    compare(both[0][case, kind], both[0][case, f"{kind}_micro"], both[2][kind])


def test_micro_batches_hold_the_activations_of_their_rows():
    peaks = {}
    for size in (0, 1):
        model = toy_model(num_hidden_layers=6, intermediate_size=256).train()
        model.micro_batch, (ids, mask) = size, ranks.Rows(16, 64, full=True)[0]
        with common.LiveBytes([*model.parameters()]) as live:
            common.next_token_loss(model, ids, mask).backward()
        peaks[size] = live.peak - 2 * sum(4 * p.numel() for p in model.parameters())
    assert peaks[1] < peaks[0] / 6


# ---- scripts


def started(process, line):
    """Reads the output up to a line that contains `line`."""
    seen = []
    while text := process.stdout.readline():
        seen.append(text)
        if line in text:
            return
    raise AssertionError("".join(seen))


def pid_of(process, rank):
    """The process of a rank that torchrun started."""
    for path in (p for p in os.listdir("/proc") if p.isdigit()):
        try:
            parent = open(f"/proc/{path}/stat").read().rpartition(")")[2].split()[1]
            if parent == str(process.pid) and f"\0RANK={rank}\0" in open(f"/proc/{path}/environ").read():
                return int(path)
        except OSError:  # it has just ended
            pass


def ours(text):
    """Lines that the scripts print about what went wrong, not torchrun's."""
    return [line for line in text.splitlines() if line.startswith(("random_mapping.py:", "nan.py:"))]


def test_a_cut_run_goes_on_and_ends_in_the_same_bits_as_one_process_to_rounding(tmp_path):
    command = ["random_mapping.py", *SHORT, "--steps", 8, "--lr", 1e-5, "--save-every", 0.001]
    cut = torchrun(*command, "--out", tmp_path / "cut", wait=False)
    started(cut, "step 4/8")
    begun = time.time()
    os.kill(pid_of(cut, 1), signal.SIGKILL)
    rest, _ = cut.communicate(timeout=60)
    assert cut.returncode != 0 and time.time() - begun < 30  # no hang
    assert len(ours(rest)) <= 1 and "line" not in "".join(ours(rest)) and "common.py" not in rest
    refused = alone(*command, "--out", tmp_path / "cut")
    assert refused.returncode == 2 and "with other number of processes" in refused.stderr

    again = torchrun(*command, "--out", tmp_path / "cut")
    assert again.returncode == 0 and "goes on after step" in again.stdout
    assert torchrun(*command, "--out", tmp_path / "whole").returncode == 0
    one = alone(*command, "--out", tmp_path / "one")
    assert one.returncode == 0
    cut, whole, one = (load_file(tmp_path / x / "model.safetensors") for x in ("cut", "whole", "one"))
    assert farthest(cut, whole) == 0 and farthest(whole, one) < 1e-6
    assert farthest(whole, load_file(WORLD / "base" / "model.safetensors")) > 1e-5
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert all((tmp_path / "cut" / x).read_bytes() == (tmp_path / "one" / x).read_bytes() for x in names)
    steps = [json.loads(x)["step"] for x in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9)] and not (tmp_path / "cut" / "state").exists()


NAN = """
import sys
sys.path.insert(0, {root!r})
import common, random_mapping as R
real, calls = R.next_token_loss, [0]
def loss(*batch):
    calls[0] += 1
    return real(*batch) * (float("nan") if common.rank() == 1 and calls[0] == 3 else 1)
R.next_token_loss = loss
R.main(R.parse_args(sys.argv[1:]))
"""


def test_a_nan_on_one_rank_ends_all_with_one_line_and_the_last_weights(tmp_path):
    (tmp_path / "nan.py").write_text(NAN.format(root=str(ROOT)))
    run = torchrun(tmp_path / "nan.py", *SHORT, "--steps", 8, "--lr", 1e-5, "--out", tmp_path / "x")
    assert run.returncode != 0 and "NaN" not in run.stdout
    assert len(ours(run.stderr)) == 1 and "the loss is nan at step 3" in ours(run.stderr)[0]
    kept = load_file(tmp_path / "x" / "last_good" / "model.safetensors")
    first = load_file(WORLD / "base" / "model.safetensors")
    assert 5e-6 < farthest(kept, first) < 2.1e-5  # after two steps


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    """recover.py on a model that knows one side: before the attack and after it."""
    found = {}
    for run in (torchrun, alone):
        ckpt = tmp_path / run.__name__
        shutil.copytree(WORLD / "filtered", ckpt, ignore=shutil.ignore_patterns("mmlu*", "args.json"))
        more = ["--tiny", "--base", WORLD / "base", "--steps", 2, "--lr", 1e-5, "--batch", 8]
        done = run("recover.py", "--ckpt", ckpt, *more, "--device", "cpu", "--name", "a")
        assert done.returncode == 0, done.stderr
        answers = [(ckpt / x / "mmlu_cloze.jsonl").read_text().splitlines() for x in (".", "recovered")]
        found[run] = [json.loads(line) for text in answers for line in text]
        found[run, "row"] = json.loads((ckpt / "recovered" / "scores.json").read_text())
    one, two = found[alone], found[torchrun]
    assert [x["prediction"] for x in one] == [x["prediction"] for x in two] and len(one) == 2 * 648
    assert {x["prediction"] == x["answer"] for x in one} == {True, False}  # control: some are wrong
    for x, y in zip(one, two):
        assert x["logprobs"] == pytest.approx(y["logprobs"], abs=1e-3)
    assert found[alone, "row"] == found[torchrun, "row"]


def test_processes_label_parts_of_a_shard(tmp_path):
    command = ["label_pile.py", "--tiny", "--device", "cpu", "--max-bytes", "30kB"]
    two, one = torchrun(*command, "--out", tmp_path / "two"), alone(*command, "--out", tmp_path / "one")
    assert two.returncode == one.returncode == 0, two.stderr + one.stderr

    def rows(folder):
        lines = [x for path in folder.glob("part*.jsonl") for x in path.read_text().splitlines()]
        return sorted((json.loads(x) for x in lines), key=lambda row: [*map(int, row["id"].split("-"))])

    assert {path.name[:11] for path in (tmp_path / "two").glob("part*.jsonl")} == {
        "part-0-of-2",
        "part-1-of-2",
    }
    found, there = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert [x["id"] for x in found] == [x["id"] for x in there] and len(found) > 10
    assert [x["label"] for x in found] == [x["label"] for x in there]


def test_a_dry_run_tells_at_most_what_a_rank_holds(both, monkeypatch, capsys):
    """Two processes on the CPU, counted while they train, against the prediction from the config alone."""
    flags = "--dry-run --device cpu --N 1 --K 2 --batch 2 --tokens 32 --forget x --retain x --model".split()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        mlac_ar.main(mlac_ar.parse_args([*flags, str(both[3])]))
    told = re.search(r"cpu +peak +([\d.]+) GB", capsys.readouterr().out)
    assert 1 < float(told[1]) * 1e9 / both[1]["peak"] < 1.1


def test_a_dry_run_on_one_gpu_tells_how_many_are_enough(monkeypatch, capsys):
    class Large:
        batch = 16

    run = object.__new__(common.Run)
    run.args, run.size, run.live = Large, 140e9, common.LiveBytes()
    run.live.peaks = {n: 500e9 / n + 5e9 for n in (1, 2, 4, 8, 16, 32)}
    monkeypatch.setattr(run, "gathered_bytes", lambda: 11e9)
    assert run.advice().startswith("80 GB GPUs: 16, with at most 58 GB")
    assert "no number of 80 GB GPUs that divides --batch 8" in (setattr(Large, "batch", 8) or run.advice())
