"""Negative log-likelihood of the answers' tokens, the same in training and evaluation."""

from __future__ import annotations

from typing import Any

import torch

from feinwerk.cli.data import Batch


def answer_nll(model: Any, batch: Batch) -> torch.Tensor:
    """Return the negative log-likelihood of every answer token.

    The head (49,152 x 576 here, a fifth of the model) runs only where a token of an answer is
    predicted. Padding stands on the right and attention is causal, so no mask is needed.

    Args:
        model: a causal language model of transformers, with or without PEFT adapters.
        batch: the tokens and where to look.

    Returns:
        fp32 [batch.targets.numel()], in nats, in the order of `batch.targets`.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.get_decoder()(input_ids=batch.tokens, use_cache=False).last_hidden_state
    logits = causal.get_output_embeddings()(hidden[batch.predicts])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
