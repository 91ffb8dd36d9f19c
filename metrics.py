"""CLIP_benchmark's metrics, by its names: of scores and labels, or of image and text features.

What is a share of right answers comes as the answers, so that two models can be compared on each.
"""

import numpy as np
import torch
from torch import Tensor


def named(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """acc1, acc5: whether each picture's class is found. (M, C), (M,) -> (M,) each."""
    hits = {"acc1": scores.argmax(dim=1) == labels}
    if scores.shape[1] >= 5:
        hits["acc5"] = (scores.topk(5).indices == labels[:, None]).any(dim=1)
    return hits


def shares(hits: dict[str, Tensor]) -> dict[str, float]:
    """How many of each metric's answers are right."""
    return {metric: right.double().mean().item() for metric, right in hits.items()}


def classification(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """acc1, acc5, mean_per_class_recall; of two classes roc_auc. (M, C), (M,)."""
    hits = named(scores, labels)
    result, right = shares(hits), hits["acc1"]
    if "acc5" in hits:
        result["mean_of_acc1_acc5"] = (result["acc1"] + result["acc5"]) / 2
    counts, hits = labels.bincount(), labels.bincount(weights=right.double())
    result["mean_per_class_recall"] = (hits / counts)[counts > 0].mean().item()
    if scores.shape[1] == 2 and len(labels.unique()) == 2:
        from sklearn.metrics import roc_auc_score

        result["roc_auc"] = float(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    return result


def multilabel(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """mean_average_precision over the classes; 0 for one without a picture. (M, C) twice."""
    from sklearn.metrics import average_precision_score

    each = [average_precision_score(y, s) if y.any() else 0.0
            for y, s in zip(labels.T.numpy(), scores.T.numpy(), strict=True)]  # fmt: skip
    return {"mean_average_precision": float(np.mean(each))}


def retrieved(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """R@1/5/10 both ways: whether one right answer is among k. (M, E), (T, E), owner (T,) < M.

    Without k that is no less than the number of candidates, for all would be right.
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
    """Average precision of finding foreign pictures by their low confidence. Logits (M, C) twice.
    """
    from sklearn.metrics import average_precision_score

    sure = torch.cat([logits.softmax(dim=1).amax(dim=1) for logits in (known, foreign)])
    return float(average_precision_score(torch.arange(len(sure)) >= len(known), -sure))
