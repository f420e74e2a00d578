"""Scenes as conversations: token ids, masks and the loss of LLaVA's two language stages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prumerge_fast.demo import IMAGE_TOKEN, PREFIX, SUFFIX, recipe
from prumerge_fast.demo.scenes import PLACE, Scene

IGNORE = -100  # a label that counts for nothing

# What is asked about a scene, in turn, behind its description. Finding an object by colour and
# shape is the hard part; descriptions and "where" teach it faster than yes and no.
MIX = (
    "position", "count", PLACE, "existence", "position",
    "colour", "position", "shape", "count", "position",
)  # fmt: skip
DROPPED = 0.1  # share of the visual tokens that are scaled down in training

Turn = tuple[list[int], list[int]]  # ids and labels


class Conversations:
    """Turns scenes into token ids; all turns about a scene share its prefix and its image tokens.

    Each turn attends to the prefix and to itself alone and counts its positions from the prefix's
    end, so that a turn is computed exactly as if it were a prompt of its own, but the image tokens
    are read once for all of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, turns: int) -> None:
        self.tokenizer, self.turns = tokenizer, turns
        ids = tokenizer(PREFIX)["input_ids"]
        self.prefix = ids[: ids.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))]
        self.offset = len(self.prefix) + recipe.GRID**2

    def description(self, scene: Scene) -> list[Turn]:
        return [self.turn(recipe.DESCRIBE, scene.describe())]

    def instructions(self, scene: Scene) -> list[Turn]:
        return self.description(scene) + self.questions(scene)

    def questions(self, scene: Scene) -> list[Turn]:
        asked = (scene.question(MIX[t % len(MIX)], variant=1 + t) for t in range(self.turns))
        return [self.turn(question.text, question.answer) for question in asked if question]

    def span(self, scene: Scene) -> int:
        """How many positions the image takes up, drawn at random for three scenes out of four.

        A language model that has read nothing but questions behind 196 image tokens ties them to
        that place and fails where it changes; Vicuna, which has read texts of all lengths, does
        not. Randomised positions (Ruoss et al. 2023, arXiv 2305.16843) make up for that.
        """
        patches = recipe.GRID**2
        rng = scene.stream("span")
        return patches if rng.random() < 0.25 else int(rng.integers(patches // 8, 5 * patches // 4))

    def turn(self, question: str, answer: str) -> Turn:
        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        asked = encode(SUFFIX.format(question=question))
        answered = [*encode(f" {answer}"), self.tokenizer.eos_token_id]
        return asked + answered, [IGNORE] * len(asked) + answered

    def batch(
        self, conversations: list[list[Turn]], spans: list[int] | None = None
    ) -> tuple[Tensor, ...]:
        """ids and labels [B, T], positions [B, S], mask [B, 1, S, S]; S = prefix + N + T.

        Args:
            conversations: The turns of each scene.
            spans: How many positions each image takes up; N, as in a real prompt, for `None`.
        """
        longest = max(sum(len(ids) for ids, _ in turns) for turns in conversations)
        size, start = len(conversations), self.offset
        ids = torch.full((size, longest), self.tokenizer.pad_token_id)
        labels = torch.full((size, longest), IGNORE)
        positions = torch.arange(start + longest).repeat(size, 1)
        owner = torch.full((size, start + longest), -1)  # -1: padding, 0: prefix, t: turn t
        owner[:, :start] = 0
        before, patches = len(self.prefix), recipe.GRID**2
        for b, turns in enumerate(conversations):
            span = patches if spans is None else spans[b]
            positions[b, before:start] = before + torch.arange(patches) * span // patches
            at = 0
            for t, (turn_ids, turn_labels) in enumerate(turns, start=1):
                end = at + len(turn_ids)
                ids[b, at:end] = torch.tensor(turn_ids)
                labels[b, at:end] = torch.tensor(turn_labels)
                positions[b, start + at : start + end] = before + span + torch.arange(len(turn_ids))
                owner[b, start + at : start + end] = t
                at = end
        same = owner[:, :, None] == owner[:, None, :]
        causal = torch.ones(start + longest, start + longest, dtype=torch.bool).tril()
        mask = causal & (same | (owner[:, None, :] == 0))  # [B, S, S]
        return ids, labels, positions, mask[:, None]


def token_scales(scenes: list[Scene]) -> Tensor:
    """Factors [B, N, 1] that scale a tenth of the visual tokens down: dropout of whole tokens.

    The language model's normalisation blows up what a token of small norm says. Unless it has
    learnt to leave such tokens alone, one of them can drown all others.
    """
    scales = np.ones((len(scenes), recipe.GRID**2, 1), np.float32)
    for b, scene in enumerate(scenes):
        rng = scene.stream("dropout")
        dropped = rng.random(scales.shape[1]) < DROPPED
        scales[b, dropped, 0] = rng.random(dropped.sum())
    return torch.from_numpy(scales)


def conversation_loss(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    prefix: list[int],
    batch: tuple[Tensor, ...],
    scales: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the answers' tokens.

    Args:
        model: The model; its tower is not trained.
        pixels: [B, 3, H, W].
        prefix: Token ids before the image.
        batch: What `Conversations.batch` returns.
        scales: What `token_scales` returns, [B, N, 1].
    """
    ids, labels, positions, mask = batch
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        features = tower.hidden_states[recipe.FEATURE_LAYER][:, 1:]  # [B, N, C]
        if scales is not None:
            features = features * scales.to(features.dtype)
    image = model.model.multi_modal_projector(features)
    embed = model.get_input_embeddings()
    start = embed(torch.tensor(prefix)).expand(len(ids), -1, -1)
    embeds = torch.cat([start.to(image.dtype), image, embed(ids).to(image.dtype)], 1)  # [B, S, D]
    bias = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill(
        ~mask, torch.finfo(embeds.dtype).min
    )
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=bias, position_ids=positions, use_cache=False
    ).last_hidden_state
    predicting = hidden[:, -ids.shape[1] - 1 : -1]  # the state before each token predicts it
    answered = labels != IGNORE
    logits = model.lm_head(predicting[answered]).float()
    return F.cross_entropy(logits, labels[answered])
