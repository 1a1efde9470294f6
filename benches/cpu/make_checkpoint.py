"""Write one random checkpoint in two formats, so that servelab and llama.cpp run the same weights.

    python make_checkpoint.py OUT_FOLDER

OUT_FOLDER/hf holds config.json, model.safetensors (bf16) and tokenizer.json; OUT_FOLDER/bf16.gguf
the same tensors for llama.cpp. The shape is SmolLM2-135M's, the weights are drawn from a seed, and
the tokenizer has one entry per id and no meaning. Needs torch, transformers, tokenizers and gguf.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 30, 576, 9, 3, 1536, 49_152
CONTEXT, THETA, EPS = 8192, 100_000.0, 1e-5


def vocabulary() -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{i}" for i in range(VOCABULARY - len(alphabet) - 1)]
    return ["<|end|>", *alphabet, *words]


def save_tokenizer(folder: Path, tokens: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        rms_norm_eps=EPS, rope_theta=THETA, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def to_interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: permute the rows."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def save_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str]) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("smollm2-135m-random")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u0120 w"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if ".q_proj." in name:
            tensor = to_interleaved(tensor, HEADS)
        elif ".k_proj." in name:
            tensor = to_interleaved(tensor, KV_HEADS)
        target = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    out = Path(sys.argv[1])
    folder = out / "hf"
    folder.mkdir(parents=True, exist_ok=True)
    tokens, model = vocabulary(), random_model()
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(folder, tokens)
    save_gguf(out / "bf16.gguf", model, tokens)


if __name__ == "__main__":
    main()
