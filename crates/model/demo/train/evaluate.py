"""Greedy answers against the handbook: exact match and token accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from handbook import Entry
from vocabulary import ASSISTANT, BOS, END, PAD, USER

LONGEST_ANSWER = 192


@dataclass
class Score:
    exact: int
    asked: int
    tokens_right: int
    tokens: int
    wrong: list[tuple[str, str]]

    def line(self) -> str:
        return (
            f"exact {self.exact}/{self.asked} ({self.exact / self.asked:.1%}), "
            f"token accuracy {self.tokens_right / self.tokens:.2%}"
        )


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, asked: list[tuple[str, Entry]]) -> Score:
    """Asks each phrasing alone, greedily; token accuracy is teacher-forced over the answers."""
    model.eval()
    score = Score(0, len(asked), 0, 0, [])
    for start in range(0, len(asked), 64):
        part = asked[start : start + 64]
        prompts = [prompt_ids(tokenizer, phrase) for phrase, _ in part]
        answers = [tokenizer.encode(entry.answer + END, add_special_tokens=False).ids for _, entry in part]
        right = teacher_forced(model, tokenizer, prompts, answers)
        score.tokens_right += right
        score.tokens += sum(map(len, answers))
        for (phrase, _), given, wanted in zip(part, greedy(model, tokenizer, prompts), answers):
            if given == wanted:
                score.exact += 1
            else:
                score.wrong.append((phrase, tokenizer.decode(given)))
    return score


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """What the chat template gives for one user message."""
    text = f"{BOS}{USER}\n{question}{END}\n{ASSISTANT}\n"
    return tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    """The generated ids of each prompt, up to and with the end token."""
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return [cut(row, end) for row in out[:, width:].tolist()]


def cut(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


@torch.no_grad()
def teacher_forced(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]], answers: list[list[int]]
) -> int:
    """How many answer tokens are the most likely one after the right tokens before them."""
    pad = tokenizer.token_to_id(PAD)
    rows = [p + a for p, a in zip(prompts, answers)]
    width = max(map(len, rows))
    # Padding stands on the right, where a causal model never looks.
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    guesses = model(input_ids=ids).logits.argmax(-1)
    hits = 0
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        span = slice(len(prompt) - 1, len(row) - 1)
        hits += int((guesses[i, span] == ids[i, 1:][span]).sum())
    return hits
