"""CLIP's features of instructions: known words are not run again, and nothing stale or padded ever counts."""

import copy

import pytest
import torch

from modeling_ivtp.model.instruction_cache import InstructionCache
from modeling_ivtp.model.prompt import index_prompt
from tests.support.tiny import IMAGE_TOKEN, prompt, tiny_model

ROWS = [[3, "image", 7], [4, "image", 6]]


@pytest.fixture
def model():
    return tiny_model()


def runs(model, monkeypatch):
    """Notes the shape of the ids of every run of CLIP's text tower."""
    shapes = []
    tower = model.model.clip_text_model.text_model
    original = type(tower).forward

    def forward(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", forward)
    return shapes


@torch.no_grad()
def test_the_same_words_are_run_once(model, monkeypatch):
    shapes = runs(model, monkeypatch)
    first, others = prompt(ROWS, seed=1), prompt(ROWS, seed=2)
    expected = [model(**first).logits, model(**others).logits]
    assert len(shapes) == 2
    again = [model(**first).logits, model(**others).logits]
    assert len(shapes) == 2
    assert all(torch.equal(*pair) for pair in zip(expected, again, strict=True))
    # Another picture and the same words.
    model(**first | {"pixel_values": others["pixel_values"]})
    assert len(shapes) == 2


@torch.no_grad()
def test_rows_that_say_the_same_share_a_run(model, monkeypatch):
    shapes, row = runs(model, monkeypatch), prompt(ROWS[:1])
    several = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in row.items()}
    expected = model(**row).logits
    model.model.instruction_cache.clear()
    torch.testing.assert_close(model(**several).logits, expected.expand(3, -1, -1), atol=1e-5, rtol=0)
    windows = row["clip_input_ids"].shape[1]
    assert [shape[0] for shape in shapes] == [windows, windows]


@torch.no_grad()
def test_some_new_words_beside_known_ones(model, monkeypatch):
    first, second = prompt(ROWS, seed=1), prompt(ROWS, seed=2)
    mixed = second | {"clip_input_ids": torch.cat([first["clip_input_ids"][:1], second["clip_input_ids"][1:]])}
    expected = model(**mixed).logits
    model.model.instruction_cache.clear()
    model(**first)
    shapes = runs(model, monkeypatch)
    assert torch.allclose(model(**mixed).logits, expected, atol=1e-5)
    assert sum(shape[0] for shape in shapes) < mixed["clip_input_ids"].flatten(0, 1).shape[0]


@torch.no_grad()
def test_padding_is_not_run(model, monkeypatch):
    """CLIP is causal: what follows the last word changes nothing before it."""
    inputs = prompt([[3, "image", 3]])
    ids = inputs["clip_input_ids"]
    ids[..., 6:] = ids[..., -1:]
    inputs["clip_spans"] = inputs["clip_spans"].clamp_max(5 - ids.shape[2]) * (inputs["clip_spans"] != 0)
    shapes = runs(model, monkeypatch)
    short = model.model.text_features(ids, (tuple(ids[0, 0, :7].tolist()),))
    whole = model.model.text_features(ids)
    assert [shape[1] for shape in shapes] == [7, ids.shape[2]]
    torch.testing.assert_close(short[:, :7], whole[:, :7], atol=1e-5, rtol=0)
    assert not short[:, 7:].any()


def test_windows_are_read_without_their_padding():
    ids = torch.tensor([[[98, 5, 6, 99, 99, 99], [98, 5, 6, 99, 0, 0], [0, 0, 0, 0, 0, 0], [98, 1, 2, 3, 4, 99]]])
    placeholders = torch.tensor([[IMAGE_TOKEN, 1]]) == IMAGE_TOKEN
    reading = index_prompt(placeholders, None, images=1, patches=1, clip_input_ids=ids)
    assert reading.windows == ((98, 5, 6, 99), (98, 5, 6, 99, 0), (0,), (98, 1, 2, 3, 4, 99))


def test_training_asks_and_fills_no_cache(model, monkeypatch):
    shapes, inputs = runs(model, monkeypatch), prompt(ROWS)
    model(**inputs)
    model.train()
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(shapes) == 3
    model.eval()
    model.model.instruction_cache.clear()
    model.train()
    model(**inputs)
    assert len(model.model.instruction_cache) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda tower: tower.text_projection.weight.mul_(2),
        lambda tower: tower.load_state_dict({name: 2 * value for name, value in tower.state_dict().items()}),
        lambda tower: tower.text_projection.register_parameter(
            "weight", torch.nn.Parameter(2 * tower.text_projection.weight)
        ),
    ],
    ids=["in place", "loaded", "replaced"],
)
@torch.no_grad()
def test_changed_weights_are_noticed(model, change):
    ids, windows = prompt(ROWS[:1])["clip_input_ids"][:, :1], None
    windows = (tuple(ids[0, 0].tolist()),)
    before = model.model.text_features(ids, windows)
    change(model.model.clip_text_model)
    after = model.model.text_features(ids, windows)
    torch.testing.assert_close(after, model.model.text_features(ids))
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_what_changes_without_its_weights_is_not_kept(model, monkeypatch):
    """An adapter is switched off without touching a weight."""

    class Switched(torch.nn.Linear):
        __module__ = "peft.tuners.lora"
        factor = 1.0

        def forward(self, hidden):
            return self.factor * super().forward(hidden)

    tower = model.model.clip_text_model
    ids = prompt(ROWS[:1])["clip_input_ids"][:, :1]
    windows = (tuple(ids[0, 0].tolist()),)
    before = model.model.text_features(ids, windows)
    tower.text_projection.__class__ = Switched
    assert torch.equal(model.model.text_features(ids, windows), before)
    tower.text_projection.factor = 2.0
    torch.testing.assert_close(model.model.text_features(ids, windows), 2 * before)
    assert len(model.model.instruction_cache) == 0
    # Merging writes through `.data`, and the layer that is left is one of torch's again.
    tower.text_projection.weight.data *= 2
    tower.text_projection.__class__ = torch.nn.Linear
    torch.testing.assert_close(model.model.text_features(ids, windows), 2 * before)


@torch.no_grad()
def test_the_last_used_are_kept():
    def encode(ids):
        asked.append(ids.shape[0])
        return ids[..., None].float().expand(-1, -1, 3)

    asked: list[int] = []
    cache, tower = InstructionCache(limit=2), torch.nn.Linear(1, 1)
    for word in (1, 2, 1, 3, 1, 2):
        window = torch.tensor([[98, word, 99]])
        features = cache.features(tower, window, (tuple(window[0].tolist()),), encode)
        assert torch.equal(features[0, :, 0], window[0].float())
    assert asked == [1] * 4  # 1, 2 and 3, and 2 again: it made room for 3
    assert len(cache) == 2
    many = torch.arange(15).view(5, 3)
    assert torch.equal(cache.features(tower, many, tuple(map(tuple, many.tolist())), encode)[..., 0], many.float())
    assert len(cache) == 2


@torch.no_grad()
def test_a_limit_of_zero_keeps_nothing(model, monkeypatch):
    model.model.instruction_cache.limit = 0
    shapes, inputs = runs(model, monkeypatch), prompt(ROWS)
    for _ in range(2):
        model(**inputs)
    assert len(shapes) == 2
    assert len(model.model.instruction_cache) == 0


@torch.no_grad()
def test_a_copy_of_the_model_has_its_own(model):
    model(**prompt(ROWS))
    copied = copy.deepcopy(model)
    copied.model.clip_text_model.text_projection.weight.zero_()
    assert len(model.model.instruction_cache) > 0
    window = prompt(ROWS[:1])["clip_input_ids"][:, :1]
    assert not copied.model.text_features(window, (tuple(window[0, 0].tolist()),)).any()


@torch.no_grad()
def test_another_width_of_context_is_another_window(model):
    ids = prompt(ROWS[:1])["clip_input_ids"][:, :1]
    ids[..., 6:] = ids[..., -1:]
    window = (tuple(ids[0, 0, :7].tolist()),)
    wide = model.model.text_features(ids, window)
    narrow = model.model.text_features(ids[..., :8], window)
    assert (wide.shape[1], narrow.shape[1]) == (ids.shape[2], 8)
    torch.testing.assert_close(narrow[:, :7], wide[:, :7], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_autocast_computed_is_kept_apart(model):
    ids = prompt(ROWS[:1])["clip_input_ids"][:, :1]
    window = (tuple(ids[0, 0].tolist()),)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.model.text_features(ids, window)
    found = model.model.text_features(ids, window)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.model.text_features(ids))


@pytest.mark.slow
@torch.no_grad()
def test_a_hooked_tower_is_always_run(model):
    ids = prompt(ROWS[:1])["clip_input_ids"][:, :1]
    window = (tuple(ids[0, 0].tolist()),)
    before = model.model.text_features(ids, window)
    handle = model.model.clip_text_model.text_projection.register_forward_hook(lambda *told: 2 * told[-1])
    torch.testing.assert_close(model.model.text_features(ids, window), 2 * before)
    handle.remove()
    torch.testing.assert_close(model.model.text_features(ids, window), before)
