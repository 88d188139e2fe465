"""The papers' FLOPs tables beside the FLOPs that this code executes: benchmarks/results/flops.md.

python -m benchmarks.flops_tables
"""

from pathlib import Path
from typing import Any

from rich.progress import track

from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.flops import Count, count, count_named, load_shape
from modeling_ivtp.flops.formula import head_flops, kv_cache_bytes, layer_flops, projector_flops
from modeling_ivtp.methods.method import groups_after
from modeling_ivtp.model.schedule import PruningPlan
from modeling_ivtp.trained import ATPLLaVA, LVPruning, SparseAttention
from modeling_ivtp.trained.adapter import describe_shape
from modeling_ivtp.trained.lvpruning import LAYERS, decision_flops

OUT = Path(__file__).parent / "results" / "flops.md"
LLAVA_7B, LLAVA_13B = "llava-1.5-7b", "llava-1.5-13b"
TEXT_TOKENS = (128, 256, 512, 1024)
TABLE_3 = {
    "unpruned": (9.9, 11.7, 15.4, 22.9),
    "topk": (2.7, 4.5, 8.0, 15.2),
    "tome": (2.7, 4.5, 8.0, 15.2),
    "c_abstractor": (2.9, 4.6, 8.1, 15.4),
    "resampler": (2.9, 4.6, 8.1, 15.3),
    "ivtp": (3.0, 4.7, 8.2, 15.5),
}
TABLE_9 = {"unpruned": 15.364, "topk": 7.962, "tome": 7.962, "resampler": 8.135, "ivtp": 8.228}
TABLES_1_AND_2 = {
    "unpruned": (15.4, 29.4),
    "random": (8.0, 15.4),
    "topk": (8.0, 15.4),
    "spatial_pooling": (8.1, 15.6),
    "evit": (8.0, 15.4),
    "tome": (8.0, 15.4),
    "c_abstractor": (8.1, 15.4),
    "context_attention": (8.2, 15.5),
    "resampler": (8.1, 15.4),
    "ivtp": (8.2, 15.6),
}
LVPRUNING = {None: 8.38, 0.6: 3.97, 0.5: 3.18, 0.45: 2.79}
"""Its Table 1, by ρ; None is LLaVA-1.5-7B."""
LVPRUNING_MODULES, LVPRUNING_TEXT = 0.71, 30
ATP = {
    576: ((), (), 9.6, 302.4),
    144: ((4, 14, 24), (126, 88, 20), 2.1, 75.6),
    88: ((1, 13, 25), (98, 79, 16), 1.5, 46.2),
}
"""ATP-LLaVA's Tables 2 and 6, by average tokens: layers before modules, tokens after them, TFLOPs and MB of cache."""
NOTES = """\
Deviations and their reasons:

- Table 3 is printed to a tenth, which at 128 text tokens is 3.6%: 2.76 would be printed as 2.8, 2.97 as 3.0.
- The paper leaves out the patch embedding and the projector and counts 23 of the tower's 24 layers; stock LLaVA in
  transformers runs all of them, which is 0.04 TFLOPs more. A pruned tower ends where nothing above it is needed.
- IVTP's text tower runs on whole windows: 512 text tokens are seven of them, 0.093 TFLOPs, where Table 9's 0.080 are
  six. Its scoring is 0.005.
- The connectors are Honeybee's (`c_abstractor`), LLaMA-VID's (`context_attention`, with seven windows of the question)
  and Qwen-VL's (`resampler`), at 64 tokens. Their tower ends at the features, after its 23rd layer.
- `random` chooses among finished features here, so its tower sees everything: 8.15. The paper's 8.0 means that patches
  were left out on the way.
- `topk` and `tome` go down in equal steps; the paper gives 0.190 for their tower and no schedule.

"""
TRAINED_NOTES = """\
- LVPruning's figures leave out the products inside attention, as counters of modules do, and hold all 24 layers of the
  tower and three decision modules of two blocks. What runs is a little more.
- ATP-LLaVA's Eq. 15 counts a decoder layer as 4Ld² + 2L²d + 2Ldm: products count once, and the network has two
  matrices. Over 32 layers and 576 tokens that is 2.99 TFLOPs. For its table's 9.6 the paper does not name the prompt.
  So shares of the unpruned figure are compared: by Eq. 16 with the tokens of its Table 2, and as Table 6 prints them.
  Table 6 saves more than that at 144 tokens and less at 88, so its figures do not come from Eq. 16 and Table 2.
- Its cache sizes are the visual tokens' keys and values alone, in half precision.
- `sparse-attention` and `atp-llava` have no printed figure of their own in this form. `atp-llava` is counted here with
  the tokens of its Table 2 as fixed ratios, with its thresholds' modules.
"""


def beside(executed: float, printed: float, digits: int) -> str:
    """Format executed and printed TFLOPs, with the deviation."""
    return f"{executed:.{digits}f} / {printed:.{digits}f} ({executed / printed - 1:+.1%})"


def by_lvprunings_rule(config: Any, ratio: float | None) -> float:
    """Count LLaVA-1.5-7B under LVPruning as its paper does, in TFLOPs; None: without pruning."""
    text, vision = config.text_config, config.vision_config
    method = LVPruning(ratio=ratio or 1.0, base=describe_shape(config))
    counts = [] if ratio is None else [round(576 * share) for share in method.shares(576, len(LAYERS))]
    plan = PruningPlan(576, decoder=groups_after(tuple(layer - 1 for layer in LAYERS[: len(counts)]), counts))
    width, total = text.hidden_size, 0.0
    for tokens in plan.decoder_layer_tokens(text.num_hidden_layers):
        total += layer_flops(LVPRUNING_TEXT + tokens, width, text.intermediate_size, matrices=3, products=False)
    total += vision.num_hidden_layers * layer_flops(
        577, vision.hidden_size, vision.intermediate_size, matrices=2, products=False
    )
    total += projector_flops(config, 576) + head_flops(config, LVPRUNING_TEXT + (counts or [576])[-1])
    total += sum(
        decision_flops(width, tokens, LVPRUNING_TEXT, products=False) for tokens in [576, *counts][: len(counts)]
    )
    return total / 1e12


def share_by_eq_16(config: Any, layers: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """Return the share of the decoder's FLOPs that ATP-LLaVA's Eq. 15 and 16 leave."""
    width, inner, depth = config.text_config.hidden_size, config.text_config.intermediate_size, 32

    def layer(length: int) -> int:
        return 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * inner

    counts, left = PruningPlan(576, decoder=groups_after([top - 1 for top in layers], tokens)), 0
    for length in counts.decoder_layer_tokens(depth):
        left += layer(length)
    return left / (depth * layer(576))


def trained_tables(config: Any) -> list[str]:
    """Return the tables of trained pruners on LLaVA-1.5-7B."""
    base, text = describe_shape(config), LVPRUNING_TEXT
    lvpruning = []
    for ratio, printed in LVPRUNING.items():
        method = None if ratio is None else LVPruning(ratio=ratio, base=base)
        found = (
            count_named(config, "unpruned", 576, text_tokens=text)
            if method is None
            else count(config, method, text_tokens=text)
        )
        modules = found.parts["scoring"]
        name = "unpruned" if ratio is None else f"lvpruning, ρ = {ratio}"
        rule = beside(by_lvprunings_rule(config, ratio), printed, 2)
        lvpruning.append([name, f"{found.total_tflops:.2f}", f"{modules:.2f}", rule])
    whole = 3 * decision_flops(4096, 576, text, products=False) / 1e12
    lvpruning.append(["three modules on 576 tokens", f"{3 * decision_flops(4096, 576, text) / 1e12:.2f}", "",
                      beside(whole, LVPRUNING_MODULES, 2)])  # fmt: skip
    atp, unpruned = [], count_named(config, "unpruned", 576, text_tokens=text).total_tflops
    for average, (layers, tokens, tflops, megabytes) in ATP.items():
        found = unpruned
        if layers:
            ratios = tuple(after / before for before, after in zip((576, *tokens), tokens, strict=False))
            fixed = ATPLLaVA(ratios=ratios, layers=layers, base=base)
            thresholds = len(layers) * ATPLLaVA(base=base).module_flops(1, 1) / 1e12
            found = count(config, fixed, text_tokens=text).total_tflops + thresholds
        share = share_by_eq_16(config, layers, tokens)
        bytes_ = sum(kv_cache_bytes(config, [average] * 32, 2)) / 1e6
        atp.append([str(average), f"{found:.2f}", beside(share, tflops / ATP[576][2], 3), beside(bytes_, megabytes, 1)])
    sparse = [
        [name, f"{found.total_tflops:.2f}", f"{found.parts['scoring']:.3f}"]
        for name, options in (("8 and 16 of 32", {}), ("8 of 32", {"layers": (8,)}), ("vision", {"readers": "vision"}))
        for found in [count(config, SparseAttention(64, base=base, **options), text_tokens=512)]
    ]  # fmt: skip
    return [
        "## Trained pruners on LLaVA-1.5-7B",
        f"LVPruning at {text} text tokens: TFLOPs executed, those of its modules, and by its own counting rule / "
        "printed (deviation).",
        markdown_table(["method", "executed", "modules", "by its rule / printed"], lvpruning),
        f"ATP-LLaVA by average tokens: TFLOPs executed at {text} text tokens, share of the unpruned decoder by Eq. 16 "
        "/ by its Table 6, MB of cache / printed.",
        markdown_table(["tokens", "executed", "share", "cache, MB"], atp),
        "`sparse-attention` at 64 tokens and 512 text tokens: TFLOPs executed, and those of its scores.",
        markdown_table(["drops, or readers", "executed", "scores"], sparse),
        TRAINED_NOTES,
    ]


def main() -> None:
    """Count everything and write the page."""
    large, small = load_shape(LLAVA_13B), load_shape(LLAVA_7B)
    wanted = {(LLAVA_7B, name, text) for name in TABLE_3 for text in TEXT_TOKENS}
    wanted |= {(shape, name, 512) for name in TABLES_1_AND_2 for shape in (LLAVA_7B, LLAVA_13B)}
    counts: dict[tuple[str, str, int], Count] = {}
    for shape, name, text in track(sorted(wanted), description="counting"):
        counts[shape, name, text] = count_named(small if shape == LLAVA_7B else large, name, 64, text_tokens=text)

    def total(name: str, shape: str = LLAVA_7B, text: int = 512) -> float:
        return counts[shape, name, text].total_tflops

    third = [
        [
            name,
            *(beside(total(name, text=text), value, 2) for text, value in zip(TEXT_TOKENS, printed, strict=True)),
        ]
        for name, printed in TABLE_3.items()
    ]
    ninth = []
    for name, printed in TABLE_9.items():
        parts = counts[LLAVA_7B, name, 512].parts
        tower, language = parts["tower"] + parts["projector"], parts["decoder"] + parts["head"]
        extra = parts["connector"] + parts["text_tower"] + parts["scoring"] + parts["selection"]
        ninth.append([name, f"{tower:.3f}", f"{language:.3f}", f"{extra:.3f}", beside(total(name), printed, 3)])
    both = [
        [name, beside(total(name), seven, 2), beside(total(name, LLAVA_13B), thirteen, 2)]
        for name, (seven, thirteen) in TABLES_1_AND_2.items()
    ]
    OUT.write_text(
        "\n\n".join(
            part.rstrip("\n")
            for part in [
                "# FLOPs of the papers' tables",
                "TFLOPs of one image at 64 of 576 visual tokens and its prompt, executed here / printed in IVTP's "
                "paper (deviation). Executed: the model itself on tensors without data; written by "
                "`python -m benchmarks.flops_tables`.",
                "## Table 3: LLaVA-1.5-7B by text tokens",
                markdown_table(["method", "128", "256", "512", "1024"], third),
                "## Table 9: by part, at 512 text tokens",
                markdown_table(
                    ["method", "tower and projector", "decoder and head", "text tower and scoring", "all"], ninth
                ),
                "## Tables 1 and 2: at 512 text tokens",
                markdown_table(["method", "7B", "13B"], both),
                NOTES,
                *trained_tables(small),
            ]
        )
        + "\n"
    )
    print(OUT.read_text())


if __name__ == "__main__":
    main()
