"""The whole of it: compile a model with the backend, and generate."""

from __future__ import annotations

import smollm2
import torch

import apack_compile

tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
compiled = torch.compile(model, backend="attentionpack")

story = "Once upon a time a cat, a dog and a parrot lived in a house by the sea. " * 80
ids = smollm2.chat(tokenizer, story + "\n\nWhere did the animals live?")
out = compiled.generate(ids, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)

print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
print(apack_compile.cache_bytes(out.past_key_values))
print(apack_compile.report(compiled))
