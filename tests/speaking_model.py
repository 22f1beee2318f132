"""A tiny chat model that says one of a few sentences, each with its probability, whatever it is asked."""

import math

import torch
from tiny_model import make_tokenizer
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM

YES, MUMBLE, ENDLESS = "Judgment: Is the solution correct (Yes/No)? Yes", "I cannot say.", "and so on "
SHARES = {YES: 0.6, MUMBLE: 0.25, ENDLESS: 0.15}
HIDDEN, NEVER = 64, -60.0


def save(folder, positions=8192):
    """Model and tokenizer; heads of 32, the smallest that vLLM has on a CPU."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in SHARES])
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    ids = {sentence: tokenizer.convert_tokens_to_ids(sentence) for sentence in SHARES}
    # What is said next depends on the last token alone: it is something asked, a sentence that ends, or the endless one.
    asked, ends, endless = range(3)
    state = torch.full((len(tokenizer),), asked)
    state[[ids[YES], ids[MUMBLE]]] = ends
    state[ids[ENDLESS]] = endless
    logits = torch.full((len(tokenizer), 3), NEVER)
    for sentence, share in SHARES.items():
        logits[ids[sentence], asked] = math.log(share)
    logits[tokenizer.eos_token_id, ends] = 0.0
    logits[ids[ENDLESS], endless] = 0.0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN)[state])
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :3] = logits / math.sqrt(HIDDEN)  # the norm gives unit vectors this length
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
