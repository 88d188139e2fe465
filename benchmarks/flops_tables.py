"""The papers' FLOPs tables beside the FLOPs that this code executes: benchmarks/results/flops.md.

python -m benchmarks.flops_tables
"""

from pathlib import Path

from rich.progress import track

from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.flops import Count, count_named, load_shape

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

Other papers' figures, of which no table is made here:

- LVPruning's 8.38, 3.97, 3.18 and 2.79 (30 text tokens) leave out the products inside attention, as counters of modules
  do, and hold three decision modules of two blocks; ATP-LLaVA's 302.4, 75.6 and 46.2 MB are the visual tokens' keys and
  values alone, in half precision. `tests/flops/test_flops.py` has both rules.
"""


def beside(executed: float, printed: float, digits: int) -> str:
    """Format executed and printed TFLOPs, with the deviation."""
    return f"{executed:.{digits}f} / {printed:.{digits}f} ({executed / printed - 1:+.1%})"


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
            ]
        )
        + "\n"
    )
    print(OUT.read_text())


if __name__ == "__main__":
    main()
