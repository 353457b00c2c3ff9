#!/usr/bin/env python3
"""Write a random-weight llama model as GGUF, so that llama.cpp's own server streams tokens with nothing downloaded.

usage: make_gguf.py OUT.gguf [LAYERS=2] [WIDTH=64]
needs: pip install gguf numpy

The same arguments always write the same model. 2 64 is 0.7 MB and emits thousands of tokens a second;
8 384 is 76 MB and slow enough for a test to leave in mid-stream or during the prefill.
"""

import os
import sys

import gguf
import numpy as np

HEADS = 4
CONTEXT_TOKENS = 8192
SEED = 7

# Words that become one token each: text that looks like SSE framing, and characters whose UTF-8 bytes are
# spread over several tokens, because a relay must not care about either.
WORDS = [
    " the", " and", " stream", " token", " gateway", "hello", " world", "ing", " of", " to", " is",
    "\n\n", "\r\n", "data: ", "event: ", "id: ", "[DONE]", "é", "日", "本", "語", "🚀",
]  # fmt: skip
CONTROL_TOKENS = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet():
    """GPT-2's printable stand-in for each of the 256 byte values."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def vocabulary():
    """Tokens and byte-pair merges: every byte, and every prefix of every word."""
    alphabet = byte_alphabet()
    tokens, merges = list(alphabet), []
    for word in WORDS:
        head, *rest = (alphabet[byte] for byte in word.encode())
        for part in rest:
            merge, head = f"{head} {part}", head + part
            if merge not in merges:
                merges.append(merge)
            if head not in tokens:
                tokens.append(head)
    return tokens, merges


def write_model(path, layers=2, width=64):
    """Write the model to `path` by way of a temporary file, so that a killed run leaves no half model behind."""
    generator = np.random.default_rng(SEED)
    tokens, merges = vocabulary()
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS)
    tokens += CONTROL_TOKENS
    vocabulary_size, inner_width = len(tokens), 4 * width

    temporary = f"{path}.{os.getpid()}.part"
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name("tiny-random")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner_width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_vocab_size(vocabulary_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocabulary_size - 4)
    writer.add_eos_token_id(vocabulary_size - 3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    def add_matrix(name, *shape, scale=None):
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, values * np.float32(scale or shape[-1] ** -0.5))

    add_matrix("token_embd.weight", vocabulary_size, width, scale=1.0)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    add_matrix("output.weight", vocabulary_size, width, scale=0.02)
    for layer in range(layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{norm}.weight", np.ones(width, np.float32))
        for projection in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add_matrix(f"{block}{projection}.weight", width, width)
        add_matrix(f"{block}ffn_gate.weight", inner_width, width)
        add_matrix(f"{block}ffn_up.weight", inner_width, width)
        add_matrix(f"{block}ffn_down.weight", width, inner_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    write_model(sys.argv[1], *map(int, sys.argv[2:]))
