"""Several GPUs and micro-batches: what two processes on the CPU compute is what one does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import ranks
import torch
from conftest import ROOT, WORLD, bpe, toy_model
from safetensors.torch import load_file
from test_resume import cut_off
from test_scripts import call, metrics

import common


def torchrun(*command):
    """Two processes, with what they print in one pipe."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*launch, *map(str, command)], **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})


def farthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


TIED = dict(tie_word_embeddings=True)
KINDS = {"own_head": {}, "tied": TIED, "tied_checkpointing_micro": TIED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and what ranks.py found in two processes. 257 tokens and 33 units: shards of unequal size."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), bpe(["a few words"] * 3, size=60)
    for name, more in KINDS.items():
        sizes = dict(vocab=len(tokenizer), intermediate_size=33, num_hidden_layers=3)
        toy_model("llama", **sizes, **more).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("one", "two"):
        ours = shutil.ignore_patterns("mmlu*", "args.json")
        shutil.copytree(WORLD / "filtered", folder / name / "model", ignore=ours)
    for file in WORLD.glob("mmlu/*/*.csv"):  # eight questions of each subject
        short = folder / file.relative_to(WORLD)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    cut_off("random_mapping", *ranks.RUN, "--out", folder / "one_two" / "out", at=5)
    (folder / "locked" / "out" / "state").mkdir(parents=True)
    common.lock(folder / "locked" / "out" / "state" / "lock")
    run = torchrun(ROOT / "tests" / "ranks.py", folder)
    (folder / "said.txt").write_text(run.communicate(timeout=600)[0])
    assert run.returncode == 0, (folder / "said.txt").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """Weights after each case, of one process and of two, and the first weights."""
    first = {name: load_file(folder / name / "model.safetensors") for name in KINDS}
    return ranks.weights(folder), torch.load(folder / "found.pt"), first


def compare(a, b, first):
    """The same weights and the same log, and as a control the first weights: they trained."""
    (one, log), (two, other) = a, b
    assert farthest(one, two) < 1e-6
    moved, off = (sum(float((one[k] - x[k]).square().sum()) for k in first) ** 0.5 for x in (first, two))
    assert off < 2e-3 * moved
    assert farthest(first, {k: one[k] for k in first}) > 5e-6
    assert len(log) == len(other)
    for step, same in zip(log, other):
        assert step == pytest.approx(same, rel=1e-4, abs=1e-5)


PAIRS = [(kind, case) for kind in KINDS for case in (ranks.CASES if kind == "own_head" else ranks.FEW)]


@pytest.mark.parametrize("kind, case", PAIRS)
def test_two_processes_end_in_the_weights_of_one(both, kind, case):
    compare(both[0][case, kind], both[1][case, kind], both[2][kind])


@pytest.mark.parametrize("case", ranks.CASES)
def test_micro_batches_and_checkpointing_change_nothing(both, case):
    """Micro-batches of one row; rows are of unequal length."""
    compare(both[0][case, "tied"], both[0][case, "tied_checkpointing_micro"], both[2]["tied"])


def test_each_process_makes_the_false_text_of_its_rows(both):
    for whole, *shares in zip(ranks.false_texts(), *both[1]["false_texts"]):
        for rank, share in enumerate(shares):
            assert all(torch.equal(x[rank::2], y) for x, y in zip(whole, share))


def test_micro_batches_hold_the_activations_of_their_rows():
    peaks = {}
    for size in (0, 1):
        model = toy_model(num_hidden_layers=6, intermediate_size=256)
        model.micro_batch = size
        with common.LiveBytes([*model.parameters()]) as live:
            common.backward(model, common.next_token_loss, *ranks.Rows(16, 64, full=True)[0])
        peaks[size] = live.peak - 2 * sum(p.nbytes for p in model.parameters())
    assert peaks[1] < peaks[0] / 6


LATE = """
import os, sys, torch, common
from functools import partial
alone = partial(common.dist.init_process_group, "gloo", rank=0, world_size=1)
common.dist.init_process_group = lambda **_: alone(store=common.dist.HashStore())
for _ in range(6):
    if not (child := os.fork()):
        common.connect(torch.device("cpu"))
        held = common.dist.init_device_mesh("cpu", (1,)).get_group()
        sys.setswitchinterval(100)  # of themselves, gloo's threads get the GIL when this one ends
        for _ in range(20):
            common.dist.all_reduce(torch.ones(3), async_op=True)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_ends_after_the_threads_that_free_tensors():
    """On a busy machine one that had done all its work aborted, and torchrun ended the others."""
    subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, env=os.environ | {"WORLD_SIZE": "2"}, check=True)


def test_rank_0_alone_reads_the_weights(both):
    reads = both[1]["reads"]
    assert reads[0] >= len(KINDS) and reads[1:] == [0]


def test_a_nan_on_one_rank_ends_all_with_one_line_and_is_not_saved(folder, both):
    assert both[1]["nan"] == [2, 2]
    said = [line for line in (folder / "said.txt").read_text().splitlines() if "NaN" in line]
    assert len(said) == 1 and "NaN or infinity at step 3 (weights);" in said[0]
    assert [x.name for x in (folder / "nan" / "out" / "state").glob("*-*")] == ["step-2"]
    assert not {"args.json", "model.safetensors"} & {x.name for x in (folder / "nan").rglob("*")}


def test_where_another_process_writes_all_ranks_end_and_leave_it_alone(folder, both):
    assert both[1]["locked"] == [2, 2]
    assert "another process is writing there, or has finished;" in (folder / "said.txt").read_text()
    assert [path.name for path in (folder / "locked" / "out").rglob("*")] == ["state", "lock"]


def test_an_attack_and_its_scores_do_not_depend_on_the_number_of_processes(folder, both):
    """recover.py from end to end on a model that knows one side: before the attack and after it."""
    assert both[1]["recover"] == both[1]["sweep"] == [0, 0]
    call("recover", "--ckpt", folder / "one" / "model", *ranks.ATTACK, folder / "mmlu")
    found = [[], []]
    for answers, name in zip(found, ("one", "two")):
        for place in (folder / name / "model", folder / name / "model" / "recovered"):
            (file,) = place.glob("mmlu_cloze*.jsonl")
            answers += map(json.loads, file.read_text().splitlines())
    assert [x["prediction"] for x in found[0]] == [x["prediction"] for x in found[1]]
    assert len(found[0]) == 2 * 6 * 8 and len({x["prediction"] == x["answer"] for x in found[0]}) == 2
    for x, y in zip(*found):
        assert x["logprobs"] == pytest.approx(y["logprobs"], abs=1e-3)
    rows = [(folder / name / "model" / "recovered" / "scores.json").read_text() for name in ("one", "two")]
    assert rows[0] == rows[1]


def test_a_save_from_one_process_continues_on_two_and_the_other_way(folder, both, tmp_path, capsys):
    """The run of two is cut off by a SIGTERM to the second process alone."""
    said, others = (folder / "said.txt").read_text(), [folder / "one_two", folder / "two_one"]
    assert "continues after step 4 of 8" in said and both[1]["one_two"] == [0, 0]
    assert "rerun the same command" in said and both[1]["two_one"] == [143, 143]
    assert not (folder / "two_one" / "out" / "args.json").exists()
    for place in (tmp_path, folder / "two_one"):
        call("random_mapping", *ranks.RUN, "--out", place / "out")
    assert "continues after step 3 of 8" in capsys.readouterr().out
    whole = tmp_path / "out"
    first, last = (load_file(f / "model.safetensors") for f in (WORLD / "base", whole))
    assert farthest(first, last) > 1e-5
    for other in others:
        assert farthest(last, load_file(other / "out" / "model.safetensors")) < 1e-6
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (other / "out" / file).read_bytes() == (whole / file).read_bytes()
        for a, b in zip(metrics(whole), metrics(other / "out"), strict=True):
            assert a["step"] == b["step"] and a["retain"] == pytest.approx(b["retain"], rel=1e-4)


def test_processes_label_parts_of_a_shard(tmp_path):
    flags = ("--tiny", "--device", "cpu", "--max-bytes", "30kB", "--out")
    two = torchrun(ROOT / "label_pile.py", *flags, tmp_path / "two")
    assert two.communicate(timeout=120) and two.returncode == 0
    call("label_pile", *flags, tmp_path / "one")

    def labels(folder):
        files = folder.glob("part-*.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return sorted((tuple(map(int, row["id"].split("-"))), row["label"]) for row in rows)

    assert {p.name[:11] for p in (tmp_path / "two").glob("part-*")} >= {"part-0-of-2", "part-1-of-2"}
    assert labels(tmp_path / "one") == labels(tmp_path / "two") and len(labels(tmp_path / "one")) > 10
