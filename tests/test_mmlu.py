"""MMLU: prompts to the character, scores against plain forward passes, accuracies in closed form, files."""

import math
import warnings

import pytest
import torch
from conftest import KINDS, ROOT, WORLD, bpe, spm_like, toy_model, write_csvs
from test_scripts import refused
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evaluate_mmlu import (
    encode,
    kept_scores,
    load_mmlu,
    prompt,
    protocol,
    read_answers,
    read_json,
    score_mmlu,
    summarise,
    write_scores,
)

FORMS = ("letter", "cloze")
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


def words(mmlu):
    """Texts to train a tokenizer on that makes one token of each letter."""
    texts = [q + " ".join(choices) for shots, asked in mmlu.values() for q, choices, _ in shots + asked]
    return texts + [" A B C D"] * 500


def joining(*merges):
    """A function that makes a BPE of the characters of texts with these merges and no pre-tokenizer."""

    def make(texts):
        joined = ["".join(pair) for pair in merges]
        vocab = {w: i for i, w in enumerate([*sorted(set("".join(texts + joined))), *joined])}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, list(merges))))

    return make


class Counted:
    """A tokenizer that keeps the texts it is called with."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, texts, **more):
        self.texts += [texts] if isinstance(texts, str) else texts
        return self.tokenizer(texts, **more)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


TOKENIZERS = {
    "bpe": bpe,
    "bpe of another text": lambda texts: bpe([(ROOT / "README.md").read_text()], size=1000),
    "no BOS": lambda texts: bpe(texts, bos=None),
    "as Llama-2": lambda texts: spm_like(),  # of the two tokens of " A" alone, one follows a prompt
    "as Llama-3": joining(("\n", "\n"), (".", "\n\n")),
    "the miniature's": lambda texts: AutoTokenizer.from_pretrained(WORLD / "base"),
    "crossing": joining(("\n", "T"), ("\n", "Q")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_encode_gives_the_ids_of_whole_prompts(name, form, mmlu):
    """And tokenises the head once, unless a token crosses its end before one question ("T") or all ("Q")."""
    shots, questions = mmlu["astronomy"]
    shots = [*shots[:4], ("Which is last?", ["it.", "b", "c", "d"], 0)]  # Llama-3 makes one token of ".\n\n"
    questions = [*questions[:3], ("Think of Mars?", ["1", "2", "3", "4"], 0), *questions[3:]]
    asked = [prompt("astronomy", shots, q, form) for q in questions]
    head, rests = asked[0][0], [rest + end for _, rest, ends in asked for end in ("", *ends)]
    texts = [head + rest for rest in rests]
    tokenizer = Counted(TOKENIZERS[name](texts))
    alone, *whole = tokenizer.tokenizer([head, *texts], add_special_tokens=False).input_ids
    assert encode(tokenizer, head, rests) == whole
    crosses = name == "crossing"
    assert any(ids[: len(alone)] != alone for ids in whole) == crosses  # control
    assert (sum(map(len, tokenizer.texts)) > sum(map(len, texts)) / 2) == crosses


@pytest.mark.parametrize("form", FORMS)
def test_kept_prompts_are_not_tokenised_again(form, mmlu):
    tokenizer, plans = Counted(bpe(words(mmlu))), {}
    model, other = (toy_model(vocab=300, seed=seed).train() for seed in (0, 1))
    first = score_mmlu(model, tokenizer, mmlu, form, plans=plans)
    assert any("Which" in text for text in tokenizer.texts) and model.training
    tokenizer.texts.clear()
    assert score_mmlu(model, tokenizer, mmlu, form, plans=plans) == first
    found = score_mmlu(other, tokenizer, mmlu, form, plans=plans)
    assert not any("Which" in text for text in tokenizer.texts)
    assert first != found == score_mmlu(other, tokenizer, mmlu, form)  # prompts are kept, not scores


def test_a_subject_may_mix_options_of_one_token_and_of_many():
    """As college_mathematics does, whose options are numbers and formulas."""
    ask = [(f"What is {i}?", ["1", "2", "3", "4"], i % 4) for i in range(6)]
    mixed = {"astronomy": (ask[:5], [ask[5], ("And then?", ["1", "two and two", "3", "x y z"], 0)])}
    tokenizer = bpe(words(mixed))
    model = toy_model(vocab=len(tokenizer), initializer_range=0.5)
    kinds = [
        {len(tokenizer(f" {c}", add_special_tokens=False).input_ids) for c in q[1]}
        for q in mixed["astronomy"][1]
    ]
    assert kinds[0] == {1} and max(kinds[1]) > 1  # control: the one question by itself is a single row
    with torch.no_grad():
        expected = plain_scores(model, tokenizer, mixed, "cloze")
    found = torch.tensor([a["logprobs"] for a in score_mmlu(model, tokenizer, mixed, "cloze")[1]])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_scoring_keeps_attention_off_cudnn(mmlu):
    """cuDNN plans attention anew for each shape, and here every batch has another."""
    seen, tokenizer = [], bpe(words(mmlu))
    model = toy_model(vocab=len(tokenizer))
    model.base_model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    score_mmlu(model, tokenizer, mmlu)
    assert seen.count(False) > 2 and torch.backends.cuda.cudnn_sdp_enabled()  # allowed again, for training


def plain_scores(model, tokenizer, mmlu, form):
    """The same log-probabilities, by one forward pass over each whole prompt and continuation."""
    found = []
    for subject, (shots, questions) in mmlu.items():
        for q in questions:
            head, rest, ends = prompt(subject, shots, q, form)
            start = len(tokenizer(head + rest).input_ids)
            for end in ends:
                ids = tokenizer(head + rest + end).input_ids
                logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
                found.append(sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids))))
    return torch.tensor(found).view(-1, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind, name", [*zip(KINDS, ["bpe"] * 5), ("llama", "no BOS"), ("llama", "as Llama-2")]
)
def test_cached_batched_scores_are_the_plain_ones(kind, name, form, mmlu):
    tokenizer = TOKENIZERS[name](words(mmlu))
    model = toy_model(kind, vocab=len(tokenizer), initializer_range=0.5)
    with torch.no_grad():
        expected = plain_scores(model, tokenizer, mmlu, form)
    for budget in (2500, 100_000):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # what transformers is about to remove
            _, answers = score_mmlu(model, tokenizer, mmlu, form, budget)
        got = torch.tensor([a["logprobs"] for a in answers])
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.1  # control: the scores do differ


def test_the_shots_are_computed_once_per_subject(mmlu):
    tokenizer, plans, seen = bpe(words(mmlu)), {}, []
    model = toy_model(vocab=len(tokenizer))
    model.base_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    score_mmlu(model, tokenizer, {"astronomy": mmlu["astronomy"]}, budget=100_000, plans=plans)
    lengths = [len(row.ids) for row in plans["astronomy", "letter", ""]]
    assert len(lengths) == 6  # a question is one row: its four letters follow the same text
    assert len(seen) == 2 and sum(seen) < sum(lengths) / 2


def test_bf16_scores_do_not_tie(mmlu):
    tokenizer = spm_like()
    model = toy_model(vocab=len(tokenizer), dtype=torch.bfloat16, initializer_range=0.02)
    _, answers = score_mmlu(model, tokenizer, mmlu)
    assert all(len(set(a["logprobs"])) == 4 for a in answers)
    coarse = model.lm_head(torch.randn(5000, 16).bfloat16())[:, 5:9]
    assert any(len(set(row.tolist())) < 4 for row in coarse)  # control: bf16 logits do


def test_cloze_compares_per_byte(mmlu):
    """Where all tokens, here characters, are equally likely: log-probabilities are minus their number."""
    choices = ["ab", "abcdefgh", "жж", "abc"]  # fewest tokens in all: A; per character: B; per byte: C
    tokenizer = joining()(words(mmlu) + choices)
    model = toy_model(vocab=len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    asked = {"astronomy": (mmlu["astronomy"][0], [("Which?", choices, 2)])}
    _, (answer,) = score_mmlu(model, tokenizer, asked, "cloze")
    expected = [-n * math.log(len(tokenizer)) for n in (3, 9, 3, 4)]  # a space begins each
    assert answer["logprobs"] == pytest.approx(expected, abs=1e-4) and answer["prediction"] == "C"


def test_summary_in_closed_form():
    right = {"high_school_biology": (5, 10), "college_biology": (3, 4), "astronomy": (2, 8)}
    answers = [(s, "A" if i < k else "B") for s, (k, n) in right.items() for i in range(n)]
    found = summarise([{"subject": s, "prediction": x, "answer": "A"} for s, x in answers])
    se, micro_se = math.sqrt(0.25 / 9 + 0.75 * 0.25 / 3) / 2, math.sqrt(8 / 14 * 6 / 14 / 13)
    forget = {"acc": (5 / 10 + 3 / 4) / 2, "se": se, "n": 14, "micro": 8 / 14, "micro_se": micro_se}
    assert found["forget"] == pytest.approx(forget) and found["retain"]["acc"] == 0.25
    assert found["letters"] == pytest.approx({"A": 10 / 22, "B": 12 / 22, "C": 0, "D": 0})


def test_scores_are_kept_for_the_same_questions_and_format(tmp_path, mmlu):
    summary, answers = score_mmlu(toy_model(vocab=300), bpe(words(mmlu)), mmlu)
    write_scores(tmp_path, summary, answers)
    fewer = {s: (shots, asked[1:]) for s, (shots, asked) in mmlu.items()}
    asked = (mmlu, "letter"), (mmlu, "cloze"), (fewer, "letter")
    kept = [kept_scores(tmp_path, protocol(questions, form), form) for questions, form in asked]
    assert kept == [tmp_path / "mmlu.json", None, None] and read_json(kept[0]) == summary
    assert read_answers(kept[0]) == answers


@pytest.mark.parametrize(
    "file, damage, says",
    [
        ("test/astronomy_test.csv", None, "astronomy_test.csv is missing"),
        ("dev/astronomy_dev.csv", None, "astronomy_dev.csv is missing"),
        ("*/college_biology_*.csv", None, "college_biology_dev.csv is missing"),
        ("test/astronomy_test.csv", lambda text: text.replace(",B\n", ",E\n"), "0 to 3, A to D"),
        ("dev/astronomy_dev.csv", lambda text: "".join(text.splitlines(True)[:4]), "lower --shots 5"),
    ],
)
def test_a_broken_folder_ends_in_one_line(tmp_path, mmlu, file, damage, says, capsys):
    write_csvs(tmp_path, mmlu)
    for path in tmp_path.glob(file):
        path.write_text(damage(path.read_text())) if damage else path.unlink()
    refused(capsys, "evaluate_mmlu", "--ckpt", WORLD / "base", "--mmlu", tmp_path, says=says)


def test_fewer_shots_and_another_forget_set(mmlu, tmp_path):
    """The prompt of a question without shots is its description and itself; the digest tells them apart."""
    write_csvs(tmp_path, mmlu)
    exams = [load_mmlu(tmp_path, shots=n) for n in (0, 2, 5)]
    assert [len(exam["astronomy"][0]) for exam in exams] == [0, 2, 5]
    other = load_mmlu(tmp_path, forget=("astronomy",))
    assert len({protocol(exam, "letter")["questions"] for exam in (*exams, other)}) == 4
    usual = dict(sorted(mmlu.items()))
    assert protocol(exams[2], "letter")["questions"] == protocol(usual, "letter")["questions"]
    tokenizer = bpe(words(mmlu))
    summary, answers = score_mmlu(toy_model(vocab=len(tokenizer)), tokenizer, other)
    assert (summary["forget"]["n"], summary["retain"]["n"]) == (6, 12)
    head, rest, _ = prompt("astronomy", exams[0]["astronomy"][0], mmlu["astronomy"][1][0], "letter")
    assert head.endswith("about astronomy.\n\n") and rest.startswith("Which astronomy is number 5?")


def test_a_forget_subject_that_is_not_there_is_one_line(mmlu, tmp_path, capsys):
    write_csvs(tmp_path, mmlu)
    flags = ("--ckpt", WORLD / "base", "--mmlu", tmp_path, "--forget-subjects", "virology")
    refused(capsys, "evaluate_mmlu", *flags, says="virology_dev.csv is missing")
