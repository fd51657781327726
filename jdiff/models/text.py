"""A text encoder in BERT's manner, and a tokenizer that needs no vocabulary: the bytes themselves.

tokens, mask = tokenize(["a red square", "a circle"], 32)
sequence, pooled = encoder.apply(variables, tokens, mask)
dit.apply(variables, x, label, (sequence, mask))
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.models.embed import check_index, nan_outside
from jdiff.models.registry import register_model
from jdiff.models.transformer import Block

PAD, BEGIN, END, SPECIAL = 0, 1, 2, 3
VOCABULARY = SPECIAL + 256


def tokenize(prompts: str | Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), both (B, length): begin, the UTF-8 bytes, end, padding; the mask is True up to the end.

    A prompt longer than length - 2 bytes is cut. Raises ValueError for a length below 2.
    """
    if length < 2:
        raise ValueError(f"tokenize: length must be at least 2, for begin and end, got {length}")
    rows = [prompts] if isinstance(prompts, str) else list(prompts)
    tokens = np.full((len(rows), length), PAD, np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        ids = [BEGIN, *(SPECIAL + byte for byte in prompt.encode()[: length - 2]), END]
        row[: len(ids)] = ids
    return tokens, tokens != PAD


class TextEncoder(nn.Module):
    """Token and position embeddings, a norm, then post-norm self-attention blocks; padding is never seen.

    Devlin et al. 2018, arXiv:1810.04805. `length` is the longest text; `remat` recomputes each block in the backward
    pass. It takes (tokens, mask), not (x, label, cond), and makes the `cond` of other networks: see `embed`.
    """

    width: int = 256
    depth: int = 4
    heads: int = 4
    ratio: float = 4.0
    length: int = 128
    vocabulary: int = VOCABULARY
    epsilon: float = 1e-12
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens, mask=None):
        """tokens: (B, L) integers; mask: (B, L), True for text, once a row at least, or None.

        A traced token outside the vocabulary makes its sample nan; one that is known now raises ValueError.
        Returns ((B, L, width), pooled (B, width)), pooled tanh(W h) of the first token, `tokenize`'s beginning.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.length or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens are {tokens.dtype}{tokens.shape}; expected integers (B, L), L up to length={self.length}"
            )
        tokens = check_index("tokens", tokens, self.vocabulary, tokens.shape)
        init = nn.initializers.truncated_normal(0.02)
        h = nn.Embed(self.vocabulary, self.width, embedding_init=init, name="token")(tokens)
        h = nan_outside(tokens, self.vocabulary, h)
        positions = nn.Embed(self.length, self.width, embedding_init=init, name="position")
        h = h + positions(jnp.arange(tokens.shape[1]))[None]
        h = nn.LayerNorm(self.epsilon, use_fast_variance=False, name="norm")(h)
        h = h if self.dtype is None else h.astype(self.dtype)
        make = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            block = make(
                self.heads, self.ratio, post=True, epsilon=self.epsilon, kernel_init=init, dtype=self.dtype,
                name=f"block_{i}",
            )  # fmt: skip
            h = block(h, mask)
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        return h, nn.tanh(nn.Dense(self.width, kernel_init=init, name="pooled")(h[:, 0]))


def embed(encoder: TextEncoder, variables: Any, prompts: str | Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """(embeddings (B, length, width), mask (B, length)) of prompts: the `cond` of a DiT with context=width."""
    tokens, mask = tokenize(prompts, encoder.length)
    return encoder.apply(variables, tokens, mask)[0], jnp.asarray(mask)


@register_model
def text_encoder(**overrides):
    """A text encoder of 4 layers of 256 for prompts of up to 126 bytes: 3.3M parameters; see `tokenize`."""
    return TextEncoder(**overrides)
