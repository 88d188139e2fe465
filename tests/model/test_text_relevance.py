"""The paper's Eq. 6 to 8 against loops written from it, and the two tokenizers' alignment against one by characters."""

import html
import random
import unicodedata
from collections.abc import Sequence

import ftfy
import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from modeling_ivtp.checkpoints.clip_bpe import clip_tokenizer_from_open_clip
from modeling_ivtp.model.text_relevance import (
    instruction_tokens,
    key_tokens,
    map_relevance,
    overlapping_spans,
    pseudo_cls,
    text_similarity,
    token_relevance,
)
from tests.support import text_tokenizers

Range = tuple[int, int]

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1)
)
quick = settings(max_examples=40, deadline=None)


def random_spans(generator: torch.Generator, rows: int, prompt: int, tokens: int) -> torch.Tensor:
    ends = torch.randint(0, tokens + 1, (rows, prompt, 2), generator=generator).sort(-1).values - tokens
    return torch.where(ends[..., :1] == ends[..., 1:], 0, ends)


# Eq. 6


@quick
@given(shapes)
def test_relevance_is_the_cosine_of_each_text_token_with_each_image(shape):
    rows, images, tokens, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    text, image = (
        torch.randn(rows, tokens, width, generator=generator),
        torch.randn(rows, images, width, generator=generator),
    )
    expected = np.zeros((rows, images, tokens))
    for b in range(rows):
        for m in range(images):
            for i in range(tokens):
                x, y = text[b, i].double().numpy(), image[b, m].double().numpy()
                expected[b, m, i] = (x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    result = token_relevance(text, image)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_a_zero_vector_has_no_relevance_instead_of_nan():
    text = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    image = torch.tensor([[[0.0, 0.0], [0.6, 0.8]]])
    assert token_relevance(text, image).tolist() == [[[0.0, 0.0], [0.0, pytest.approx(1.0)]]]


def test_relevance_is_computed_in_float32_even_under_autocast():
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 2, 64, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_relevance(text, image), token_relevance(text.clone(), image))
        inside = token_relevance(text, image)
    assert torch.equal(inside, token_relevance(text, image))
    half = token_relevance(text.half(), image.half())
    assert half.dtype == torch.float32
    assert torch.allclose(half, inside, atol=1e-3)


# Eq. 7


@quick
@given(shapes, st.integers(1, 12))
def test_mapped_relevance_is_the_mean_over_the_span(shape, prompt):
    rows, images, tokens, _, seed = shape
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.rand(rows, images, tokens, generator=generator) * 2 - 1
    spans = random_spans(generator, rows, prompt, tokens)
    expected = np.full((rows, images, prompt), -np.inf)
    for b in range(rows):
        for m in range(images):
            for i in range(prompt):
                first, last = spans[b, i].tolist()
                if first < last:  # c_j ... c_{j+K}
                    expected[b, m, i] = sum(relevance[b, m, k].item() for k in range(first, last)) / (last - first)
    result = map_relevance(relevance, spans)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6, rtol=0)


def test_a_span_of_one_token_carries_its_relevance_over_unchanged():
    relevance = torch.tensor([[[0.25, -0.1234567, 0.2]]])
    spans = torch.tensor([[[-3, -2], [-2, -1], [-1, 0], [0, 0]]])
    assert map_relevance(relevance, spans).tolist() == [[[*relevance[0, 0].tolist(), float("-inf")]]]


def test_the_mean_keeps_its_precision_at_the_end_of_a_long_text():
    relevance = torch.full((1, 1, 30_000), 0.9)
    relevance[..., -2:] = torch.tensor([1e-3, 3e-3])
    assert map_relevance(relevance, torch.tensor([[[-2, 0]]])).item() == pytest.approx(2e-3, abs=1e-8)


def test_windows_of_other_rows_do_not_change_a_row_by_one_bit():
    generator = torch.Generator().manual_seed(1)
    relevance = torch.rand(1, 2, 77, generator=generator) * 2 - 1
    spans = random_spans(generator, 1, 50, 77)
    padded = torch.cat([torch.rand(1, 2, 5 * 77, generator=generator), relevance], dim=-1)
    assert torch.equal(map_relevance(relevance, spans), map_relevance(padded, spans))


def test_mapping_is_allowed_under_deterministic_algorithms_and_another_default_dtype():
    relevance, spans = torch.rand(1, 1, 9), torch.tensor([[[-5, -2]]])
    expected = map_relevance(relevance, spans)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(map_relevance(relevance, spans), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


# Eq. 8


@quick
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_pseudo_cls_is_the_mean_embedding_of_the_key_tokens_or_the_visual_cls(shape, dtype):
    rows, images, tokens, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, tokens, width, generator=generator).to(dtype)
    visual = torch.randn(rows, images, width, generator=generator).to(dtype)
    relevance = torch.rand(rows, images, tokens, generator=generator) - 0.4
    relevance[torch.rand(rows, images, tokens, generator=generator) < 0.3] = float("-inf")
    keys = key_tokens(relevance, 0.2)
    expected = np.zeros((rows, images, width))
    for b in range(rows):
        for m in range(images):
            chosen = [i for i in range(tokens) if relevance[b, m, i] >= 0.2]
            for j in range(width):
                picked = [embeddings[b, i, j].item() for i in chosen]
                expected[b, m, j] = sum(picked) / len(picked) if picked else visual[b, m, j].item()
    result = pseudo_cls(embeddings, keys, visual)
    assert result.dtype == dtype
    np.testing.assert_allclose(
        result.float().numpy(),
        expected,
        atol=1e-6 if dtype == torch.float32 else 0,
        rtol=0 if dtype == torch.float32 else 2**-8,
    )


def test_a_relevance_at_the_threshold_passes_and_outside_the_instruction_nothing_does():
    relevance = torch.tensor([[[0.2, 0.19, float("-inf"), 0.9]]])
    assert key_tokens(relevance, 0.2).tolist() == [[[True, False, False, True]]]
    assert key_tokens(relevance, float("-inf")).tolist() == [[[True, True, False, True]]]


def test_gradients_reach_the_key_tokens_or_else_the_fallback():
    embeddings = torch.randn(1, 3, 2, requires_grad=True)
    fallback = torch.randn(1, 2, 2, requires_grad=True)
    keys = torch.tensor([[[True, False, True], [False, False, False]]])
    pseudo_cls(embeddings, keys, fallback).sum().backward()
    assert embeddings.grad.tolist() == [[[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]]
    assert fallback.grad.tolist() == [[[0.0, 0.0], [1.0, 1.0]]]


def test_rows_without_any_image_give_empty_results():
    none = torch.zeros(2, 0, 4)
    assert token_relevance(torch.ones(2, 5, 4), none).shape == (2, 0, 5)
    assert map_relevance(torch.zeros(2, 0, 5), torch.zeros(2, 3, 2, dtype=torch.int64)).shape == (2, 0, 3)
    assert pseudo_cls(torch.ones(2, 3, 4), torch.zeros(2, 0, 3, dtype=torch.bool), none).shape == (2, 0, 4)


def test_text_similarity_is_a_cosine_inside_the_instruction_and_minus_infinity_elsewhere():
    embeddings, reference = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 2.0]]])
    spans = torch.tensor([[[-2, -1], [-1, 0], [0, 0]]])
    assert text_similarity(embeddings, reference, spans).tolist() == [[[0.0, pytest.approx(0.5**0.5), float("-inf")]]]
    assert instruction_tokens(spans).tolist() == [[True, True, False]]


# Spans by characters


@quick
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12),
)
def test_a_span_is_what_a_search_over_all_pairs_of_tokens_finds(steps, offsets):
    clip, place = [], 0
    for gap, length in steps:
        clip.append((place + gap, place + gap + length))
        place += gap + length
    expected = []
    for start, end in offsets:
        hits = [k for k, (s, e) in enumerate(clip) if set(range(start, end)) & set(range(s, e))]
        expected.append((hits[0], hits[-1] + 1) if hits else (0, 0))
    assert overlapping_spans(offsets, clip) == expected


def test_bytes_of_one_character_belong_to_one_span():
    assert overlapping_spans([(0, 1), (0, 1), (1, 2), (0, 2), (2, 2)], [(0, 1), (0, 1), (0, 2), (1, 2)]) == [
        (0, 3),
        (0, 3),
        (2, 4),
        (0, 4),
        (0, 0),
    ]


# Two real tokenizers

WORDS = """
What is the colour of bird's wing? it's DON'T we'll A.B, (red) 3.14 10,000 x-ray foo_bar #tag @me
café naïve Größe ÅNGSTRÖM señor Łódź žluťoučký İstanbul ﬁn Ǆ straße œuvre Ελλάς Москва
图片里有什么 这只鸟是什么颜色？ 日本語のテキスト 한국어 العربية हिन्दी ภาษาไทย עברית
😀 👍🏽 👨\u200d👩\u200d👧 🇩🇪 ❤️ ☃ ∑ → € ½ ﷺ 𝔘𝔫𝔦 \u200b \ufeffx a\u0323\u0301
def f(x):return x**2 <div>a</div> a[i]=b&&c||!d; $HOME/\\n {'k': 1} `rm -rf` https://a.b/c?d=e&f=%20
"""
DECOMPOSED = unicodedata.normalize("NFD", "café naïve Ångström ế ợ žluť 한국어")
FRAGMENTS = [*WORDS.split(), *DECOMPOSED.split()]
SEPARATORS = [" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\r\n\n", ""]


def instructions(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice(FRAGMENTS) + draw.choice(SEPARATORS) for _ in range(draw.randint(1, 12)))
        for _ in range(count)
    ]


SPECIAL_INSTRUCTIONS = [
    "",
    "   \n\t \u3000",
    "?",
    "😀",
    "What is <|endoftext|> doing here, <|startoftext|>?",
    " ".join(FRAGMENTS),
    " ".join(random.Random(1).choices(text_tokenizers.TEXT.split(), k=500)),
    "字" * 300,
    "a" * 500 + " cat",
]


def clip_characters(text: str, tokens: Sequence[str]) -> list[set[int]]:
    """The characters of `text` that each of CLIP's tokens holds, found byte by byte from what CLIP does to a text."""
    clusters: list[list[int]] = []
    for place, letter in enumerate(text):
        before = "".join(text[k] for k in clusters[-1]) if clusters else ""
        if before and len(unicodedata.normalize("NFC", before + letter)) <= len(unicodedata.normalize("NFC", before)):
            clusters[-1].append(place)
        else:
            clusters.append([place])
    composed = [unicodedata.normalize("NFC", "".join(text[k] for k in cluster)) for cluster in clusters]
    assert "".join(composed) == unicodedata.normalize("NFC", text)
    lowered = ["".join(letter.lower() for letter in letters) for letters in composed]
    owners = [cluster for cluster, letters in zip(clusters, lowered, strict=True) for _ in letters]
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bytes_of = [
        owners[place]
        for match in regex.finditer(pattern, "".join(lowered))
        for place, letter in enumerate(match.group(), match.start())
        for _ in letter.encode()
    ]
    characters, place = [], 0
    for token in tokens:
        length = len(token.removesuffix("</w>"))
        characters.append({k for owner in bytes_of[place : place + length] for k in owner})
        place += length
    assert place == len(bytes_of)
    return characters


def llama_characters(text: str, tokens: Sequence[str]) -> list[set[int]]:
    """The characters of `text` that each of a LLaMA tokenizer's tokens holds, found byte by byte."""
    owners = [place for place, letter in enumerate(text) for _ in letter.encode()]
    tokens = ["" if token == "<s>" else token.replace("▁", " ") for token in tokens]
    lengths = [1 if token.startswith("<0x") else len(token.encode()) for token in tokens]
    place = len(owners) - sum(lengths)  # -1 where the tokenizer put a mark of its own before the text
    assert place in (0, -1)
    characters = []
    for length in lengths:
        characters.append({owners[k] for k in range(max(place, 0), place + length)})
        place += length
    return characters


def spans_by_characters(prompt: str, start: int, instruction: str, outputs: dict, row: int, processor) -> list[Range]:
    """What `clip_spans` must be, character by character, by way of no offsets at all."""
    windows = outputs["clip_input_ids"][row]
    clip = processor.clip_tokenizer
    places = [
        (number, slot)
        for number, window in enumerate(windows)
        if any(window)
        for slot in range(1, window.index(clip.eos_token_id))
    ]
    held = clip_characters(instruction, clip.convert_ids_to_tokens([windows[number][slot] for number, slot in places]))
    holders: dict[int, set[int]] = {}
    for number, characters in enumerate(held):
        for place in characters:
            holders.setdefault(start + place, set()).add(number)
    spans = []
    for characters in llama_characters(prompt, processor.tokenizer.convert_ids_to_tokens(outputs["input_ids"][row])):
        hits = sorted({number for place in characters for number in holders.get(place, ())})
        by_window: dict[int, list[int]] = {}
        for number in range(hits[0], hits[-1] + 1) if hits else ():
            by_window.setdefault(places[number][0], []).append(places[number][1])
        if not by_window:
            spans.append((0, 0))
            continue
        most = max(by_window, key=lambda window: len(by_window[window]))
        shift = (most - len(windows)) * len(windows[0])
        spans.append((shift + by_window[most][0], shift + by_window[most][-1] + 1))
    return spans


@pytest.fixture(scope="module")
def processor():
    return text_tokenizers.processor()


@pytest.mark.parametrize("prefix", ["USER: ", ""])
def test_alignment_agrees_with_one_made_character_by_character_on_hundreds_of_instructions(processor, prefix):
    texts = [*SPECIAL_INSTRUCTIONS, *instructions(300)]
    suffix = " ASSISTANT:" if prefix else ""
    prompts = [f"{prefix}{text}{suffix}" for text in texts]
    outputs = processor(text=prompts)
    matched = 0
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        expected = spans_by_characters(prompt, len(prefix), text, outputs, row, processor)
        assert [tuple(span) for span in outputs["clip_spans"][row]] == expected, prompt
        matched += any(span != (0, 0) for span in expected)
    assert matched >= 300


def test_alignment_takes_an_instruction_of_ten_thousand_words(processor):
    text = " ".join(random.Random(2).choices([*text_tokenizers.TEXT.split(), *FRAGMENTS], k=10_000))
    outputs = processor(text=f"USER: {text} ASSISTANT:")
    expected = spans_by_characters(f"USER: {text} ASSISTANT:", 6, text, outputs, 0, processor)
    assert [tuple(span) for span in outputs["clip_spans"][0]] == expected
    assert sum(span != (0, 0) for span in expected) > 10_000


# CLIP's BPE


def test_clip_tokenizer_has_the_ids_of_open_clips_own():
    ours, theirs = clip_tokenizer_from_open_clip(), SimpleTokenizer()
    assert (len(ours), ours.bos_token_id, ours.eos_token_id, ours.model_max_length) == (49408, 49406, 49407, 77)
    compared = 0
    for text in [*instructions(600, seed=3), *text_tokenizers.TEXT.split("\n")]:
        # open_clip repairs mojibake and HTML entities before it tokenizes, Hugging Face's CLIP does not.
        text = html.unescape(ftfy.fix_text(text))
        if ftfy.fix_text(text) == text == html.unescape(text):
            assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text
            compared += 1
    assert compared > 500


@pytest.mark.slow
def test_a_missing_open_clip_is_named(monkeypatch):
    monkeypatch.setattr("modeling_ivtp.checkpoints.clip_bpe.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        clip_tokenizer_from_open_clip()
