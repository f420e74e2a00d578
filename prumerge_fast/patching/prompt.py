"""How a prompt shrinks with its images: which of the caller's tokens the language model sees.

The caller's prompt has a placeholder token for every patch; the language model gets fewer. A
`PromptLayout` maps one to the other, for everything that has a value per token, and stays on the KV
cache so that later steps may go on in the caller's terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prumerge_fast.versions import cache_argument

IGNORED_LABEL = -100  # what transformers' losses skip


class Placeholders(NamedTuple):
    """The images, or the videos, whose tokens stand in prompts.

    Args:
        modality: `"image"` or `"video"`.
        token_id: Id of their placeholder token.
        counts: Number of placeholders of each in the caller's prompt.
        lengths: Number of tokens of each.
        places: [sum of lengths] int64 on the CPU, the placeholder of its own image whose position
            each token has; `None`: positions close the gaps.
        row_lengths: Number of tokens of each row of each image, whose placeholders are as many rows
            of equal length; `None`: an image is one row.
    """

    modality: str
    token_id: int
    counts: list[int]
    lengths: list[int]
    places: Tensor | None = None
    row_lengths: list[list[int]] | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """Number of placeholders and of tokens of each row of all images, [rows] int64 each."""
        counts, lengths = self.counts, self.lengths
        if self.row_lengths is not None:
            rows = list(zip(counts, self.row_lengths, strict=True))
            counts = [count // len(of_image) for count, of_image in rows for _ in of_image]
            lengths = [length for _, of_image in rows for length in of_image]
        return torch.tensor(counts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The shrunk prompt of B sequences in terms of the caller's.

    Args:
        source: [B, S] int64, the caller's column that each position comes from; -1 for padding.
        length: Number of columns L of the caller's prompt. Later tokens correspond one to one.
        gone: [B, 1] int64, tokens that each prompt lost, padding apart; once `placed`, those of the
            row's last sequence, by which the caller's positions behind it are greater than a count
            of what is left.
        last: [B, 1] int64, the caller's column of each prompt's last token.
        next_position: [B, 1] int64, the model's position of the first token behind the prompt;
            `None` until `placed`.
        stands: [B, S] int64, the caller's column whose position each token has, -1 for padding;
            `None` where the model counts what is left.
    """

    source: Tensor
    length: int
    gone: Tensor
    last: Tensor
    next_position: Tensor | None = None
    stands: Tensor | None = None

    @property
    def shrunk_length(self) -> int:
        """S, the number of columns of the shrunk prompt."""
        return self.source.shape[1]

    @property
    def removed(self) -> int:
        """L - S, how many columns the prompt lost."""
        return self.length - self.shrunk_length

    def for_rows(self, rows: int) -> PromptLayout:
        """The layout after each sequence was repeated, as beams and returned sequences are.

        Raises:
            ValueError: `rows` is no multiple of B.
        """
        batch = self.source.shape[0]
        if rows == batch:
            return self
        if rows % batch:
            raise ValueError(
                f"{cache_argument()}: expected a cache of {rows} sequences, got one of {batch}"
            )
        return self.repeated(rows // batch)

    def rows(self, index: Any) -> PromptLayout:
        """The layout of these of the B sequences: an index [b], a mask [B], a slice."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device) if isinstance(index, Tensor) else index]

        return self._with_each(chosen)

    def repeated(self, times: int) -> PromptLayout:
        """The layout of each sequence so many times, one after another."""
        return self._with_each(lambda tensor: tensor.repeat_interleave(times, 0))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> PromptLayout:
        following = None if self.next_position is None else change(self.next_position)
        stands = None if self.stands is None else change(self.stands)
        source, gone, last = map(change, (self.source, self.gone, self.last))
        return replace(
            self, source=source, gone=gone, last=last, next_position=following, stands=stands
        )

    def placed(self, position_ids: Tensor) -> PromptLayout:
        """The layout of a prompt to which the caller gave positions [B or 1, L + g]."""
        position_ids = position_ids[:, : self.length]
        last = self._last_token().to(position_ids.device)  # [B, 1]
        rows = position_ids.expand(len(last), -1)  # [B, L]
        following = rows.gather(1, self.last.to(position_ids.device)) + 1  # [B, 1]
        counted = self._without_gaps(position_ids).gather(1, last) + 1  # [B, 1]
        own = counted if self.stands is None else following
        return replace(self, gone=following - counted, next_position=own)

    def _last_token(self) -> Tensor:
        """Where the last token of each shrunk prompt is, [B, 1]."""
        here = torch.arange(self.shrunk_length, device=self.source.device)
        return here.where(self.source >= 0, -1).argmax(1, keepdim=True)

    def columns(self) -> Tensor:
        """Positions [B, S] of a prompt whose caller gave none: those of its columns.

        Padding goes on counting, as in the plain model, which numbers it too.
        """
        columns = torch.arange(self.length, device=self.source.device)[None]  # [1, L]
        positions = self.positions(columns)  # [B, S]
        is_token = self.source >= 0
        first = is_token.int().argmax(1, keepdim=True)  # [B, 1]
        last = self._last_token()  # [B, 1]
        here = torch.arange(self.shrunk_length, device=self.source.device)  # [S]
        nearest = first.where(here < first, last)  # token to padding, [B, S]
        counted = positions.gather(1, nearest) + here - nearest
        # No model need have more of them than the prompt has columns.
        counted = counted.clamp(0, max(self.length, self.shrunk_length) - 1)
        return positions.where(is_token, counted)

    def ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The shrunk prompt's ids [B, S + g], padded with the id that the caller padded with."""
        padding = None if attention_mask is None else input_ids[attention_mask == 0]
        fill = 0 if padding is None or not len(padding) else int(padding[0])
        return self.gather(input_ids, fill)

    def gather(self, values: Tensor, fill: int | bool) -> Tensor:
        """Values per token of the caller's sequence [B, L + g] for the shrunk one [B, S + g]."""
        return self._gather(values, self.source, fill)

    def _gather(self, values: Tensor, columns: Tensor, fill: int | bool) -> Tensor:
        """Values [B, L + g] of these columns [B, S] of the caller's, and of what is behind them."""
        columns = columns.to(values.device)
        prompt = values[:, : self.length].gather(1, columns.clamp(min=0))  # [B, S]
        prompt = prompt.masked_fill(columns < 0, fill)
        return torch.cat([prompt, values[:, self.length :]], dim=1)

    def rows_of_columns(self) -> Tensor:
        """The shrunk prompt's position that stands for each of the caller's columns, [B, L] int64.

        A token that is there stands for itself; an image's placeholders hold its tokens in order,
        the last of them repeated to the image's last placeholder, so that the column in front of
        the text behind an image predicts it. (Of an image without tokens, what is in front of it.)
        Outer padding is the nearest padding there is, and where there is none the first or last
        token.
        """
        source = self.source  # [B, S]
        here = torch.arange(self.shrunk_length, device=source.device)
        columns = torch.arange(self.length, device=source.device).expand(len(source), -1)  # [B, L]
        final = here.where(source >= 0, -1).amax(1, keepdim=True)  # [B, 1]
        ascending = source.masked_fill(here > final, self.length)  # padding in front is -1
        up_to = torch.searchsorted(ascending, columns.contiguous(), right=True)  # [B, L]
        begin = (ascending < 0).sum(1, keepdim=True)  # [B, 1]
        first = ascending.gather(1, begin)  # [B, 1]
        in_front = begin - first + columns
        behind = (columns - self.last.to(source.device)).clamp(min=0)
        rows = torch.where(up_to == begin, in_front, up_to - 1 + behind)
        return rows.clamp(0, self.shrunk_length - 1)

    def labels(self, labels: Tensor) -> Tensor:
        """Labels [B, S] of the tokens that are left.

        No token comes before column 0, so its label was never predicted; behind padding that a
        row gets here, it would be.
        """
        shrunk = self.gather(labels, IGNORED_LABEL)  # [B, S]
        return shrunk.masked_fill(self.source.to(shrunk.device) == 0, IGNORED_LABEL)

    def mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """The attention mask [B, S + g]; `None` as long as none is needed."""
        if attention_mask is not None:
            return self.gather(attention_mask, 0)
        padding = self.source < 0  # [B, S]
        return (~padding).long() if padding.any() else None

    def positions(self, position_ids: Tensor) -> Tensor:
        """The model's positions [B, S + g], of the caller's [B or 1, L + g]."""
        if self.stands is None:
            return self._without_gaps(position_ids)
        return self._gather(position_ids.expand(len(self.stands), -1), self.stands, 0)

    def _without_gaps(self, position_ids: Tensor) -> Tensor:
        """Position ids [B or 1, L + g] without the gaps of the tokens that are gone: [B, S + g].

        Where positions fall, as where one sequence of a packed row ends and the next begins, the
        tokens gone are counted anew.
        """
        position_ids = position_ids.expand(self.source.shape[0], -1)  # [B, L + g]
        columns = torch.arange(position_ids.shape[1], device=position_ids.device)  # [L + g]
        source = self.gather(columns.expand_as(position_ids), -1)  # [B, S + g]
        is_token = source >= 0
        first = source.where(is_token, len(columns)).min(1, keepdim=True).values  # [B, 1]
        falls = torch.nn.functional.pad(position_ids.diff(dim=1) < 0, (1, 0))  # [B, L + g]
        run = columns.where(falls | (columns == first), 0).cummax(1).values  # where it begins
        run = run.gather(1, source.clamp(min=0)).where(is_token, -1)  # [B, S + g]

        here = torch.arange(source.shape[1], device=source.device)  # [S + g]
        begins = torch.nn.functional.pad(run.diff(dim=1) != 0, (1, 0), value=True)
        begin = here.where(begins, 0).cummax(1).values  # [B, S + g]
        gone = (source - run) - (here - begin)
        shrunk = position_ids.gather(1, source.clamp(min=0)) - gone
        return shrunk.masked_fill(~is_token, 0)

    def later_positions(self, position_ids: Tensor, cached: int, of_caller: bool) -> Tensor:
        """Positions [B, q] of tokens behind `cached` ones, given as [B or 1, q] in any terms.

        They may go on from the caller's prompt, from a count of the tokens left, or from the number
        of columns that the cache holds. Of others, `of_caller` says whether the tokens gone count.
        """
        gone = self.gone.to(position_ids.device)  # [B, 1]
        # What either count is greater by than the model's own.
        callers, left = (gone, 0 * gone) if self.stands is None else (0 * gone, -gone)
        shift = callers if of_caller else left
        following = self.next_position  # [B, 1]
        if following is None:
            return position_ids - shift
        following = following.to(position_ids.device) + cached - self.shrunk_length
        first = position_ids[:, :1]
        # On the device, so that nothing waits for it.
        goes_on = (
            (first == following + callers).all()
            | (first == following + left).all()
            | (first == cached).all()
        )
        return position_ids - torch.where(goes_on, first - following, shift)


def shrink_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    visual: Sequence[Placeholders],
    *,
    padding_side: Literal["left", "right"],
    last_columns: int = 0,
) -> PromptLayout:
    """Lay out prompts in which each image has as many tokens as it has, in place of placeholders.

    Placeholders belong to images in the order of the prompts. An image keeps its first ones, or
    those of each of its rows; with more tokens than placeholders, the last placeholder stands for
    the rest. Where one token ends each row of an image but the last, it goes with the row's last
    token. A prompt's outer padding is dropped and laid anew, so that prompts of unequal length fit;
    masked tokens inside stay.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L] or None (no padding).
        visual: The images, the videos, or both.
        padding_side: Where shorter rows are filled up.
        last_columns: Number of columns at the end that stay, padding or not.

    Raises:
        ValueError: Placeholders and images do not match, an image is cut by the end of a prompt,
            or nothing is left of one.
    """
    ids = input_ids.cpu()  # [B, L]
    repeats = torch.ones_like(ids, dtype=torch.int64)  # [B, L]
    is_visual = torch.zeros_like(ids, dtype=torch.bool)  # [B, L]
    for placeholders in visual:
        is_placeholder = ids == placeholders.token_id  # [B, L]
        _check_placeholders(is_placeholder, placeholders)
        repeats[is_placeholder] = _copies(placeholders)
        repeats[_lost_breaks(ids, is_placeholder, placeholders)] = 0
        is_visual |= is_placeholder
    real = torch.ones_like(is_visual) if attention_mask is None else attention_mask.cpu() != 0
    if not real.any(1).all():
        raise ValueError(
            "attention_mask: expected a token to attend to in each prompt, got none in prompt "
            f"{int((~real.any(1)).int().argmax())}"
        )
    stays = torch.arange(ids.shape[1]) >= ids.shape[1] - last_columns  # [L]
    inside = _inside(real | is_visual | stays)  # [B, L]
    repeats *= inside

    counts = repeats.sum(1)  # [B]
    width = int(counts.max())
    if not counts.all():
        empty = int((counts == 0).int().argmax())
        raise ValueError(f"input_ids: nothing is left of prompt {empty} without its image tokens")
    columns = torch.arange(ids.shape[1]).expand_as(ids)  # [B, L]
    slots = torch.arange(width)
    filled = (  # [B, S]
        slots >= (width - counts)[:, None] if padding_side == "left" else slots < counts[:, None]
    )
    source = torch.full(filled.shape, -1)
    source[filled] = columns.flatten().repeat_interleave(repeats.flatten())
    gone = (inside.sum(1) - counts)[:, None]  # [B, 1]
    last = columns.where(inside, -1).argmax(1, keepdim=True)  # [B, 1]
    stands = _stands(ids, source, visual)
    if stands is not None:
        stands = stands.to(input_ids.device)
    return PromptLayout(source.to(input_ids.device), ids.shape[1], gone, last, stands=stands)


def padding_of(attention_mask: Tensor | None) -> tuple[Literal["left", "right"], int]:
    """How to shrink a prompt without moving it: `padding_side` and `last_columns`.

    Rows padded on the right begin in the first column, others end in the last: prompts padded on
    the left, with answers padded on the right behind them, too, whose columns stay.
    """
    if attention_mask is None or not attention_mask.numel():
        return "left", 0
    real = (attention_mask != 0).cpu()  # [B, L]
    trailing = int((real.flip(1).cumsum(1) == 0).sum(1).max())
    if trailing and bool(real[:, 0].all()):
        return "right", 0
    return "left", trailing


def _copies(placeholders: Placeholders) -> Tensor:
    """How many tokens each placeholder stands for, [sum of counts] int64."""
    expected, given = placeholders.rows()
    ends = expected.cumsum(0)
    ordinal = torch.arange(sum(placeholders.counts))
    row = torch.searchsorted(ends, ordinal, right=True)  # [placeholders]
    offset = ordinal - (ends - expected)[row]
    extra = (given - expected).clamp(min=0)[row]
    return (offset < given[row]) + extra * (offset == expected[row] - 1)


def _lost_breaks(ids: Tensor, is_placeholder: Tensor, placeholders: Placeholders) -> Tensor:
    """Which of the ids [B, L] end a row of an image that has no tokens, [B, L] bool.

    Of an image whose rows are not all ended by one token, none is: its id is not known here.
    """
    lost = torch.zeros_like(is_placeholder)
    if placeholders.row_lengths is None:
        return lost
    images = is_placeholder.nonzero().split(placeholders.counts)  # [count, 2] each
    for places, lengths in zip(images, placeholders.row_lengths, strict=True):
        prompt, columns = places[0, 0], places[:, 1].view(len(lengths), -1)  # [rows, count / rows]
        width = columns.shape[1] + 1
        expected = columns[0, 0] + torch.arange(len(lengths) * width).view(-1, width)
        breaks = expected[:-1, -1]  # [rows - 1]
        if torch.equal(columns, expected[:, :-1]) and (ids[prompt, breaks].diff() == 0).all():
            lost[prompt, breaks] = torch.tensor(lengths[:-1]) == 0
    return lost


def _stands(ids: Tensor, source: Tensor, visual: Sequence[Placeholders]) -> Tensor | None:
    """`PromptLayout.stands` of prompts [B, L] of whose columns `source` [B, S] is left."""
    placed = [(each, each.places) for each in visual if each.places is not None]
    if not placed:
        return None
    shown = ids.gather(1, source.clamp(min=0)).where(source >= 0, -1)  # [B, S]
    stands = source.clone()
    for placeholders, places in placed:
        columns = (ids == placeholders.token_id).nonzero()[:, 1]  # [sum of counts]
        counts = torch.tensor(placeholders.counts, dtype=torch.int64)  # [images]
        lengths = torch.tensor(placeholders.lengths, dtype=torch.int64)  # [images]
        first = (counts.cumsum(0) - counts).repeat_interleave(lengths)  # [sum of lengths]
        stands[shown == placeholders.token_id] = columns[first + places]
    return stands


def _check_placeholders(is_placeholder: Tensor, placeholders: Placeholders) -> None:
    modality, counts = placeholders.modality, placeholders.counts
    tokens, features = int(is_placeholder.sum()), sum(counts)
    if tokens != features:
        raise ValueError(
            f"{modality.capitalize()} features and {modality} tokens do not match: input_ids holds "
            f"{tokens} {modality} tokens, expected {features} for {len(counts)} {modality}s"
        )
    row_ends = is_placeholder.sum(1).cumsum(0)
    image_ends = torch.tensor([0, *counts]).cumsum(0)
    if not torch.isin(row_ends, image_ends).all():
        raise ValueError(
            f"input_ids: expected each prompt to hold all {modality} tokens of its {modality}s, "
            f"got {is_placeholder.sum(1).tolist()} {modality} tokens in the prompts"
        )


def _inside(real: Tensor) -> Tensor:
    """Columns from the first to the last real one of each row, [B, L] bool."""
    return (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
