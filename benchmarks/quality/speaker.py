"""Projector and decoder of the miniature in training: many questions side by side on one reading of a picture.

Every question attends to the picture and to itself only, so that a picture is read once for all of them. The outputs
are those of transformers' LLaMA for each question alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.quality.miniature import WIDTH, decoder_config
from benchmarks.quality.recipes import Recipe
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.world import COLOURS, GRID, SIZES

NAMING = {"there": 1, "colour": len(COLOURS), "row": GRID, "column": GRID, "size": len(SIZES)}
"""Properties that are asked of the object named, each with its number of values."""


class Speaker(nn.Module):
    """Projector, decoder and head; they get the frozen tower's features normalised.

    Two more heads help in training and are dropped in the end: `naming` predicts the properties of the object that a
    noun names, `source` the place of the object that the answer is read from. The recipe says after which layers: asked
    early, a decoder has read a patch before a group drops it.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config, width, course = decoder_config(recipe, len(decoder_tokenizer())), WIDTH, recipe.course
        self.recipe, self.halfway = recipe, (course.named_after, course.source_after)
        self.language = LlamaModel(config)
        # Words and patches enter as large as what a layer adds to them, else the first layers drown them. The heads of
        # the first layers start out attending to tokens like themselves: "dog" to the patches of a dog.
        nn.init.normal_(self.language.embed_tokens.weight)
        for index, layer in enumerate(self.language.layers):
            attention = layer.self_attn
            if index < course.alike_layers:
                nn.init.normal_(attention.q_proj.weight, std=0.1)
                attention.k_proj.weight.data.copy_(attention.q_proj.weight)
            for values in (attention.v_proj, attention.o_proj):
                nn.init.normal_(values.weight, std=config.hidden_size**-0.5)
        self.linear_1 = nn.Linear(width, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.naming, self.source = (
            nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, size))
            for size in (sum(NAMING.values()), 2 * GRID)
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(()))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project tower features (B, N, width) into the decoder's space."""
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.deviation)))

    def forward(
        self,
        features: torch.Tensor,
        lead: torch.Tensor,
        asked: torch.Tensor,
        patches: torch.Tensor | None = None,
        ground: torch.Tensor | None = None,
        things: torch.Tensor | None = None,
        asking: torch.Tensor | None = None,
        layers: int | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Compute the hidden states of the questions.

        Parameters
        ----------
        features : Tensor (B, N, width)
        lead : int64 Tensor (L,)
            Tokens before every picture.
        asked : int64 Tensor (B, Q, T)
            Tokens after it, question by question, padded on the right.
        patches : int64 Tensor (N,), optional
            The patches of a whole picture that the features belong to; default: all.
        ground : bool Tensor (B, N), optional
            Patches that show nothing.
        things : int64 Tensor (B, N), optional
            Number of the thing that each patch shows. With it, attention of objects to other objects is idle, too.
        asking : float32 Tensor (B, Q, T), optional
            Weight of each token of a question for the idle attention. Default: all alike.
        layers : int, optional
            The number of first layers that run; default: all.
        lengths : int64 Tensor (B, Q), optional
            The number of each question's tokens that are computed; the states after them are those of zeros. Default:
            all, padding too.

        Returns
        -------
        hidden : Tensor (B, Q, T, d)
        halfway : list of Tensor (B, Q, T, d)
            After the recipe's `named_after` and `source_after` layers, where the decoder is that deep.
        idle : float32 Tensor
            Share of attention that questions and objects pay to ground, averaged over layers and heads; 0 without
            `ground`. Attention to the first token, which is always there, is not idle.
        """
        batch, number, length = asked.shape
        embed = self.language.embed_tokens
        lead_states, words = embed(lead).expand(batch, -1, -1), embed(asked).flatten(1, 2)
        states = torch.cat([lead_states, self.project(features), words], 1)
        read = states.shape[1] - words.shape[1]
        positions = torch.arange(len(lead) + GRID**2 + length, device=asked.device)
        if patches is None:
            patches = torch.arange(GRID**2, device=asked.device)
        after = positions[len(lead) + GRID**2 :].repeat(number)
        positions = torch.cat([positions[: len(lead)], len(lead) + patches, after])[None]
        cos, sin = self.language.rotary_emb(states, positions)
        reading = _causal_bias(read, states)
        own = _causal_bias(length, states)
        penalty = None if ground is None else IdleAttention.of(ground, things, asking, len(lead))
        packing = None if lengths is None else Packing.of(lengths, length, read)
        if packing is not None:
            states = packing.packed(states)
        halfway, idle = [], torch.zeros((), device=states.device)
        for index, layer in enumerate(self.language.layers[:layers], 1):
            states, share = _run_layer(layer, states, cos, sin, reading, own, penalty, packing)
            idle = idle + share / len(self.language.layers)
            if index in self.halfway:
                whole = states if packing is None else packing.padded(states)
                halfway += [whole[:, read:].unflatten(1, (number, length))] * self.halfway.count(index)
        whole = states if packing is None else packing.padded(states)
        return self.language.norm(whole[:, read:]).unflatten(1, (number, length)), halfway, idle


@dataclass
class Packing:
    """The tokens of pictures and padded questions that are computed, one after the other.

    A third of the tokens of questions side by side is padding; a layer's products leave it out.

    Attributes
    ----------
    shape : tuple of int
        Batch and padded length (B, S).
    real : int64 Tensor (M,)
        Places of the tokens that are computed among all B S.
    """

    shape: tuple[int, int]
    real: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, length: int, read: int) -> "Packing":
        """Pack `read` tokens of each picture and the first `lengths` (B, Q) of the `length` tokens of each question."""
        real = torch.arange(length, device=lengths.device) < lengths[..., None]
        real = F.pad(real.flatten(1), (read, 0), value=True)
        return cls((real.shape[0], real.shape[1]), real.flatten().nonzero().squeeze(1))

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """Return the computed ones (M, d) of states (B, S, d)."""
        return states.flatten(0, 1).index_select(0, self.real)

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (M, d) in their places (B, S, d), with zeros between."""
        whole = states.new_zeros(self.shape[0] * self.shape[1], states.shape[1])
        return whole.index_copy(0, self.real, states).unflatten(0, self.shape)


@dataclass
class IdleAttention:
    """The places where attention is idle.

    Attributes
    ----------
    ground, objects : bool Tensor (B, read)
        Columns of the picture's ground and of its objects.
    others : bool Tensor (B, read, read) or None
        Columns that show another thing than the object of a row. None: for objects only ground is idle.
    asking : float32 Tensor (B, Q T) or None
        Weight of each token of the questions; the weights of a picture sum to one. None: all alike.
    """

    ground: torch.Tensor
    objects: torch.Tensor
    others: torch.Tensor | None
    asking: torch.Tensor | None

    @classmethod
    def of(
        cls, ground: torch.Tensor, things: torch.Tensor | None, asking: torch.Tensor | None, lead: int
    ) -> "IdleAttention":
        """Make the places for a picture after `lead` tokens; see `Speaker.forward`."""
        others = None
        if things is not None:
            others = F.pad((things[:, :, None] != things[:, None]) & ~ground[:, :, None], (lead, 0, lead, 0))
        if asking is not None:
            asking = asking.flatten(1) / asking.sum((1, 2), keepdim=True).flatten(1)
        return cls(F.pad(ground, (lead, 0)), F.pad(~ground, (lead, 0)), others, asking)

    def share(self, by_picture: torch.Tensor, by_questions: torch.Tensor) -> torch.Tensor:
        """Return the idle share of the attention of objects (B, H, read, read) and of questions (B, H, Q T, read)."""
        heads = by_picture.shape[1]
        ground, objects = (mask[:, None, :, None].to(by_picture.dtype) for mask in (self.ground, self.objects))
        strange = (by_picture @ ground) * objects if self.others is None else by_picture * self.others[:, None]
        of_objects = strange.float().sum() / (objects.float().sum() * heads)
        of_questions = (by_questions @ ground).float().squeeze(3)
        if self.asking is None:
            return (of_questions.mean() + of_objects) / 2
        return ((of_questions * self.asking[:, None]).sum(2).mean() + of_objects) / 2


def _run_layer(
    layer: nn.Module,
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    reading: torch.Tensor,
    own: torch.Tensor,
    penalty: IdleAttention | None,
    packing: Packing | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a layer over the picture and all questions, and return the states and the idle share of attention.

    `reading` and `own` are the attention biases of picture and question. With a packing, `states` are packed.
    """
    attention, read = layer.self_attn, reading.shape[0]
    normed = layer.input_layernorm(states)
    projected = [projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if packing is not None:
        projected = [packing.padded(one) for one in projected]
    query, key, value = (one.unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for one in projected)
    query, key = apply_rotary_pos_emb(query, key, cos.to(query.dtype), sin.to(query.dtype))
    of_picture = [states_of[:, :, :read] for states_of in (query, key, value)]
    query = query * query.shape[-1] ** -0.5
    by_questions, of_questions = _side_by_side(query, key, value, read, own)
    if penalty is None:
        read_states = F.scaled_dot_product_attention(*of_picture, is_causal=True)
        idle = states.new_zeros(())
    else:
        by_picture = (query[:, :, :read] @ key[:, :, :read].transpose(-1, -2) + reading.to(query.dtype)).softmax(-1)
        read_states = by_picture @ value[:, :, :read]
        idle = penalty.share(by_picture, by_questions)
    output = torch.cat([read_states, of_questions], 2).transpose(1, 2).flatten(2)
    if packing is not None:
        output = packing.packed(output)
    states = states + attention.o_proj(output)
    return states + layer.mlp(layer.post_attention_layernorm(states)), idle


def _causal_bias(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), device=like.device).triu(1)


def _side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, read: int, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of questions, each to the picture and to itself.

    Parameters
    ----------
    query, key, value : Tensor (B, H, read + Q T, D)
        Of picture and questions; queries are scaled.
    read : int
        Tokens of the picture and before it.
    own : Tensor (T, T)
        Causal bias of a question.

    Returns
    -------
    Tensor (B, H, Q T, read)
        Attention to the picture.
    Tensor (B, H, Q T, D)
        The output.
    """
    length = own.shape[0]
    query = query[:, :, read:]
    by_question = [states.unflatten(2, (-1, length)) for states in (query, key[:, :, read:], value[:, :, read:])]
    to_picture = query @ key[:, :, :read].transpose(-1, -2)
    to_itself = by_question[0] @ by_question[1].transpose(-1, -2) + own.to(query.dtype)
    weights = torch.cat([to_picture, to_itself.flatten(2, 3)], -1).softmax(-1)
    of_itself = weights[..., read:].unflatten(2, (-1, length)) @ by_question[2]
    to_picture = weights[..., :read]
    return to_picture, to_picture @ value[:, :, :read] + of_itself.flatten(2, 3)
