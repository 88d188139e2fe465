"""FLOPs of a configuration, counted and by formula, against the papers' tables."""

import json

import pytest

from benchmarks import flops_tables
from modeling_ivtp import cli, methods
from modeling_ivtp.flops import count, count_named, load_shape, shape_names
from modeling_ivtp.flops.formula import (
    decoder_flops,
    head_flops,
    kv_cache_bytes,
    layer_flops,
    projector_flops,
    text_tower_flops,
    tower_flops,
)
from modeling_ivtp.model.schedule import Group, PruningPlan
from modeling_ivtp.trained import ATPLLaVA, LVPruning
from modeling_ivtp.trained.adapter import describe_base
from modeling_ivtp.trained.lvpruning import DecisionModule, decision_flops
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def llava():
    return load_shape("llava-1.5-7b")


TABLE_3 = {
    "unpruned": [9.9, 11.7, 15.4, 22.9],
    "topk": [2.7, 4.5, 8.0, 15.2],
    "tome": [2.7, 4.5, 8.0, 15.2],
    "ivtp": [3.0, 4.7, 8.2, 15.5],
}
"""IVTP's Table 3: TFLOPs of LLaVA-1.5-7B at 128, 256, 512 and 1024 text tokens, printed to a tenth."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_3)
def test_table_3_is_what_the_model_executes(name, llava):
    for text, printed in zip((128, 256, 512, 1024), TABLE_3[name], strict=True):
        executed = count_named(llava, name, 64, text_tokens=text).total_tflops
        assert abs(executed - printed) <= max(0.01 * printed, 0.05 + 0.01 * printed), (text, executed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "printed"), [("unpruned", 15.364), ("topk", 7.962), ("tome", 7.962), ("ivtp", 8.228)])
def test_totals_of_table_9_are_within_a_percent(name, printed, llava):
    assert count_named(llava, name, 64, text_tokens=512).total_tflops == pytest.approx(printed, rel=0.01)


def test_parts_of_table_9_follow_from_the_papers_rule(llava):
    plan, layers = llava.pruning_plan(), llava.feature_depth
    assert tower_flops(llava, PruningPlan(576), layers) / 1e12 == pytest.approx(0.361, rel=0.015)
    assert tower_flops(llava, plan, layers) / 1e12 == pytest.approx(0.202, rel=0.01)
    language = decoder_flops(llava, 512, (576,) * 32) + head_flops(llava, 512 + 576)
    assert language / 1e12 == pytest.approx(15.003, rel=0.001)
    language = decoder_flops(llava, 512, (64,) * 32) + head_flops(llava, 512 + 64)
    assert language / 1e12 == pytest.approx(7.772, rel=0.002)
    language = decoder_flops(llava, 512, plan.decoder_layer_tokens(32)) + head_flops(llava, 512 + 64)
    assert language / 1e12 == pytest.approx(7.946, rel=0.001)
    assert text_tower_flops(llava, 6) / 1e12 == pytest.approx(0.080, rel=0.01)  # 0.080 are six windows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed"), [("unpruned", 29.4), ("random", 15.4), ("topk", 15.4), ("tome", 15.4), ("evit", 15.4),
                          ("spatial_pooling", 15.6), ("ivtp", 15.6)]
)  # fmt: skip
def test_table_2_is_what_the_larger_model_executes(name, printed):
    executed = count_named(load_shape("llava-1.5-13b"), name, 64, text_tokens=512).total_tflops
    # Printed to a tenth, so half a tenth may have been rounded away.
    assert abs(executed - printed) <= 0.01 * printed + 0.05


CONNECTORS = {"c_abstractor": (8.1, 15.4), "context_attention": (8.2, 15.5), "resampler": (8.135, 15.4)}
"""Totals of Honeybee, LLaMA-VID and Qwen-VL at 512 text tokens, of 7B (Tables 1 and 9) and 13B (Table 2)."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONNECTORS)
def test_totals_of_the_connectors_are_as_printed(name, llava):
    for shape, printed in zip((llava, load_shape("llava-1.5-13b")), CONNECTORS[name], strict=True):
        found = count_named(shape, name, 64, text_tokens=512)
        assert abs(found.total_tflops - printed) <= 0.01 * printed + (0.05 if shape is not llava else 0)
        assert found.formula == pytest.approx(found.parts, rel=1e-9)
        assert set(found.layer_tokens) == {64}


@pytest.mark.slow
def test_the_resampler_costs_the_extra_of_table_9(llava):
    assert round(count_named(llava, "resampler", 64, text_tokens=512).parts["connector"], 3) == 0.003


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connectors_formula_is_exact_and_no_method_prunes_its_tokens(name):
    tokens = 5 if name == "context_attention" else 4
    config = tiny_config(enabled=False, connector={"name": name, "tokens": tokens})
    found = count(config, text_tokens=9)
    assert found.formula == pytest.approx(found.parts, rel=1e-9)
    assert found.parts["connector"] > 0
    assert count_named(tiny_config(), name, tokens, text_tokens=9).parts == found.parts
    with pytest.raises(ValueError, match="chooses among patches"):
        count(config, methods.FastV(4), text_tokens=9)


@pytest.mark.slow
@pytest.mark.parametrize("text", [128, 512, 1024])
@pytest.mark.parametrize("name", ["unpruned", *methods.METHODS])
def test_executed_and_formula_agree_within_half_a_percent(name, text, llava):
    found = count_named(llava, name, 64, text_tokens=text)
    assert found.formula_tflops == pytest.approx(found.total_tflops, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ivtp", "ivtp-extended", "ivtp-extended-flat"])
def test_ivtps_formula_is_exact(llava, name):
    for text in (64, 700):
        found = count_named(llava, name, 32, text_tokens=text)
        assert found.formula == pytest.approx(found.parts, rel=1e-9)


def test_a_diverse_choice_is_counted_and_nothing_else_changes():
    """By hand: all pairs of vectors, and for each pick the products of its row with those before."""
    config = tiny_config()
    plain = count(config, text_tokens=5)
    config.pruning = config.pruning.changed(importance="accumulated", choice="diverse")
    diverse = count(config, text_tokens=5)
    steps = [(16, 13), (13, 11), (11, 9), (9, 6), (6, 4)]
    by_hand = sum(2 * tokens**2 * 32 + keep**2 * tokens for tokens, keep in steps)
    assert diverse.parts["selection"] * 1e12 == pytest.approx(by_hand)
    assert diverse.parts | {"selection": 0.0} == plain.parts
    assert count(config, methods.CDPruner(4), text_tokens=5).parts["selection"] * 1e12 == 2 * 16**2 * 32 + 16 * 16
    assert count(config, methods.DivPrune(4), text_tokens=5).parts["selection"] * 1e12 == 2 * 4 * 16
    assert count(config, methods.FastV(4), text_tokens=5).parts["selection"] == 0


def test_an_instruction_takes_as_many_windows_as_it_fills():
    """A window holds the context less its start and end token: 10 of 12 here."""
    config = tiny_config()
    one = count(config, text_tokens=30, instruction_tokens=1)
    for tokens, windows in ((10, 1), (11, 2), (20, 2), (21, 3)):
        found = count(config, text_tokens=30, instruction_tokens=tokens)
        for parts, single in ((found.parts, one.parts), (found.formula, one.formula)):
            assert parts["text_tower"] == pytest.approx(windows * single["text_tower"])
            assert parts | {"text_tower": 0.0} == single | {"text_tower": 0.0}
    # Without a number of its own, an instruction is as long as the text.
    assert count(config, text_tokens=11) == count(config, text_tokens=11, instruction_tokens=11)
    assert one.parts["text_tower"] > 0


def test_late_costs_what_divprune_costs_in_the_model(llava):
    late, other = (count_named(llava, name, 64, text_tokens=64).parts for name in ("ivtp-extended-late", "divprune"))
    assert (late["tower"], late["decoder"]) == (other["tower"], other["decoder"])
    assert late["projector"] < other["projector"]  # DivPrune looks at projected features
    assert late["scoring"] + late["selection"] < other["scoring"] + other["selection"]


LVPRUNING = {None: 8.38, 0.6: 3.97, 0.5: 3.18, 0.45: 2.79}
"""LVPruning's Table 1 at 30 text tokens, by the first kept ratio."""


@pytest.mark.parametrize("ratio", LVPRUNING)
def test_lvprunings_figures_leave_out_the_products_of_attention(ratio, llava):
    """Its counting rule, found out: modules' products alone (no queries with keys, no weights with values), all 24
    layers of the tower, projector, head; and three decision modules of two blocks, each with queries, keys, values and
    an output of the decoder's width and an MLP of twice that."""
    text, width, inner = 30, 4096, 11008
    kept = [576] if ratio is None else [576, *(int(round(576 * (ratio - 0.2 * step), 6)) for step in range(3))]
    visual = [kept[sum(layer >= top for top in (1, 8, 16)) if ratio else 0] for layer in range(32)]
    total = sum(layer_flops(text + tokens, width, inner, matrices=3, products=False) for tokens in visual)
    total += 24 * layer_flops(577, 1024, 4096, matrices=2, products=False)
    total += projector_flops(llava, 576) + head_flops(llava, text + visual[-1])
    total += sum(decision_flops(width, tokens, text, products=False) for tokens in kept[:-1])
    assert total / 1e12 == pytest.approx(LVPRUNING[ratio], rel=0.01)


def test_a_decision_module_computes_what_is_counted_and_its_size_is_the_papers(llava):
    """Appendix B: the modules add 0.71 TFLOPs. That are three of them on all 576 tokens and 30 of text, without the
    attention's products; without an output projection it would be 0.59."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = DecisionModule(4096, 8, 2)
        inputs = torch.empty(1, 576, 4096), torch.empty(1, 30, 4096), torch.ones(1, 30, dtype=torch.bool)
    with FlopCounterMode(display=False) as mode:
        module(*inputs)
    assert mode.get_total_flops() == decision_flops(4096, 576, 30)
    assert 3 * sum(weight.numel() for weight in module.parameters()) / 1e9 == pytest.approx(0.8, rel=0.02)
    assert 3 * decision_flops(4096, 576, 30, products=False) / 1e12 == pytest.approx(0.71, rel=0.01)
    assert (3 * decision_flops(4096, 576, 30, products=False) - 3 * 2 * 2 * 576 * 4096**2) / 1e12 < 0.6


def test_trained_methods_are_counted_with_their_modules(llava):
    """The base of LLaVA-1.5-7B without its weights."""
    base = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "patches": 576, "model_type": "llama",
    }  # fmt: skip
    for method in (LVPruning(ratio=0.5, base=base), ATPLLaVA(ratios=(0.24, 0.5, 0.5), base=base)):
        found = count(llava, method, text_tokens=64)
        assert found.formula_tflops == pytest.approx(found.total_tflops, rel=0.005)
        assert found.parts["scoring"] > 0
    assert found.layer_tokens[-1] == 34
    modules = count(llava, LVPruning(ratio=0.5, base=base), text_tokens=30).parts["scoring"]
    assert modules == pytest.approx(sum(decision_flops(4096, n, 30) for n in (576, 288, 173)) / 1e12)


@pytest.mark.slow
def test_the_folder_of_a_trained_pruner_is_counted(tmp_path, capsys, monkeypatch):
    """By `ivtp flops`, at its saved budget or another; of another shape it is refused."""
    from tests.support.tiny import tiny_model
    from tests.support.trained import ready

    model, folder = tiny_model(), tmp_path / "pruner"
    model.save_pretrained(tmp_path / "model")
    method = ready(LVPruning(ratio=0.6), model)
    method.save(folder)
    found = count_named(model.config, str(folder), None, text_tokens=10)
    assert found == count(model.config, method, text_tokens=10)
    assert found.parts["scoring"] > 0
    assert count_named(model.config, str(folder), 5, text_tokens=10).layer_tokens[-1] == 5
    monkeypatch.chdir(tmp_path)  # a long path would be cut off in the table
    arguments = ["flops", "--model", "model", "--method", "pruner", "--text-tokens", "10"]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["visual_tokens"] == told["final_tokens"] == found.layer_tokens[-1]
    assert cli.main([*arguments, "--sweep", "--method", "unpruned", "--visual-tokens", "5"]) == 0
    assert "pruner" in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["flops", "--preset", "llava-1.5-7b", "--method", str(folder)]) == 1
    assert "this model has hidden_size=4096; allowed: 32" in capsys.readouterr().err


def test_what_the_page_says_of_trained_pruners_is_near_what_is_printed(llava):
    for ratio, printed in flops_tables.LVPRUNING.items():
        assert flops_tables.by_lvprunings_rule(llava, ratio) == pytest.approx(printed, rel=0.01)
    # Eq. 15 by hand, for 576 tokens in all layers and for ATP-LLaVA's own counts.
    layer = {n: 4 * n * 4096**2 + 2 * n**2 * 4096 + 2 * n * 4096 * 11008 for n in (576, 126, 88, 20)}
    left = 4 * layer[576] + 10 * layer[126] + 10 * layer[88] + 8 * layer[20]
    share = flops_tables.share_by_eq_16(llava, (4, 14, 24), (126, 88, 20))
    assert share == pytest.approx(left / (32 * layer[576]))
    assert 32 * layer[576] / 1e12 == pytest.approx(2.99, rel=0.002)


def test_a_threshold_module_and_its_scores_compute_what_is_counted():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.support.tiny import prompt, tiny_model

    model, counted = tiny_model(), []

    class Counted(ATPLLaVA):
        def in_decoder(self, step):
            with FlopCounterMode(display=False) as mode:
                choice = super().in_decoder(step)
            counted.append((mode.get_total_flops(), step.sequence.patches.shape[2]))
            return choice

    method = Counted(target=8, rope="1d").for_model(model)
    with method(model), torch.no_grad():
        model(**prompt([["image", 40]]))
    for found, visual in counted:
        assert method.module_flops(visual, 40) == pytest.approx(found, rel=0.05)
    assert describe_base(model)["patches"] == 16


def test_atp_llavas_average_is_that_of_its_table():
    """Table 2: 126, 88 and 20 tokens before layers 4, 14 and 24 are 144 on average; its Eq. 16 saves that share."""
    plan = PruningPlan(576, decoder=tuple(Group(top - 1, top - 1, n) for top, n in ((4, 126), (14, 88), (24, 20))))
    assert plan.layer_average(32) == (4 * 576 + 10 * 126 + 10 * 88 + 8 * 20) / 32 == 143.875


def test_atp_llavas_cache_is_that_of_the_visual_tokens_alone(llava):
    """302.4, 75.6 and 46.2 MB: half-precision keys and values of 576, 144 and 88 visual tokens, 0.525 MB each."""
    for tokens, megabytes in ((576, 302.4), (144, 75.6), (88, 46.2)):
        assert sum(kv_cache_bytes(llava, [tokens] * 32, 2)) / 1e6 == pytest.approx(megabytes, rel=0.002)


def test_the_counted_cache_is_the_cache_of_the_model():
    import torch
    from transformers import DynamicCache

    from tests.support.tiny import prompt, tiny_model

    model = tiny_model()
    cache = DynamicCache()
    with torch.no_grad():
        model(**prompt([[1, "image", 9]]), past_key_values=cache)
    found = count(model.config, text_tokens=10, value_bytes=4)
    assert found.kv_cache_bytes_per_layer == tuple(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_counting_leaves_the_configuration_as_it_was():
    config = tiny_config()
    before = config.to_dict()
    count(config, methods.FastV(4), text_tokens=5)
    count_named(config, "unpruned", 16, text_tokens=5)
    assert config.to_dict() == before


@pytest.mark.slow
def test_the_command_prints_json_and_tables(capsys):
    arguments = ["flops", "--preset", "llava-1.5-7b", "--text-tokens", "512", "--visual-tokens", "64"]
    assert cli.main([*arguments, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["total_tflops"] == pytest.approx(8.228, rel=0.01)
    assert sum(counts["parts"].values()) == pytest.approx(counts["total_tflops"])
    assert counts["final_tokens"] == 64
    assert counts["kv_cache_bytes"] == sum(counts["kv_cache_bytes_per_layer"])
    assert cli.main(arguments) == 0
    assert "text tower" in capsys.readouterr().out
    several = ["--sweep", "--text-tokens", "128", "--method", "ivtp", "--method", "unpruned"]
    assert cli.main([*arguments, *several]) == 0
    table = capsys.readouterr().out
    assert "unpruned" in table
    assert "128 text" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "flops needs one of --preset and --model"),
        (["--preset", "llava-9b"], f"Unknown shape 'llava-9b'; allowed: {', '.join(shape_names())}"),
        (["--preset", "llava-1.5-7b", "--method", "fastw"], "Unknown method 'fastw'; allowed: unpruned, c_abstractor"),
        (["--preset", "llava-1.5-7b", "--dtype", "int8"], "--dtype=int8; allowed: float16, bfloat16, float32"),
        (["--preset", "llava-1.5-7b", "--text-tokens", "1"], "text_tokens=1; allowed: at least 2"),
        (["--preset", "llava-1.5-7b", "--text-tokens", "9", "--text-tokens", "8"], "add --sweep"),
        (["--preset", "llava-1.5-7b", "--visual-tokens", "0"], "'0'; allowed: greater than or equal to 1"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_line(arguments, message, capsys):
    assert cli.main(["flops", *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
