"""Random Mapping, MLAC-AR and what all methods share: references and theorems, each with a control."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import KINDS, Batches, bpe, flat, toy_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import baselines as B
from adv_probes import adv_probes
from common import (
    Optimizer, Stream, backward, decoder_layers, next_token_loss, recompute, residual_streams,
)  # fmt: skip
from mlac_ar import mlac_ar
from random_mapping import mapping_loss, random_mapping, random_targets
from recover import finetune

TEXTS = [f"text number {i} says {i * i % 17} and {'more ' * (i % 5)}" for i in range(40)]
RUNS = {  # every method, as method(model, forget, retain, steps=, lr=, ...)
    "random_mapping": random_mapping,
    "mlac_ar": lambda *x, steps, **more: mlac_ar(*x, K=2, N=steps, alpha=1, **more),
    "finetune": partial(finetune, mix=0.5, optimizer="sgd"),
    "rmu": partial(B.rmu, layer=2, steer=6.5, weight=100.0),
    "undo": lambda model, *x, **more: undo(model, copy.deepcopy(model), *x, **more),
    "overwriting": lambda *x, **more: overwriting(*x, **more),
    **{name: partial(B.baseline, method=name) for name in (*B.LOSSES, *B.TEXT_LOSSES, "high_low_lr")},
    "adv_probes": lambda model, f, r, **more: adv_probes(model, f, r, r, probe_width=8, **more),
    "swd": lambda model, f, r, **more: adv_probes(model, f, r, None, freeze=False, **more),
}


def undo(model, teacher, *streams, noise=0.1, **more):
    B.add_noise(model, noise, 0)
    B.baseline(model, *streams, method="undo", teacher=teacher, **more)


def overwriting(model, forget, retain, *, steps, **more):
    """On texts in which each token below 10 is a fact."""
    weigh = lambda ids, mask: (ids, mask, torch.where(ids < 10, 1, 0.05)[:, 1:] * mask[:, 1:])  # noqa: E731
    false = [weigh(*forget[i]) for i in range(steps)]
    B.baseline(model, false, retain, method="overwriting", steps=steps, **more)


@pytest.mark.parametrize("kind", [*KINDS][:5])
def test_streams_are_the_decoder_layers_outputs_before_the_final_norm(kind):
    model, ids = toy_model(kind), torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        last = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        H = residual_streams(model, ids)
    assert len(H) == 2 and H[0].shape == (2, 7, 16)
    norm = next(m for n, m in model.base_model.named_children() if "norm" in n)
    torch.testing.assert_close(norm(H[-1]), last)
    assert not torch.allclose(H[-1], last)  # control: hidden_states[-1] is not the stream


def test_of_a_multimodal_model_the_text_models_layers_are_taken():
    """Where the vision tower, which comes first, is as deep."""
    own = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    parts = dict(vision_config=own | dict(hidden_size=8, image_size=28, patch_size=14))
    parts |= dict(text_config=own | dict(vocab_size=60, num_key_value_heads=1, head_dim=8))
    parts |= dict(mm_tokens_per_image=4, boi_token_index=57, eoi_token_index=58, image_token_index=59)
    model = Gemma3ForConditionalGeneration(Gemma3Config(**parts)).eval()
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    assert len(lists) == 2  # control: there is a list to mistake it for
    assert decoder_layers(model) is model.model.language_model.layers
    assert [h.shape for h in residual_streams(model, torch.randint(1, 57, (2, 7)))] == [(2, 7, 16)] * 2


def test_mapping_loss_in_closed_form_and_its_targets_are_gaussian(monkeypatch):
    r, other = (random_targets(toy_model(vocab=4000), seed) for seed in (5, 6))  # a row per token
    assert r.shape == (4000, 16) and abs(r.mean()) < 0.02 and abs(r.std() - 1) < 0.02
    assert abs((r * other).mean()) < 0.02
    monkeypatch.setattr("random_mapping.residual_streams", lambda h, ids: [h[ids], h[ids]])
    turned = torch.stack([-r[..., 1::2], r[..., ::2]], -1).flatten(-2)  # at right angles
    spoilt = (3 * r).index_fill(0, torch.tensor([0, 5, 9]), 1e3)  # BOS and a pad point elsewhere
    ids, mask = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    for h, value in ((3 * r, 0), (-r, 2), (turned, 1), (spoilt, 0)):
        found = mapping_loss(h, ids, mask, r)
        torch.testing.assert_close(found, torch.tensor(float(value)), atol=1e-6, rtol=0)
    assert mapping_loss(spoilt, ids, torch.ones_like(mask), r) > 0.05  # control: the pad counts if unmasked


@pytest.mark.parametrize("kind", [*KINDS][:5])
def test_next_token_loss_is_cross_entropy_without_pads(kind):
    model, (ids, mask) = toy_model(kind), Batches(4)[0]
    logits, targets = (x[mask[:, 1:]] for x in (model(ids).logits[:, :-1], ids[:, 1:]))
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(next_token_loss(model, ids.masked_fill(~mask, 7), mask), expected)
    assert abs(next_token_loss(model, ids, torch.ones_like(mask)) - expected) > 1e-5  # control: pads count
    model.get_output_embeddings().weight.data.zero_()  # a uniform posterior
    mask[0, 1:] = False  # a text of one token, which predicts none: in a micro-batch of its own too
    for model.micro_batch in (0, 1):
        torch.testing.assert_close(backward(model, next_token_loss, ids, mask), torch.tensor(math.log(60)))
        assert backward(model, next_token_loss, ids[:1], mask[:1]) == 0


SHARES = [("gemma2", 0.3, 0.6), ("llama", 0.3, 0.93), ("llama", 0, 2)]


@pytest.mark.parametrize("kind, balance, reached", SHARES)
def test_random_mapping_reaches_noise_and_keeps_retain_text_where_streams_are_large(kind, balance, reached):
    """Of norm 6,000, or of norm 141 in one direction; control: with weight 1 the latter only fine-tunes."""
    model, seen, sides = toy_model(kind), [], (Batches(8, seed=1, same=True), Batches(8, seed=2, same=True))
    for layer in model.model.layers if kind == "gemma2" else ():
        layer.post_attention_layernorm.weight.data.fill_(1000)
        layer.post_feedforward_layernorm.weight.data.fill_(1000)
    model.model.embed_tokens.weight.data[:, :2] += 100 if kind == "llama" else 0
    assert min(h.norm(dim=-1).mean() for h in residual_streams(model, sides[0][0][0])) > 100
    more = dict(steps=60, lr=1e-2, warmup=5, balance=balance, log=lambda i, n, **v: seen.append(v))
    random_mapping(model, *sides, **more)
    ratio = float(seen[0]["norms"][0] / seen[0]["norms"][1])
    assert ratio == pytest.approx(0.3, rel=1e-3) if balance else ratio < 0.01
    assert seen[0]["forget"] > 0.9 and seen[-1]["retain"] < seen[0]["retain"]
    assert seen[-1]["forget"] < reached if balance else seen[-1]["forget"] > 0.98


def test_the_rate_rises_while_warming_up_and_falls_to_the_last_step(monkeypatch):
    rates = []
    monkeypatch.setattr(Optimizer, "step", lambda self, t, lr, *key: rates.append(lr))
    random_mapping(toy_model(), Batches(8), Batches(8), steps=5, lr=1e-2, warmup=3)
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.006, 0.004, 0.002])


def test_norms_are_those_of_each_gradient_though_they_are_added_up():
    model, other, norms, alone = toy_model(vocab=4000), toy_model(vocab=4000), [], []
    first, second = (Batches(8, vocab=4000, seed=seed)[0] for seed in (1, 2))
    backward(model, next_token_loss, *first, factor=3.0, norms=norms)
    backward(model, next_token_loss, *second, norms=norms)
    backward(other, next_token_loss, *second, norms=alone)
    torch.testing.assert_close(norms[1], alone[0], rtol=1e-3, atol=0)
    exact = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
    assert norms[1] == pytest.approx(exact.item(), rel=0.3) and norms[0] > 2 * norms[1]  # an estimate


def literal_outer_step(model, forget, retain, K, lr, alpha, optimizer, outer=None):
    """Algorithm 1's outer step, written from the paper's lines: a deep copy for ω, φ as a list of sums.

    Its last line is θ ← θ - η ∇L(θ; x_r) + (α_paper / K) φ, with α_paper = α η. torch's SGD, and AdamW in
    its place, is given what η multiplies.
    """
    make = torch.optim.SGD if optimizer == "sgd" else partial(torch.optim.AdamW, weight_decay=0)
    omega = copy.deepcopy(model)
    inner = make(omega.parameters(), lr=lr)
    *steps, heldout = zip(*(x.chunk(K + 1) for x in forget))
    phi = [torch.zeros_like(p) for p in model.parameters()]
    for x_f in steps:
        inner.zero_grad()
        next_token_loss(omega, *x_f).backward()
        inner.step()
        gradient = torch.autograd.grad(next_token_loss(omega, *heldout), list(omega.parameters()))
        phi = [f + g for f, g in zip(phi, gradient)]
    gradient = torch.autograd.grad(next_token_loss(model, *retain), list(model.parameters()))
    outer, alpha_paper = outer or make(model.parameters(), lr=lr), alpha * lr
    for p, g, f in zip(model.parameters(), gradient, phi):
        p.grad = g - (alpha_paper / K) * f / lr
    outer.step()
    return outer, torch.cat([(alpha / K * f).flatten() for f in phi]).norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind, tied", [("llama", False), ("gemma2", True)])
@pytest.mark.parametrize("K, checkpointing", [(1, True), (4, False), (4, True), (16, False)])
def test_two_outer_steps_are_algorithm_1(K, optimizer, kind, tied, checkpointing, monkeypatch):
    """In float64 throughout: the losses' own cast to float32 is lifted."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else 1.0 * x)
    model = toy_model(kind, dtype=torch.float64, tie_word_embeddings=tied)
    start, literal = flat(model), copy.deepcopy(model)
    if checkpointing:
        recompute(model)
    forget, retain, outer, seen = Batches((K + 1) * 3, seed=1), Batches(3, seed=2), None, []
    arguments = dict(K=K, lr=1e-2, alpha=0.7, optimizer=optimizer)
    mlac_ar(model, forget, retain, N=2, **arguments, log=lambda i, n, **v: seen.append(v))
    for i in range(2):
        outer, phi = literal_outer_step(literal, forget[i], retain[i], outer=outer, **arguments)
        assert seen[i]["phi"] == pytest.approx(phi.item())
    assert (flat(model) - flat(literal)).abs().max() < 1e-10
    assert (flat(model) - start).abs().max() > 1e-3  # control: it did move


def test_alpha_zero_is_finetuning_on_retain_text_bit_exactly():
    a, b, retain = toy_model(), toy_model(), Batches(3, seed=2)
    mlac_ar(a, Batches(9, seed=1), retain, K=2, N=3, lr=1e-2, alpha=0)
    finetune(b, retain, steps=3, lr=1e-2)
    assert torch.equal(flat(a), flat(b)) and not torch.equal(flat(a), flat(toy_model()))


@pytest.mark.parametrize("method", RUNS)
def test_a_loss_of_nan_stops_before_the_update(method, capsys):
    model = toy_model(num_hidden_layers=3)
    model.get_input_embeddings().weight.data[5] = math.nan
    fine, nan = ((torch.full((6, 6), token), torch.ones(6, 6, dtype=torch.bool)) for token in (8, 5))
    fine, bad = [fine] * 9, [fine, fine, nan] + [fine] * 6
    for forget, retain in ((bad, fine), (fine, bad)):
        a, b = copy.deepcopy(model), copy.deepcopy(model)
        RUNS[method](a, forget, retain, steps=9, lr=1e-2, steps_left=lambda *_: (1, 2))
        with pytest.raises(SystemExit):
            RUNS[method](b, forget, retain, steps=9, lr=1e-2)
        assert "NaN or infinity at step 3;" in capsys.readouterr().err
        torch.testing.assert_close(flat(b), flat(a), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("method", RUNS)
def test_training_drops_nothing_out(method):
    """Which would not be a function of seed and step; control: in training mode this model does."""
    models = [toy_model(num_hidden_layers=3, attention_dropout=p) for p in (0.0, 0.5)]
    for model in models:
        RUNS[method](model, Batches(12, seed=1), Batches(12, seed=2), steps=2, lr=1e-3)
    assert torch.equal(*map(flat, models))
    model = models[1].train()
    assert not torch.equal(*(model(Batches(4)[0][0]).logits for _ in "ab"))


def stream(batch, seed=0, purpose="forget", tokens=64):
    return Stream(TEXTS, bpe(TEXTS), batch, tokens, seed, purpose, "cpu")


def test_a_batch_is_a_function_of_seed_purpose_and_step():
    a, b = stream(6), stream(6)
    assert all(torch.equal(x, b[i][0]) for x, i in [(a[i][0], i) for i in (9, 3, 17)])
    assert not any(torch.equal(a[3][0], x[3][0]) for x in (stream(6, seed=1), stream(6, purpose="retain")))


def test_an_epoch_reads_each_text_once_cut_and_padded_on_the_right():
    rows = [{tuple(row[row != 0].tolist()) for row in stream(8)[i][0]} for i in range(12)]
    assert len(set.union(*rows[:5])) == 40 and rows[:5] != rows[5:10]
    assert {len(batch) for batch in rows} == {8}  # no text twice: x_heldout is none of its step's x_f
    (ids, mask), (short, all_true) = stream(40)[0], stream(6, tokens=7)[0]
    assert (mask.long().diff(dim=1) <= 0).all() and (~mask).any() and (ids[~mask] == 0).all()
    assert short.shape[1] == 7 and (short[:, 0] == 0).all() and all_true.all()  # 0: BOS
    with pytest.raises(SystemExit):
        stream(41)
