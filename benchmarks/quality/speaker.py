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
        number, length = asked.shape[1:]
        embed = self.language.embed_tokens
        if patches is None:
            patches = torch.arange(GRID**2, device=asked.device)
        picture = torch.cat([embed(lead).expand(len(asked), -1, -1), self.project(features)], 1)
        read = picture.shape[1]
        packing = Packing.of(lengths, length) if lengths is not None else None
        words = embed(asked).flatten(0, 2)
        states = torch.cat([picture.flatten(0, 1), words if packing is None else packing.packed(words)])
        places = torch.cat([torch.arange(len(lead), device=asked.device), len(lead) + patches])
        after = len(lead) + GRID**2 + torch.arange(length, device=asked.device)
        layout = Layout(
            batch=len(asked),
            read=read,
            packing=packing,
            of_picture=self.language.rotary_emb(states, places[None]),
            of_questions=self.language.rotary_emb(states, after.repeat(number)[None]),
            own=_causal_bias(length, states),
            penalty=None if ground is None else IdleAttention.of(ground, things, asking, len(lead)),
        )
        halfway, idle = [], torch.zeros((), device=states.device)
        for index, layer in enumerate(self.language.layers[:layers], 1):
            states, share = _run_layer(layer, states, layout)
            idle = idle + share / len(self.language.layers)
            if index in self.halfway:
                whole = layout.questions(states)
                halfway += [whole.unflatten(1, (number, length))] * self.halfway.count(index)
        hidden = self.language.norm(layout.questions(states))
        return hidden.unflatten(1, (number, length)), halfway, idle


@dataclass
class Packing:
    """The tokens of padded questions that are computed, one after the other.

    A third of the tokens of questions side by side is padding; a layer's products leave it out.

    Attributes
    ----------
    total : int
        Number of all tokens of all questions, padding too.
    real : int64 Tensor (M,)
        Places of the computed ones among them.
    """

    total: int
    real: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, length: int) -> "Packing":
        """Pack the first `lengths` (B, Q) of the `length` tokens of each question."""
        real = torch.arange(length, device=lengths.device) < lengths[..., None]
        return cls(real.numel(), real.flatten().nonzero().squeeze(1))

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """Return the computed ones (M, d) of all states (total, d)."""
        return states.index_select(0, self.real)

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (M, d) in their places (total, d), with zeros between."""
        return states.new_zeros(self.total, states.shape[1]).index_copy(0, self.real, states)


@dataclass
class Layout:
    """Where pictures and questions stand among the states of a layer, and how they attend.

    The states (N, d) are those of all pictures, one after the other, and then those of all questions.

    Attributes
    ----------
    batch, read : int
        Number of pictures, and of the tokens of each and before it.
    packing : Packing or None
        The questions' tokens that are computed. None: all.
    of_picture, of_questions : tuple of Tensor (1, S, D)
        Cosines and sines of the positions of a picture, and of its questions.
    own : Tensor (T, T)
        Causal bias of a question.
    penalty : IdleAttention or None
    """

    batch: int
    read: int
    packing: Packing | None
    of_picture: tuple[torch.Tensor, torch.Tensor]
    of_questions: tuple[torch.Tensor, torch.Tensor]
    own: torch.Tensor
    penalty: "IdleAttention | None"

    def apart(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of pictures (B, read, d) and of questions (B, Q T, d), zeros where nothing is computed."""
        of_pictures, of_questions = states.tensor_split([self.batch * self.read])
        if self.packing is not None:
            of_questions = self.packing.padded(of_questions)
        return of_pictures.unflatten(0, (self.batch, -1)), of_questions.unflatten(0, (self.batch, -1))

    def questions(self, states: torch.Tensor) -> torch.Tensor:
        """Return the questions' states (B, Q T, d)."""
        return self.apart(states)[1]

    def together(self, of_pictures: torch.Tensor, of_questions: torch.Tensor) -> torch.Tensor:
        """Return the states (N, d) of both."""
        of_questions = of_questions.flatten(0, 1)
        if self.packing is not None:
            of_questions = self.packing.packed(of_questions)
        return torch.cat([of_pictures.flatten(0, 1), of_questions])


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


def _run_layer(layer: nn.Module, states: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a layer over pictures and questions, and return the states (N, d) and the idle share of attention."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    of_picture, of_questions = zip(
        *(layout.apart(project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)),
        strict=True,
    )
    picture = _turned(of_picture, layout.of_picture, attention.head_dim)
    questions = _turned(of_questions, layout.of_questions, attention.head_dim)
    scale = attention.head_dim**-0.5
    by_questions, answers = _side_by_side(questions, picture, layout.own, scale)
    if layout.penalty is None:
        seen = F.scaled_dot_product_attention(*picture, is_causal=True)
        idle = states.new_zeros(())
    else:
        query, key, value = picture
        bias = _causal_bias(layout.read, query)
        by_picture = ((query * scale) @ key.transpose(-1, -2) + bias).softmax(-1)
        seen = by_picture @ value
        idle = layout.penalty.share(by_picture, by_questions)
    output = layout.together(*(heads.transpose(1, 2).flatten(2) for heads in (seen, answers)))
    states = states + attention.o_proj(output)
    return states + layer.mlp(layer.post_attention_layernorm(states)), idle


def _turned(
    projected: tuple[torch.Tensor, ...], turns: tuple[torch.Tensor, torch.Tensor], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value by heads (B, H, S, D) from (B, S, H D), query and key turned by their positions."""
    query, key, value = (one.unflatten(2, (-1, head_dim)).transpose(1, 2) for one in projected)
    cos, sin = turns
    query, key = apply_rotary_pos_emb(query, key, cos.to(query.dtype), sin.to(query.dtype))
    return query, key, value


def _causal_bias(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def _side_by_side(
    questions: tuple[torch.Tensor, ...], picture: tuple[torch.Tensor, ...], own: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of questions, each to the picture and to itself.

    Parameters
    ----------
    questions : three Tensor (B, H, Q T, D)
        Queries, keys and values of the questions.
    picture : three Tensor (B, H, read, D)
        The same of the picture and what is before it.
    own : Tensor (T, T)
        Causal bias of a question.
    scale : float
        Factor on the queries.

    Returns
    -------
    Tensor (B, H, Q T, read)
        Attention to the picture.
    Tensor (B, H, Q T, D)
        The output.
    """
    length = own.shape[0]
    query, key, value = questions
    query = query * scale
    by_question = [states.unflatten(2, (-1, length)) for states in (query, key, value)]
    to_picture = query @ picture[1].transpose(-1, -2)
    to_itself = by_question[0] @ by_question[1].transpose(-1, -2) + own.to(query.dtype)
    weights = torch.cat([to_picture, to_itself.flatten(2, 3)], -1).softmax(-1)
    to_picture, to_itself = weights.tensor_split([picture[1].shape[2]], -1)
    of_itself = to_itself.unflatten(2, (-1, length)) @ by_question[2]
    return to_picture, to_picture @ picture[2] + of_itself.flatten(2, 3)
