"""Cut off and go on: a run that is killed and started again ends as if nothing had happened, to the bit, and
what is there in between is never taken for a checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, WORLD
from safetensors.torch import load_file, save_file
from test_scripts import call, metrics, refused

import common

SHORT = ("--tiny", "--batch", 4, "--log-every", 1)


class Cut(BaseException):
    """The end of a process, as the code that runs in it sees it: no handler catches it."""


def cut_off(monkeypatch, at, phase=None):
    """From here on a run ends in step `at` (of that phase), before it is logged."""
    log = common.Run.log

    def cut(self, step, *more, **values):
        if step == at and values.get("phase", "step") == (phase or values.get("phase", "step")):
            raise Cut
        log(self, step, *more, **values)

    monkeypatch.setattr(common.Run, "log", cut)


def same(a, b):
    """Are the weights of two checkpoint directories the same bits, and their logs but for the seconds?"""
    x, y = (load_file(folder / "model.safetensors") for folder in (a, b))
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in metrics(f)] for f in (a, b)]
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) and logs[0] == logs[1]


CASES = {  # name: script, flags, the step and phase in which it is cut off
    "random_mapping": ("random_mapping", ("--steps", 5), 4, None),
    "mlac_ar": ("mlac_ar", ("--N", 4, "--K", 2, "--hold", 1, "--vary", "rate", "K", "state", "mix"), 3, None),
    "rmat, first": ("rmat", ("--rm-steps", 4, "--N", 2, "--K", 1), 3, "random_mapping"),
    "rmat, second": ("rmat", ("--rm-steps", 3, "--N", 4, "--K", 1, "--hold", 1), 3, "mlac_ar"),
    "rmat, between": ("rmat", ("--rm-steps", 3, "--N", 2, "--K", 1, "--hold", 1), 1, "mlac_ar"),
    "rmat, bf16, SGD": (
        "rmat", ("--rm-steps", 2, "--N", 4, "--K", 1, "--optimizer", "sgd", "--dtype", "bfloat16"), 3,
        "mlac_ar",
    ),
    "adv_probes": ("adv_probes", ("--steps", 5), 4, None),
    "adv_probes, SWD": ("adv_probes", ("--steps", 5, "--swd"), 3, None),
    **{
        method: ("baselines", ("--method", method, "--steps", 5), 3, method)
        for method in ("min_posterior", "npo", "simnpo", "rmu", "undo", "overwriting", "high_low_lr")
    },
    "high_low_lr, first": ("baselines", ("--method", "high_low_lr", "--steps", 15), 3, "random_mapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, case):
    script, flags, at, phase = CASES[case]
    flags = (*SHORT, *flags, "--save-every", 1e-9)
    call(script, *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_off(patch, at, phase)
        call(script, *flags, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut" / "args.json").exists() and not (tmp_path / "cut" / "config.json").exists()
    capsys.readouterr()
    call(script, *flags, "--out", tmp_path / "cut")
    said = capsys.readouterr().out
    done = "random_mapping, finished in" if case == "rmat, between" else f"{phase or 'step'} {at - 1} of"
    assert f"goes on after {done}" in said, said
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut" / "state").exists()


@pytest.mark.parametrize("more", [(), ("--lora", 4), ("--optimizer", "sgd", "--retain-mix", 0.5)])
def test_an_attack_that_was_cut_off_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, more):
    flags = ("--ckpt", WORLD / "base", "--tiny", "--steps", 6, "--eval-every", 2, "--log-every", 1)
    flags = (*flags, "--save-every", 1e-9, *more)
    call("recover", *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_off(patch, 6)
        call("recover", *flags, "--out", tmp_path / "cut")
    capsys.readouterr()
    call("recover", *flags, "--out", tmp_path / "cut")
    assert "goes on after step 5 of 6" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "cut")
    rows = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    best = max(
        (row for row in metrics(tmp_path / "cut") if row["phase"] == "accuracy"),
        key=lambda row: row["forget"],
    )
    assert rows[1]["best_forget"] == 100 * best["forget"]  # one scored before the cut counts


def start(*flags, script="random_mapping", **more):
    """The script in a process of its own; its output is read line by line."""
    command = [sys.executable, "-u", str(ROOT / f"{script}.py"), *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes, **more)


def until(process, text):
    """Reads what it prints up to the line with `text`."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"ended without {text!r}")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, status):
    """And a kill at any moment after that is made good too; two runs at once in one directory are not."""
    flags = (*SHORT, "--steps", 30, "--out", tmp_path / "out")  # ten minutes between saves: only the signal's
    first = start(*flags)
    until(first, "step 3/30")
    if number == signal.SIGINT:
        first.send_signal(signal.SIGSTOP)
        second = start(*flags)
        refusal = second.communicate()[0]
        assert second.returncode == 2 and "another process is writing there" in refusal
        first.send_signal(signal.SIGCONT)
    first.send_signal(number)
    said = first.communicate()[0].strip().splitlines()
    assert first.returncode == status
    assert said[-1].startswith("stopped after step") and "the same command goes on" in said[-1]
    assert "Traceback" not in "".join(said)
    again = start(*flags)
    assert until(again, "goes on after step")
    until(again, "| eta")
    again.kill()
    again.wait()
    last = start(*flags)
    assert last.communicate()[0].count("goes on after") == 1 and last.returncode == 0
    if number == signal.SIGTERM:
        call("random_mapping", *flags[:-1], tmp_path / "whole")
        assert same(tmp_path / "whole", tmp_path / "out")


def test_a_second_signal_ends_at_once(tmp_path):
    """Also while a step, here an hour of scoring, does not end."""
    flags = ["--ckpt", str(WORLD / "base"), "--tiny", "--out", str(tmp_path / "out")]
    code = (
        "import sys, time; sys.argv[0] = 'recover.py'; import recover, common\n"
        f"args = recover.parse_args({flags!r})\n"
        "common.Run.log = lambda *_, **__: (print('a long step', flush=True), time.sleep(3600))\n"
        "recover.main(args)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(process, "a long step")
    process.send_signal(signal.SIGINT)
    until(process, "a second signal")
    start = time.time()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130 and time.time() - start < 5


def test_before_there_is_anything_to_save_a_signal_just_ends(tmp_path):
    process = start("--tiny", "--out", tmp_path / "out")
    time.sleep(0.7)  # while torch is imported
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "" and process.returncode == -signal.SIGINT
    assert not (tmp_path / "out").exists()


def begun(tmp_path, monkeypatch, **more):
    flags = (*SHORT, "--steps", 4, "--save-every", 1e-9, "--out", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_off(patch, 3)
        call("random_mapping", *flags)
    return flags


def test_with_other_arguments_it_refuses_and_names_the_difference(tmp_path, monkeypatch, capsys):
    flags = begun(tmp_path, monkeypatch)
    refused(capsys, "random_mapping", *flags, "--lr", 1e-4, says="was begun with another --lr")
    refused(capsys, "random_mapping", *flags, "--seed", 1, says="was begun with another --seed")
    shutil.copy(WORLD / "chunks.jsonl", tmp_path)
    refused(capsys, "random_mapping", *flags, "--data", tmp_path / "chunks.jsonl", says="another --data")
    call("random_mapping", *flags, "--log-every", 2, "--save-every", 0)  # these change nothing
    assert (tmp_path / "out" / "args.json").exists()


def test_from_another_folder_and_moved_it_goes_on(tmp_path, monkeypatch, capsys):
    """The same command names the same files in another way."""
    flags = begun(tmp_path, monkeypatch)
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    common.LOCKS.clear()
    call("random_mapping", *flags[:-1], "moved", "--data", os.path.relpath(WORLD / "chunks.jsonl"))
    assert "goes on after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["run.json", "facts.json", "0.safetensors", "1.safetensors"])
def test_a_broken_state_is_refused(tmp_path, monkeypatch, capsys, damage):
    flags = begun(tmp_path, monkeypatch)
    (file,) = (tmp_path / "out" / "state").rglob(damage)
    file.write_bytes(file.read_bytes()[:-20])
    refused(capsys, "random_mapping", *flags, says="broken")


def test_the_last_save_stays_until_the_next_is_whole(tmp_path, monkeypatch, capsys):
    """A disk that is full when the state is saved costs the save, not the run, and not the save before."""
    saved = []

    def full(tensors, path):
        saved.append(path)
        if len(saved) > 6:  # weights and two moments, twice
            raise OSError(28, "No space left on device")
        return real(tensors, path)

    real = common.save_file
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common, "save_file", full)
        cut_off(patch, 5)
        call("random_mapping", *SHORT, "--steps", 6, "--save-every", 1e-9, "--out", tmp_path / "out")
    assert "No space left" in capsys.readouterr().err
    (facts,) = (tmp_path / "out" / "state").glob("[0-9]*/facts.json")
    assert json.loads(facts.read_text())["done"] == {"step": 2}
    call("random_mapping", *SHORT, "--steps", 6, "--save-every", 1e-9, "--out", tmp_path / "out")
    call("random_mapping", *SHORT, "--steps", 6, "--out", tmp_path / "whole")
    assert "goes on after step 2" in capsys.readouterr().out and same(tmp_path / "whole", tmp_path / "out")


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, capsys):
    flags = (*SHORT, "--steps", 3, "--save-every", 1e-9, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            common.Run, "land_model", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        refused(capsys, "random_mapping", *flags, says="run the same command again")
    assert not (tmp_path / "out" / "config.json").exists()
    call("random_mapping", *flags)
    assert "goes on after step 2 of 3" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """Not as a result, not as the last good ones, and not over a good state."""
    step = common.AdamW.step

    def poisoned(self, t, *more):
        step(self, t, *more)
        with torch.no_grad():
            self.params[0].view(-1)[7] = float("nan") if t == at else self.params[0].view(-1)[7]

    flags = (*SHORT, "--steps", 3, "--out")
    for at, every, says in (
        (3, 10, "after the last step"),
        (2, 10, "no weights were kept"),
        (2, 1e-9, "no weights"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(common.AdamW, "step", poisoned)
            out = tmp_path / f"{at}-{every}"
            refused(capsys, "random_mapping", *flags, out, "--save-every", every, says=says)
        assert not list(out.rglob("model.safetensors")) and not (out / "args.json").exists()


def test_an_out_that_is_not_ours_is_left_alone(tmp_path, monkeypatch, capsys):
    shutil.copytree(WORLD / "base", tmp_path / "model", ignore=shutil.ignore_patterns("args.json"))
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    flags = (*SHORT, "--steps", 1, "--model", tmp_path / "model")
    refused(capsys, "random_mapping", *flags, "--out", tmp_path / "model", says="not empty")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    monkeypatch.chdir(tmp_path)
    refused(capsys, "random_mapping", *flags, "--out", "", says="not a directory")
    refused(capsys, "random_mapping", *flags, "--out", "x" * 300, says="too long")
    (tmp_path / "file").write_text("mine")
    refused(capsys, "random_mapping", *flags, "--out", tmp_path / "file", says="not a directory")
    refused(capsys, "recover", "--tiny", "--ckpt", tmp_path / "model", "--base", tmp_path / "model",
            "--out", tmp_path / "model", says="not empty")  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}


def test_weights_can_be_read_by_others(tmp_path):
    call("random_mapping", *SHORT, "--steps", 1, "--out", tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {modes["args.json"]}, modes


def test_a_damaged_model_is_called_so(tmp_path, capsys):
    call("random_mapping", *SHORT, "--steps", 3, "--out", tmp_path / "good")
    assert "DAMAGED" not in capsys.readouterr().out
    call("random_mapping", *SHORT, "--steps", 3, "--lr", 0.99, "--out", tmp_path / "bad")
    assert "DAMAGED: the loss on the retain set ended at" in capsys.readouterr().out


def test_what_a_kill_left_after_the_end_is_removed(tmp_path, capsys):
    """And what it left before the end is no run to a table."""
    flags = (*SHORT, "--steps", 2, "--out", tmp_path / "out")
    call("random_mapping", *flags)
    shutil.copytree(tmp_path / "out", tmp_path / "out" / "state" / "draft")
    import evaluate_mmlu

    shutil.copy(WORLD / "base" / "mmlu_cloze.json", tmp_path / "out" / "state" / "draft")
    assert not evaluate_mmlu.rows_under(tmp_path, "cloze")
    refused(capsys, "random_mapping", *flags, says="finished run")
    assert not (tmp_path / "out" / "state").exists()


def test_a_dry_run_tells_the_disk(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("rmat", "--tiny", "--dry-run", "--out", tmp_path / "out")
    weights = sum(x.numel() * 4 for x in load_file(WORLD / "base" / "model.safetensors").values())
    need = 1.05 * (2 * 3 + 1) * weights / 1e9  # two saves of weights and moments, and the result
    assert f"saves and result{need:13.3f} GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, text",
    [
        ("facts.json", b"{}"),
        ("facts.json", b'{"phase": "step", "done": 5, "seconds": 1}'),
        ("facts.json", b'{"phase": "step", "done": {"step": "2"}, "seconds": 1}'),
        ("facts.json", b'{"phase": "step", "done": {"step": 2.5}, "seconds": 1}'),
        ("facts.json", b'{"phase": "step", "done": {"step": 600}, "seconds": 1}'),
        ("facts.json", b'{"phase": "zzz", "done": {"step": 2}, "seconds": 1}'),
        ("facts.json", b'{"phase": "step", "done": {"step": 2}, "seconds": "x"}'),
        ("run.json", b'{"script": "x"}'),
    ],
)
def test_a_state_that_someone_changed_is_refused(tmp_path, monkeypatch, capsys, file, text):
    flags = begun(tmp_path, monkeypatch)
    (path,) = (tmp_path / "out" / "state").rglob(file)
    path.write_bytes(text)
    refused(capsys, "random_mapping", *flags, says="broken")


def test_a_copy_of_a_save_is_not_the_last_save(tmp_path, monkeypatch, capsys):
    flags = begun(tmp_path, monkeypatch)
    (save,) = (tmp_path / "out" / "state").glob("[0-9]*")
    shutil.copytree(save, save.with_name(save.name + ".bak"))
    call("random_mapping", *flags)
    assert f"goes on after step {int(save.name)}" in capsys.readouterr().out


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[1]\n5\n", b'{"phase": "step", "step": "x"}\n', b'{"ste'])
def test_junk_in_the_log_is_dropped(tmp_path, monkeypatch, junk):
    flags = begun(tmp_path, monkeypatch)
    with open(tmp_path / "out" / "metrics.jsonl", "ab") as f:
        f.write(junk)
    call("random_mapping", *flags)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4]


def test_with_other_inputs_it_refuses(tmp_path, monkeypatch, capsys):
    """The same names, but what they stand for has changed since the run began."""
    shutil.copytree(WORLD / "base", tmp_path / "base")
    rows = (WORLD / "chunks.jsonl").read_text().splitlines()
    data = tmp_path / "chunks.jsonl"
    data.write_text("\n".join(rows[:400]))
    flags = ("--model", tmp_path / "base", "--data", data, "--out", tmp_path / "out")
    flags = (*SHORT, "--steps", 3, "--save-every", 1e-9, *flags)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_off(patch, 3)
        call("random_mapping", *flags)
    data.write_text("\n".join(rows[:399]))
    refused(capsys, "random_mapping", *flags, says="begun with other texts")
    data.write_text("\n".join(rows[:400]))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, "random_mapping", *flags, says="begun with other weights")


def test_a_first_phase_that_is_gone_is_not_made_of_the_base(tmp_path, monkeypatch, capsys):
    flags = (*SHORT, "--rm-steps", 2, "--N", 3, "--K", 1, "--save-every", 1e-9, "--out", tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_off(patch, 3, "mlac_ar")
        call("rmat", *flags)
    (tmp_path / "out" / "random_mapping" / "args.json").unlink()
    refused(capsys, "rmat", *flags, says="random_mapping is gone")


def test_a_process_that_was_overtaken_is_refused(tmp_path, monkeypatch, capsys):
    """Another one began and ended in the same directory while this one was loading."""
    flags, load = (*SHORT, "--steps", 1, "--out", tmp_path / "out"), common.Run.load

    def slow(self, *more, **values):
        monkeypatch.setattr(common.Run, "load", load)
        call("random_mapping", *flags, "--seed", 5)
        return load(self, *more, **values)

    monkeypatch.setattr(common.Run, "load", slow)
    refused(capsys, "random_mapping", *flags, says="finished run")
    assert json.loads((tmp_path / "out" / "args.json").read_text())["seed"] == 5
    assert not (tmp_path / "out" / "state").exists()


def test_what_a_full_disk_does_not_take_is_logged_later(tmp_path, monkeypatch, capsys):
    """And until then no state is saved, from which a rerun would go on without it."""
    saved, real, log = [], open, common.Run.log

    def full(path, mode="r", *more):
        if mode == "a" and str(path).endswith("metrics.jsonl"):
            with real(path, mode) as f:
                f.write('{"half')
            raise OSError(28, "No space left on device")
        return real(path, mode, *more)

    def logged(self, step, *more, **values):
        monkeypatch.setattr(common, "open", full if step in (2, 3) else real, raising=False)
        log(self, step, *more, **values)
        saved.append([int(json.loads((f / "facts.json").read_text())["done"]["step"]) for f in self.saves()])

    monkeypatch.setattr(common.Run, "log", logged)
    call("random_mapping", *SHORT, "--steps", 5, "--save-every", 1e-9, "--out", tmp_path / "out")
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert saved == [[], [1], [1], [1], [4]]
    assert "No space left" in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    command = f"{sys.executable} {ROOT / 'random_mapping.py'} --tiny --batch 4 --steps 4 --log-every 1"
    command += f" --out {tmp_path / 'out'} | head -2; test -f {tmp_path / 'out' / 'metrics.jsonl'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "args.json").exists()
