"""The vocabulary's key space: the vectors that a head compares a hidden state with, in clusters.

After "Correlation and Navigation in the Vocabulary Key Space of Language Models" (arXiv
2410.02284): tokens whose vectors are alike get alike ranks, whether they fit or not. The clusters
are those of k-means: seeds of k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from scipy.cluster.vq import vq
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from jaxlm.config import check, integer_at_least
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.model.quantized import whole
from jaxlm.model.transformer import Transformer

# Keys that are compared with all centres at a time.
CHUNK = 4096


def keys_of(
    model: Transformer, params: Mapping[str, Any], tokenizer: Tokenizer
) -> Float[np.ndarray, "V D"]:
    """The head's vector of each of the tokenizer's tokens, float32, tied to the embedding or not.

    A model's vocabulary may be rounded up: rows that no token has are left out.
    """
    tied = model.config.embedding.tied
    rows = whole(params, "embedding") if tied else whole(params, "head").T
    return np.asarray(rows[: tokenizer.vocab_size].astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class KeySpace:
    """Clusters of keys.

    Attributes:
        cluster_ids: of each token, int32; a model's ids from V on are in none.
        centers: the mean of each cluster's keys, float32.
    """

    cluster_ids: Int[np.ndarray, "V"]
    centers: Float[np.ndarray, "K D"]

    @classmethod
    def fit(
        cls,
        keys: Shaped[Array | np.ndarray, "V D"],
        num_clusters: int = 1024,
        normalize: bool = False,
        iterations: int = 50,
        seed: int = 0,
    ) -> KeySpace:
        """K-means, the same for the same arguments; a cluster that loses all of its keys begins
        again at the key that is farthest from its centre.

        Args:
            keys: as of `keys_of`.
            num_clusters: K.
            normalize: keys are compared by direction alone.
            iterations: most of Lloyd's; fewer where none moves a key.
            seed: of the first centres.

        Raises:
            ValueError: more clusters than there are different keys, fewer than 2, or a key that is
                not finite.
        """
        x = np.array(keys, np.float32, order="C")
        finite = np.isfinite(x).all(1)
        if not finite.all():
            told = "holds inf or nan; allowed: finite numbers"
            raise ValueError(f"key_space: keys[{int(np.flatnonzero(~finite)[0])}] {told}")
        few = integer_at_least(num_clusters, 2)[1] and num_clusters <= len(x)
        check(
            "key_space",
            num_clusters=(num_clusters, few, f"an integer from 2 to {len(x)}, the keys that are"),
            iterations=integer_at_least(iterations, 1),
            seed=integer_at_least(seed, 0),
        )
        if normalize:
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        centers = _first_centers(x, num_clusters, seed)
        ids, far = _nearest(x, centers)
        for _ in range(iterations):
            centers = _means(x, ids, far, centers)
            before = ids
            ids, far = _nearest(x, centers)
            if (ids == before).all():
                break
        return cls(ids, centers)

    def members(self, cluster: int) -> list[int]:
        """Tokens of a cluster, in order.

        Raises:
            ValueError: no such cluster.
        """
        most = len(self.centers) - 1
        fine = integer_at_least(cluster, 0)[1] and cluster <= most
        check("key_space", cluster=(cluster, fine, f"an integer from 0 to {most}"))
        return np.flatnonzero(self.cluster_ids == cluster).tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes both arrays, as NumPy's .npz."""
        with Path(path).open("wb") as file:
            np.savez(file, cluster_ids=self.cluster_ids, centers=self.centers)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KeySpace:
        """What `save` wrote.

        Raises:
            ValueError: no such file, or one of another form.
        """
        try:
            with np.load(path) as saved:
                return cls(saved["cluster_ids"], saved["centers"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            told = f"allowed: a file that KeySpace.save wrote ({error})"
            raise ValueError(f"key_space={str(path)!r}; {told}") from error


def _first_centers(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    """K-means++: each of the keys with a probability that grows with the square of its distance
    from those chosen before. In float64, in which the distance of two that are equal is 0.
    """
    draws = np.random.default_rng(seed)
    chosen, far = [int(draws.integers(len(x)))], np.full(len(x), np.inf)
    while len(chosen) < count:
        newest = x[chosen[-1:]]
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            far[part] = np.minimum(far[part], cdist(x[part], newest, "sqeuclidean")[:, 0])
        if not far.any():
            told = f"allowed: at most {len(chosen)}, as no more keys differ"
            raise ValueError(f"key_space: num_clusters={count}; {told}")
        chosen.append(int(draws.choice(len(x), p=far / far.sum())))
    return x[chosen]


def _nearest(x: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key's centre, and how far it is: never [V, K] distances at a time."""
    parts = [vq(x[i : i + CHUNK], centers) for i in range(0, len(x), CHUNK)]
    ids, far = (np.concatenate(each) for each in zip(*parts, strict=True))
    return ids.astype(np.int32), far


def _means(x: np.ndarray, ids: np.ndarray, far: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Of each cluster's keys; of those that have none, one each of the farthest keys."""
    counts = np.bincount(ids, minlength=len(centers))
    belongs = csr_array((np.ones_like(far), ids, np.arange(len(x) + 1)), (len(x), len(centers)))
    means = (belongs.T @ x) / np.maximum(counts, 1).astype(np.float32)[:, None]
    empty = counts == 0
    means[empty] = x[np.argsort(-far, kind="stable")[: empty.sum()]]
    return means


def key_overlap(
    logits: Float[Array, "B V"], key_space: KeySpace, top_n: int = 100
) -> Float[Array, "B"]:
    """How much of the probability of the `top_n` most probable tokens is in the cluster of the
    first of them: 1: all look alike.

    Raises:
        ValueError: more tokens than have a cluster, or none.
    """
    known = len(key_space.cluster_ids)
    fine = integer_at_least(top_n, 1)[1] and top_n <= known
    check("key_overlap", top_n=(top_n, fine, f"an integer from 1 to {known}"))
    best, tokens = jax.lax.top_k(logits[:, :known], top_n)
    clusters = jnp.asarray(key_space.cluster_ids)[tokens]
    return jnp.where(clusters == clusters[:, :1], jax.nn.softmax(best), 0.0).sum(1)
