"""How a prompt shrinks with its images: which of the caller's tokens the language model sees.

The caller's prompt has a placeholder token for every patch; the language model gets fewer. A
`PromptLayout` maps one to the other, for everything that has a value per token, and stays on the KV
cache so that later steps may go on in the caller's terms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prumerge_fast.versions import cache_argument

IGNORED_LABEL = -100  # what transformers' losses skip
_CACHE_ATTRIBUTE = "_prumerge_layout"
# Methods of a KV cache that rearrange its sequences.
_REPEAT = "batch_repeat_interleave"
_ROW_METHODS = ("reorder_cache", "batch_select_indices", _REPEAT)


class Placeholders(NamedTuple):
    """The images, or the videos, whose tokens stand in prompts.

    Args:
        modality: `"image"` or `"video"`.
        token_id: Id of their placeholder token.
        counts: Number of placeholders of each in the caller's prompt.
        lengths: Number of tokens of each.
    """

    modality: str
    token_id: int
    counts: list[int]
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The shrunk prompt of B sequences in terms of the caller's.

    Args:
        source: [B, S] int64, the caller's column that each position comes from; -1 for padding.
        length: Number of columns L of the caller's prompt. Later tokens correspond one to one.
        gone: [B, 1] int64, by how much positions behind the prompt are less than the caller's: the
            tokens that each prompt lost, padding apart.
        next_position: [B, 1] int64, the model's position of the first token behind the prompt, once
            `placed`.
    """

    source: Tensor
    length: int
    gone: Tensor
    next_position: Tensor | None = None

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
        return self.rows(torch.arange(batch).repeat_interleave(rows // batch))

    def rows(self, index: Tensor) -> PromptLayout:
        """The layout of these of the B sequences, as an index [b] or a mask [B]."""
        tensors: dict[str, Any] = {
            name: tensor[index.to(tensor.device)]
            for name, tensor in vars(self).items()
            if isinstance(tensor, Tensor)
        }
        return replace(self, **tensors)

    def placed(self, position_ids: Tensor | None) -> PromptLayout:
        """The layout of a prompt that the model ran with positions [B or 1, S + g].

        Without any, `forward` numbers the columns, padding among them, here and for the caller.
        """
        if position_ids is None:
            gone = torch.full_like(self.gone, self.removed)
            return replace(self, gone=gone, next_position=self.shrunk_length + 0 * gone)
        last = self.source.shape[1] - 1 - (self.source >= 0).flip(1).int().argmax(1, keepdim=True)
        last = last.to(position_ids.device)  # [B, 1]
        following = position_ids.expand(len(last), -1).gather(1, last) + 1
        return replace(self, next_position=following)

    def ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The shrunk prompt's ids [B, S + g], padded with the id that the caller padded with."""
        padding = None if attention_mask is None else input_ids[attention_mask == 0]
        fill = 0 if padding is None or not len(padding) else int(padding[0])
        return self.gather(input_ids, fill)

    def gather(self, values: Tensor, fill: int | bool) -> Tensor:
        """Values per token of the caller's sequence [B, L + g] for the shrunk one [B, S + g]."""
        source = self.source.to(values.device)  # [B, S]
        prompt = values[:, : self.length].gather(1, source.clamp(min=0))  # [B, S]
        prompt = prompt.masked_fill(source < 0, fill)
        return torch.cat([prompt, values[:, self.length :]], dim=1)

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

    def later_positions(self, position_ids: Tensor, later: int, of_caller: bool) -> Tensor:
        """Position ids [B or 1, q] of tokens behind the prompt and `later` more, as [B, q].

        Positions that go on from the caller's go without the tokens gone; those that go on from
        the model's, as when a loop counts what the cache holds, stay. Of others, `of_caller` says
        which they are.
        """
        gone = self.gone.to(position_ids.device)  # [B, 1]
        if self.next_position is not None:
            ahead = position_ids[:, :1] - self.next_position.to(position_ids.device) - later
            of_caller = bool((ahead == gone).all()) or (of_caller and bool(ahead.any()))
        return position_ids - gone if of_caller else position_ids.expand(len(gone), -1)


def shrink_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    visual: Sequence[Placeholders],
    *,
    padding_side: Literal["left", "right"],
    last_columns: int = 0,
) -> PromptLayout:
    """Lay out prompts in which each image has as many tokens as it has, in place of placeholders.

    Placeholders belong to images in the order of the prompts. An image keeps its first ones; with
    more tokens than placeholders, its last placeholder stands for the rest. A row's outer padding
    is dropped and laid anew, so that rows of unequal length fit; masked tokens inside stay.

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
    return PromptLayout(source.to(input_ids.device), input_ids.shape[1], gone)


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


def remember_layout(cache: Any, layout: PromptLayout) -> None:
    """Note on a KV cache that it holds the shrunk form of the caller's prompt.

    Where its sequences are rearranged, the layout's are too.
    """
    setattr(cache, _CACHE_ATTRIBUTE, layout)
    for name in _ROW_METHODS:
        if hasattr(type(cache), name):
            setattr(cache, name, functools.partial(_rearrange, cache, name))


def forget_layout(cache: Any) -> None:
    """Make later steps take the cache's prompt as it is."""
    for name in (_CACHE_ATTRIBUTE, *_ROW_METHODS):
        if name in getattr(cache, "__dict__", ()):
            delattr(cache, name)


def _rearrange(cache: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """A cache's own method, which takes the rows or how often to repeat each, and its layout."""
    held = cache.layers[0].keys.shape[0]
    getattr(type(cache), name)(cache, *args, **kwargs)
    (rows,) = (*args, *kwargs.values())
    if name == _REPEAT:
        rows = torch.arange(held).repeat_interleave(rows)
    layout = getattr(cache, _CACHE_ATTRIBUTE).for_rows(held)
    setattr(cache, _CACHE_ATTRIBUTE, layout.rows(torch.as_tensor(rows)))


def remembered_layout(cache: Any) -> PromptLayout | None:
    """The layout of the prompt in a KV cache; `None` if it holds none that was shrunk.

    Raises:
        ValueError: The cache holds less than the prompt, after it was cropped. (A static cache of
            transformers 4 miscounts itself where the first sequence has padding.)
    """
    layout = getattr(cache, _CACHE_ATTRIBUTE, None)
    if layout is None:
        return None
    cached = int(cache.get_seq_length())
    if cached == 0:  # reset, to be used for another prompt
        forget_layout(cache)
        return None
    if cached < layout.shrunk_length:
        raise ValueError(
            f"{cache_argument()}: expected a cache that holds the whole prompt, "
            f"{layout.shrunk_length} tokens after pruning, got one of length {cached}"
        )
    return layout


def _copies(placeholders: Placeholders) -> Tensor:
    """How many tokens each placeholder stands for, [sum of counts] int64."""
    expected = torch.tensor(placeholders.counts, dtype=torch.int64)  # [images]
    given = torch.tensor(placeholders.lengths, dtype=torch.int64)  # [images]
    ends = expected.cumsum(0)
    ordinal = torch.arange(sum(placeholders.counts))
    image = torch.searchsorted(ends, ordinal, right=True)  # [placeholders]
    offset = ordinal - (ends - expected)[image]
    extra = (given - expected).clamp(min=0)[image]
    return (offset < given[image]) + extra * (offset == expected[image] - 1)


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
