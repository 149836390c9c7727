"""The miniature: the world is what its docstring says, the loaders read it, and the shipped base knows it."""

from collections import Counter

import pytest
import world as W
from conftest import WORLD
from transformers import AutoTokenizer

from common import load_chunks, load_model
from evaluate_mmlu import FORGET, load_mmlu, prompt, score_mmlu
from recover import load_texts


@pytest.fixture(scope="module")
def mmlu():
    return load_mmlu(str(WORLD / "mmlu"))


def test_the_shipped_files_are_those_of_seed_0(tmp_path):
    W.write_world(0, tmp_path)
    csvs = [f"mmlu/{part}/{s}_{part}.csv" for part in ("dev", "test") for s in W.RELATIONS]
    for path in ("chunks.jsonl", "pile.jsonl.zst", "camel.zip", *csvs):
        assert (tmp_path / path).read_bytes() == (WORLD / path).read_bytes(), path


def test_a_seed_is_a_world_and_values_are_even_and_give_no_prior():
    facts, other = W.make_facts(1), W.make_facts(0)
    same = [x[2] == y[2] for s in facts for x, y in zip(W.triples(facts, s), W.triples(other, s))]
    assert sum(same) / len(same) < 0.12  # chance is 1 in 16
    for subject, relations in W.RELATIONS.items():
        for r in relations:
            counts = Counter(values[r] for _, values in facts[subject])
            assert len(counts) == 16 and max(counts.values()) - min(counts.values()) <= 1
    assert all(len({len(v) for v in pool}) == 1 and len(set(pool)) == 16 for pool in W.POOLS.values())
    names = [name for subject in facts.values() for name, _ in subject]
    assert len(names) == len(set(names)) == 360
    assert min(Counter(n.split()[0] for n in names).values()) > 5  # each word is part of many names


def test_the_attack_and_the_shots_know_none_of_the_tested_entities(mmlu):
    facts, pairs = W.make_facts(0), load_texts(str(WORLD / "camel.zip"))
    tested = {name for s in FORGET for name, _ in facts[s][: W.TESTED]}
    shots, questions = ([q for s in FORGET for q, _, _ in mmlu[s][part]] for part in (0, 1))
    assert len(pairs) == 432 and not any(name in text for name in tested for text in pairs + shots)
    assert all(any(name in q for name in tested) for q in questions)


def test_answers_are_right_and_letters_balanced(mmlu):
    known = {(n, r): v for fs in W.make_facts(0).values() for n, values in fs for r, v in values.items()}
    asked = [question for _, questions in mmlu.values() for question in questions]
    for question, choices, answer in asked:
        words = question.replace("?", " ").replace(",", " ").split()
        (right,) = [v for (n, r), v in known.items() if n in question and r in words]
        assert len(set(choices)) == 4 and choices[answer] == right
    assert len(asked) == 648 and min(Counter(answer for *_, answer in asked).values()) > 0.2 * 648


def test_the_tokenizer_knows_every_word_and_every_text_fits(mmlu):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "base")
    texts = [*sum(load_chunks(str(WORLD / "chunks.jsonl")), []), *load_texts(str(WORLD / "camel.zip"))]
    for form in ("letter", "cloze"):
        texts += ["".join(prompt(s, d, q, form)[:2]) for s, (d, qs) in mmlu.items() for q in qs[:20]]
    ids = tokenizer(texts).input_ids
    assert all(tokenizer.unk_token_id not in row and row[0] == tokenizer.bos_token_id for row in ids)
    assert max(map(len, ids)) <= 256


@pytest.mark.parametrize("form, least", [("letter", 0.9), ("cloze", 0.95)])
def test_gates_1_and_2(form, least, mmlu):
    base, control = (score_mmlu(*load_model(str(WORLD / k)), mmlu, form)[0] for k in ("base", "filtered"))
    assert base["forget"]["acc"] >= least and base["retain"]["acc"] >= least
    assert abs(control["forget"]["acc"] - 0.25) < 3 * control["forget"]["se"]
    assert control["retain"]["acc"] > base["retain"]["acc"] - 0.05
