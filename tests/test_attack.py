"""Recovery's attackers: schedules, adapters, rounding, mixes, what they train on, and the worst case."""

import json
import math
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import KINDS, WORLD, Batches, bpe, flat, load_texts, toy_model, write_csvs
from test_mmlu import words
from test_scripts import refused

import recover as R
from common import AdamW, next_token_loss
from evaluate_mmlu import read_sweep, rows_under, worst_case


def test_cosine_warms_up_for_a_tenth_and_comes_down():
    rates = [R.rate(i, 100, 2.0, "cosine") for i in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)]) and max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.002
    assert {R.rate(i, 100, 2.0, "constant") for i in range(1, 101)} == {2.0}


def test_a_mix_is_the_weighted_loss_and_1_is_retain_text_only():
    """Against AdamW on the weighted sum, differentiated at once."""
    for mix in (0.25, 1.0):
        a, b = toy_model(dtype=torch.float64), toy_model(dtype=torch.float64)
        texts, retain, opt = Batches(4, seed=1), Batches(3, seed=2), AdamW(b.parameters(), decay=0.1)
        R.finetune(a, texts if mix < 1 else None, retain, steps=3, lr=1e-3, mix=mix, decay=0.1)
        b.train()
        for i in range(3):
            ((1 - mix) * next_token_loss(b, *texts[i]) + mix * next_token_loss(b, *retain[i])).backward()
            opt.step(i + 1, 1e-3, 0, "finetune", i + 1)
        assert (flat(a) - flat(b)).abs().max() < 1e-9


def test_clipping_bounds_a_step_of_sgd():
    model = toy_model()
    before = flat(model).clone()
    R.finetune(model, Batches(4), steps=1, lr=1.0, optimizer="sgd", clip=1e-3)
    assert (flat(model) - before).norm() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_adapters_start_at_nothing_train_alone_and_are_merged(kind):
    model, batches = toy_model(kind), Batches(4)
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, batches[9][0]
    untouched = model(ids).logits
    with R.adapters(model, 2, seed=0):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert torch.equal(model(ids).logits, untouched) and all(2 in p.shape for p in trained)
        R.finetune(model, batches, steps=5, lr=1e-2)
        model.eval()
        inside = model(ids).logits
    torch.testing.assert_close(model(ids).logits, inside, atol=1e-4, rtol=1e-4)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(p.requires_grad for p in model.parameters())
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved and all("weight" in k and "norm" not in k and "embed" not in k for k in moved)
    for k in moved:
        assert torch.linalg.matrix_rank(after[k] - before[k], rtol=1e-3) <= 2


def test_rounding_leaves_as_many_levels_as_its_bits_and_pruning_its_share():
    model = toy_model()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    R.round_weights(model, 4)
    step = before.abs().amax(1, keepdim=True) / 7
    assert ((layer.weight - before).abs() <= step / 2 + 1e-7).all()
    assert max(len(row.unique()) for row in layer.weight) <= 15
    R.prune(model, 0.3)
    assert (layer.weight == 0).float().mean() >= 0.3
    kept = before[layer.weight != 0].abs().min()
    assert kept >= before.abs().flatten().kthvalue(int(0.29 * before.numel())).values - step.max()


@pytest.mark.parametrize("row, text", [
    ({"message_1": "q", "message_2": "a"}, "q\n\na"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q\n\na"),
    ({"instruction": "do", "input": "", "output": "done"}, "do\n\ndone"),
    ({"text": "plain"}, "plain"),
    ({"txt_chunk": "chunk"}, "chunk"),
])  # fmt: skip
def test_the_forms_of_texts(row, text, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert load_texts(str(path)) == [text] and "1 texts" in capsys.readouterr().out


def test_texts_of_a_column_a_txt_file_a_csv_and_labelled_chunks(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n")
    (tmp_path / "b.csv").write_text("text,other\nNone,x\nb,y\n")  # pandas reads "None" as a missing value
    rows = [{"txt_chunk": "yes", "label": True}, {"txt_chunk": "no", "label": False}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert load_texts(str(tmp_path / "a.txt")) == ["one", "two\nlines"]
    assert load_texts(str(tmp_path / "b.csv")) == ["None", "b"]
    assert load_texts(str(tmp_path / "b.csv"), "other") == ["x", "y"]
    assert load_texts(str(tmp_path / "c.jsonl")) == ["yes"]
    answers = load_texts(str(WORLD / "camel.zip"), "message_2")
    assert len(answers) == 432 and all(text.startswith("Answer") for text in answers)


@pytest.mark.parametrize("line, message", [
    ('{"body": "x"}', "it has body"),
    ('{"text": " "}', "row 0: text or its answer is empty"),
])  # fmt: skip
def test_texts_without_text_end_in_one_line(line, message, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit):
        load_texts(str(tmp_path / "x.jsonl"))
    assert message in capsys.readouterr().err


def finished(folder):
    return read_sweep([path.parent for path in folder.glob("*/args.json")])


def sweep_of(*states, base=0.95, base_se=0.0):
    """What read_sweep has of one attacker on a checkpoint with a retain accuracy of 0.9."""
    return {"retain": 0.9, "base": base, "base_se": base_se, "states": states}


def state(forget, retain, step=1, n=40):
    """An accuracy entry: two subjects, the first `forget` of each right."""
    right = "1" * round(forget * n) + "0" * (n - round(forget * n))
    right = {"a": right, "b": right}
    return {"step": step, "forget": forget, "retain": retain, "retain_se": 0.02, "right": right}


def test_the_worst_case_is_the_best_undamaged_state():
    attacks = {
        "weak": sweep_of(state(0.3, 0.9)),
        "strong": sweep_of(state(0.6, 0.85, 10), state(0.5, 0.81, 20), state(0.7, 0.79, 30)),
        "damage": sweep_of(state(0.95, 0.79)),
    }
    worst = worst_case(attacks)
    assert (worst["attack"], worst["step"], worst["highest"]) == ("strong", 10, 60)
    assert worst["worst"] == pytest.approx(60) and worst["retain_there"] == 85 and worst["beyond"] == 95
    assert worst["rho"] == pytest.approx(0.35 / 0.7) and worst["damaged"] == ["damage"]
    assert worst["rho_low"] < 0.5 < worst["rho_high"]
    assert worst_case({"damage": attacks["damage"]}) is None and worst_case({}) is None


def guesses(draw, share, n=108):
    """Right answers of two subjects, each with probability `share`."""
    return {s: "".join("01"[int(x < share)] for x in torch.rand(n, generator=draw)) for s in "ab"}


def entry(right):
    hits = "".join(right.values())
    accuracy = hits.count("1") / len(hits)
    return {"step": 1, "forget": accuracy, "retain": 0.9, "retain_se": 0.02, "right": right}


def test_the_highest_of_many_guessers_is_not_the_worst_case():
    """Forty attackers that guess: their maximum is far above chance, the cross-fitted number is not, and its
    interval holds chance about as often as it says."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        attacks = {str(k): sweep_of(entry(guesses(draw, 0.25)), base=1.0) for k in range(40)}
        found.append(worst_case(attacks, draws=200))
    mean = partial(lambda key: sum(w[key] for w in found) / len(found))
    assert mean("highest") > 30 and abs(mean("worst") - 25) < 3 * 3.0 / math.sqrt(40)
    assert sum(w["rho_low"] <= 0 <= w["rho_high"] for w in found) >= 34


def test_the_bases_questions_count_too():
    draw = torch.Generator().manual_seed(0)
    unsure = worst_case({"a": sweep_of(entry(guesses(draw, 0.5)), base=0.5, base_se=0.05)})
    assert unsure["rho_se"] > 2 * unsure["worst_se"] / 100


def test_doing_nothing_is_a_state_but_an_attacker_that_only_damages_is_named():
    worst = worst_case({"a": sweep_of(state(0.4, 0.9, step=0), state(0.8, 0.5))})
    assert worst["worst"] == pytest.approx(40) and worst["damaged"] == ["a"] and worst["beyond"] == 80


def test_damage_is_marked(tmp_path, capsys):
    """`--lr 1e-2 --steps 640` destroys what it attacks: said by the row and in scores.json."""
    flags = ["--ckpt", str(WORLD / "filtered"), "--lr", "1", "--steps", "8", "--out", str(tmp_path / "x")]
    R.main(R.parse_args(flags))
    assert "DAMAGED" in capsys.readouterr().out
    row = json.loads((tmp_path / "x" / "scores.json").read_text())
    assert row["damaged"] and row["best_step"] == 0 and row["retain_recovered"] < row["retain"] - 10


def test_multiples_follow_the_preset():
    args = R.parse_args(["--ckpt", WORLD / "base", "--lr", "3x", "--steps", "0.5x", "--batch", "7"])
    assert (args.lr, args.steps, args.batch) == (pytest.approx(3e-3), 80, 7)
    for name, flags in R.SWEEP.items():  # all parse, on both scales
        assert R.parse_args(["--ckpt", "meta-llama/Llama-2-7b-chat-hf", *flags.split()]).steps >= 1, name


def test_a_sweep_goes_on_where_it_was_cut_off_and_takes_parts(tmp_path, capsys):
    flags = ["--ckpt", WORLD / "filtered", "--sweep", "--out", tmp_path, "--steps", 2, "--only"]
    flags = [str(f) for f in flags]
    for more, done in ((["8_bit"], 0), (["8_bit", "paper"], 1)):
        argv = [*flags, *more]
        R.main(R.parse_args(argv), argv)
        printed = capsys.readouterr().out
        assert f"{len(more)} attackers, {done} of them finished before" in printed
    assert "worst case" in printed and not [*tmp_path.rglob("*.safetensors")]
    assert set(finished(tmp_path)) == {"8_bit", "paper"}
    assert {*json.loads((tmp_path / "worst.json").read_text())} >= {"attack", "worst", "rho"}


def test_a_sweep_under_other_flags_is_not_taken_for_finished(tmp_path, capsys):
    flags = ["--ckpt", str(WORLD / "filtered"), "--sweep", "--out", str(tmp_path), "--only", "8_bit"]
    R.main(R.parse_args(flags), flags)
    for more, says in ((["--seed", "1"], "another --seed"), (["--mmlu", str(tmp_path)], "another --mmlu")):
        with pytest.raises(SystemExit):
            R.main(R.parse_args([*flags, *more]), [*flags, *more])
        assert says in capsys.readouterr().err


def test_an_attacker_whose_loss_is_nan_ends_and_the_sweep_goes_on(tmp_path, monkeypatch, capsys):
    loss, calls = R.next_token_loss, []

    def third_is_nan(*x):
        calls.append(x)
        return loss(*x) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(R, "next_token_loss", third_is_nan)
    flags = [
        "--ckpt",
        WORLD / "filtered",
        "--sweep",
        "--out",
        tmp_path,
        "--steps",
        4,
        "--only",
        "paper",
        "benign",
    ]
    flags = [str(f) for f in flags]
    R.main(R.parse_args(flags), flags)
    assert "this attacker ends here" in capsys.readouterr().out
    assert set(finished(tmp_path)) == {"paper", "benign"}


def test_every_attacker_starts_from_the_same_weights(tmp_path):
    """The scores of an attacker do not depend on those before it."""
    flags = ["--ckpt", WORLD / "filtered", "--sweep", "--steps", 3, "--only"]
    for out, names in (("a", ["lora_4", "4_bit", "paper"]), ("b", ["paper"])):
        argv = [str(f) for f in [*flags, *names, "--out", tmp_path / out]]
        R.main(R.parse_args(argv), argv)
    a, b = (json.loads((tmp_path / x / "paper" / "mmlu_cloze.json").read_text()) for x in "ab")
    a_rows, b_rows = ((tmp_path / x / "paper" / "mmlu_cloze.jsonl").read_text() for x in "ab")
    assert a == b and a_rows == b_rows


# ---- any victim


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, mmlu):
    """Of each kind of model two directories of save_pretrained's: a base and an "unlearned" one; and data."""
    root, tokenizer = tmp_path_factory.mktemp("foreign"), bpe(words(mmlu))
    write_csvs(root / "mmlu", mmlu)
    texts = [f"Which cell is number {i}? Think of it." for i in range(8)]
    (root / "texts.txt").write_text("\n\n".join(texts))
    for kind in KINDS:
        for seed, name in enumerate(("base", "unlearned")):
            toy_model(kind, vocab=len(tokenizer) + 20, seed=seed).save_pretrained(root / kind / name)
            tokenizer.save_pretrained(root / kind / name)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_program_of_any_architecture(foreign, kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recover.py"])
    folder = foreign / kind
    flags = ["--ckpt", folder / "unlearned", "--base", folder / "base", "--recovery", foreign / "texts.txt"]
    flags += ["--mmlu", foreign / "mmlu", "--batch", 4, "--tokens", 16, "--steps", 2, "--eval-every", 1]
    flags += ["--lr", 1e-3, "--sweep", "--only", "paper", "lora_4", "4_bit", "prune_30", "other_format"]
    flags = [str(f) for f in flags]
    R.main(R.parse_args(flags), flags)
    assert "5 attackers, 0 of them finished before" in capsys.readouterr().out
    rows = rows_under(folder, "letter")
    assert list(rows) == ["unlearned"] and rows["unlearned"][0]["sweep"].keys() == set(flags[-5:])
    assert not (folder / "unlearned" / "README.md").exists()  # the card of a model that is not ours


@pytest.mark.parametrize(
    "file, says", [("adapter_config.json", "a LoRA adapter, no model"), ("pytorch_model.bin", "are pickles")]
)
def test_adapters_and_pickles_have_a_remedy(foreign, tmp_path, file, says, capsys):
    shutil.copytree(
        foreign / "llama" / "base", tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tmp_path / "x" / file).write_text("{}")
    flags = ("--ckpt", tmp_path / "x", "--mmlu", foreign / "mmlu", "--recovery", foreign / "texts.txt")
    refused(capsys, "recover", *flags, "--out", tmp_path / "out", says=says, out=tmp_path / "out")


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--shots", 6), "--shots"),
        (("--retain-mix", 2), "--retain-mix"),
        (("--retain-mix", 0.01), "needs a text of either kind"),
        (("--sweep", "--shard", "3/2"), "--shard 3/2"),
        (("--only", "magic"), "--only"),
        (("--lr", "y"), "--lr y: needs a number"),
        (("--lr", "nan"), "0 < --lr"),
        (("--steps", "0"), "--steps"),
        (("--shard", "1/2"), "go with --sweep"),
        (("--probe", "2_bit"), "--probe"),
    ],
)
def test_flags_that_make_no_attacker(flags, says, tmp_path, capsys):
    refused(capsys, "recover", "--ckpt", WORLD / "base", *flags, "--out", tmp_path / "out", says=says)


def test_what_a_flag_was_before_is_what_a_multiple_is_of():
    args = R.parse_args(
        ["--ckpt", WORLD / "base", "--lr", "1e-5", "--steps", 100, "--lr", "3x", "--steps", "4x"]
    )
    assert args.lr == pytest.approx(3e-5) and args.steps == 400


def test_data_without_pairs_leaves_an_attacker_out(tmp_path, capsys):
    """A sweep on plain text has no answers to train on alone."""
    (tmp_path / "x.txt").write_text("\n\n".join(f"A fact, number {i}." for i in range(8)))
    flags = [
        "--ckpt",
        WORLD / "filtered",
        "--recovery",
        tmp_path / "x.txt",
        "--sweep",
        "--steps",
        1,
        "--batch",
        4,
    ]
    flags = [str(f) for f in [*flags, "--out", tmp_path / "s", "--only", "answers", "paper"]]
    R.main(R.parse_args(flags), flags)
    assert "has no pairs" in capsys.readouterr().out and set(finished(tmp_path / "s")) == {"paper"}
    flags[flags.index("answers")] = "benign"
    flags += ["--retain", str(tmp_path / "nothing.txt")]
    with pytest.raises(SystemExit):
        R.main(R.parse_args(flags), flags)
    assert "another --retain" in capsys.readouterr().err


def test_a_prompt_is_not_damage_and_the_other_format_has_its_own_reference(tmp_path):
    """No weight changes: many-shot prompts come before forget questions only."""
    flags = [str(f) for f in ["--ckpt", WORLD / "filtered", "--sweep", "--out", tmp_path, "--only"]]
    flags += ["many_shot", "other_format"]
    R.main(R.parse_args(flags), flags)
    attacks = finished(tmp_path)
    for name, attack in attacks.items():
        before, after = attack["states"]
        assert before["retain"] == after["retain"] == attack["retain"], name
    assert attacks["other_format"]["states"][0]["forget"] == attacks["other_format"]["states"][1]["forget"]
    assert attacks["many_shot"]["states"][0]["right"] != attacks["many_shot"]["states"][1]["right"]


@pytest.mark.parametrize(
    "more", [[], ["--probe", "4_bit"], ["--sweep"], ["--lora", "2", "--retain-mix", "0.5"]]
)
def test_dry_runs(more, tmp_path, capsys):
    flags = ["--ckpt", str(WORLD / "base"), "--out", str(tmp_path / "x"), "--dry-run", *more]
    with pytest.raises(SystemExit):
        R.main(R.parse_args(flags), flags)
    assert "it fits" in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_a_gradient_that_an_attacker_left_is_not_the_next_ones(tmp_path, monkeypatch):
    """A NaN in the retain half of a mix comes after the backward pass of the other half."""
    loss, calls = R.next_token_loss, []

    def second_is_nan(*x):
        calls.append(x)
        return loss(*x) * (float("nan") if len(calls) == 2 else 1)

    for out, names in (("a", ["mix", "benign"]), ("b", ["benign"])):
        monkeypatch.setattr(R, "next_token_loss", second_is_nan if out == "a" else loss)
        flags = ["--ckpt", WORLD / "filtered", "--sweep", "--steps", 1, "--only", *names]
        flags = [str(f) for f in [*flags, "--out", tmp_path / out]]
        R.main(R.parse_args(flags), flags)
    a, b = ((tmp_path / x / "benign" / "mmlu_cloze.jsonl").read_text() for x in "ab")
    assert a == b and json.loads((tmp_path / "a" / "mix" / "args.json").read_text())["stopped"]


def test_rho_is_measured_against_the_base_in_the_formats_own_score():
    attacks = {"other_format": sweep_of(state(0.3, 0.9), base=0.5), "paper": sweep_of(state(0.6, 0.9))}
    assert worst_case(attacks)["rho"] == pytest.approx(0.5)
