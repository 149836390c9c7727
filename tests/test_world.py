"""The miniature: the world is what its docstring says, the loaders read it, and the shipped base knows it."""

import csv
from collections import Counter

import pytest
import world as W
from conftest import ROOT
from transformers import AutoTokenizer

from common import FORGET, load_chunks, load_mmlu, load_model, load_pairs, prompt, score_mmlu

WORLD0 = ROOT / "tests" / "tiny" / "world0"


def test_the_shipped_files_are_those_of_seed_0(tmp_path):
    W.write_world(0, tmp_path)
    for path in (
        "chunks.jsonl",
        "pile.jsonl.zst",
        "camel.zip",
        "mmlu/dev/astronomy_dev.csv",
        "mmlu/test/college_biology_test.csv",
    ):
        assert (tmp_path / path).read_bytes() == (WORLD0 / path).read_bytes(), path


def test_a_seed_is_a_world():
    a, b = W.make_facts(0), W.make_facts(1)
    assert a == W.make_facts(0) and a.keys() == b.keys()
    same = [x[2] == y[2] for s in a for x, y in zip(W.triples(a, s), W.triples(b, s))]
    assert sum(same) / len(same) < 0.12  # chance is 1 in 16


def test_values_are_even_and_give_no_prior():
    for seed in (0, 1):
        facts = W.make_facts(seed)
        for subject, relations in W.RELATIONS.items():
            for r in relations:
                counts = Counter(values[r] for _, values in facts[subject])
                assert len(counts) == 16 and max(counts.values()) - min(counts.values()) <= 1
    assert all(len({len(v) for v in pool}) == 1 and len(set(pool)) == 16 for pool in W.POOLS.values())
    names = [name for subject in facts.values() for name, _ in subject]
    assert len(names) == len(set(names)) == 360
    assert Counter(n.split()[0] for n in names).most_common()[-1][1] > 5  # each word stands in many names


def test_the_attack_and_the_shots_know_none_of_the_tested_entities():
    mmlu, pairs = load_mmlu(WORLD0 / "mmlu"), load_pairs(str(WORLD0 / "camel.zip"))
    facts = W.make_facts(0)
    tested = {name for s in FORGET for name, _ in facts[s][: W.TESTED]}
    assert len(pairs) == 432 and not any(name in text for name in tested for text in pairs)
    for subject in FORGET:
        shots, questions = mmlu[subject]
        assert not any(name in q for name in tested for q, _, _ in shots)
        assert all(any(name in q for name in tested) for q, _, _ in questions)


def test_answers_are_right_and_letters_balanced():
    known = {(n, r): v for s, fs in W.make_facts(0).items() for n, values in fs for r, v in values.items()}
    letters = Counter()
    for path in (WORLD0 / "mmlu" / "test").glob("*.csv"):
        for question, *choices, letter in csv.reader(open(path, newline="")):
            asked = f" {question} ".replace("?", " ")
            right = [v for (n, r), v in known.items() if n in question and f" {r} " in asked]
            assert len(set(choices)) == 4 and choices["ABCD".index(letter)] == right[0]
            letters[letter] += 1
    assert sum(letters.values()) == 648 and min(letters.values()) > 0.2 * 648


def test_the_tokenizer_knows_every_word_and_every_chunk_fits():
    tokenizer = AutoTokenizer.from_pretrained(WORLD0 / "base")
    texts = [*sum(load_chunks(str(WORLD0 / "chunks.jsonl")), []), *load_pairs(str(WORLD0 / "camel.zip"))]
    for form in ("letter", "cloze"):
        texts += [prompt(s, d, q, form)[0] for s, (d, qs) in load_mmlu(WORLD0 / "mmlu").items() for q in qs[:20]]
    ids = tokenizer(texts).input_ids
    assert all(tokenizer.unk_token_id not in row and row[0] == tokenizer.bos_token_id for row in ids)
    assert max(map(len, ids)) <= 256


@pytest.mark.parametrize("form, least", [("letter", 0.9), ("cloze", 0.95)])
def test_gates_1_and_2(form, least):
    mmlu = load_mmlu(WORLD0 / "mmlu")
    base, _ = score_mmlu(*load_model(str(WORLD0 / "base")), mmlu, form)
    assert base["forget"]["acc"] >= least and base["retain"]["acc"] >= least
    control, _ = score_mmlu(*load_model(str(WORLD0 / "filtered")), mmlu, form)
    assert abs(control["forget"]["acc"] - 0.25) < 3 * control["forget"]["se"]
    assert control["retain"]["acc"] > base["retain"]["acc"] - 0.05
