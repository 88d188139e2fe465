"""Text attention with learned layer weights: its scores and terms against NumPy, its training against its inference."""

import json

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_ivtp import methods, trained
from modeling_ivtp.trained.sparse_attention import chosen, sparsity_of
from tests.support.reference import decoder_layer
from tests.support.tiny import PATCHES, prompt, tiny_model
from tests.support.trained import (
    ROWS,
    answered,
    assert_a_batch_is_its_rows,
    assert_same_bits,
    bits,
    exact_norm,
    positions,
    ready,
    slope,
)

TWO = {"layers": (2, 4), "fuse": 2}


def scores_by_hand(model, method, inputs, readers, counts):
    """S before each drop for a batch of one image, on full sequences with masks alone: list of (candidates, S)."""
    language, ids = model.model.language_model, inputs["input_ids"]
    columns = np.flatnonzero(ids[0].numpy() == model.config.image_token_id)
    tower = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    x = language.embed_tokens(ids)[0].clone()
    x[columns] = tower
    cos, sin = language.rotary_emb(x[None], position_ids=torch.arange(len(x))[None])
    alive, maps, found = np.ones(len(x), dtype=bool), [], []
    for index, layer in enumerate(language.layers):
        visible = np.tril(np.ones((len(x), len(x)), dtype=bool)) & alive
        visible[np.arange(len(x)), np.arange(len(x))] = True
        x, attention, _ = decoder_layer(layer, x, visible, cos[0], sin[0])
        maps.append(attention)
        if index + 1 not in TWO["layers"]:
            continue
        drop = TWO["layers"].index(index + 1)
        logits = method.learned[drop].logits.detach().numpy().astype(np.float64)
        weights = np.exp(logits) / np.exp(logits).sum()
        left = [column for column in columns if alive[column]]
        reading = left if readers == "vision" else readers
        scores = []
        for column in left:
            total = 0.0
            for weight, of_layer in zip(weights, maps[-2:], strict=True):
                total += weight * sum(of_layer[reader, column] for reader in reading) / len(reading)
            scores.append(total)
        found.append(([int(column - columns[0]) for column in left], np.array(scores)))
        stays = {left[place] for place in np.argsort(-np.array(scores), kind="stable")[: counts[drop]]}
        for column in left:
            alive[column] = column in stays
    return found


@pytest.mark.parametrize("readers", ["instruction", "text", "vision"])
@torch.no_grad()
def test_scores_are_what_loops_compute_in_inference_and_in_training(readers):
    model = tiny_model(enabled=False)
    method = ready(trained.SparseAttention(ratios=(0.5, 0.5), readers=readers, **TWO), model)
    inputs = prompt([[3, "image", 7]])
    inputs["clip_spans"][:, -2:] = 0
    text = list(range(3 + PATCHES, 3 + PATCHES + (5 if readers == "instruction" else 7)))
    expected = scores_by_hand(model, method, inputs, "vision" if readers == "vision" else text, (8, 4))
    with method(model):
        groups = model.explain(**inputs).images[0].groups
        method.learned.train()
        with method.running(None):
            model(**inputs, use_cache=False)
        method.learned.eval()
    assert [len(group.kept) for group in groups] == [8, 4]
    for group, (candidates, scores), trained_on in zip(groups, expected, method.batch.scores, strict=True):
        assert group.candidates.tolist() == candidates
        np.testing.assert_allclose(group.importance.numpy(), scores, atol=1e-6)
        np.testing.assert_allclose(trained_on[0, 0].numpy()[candidates], scores, atol=1e-6)
    with methods.TextAttention(ratios=(0.5, 0.5), readers=readers, **TWO)(model):
        even = model.explain(**inputs).images[0].groups
    assert np.abs(even[0].importance.numpy() - expected[0][1]).max() > 1e-4  # the layers' weights count


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@torch.no_grad()
def test_masked_training_is_gathered_inference(decoder, attention):
    model = tiny_model(decoder, attention=attention)
    method = ready(trained.SparseAttention(keep=3, **TWO), model)
    inputs = prompt(ROWS)
    inputs["position_ids"] = positions(inputs)
    with method(model):
        gathered = model(**inputs)
        lengths = [layer.keys.shape[2] for layer in gathered.past_key_values.layers]
        assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4]
        method.learned.train()
        masked = model(**inputs, use_cache=False)
        kept = model.model(**inputs).kept_tokens
        method.learned.eval()
        assert torch.equal(kept, model.model(**inputs).kept_tokens)
    assert kept.sum() < inputs["attention_mask"].sum()
    torch.testing.assert_close(masked.logits[kept], gathered.logits[kept], atol=1e-5, rtol=0)
    with method.changed(keep=5)(model):
        other = model(**inputs)
    assert (other.logits[kept] - gathered.logits[kept]).abs().max() > 1e-3  # the comparison can fail


def test_a_batch_gives_what_its_rows_give_alone_in_training_and_inference():
    model = tiny_model()
    method = ready(trained.SparseAttention(keep=3, **TWO), model)
    assert_a_batch_is_its_rows(method, model, lambda batch: batch.scores, 1e-6)


def test_the_terms_are_those_of_loops():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    scores[1, 4:] = 0  # gone
    for row, values in enumerate(scores.double().numpy()):
        shares = [value / values.sum() for value in values]
        expected = {
            "l1": sum(abs(value) for value in values),
            "entropy": -sum(share * np.log(share) for share in shares if share > 0),
            "l1_over_l2": sum(shares) / np.sqrt(sum(share**2 for share in shares)),
        }
        for term, value in expected.items():
            assert float(sparsity_of(scores, term)[row]) == pytest.approx(value, rel=1e-5)


def test_the_printed_term_takes_attention_off_the_image_and_the_others_make_it_sparse():
    """A step down the first lowers the sum; of the others it lowers the entropy, and scaling scores changes nothing."""
    start = torch.rand(1, 8, generator=torch.Generator().manual_seed(1)) / 8
    for term in ("l1", "entropy", "l1_over_l2"):
        scores = start.clone().requires_grad_()
        sparsity_of(scores, term).sum().backward()
        moved = start - 1e-3 * scores.grad / scores.grad.norm()
        by_scale = float((scores.grad * start).sum() / scores.grad.norm() / start.norm())
        entropy = float(sparsity_of(moved, "entropy") - sparsity_of(start, "entropy"))
        if term == "l1":
            assert by_scale > 0.5
            assert float(moved.sum()) < float(start.sum()) - 2e-3
        else:
            assert abs(by_scale) < 1e-5
            assert entropy < -1e-4


def test_gone_tokens_and_scores_of_zero_have_gradients_that_are_numbers():
    scores = torch.tensor([[[0.4, 0.0, 0.2, 0.1, 0.0]]], requires_grad=True)
    there = torch.tensor([[[True, True, True, True, False]]])
    weights = chosen(scores, there, 2, hard=True)
    assert weights.tolist() == [[[1, 0, 1, 0, 0]]]
    (weights.sum() + sparsity_of(scores[0], "entropy").sum() + sparsity_of(scores[0], "l1_over_l2").sum()).backward()
    assert scores.grad.isfinite().all()
    soft = chosen(scores.detach(), there, 2, hard=False)
    torch.testing.assert_close(soft, torch.tensor([[[0.4 / 0.55, 0, 0.2 / 0.35, 0.1 / 0.25, 0]]]))
    torch.testing.assert_close(chosen(7 * scores.detach(), there, 2, hard=False), soft)
    assert chosen(scores.detach(), there, 5, hard=True).tolist() == [[[1, 1, 1, 1, 0]]]


def total_of(training, inputs):
    """The loss of a batch in float64: transformers computes its own in float32."""
    outputs = training(**inputs)
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    language = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(outputs.loss.double(), language + training.method.loss(), atol=1e-5, rtol=0)
    return language + training.method.loss()


@pytest.mark.parametrize("sparsity", ["l1", "entropy", "l1_over_l2"])
def test_gradients_of_soft_shares_are_those_of_finite_differences(sparsity, monkeypatch):
    """By the layers' weights, and by queries and keys of the language model, through scores, term and both drops."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # readers' shares and maps are float32 otherwise
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim, dtype=None: softmax(self, dim))
    model = tiny_model().double()
    options = {"sparsity": sparsity, "sparsity_weight": 0.5, "straight_through": False, **TWO}
    method = ready(trained.SparseAttention(keep=3, **options), model)
    method.learned.double()
    inputs = answered(answer=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        total_of(training, inputs).backward()
        weights = dict(training.named_parameters())
        names = ["learned.0.logits", "learned.1.logits"]
        names += [
            f"model.model.language_model.layers.{layer}.self_attn.{part}_proj.weight"
            for layer in (0, 1, 3)
            for part in "qk"
        ]
        for name in names:
            weight = weights[name]
            place = int(weight.grad.abs().argmax())
            exact = float(weight.grad.flatten()[place])
            found = slope(weight, place, lambda: total_of(training, inputs))
            assert found == pytest.approx(exact, rel=2e-3, abs=1e-8), name
            assert abs(exact) > 1e-6, name


@pytest.mark.parametrize("options", [{}, {"fusion": "fixed"}, {"sparsity": "none"}, {"readers": "vision"}], ids=str)
def test_what_learns_has_a_gradient_and_checkpointing_changes_none(options):
    model = tiny_model()
    method, inputs = ready(trained.SparseAttention(keep=3, **TWO, **options), model), answered()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        training(**inputs).loss.backward()
        names = [name for name, weight in training.named_parameters() if weight.requires_grad]
        expected = {name: weight.grad.clone() for name, weight in training.named_parameters() if name in names}
        training.zero_grad()
        training.gradient_checkpointing_enable({"use_reentrant": False})
        training(**inputs).loss.backward()
        for name, weight in training.named_parameters():
            if name in names:
                torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-4)
        training.gradient_checkpointing_disable()
    assert sum(name.startswith("learned.") for name in names) == (0 if "fusion" in options else 2)
    assert all(expected[name].abs().max() > 0 for name in names if name.startswith("learned."))
    parts = {name.removeprefix("model.model.").removeprefix("model.").split(".")[0] for name in names}
    assert parts - {"learned"} == {"language_model", "multi_modal_projector", "lm_head"}


@torch.no_grad()
def test_the_answer_does_not_read():
    model = tiny_model()
    method = ready(trained.SparseAttention(keep=3, readers="text", **TWO), model)
    inputs = answered([[3, "image", 7]])
    with trained.PrunerTraining(model, method) as training:
        training.train()(**inputs)
        before = method.batch.scores
        inputs["input_ids"][:, -3:] = 40
        training(**inputs)
        assert all(torch.equal(*pair) for pair in zip(before, method.batch.scores, strict=True))
        inputs["input_ids"][:, -4] = 41  # a word of the prompt
        training(**inputs)
        assert not torch.equal(before[0], method.batch.scores[0])


def test_base_weights_are_bit_equal_where_it_is_frozen_and_mass_and_entropy_are_logged():
    model = tiny_model()
    before, method = bits(model), ready(trained.SparseAttention(keep=3, sparsity="entropy", **TWO), model)
    with trained.PrunerTraining(model, method, learns=()) as training:
        optimizer = torch.optim.AdamW(training.parameter_groups(1e-1))
        entropies = []
        for _ in range(8):
            outputs = training.train()(**answered())
            optimizer.zero_grad()
            method.loss().backward(retain_graph=True)
            optimizer.step()
            entropies.append(method.measures()["attention_entropy"])
            assert outputs.loss.isfinite()
        assert_same_bits(model, before)
    assert entropies[-1] < entropies[0]  # the term does what it says, by the layers' weights alone
    assert 0 < method.measures()["attention_mass"] < 1
    with method(model):
        model.generate(**prompt(ROWS), max_new_tokens=2)
    assert_same_bits(model, before)


def test_mass_and_entropy_are_in_the_log_of_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    method = ready(trained.SparseAttention(keep=3, **TWO), model)
    rows = [{name: value[0] for name, value in answered([[3, "image", 7]], seed=seed).items()} for seed in range(2)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    with trained.PrunerTraining(model, method) as training:
        trainer = Trainer(training, arguments, train_dataset=rows, callbacks=[training.callback()])
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all({"attention_mass", "attention_entropy"} <= set(entry) for entry in logged)


@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path):
    model = tiny_model()
    options = {"layers": (2, 4), "weights": (1.0, 3.0), "readers": "text", "sparsity": "entropy"}
    method = ready(trained.SparseAttention(ratios=(0.5, 0.25), **options), model)
    method.save(tmp_path / "adapter")
    loaded = trained.load(tmp_path / "adapter")
    assert loaded == method
    with method(model):
        expected = model(**prompt(ROWS)).logits
    with loaded(model):
        assert torch.equal(model(**prompt(ROWS)).logits, expected)
        assert model.model.plan().decoder_layer_tokens(6) == (16, 16, 8, 8, 2, 2)
    assert trained.make(str(tmp_path / "adapter"), 4).keep == 4
    started = trained.SparseAttention(keep=3, **options).for_model(model).learned[0]()
    torch.testing.assert_close(started, torch.tensor([0.25, 0.75]))
    note = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert (note["pruner"], note["options"]["ratios"]) == ("sparse-attention", [0.5, 0.25])


@pytest.mark.parametrize(
    ("row", "plan"),
    [
        ({"layers": (1,), "fuse": 1}, (16, 4, 4, 4, 4, 4)),
        ({"layers": (4,), "fuse": 1}, (16, 16, 16, 16, 4, 4)),
        ({"layers": (4,), "fuse": 3}, (16, 16, 16, 16, 4, 4)),
        ({"layers": (2, 4)}, (16, 16, 8, 8, 4, 4)),
        ({"layers": (2, 4), "readers": "vision"}, (16, 16, 8, 8, 4, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_rows_of_its_ablation_are_options(row, plan):
    model = tiny_model()
    method = ready(trained.SparseAttention(keep=4, **row), model)
    with method(model):
        assert model.model.plan().decoder_layer_tokens(6) == plan
        assert model(**prompt(ROWS)).logits.isfinite().all()
    assert [len(module.logits) for module in method.learned] == [row.get("fuse", 1)] * len(row["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget; give one of keep, average, ratios"),
        ({"keep": 4, "readers": "answer"}, "readers='answer'; allowed: instruction, text, vision"),
        ({"keep": 4, "fusion": "mean"}, "fusion='mean'; allowed: learned, fixed"),
        ({"keep": 4, "sparsity": "l2"}, "sparsity='l2'; allowed: l1, entropy, l1_over_l2, none"),
        ({"keep": 4, "sparsity_weight": -1}, "sparsity_weight=-1; allowed: a number of at least 0"),
        ({"keep": 4, "straight_through": 1}, "straight_through=1; allowed: True, False"),
        ({"keep": 4, "weights": (1.0, 0.0)}, 'weights=(1.0, 0.0); allowed: numbers above 0, or fusion="fixed"'),
        ({"ratios": (0.5, 1.5)}, "ratios=(0.5, 1.5); allowed: numbers above 0, up to 1"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match="sparse-attention") as error:
        trained.SparseAttention(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.5, 0.5)}, "ratios=(0.5, 0.5, 0.5); allowed: 2 of them, one for each drop"),
        ({"keep": 4, "layers": (2, 9)}, "layers=(2, 9); allowed: 1 to 6"),
        ({"keep": 4, "layers": (2, 3), "fuse": 2}, "fuse=2 reaches below the drop before layer 3; allowed: at most 1"),
    ],
)
def test_what_does_not_fit_the_model_is_named(options, message):
    with pytest.raises(ValueError, match="sparse-attention") as error:
        trained.SparseAttention(**options).for_model(tiny_model())
    assert message in str(error.value)
