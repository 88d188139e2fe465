"""Projector and decoder of the miniature as they are trained: many questions side by side on one reading of a picture.

Every question sees the picture and itself alone, so that a picture is read once for all of them; what comes out is what
transformers' LLaMA says of each question by itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.quality.world import COLOURS, GRID, SIZES

NAMED_AT, SOURCE_AT = 2, 4
"""After how many layers training asks what is known of the thing named, and where the answer is read from.

Left alone, so small a decoder reads late; asked early, it has read a patch before a group drops it."""
LOOKING = 4
"""In how many of the first layers the heads begin by looking for their like."""
NAMING = {"there": 1, "colour": len(COLOURS), "row": GRID, "column": GRID, "size": len(SIZES)}
"""What is asked of a thing named, and among how many."""


class Speaker(nn.Module):
    """Projector, decoder and head; the frozen tower's features come normalised.

    Two heads more help in training and are dropped in the end: `naming` says what is known of the thing that a noun
    names, `source` where the one is that the answer is read from.
    """

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__()
        self.language = LlamaModel(config)
        # Words and patches enter as large as what a layer adds to them, else the first layers drown them; and the heads
        # of the first layers begin by looking for their like, "dog" for the patches of a dog.
        nn.init.normal_(self.language.embed_tokens.weight)
        for index, layer in enumerate(self.language.layers):
            attention = layer.self_attn
            if index < LOOKING:
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
        """Tower features (B, N, width) in the decoder's space."""
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
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Hidden states of the questions.

        Parameters
        ----------
        features : Tensor (B, N, width)
        lead : int64 Tensor (L,)
            What stands before every picture.
        asked : int64 Tensor (B, Q, T)
            What stands after it, question by question, padded on the right.
        patches : int64 Tensor (N,), optional
            Which patches of a whole picture the features are; default: all.
        ground : bool Tensor (B, N), optional
            Patches that show nothing.
        things : int64 Tensor (B, N), optional
            What patches show, by number: what objects pay to anything but themselves is idle, too.
        asking : float32 Tensor (B, Q, T), optional
            How much what each token of a question pays counts. Default: all alike.

        Returns
        -------
        hidden : Tensor (B, Q, T, d)
        halfway : list of Tensor (B, Q, T, d)
            After `NAMED_AT` and `SOURCE_AT` layers, where the decoder is that deep.
        idle : float32 Tensor
            Share of attention that questions and objects pay to ground, averaged over layers and heads; 0 where
            `ground` is not told. The first token, which is always there, is no idle place.
        """
        batch, number, length = asked.shape
        embed = self.language.embed_tokens
        lead_states, words = embed(lead).expand(batch, -1, -1), embed(asked).flatten(1, 2)
        states = torch.cat([lead_states, self.project(features), words], 1)
        read = states.shape[1] - words.shape[1]
        places = torch.arange(len(lead) + GRID**2 + length, device=asked.device)
        if patches is None:
            patches = torch.arange(GRID**2, device=asked.device)
        after = places[len(lead) + GRID**2 :].repeat(number)
        places = torch.cat([places[: len(lead)], len(lead) + patches, after])[None]
        cos, sin = self.language.rotary_emb(states, places)
        reading = _no_later(read, states)
        own = _no_later(length, states)
        watched = None if ground is None else Watched.of(ground, things, asking, len(lead))
        halfway, idle = [], torch.zeros((), device=states.device)
        for index, layer in enumerate(self.language.layers, 1):
            states, paid = _one_layer(layer, states, cos, sin, reading, own, watched)
            idle = idle + paid / len(self.language.layers)
            if index in (NAMED_AT, SOURCE_AT):
                halfway.append(states[:, read:].unflatten(1, (number, length)))
        return self.language.norm(states[:, read:]).unflatten(1, (number, length)), halfway, idle


@dataclass
class Watched:
    """Where attention is idle.

    Attributes
    ----------
    ground, objects : bool Tensor (B, read)
        Columns of the picture's ground and of what it shows.
    others : bool Tensor (B, read, read) or None
        Which columns show, or are, something else than the object in a row. None: only ground counts for objects.
    asking : float32 Tensor (B, Q T) or None
        Weight of each token of the questions, summing to one over a picture. None: all alike.
    """

    ground: torch.Tensor
    objects: torch.Tensor
    others: torch.Tensor | None
    asking: torch.Tensor | None

    @classmethod
    def of(cls, ground: torch.Tensor, things: torch.Tensor | None, asking: torch.Tensor | None, lead: int) -> "Watched":
        """For a picture after `lead` tokens; see `Speaker.forward`."""
        others = None
        if things is not None:
            others = F.pad((things[:, :, None] != things[:, None]) & ~ground[:, :, None], (lead, 0, lead, 0))
        if asking is not None:
            asking = asking.flatten(1) / asking.sum((1, 2), keepdim=True).flatten(1)
        return cls(F.pad(ground, (lead, 0)), F.pad(~ground, (lead, 0)), others, asking)

    def paid(self, by_picture: torch.Tensor, by_questions: torch.Tensor) -> torch.Tensor:
        """Share of attention paid idly by objects, of (B, H, read, read), and by questions, of (B, H, Q T, read)."""
        heads = by_picture.shape[1]
        ground, objects = (one[:, None, :, None].to(by_picture.dtype) for one in (self.ground, self.objects))
        strange = (by_picture @ ground) * objects if self.others is None else by_picture * self.others[:, None]
        of_objects = strange.float().sum() / (objects.float().sum() * heads)
        of_questions = (by_questions @ ground).float().squeeze(3)
        if self.asking is None:
            return (of_questions.mean() + of_objects) / 2
        return ((of_questions * self.asking[:, None]).sum(2).mean() + of_objects) / 2


def _one_layer(
    layer: nn.Module,
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    reading: torch.Tensor,
    own: torch.Tensor,
    watched: "Watched | None",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer over the picture and all questions; `reading` and `own` are the biases of picture and question.

    Also what is paid idly.
    """
    attention, read = layer.self_attn, reading.shape[0]
    normed = layer.input_layernorm(states)
    query, key, value = (
        one(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for one in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos.to(query.dtype), sin.to(query.dtype))
    query = query * query.shape[-1] ** -0.5
    by_picture = (query[:, :, :read] @ key[:, :, :read].transpose(-1, -2) + reading.to(query.dtype)).softmax(-1)
    by_questions, heard = _side_by_side(query, key, value, read, own)
    output = torch.cat([by_picture @ value[:, :, :read], heard], 2).transpose(1, 2).flatten(2)
    states = states + attention.o_proj(output)
    paid = states.new_zeros(()) if watched is None else watched.paid(by_picture, by_questions)
    return states + layer.mlp(layer.post_attention_layernorm(states)), paid


def _no_later(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), device=like.device).triu(1)


def _side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, read: int, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of questions, each to the picture and to itself, of (B, H, read + Q T, D), queries scaled.

    What they pay the picture (B, H, Q T, read), and what they hear (B, H, Q T, D).
    """
    length = own.shape[0]
    query = query[:, :, read:]
    by_question = [one.unflatten(2, (-1, length)) for one in (query, key[:, :, read:], value[:, :, read:])]
    to_picture = query @ key[:, :, :read].transpose(-1, -2)
    to_itself = by_question[0] @ by_question[1].transpose(-1, -2) + own.to(query.dtype)
    weights = torch.cat([to_picture, to_itself.flatten(2, 3)], -1).softmax(-1)
    of_itself = weights[..., read:].unflatten(2, (-1, length)) @ by_question[2]
    to_picture = weights[..., :read]
    return to_picture, to_picture @ value[:, :, :read] + of_itself.flatten(2, 3)
