"""Clusters of training texts by their embeddings, and the way from a new text to its cluster: `cluster_texts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ArgumentError, DataError
from ..ops.arguments import check_integer

if TYPE_CHECKING:
    import torch

__all__ = ["TextClusters", "cluster_texts"]


@dataclass(frozen=True)
class TextClusters:
    """assignments : cluster of each text, int64 (N,). centroids : (k, d), float32; of norm 1 with metric cosine.

    inertia : sum of squared distances (of embeddings of norm 1, with cosine). sizes : texts per cluster.
    """

    assignments: torch.Tensor
    centroids: torch.Tensor
    inertia: float
    sizes: tuple[int, ...]
    metric: Literal["cosine", "euclidean"]

    def route(self, embeddings: Any, *, temperature: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        """(nearest cluster (M,), weight of every cluster (M, k), rows summing to 1) for new texts.

        embeddings : (M, d). temperature : of the softmax over similarities (cosine, or minus the squared distance),
        1e-100 or more; the smaller, the nearer to the nearest cluster alone. The weights serve as `weights` of a merge.

        Raises
        ------
        ArgumentError : another width, or an unusable temperature. DataError : NaN or Inf.
        """
        import torch

        if not isinstance(temperature, (int, float)) or not 1e-100 <= temperature < float("inf"):
            raise ArgumentError(
                "temperature is not usable", code="texts.temperature", expected="1e-100 or more", got=repr(temperature)
            )
        x = _points(embeddings, self.metric)
        if x.shape[1] != self.centroids.shape[1]:
            raise ArgumentError(
                "the embeddings have another width",
                code="texts.width",
                expected=str(self.centroids.shape[1]),
                got=str(x.shape[1]),
            )
        centroids = self.centroids.to(x)
        score = x @ centroids.mT if self.metric == "cosine" else -torch.cdist(x, centroids).square()
        return score.argmax(1), torch.softmax(score / temperature, 1).to(torch.float32)


def cluster_texts(
    embeddings: Any,
    k: int,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    n_starts: int = 10,
    max_iter: int = 100,
    seed: int = 0,
) -> TextClusters:
    """Group training texts by embeddings that the caller has, so that one adapter can be tuned on each group.

    embeddings : (N, d), a tensor or what torch.as_tensor takes; N at most 32768. k : clusters, 1 to
    N. metric : "cosine" compares embeddings of norm 1. n_starts, max_iter, seed : as for `ops.cluster`.

    Raises
    ------
    ArgumentError, DataError : unusable values; NaN, Inf, or with cosine an embedding of zeros.
    """
    import torch

    from ..ops import cluster

    if metric not in ("cosine", "euclidean"):
        raise ArgumentError("metric is not usable", code="texts.metric", expected="cosine, euclidean", got=repr(metric))
    x = _points(embeddings, metric)
    if x.shape[0] > 32768:
        raise ArgumentError(
            "too many texts",
            code="texts.count",
            expected="at most 32768",
            got=str(x.shape[0]),
            hint="Cluster a sample and route the rest.",
        )
    k = check_integer(k, 1, x.shape[0] + 1, "k")
    found = cluster(x, k, n_starts=n_starts, max_iter=max_iter, seed=seed)
    member = torch.nn.functional.one_hot(found.labels, k).to(x)
    centroids = (member.mT @ x) / member.sum(0)[:, None]
    if metric == "cosine":
        norms = torch.linalg.vector_norm(centroids, dim=1, keepdim=True)
        centroids = centroids / torch.where(norms > 0, norms, torch.ones_like(norms))
    return TextClusters(found.labels, centroids.to(torch.float32), found.inertia, found.sizes, metric)


def _points(embeddings: Any, metric: str) -> torch.Tensor:
    """The embeddings in float64, of norm 1 for cosine."""
    import torch

    try:
        x = torch.as_tensor(embeddings).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "embeddings are not numbers",
            code="texts.type",
            expected="a tensor, or what torch.as_tensor takes",
            got=type(embeddings).__name__,
        ) from error
    if x.is_complex():
        raise ArgumentError("embeddings are complex", code="texts.type", expected="real numbers", got=str(x.dtype))
    if x.ndim != 2 or not x.shape[0] or not x.shape[1]:
        raise ArgumentError(
            "embeddings are not a matrix", code="texts.shape", expected="(texts, width)", got=str(tuple(x.shape))
        )
    x = x.to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise DataError("the embeddings hold NaN or Inf", code="texts.nonfinite")
    if metric == "cosine":
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            first = int((norms[:, 0] == 0).nonzero()[0])
            raise DataError(f"the embedding of text {first} is zero", code="texts.zero", hint="metric='euclidean'.")
        x = x / norms
    return x
