"""Every method of `modeling_ivtp.methods` on the engine: one contract for all of them."""

import copy
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, StaticCache

from modeling_ivtp import IVTPLlavaForConditionalGeneration, methods
from modeling_ivtp.flops.shapes import load_shape
from modeling_ivtp.model.visual_sequence import VisualSequence
from tests.support.masked import choices_of, masked_logits
from tests.support.tiny import PATCHES, prompt, rows_alone, tiny_model

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3], [1, "image", "image", 2]]
EXAMPLES = {
    "random": methods.Random(4),
    "topk": methods.TopK(4),
    "topk+": methods.TopKPlus(4),
    "spatial_pooling": methods.SpatialPooling(4),
    "evit": methods.EViT(4),
    "tome": methods.ToMe(4),
    "tome+": methods.ToMePlus(4),
    "ivtp": methods.IVTP(4),
    "ivtp-v": methods.IVTPV(4),
    "ivtp-extended": methods.IVTPExtended(4),
    "ivtp-extended-flat": methods.IVTPExtendedFlat(4),
    "ivtp-extended-late": methods.IVTPExtendedLate(4),
    "text_attention": methods.TextAttention(4, layers=(2, 4), fuse=2, weights=(1.0, 3.0)),
    "fastv": methods.FastV(4),
    "pyramiddrop": methods.PyramidDrop(4),
    "sparsevlm": methods.SparseVLM(5, adaptive=True),
    "prumerge+": methods.PruMergePlus(6, adaptive=True, neighbours=3),
    "visionzip": methods.VisionZip(4, contextual=2),
    "divprune": methods.DivPrune(4),
    "cdpruner": methods.CDPruner(4),
    "lvpruning-topk": methods.LVPruningTopK(4),
    "atp-spatial": methods.ATPSpatial(4),
    "hiprune": methods.HiPrune(7, alpha=0.8),
    "vispruner": methods.VisPruner(4),
    "prunesid": methods.PruneSID(9),
    "vscan": methods.VScan(4, tower_tokens=9, windows=2),
    "tops": methods.TOPS(1),
    "cen-divprune": methods.CenDivPrune(4),
    "cen-cdpruner": methods.CenCDPruner(4),
}
EVERY = pytest.mark.parametrize("name", methods.METHODS)
TOLERANCE = 1e-5


def test_every_method_has_a_row_here():
    assert list(EXAMPLES) == list(methods.METHODS)
    assert all(EXAMPLES[name].name == name for name in EXAMPLES)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def llava():
    return load_shape("llava-1.5-7b")


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@EVERY
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_prompt_and_decoding_agree_with_masks_alone(name, attention, cache):
    model = tiny_model(attention=attention)
    inputs = prompt(ROWS)
    batch, length = inputs["input_ids"].shape
    later = torch.randint(3, 120, (batch, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    static = {"config": model.config.text_config, "max_cache_len": length + 6}
    past = DynamicCache() if cache == "dynamic" else StaticCache(**static)
    with EXAMPLES[name](model):
        recorder, outputs = choices_of(
            model, inputs | {"position_ids": positions(mask)[:, :length], "past_key_values": past}
        )
        expected, alive = masked_logits(model, recorder, inputs, later)
        logits, end = [outputs.logits], length
        for count in (1, 1, 4):
            step = model(
                input_ids=later[:, end - length : end - length + count],
                attention_mask=mask[:, : end + count],
                position_ids=positions(mask)[:, end : end + count],
                past_key_values=past,
            )
            logits.append(step.logits)
            end += count
    present = torch.from_numpy(alive)
    assert (torch.cat(logits, 1) - expected)[present].abs().max() <= TOLERANCE


@EVERY
@torch.no_grad()
def test_as_many_tokens_stay_as_were_asked_for(name, model):
    with EXAMPLES[name](model):
        plan = model.model.plan()
        trace = model.explain(**prompt(ROWS))
    kept = [len(image.groups[-1].kept) for image in trace.images]
    if plan.exact:
        assert kept == [EXAMPLES[name].keep] * 5
    else:
        assert all(1 <= count <= EXAMPLES[name].keep for count in kept)
    assert all((image.groups[-1].kept.diff() > 0).all() for image in trace.images)


@EVERY
@torch.no_grad()
def test_another_choice_gives_other_logits(name, model):
    inputs = prompt(ROWS[:1])
    with EXAMPLES[name](model):
        recorder, outputs = choices_of(model, inputs)
        last = [*recorder.tower, *recorder.prompted, *recorder.decoder][-1]
        whole = last.candidates.flatten()
        last.kept = last.kept.clone()
        last.kept.view(-1)[0] = next(patch for patch in whole if patch not in last.kept)
        expected, _ = masked_logits(model, recorder, inputs)
    assert (outputs.logits - expected)[:, -1].abs().max() > 10 * TOLERANCE


@EVERY
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give_alone(name, model):
    inputs = prompt(ROWS)
    with EXAMPLES[name](model):
        together = model(**inputs, position_ids=positions(inputs["attention_mask"])).logits[:, -1]
        for row, single in enumerate(rows_alone(inputs, ROWS)):
            alone = model(**single).logits[:, -1]
            assert (together[row] - alone[0]).abs().max() <= TOLERANCE, row


@EVERY
@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}])
def test_beams_and_static_caches_answer_as_rows_alone_do(name, options, model):
    inputs = prompt(ROWS[::2])
    settings = {"max_new_tokens": 5, "do_sample": False} | options
    number = options.get("num_return_sequences", 1)
    with EXAMPLES[name](model):
        together = model.generate(**inputs, **settings)[:, -5:]
        for row, single in enumerate(rows_alone(inputs, ROWS[::2])):
            alone = model.generate(**single, **settings)[:, -5:]
            assert torch.equal(together[row * number : (row + 1) * number], alone)


@EVERY
def test_the_projector_learns_whatever_prunes(name):
    model, inputs = tiny_model(), prompt(ROWS[:1])
    with EXAMPLES[name](model):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.model.multi_modal_projector.parameters())


def snapshot(model):
    """Everything that applying a method must leave as it was."""
    modules = {name: (type(module), type(module).forward, set(vars(module))) for name, module in model.named_modules()}
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    return modules, weights, type(model.config), copy.deepcopy(vars(model.config)), model.config.to_dict()


def without_clip(inputs):
    return {name: value for name, value in inputs.items() if not name.startswith("clip_")}


@pytest.fixture(scope="module")
def stock(model):
    config = model.config.to_dict()
    for name in ("pruning", "clip_text_config", "auto_map", "model_type", "architectures"):
        config.pop(name, None)
    stock = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    weights = model.state_dict()
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
    stock.generation_config.eos_token_id = None
    return stock


def test_the_extended_methods_are_the_options_that_they_stand_for(model):
    inputs = prompt(ROWS)
    options = {"importance": "accumulated", "choice": "diverse"}
    flat = {"decoder_layers": 0, "guidance": "visual_cls", "tower_tokens": None}
    for method, same in (
        (methods.IVTPExtended(4), options),
        (methods.IVTPExtended(4, {"sharpness": 2}), options | {"sharpness": 2}),
        (methods.IVTPExtended(4, {"choice": "top"}), options | {"choice": "top"}),
        (methods.IVTPExtendedFlat(4), options | flat),
    ):
        with method(model):
            found = model(**inputs).logits
        with model.pruning(visual_tokens=4, **same):
            assert torch.equal(model(**inputs).logits, found)
    with model.pruning(choice="diverse", sharpness=3), methods.IVTPExtended(4, {"choice": "top"})(model):
        assert not torch.equal(model(**inputs).logits, found)


def test_late_is_late_at_the_cost_of_divprune(model):
    ours, theirs = (method.bind(model.config) for method in (methods.IVTPExtendedLate(4), methods.DivPrune(4)))
    assert ours.plan(model.config, PATCHES) == theirs.plan(model.config, PATCHES)
    assert not ours.needs.image_embeds
    assert not ours.needs.all_projected
    config = copy.copy(model.config)
    config.vision_feature_layer = 0
    with pytest.raises(ValueError, match="late reads the layers below the features, and vision_feature_layer=0 has no"):
        methods.IVTPExtendedLate(4).bind(config)


@EVERY
@pytest.mark.parametrize("raising", [False, True])
def test_the_model_is_as_before_afterwards(name, raising, model):
    before = snapshot(model)
    inputs = prompt(ROWS[:1])
    logits = model(**inputs).logits
    try:
        with EXAMPLES[name](model) as inside:
            assert inside is model
            assert not torch.equal(model(**inputs).logits, logits) or name == "ivtp"
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raising
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if "cdpruner" not in name])
def test_a_stock_llava_is_pruned_alike_and_left_as_it_was(name, model, stock):
    inputs = without_clip(prompt(ROWS))
    settings = {"max_new_tokens": 4, "do_sample": False}
    stock.generate(**inputs, **settings)  # which leaves traces of its own in any model
    before, unpruned = snapshot(stock), stock(**inputs).logits
    method = EXAMPLES[name]
    if name.startswith("ivtp") and name != "ivtp-extended-late":
        # A stock model has no options of its own, and LLaVA-1.5's do not fit six layers.
        own = {"layers_per_group": 2, "decoder_layers": 4, "tower_tokens": model.pruning_config.tower_tokens}
        method = type(method)(4, own)
    elif name in ("topk+", "tome+"):
        method = type(method)(4, decoder_layers=4)
    with method(stock):
        theirs = stock.generate(**inputs, **settings)
    assert snapshot(stock) == before
    assert torch.equal(stock(**inputs).logits, unpruned)
    with method(model):
        assert torch.equal(model.generate(**inputs, **settings), theirs)


def test_a_stock_llava_is_saved_as_one_while_a_method_is_applied(stock, tmp_path):
    stock.save_pretrained(tmp_path / "before")
    with methods.FastV(4)(stock):
        stock.save_pretrained(tmp_path / "inside")
        assert isinstance(stock, IVTPLlavaForConditionalGeneration)  # and is pruned on
    assert "save_pretrained" not in vars(stock)
    files = {path.name: path.read_bytes() for path in (tmp_path / "inside").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}


def test_a_method_that_needs_clip_says_so(stock, model):
    message = r"cdpruner compares patches.*from_llava\(\.\.\., clip=\.\.\.\)"
    with pytest.raises(ValueError, match=message), methods.CDPruner(4)(stock):
        pass
    with methods.CDPruner(4)(model), pytest.raises(ValueError, match=r"clip_input_ids is missing.*IVTPLlavaProcessor"):
        model(**without_clip(prompt(ROWS[:1])))


def test_methods_at_different_stages_are_composed_in_order(model):
    inputs = prompt(ROWS)
    with methods.FastV(4)(model), methods.DivPrune(9)(model):
        trace = model.explain(**inputs)
        recorder, outputs = choices_of(model, inputs | {"position_ids": positions(inputs["attention_mask"])})
        expected, alive = masked_logits(model, recorder, inputs)
    assert [(group.stage, len(group.kept)) for group in trace.images[0].groups] == [("features", 9), ("decoder", 4)]
    assert (outputs.logits - expected)[torch.from_numpy(alive)].abs().max() <= TOLERANCE
    with methods.TopK(9)(model), methods.DivPrune(6)(model), methods.CDPruner(5)(model), methods.FastV(4)(model):
        stages = [group.stage for group in model.explain(**inputs).images[0].groups]
    assert stages == ["tower"] * 5 + ["features", "prompt", "decoder"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (methods.FastV(8), methods.SparseVLM(4), "sparsevlm acts at decoder, where fastv acts already"),
        (methods.IVTP(8), methods.FastV(4), "fastv acts at decoder, where ivtp acts already"),
        (methods.IVTP(8), methods.DivPrune(4), "divprune acts at features, where ivtp acts already"),
        (methods.TopK(8), methods.VisionZip(4), "visionzip reads the attention of the whole image"),
        (methods.TopK(8), methods.SpatialPooling(4), "spatial_pooling needs the whole grid"),
        (methods.PruMergePlus(8), methods.CDPruner(4), None),
        (methods.PruMergePlus(8, adaptive=True), methods.CDPruner(4), "cdpruner follows a method that adapts"),
    ],
)
def test_methods_that_get_in_each_others_way_are_refused(first, second, message, model):
    if message is None:
        with first(model), second(model):
            assert model.explain(**prompt(ROWS[:1])).final_tokens == (second.keep,)
        return
    before = snapshot(model)
    with first(model):
        with pytest.raises(ValueError, match=message), second(model):
            pass
        assert model.explain(**prompt(ROWS[:1])).final_tokens[0] <= first.keep
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.make("fastw", 4), r"Unknown method 'fastw'; allowed: random, topk"),
        (lambda: methods.make("fastv", 4, depth=2), r"fastv has no option depth; allowed: positions, average, layer"),
        (lambda: methods.FastV(0), r"fastv: keep=0; allowed: a whole number of at least 1"),
        (lambda: methods.FastV(True), r"fastv: keep=True"),
        (lambda: methods.FastV(), r"fastv: no budget; give one of keep, average"),
        (lambda: methods.FastV(4, average=8), r"fastv: keep=4, average=8; give one of keep, average"),
        (lambda: methods.FastV(average=0), r"fastv: average=0; allowed: a number of at least 1"),
        (lambda: methods.FastV(average=True), r"fastv: average=True; allowed: a number"),
        (lambda: methods.FastV(average=float("nan")), r"fastv: average=nan; allowed: a number"),
        (lambda: methods.make("fastv", average="8"), r"fastv: average='8'; allowed: a number"),
        (lambda: methods.FastV(4, layer=0), r"fastv: layer=0; allowed: a whole number of at least 1"),
        (lambda: methods.FastV(4, positions="packed"), r"fastv: positions='packed'; allowed: original, compact"),
        (lambda: methods.VisionZip(4, contextual=5), r"visionzip: contextual=5; allowed: a whole number from 0 to 4"),
        (lambda: methods.ATPSpatial(4, spatial=1.5), r"atp-spatial: spatial=1.5; allowed: from 0 to 1"),
        (lambda: methods.TextAttention(4, fuse=2, weights=(1.0,)), r"weights=\(1.0,\); allowed: 2 numbers"),
        (lambda: methods.TextAttention(4, readers="all"), r"readers='all'; allowed: instruction, text"),
        (lambda: methods.TextAttention(ratios=(0.5, 1.5)), r"ratios=\(0.5, 1.5\); allowed: numbers above 0, up to 1"),
        (lambda: methods.TextAttention(ratios=()), r"ratios=\(\); allowed: numbers above 0, up to 1"),
        (
            lambda: methods.TextAttention(4, ratios=(0.5, 0.5)),
            r"keep=4, ratios=\(0.5, 0.5\); give one of keep, average",
        ),
        (lambda: methods.TextAttention(4, fuse=2, weights=("a", "b")), r"weights=\('a', 'b'\); allowed: 2 numbers"),
        (lambda: methods.TextAttention(4, weights=(float("nan"),)), r"weights=\(nan,\); allowed: 1 numbers"),
        (lambda: methods.PyramidDrop(4, layers=8), r"pyramiddrop: layers=8; allowed: ascending numbers from 1 on"),
        (lambda: methods.PyramidDrop(4, layers=()), r"layers=\(\); allowed: ascending"),
        (lambda: methods.PyramidDrop(4, layers=(0, 2)), r"layers=\(0, 2\); allowed: ascending numbers from 1 on"),
        (lambda: methods.PyramidDrop(4, layers=(4, 2)), r"layers=\(4, 2\); allowed: ascending"),
        (lambda: methods.PyramidDrop(4, layers=(2.0, 4.0)), r"layers=\(2.0, 4.0\); allowed: ascending"),
        (lambda: methods.PyramidDrop(4, layers="24"), r"layers='24'; allowed: ascending"),
        (lambda: methods.LVPruningTopK(4, scores=3), r"lvpruning-topk: scores=3; allowed: a callable"),
        (lambda: methods.TopK(4, criterion="norm"), r"topk: criterion='norm'; allowed: attention, similarity"),
        (lambda: methods.IVTPExtended(4, options="x"), r"ivtp-extended: options='x'; allowed: a dict of fields"),
        (lambda: methods.IVTPExtendedLate(4, sharpness=-1), r"late: sharpness=-1; allowed: a number of at least 0"),
        (lambda: methods.IVTPExtendedLate(4, sharpness=float("inf")), r"late: sharpness=inf; allowed: a number of at"),
        (lambda: methods.IVTPExtendedLate(4, sharpness=None), r"late: sharpness=None; allowed: a number of at least"),
        (lambda: methods.IVTP(4, options="x"), r"ivtp: options='x'; allowed: a dict of fields"),
        (lambda: methods.IVTP(4, options={"visual_tokens": 2}), r"allowed: a dict of fields .* other than enabled"),
        (lambda: methods.SparseVLM(published=100), r"sparsevlm: published=100; allowed: 192, 128, 64 or None"),
        (
            lambda: methods.SparseVLM(4, published=64),
            r"sparsevlm: keep=4, published=64; give one of keep, average, pub",
        ),
        (lambda: methods.SparseVLM(4, adaptive="no"), r"sparsevlm: adaptive='no'; allowed: True, False"),
        (lambda: methods.PruMergePlus(4, adaptive=2), r"prumerge\+: adaptive=2; allowed: True, False"),
        (lambda: methods.CDPruner(4, negated=None), r"cdpruner: negated=None; allowed: True, False"),
        (lambda: methods.HiPrune(4, alpha=2), r"hiprune: alpha=2; allowed: from 0 to 1"),
        (lambda: methods.HiPrune(4, object_layer=0), r"hiprune: object_layer=0; allowed: a whole number of at least 1"),
        (lambda: methods.HiPrune(4, wrap=None), r"hiprune: wrap=None; allowed: True, False"),
        (lambda: methods.VisPruner(4, important_ratio=-1), r"vispruner: important_ratio=-1; allowed: from 0 to 1"),
        (lambda: methods.PruneSID(4, keep_cls=1), r"prunesid: keep_cls=1; allowed: True, False"),
        (lambda: methods.VScan(4, tower_tokens=3), r"vscan: tower_tokens=3; allowed: a whole number of at least 4"),
        (lambda: methods.VScan(4, local_layer=0), r"vscan: local_layer=0; allowed: a whole number of at least 1"),
        (lambda: methods.VScan(4, local_ratio="a"), r"vscan: local_ratio='a'; allowed: from 0 to 1"),
        (lambda: methods.VScan(4, windows=0), r"vscan: windows=0; allowed: a whole number of at least 1"),
        (lambda: methods.TOPS(4, layers=(2,)), r"tops: layers=\(2,\); allowed: two numbers"),
        (lambda: methods.TOPS(4, diversity=None), r"tops: diversity=None; allowed: a number of at least 0"),
        (lambda: methods.TOPS(4, coverage=-1), r"tops: coverage=-1; allowed: a number of at least 0"),
        (lambda: methods.TOPS(4, normalization="max"), r"tops: normalization='max'; allowed: mean, minmax"),
        (lambda: methods.make(["fastv"], 4), r"Unknown method \['fastv'\]"),
        (lambda: methods.TopKPlus(4, tower_tokens=3), r"topk\+: tower_tokens=3; allowed: a whole number of at least 4"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (methods.FastV(4, layer=7), r"fastv: layer=7; allowed: 1 to 6, the layers of this decoder"),
        (methods.PyramidDrop(4, layers=(2, 7)), r"pyramiddrop: layers=\(2, 7\); allowed: 1 to 6"),
        (methods.TextAttention(4, layers=(2, 3), fuse=2), r"fuse=2 reaches below the drop"),
        (methods.TextAttention(ratios=(0.5,)), r"ratios=\(0.5,\); allowed: 2 of them, one for each drop"),
        (methods.SpatialPooling(7), r"keep=7 is no grid within 4 x 4 patches; nearest: 6, 8"),
        (methods.ToMePlus(1, tower_tokens=16, decoder_layers=3), r"16 tokens cannot become 1 in 3 layer"),
        (methods.HiPrune(4, object_layer=7), r"hiprune: object_layer=7; allowed: 1 to 6, the layers of this tower"),
        (methods.IVTPExtended(4, {"aggregation": "max"}), r"aggregation='max' with importance=\"accumulated\""),
        (methods.IVTPExtended(4, {"sharpness": -1}), r"sharpness=-1; allowed: a number of at least 0"),
        (methods.IVTPExtended(4, {"choice": "top", "sharpness": 1}), r"sharpness=1 with choice='top'"),
        (methods.VScan(4, layer=6), r"vscan: layer=6; allowed: 1 to 5, because the next layer of this decoder ranks"),
        (methods.VScan(4, local_layer=7), r"vscan: local_layer=7; allowed: 1 to 6, the layers of this tower"),
        (methods.TopKPlus(4, decoder_layers=7), r"topk\+: decoder_layers=7; the decoder has 6 layers"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(method, message, model):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message), method(model):
        pass
    assert snapshot(model) == before


@pytest.mark.slow
@EVERY
def test_an_average_over_layers_is_a_budget(name, llava):
    """The final number is the one whose schedule comes nearest to the average."""
    layers = llava.text_config.num_hidden_layers
    for average in (192, 300.5):
        options = {"tower_tokens": 500} if name in ("topk+", "tome+") else {}
        bound = methods.make(name, average=average, **options).bind(llava)
        plan = bound.plan(llava, 576)
        found = abs(plan.layer_average(layers) - average)
        for other in (plan.final_tokens - 1, plan.final_tokens + 1):
            try:
                near = methods.make(name, other, **options).bind(llava).plan(llava, 576)
            except ValueError:  # some numbers are no grid of cells
                continue
            assert found <= abs(near.layer_average(layers) - average)
        if not plan.decoder and name != "spatial_pooling":
            assert plan.final_tokens == round(average)


@EVERY
@torch.no_grad()
def test_the_average_is_that_of_what_layers_hold(name, model):
    plan = EXAMPLES[name].bind(model.config).plan(model.config, PATCHES)
    average = plan.layer_average(6)
    options = {field.name: getattr(EXAMPLES[name], field.name) for field in fields(EXAMPLES[name])}
    method = type(EXAMPLES[name])(**options | {"keep": None, "average": average})
    inputs, cache = prompt(ROWS[:1]), DynamicCache()
    length = inputs["input_ids"].shape[1] - PATCHES
    with method(model):
        assert model.model.plan() == plan
        model(**inputs, past_key_values=cache)
    if plan.exact:
        held = [layer.keys.shape[2] - length for layer in cache.layers]
        assert sum(held) / 6 == pytest.approx(average)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (methods.PyramidDrop(average=64), r"pyramiddrop: average=64 cannot be reached; allowed: at least \d+\.\d"),
        (methods.FastV(average=30), r"fastv: average=30 cannot be reached; allowed: at least 36\.9"),
        (methods.FastV(average=64, layer=40), r"fastv: layer=40; allowed: 1 to 32"),
    ],
)
def test_an_average_that_cannot_be_reached_is_an_error(method, message, llava):
    with pytest.raises(ValueError, match=message):
        method.plan(llava, 576)
    assert methods.FastV(average=576).plan(llava, 576) is None
    assert methods.FastV(average=1000).plan(llava, 576) is None


def test_composed_methods_may_have_average_budgets(model):
    with methods.DivPrune(average=9)(model), methods.FastV(average=6)(model):
        plan = model.model.plan()
    assert plan.features == 9
    assert plan.layer_average(6) == pytest.approx(6, abs=0.4)


DRAFTING = {"an assistant": {}, "prompt lookup": {"prompt_lookup_num_tokens": 3}}


@EVERY
@pytest.mark.parametrize("how", DRAFTING)
def test_what_an_assistant_proposes_does_not_choose(name, how, model):
    """The last token of the prompt, and its text, are the person's; candidates that stand after it have no say."""
    options = dict(DRAFTING[how])
    if not options:
        options["assistant_model"] = LlamaForCausalLM(model.config.text_config).eval()
        options["assistant_model"].generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False}
    for row in ([2, "image", 4, "image", 3], [3, "image"]):
        inputs = prompt([row])
        if row[-1] != "image":
            # A word again, so that there is something to look up; after an image it is image tokens.
            inputs["input_ids"][:, -1] = inputs["input_ids"][:, 0]
        with EXAMPLES[name](model):
            seen = []
            prepare = VisualSequence.keep

            def keep(self, kept, ragged=False, seen=seen, prepare=prepare):
                sequence, index = prepare(self, kept, ragged)
                seen.append(sequence.patches)
                return sequence, index

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(VisualSequence, "keep", keep)
                alone = model.generate(**inputs, **settings)
                plain, seen[:] = list(seen), []
                assisted = model.generate(**inputs, **settings, **options)
        assert torch.equal(alone, assisted)
        assert len(plain) == len(seen)
        assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))


def test_a_conversation_about_pictures_that_keep_different_numbers(model):
    inputs = prompt([["image", 3, "image", 4]], seed=21)
    method = methods.PruMergePlus(12, adaptive=True, neighbours=3)
    with method(model):
        counts = [len(one) for one in model.model.get_image_features(inputs["pixel_values"]).pooler_output]
        assert counts[0] > counts[1]
        cache = DynamicCache(config=model.config.text_config)
        first = {"input_ids": inputs["input_ids"][:, :19], "pixel_values": inputs["pixel_values"][:1]}
        model.generate(**first, past_key_values=cache, max_new_tokens=1)
        answer = model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("name", ["fastv", "topk", "divprune", "pyramiddrop"])
def test_a_stock_llava_under_accelerates_hooks(name, model, stock, tmp_path):
    inputs = without_clip(prompt(ROWS))
    with EXAMPLES[name](model):
        expected = model(**inputs).logits
    offloaded = copy.deepcopy(stock)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    dispatch_model(offloaded, places | {"model.language_model": "disk"}, offload_dir=str(tmp_path), force_hooks=True)
    unpruned = offloaded(**inputs).logits
    with EXAMPLES[name](offloaded):
        assert torch.equal(offloaded(**inputs).logits, expected)
    assert torch.equal(offloaded(**inputs).logits, unpruned)


def test_a_peft_model_is_pruned_inside(model):
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    inputs = prompt(ROWS)
    with methods.FastV(4)(model):
        expected = model(**inputs).logits
    with methods.FastV(4)(wrapped) as inside:
        assert inside is wrapped
        assert (wrapped(**inputs).logits - expected).abs().max() <= TOLERANCE


def test_the_models_own_options_have_no_say_inside(model):
    before = model.pruning_config
    with methods.FastV(4)(model):
        for change in (lambda: model.set_pruning(visual_tokens=8), lambda: model.pruning(enabled=False).__enter__()):
            with pytest.raises(ValueError, match=r"Another method prunes this model"):
                change()
    assert model.pruning_config == before
    with methods.FastV(PATCHES)(model), pytest.raises(ValueError, match="the method applied keeps all 16 patches"):
        model.explain(**prompt(ROWS[:1]))


def test_scores_of_another_shape_are_refused(model):
    method = methods.LVPruningTopK(4, scores=lambda layer, visual, hidden, text: visual.mean(-1)[..., :3])
    with method(model), pytest.raises(ValueError, match=r"scores returned \(1, 1, 3\); allowed: \(1, 1, 16\)"):
        model(**prompt(ROWS[:1]))


def test_numpys_whole_numbers_are_whole(model):
    assert methods.FastV(np.int64(4), layer=np.int32(2)) == methods.FastV(4, layer=2)


def test_what_the_towers_attention_cannot_weigh(model, monkeypatch):
    monkeypatch.setattr(model.config.vision_config, "_attn_implementation_internal", "flash_attention_2")
    with (
        pytest.raises(ValueError, match=r"tome weights attention in the tower.*allowed: eager, sdpa"),
        methods.ToMe(4)(model),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(model.config, "vision_feature_layer", [-2, -3])
    with pytest.raises(ValueError, match="cdpruner needs features of one layer"), methods.CDPruner(4)(model):
        pass
    monkeypatch.setattr(model.config, "vision_feature_select_strategy", "full")
    with pytest.raises(ValueError, match='pruning takes "default" only'), methods.FastV(4)(model):
        pass


def test_only_llavas_are_taken():
    message = "Linear is no LLaVA; allowed: LlavaForConditionalGeneration"
    with pytest.raises(ValueError, match=message), methods.FastV(4)(torch.nn.Linear(2, 2)):
        pass


@EVERY
def test_a_budget_of_all_keeps_all(name, model):
    options = {"tower_tokens": None} if name in ("topk+", "tome+") else {}
    with model.pruning(enabled=False), methods.make(name, PATCHES, **options)(model):
        inputs = prompt(ROWS[:1])
        logits = model(**inputs).logits
    with model.pruning(enabled=False):
        assert torch.equal(logits, model(**inputs).logits)


def test_the_documented_example_is_a_method(model):
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class " in block]
    names: dict = {}
    exec(example, names)
    with names["LargestNorm"](4)(model):
        trace = model.explain(**prompt(ROWS))
    assert trace.final_tokens == (4,) * 5
    table = page.partition("## The list")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(.*?)`", row)] == list(methods.METHODS)


@torch.no_grad()
def test_positions_can_be_renumbered(model):
    inputs = prompt(ROWS[:1])
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    with methods.DivPrune(4, positions="compact")(model):
        compact = model(**inputs).logits[:, -1]
        encoded = model.model.get_image_features(inputs["pixel_values"])
    embeds = model.get_input_embeddings()(ids)
    visual = ids[0] == model.config.image_token_id
    short = torch.cat([embeds[:, :3], encoded.pooler_output[0][None], embeds[:, length - 7 :]], 1)
    assert visual.sum() == PATCHES
    plain = model.lm_head(model.model.language_model(inputs_embeds=short).last_hidden_state)[:, -1]
    assert (compact - plain).abs().max() <= TOLERANCE
