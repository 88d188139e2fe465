"""ATP-LLaVA: scores and thresholds against loops, 2-D positions, training against inference, ragged rows, options."""

import math
from copy import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_ivtp import trained
from modeling_ivtp.model.pruner import DecoderStep
from modeling_ivtp.model.schedule import Group
from modeling_ivtp.trained.atp import ThresholdModule
from modeling_ivtp.trained.method import Weighed
from tests.support.tiny import prompt, randomize, tiny_model
from tests.support.trained import ROWS, answered, assert_a_batch_is_its_rows, bits, exact_norm, ready


@torch.no_grad()
def test_thresholds_are_those_of_the_paper():
    module = randomize(ThresholdModule(4), 1).double()
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.cat(module(scores), 1).numpy()
    for row, values in enumerate(scores.numpy()):
        inner = module.mix.weight.numpy() @ values + module.mix.bias.numpy()
        z = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in inner])
        for head, layer in enumerate((module.redundancy, module.spatial)):
            logit = float(layer.weight.numpy()[0] @ z + layer.bias.item())
            assert found[row, head] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)
    fresh = ThresholdModule(4)
    assert [head.bias.item() for head in (fresh.redundancy, fresh.spatial)] == [-2.0, -2.0]


def noted(method, model, inputs, **options):
    """The decoder steps at which a method is asked, with its choices."""
    steps = []

    class Noted(type(method)):
        def in_decoder(self, step):
            choice = super().in_decoder(step)
            records = [_copied(record) for record in step.decoder_records]
            steps.append((DecoderStep(step.group, [], records, step.hidden, step.sequence), self.score(step), choice))
            return choice

    watched = Noted(**{name: getattr(method, name) for name in ("scores", "attention", "score_norm", "rope", "ratios")})
    with watched.with_modules(method.learned, method.base)(model), torch.no_grad():
        model(**inputs, **options)
    return steps


def _copied(record):
    return copy(record)


def scores_by_loops(record, sequence, row, image, head_repeats):
    """Eq. 3 and 4 for one image, entry by entry: what each visual token receives of visual tokens and of the text."""
    query, key = record.query[row].double().numpy(), record.key[row].double().numpy()
    heads, size, _ = query.shape
    columns = [c for c in sequence.columns[row, image].tolist() if c < size]
    valid = [True] * size if sequence.valid is None else sequence.valid[row].tolist()
    visual = {c for other in sequence.columns[row].tolist() for c in other}
    readers = [c for c in range(max(columns) + 1, size) if valid[c] and c not in visual]
    own, cross = [], []
    for n in columns:
        total = 0.0
        for m in columns:
            for h in range(heads):
                total += float(query[h, m] @ key[h // head_repeats, n]) * record.scale / heads
        own.append(total / len(columns))
        total = 0.0
        for t in readers:
            for h in range(heads):
                logits = [
                    float(query[h, t] @ key[h // head_repeats, c]) * record.scale if valid[c] else -math.inf
                    for c in range(t + 1)
                ]
                most = max(logits)
                total += math.exp(logits[n] - most) / sum(math.exp(x - most) for x in logits) / heads
        cross.append(total / len(readers))
    return np.array(own), np.array(cross)


@pytest.mark.parametrize("norm", ["minmax", "none"])
def test_scores_are_those_of_the_paper(norm):
    model, rows = tiny_model(), [[3, "image", 4], [2, "image", 2, "image", 3]]
    method = ready(trained.ATPLLaVA(target=8, score_norm=norm), model)
    inputs = prompt(rows)
    steps = noted(method, model, inputs)
    assert len(steps) == 3
    for step, scores, _ in steps[:2]:
        for row, image in ((0, 0), (1, 0), (1, 1)):
            there = step.sequence.token_present[row, image].numpy()
            own, cross = scores_by_loops(step.decoder_records[-1], step.sequence, row, image, 2)
            if norm == "minmax":
                own, cross = ((x - x.min()) / max(x.max() - x.min(), 1e-30) for x in (own, cross))
            np.testing.assert_allclose(scores.own[row, image].numpy()[there], own, atol=2e-4)
            np.testing.assert_allclose(scores.cross[row, image].numpy()[there], cross, atol=2e-4)
            redundancy = scores.redundancy[row, image].numpy()[there]
            np.testing.assert_allclose(redundancy, (own + cross) / 2, atol=2e-4)
            assert np.abs(redundancy - own).max() > 1e-3


def test_spatial_scores_are_those_of_regular_grids():
    method = trained.ATPLLaVA(base={"patches": 576})
    found = method.spatial_scores().reshape(24, 24).numpy()
    for row in range(24):
        for column in range(24):
            of = [1 - 3 / s**2 for s in (2, 3, 4, 6, 8) if row % s == 0 and column % s == 0]
            assert found[row, column] == pytest.approx(max(of, default=0.0), abs=1e-6)
    assert {round(float(value), 3) for value in np.unique(found)} == {0, 0.25, 0.667, 0.812, 0.917, 0.953}


class Hard(trained.ATPLLaVA):
    """In training, decides as at inference, on all tokens."""

    def mask(self, step):
        margin, _ = self.margins(step)
        return self.passes(margin, self._there(step).to(margin.device)).float()


@pytest.mark.parametrize(
    "options",
    [{}, {"text_after": "patches"}, {"rope": "1d"}, {"rope": "1d", "score_norm": "none"}, {"scores": "redundancy"},
     {"scores": "spatial"}, {"attention": "self"}, {"attention": "cross"}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_masked_training_is_gathered_inference_and_decoding_goes_on(options):
    model, attention = tiny_model(attention="sdpa"), 4
    method = ready(Hard(target=8, **options), model)
    inputs = prompt(ROWS)
    length = inputs["input_ids"].shape[1]
    later = torch.randint(3, 120, (len(ROWS), attention), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    with method(model):
        gathered = model(**inputs, position_ids=place[:, :length])
        counts = [layer.keys.shape[2] for layer in gathered.past_key_values.layers]
        step = model(
            input_ids=later,
            attention_mask=mask,
            position_ids=place[:, length:],
            past_key_values=gathered.past_key_values,
        )
        kept = model.model(**inputs, position_ids=place[:, :length]).kept_tokens
        method.learned.train()
        whole = {"input_ids": torch.cat([inputs["input_ids"], later], 1), "attention_mask": mask, "position_ids": place}
        prompts = torch.arange(mask.shape[1]) < length
        with method.running(prompts.expand_as(mask)):
            masked = model(**whole, pixel_values=inputs["pixel_values"], use_cache=False)
        method.learned.eval()
    assert counts[-1] < counts[0]
    torch.testing.assert_close(masked.logits[:, :length][kept], gathered.logits[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(masked.logits[:, length:], step.logits, atol=1e-5, rtol=0)
    with method.changed(rope="1d" if method.rope == "2d" else "2d")(model):
        other = model(**inputs, position_ids=place[:, :length])
    assert (other.logits[:, -1] - gathered.logits[:, -1]).abs().max() > 1e-3  # the comparison can fail


def test_a_batch_gives_what_its_rows_give_alone_in_training_and_inference():
    model = tiny_model()
    method = ready(trained.ATPLLaVA(target=8), model)
    assert_a_batch_is_its_rows(method, model, lambda batch: [weighed.weights for weighed in batch.weighed], 1e-5)


@torch.no_grad()
def test_images_keep_different_numbers_and_one_token_at_least():
    model = tiny_model()
    inputs, method = prompt(ROWS), ready(trained.ATPLLaVA(target=8), model)
    steps = noted(method, model, inputs)
    with method(model):
        trace = model.explain(**inputs)
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
    assert generated.shape == (3, inputs["input_ids"].shape[1] + 3)
    counts = [[len(group.kept) for group in image.groups] for image in trace.images]
    assert len({tuple(count) for count in counts}) > 1
    for step, scores, choice in steps:
        redundancy, spatial = method.thresholds(step, scores)
        for row, image in ((0, 0), (2, 0), (2, 1)):
            there = step.sequence.token_present[row, image]
            passing = (scores.redundancy > redundancy) | (scores.spatial > spatial)
            expected = [i for i, ok in enumerate((passing[row, image] & there).tolist()) if ok]
            kept = choice.kept[row, image]
            assert [i for i in kept.tolist() if i < len(there)] == (expected or kept[:1].tolist())
    for head in ("redundancy", "spatial"):
        for module in method.learned:
            getattr(module, head).bias.fill_(50.0)  # no score is above 1
    with method(model):
        trace = model.explain(**inputs)
    assert [[len(group.kept) for group in image.groups] for image in trace.images] == [[1, 1, 1]] * 3


@torch.no_grad()
def test_positions_on_a_grid_are_rows_and_columns_and_text_goes_on_behind():
    model = tiny_model()
    method = ready(trained.ATPLLaVA(target=8), model)
    seen, original = [], type(model.model.language_model)._rotary

    def rotary(self, hidden, place):
        seen.append(place)
        return original(self, hidden, place)

    inputs = prompt([[2, "image", 3, "image", 2]])
    for after, span in (("grid", 4), ("patches", 16)):
        seen.clear()
        with method.changed(text_after=after)(model), pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.model.language_model), "_rotary", rotary)
            model(**inputs)
        second = 2 + span + 3
        rows, columns = [0, 1], [0, 1]
        for start, text in ((2, 3), (second, 2)):
            rows += [start + patch // 4 for patch in range(16)] + [start + span + i for i in range(text)]
            columns += [start + patch % 4 for patch in range(16)] + [start + span + i for i in range(text)]
        assert seen[0].tolist() == [[rows], [columns]]
    place = torch.tensor([[[3, 7]], [[5, 7]]])
    cos, sin = model.model.language_model._rotary(torch.zeros(1, 2, 32), place)
    width = cos.shape[-1]
    for token in range(2):
        for index in range(width):
            pair = index % (width // 2)
            angle = place[pair % 2, 0, token].item() * 10000 ** (-2 * pair / width)
            assert cos[0, token, index].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[0, token, index].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert torch.equal(
        cos[0, 1], model.model.language_model.rotary_emb(torch.zeros(1, 1, 32), torch.tensor([[7]]))[0][0, 0]
    )


def test_the_loss_is_that_of_the_paper():
    method = trained.ATPLLaVA(base={"patches": 576, "num_hidden_layers": 32}).with_modules(
        torch.nn.ModuleList(), {"patches": 576, "num_hidden_layers": 32}
    )
    method.batch.weighed = [
        Weighed(
            Group(top - 1, top - 1, 576), (torch.arange(576) < count).float()[None, None], torch.ones(1, 1, 576) > 0
        )
        for top, count in ((4, 126), (14, 88), (24, 20))
    ]
    deep = (126 * 4 + 88 * 14 + 20 * 24) / 576
    average = (4 * 576 + 10 * 126 + 10 * 88 + 8 * 20) / 32
    assert average == 143.875
    assert method.loss().item() == pytest.approx(0.01 * deep + 0.2 * (144 - average), rel=1e-6)


def test_masks_sharpen_and_multiply_and_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = tiny_model().double()
    # One module: scores carry no gradient, so what a lower module does to a higher one's scores is left out.
    method = ready(trained.ATPLLaVA(target=8, layers=(2,), temperature=(3.0, 300.0)), model)
    method.learned.double()
    inputs = answered(answer=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()

    def total(training):
        outputs = training(**inputs)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100) + method.loss()

    with trained.PrunerTraining(model, method, learns=()) as training:
        training.train()
        total(training).backward()
        soft = method.batch.weighed[0].weights.detach()
        for name, weight in training.learned.named_parameters():
            place = int(weight.grad.abs().argmax())
            with torch.no_grad():
                values = []
                for step in (1e-5, -1e-5):
                    weight.view(-1)[place].add_(step)
                    values.append(total(training).item())
                    weight.view(-1)[place].sub_(step)
            exact = weight.grad.view(-1)[place].item()
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact, rel=1e-3, abs=1e-8), name
            assert abs(exact) > 1e-6
        method.batch.progress = 1.0
        with torch.no_grad():
            total(training)
        sharp = method.batch.weighed[0].weights
    present = method.batch.weighed[0].present
    assert torch.equal(soft[present] > 0.5, sharp[present] > 0.5)
    near = soft[present].logit().abs() < 0.1  # where the sharper sigmoid is not 0 or 1 in its last bit
    torch.testing.assert_close(sharp[present].logit()[near], 100 * soft[present].logit()[near], rtol=1e-3, atol=1e-6)
    assert (sharp[present] - sharp[present].round()).abs().mean() < (soft[present] - soft[present].round()).abs().mean()


def test_the_language_model_learns_too_and_checkpointing_changes_no_gradient():
    model = tiny_model()
    method, inputs = ready(trained.ATPLLaVA(target=8), model), answered()
    with trained.PrunerTraining(model, method) as training:
        training.train()
        loss = training(**inputs).loss
        loss.backward()
        expected = {
            name: weight.grad.clone() for name, weight in training.named_parameters() if weight.grad is not None
        }
        training.zero_grad()
        training.gradient_checkpointing_enable({"use_reentrant": False})
        training(**inputs).loss.backward()
        found = {name: weight.grad for name, weight in training.named_parameters() if weight.grad is not None}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
        training.gradient_checkpointing_disable()
    parts = {name.removeprefix("model.model.").removeprefix("model.").split(".")[0] for name in expected}
    assert parts == {"learned", "language_model", "multi_modal_projector", "lm_head"}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[0] for name, value in answered([[3, "image", 7]], seed=index).items()}


@pytest.mark.slow
def test_trainer_trains_modules_and_language_model_and_keeps_both(tmp_path):
    model = tiny_model()
    before, method = bits(model), ready(trained.ATPLLaVA(target=8), model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, bf16=True,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    with trained.PrunerTraining(model, method) as training:
        start = {name: weight.clone() for name, weight in training.state_dict().items()}
        optimizer = torch.optim.AdamW(training.parameter_groups(1e-2, 1e-3))
        callbacks = [training.callback()]
        Trainer(training, arguments, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=callbacks).train()
        end = {name: weight.clone() for name, weight in training.state_dict().items()}
        training.save(tmp_path / "pruner")
    assert method.batch.progress == 0.5
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == end.keys()
    assert all(torch.equal(saved[name], end[name]) for name in end)
    assert any(not torch.equal(end[name], start[name]) for name in end if "language_model" in name)
    assert any(not torch.equal(end[name], start[name]) for name in end if name.startswith("learned."))
    frozen = {name for name in before if "vision_tower" in name or "clip_text" in name}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
    with trained.load(tmp_path / "pruner")(model):
        assert model.model.plan() is not None


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)])
@torch.no_grad()
def test_fixed_ratios_drop_the_lowest_scores_in_training_too(ratios):
    model = tiny_model()
    method = ready(trained.ATPLLaVA(ratios=ratios), model)
    inputs = prompt([[3, "image", 7]])
    for step, scores, choice in noted(method, model, inputs):
        rank = torch.maximum(scores.redundancy, scores.spatial)[0, 0]
        best = rank.sort(descending=True, stable=True).indices[: step.group.keep]
        assert sorted(best.tolist()) == choice.kept[0, 0].tolist()
    with method(model):
        assert model.model.plan().decoder_layer_tokens(6)[-1] == max(2, 16 * int(ratios[0] == 1))
    with trained.PrunerTraining(model, method) as training:
        outputs = training.train()(**answered(), use_cache=True)
        assert outputs.loss.isfinite()
        lengths = [layer.keys.shape[2] for layer in outputs.past_key_values.layers]
        assert (lengths[-1] < lengths[0]) == (ratios[0] < 1)


@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path):
    model = tiny_model()
    method = ready(trained.ATPLLaVA(target=8, scores="redundancy", strides=(2, 3), temperature=(5.0, 50.0)), model)
    method.save(tmp_path / "adapter")
    loaded = trained.load(tmp_path / "adapter")
    assert loaded == method
    with method(model):
        expected = model(**prompt(ROWS)).logits
    with loaded(model):
        assert torch.equal(model(**prompt(ROWS)).logits, expected)
    with pytest.raises(ValueError, match="patches=16; allowed: 64"):
        loaded.with_modules(loaded.learned, {**loaded.base, "patches": 64})(model).__enter__()
    with pytest.raises(ValueError, match="keep=4; allowed: None, for thresholds decide"):
        trained.make(str(tmp_path / "adapter"), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "keep=4; allowed: None, for thresholds decide"),
        ({"average": 4.0}, "average=4.0; allowed: None, for thresholds decide"),
        ({"target": 0}, "target=0; allowed: a number of at least 1"),
        ({"scores": "all"}, "scores='all'; allowed: both, redundancy, spatial"),
        ({"attention": "text"}, "attention='text'; allowed: both, self, cross"),
        ({"rope": "3d"}, "rope='3d'; allowed: 2d, 1d"),
        ({"text_after": "row"}, "text_after='row'; allowed: grid, patches"),
        ({"score_norm": "z"}, "score_norm='z'; allowed: minmax, none"),
        ({"ratios": (0.5, 1.5)}, "ratios=(0.5, 1.5); allowed: shares above 0, up to 1"),
        ({"ratios": ()}, "ratios=(); allowed"),
        ({"strides": (1, 2)}, "strides=(1, 2); allowed: whole numbers above 1"),
        ({"temperature": (10.0,)}, "temperature=(10.0,); allowed: two numbers above 0"),
        ({"depth_weight": -1}, "depth_weight=-1; allowed: a number of at least 0"),
        ({"positions": "compact"}, 'positions="compact" with rope="2d"; allowed: original'),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match="atp-llava") as error:
        trained.ATPLLaVA(**options)
    assert message in str(error.value)


def test_what_does_not_fit_the_model_is_named():
    for options, message in (
        ({"ratios": (0.5, 0.5)}, "allowed: 3 of them, one for each module"),
        ({"target": 8, "layers": (2, 9)}, "allowed: 1 to 6, the layers of this decoder"),
    ):
        with pytest.raises(ValueError, match="atp-llava") as error:
            trained.ATPLLaVA(**options).for_model(tiny_model())
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "layers", "message"),
    [
        (17, None, "target=17 tokens on average cannot be reached; allowed: 3.5 to 16"),
        (3.4, None, "target=3.4 tokens on average cannot be reached; allowed: 3.5 to 16"),
        (8, (4, 5), "target=8 tokens on average cannot be reached; allowed: 11.0 to 16, as the first 4 of 6 layers"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused_before_anything_changes(target, layers, message):
    model = tiny_model()
    with pytest.raises(ValueError, match="atp-llava") as error:
        trained.ATPLLaVA(target=target, layers=layers).for_model(model)
    assert message in str(error.value)
    assert model.model.applied_pruner is None
    assert trained.ATPLLaVA(target=3.5).for_model(model).target == 3.5
