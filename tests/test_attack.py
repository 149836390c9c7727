"""Recovery's attackers: schedules, adapters, rounding, mixes, texts, sweeps, and the worst case."""

import json
import math
import os
import re
import signal
from itertools import count
from weakref import ref

import pytest
import torch
from conftest import WORLD, Batches, bpe, flat, moved, toy_model, write_csvs
from test_loaders import write
from test_mmlu import words

import recover as R
from common import Optimizer, fail, next_token_loss, read_json, write_json
from evaluate_mmlu import read_states, show_sweep, worst_case


def test_cosine_warms_up_for_a_tenth_and_comes_down():
    rates = [R.rate(i, 100, 2.0, "cosine") for i in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)]) and max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.002
    assert {R.rate(i, 100, 2.0, "constant") for i in range(1, 101)} == {2.0}


@pytest.mark.parametrize("mix, kind, clip", [(0.25, "adamw", 0), (0.25, "sgd", 0.01), (1.0, "adamw", 0)])
def test_a_mix_is_the_weighted_loss_and_1_is_retain_text_only(mix, kind, clip):
    a, b = toy_model(dtype=torch.float64), toy_model(dtype=torch.float64)
    texts, retain, opt = Batches(4, seed=1), Batches(3, seed=2), Optimizer(b.parameters(), kind, decay=0.1)
    more = dict(optimizer=kind, clip=clip, mix=mix, weight_decay=0.1)
    R.finetune(a, texts if mix < 1 else None, retain, steps=3, lr=1e-3, **more)
    for i in range(3):
        ((1 - mix) * next_token_loss(b, *texts[i]) + mix * next_token_loss(b, *retain[i])).backward()
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), clip or math.inf)
        opt.step(i + 1, 1e-3, 0, "finetune", i + 1)
    assert (flat(a) - flat(b)).abs().max() < 1e-9 and norm > clip


def inner(model):
    """Names of the matrices of the decoder layers, which are those with a number."""
    return {k for k, p in model.named_parameters() if p.ndim > 1 and re.search(r"\.\d+\.", k)}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_adapters_start_at_nothing_train_alone_and_are_merged(kind):
    """Into every matrix of the layers."""
    model, before, batches = toy_model(kind), toy_model(kind), Batches(4)
    ids = batches[9][0]
    untouched = model(ids).logits
    with R.adapters(model, 2, seed=0):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert torch.equal(model(ids).logits, untouched) and all(2 in p.shape for p in trained)
        R.finetune(model, batches, steps=5, lr=1e-2)
        inside = model.eval()(ids).logits
    torch.testing.assert_close(model(ids).logits, inside, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert moved(model, before) == inner(model) and all(p.requires_grad for p in model.parameters())
    steps = (model.get_parameter(k) - before.get_parameter(k) for k in inner(model))
    assert all(torch.linalg.matrix_rank(step, rtol=1e-3) <= 2 for step in steps)


@pytest.mark.parametrize("kind, n", [("llama", 7), ("gpt2", 4), ("mixtral", 7), ("qwen3_moe", 7)])
def test_rounding_and_pruning_act_on_every_matrix_of_the_layers(kind, n):
    """Fused experts included."""
    for probe, x in ((R.prune, 0.3), (R.round_weights, 4), (R.round_weights, 8)):
        model, before = (toy_model(kind) for _ in "ab")
        probe(model, x)
        assert moved(model, before) == inner(model) and len(inner(model)) == 2 * n
        for old, new in ((before.get_parameter(k), model.get_parameter(k)) for k in inner(model)):
            if probe is R.prune:
                assert (new == 0).float().mean() == pytest.approx(0.3, abs=0.02)
                assert old[new == 0].abs().max() <= old[new != 0].abs().min()
            else:
                step = old.abs().amax(-1, keepdim=True) / (2 ** (x - 1) - 1)
                torch.testing.assert_close(new, (old / step).round() * step)


def state(forget, retain=0.9, step=1, right=None, base=0.95, base_se=0.0):
    """An accuracy entry: two subjects of 40 questions, the first `forget` of each right."""
    right = right or dict.fromkeys("ab", "1" * round(40 * forget) + "0" * round(40 - 40 * forget))
    entry = dict(step=step, forget=forget, retain=retain, right=right)
    return entry | dict(retain_se=0.02, base=base, base_se=base_se)


BEFORE = state(0.4, step=0)


def test_the_worst_case_is_the_best_undamaged_state():
    """Doing nothing is one, of every attacker; those that only damage are named."""
    strong = [BEFORE, state(0.6, 0.85, 10), state(0.5, 0.81, 20), state(0.7, 0.79, 30)]
    attacks = {"weak": [BEFORE, state(0.3)], "strong": strong, "damage": [BEFORE, state(0.95, 0.79)]}
    worst = worst_case(attacks)
    assert (worst["attack"], worst["step"], worst["retain_there"]) == ("strong", 10, 85)
    assert worst["worst"] == pytest.approx(60) and worst["rho"] == pytest.approx(0.35 / 0.7)
    assert worst["rho_low"] < 0.5 < worst["rho_high"] and worst["damaged"] == ["damage"]
    assert "worst case of 3 attackers: strong at step 10" in show_sweep(attacks)
    none = worst_case({"damage": attacks["damage"]})
    assert none["worst"] == pytest.approx(40) and none["attack"] == "none" and none["damaged"] == ["damage"]
    lost = show_sweep({"weak": [state(0.3, step=0, base=0.29, base_se=0.03), state(0.3, base=0.29)]})
    assert "ρ nan, 95 % nan to nan" in lost
    attacks = {"other_format": [state(0.25, step=0, base=0.5)]} | attacks  # scored otherwise, and so its base
    assert worst_case(attacks)["rho"] == worst["rho"]
    found = worst_case(attacks | {"other_format": [state(0.7, step=0), state(0.7)]})
    assert (found["attack"], found["step"]) == ("other_format", 1)


def guesses(draw, share, **more):
    """A state in which every question is right with probability `share`."""
    right = {s: "".join("01"[int(x < share)] for x in torch.rand(108, generator=draw)) for s in "ab"}
    return state("".join(right.values()).count("1") / 216, right=right, **more)


def test_the_highest_of_many_guessers_is_not_the_worst_case():
    """Forty attackers that guess: their maximum is far above chance, the cross-fitted number is not, and its
    interval holds chance about as often as it says."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        before = guesses(draw, 0.25, base=1.0, step=0)
        found.append(worst_case({str(k): [before, guesses(draw, 0.25)] for k in range(40)}, draws=200))
    highest, worst = (sum(w[key] for w in found) / len(found) for key in ("highest", "worst"))
    assert highest > 30 and abs(worst - 25) < 3 * 3.0 / math.sqrt(40)
    assert sum(w["rho_low"] <= 0 <= w["rho_high"] for w in found) >= 34
    sure = guesses(draw, 0.5, base=0.5, step=0)
    rho_se, more = (worst_case({"a": [sure | {"base_se": se}]})["rho_se"] for se in (0, 0.05))
    assert more > 1.3 * rho_se  # the base's error counts


@pytest.fixture(scope="module")
def place(tmp_path_factory, mmlu):
    """MMLU; pairs, which are chunks too; of each kind of model a base and an "unlearned" one."""
    root, tokenizer = tmp_path_factory.mktemp("place"), bpe(words(mmlu))
    write_csvs(root / "mmlu", mmlu)
    rows = [{"message_1": f"Which cell is {i}?", "message_2": "None."} for i in range(16)]
    rows = [row | {"txt_chunk": f"Think of {i}.", "label": i % 2} for i, row in enumerate(rows)]
    write(root / "rows.jsonl", rows)
    for kind in ("llama", "gpt2", "gemma2", "mixtral"):
        for seed, name in enumerate(("base", "unlearned")):
            model = toy_model(kind, vocab=len(tokenizer) + 20, seed=seed)
            [x.save_pretrained(root / kind / name) for x in (model, tokenizer)]
    return root


@pytest.fixture
def recover(place, capsys):
    """A function that runs recover.py on a toy model and returns what it printed."""

    def run(out, flags, kind="llama"):
        flags += f" --ckpt @{kind}/unlearned --base @{kind}/base --mmlu @mmlu --recovery @rows.jsonl"
        flags += f" --data @rows.jsonl --batch 4 --tokens 16 --lr 1e-3 --out {out}"
        argv, code = flags.replace("@", f"{place}/").split(), 0
        try:
            R.main(R.parse_args(argv), argv)
        except SystemExit as error:
            if (code := error.code) != 1:
                raise
        printed = capsys.readouterr().out
        assert code == any("failed: " in x and "NotImpl" not in x for x in printed.splitlines())
        return printed

    return run


def finished(out):
    return {path.parent.name for path in out.glob("*/args.json")}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_sweep_attacks_a_checkpoint_of_another_program_of_any_kind(kind, recover, place, tmp_path):
    """What is not applicable to its kind is a line, not an attacker that it withstood."""
    names = {"paper", "lora_4", "4_bit", "prune_30", "many_shot", "other_format"}
    printed = recover(tmp_path, f"--sweep --steps 1 --only {' '.join(names)}", kind)
    names -= {"lora_4"} if kind in ("gpt2", "mixtral") else set()
    assert finished(tmp_path) == names and not [*tmp_path.rglob("*.safetensors")]
    assert f"worst case of {len(names)} attackers" in printed
    assert ("failed: lora_4: NotImplementedError: LoRA knows" in printed) == ("lora_4" not in names)
    for name, file in (("many_shot", "mmlu.json"), ("other_format", "mmlu_cloze.json")):
        before, after = (s["retain"] for s in read_states(tmp_path / name))  # no weight changes: no damage
        assert before == after and (tmp_path / name / file).exists()
    answers = [(x / "mmlu.jsonl").read_text() for x in (place / kind / "unlearned", tmp_path / "many_shot")]
    assert not {*answers[0].splitlines()} & {*answers[1].splitlines()}  # but the prompts are others


def test_a_search_goes_on_with_more_attackers_and_a_sweep_takes_parts(recover, tmp_path):
    for n, done in ((1, 0), (3, 1)):
        printed = recover(tmp_path / "a", f"--search {n} --steps 1")
        assert f"{n} attackers, {done} of them finished before" in printed
    assert finished(tmp_path / "a") == {*R.drawn(3)} and "worst case of 3 attackers" in printed
    for shard, done in ((0, {"paper", "8_bit"}), (1, {"paper", "lr_3x", "8_bit"})):
        recover(tmp_path / "b", f"--sweep --steps 1 --only paper lr_3x 8_bit --shard {shard}/2")
        assert finished(tmp_path / "b") == done


def test_a_sweep_refuses_results_of_other_settings(recover, tmp_path, capsys):
    recover(tmp_path, "--sweep --steps 1 --only paper")
    flags, other = "--sweep --steps 1 --only paper 8_bit", "paper was attacked with another"
    for out, more, kind, says in (
        (tmp_path, f"{flags} --shots 2", "llama", f"{other} --shots; choose"),
        (tmp_path, f"{flags} --clip 1", "llama", f"{other} --clip; choose"),
        (tmp_path, flags, "gpt2", f"{other} --ckpt; choose"),
        (tmp_path / "paper", flags, "llama", "is a run of its own; choose another --out"),
        (tmp_path, "--search 1 --steps 2", "llama", f"{other} --steps; choose"),  # of another list
        (tmp_path, "--sweep --only 8_bit --steps 2", "llama", f"{other} --steps; choose"),
    ):
        with pytest.raises(SystemExit):
            recover(out, more, kind)
        assert says in capsys.readouterr().err
    assert "1 of them finished before" in recover(tmp_path, "--sweep --steps 1 --only paper --log-every 3")
    file = tmp_path / "paper/args.json"
    write_json(file, read_json(file) | {"protocol": "of MMLU files that are no longer there"})
    with pytest.raises(SystemExit):
        recover(tmp_path, "--sweep --steps 1 --only 8_bit")
    assert "paper was attacked with another --questions; choose" in capsys.readouterr().err


def test_in_a_sweep_a_fault_is_no_nan_and_a_signal_ends_it(recover, tmp_path, monkeypatch):
    def full_disk(*_, log, **__):
        log(1, 2, loss=0.0)
        fail("the disk is full")

    with monkeypatch.context() as m:
        m.setattr(R, "finetune", full_disk)
        printed = recover(tmp_path, "--sweep --steps 2 --eval-every 1 --only paper")
    assert "failed: paper: ValueError: the disk is full" in printed and not finished(tmp_path)
    held = []

    def full_memory(model, *_, **__):
        optimizer = R.Optimizer(model.parameters())
        held.append((ref(optimizer), sum(x() is not None for x, _ in held)))
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(R, "finetune", full_memory)
        recover(tmp_path / "c", "--sweep --steps 2 --only paper mix lr_3x")
        assert [alive for _, alive in held] == [0, 0, 0]
        m.setattr(R, "ranks", lambda: 2)  # the others are in the middle of the attack
        with pytest.raises(RuntimeError, match="out of memory"):
            recover(tmp_path / "d", "--sweep --steps 2 --only paper mix")
    before = signal.getsignal(signal.SIGTERM)
    log, kill = R.Run.log, lambda: os.kill(os.getpid(), signal.SIGTERM)  # in the last step
    monkeypatch.setattr(R.Run, "log", lambda self, *x, **more: kill() or log(self, *x, **more))
    with pytest.raises(SystemExit, match="143"):
        recover(tmp_path / "b", "--sweep --steps 1 --only paper lr_3x")
    assert finished(tmp_path / "b") == {"paper"} and signal.getsignal(signal.SIGTERM) is before


def test_an_attack_that_does_not_fit_the_model_ends_with_one_line(recover, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recover(tmp_path / "a", "--steps 1 --lora 4", "gpt2")
    assert "LoRA knows 0 of 8 matrices of GPT2LMHeadModel" in capsys.readouterr().err


def test_a_search_is_of_attackers_that_differ():
    assert [*R.drawn(40)][:9] == [*R.drawn(9)] and len({*R.drawn(40).values()}) == 40
    found = [R.parse_args(["--ckpt", "x", *flags.split()]) for flags in R.drawn(40).values()]
    for flag in ("lora", "optimizer", "schedule", "retain_mix", "clip", "batch"):
        assert len({getattr(a, flag) for a in found}) > 1


def test_after_a_nan_the_sweep_goes_on_from_the_same_weights(recover, tmp_path, monkeypatch):
    """In the second half of a mix, when the gradient of the first is there; and in `paper`, which counts by
    what it reached before."""
    flags, loss, calls = "--sweep --steps 2 --eval-every 1 --only", R.next_token_loss, count(1)
    recover(tmp_path / "b", f"{flags} benign prune_30")
    monkeypatch.setattr(
        R, "next_token_loss", lambda *x: loss(*x) * (math.nan if next(calls) in (4, 6) else 1)
    )
    printed = recover(tmp_path / "a", f"{flags} lora_4 mix paper benign 4_bit prune_30")
    assert "failed: mix" in printed and "worst case of 5 attackers" in printed
    assert finished(tmp_path / "a") == {"lora_4", "paper", "benign", "4_bit", "prune_30"}
    assert [state["step"] for state in read_states(tmp_path / "a" / "paper")] == [0, 1]
    answers = {path.parent: path.read_text() for path in tmp_path.glob("*/*/mmlu.jsonl")}
    assert all(answers[tmp_path / "a" / x] == answers[tmp_path / "b" / x] for x in ("benign", "prune_30"))
    assert len({*answers.values()}) > 3  # control: attackers differ


def test_kept_scores_are_used_again_for_the_same_questions_and_damage_is_said(recover, place, tmp_path):
    recover(tmp_path / "first", "--steps 1", "gpt2")
    for name, forget in (("base", 0.9), ("unlearned", 0.3)):
        path = place / "gpt2" / name / "mmlu.json"
        scores, sides = json.loads(path.read_text()), (("forget", forget), ("retain", 0.9))
        path.write_text(json.dumps(scores | {side: dict(acc=x, se=0, n=12) for side, x in sides}))
    printed = recover(tmp_path / "a", "--steps 2 --eval-every 1", "gpt2")
    recover(tmp_path / "b", "--steps 1 --shots 2", "gpt2")
    kept, other = (json.loads((tmp_path / x / "scores.json").read_text()) for x in "ab")
    assert kept["forget"] == 30 != other["forget"] and kept["score_u"] == pytest.approx(60)
    assert kept["damaged"] and "none at step 0" in printed and "DAMAGED" in printed


def test_multiples_follow_the_preset_or_what_the_flag_was_before():
    args = R.parse_args(["--ckpt", WORLD / "base", "--lr", "3x", "--steps", "0.5x", "--batch", "7"])
    assert (args.lr, args.steps, args.batch) == (pytest.approx(3e-3), 80, 7)
    args = R.parse_args(["--ckpt", "a/b", *"--lr 1e-5 --steps 100 --lr 3x --steps 4x".split()])
    assert (args.lr, args.steps) == (pytest.approx(3e-5), 400)
    assert all(R.parse_args(["--ckpt", "a/b", *flags.split()]).steps for flags in R.SWEEP.values())
