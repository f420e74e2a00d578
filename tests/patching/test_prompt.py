"""How prompts shrink, against lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_fast.patching.prompt import (
    Placeholders,
    PromptLayout,
    padding_of,
    shrink_prompt,
)

IMAGE, VIDEO = 9, 10


def images(counts: list[int], lengths: list[int]) -> Placeholders:
    return Placeholders("image", IMAGE, counts, lengths)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[list[int]]], str]:
    """Rows of pieces: [token] is text, [placeholders, length] an image; and the padding side."""
    text = st.lists(st.integers(1, 8), min_size=1, max_size=1)
    image = st.lists(st.integers(1, 6), min_size=2, max_size=2).map(lambda x: [x[0], x[1] - 1])
    row = st.lists(st.one_of(text, image), max_size=6).map(lambda pieces: [[1], *pieces])
    return draw(st.lists(row, min_size=1, max_size=4)), draw(st.sampled_from(["left", "right"]))


BREAK, END = 11, 12


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_rows_against_lists(images_of_rows: list[list[int]]) -> None:
    """Images of rows of three placeholders, so many tokens in each; of one, breaks differ."""
    ids, source, spoilt_at = [1], [0], len(images_of_rows) - 1
    for number, lengths in enumerate(images_of_rows):
        for row, length in enumerate(lengths):
            source += [len(ids) + min(j, 2) for j in range(length)]
            is_last = row == len(lengths) - 1
            is_spoilt = number == spoilt_at and len(lengths) > 2
            if length or is_last or is_spoilt:
                source.append(len(ids) + 3)
            ids += [IMAGE] * 3 + [END if is_last else BREAK + row if is_spoilt else BREAK]
    counts = [3 * len(lengths) for lengths in images_of_rows]
    visual = Placeholders(
        "image", IMAGE, counts, list(map(sum, images_of_rows)), row_lengths=images_of_rows
    )
    layout = shrink_prompt(torch.tensor([ids]), None, [visual], padding_side="left")
    assert layout.source[0].tolist() == source
    assert int(layout.gone) == len(ids) - len(source)
    shown = [sum(each <= column for each in source) - 1 for column in range(len(ids))]
    assert layout.rows_of_columns()[0].tolist() == shown


@given(prompts())
@settings(max_examples=200, deadline=None)
def test_against_lists(case: tuple[list[list[list[int]]], str]) -> None:
    rows, side = case
    long, short, placeholders, lengths = [], [], [], []
    for pieces in rows:
        ids: list[int] = []
        source: list[int] = []
        for piece in pieces:
            if len(piece) == 1:
                source.append(len(ids))
                ids += piece
            else:
                count, length = piece
                source += [len(ids) + min(j, count - 1) for j in range(length)]
                ids += [IMAGE] * count
                placeholders.append(count)
                lengths.append(length)
        long.append(ids)
        short.append(source)

    width, shrunk = max(map(len, long)), max(map(len, short))
    pads = [width - len(ids) for ids in long]
    left = [pad if side == "left" else 0 for pad in pads]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    expected = torch.full((len(rows), shrunk), -1)
    for b, (tokens, source) in enumerate(zip(long, short, strict=True)):
        ids[b, left[b] : left[b] + len(tokens)] = torch.tensor(tokens)
        mask[b, left[b] : left[b] + len(tokens)] = 1
        start = shrunk - len(source) if side == "left" else 0
        expected[b, start : start + len(source)] = torch.tensor(source) + left[b]

    layout = shrink_prompt(ids, mask, [images(placeholders, lengths)], padding_side=side)
    assert torch.equal(layout.source, expected)
    assert layout.removed == width - shrunk

    # Positions as `generate` counts them, of the long and of the shrunk prompt.
    short_mask = layout.mask(mask)
    assert torch.equal(short_mask, (expected >= 0).long())
    if side == "left":
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        later = positions[:, -1:] + torch.arange(1, 4)
        moved = layout.positions(torch.cat([positions, later], 1))
        full = torch.cat([short_mask, torch.ones(len(rows), 3, dtype=torch.long)], 1)
        assert torch.equal(moved, (full.cumsum(1) - 1).masked_fill(full == 0, 0))
        assert torch.equal(layout.later_positions(later, 0, of_caller=True), moved[:, -3:])
        # Once it is known where the model's own went on, it shows whose these are.
        layout, own = layout.placed(positions), moved[:, -3:]
        held = torch.arange(layout.shrunk_length, layout.shrunk_length + 3)[None]
        for of_caller in (True, False):
            for given in (later, own, held):  # the caller's, the model's, the cache's columns
                for done in (0, 1):
                    cached = layout.shrunk_length + done
                    found = layout.later_positions(given[:, done:], cached, of_caller)
                    assert torch.equal(found, own[:, done:])
        other = later + 1000  # more than any prompt here loses or gains
        gone = later - own
        assert torch.equal(layout.later_positions(other, shrunk, of_caller=True), other - gone)
        assert torch.equal(layout.later_positions(other, shrunk, of_caller=False), other)


def test_masked_tokens_inside_stay() -> None:
    ids = torch.tensor([[0, 1, 2, 9, 9, 3, 0]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 1, 0]])
    layout = shrink_prompt(ids, mask, [images([2], [1])], padding_side="left")
    assert layout.source.tolist() == [[1, 2, 3, 5]]
    assert layout.mask(mask).tolist() == [[1, 0, 1, 1]]


def test_labels_of_a_first_column_are_never_predicted() -> None:
    ids = torch.tensor([[1, 9, 9, 2, 3], [1, 9, 9, 4, 5]])
    layout = shrink_prompt(ids, None, [images([2, 2], [1, 2])], padding_side="left")
    labels = layout.labels(ids.masked_fill(ids == IMAGE, -100))
    assert labels.tolist() == [[-100, -100, -100, 2, 3], [-100, -100, -100, 4, 5]]


def test_positions_of_packed_rows() -> None:
    """Two sequences a row, each with an image of 3 placeholders, of which fewer are left."""
    ids = torch.tensor([[1, 9, 9, 9, 2, 9, 9, 9, 3, 4], [1, 2, 9, 9, 9, 3, 4, 9, 9, 9]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    layout = shrink_prompt(ids, None, [images([3] * 4, [1, 2, 2, 0])], padding_side="left")
    assert layout.positions(positions).tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]]
    more = torch.cat([positions, torch.tensor([[5], [4]])], 1)
    assert layout.positions(more)[:, -1].tolist() == [4, 1]


def test_mask_only_where_it_is_needed() -> None:
    ids = torch.tensor([[1, 9, 9], [1, 9, 9]])
    layout = shrink_prompt(ids, None, [images([2, 2], [1, 1])], padding_side="left")
    assert layout.mask(None) is None
    layout = shrink_prompt(ids, None, [images([2, 2], [1, 2])], padding_side="left")
    assert layout.mask(None).tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("ids", "placeholders", "lengths", "message"),
    [
        ([[1, 9, 9, 2]], [3], [1], "Image features and image tokens do not match.*2.*expected 3"),
        ([[1, 9, 9, 2]], [], [], "holds 2 image tokens, expected 0 for 0 images"),
        ([[1, 9, 9, 9], [1, 9, 2, 2]], [2, 2], [1, 1], r"all image tokens.*\[3, 1\]"),
        ([[1, 2], [9, 9]], [2], [0], "nothing is left of prompt 1"),
    ],
)
def test_prompts_that_do_not_fit(
    ids: list[list[int]], placeholders: list[int], lengths: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shrink_prompt(torch.tensor(ids), None, [images(placeholders, lengths)], padding_side="left")


def test_a_prompt_without_any_token() -> None:
    ids, mask = torch.tensor([[1, 9, 9], [1, 2, 3]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"attention_mask: .*got none in prompt 1"):
        shrink_prompt(ids, mask, [images([2], [1])], padding_side="left")


def test_images_are_real_where_the_mask_leaves_them_out() -> None:
    """Their features have to go somewhere; they stay masked."""
    ids, mask = torch.tensor([[9, 9, 1, 2, 9, 9]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    layout = shrink_prompt(ids, mask, [images([2, 2], [1, 1])], padding_side="left")
    assert layout.source.tolist() == [[0, 2, 3, 4]]
    assert layout.mask(mask).tolist() == [[0, 1, 1, 0]]


def test_images_and_videos() -> None:
    """Each in its own placeholders, whatever their order."""
    ids = torch.tensor([[10, 10, 10, 1, 9, 9], [9, 9, 2, 10, 10, 10]])
    videos = Placeholders("video", VIDEO, [3, 3], [1, 2])
    layout = shrink_prompt(ids, None, [images([2, 2], [2, 1]), videos], padding_side="left")
    assert layout.source.tolist() == [[0, 3, 4, 5], [0, 2, 3, 4]]
    alone = shrink_prompt(ids, None, [videos], padding_side="left")
    assert alone.source.tolist() == [[-1, 0, 3, 4, 5], [0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"Video features and video tokens.*6 video.*expected 2"):
        shrink_prompt(ids, None, [videos._replace(counts=[2])], padding_side="left")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, ("left", 0)),
        ([[0, 1], [1, 1]], ("left", 0)),
        ([[1, 1], [1, 1]], ("left", 0)),
        ([[1, 0], [1, 1]], ("right", 0)),
        ([[0, 1, 0], [1, 1, 1]], ("left", 1)),
        ([[0, 1, 1, 1], [1, 1, 0, 0]], ("left", 2)),
    ],
)
def test_padding_of(mask: list[list[int]] | None, expected: tuple[str, int]) -> None:
    assert padding_of(None if mask is None else torch.tensor(mask)) == expected


def test_last_columns_stay() -> None:
    ids = torch.tensor([[0, 1, 9, 9, 2, 0, 0], [1, 3, 9, 9, 4, 5, 0]])
    mask = (ids != 0).long()
    layout = shrink_prompt(ids, mask, [images([2, 2], [1, 1])], padding_side="left", last_columns=2)
    assert layout.source.tolist() == [[-1, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6]]
    assert layout.mask(mask).tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_later_positions_behind_padding_on_both_sides() -> None:
    ids = torch.tensor([[0, 1, 9, 9, 9, 2, 0, 0], [1, 3, 4, 5, 6, 7, 8, 2]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    later = mask.sum(1, keepdim=True)
    for side in ("left", "right"):
        layout = shrink_prompt(ids, mask, [images([3], [1])], padding_side=side)
        short = layout.mask(mask)
        moved = layout.later_positions(later, 0, of_caller=True)
        assert torch.equal(moved, short.sum(1, keepdim=True))
        assert torch.equal(layout.positions(positions) * short, (short.cumsum(1) - 1) * short)


def test_rows_that_are_repeated() -> None:
    layout = PromptLayout(torch.tensor([[0], [1]]), 2, torch.ones(2, 1), torch.ones(2, 1))
    assert layout.for_rows(2) is layout
    assert layout.for_rows(4).source.tolist() == [[0], [0], [1], [1]]
    assert layout.for_rows(4).gone.shape == (4, 1)
    with pytest.raises(ValueError, match="cache of 3 sequences, got one of 2"):
        layout.for_rows(3)
