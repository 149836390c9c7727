"""MMLU: prompts to the character, scores against bare forward passes, accuracies in closed form, files."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import KINDS, bpe, spm_like, toy_model, write_csvs
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import evaluate_mmlu as E
from evaluate_mmlu import Exam, prompt, score_mmlu

FORMS = "letter", "cloze"
SHOT = (" Which is a cell? ", ["  rock", "a cell", "None", "sky "], 1)
ASKED = ("What holds DNA?\nThink.", ["nucleus", "rock", "None", "sky"], 0)
LETTER = (
    "The following are multiple choice questions (with answers) about college biology.\n\n"
    "Which is a cell?\nA.   rock\nB. a cell\nC. None\nD. sky \nAnswer: B\n\n|"
    "What holds DNA?\nThink.\nA. nucleus\nB. rock\nC. None\nD. sky\nAnswer:| A| B| C| D"
)
CLOZE = (
    "The following are questions (with answers) about college biology.\n\nQuestion: Which is a cell?\n"
    "Answer: a cell\n\n|Question: What holds DNA?\nThink.\nAnswer:| nucleus| rock| None| sky"
)


@pytest.mark.parametrize("form, expected", [("letter", LETTER), ("cloze", CLOZE)])
def test_prompt_to_the_character(form, expected):
    head, rest, ends = prompt("college_biology", [SHOT], ASKED, form)
    assert "|".join([head, rest, *ends]) == expected


def words(mmlu):  # texts to train a tokenizer on that makes one token of each letter
    told = [q + " ".join(choices) for shots, asked in mmlu.values() for q, choices, _ in shots + asked]
    return told + [" A B C D"] * 500


def asked(mmlu, n=3):
    return Exam({s: (mmlu[s][0], mmlu[s][1][:n]) for s in ("college_biology", "astronomy")})


@torch.no_grad()
def bare_scores(model, tokenizer, exam, form):
    """Log-probabilities (questions, 4), by one forward pass over each prompt with each continuation."""
    found = []
    for subject, (shots, questions) in exam.items():
        for head, rest, ends in (prompt(subject, shots, q, form) for q in questions):
            start = len(tokenizer(head + rest).input_ids)
            for ids in tokenizer([head + rest + end for end in ends]).input_ids:
                log_p = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
                found.append(sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids))))
    return torch.tensor(found).view(-1, 4)


def agree(model, tokenizer, exam, form):
    """Scores are the bare ones in small batches, in one, and with the questions in another order."""
    expected = bare_scores(model, tokenizer, exam, form)
    assert expected.std() > 0.1  # control: scores do differ
    turned = Exam({s: (shots, questions[::-1]) for s, (shots, questions) in exam.items()})
    for these, budget in ((exam, 1), (exam, 100_000), (turned, 1000)):
        got = torch.tensor([a["logprobs"] for a in score_mmlu(model, tokenizer, these, form, budget)[1]])
        got = got.view(len(exam), -1, 4).flip(1).view(-1, 4) if these is turned else got
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_batched_scores_are_those_of_bare_passes(kind, form, mmlu):
    """Sliding windows of 9 tokens end within the shots, experts, scaled logits and tied heads included."""
    tokenizer = bpe(words(mmlu))
    agree(toy_model(kind, vocab=len(tokenizer), initializer_range=0.5), tokenizer, asked(mmlu), form)


@pytest.mark.parametrize("form", FORMS)
def test_so_they_are_without_bos_and_as_llama_2_tokenises(form, mmlu):
    """Llama-2 makes two tokens of " A" alone, of which one follows a prompt."""
    for tokenizer, n in ((bpe(words(mmlu), bos=None), 1), (spm_like(), 2)):
        assert len(tokenizer.tokenize(" A")) == n and (tokenizer.bos_token is None) == (n == 1)  # control
        agree(toy_model(vocab=len(tokenizer), initializer_range=0.5), tokenizer, asked(mmlu), form)


@pytest.mark.parametrize("form", FORMS)
def test_so_they_are_where_the_rotation_switches_within_the_lengths(form, mmlu):
    """Longrope turns all tokens of a pass otherwise as soon as one is past the switch."""
    tokenizer, exam = bpe(words(mmlu)), asked(mmlu)
    first, second = (sorted(len(x.ids) for x in E.plan(tokenizer, s, *exam[s], form)) for s in exam)
    assert second[0] < second[len(second) // 2] < second[-1] < first[-1]  # control
    rope = dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, rope_theta=1e4, rope_type="longrope")
    for switch in (second[len(second) // 2], second[-1]):
        more = dict(initializer_range=0.5, rope_parameters=rope, original_max_position_embeddings=switch)
        agree(toy_model("phi3", vocab=len(tokenizer), **more), tokenizer, exam, form)


def test_a_subject_may_mix_options_of_one_token_and_of_many():
    """As college_mathematics does, whose options are numbers and formulas."""
    tokenizer, options = bpe([" 1 2 3 4"] * 9), [["1", "2", "3", "4"], ["1", "two", "3", "x y z"], ["4"] * 4]
    assert [len(tokenizer.tokenize(f" {c}")) for c in options[1]] == [1, 4, 1, 6]  # control
    asked = [(f"What is {i}?", choices, i) for i, choices in enumerate(options)]
    exam = Exam({s: (asked, asked) for s in ("college_biology", "astronomy")})
    agree(toy_model(vocab=len(tokenizer), initializer_range=0.5), tokenizer, exam, "cloze")


def test_the_shots_are_computed_once_per_subject(mmlu):
    tokenizer, exam, passes = bpe(words(mmlu)), Exam({"astronomy": mmlu["astronomy"]}), []
    model = toy_model(vocab=len(tokenizer))
    model.base_model.embed_tokens.register_forward_pre_hook(lambda _, ids: passes.append(ids[0].numel()))
    score_mmlu(model, tokenizer, exam, budget=100_000)
    lengths = [len(row.ids) for row in exam.plans[tokenizer, "astronomy", "letter", ""]]
    assert len(lengths) == 6 and len(passes) == 2 and sum(passes) < sum(lengths) / 2  # a row: a question


@torch.no_grad()
def test_bf16_scores_do_not_tie(mmlu):
    tokenizer = spm_like()
    model, letters = toy_model(vocab=len(tokenizer), dtype=torch.bfloat16), slice(-4, None)
    model.lm_head.weight[letters] = model.lm_head.weight[-1]
    model.lm_head.weight[letters, 0] = torch.tensor([1, 1.0078125, 1.015625, 1.0234375]).bfloat16()
    assert all(len({*a["logprobs"]}) == 4 for a in score_mmlu(model, tokenizer, Exam(mmlu))[1])
    coarse = model(torch.arange(len(tokenizer))[None]).logits[0, :, letters].tolist()
    assert any(len({*row}) < 4 for row in coarse)  # control: bf16 logits do


def test_cloze_compares_per_character(mmlu):
    """All tokens, here characters, are equally likely: A is likeliest, C per character, D per byte."""
    choices, vocab = ["a", "abc", "abcdefgh", "жж"], {chr(c): c for c in range(0x500)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [])))
    model = toy_model(vocab=len(vocab))
    torch.nn.init.zeros_(model.lm_head.weight)
    exam = Exam({"astronomy": (mmlu["astronomy"][0], [("Which?", choices, 2)])})
    _, (answer,) = score_mmlu(model, tokenizer, exam, "cloze")
    expected = [-(len(c) + 1) * math.log(len(vocab)) for c in choices]
    assert answer["logprobs"] == pytest.approx(expected, abs=1e-4) and answer["prediction"] == "C"


def test_summary_in_closed_form():
    right = {"high_school_biology": (5, 10), "college_biology": (3, 4), "astronomy": (2, 8)}
    answers = [(s, "A" if i < k else "B") for s, (k, n) in right.items() for i in range(n)]
    found = E.summarise([{"subject": s, "prediction": x, "answer": "A"} for s, x in answers])
    forget = {"acc": (5 / 10 + 3 / 4) / 2, "se": (0.25 / 9 + 0.75 * 0.25 / 3) ** 0.5 / 2, "n": 14}
    assert found["forget"] == pytest.approx(forget) and found["retain"]["acc"] == 0.25
    assert found["letters"] == pytest.approx({"A": 10 / 22, "B": 12 / 22, "C": 0, "D": 0})


def test_scores_are_kept_for_the_same_questions_and_format(tmp_path, mmlu):
    """Those of other questions are in a file of their own, whatever makes them other ones."""
    tokenizer, ckpt, own = bpe(words(mmlu)), tmp_path / "ckpt", str(tmp_path / "own.jsonl")
    [x.save_pretrained(ckpt) for x in (tokenizer, toy_model(vocab=len(tokenizer)))]
    write_csvs(tmp_path / "mmlu", mmlu)
    write_csvs(tmp_path / "more", mmlu | {"virology": mmlu["astronomy"]})
    Path(own).write_text(2 * '{"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": "B"}\n')

    def score(flags=""):
        E.main(E.parse_args(["--ckpt", str(ckpt), "--mmlu", str(tmp_path / "mmlu"), *flags.split()]))

    score()
    before = (ckpt / "mmlu.json").read_bytes()
    for flags in ("--forget-subjects astronomy", "--shots 2", f"--questions {own}", "--format cloze"):
        score(flags)
    assert (ckpt / "mmlu.json").read_bytes() == before and (ckpt / "mmlu_cloze.json").exists()
    assert len([*ckpt.glob("mmlu.????????.json")]) == 3
    others = dict(forget=["astronomy"]), dict(shots=2), dict(questions=own)
    exams = [E.load_mmlu(str(tmp_path / "mmlu"), **other) for other in ({}, *others)]
    kept = [E.read_scores(ckpt, exam, "letter")[0] for exam in exams]
    assert [x["forget"]["n"] for x in kept] == [12, 6, 12, 2] and kept[0] == json.loads(before)
    assert len({x["protocol"]["questions"] for x in kept}) == 4 and len(exams[2]["astronomy"][0]) == 2
    assert E.read_scores(ckpt, E.load_mmlu(str(tmp_path / "more")), "letter") is None  # of another set
    for seconds, there in ((30, True), (90, False)):  # a copy in another order; other weights
        when = (ckpt / "mmlu.json").stat().st_mtime + seconds
        os.utime(ckpt / "model.safetensors", (when, when))
        assert bool(E.read_scores(ckpt, exams[0], "letter")) == there


def test_models_of_two_worlds_are_asked_the_questions_of_their_own(tmp_path, mmlu):
    tokenizer, ckpts = bpe(words(mmlu)), [tmp_path / world / "base" for world in "ab"]
    for ckpt, more in zip(ckpts, ({}, {"virology": mmlu["astronomy"]})):
        [x.save_pretrained(ckpt) for x in (tokenizer, toy_model(vocab=len(tokenizer)))]
        (ckpt / "args.json").write_text('{"tiny": true}')
        write_csvs(ckpt.parent / "mmlu", mmlu | more)
    E.main(E.parse_args(["--ckpt", *map(str, ckpts)]))
    assert [json.loads((x / "mmlu.json").read_text())["retain"]["n"] for x in ckpts] == [6, 12]
