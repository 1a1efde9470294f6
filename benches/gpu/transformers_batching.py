"""transformers' continuous batching with the lengths of a run of servelab. Prints JSON.

Random weights in the same shape, bf16, greedy, every answer as long as wanted.
"""

import argparse
import json
import random
import sys
import time

SHAPES = {
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def lengths(path):
    """Of the measured requests: tokens of the prompt and of the answer."""
    with open(path) as lines:
        records = [json.loads(line) for line in lines]
    wanted = [(r["wanted_input_tokens"], r["wanted_output_tokens"]) for r in records if r["phase"] == "measured"]
    if not wanted:
        sys.exit(f"{path} has no measured request")
    return wanted


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("requests")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    options = arguments.parse_args()
    wanted = lengths(options.requests)

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    shape = dict(SHAPES[options.shape])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(options.device).eval()
    draw = random.Random(1)
    prompts = [[draw.randrange(1000, 30_000) for _ in range(count)] for count, _ in wanted]
    # No token ends an answer.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024)

    manager = model.init_continuous_batching(generation_config=generation)

    def run(prompts, answers):
        """Seconds until all answers are there, and their tokens."""
        began, ended, tokens = time.monotonic(), 0, 0
        for prompt, count in zip(prompts, answers):
            manager.add_request(prompt, max_new_tokens=count)
        while ended < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    sys.exit("the batching thread ended")
                continue
            if result.error is not None:
                sys.exit(f"a request failed: {result.error}")
            if result.is_finished():
                ended += 1
                tokens += len(result.generated_tokens)
        return time.monotonic() - began, tokens

    manager.start()
    try:
        # Its cache is made with the first requests.
        run(prompts[:16], [4] * 16)
        seconds, tokens = run(prompts, [count for _, count in wanted])
    finally:
        manager.stop(block=True)
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": str(model.config._attn_implementation),
        "requests": len(wanted),
        "input_tokens": sum(count for count, _ in wanted),
        "wanted_output_tokens": sum(count for _, count in wanted),
        "output_tokens": tokens,
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds,
    }
    json.dump(result, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
