"""Metrics: of held-out pairs by the ranks of right answers, of published sets CLIP_benchmark's.

Shares are of answers, which are returned too, so that two models can be compared on each.
"""

import numpy as np
import torch
from torch import Tensor

# --- Held-out pairs -------------------------------------------------------------------------------


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong answers do not score below the best right one. (Q, M) twice -> (Q,).

    Equal scores and NaN count as wrong.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


# The k of each question's metrics, by the pattern of their names.
WITHIN = {
    "zero-shot top-{}": (1, 5), "zero-shot top-{} without flags": (1, 5),
    "image to text R@{}": (1, 5, 10), "text to image R@{}": (1, 5, 10),
}  # fmt: skip


def hits(found: dict[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
    """Which answers are right (Q,), by metric, from ranks (Q,) by question.

    A k that is not below the fewest examples of a question is left out: no answer could be wrong.
    """
    fewest = min(map(len, found.values()), default=0)
    return {
        question.format(k): np.asarray(rank) < k
        for question, rank in found.items() for k in WITHIN.get(question, ()) if k < fewest
    }  # fmt: skip


def zero_shot(images: Tensor, names: Tensor, concept: np.ndarray, flags: np.ndarray) -> dict:
    """Ranks over all names, and without flags. (M, E), (names, E), (M,), (names,)."""
    wanted = torch.from_numpy(concept)
    right = wanted[:, None] == torch.arange(len(names))
    result = {"zero-shot top-{}": ranks(images @ names.T, right)}
    plain = torch.from_numpy(~flags)
    if 0 < plain.sum() < len(names):
        pictures, answers = plain[wanted], torch.nonzero(plain)[:, 0]
        right = wanted[pictures][:, None] == answers
        found = ranks(images[pictures] @ names[plain].T, right)
        result["zero-shot top-{} without flags"] = found
    return result


def retrieval(images: Tensor, texts: Tensor, concept: Tensor) -> dict:
    """Ranks both ways: an answer is right if its caption is. (M, E), (C, E), (M,)."""
    scores, right = images @ texts.T, concept[:, None] == torch.arange(len(texts))
    return {"image to text R@{}": ranks(scores, right),
            "text to image R@{}": ranks(scores.T, right.T)}  # fmt: skip


# --- Published sets: CLIP_benchmark's metrics, by its names ---------------------------------------


def named(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """acc1, acc5: whether each picture's class is found. (M, C), (M,) -> (M,) each."""
    hits = {"acc1": scores.argmax(dim=1) == labels}
    if scores.shape[1] >= 5:
        hits["acc5"] = (scores.topk(5).indices == labels[:, None]).any(dim=1)
    return hits


def shares(hits: dict[str, Tensor]) -> dict[str, float]:
    """The share of right answers, by metric."""
    return {metric: right.double().mean().item() for metric, right in hits.items()}


def per_class(right: np.ndarray, labels: np.ndarray) -> float:
    """The share of right answers, mean over the classes in labels. (n,) twice."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, right)[counts > 0] / counts[counts > 0]).mean())


def classification(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """acc1, acc5, mean_per_class_recall; of two classes roc_auc. (M, C), (M,)."""
    hits = named(scores, labels)
    result = shares(hits)
    if "acc5" in hits:
        result["mean_of_acc1_acc5"] = (result["acc1"] + result["acc5"]) / 2
    result["mean_per_class_recall"] = per_class(hits["acc1"].numpy(), labels.numpy())
    if scores.shape[1] == 2 and len(labels.unique()) == 2:
        from sklearn.metrics import roc_auc_score

        result["roc_auc"] = float(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    return result


def retrieved(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """R@1/5/10 both ways: whether one right answer is among k. (M, E), (T, E), owner (T,) < M.

    A k that is not below the number of candidates is left out: no answer could be wrong.
    """
    own, found = torch.arange(len(images)), {}
    for way, queries, wanted, answers, given in (
        ("text", images, own, texts, owner), ("image", texts, owner, images, own)
    ):  # fmt: skip
        right = torch.cat([
            given[(block @ answers.T).topk(min(10, len(answers))).indices] == mine[:, None]
            for block, mine in zip(queries.split(256), wanted.split(256), strict=True)
        ])                                                                     # (Q, 10)
        found |= {f"{way}_retrieval_recall@{k}": right[:, :k].any(dim=1)
                  for k in (1, 5, 10) if k < len(answers)}  # fmt: skip
    return found


def aupr(known: Tensor, foreign: Tensor) -> float:
    """Average precision of low confidence as a sign of foreign pictures. Logits (M, C) twice."""
    from sklearn.metrics import average_precision_score

    sure = torch.cat([logits.softmax(dim=1).amax(dim=1) for logits in (known, foreign)])
    return float(average_precision_score(torch.arange(len(sure)) >= len(known), -sure))
