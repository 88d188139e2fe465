"""Connectors: trained modules that make fewer tokens of an image's patches before LLaVA's projector.

They are the rivals of IVTP's Tables 1 to 3 that bring a module of their own: the C-Abstractor of Honeybee (Sec. 3.2 of
its paper), the context attention of LLaMA-VID (Sec. 3.1) and the resampler of Qwen-VL (Sec. 2.1).

Shapes: I images, N patches on a grid of rows x columns, D the features' width, d the language model's, M tokens.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization
from transformers.utils import logging

from .connector_options import ConnectorConfig, feature_width, resampler_heads
from .placeholders import features_of_image
from .prompt import PromptInputs, instruction_windows, window_ends

logger = logging.get_logger(__name__)

_STD = 0.02
"""Standard deviation of learned positions and queries at the start."""


@dataclass(frozen=True)
class Question:
    """The question that belongs to each image, in CLIP's tokens.

    Attributes
    ----------
    features : Tensor (I, T, P)
        Features of its tokens from CLIP's text tower, projected (IVTP Eq. 5).
    present : bool Tensor (I, T)
        Which of them are words or the end of the text.
    """

    features: torch.Tensor
    present: torch.Tensor


class Bottleneck(nn.Module):
    """A residual block of RegNet's kind: 1 x 1, 3 x 3 for each channel, squeeze and excitation, 1 x 1.

    Parameters
    ----------
    width : int
        Channels, D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.reduce_norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-6)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.spatial_norm = nn.LayerNorm(width, eps=1e-6)
        squeezed = max(1, round(width / 4))
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.expand, self.expand_norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=1e-6)
        self.act = nn.SiLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Run the block on features (I, rows, columns, D)."""
        hidden = functional.silu(self.reduce_norm(self.reduce(features)))
        hidden = self.spatial(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = functional.silu(self.spatial_norm(hidden))
        gate = self.excite(functional.silu(self.squeeze(hidden.mean((1, 2), keepdim=True))))
        hidden = self.expand_norm(self.expand(hidden * gate.sigmoid()))
        return self.act(hidden + features)


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: convolutions, pooling to a smaller grid, convolutions.

    With `depth=0` and without positions it is average pooling. Its width is that of the features.

    Parameters
    ----------
    config : IVTPLlavaConfig
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        options: ConnectorConfig = config.connector
        width, depth = feature_width(config), options.depth or 0
        self.patch_grid, self.grid = config.grid, options.grid
        self.positions = nn.Parameter(torch.empty(1, config.num_patches, width)) if options.positions else None
        self.before = nn.Sequential(*(Bottleneck(width) for _ in range(depth)))
        self.after = nn.Sequential(*(Bottleneck(width) for _ in range(depth)))

    def start(self) -> None:
        """Draw the positions."""
        if self.positions is not None:
            initialization.trunc_normal_(self.positions, std=_STD)

    def forward(
        self, features: torch.Tensor, question: Question | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Make tokens of the features of patches.

        Parameters
        ----------
        features : Tensor (I, N, D)
        question : Question, optional
            Not used.

        Returns
        -------
        None
        tokens : Tensor (I, M, D)
            For LLaVA's projector.
        """
        if self.positions is not None:
            features = features + self.positions
        grid = self.before(features.unflatten(1, self.patch_grid))
        return None, self.after(pooled(grid, self.grid)).flatten(1, 2)


class ContextAttention(nn.Module):
    """LLaMA-VID's context attention: one token of what the question attends to, then the pooled image.

    The queries are CLIP's features of the question's words, where the published model has a Q-Former. Without a
    question all patches have the same weight, which is what a query of zeros gives.

    Parameters
    ----------
    config : IVTPLlavaConfig
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        options: ConnectorConfig = config.connector
        width = feature_width(config)
        self.patch_grid, self.grid, self.strict = config.grid, options.grid, options.strict
        self.query = nn.Linear(config.clip_text_config.projection_dim, width)
        self.key = nn.Linear(width, width)
        self.project_context = nn.Linear(width, config.text_config.hidden_size)

    def start(self) -> None:
        """Draw nothing: all weights are those of layers that the model knows."""

    def forward(
        self, features: torch.Tensor, question: Question | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Make tokens of the features of patches.

        Parameters
        ----------
        features : Tensor (I, N, D)
        question : Question, optional
            None: the question is missing; warned of once, or refused under `strict`.

        Returns
        -------
        context : Tensor (I, 1, d)
            In the language model's width; it stands before the others.
        content : Tensor (I, M - 1, D)
            For LLaVA's projector.

        Raises
        ------
        ValueError
            Under `strict`, without a question.
        """
        content = pooled(features.unflatten(1, self.patch_grid), self.grid).flatten(1, 2)
        return self.project_context(self.weights(features, question) @ features), content

    def weights(self, features: torch.Tensor, question: Question | None) -> torch.Tensor:
        """Return what the question attends to, the mean over its words: (I, 1, N), rows that sum to one."""
        if question is None:
            _miss_question(self.strict)
            return features.new_full((features.shape[0], 1, features.shape[1]), 1 / features.shape[1])
        words, present = question.features.to(features), question.present.to(features.device)
        scores = self.query(words) @ self.key(features).transpose(1, 2) / features.shape[-1] ** 0.5
        attention = scores.softmax(-1, dtype=torch.float32)
        # A row that asks nothing attends to all patches alike.
        attention = torch.where(present.any(1)[:, None, None], attention, 1 / features.shape[1])
        present = present | ~present.any(1, keepdim=True)
        total = (attention * present[..., None]).sum(1, keepdim=True)
        return (total / present.sum(1)[:, None, None]).to(features.dtype)


class Resampler(nn.Module):
    """Qwen-VL's resampler: learned queries attend once to the patches; no residual, no MLP.

    Parameters
    ----------
    config : IVTPLlavaConfig
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        options: ConnectorConfig = config.connector
        width = feature_width(config)
        self.patch_grid, self.grid, self.heads = config.grid, options.grid, resampler_heads(options, width)
        self.queries = nn.Parameter(torch.empty(1, options.places, width))
        self.query_norm, self.patch_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.output_norm, self.output = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width, bias=False)

    def start(self) -> None:
        """Draw the queries."""
        initialization.trunc_normal_(self.queries, std=_STD)

    def forward(
        self, features: torch.Tensor, question: Question | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Make tokens of the features of patches.

        Parameters
        ----------
        features : Tensor (I, N, D)
        question : Question, optional
            Not used.

        Returns
        -------
        None
        tokens : Tensor (I, M, D)
            For LLaVA's projector.
        """
        width = features.shape[-1]
        positions = sine_positions(self.grid, width).to(features)
        patch_positions = resized_positions(self.grid, self.patch_grid, width).to(features)
        patches = self.patch_norm(features)
        query = self.q_proj(self.query_norm(self.queries) + positions).expand(features.shape[0], -1, -1)
        key, value = self.k_proj(patches + patch_positions), self.v_proj(patches)
        query, key, value = (
            tensor.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2) for tensor in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return None, self.output(self.output_norm(self.out_proj(attended)))


CONNECTORS: dict[str, type[nn.Module]] = {
    "c_abstractor": CAbstractor,
    "context_attention": ContextAttention,
    "resampler": Resampler,
}
"""The connectors by name."""


def make_connector(config: Any) -> nn.Module | None:
    """Build the connector of a configuration; None if it has none."""
    return None if config.connector is None else CONNECTORS[config.connector.name](config)


def join_connector(model: Any, connector: Any) -> None:
    """Add an untrained connector to a model that has none, on its projector's device and in its dtype.

    Parameters
    ----------
    model : IVTPLlavaForConditionalGeneration
        Its pruning is switched off.
    connector : str, dict or ConnectorConfig

    Raises
    ------
    ValueError
        If the model has another connector, or this one does not fit. The model is then as before.
    """
    options, body, config = ConnectorConfig.create(connector), model.model, model.config
    if config.connector is not None:
        if config.connector != options:
            raise ValueError(f"connector={options}; this model has {config.connector} already.")
        return
    before = config.pruning
    config.pruning = before.changed(enabled=False)
    try:
        config.connector = options
        config.check_connector()
        module = make_connector(config)
    except ValueError:
        config.pruning, config.connector = before, None
        raise
    if module is None:
        config.pruning = before
        return
    module.apply(body._init_weights)
    weight = body.multi_modal_projector.linear_1.weight
    offloaded = weight.device.type == "meta"
    device = torch.device("cpu") if offloaded else weight.device
    body.connector = module.to(device, weight.dtype if weight.dtype.is_floating_point else model.dtype)
    body.connector.train(body.training)
    if hasattr(model, "hf_device_map") and "" not in model.hf_device_map:
        model.hf_device_map["model.connector"] = device


def question_of_images(model: Any, prompt: PromptInputs, images: int) -> Question | None:
    """Read the question of each image from the row that it stands in.

    Parameters
    ----------
    model : IVTPLlavaModel
    prompt : PromptInputs
        With `clip_input_ids`, if there is a question.
    images : int
        Images that came with the prompt, over all rows.

    Returns
    -------
    Question or None
        None where the question, or what reads it, is missing.

    Raises
    ------
    ValueError
        If placeholders and images do not match.
    """
    ids = prompt.clip_input_ids
    if ids is None or not model.has_text_tower:
        return None
    placeholders, each = model.placeholders(prompt.input_ids, prompt.inputs_embeds), features_of_image(model.config)
    mask = prompt.attention_mask
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        valid = prompt.valid_tokens(placeholders.device)
        placeholders = placeholders if valid is None else placeholders & valid
    counts = placeholders.sum(1)
    if int(counts.sum()) != images * each or bool((counts % each).any()):
        raise ValueError(
            f"Image features and image tokens do not match: {images} image(s) need {images * each} image tokens, "
            f"{each} each, and the rows of the prompt have {counts.tolist()}. The processor needs connector_tokens="
            f"{each}."
        )
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts // each).to(ids.device)
    features = model.text_features(ids, instruction_windows(ids))
    ends = window_ends(model.clip_text_model.config, ids)
    column = torch.arange(ids.shape[-1], device=ids.device)
    # CLIP's start token comes before all words and sees none of them.
    present = (column >= 1) & (column <= ends[..., None]) & ids.any(-1, keepdim=True)
    return Question(features[rows.to(features.device)], present.flatten(1)[rows])


def pooled(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Average features (I, rows, columns, D) over the cells of a smaller grid."""
    return functional.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


@lru_cache(maxsize=8)
def sine_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Return fixed positions of a grid: float32 (rows * columns, width), half of it for the column, then for the row.

    Each half has sines, then cosines, of the number times 10000^(-4i / width).
    """
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * rates for size in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], -1) for angles in (rows, columns))
    table = torch.cat([columns.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], -1)
    return table.flatten(0, 1).float()


@lru_cache(maxsize=8)
def resized_positions(grid: tuple[int, int], to: tuple[int, int], width: int) -> torch.Tensor:
    """Return the positions of a grid, resized to another by bicubic interpolation: float32 (to rows * columns, width).

    Where the grids are equal they stay as they are.
    """
    table = sine_positions(grid, width)
    if grid == to:
        return table
    image = table.T.unflatten(1, grid)[None]
    return functional.interpolate(image, size=to, mode="bicubic", align_corners=False)[0].flatten(1).T.contiguous()


def _miss_question(strict: bool | None) -> None:
    """Warn once that the question is missing, or raise under `strict`."""
    message = (
        'The connector "context_attention" reads the question, and clip_input_ids or CLIP\'s text tower is missing. '
        "Prepare inputs with IVTPLlavaProcessor and a CLIP tokenizer."
    )
    if strict:
        raise ValueError(message)
    logger.warning_once(message + " All patches have the same weight in the token of context instead.")
