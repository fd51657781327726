"""A text encoder in the manner of BERT, and a tokenizer that needs no vocabulary: its tokens are bytes.

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
    """The tokens of prompts: a begin, the UTF-8 bytes, an end, then padding.

    Args:
        prompts: one text or several.
        length: of the rows. A prompt of more than length - 2 bytes is cut.

    Returns:
        (tokens, mask), both (B, length); the mask is True up to the end.

    Raises:
        ValueError: for a length below 2.

    >>> tokenize("ab", 6)[0].tolist()
    [[1, 100, 101, 2, 0, 0]]
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
    """Token and position embeddings, a norm, then post-norm self-attention blocks, which do not see the padding.

    It takes (tokens, mask), where other networks take (x, label, cond), and makes the `cond` of these: see `embed`.

    Args:
        width: of the tokens.
        depth: the number of blocks.
        heads: attention heads.
        ratio: the width inside the feed-forward layers over `width`.
        length: of the longest text.
        vocabulary: the number of different tokens.
        epsilon: what norms add to the variance.
        remat: whether each block is computed again in the backward pass.
        dtype: of dense layers and attention; None for float32. Parameters, norms and output are float32.

    Reference: Devlin et al. 2018, arXiv:1810.04805.
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
        """Embed tokens.

        Args:
            tokens: integers (B, L), L at most `length`.
            mask: (B, L), True for text, at least once in each row; None for all.

        Returns:
            ((B, L, width), pooled (B, width)), pooled being tanh(W h) of the first token. A traced token outside the
            vocabulary makes its sample nan.

        Raises:
            ValueError: for another rank, length or dtype, and for known tokens outside the vocabulary.
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


def embed(encoder: nn.Module, variables: Any, prompts: str | Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Prompts as the `cond` of a DiT with context=width.

    Args:
        encoder: a `TextEncoder`, as `create_model` returns it.
        variables: its variables.
        prompts: one text or several.

    Returns:
        (embeddings (B, length, width), mask (B, length)).
    """
    tokens, mask = tokenize(prompts, encoder.length)
    return encoder.apply(variables, tokens, mask)[0], jnp.asarray(mask)


@register_model
def text_encoder(**overrides):
    """A text encoder of 4 layers of 256 for prompts of up to 126 bytes: 3.3M parameters; see `tokenize`."""
    return TextEncoder(**overrides)
