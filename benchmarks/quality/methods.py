"""The rows of the quality benchmark: how each method chooses the visual tokens of the decoder.

IVTP and its ablations are options of the model; the systems it is compared with are those of `modeling_ivtp.methods`.
Choosers (chance, the attention of CLS, an oracle) choose once, before the decoder, among the features of a whole image.
The model then runs as if its vision tower had kept just these patches, so that positions, masks and cache are the same
code for every row.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.quality.world import Question, Scene, oracle_order
from benchmarks.quality.world.draws import Draws
from modeling_ivtp.methods import METHODS, make
from modeling_ivtp.methods.ivtp_extended import EXTENSION
from modeling_ivtp.model.outputs import IVTPImageFeatures
from modeling_ivtp.model.pruner import IVTPPruner, Needs, Pruner
from modeling_ivtp.model.rollout import reference_row
from modeling_ivtp.model.schedule import PruningPlan
from modeling_ivtp.model.vision_ivtp import PrunedVisionOutput

BUDGETS = (192, 128, 64, 32, 16)
CHOOSERS = ("random", "cls-topk", "cls-topk-all-layers", "oracle")
HANDED_OVER = (96, 192, 288)
"""Tokens that the tower hands over in the ablation of the hand-over; those below a budget are left out."""
HANDED_OVER_AT_64 = 120
"""Tokens that the tower hands over to a decoder that goes on to 64."""
COVERAGES = (0.9, 0.95, 0.99, 0.999, 0.9999)
"""Shares to cover in the rows in which every picture has a budget of its own."""
COMPACT = "compact"
"""The `table` of rows with renumbered positions, which are a column beside the other rows."""
ADAPTIVE = "a budget of its own"
"""The `table` of rows in which every picture has one."""
_RANDOM_PATCHES = 3


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes
    ----------
    method : str
    visual_tokens : int
        Visual tokens of one image in the last layers.
    options : mapping
        Pruning options on top of the checkpoint's own, or the options of the system.
    chooser : str
        One of `CHOOSERS`, which picks patches of the whole image; "": the model itself prunes.
    system : str
        Name of the system of `modeling_ivtp.methods` that prunes; "": the model's own options prune.
    blind : bool
        Show a grey image instead of the scene.
    table : str
        The paper's table to which the row belongs; "": the main comparison.
    """

    method: str
    visual_tokens: int
    options: Mapping[str, Any]
    chooser: str = ""
    system: str = ""
    blind: bool = False
    table: str = ""

    @property
    def key(self) -> str:
        """The name of the row in a file."""
        return f"{self.method}@{self.visual_tokens}"

    def pruning(self, config: Any) -> Any:
        """Return the pruning options in force: IVTPPruningConfig."""
        return config.pruning.changed(**self.options)

    def pruner(self, config: Any) -> Pruner:
        """Return the pruner of the row."""
        if self.system:
            return make(self.system, self.visual_tokens, **self.options).bind(config)
        return IVTPPruner(self.pruning(config))

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which a model prunes as the row says."""
        if self.system:
            return make(self.system, self.visual_tokens, **self.options)(model)
        return model.pruning(**self.options)

    def plan(self, config: Any) -> PruningPlan | None:
        """Return what each layer keeps; None where nothing is dropped.

        Raises
        ------
        ValueError
            If the options do not fit the model.
        """
        return self.pruner(config).plan(config, config.num_patches)


def main_rows(config: Any, budgets: Sequence[int] = BUDGETS) -> list[Row]:
    """List the main rows: no pruning, blind, and every method at every budget below the number of patches."""
    whole = config.num_patches
    off = {"enabled": False}
    rows = [Row("unpruned", whole, off), Row("blind", whole, off, blind=True)]
    for tokens in budgets:
        if tokens < whole:
            rows += [Row(name, tokens, _chosen(tokens), chooser=name) for name in CHOOSERS]
            rows.append(Row("ivtp", tokens, _ivtp(tokens)))
            rows.append(Row("ivtp-v", tokens, _ivtp(tokens, decoder_layers=0, guidance="visual_cls")))
    return rows


def variants(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """List systems with other options than their papers', where those do not suit a small model.

    CDPruner negates the similarity of patches and words, but the patches of the miniature's CLIP do match the words for
    what they show. FastV prunes after the second layer, where the miniature does not know yet what is asked.
    """
    unnegated = [(name, {"negated": False}) for name in ("cdpruner", "cen-cdpruner")]
    return [*unnegated, ("fastv", {"layer": config.text_config.num_hidden_layers // 2})]


def system_rows(config: Any, budgets: Sequence[int] = BUDGETS) -> tuple[list[Row], dict[str, str]]:
    """List every system of `modeling_ivtp.methods` at every budget; those in the main rows are the same rows.

    Returns
    -------
    rows : list of Row
    skipped : dict
        Rows that do not fit the model, each with the reason.
    """
    rows, skipped = [], {}
    main = {row.key: row for row in main_rows(config, budgets)}
    for tokens in budgets:
        if tokens >= config.num_patches:
            continue
        named: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in METHODS]
        for name, options in (*named, *variants(config)):
            label = " ".join([name, *(f"{option}={value}" for option, value in options.items())])
            row = main.get(f"{label}@{tokens}") or Row(label, tokens, options, system=name)
            try:
                row.plan(config)
            except ValueError as error:
                skipped[f"{label} at {tokens}"] = str(error)
            else:
                rows.append(row)
    return rows, skipped


def compact_rows(config: Any, budgets: Sequence[int] = BUDGETS) -> tuple[list[Row], dict[str, str]]:
    """List every method of `modeling_ivtp.methods` with kept tokens renumbered without gaps, at every budget.

    Most of the methods' own code renumbers. Without its positions a token no longer tells where it was.

    Returns
    -------
    rows : list of Row
    skipped : dict
        Rows that do not fit the model, each with the reason.
    """
    rows, skipped = [], {}
    for tokens in budgets:
        if tokens >= config.num_patches:
            continue
        for name in METHODS:
            row = Row(f"{name} positions=compact", tokens, {"positions": "compact"}, system=name, table=COMPACT)
            if name == "ivtp":
                row = replace(row, options=_ivtp(tokens, positions="compact"), system="")
            elif name in CHOOSERS:
                row = replace(row, options=_chosen(tokens) | {"positions": "compact"}, system="", chooser=name)
            try:
                row.plan(config)
            except ValueError as error:
                skipped[f"{row.method} at {tokens}"] = str(error)
            else:
                rows.append(row)
    return rows, skipped


def ablation_rows(config: Any, budgets: Sequence[int] = (64,)) -> tuple[list[Row], dict[str, str]]:
    """List the paper's Tables 4, 5, 6 and 8, the options it leaves open, and those beyond it, each at every budget.

    Returns
    -------
    rows : list of Row
    skipped : dict
        Settings that do not fit the model's layers, each with the reason.
    """
    settings: list[tuple[str, dict[str, Any]]] = [
        ("Table 4", {"aggregation": "last"}),
        ("Table 4", {"layers_per_group": 1}),
        ("Table 4", {"aggregation": "rollout"}),
        *(("Table 5", {"aggregation": how}) for how in ("mean", "max", "multiply")),
        *(("Table 6", {"guidance": guide}) for guide in ("visual_cls", "mean_text", "text_similarity", "clip")),
        *(("Table 8", {"layers_per_group": size}) for size in (2, 3, 4, 6, None)),
        *(("pseudo CLS", {"pseudo_cls": how}) for how in ("propagate", "pool")),
        *(("positions", {"positions": how}) for how in ("original", "compact")),
        *(("threshold", {"relevance_threshold": tau}) for tau in (0.0, 0.1, 0.2, 0.3, 0.4)),
        ("beyond the paper", {"importance": "accumulated"}),
        ("beyond the paper", {"choice": "diverse"}),
        # Without the question: CLS of the picture guides the decoder's stage.
        ("beyond the paper", {"guidance": "visual_cls", **EXTENSION}),
        *(("ahead of the decoder", {"decoder_choice": "ahead", **more}) for more in ({}, EXTENSION)),
        *(("hand-over", {"tower_tokens": number}) for number in HANDED_OVER if number < config.num_patches),
        *((ADAPTIVE, {"coverage": share, "min_visual_tokens": 1, **EXTENSION}) for share in COVERAGES),
        # What a budget of its own has to beat: as many tokens for every picture, after the same groups in the tower.
        (ADAPTIVE, {"tower_tokens": HANDED_OVER_AT_64, **EXTENSION}),
    ]
    rows, skipped = [], {}
    for tokens in budgets:
        if tokens >= config.num_patches:
            continue
        for table, options in settings:
            name, value = next(iter(options.items()))
            if name == "tower_tokens" and value < tokens:
                continue
            shown = "all" if value is None else value
            method = "ivtp-extended" if EXTENSION.items() <= options.items() else "ivtp"
            row = Row(f"{method} {name}={shown}", tokens, _ivtp(tokens, **options), table=table)
            try:
                row.plan(config)
            except ValueError as error:
                skipped[row.method] = str(error)
            else:
                rows.append(row)
    return rows, skipped


def _ivtp(tokens: int, **options: Any) -> dict[str, Any]:
    # Strict: a question that cannot guide is an error here, not a silently weaker method.
    return {"enabled": True, "visual_tokens": tokens, "tower_tokens": None, "strict": True} | options


def _chosen(tokens: int) -> dict[str, Any]:
    # The chosen patches are handed over to a decoder that drops nothing; the model itself chooses nothing.
    return {
        "enabled": True,
        "visual_tokens": tokens,
        "tower_tokens": None,
        "tower_layers": None,
        "layers_per_group": None,
        "decoder_layers": 0,
        "guidance": "visual_cls",
        "positions": "original",
    }


@dataclass(frozen=True)
class WholeImages:
    """Encoded images from which nothing was dropped.

    Attributes
    ----------
    features : Tensor (I, N, d)
        All patches, projected for the language model.
    cls_features : Tensor (I, d)
    cls_attention : float32 Tensor (L, I, N)
        How much CLS attends to each patch in each layer of the tower, averaged over heads.
    """

    features: torch.Tensor
    cls_features: torch.Tensor
    cls_attention: torch.Tensor

    def keep(self, order: torch.Tensor, tokens: int) -> IVTPImageFeatures:
        """Return the first `tokens` patches of an order (I, N), in spatial order, as the vision tower would."""
        kept = order[:, :tokens].sort(dim=1).values.to(self.features.device)
        features = self.features.gather(1, kept[..., None].expand(-1, -1, self.features.shape[-1]))
        return IVTPImageFeatures(pooler_output=list(features), kept_patches=kept, cls_features=self.cls_features)


@torch.no_grad()
def encode_whole(model: Any, pixel_values: torch.Tensor) -> WholeImages:
    """Encode images with all their patches, and note what CLS attends to in every layer.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
    pixel_values : Tensor (I, 3, height, width)
    """
    vision = _see(model, pixel_values, tuple(range(model.config.vision_config.num_hidden_layers)))
    features = model.model.multi_modal_projector(vision.features)
    rows = torch.stack([reference_row(record)[:, 0] for record in vision.records.values()])
    return WholeImages(features[:, 1:], features[:, 0], rows[..., 1:])


@torch.no_grad()
def see_whole(model: Any, pixel_values: torch.Tensor, needs: Needs) -> PrunedVisionOutput:
    """Run the tower on whole images, recording every layer that some method on the features needs.

    Methods that need the queries of all tokens have a pass of their own, because such records take longer.
    """
    if needs.all_queries:
        return _see(model, pixel_values, needs.recorded_layers, all_queries=True)
    bound = [make(name, 1).bind(model.config).needs for name in METHODS]
    recorded = {layer for other in bound if not other.all_queries for layer in other.recorded_layers}
    return _see(model, pixel_values, tuple(sorted(recorded)))


def unsealed(vision: PrunedVisionOutput) -> PrunedVisionOutput:
    """Return a copy with records of its own, because a method empties the records once it has chosen."""
    return replace(vision, records={layer: copy.copy(record) for layer, record in vision.records.items()})


def _see(
    model: Any, pixel_values: torch.Tensor, layers: tuple[int, ...], all_queries: bool = False
) -> PrunedVisionOutput:
    chosen = model.config.vision_feature_layer
    return model.model.vision_tower(
        pixel_values,
        pruner=_RecordingPruner(layers, all_queries),
        plan=PruningPlan(model.config.num_patches),
        feature_layers=[chosen] if isinstance(chosen, int) else chosen,
        to_the_top=False,
    )


@dataclass(frozen=True)
class _RecordingPruner(Pruner):
    """A pruner that drops nothing and records layers of the tower."""

    layers: tuple[int, ...]
    all_queries: bool = False

    @property
    def needs(self) -> Needs:
        """The records of these layers."""
        return Needs(recorded_layers=self.layers, all_queries=self.all_queries)


def last_group(config: Any) -> int:
    """Return how many layers the last group of a checkpoint's tower has, by the checkpoint's own options."""
    return config.pruning.layers_per_group or config.vision_config.num_hidden_layers


def patch_order(
    chooser: str,
    whole: WholeImages,
    asked: Sequence[tuple[Scene, Question]],
    places: Sequence[int],
    *,
    last_group: int,
    seed: int = 0,
) -> torch.Tensor:
    """Return the order in which a chooser keeps patches: int64 (I, N). Smaller budgets lie within larger ones.

    Parameters
    ----------
    chooser : str
        One of `CHOOSERS`. `random` draws evenly. `cls-topk` ranks by the attention of CLS, averaged over the layers of
        the tower's last group; `cls-topk-all-layers` averages over all layers. `oracle` knows where the objects are
        that a question needs.
    whole : WholeImages
    asked : sequence of (Scene, Question)
    places : sequence of int
        Numbers of the questions: random patches depend on them alone, not on batches.
    last_group : int
        Layers of the tower's last group.
    seed : int
        Seed of random patches.

    Raises
    ------
    ValueError
        For another chooser.
    """
    patches = whole.features.shape[1]
    if chooser == "random":
        return torch.tensor([Draws(_RANDOM_PATCHES, seed, place).shuffled(list(range(patches))) for place in places])
    if chooser in ("cls-topk", "cls-topk-all-layers"):
        layers = last_group if chooser == "cls-topk" else len(whole.cls_attention)
        return whole.cls_attention[-layers:].mean(0).sort(dim=1, descending=True, stable=True).indices
    if chooser == "oracle":
        return torch.stack([torch.from_numpy(oracle_order(scene, question)) for scene, question in asked])
    raise ValueError(f"chooser={chooser!r}; allowed: {', '.join(CHOOSERS)}.")
