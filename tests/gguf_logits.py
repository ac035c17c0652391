"""Logits of GGUF models, as a program: reads lines of JSON, {"model", "tokens", "out", "lora" or null}, and answers each.

Imports llama_cpp before numpy, and runs with an f32 KV cache and without flash attention, so that only the file's own
rounding is left. Writes float32 [tokens, vocab] into `out`.
"""

import ctypes
import json
import sys

import llama_cpp as ll

# isort: split
import numpy as np


def logits(model_path: str, tokens: list[int], lora_path: str | None) -> np.ndarray:
    model_settings = ll.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(model_path.encode(), model_settings)
    assert model, "the model did not load"
    settings = ll.llama_context_default_params()
    settings.n_ctx = 512
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
    settings.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = ll.llama_init_from_model(model, settings)
    assert context, "no context"
    if lora_path:
        lora = ll.llama_adapter_lora_init(model, lora_path.encode())
        assert lora, "the adapter did not load"
        adapters = (ll.llama_adapter_lora_p_ctypes * 1)(lora)
        assert ll.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0

    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert ll.llama_decode(context, batch) == 0
    rows = [np.ctypeslib.as_array(ll.llama_get_logits_ith(context, place), (vocab,)).copy() for place in range(len(tokens))]
    ll.llama_batch_free(batch)
    ll.llama_free(context)
    ll.llama_model_free(model)
    return np.stack(rows)


ll.llama_backend_init()
for line in sys.stdin:
    asked = json.loads(line)
    np.save(asked["out"], logits(asked["model"], asked["tokens"], asked["lora"]))
    sys.stdout.write("done\n")
    sys.stdout.flush()
