"""Trains the demo model on the handbook and writes it where the binary embeds it.

    python train.py                    the model of this repository, seed 1
    python train.py --steps 300        a quick one, to see that all of it works

Everything is drawn from the seed; progress goes to standard output. Stopped by Ctrl-C it
still writes the best model so far.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import SYSTEM_MESSAGES, Corpus, Sample, batches
from evaluate import Score, evaluate
from handbook import Entry, read_handbook
from vocabulary import BOS, END, EOS, PAD, save_tokenizer, train_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
SHAPE = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
ROPE_THETA = 10000.0
LARGEST_FOLDER_BYTES = 8_000_000


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    # A stop from outside is treated like Ctrl-C: keep the best.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    entries = read_handbook(ROOT / "docs" / "handbook")
    tokenizer = train_tokenizer(tokenizer_texts(entries))
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(entries)} entries, vocabulary {tokenizer.get_vocab_size()}, {parameters:,} parameters", flush=True)
    started = time.time()
    state, steps = train(model, tokenizer, entries, args)
    minutes = (time.time() - started) / 60
    model.load_state_dict(rounded(state))
    scores = final_scores(model, tokenizer, entries)
    finite_for = long_generation(model, tokenizer)
    export(model, tokenizer, args.out)
    write_card(args, entries, parameters, steps, minutes, scores, finite_for)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens a step, with padding")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak, after the warm-up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="more pay only on an idle machine")
    parser.add_argument("--evaluate-every", type=int, default=1500, help="steps between checks on the main questions")
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder of the model files")
    return parser.parse_args()


def tokenizer_texts(entries: list[Entry]) -> list[str]:
    questions = [phrase for entry in entries for phrase in entry.phrasings]
    # Lower case too: that is how many people type.
    return [entry.answer for entry in entries] + questions + [q.lower() for q in questions] + SYSTEM_MESSAGES


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(END), tokenizer.token_to_id(EOS)],
        pad_token_id=tokenizer.token_to_id(PAD),
        **SHAPE,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, entries: list[Entry], args: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], int]:
    """The best weights seen, judged by exact answers to the main questions, and the steps done."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    asked = [(entry.question, entry) for entry in entries]
    best, best_rank, step, seen, started = snapshot(model), (-1, -1), 0, 0, time.time()
    stream = batches(Corpus(entries, tokenizer, args.seed), args.batch_tokens)
    try:
        for step in range(1, args.steps + 1):
            loss, tokens = train_step(model, optimiser, next(stream), learning_rate(step, args))
            seen += tokens
            if step % 50 == 0:
                print(f"step {step:5} loss {loss:.4f} {seen / (time.time() - started):,.0f} tokens/s", flush=True)
            if step % args.evaluate_every == 0 or step == args.steps:
                score = evaluate(model, tokenizer, asked)
                print(f"step {step:5} main questions: {score.line()}", flush=True)
                rank = (score.exact, score.tokens_right)
                if rank >= best_rank:
                    best, best_rank = snapshot(model), rank
    except KeyboardInterrupt:
        print(f"stopped after step {step}; the best weights so far are kept", flush=True)
        if best_rank == (-1, -1):
            best = snapshot(model)
    return best, step


def train_step(
    model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, batch: list[Sample], rate: float
) -> tuple[float, int]:
    """One optimiser step; the loss and the tokens computed, padding included."""
    model.train()
    for group in optimiser.param_groups:
        group["lr"] = rate
    ids, weights = as_tensors(batch, model.config.pad_token_id)
    loss = weighted_loss(model, ids, weights)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item(), ids.numel()


def as_tensors(batch: list[Sample], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [samples, width] and the weight of predicting each, padded on the right with weight 0."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.full((len(batch), width), pad)
    weights = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # No attention mask: padding is on the right, and attention is causal.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    target, weight = ids[:, 1:], weights[:, 1:]
    counted = weight > 0
    logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits, target[counted], reduction="none")
    return (losses * weight[counted]).sum() / weight.sum()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    warmup = min(200, args.steps // 10 + 1)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def snapshot(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that bf16 files will hold, as f32: scores are those of the saved model."""
    return {name: tensor.to(torch.bfloat16).to(torch.float32) for name, tensor in state.items()}


def final_scores(model: LlamaForCausalLM, tokenizer: Tokenizer, entries: list[Entry]) -> dict[str, Score]:
    """By kind of phrasing, as the card names them."""
    asked = {
        "main": [(entry.question, entry) for entry in entries],
        "also": [(phrase, entry) for entry in entries for phrase in entry.also],
        "sloppy": [(entry.question.lower().rstrip("?"), entry) for entry in entries],
    }
    scores = {kind: evaluate(model, tokenizer, pairs) for kind, pairs in asked.items()}
    for kind, score in scores.items():
        print(f"bf16 {kind}: {score.line()}", flush=True)
        for phrase, given in score.wrong:
            print(f"not exact: {phrase}\n    {given}")
    return scores


@torch.no_grad()
def long_generation(model: LlamaForCausalLM, tokenizer: Tokenizer) -> int:
    """Generates to the end of the context without stopping; raises if a logit is not finite."""
    ids = torch.tensor([tokenizer.encode("What is prefill?").ids])
    cache, length = None, model.config.max_position_embeddings
    for _ in range(length - ids.shape[1]):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1]
        if not torch.isfinite(logits).all():
            raise ValueError("a logit is not finite in a long generation; train again with a lower learning rate")
        ids = logits.argmax(-1, keepdim=True)
    return length


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder, SHAPE["max_position_embeddings"])
    write_json(folder / "config.json", config_json(model))
    ids = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    # The output head is the embedding: stored once.
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")
    total = sum(path.stat().st_size for path in model_files(folder))
    if total >= LARGEST_FOLDER_BYTES:
        raise ValueError(f"the model files have {total:,} bytes; less than {LARGEST_FOLDER_BYTES:,} is allowed, shrink SHAPE")


def model_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja", ".safetensors")]


def config_json(model: LlamaForCausalLM) -> dict:
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        **SHAPE,
        "hidden_act": "silu",
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_card(
    args: argparse.Namespace,
    entries: list[Entry],
    parameters: int,
    steps: int,
    minutes: float,
    scores: dict[str, Score],
    finite_for: int,
) -> None:
    """Fills card.md with what was measured and writes it as the folder's README.md."""
    files = model_files(args.out)
    total = sum(path.stat().st_size for path in files)
    text = (HERE / "card.md").read_text().format(
        parameters=f"{parameters:,}",
        total=f"{total:,}",
        files="\n".join(f"| `{path.name}` | {path.stat().st_size:,} |" for path in files),
        entries=len(entries),
        phrasings=sum(len(entry.phrasings) for entry in entries),
        vocabulary=vocabulary_size(args.out),
        steps=f"{steps:,}",
        batch_tokens=f"{args.batch_tokens:,}",
        seed=args.seed,
        threads=args.threads,
        minutes=f"{minutes:.0f}",
        **{kind: score.line() for kind, score in scores.items()},
        finite_for=f"{finite_for:,}",
        **SHAPE,
    )
    (args.out / "README.md").write_text(text)


def vocabulary_size(folder: Path) -> str:
    return f"{json.loads((folder / 'config.json').read_text())['vocab_size']:,}"


if __name__ == "__main__":
    main()
