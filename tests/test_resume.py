"""A run that is cut off and continued by the same command ends bit-identical to one that was not, and what is
there in between is never taken for a checkpoint."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, WORLD
from test_scripts import call, metrics, refused

import common

SHORT = ("--tiny", "--batch", 4, "--tokens", 48, "--log-every", 1)
SAVES = (*SHORT, "--save-every", 1e-9)  # after every step


class Cut(BaseException):
    """The end of a process, as the code that runs in it sees it: no handler catches it."""


def cut_off(script, *flags, at, phase=None):
    """A run that ends in step `at` (of that phase), before it is logged; returns its flags."""
    log = common.Run.log

    def cut(self, step, *more, **values):
        if step == at and phase in (None, values.get("phase")):
            raise Cut
        log(self, step, *more, **values)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common.Run, "log", cut)
        call(script, *flags)
    common.lock.__defaults__[0].clear()  # as when the process ends
    return flags


def same(*folders):
    """Are the weights in two directories the same bytes, and their logs the same but for the seconds?"""
    files = [{x.relative_to(f): x.read_bytes() for x in f.rglob("*.safetensors")} for f in folders]
    logs = [[{**row, "seconds": 0} for row in metrics(folder)] for folder in folders]
    return files[0] == files[1] != {} and logs[0] == logs[1] != []


RMAT = ("--rm-steps", 2, "--N", 3, "--K", 1)
ATTACK = ("--ckpt", WORLD / "base", "--steps", 3, "--eval-every")
METHODS = "min_posterior max_entropy high_low_lr grad_diff npo simnpo rmu undo overwriting".split()
CASES = {  # name: script, flags, the step and phase in which it is cut off
    "random_mapping": ("random_mapping", ("--steps", 3), 3, None),
    "random_mapping, bf16": ("random_mapping", ("--steps", 3, "--dtype", "bfloat16"), 3, None),
    "mlac_ar": ("mlac_ar", ("--N", 3, "--K", 2), 3, None),
    "rmat, first": ("rmat", RMAT, 2, "random_mapping"),
    "rmat, between": ("rmat", RMAT, 1, "mlac_ar"),
    "rmat, second": ("rmat", (*RMAT, "--optimizer", "sgd"), 3, "mlac_ar"),
    "adv_probes": ("adv_probes", ("--steps", 3), 3, None),
    "adv_probes, not frozen": ("adv_probes", ("--steps", 3, "--no-freeze", "--match", "rand"), 3, None),
    "adv_probes, SWD": ("adv_probes", ("--steps", 3, "--swd"), 3, None),
    **{method: ("baselines", ("--method", method, "--steps", 5), 3, method) for method in METHODS},
    "attack": ("recover", (*ATTACK, 2), 3, None),
    "attack, SGD, mixed": ("recover", (*ATTACK, 9, "--optimizer", "sgd", "--retain-mix", 0.5), 3, None),
    "attack, LoRA": ("recover", (*ATTACK, 9, "--lora", 4), 3, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_off_goes_on_to_the_bit(tmp_path, capsys, case):
    script, flags, at, phase = CASES[case]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call(script, *SHORT, *flags, "--out", whole)
    cut_off(script, *SAVES, *flags, "--out", cut, at=at, phase=phase)
    assert not (cut / "args.json").exists() and not (cut / "config.json").exists()
    (cut / "state/step-0").mkdir()  # the save before, of which a kill has left the mark alone
    (cut / "state/step-0/.metadata").touch()
    os.utime(cut / "state/step-0/.metadata", (0, 0))
    capsys.readouterr()
    call(script, *SHORT, *flags, "--out", cut)
    before = "random_mapping 2 of 2" if case == "rmat, between" else f"{phase or 'step'} {at - 1} of"
    assert f"continues after {before}" in capsys.readouterr().out
    assert same(whole, cut) and len(metrics(cut)) >= at and not (cut / "state").exists()
    (cut / "state").mkdir()  # a kill while the last save is dropped leaves some of it
    common.load_model(str(cut), device="cpu")
    if script == "recover":  # what was scored before the cut counts too
        first, second = ([x["right"] for x in metrics(out) if "right" in x] for out in (whole, cut))
        assert first == second


def test_a_run_that_got_a_sigint_goes_on_to_the_bit(tmp_path, capsys):
    """It saves and says how to go on (SIGTERM: test_ranks.py; kills at any moment: bench_faults.py)."""
    flags, cut = (*SHORT, "--steps", 16, "--out"), tmp_path / "cut"
    command = [sys.executable, "-u", ROOT / "random_mapping.py", *flags, cut]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([*map(str, command)], **pipes)
    assert any("step 3/" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130 and not (cut / "args.json").exists()
    assert "Traceback" not in said and "rerun the same command" in said.splitlines()[-1], said
    log = next(cut.glob("state/*/metrics.jsonl"))
    log.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 999', log.read_text()))
    for out in (tmp_path / "whole", cut):
        call("random_mapping", *flags, out)
    assert common.read_json(cut / "args.json")["seconds"] > 999  # of all processes
    assert "continues after step" in capsys.readouterr().out and same(tmp_path / "whole", cut)


def test_with_other_arguments_it_refuses_and_names_the_flag(tmp_path, capsys):
    flags = cut_off("random_mapping", *SAVES, "--steps", 3, "--out", tmp_path / "out", at=3)
    for flag, value in {"--lr": 1e-4, "--micro-batch": 1, "--dtype": "bfloat16", "--data": "x"}.items():
        refused(capsys, "random_mapping", *flags, flag, value, says=f"was begun with another {flag};")
    refused(capsys, "recover", "--tiny", "--ckpt", tmp_path / "out", says="was cut off; rerun its command")
    call("random_mapping", *flags, "--log-every", 2, "--save-every", 0)  # these change nothing


def test_a_phase_that_was_over_is_not_saved_again(tmp_path):
    """The model has other weights by then."""
    flags = cut_off("rmat", *SAVES, *RMAT, "--out", tmp_path / "out", at=2, phase="mlac_ar")
    shutil.rmtree(tmp_path / "out/random_mapping")
    call("rmat", *flags)
    assert (tmp_path / "out/args.json").exists() and not (tmp_path / "out/random_mapping").exists()


def test_what_another_process_finished_meanwhile_stays(tmp_path, monkeypatch, capsys):
    begin = common.Run.begin

    def late(self, tokens):
        self.out.mkdir()
        (self.out / "args.json").touch()
        begin(self, tokens)

    monkeypatch.setattr(common.Run, "begin", late)
    flags = ("random_mapping", *SHORT, "--steps", 2, "--out", tmp_path / "out")
    refused(capsys, *flags, says="another process is writing there, or has finished")
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_save_that_failed_is_not_tried_again_at_every_step(tmp_path, monkeypatch, capsys):
    begin, tried = common.Run.begin, []

    def full(*_, **more):
        tried.append(more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.dcp, "save", full)
    monkeypatch.setattr(
        common.Run, "begin", lambda self, **x: begin(self, **x) or setattr(self, "last_saved", 0)
    )
    call("random_mapping", *SHORT, "--steps", 4, "--save-every", 10, "--out", tmp_path / "out")
    assert len(tried) == 2  # at the first step and at the last


def test_only_whole_saves_count_and_a_full_disk_costs_no_more_than_a_save(tmp_path, monkeypatch, capsys):
    flags, save, folders = (*SAVES, "--steps", 4, "--out"), common.dcp.save, []

    def no_room(tensors, checkpoint_id):
        folders.append(checkpoint_id)
        if len(folders) > 1:
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        save(tensors, checkpoint_id=checkpoint_id)

    with monkeypatch.context() as patch:
        patch.setattr(common.dcp, "save", no_room)
        cut_off("random_mapping", *flags, tmp_path / "out", at=4)
    assert "No space left" in capsys.readouterr().out
    assert [f.name for f in folders if (f / ".metadata").exists()] == ["step-1"] and folders[2].exists()
    for name in ("out", "whole"):
        call("random_mapping", *flags, tmp_path / name)
    assert "continues after step 1 of 4" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "out")
