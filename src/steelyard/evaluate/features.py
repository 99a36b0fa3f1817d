"""Do the features of chosen and rejected responses lie apart? Figures of overlap, and a picture (t-SNE).

Secrets of RLHF II (arXiv 2401.06080) shows t-SNE plots of the features f(x, y_c) and f(x, y_r) and reads from them that
contrastive learning pulls the two apart. A picture has no interval, and t-SNE draws clusters where there are none; so
three figures stand beside it, on the features themselves and on their differences f(x, y_c) - f(x, y_r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from steelyard.config import Config, Device
from steelyard.data.collate import collate, pack
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.data.split import prompt_key, ranks
from steelyard.errors import InputError
from steelyard.evaluate.examination import training_length
from steelyard.evaluate.reward import bootstrap_mean
from steelyard.evaluate.units import Units, units_of
from steelyard.models.reward import RewardModel

MEASURES = ("silhouette_cosine", "silhouette_euclidean", "probe_auroc")
CLOUDS = ("pairs", "differences")

Overlap = dict[str, dict[str, Float[np.ndarray, "N"]]]
"""cloud -> measure -> one number per pair, whose mean is the figure."""


class FeatureOptions(Config):
    """What is measured and drawn of a reward model's features."""

    limit: int = Field(1000, ge=4, description="measure on the first usable pairs only")
    drawn: int = Field(300, ge=4, le=1000, description="pairs in the t-SNE picture, spread over the measured ones")
    perplexity: float = Field(30.0, ge=1, description="of t-SNE; at most a third of the points are used")
    folds: int = Field(5, ge=2, description="of the linear probe, split by prompt")
    seed: int = Field(0, ge=0, description="of t-SNE and of the folds")


class FeatureConfig(FeatureOptions):
    """Overlap of the features of chosen and rejected responses, for several reward models."""

    models: dict[str, str] = Field(
        min_length=1, description="name and folder of each reward model: --models NAME FOLDER ..."
    )
    data: str = Field(description="preference file, with pairs that the models did not train on")
    max_length: int | None = Field(
        None, ge=8, description="tokens of prompt and one response together; none given: as each model was trained"
    )
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(4096, ge=16, description="tokens computed at once (memory, not results)")
    device: Device = "cpu"


class Features(NamedTuple):
    """Features of N pairs, chosen first, and the prompt of each."""

    features_N2D: Float[np.ndarray, "N 2 D"]
    prompts: list[str]


def examine_features(name: str, config: FeatureConfig) -> dict[str, Any]:
    """One model's entry in examine/features.json: figures with intervals, and its picture."""
    folder = config.models[name]
    length = training_length(folder, config.max_length)
    encoder = Encoder.load(folder, max_length=length, on_overlong=config.on_overlong)
    pairs = load_preferences(config.data, on_invalid=config.on_invalid).preferences
    encoded = encoder.encode(pairs)
    trees = encoded.trees[: config.limit]
    shown = [pairs[i] for i in encoded.index[: config.limit]]
    prompts = [prompt_key(p.prompt) for p in shown]
    require_enough(prompts, config.data)
    model = RewardModel.load(folder, device=config.device)
    found = Features(read_features(model, trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens), prompts)
    return {"name": name, **describe(found, config, units_of(shown))}


def require_enough(prompts: Sequence[str], file: str) -> None:
    """Raise InputError unless the pairs can be split by prompt and drawn."""
    if len(prompts) < 4 or len(set(prompts)) < 2:
        raise InputError(
            f"{file}: needs at least 4 usable pairs with 2 different prompts, has {len(prompts)} with "
            f"{len(set(prompts))}; give a larger file"
        )


@torch.no_grad()
def read_features(
    model: RewardModel, trees: Sequence[Tree], *, pad_id: int, max_tokens: int = 8192
) -> Float[np.ndarray, "N K D"]:
    """f(x, y): the last layer at each response's scored token, in evaluation mode (no dropout), in the trees' order."""
    training = model.training
    model.eval()
    found = np.zeros((len(trees), len(trees[0].responses), model.head.in_features), dtype=np.float32)
    for group in pack([len(t) for t in trees], max_tokens):
        found[group] = model.features(collate([trees[i] for i in group], pad_id, model.device)).cpu().numpy()
    model.train(training)
    return found


def describe(found: Features, options: FeatureOptions, units: Units) -> dict[str, Any]:
    """The figures with 95 % intervals over units (prompts, or what `units_of` has), and t-SNE coordinates."""
    values = overlap(*found, folds=options.folds, seed=options.seed)
    rows = []
    for cloud in CLOUDS:
        for measure in MEASURES:
            value, low, high = bootstrap_mean(values[cloud][measure], clusters=units, seed=options.seed)
            rows.append({"features": cloud, "measure": measure, "value": value, "low": low, "high": high})
    return {
        "pairs": len(found.prompts),
        "prompts": len(set(found.prompts)),
        "unit": units.name,
        "width": found.features_N2D.shape[2],
        "rows": rows,
        "tsne": picture(found.features_N2D, options),
    }


def overlap(
    features_N2D: Float[np.ndarray, "N 2 D"], prompts: Sequence[str], *, folds: int = 5, seed: int = 0
) -> Overlap:
    """How far two clouds lie apart, for {f_c}, {f_r} ("pairs") and for {f_c - f_r}, {f_r - f_c} ("differences").

    silhouette_cosine, silhouette_euclidean: (b - a) / max(a, b) with a the mean distance of a point to its own cloud
    and b that to the other one (Rousseeuw 1987); 1 far apart, 0 the same place. The mean of the pair's two points.

    probe_auroc: how well a linear probe that never saw the prompt tells a chosen feature from a rejected one; 1/2 is
    chance. The probe is a discriminant with Ledoit-Wolf shrinkage, which leaves nothing to tune. Each pair's number is
    its two structural components less the fold's AUROC (DeLong 1988): they have the AUROC as their mean and its
    sampling error as their spread, so that they can be resampled. AUROCs are taken within folds, for scores of two
    probes do not compare.

    Args:
        features_N2D: chosen first.
        prompts: of the N pairs; those of one prompt are in one fold.

    Raises:
        ValueError: there are fewer than 2 prompts, or not one for each pair.
    """
    if len(prompts) != len(features_N2D) or len(set(prompts)) < 2:
        raise ValueError(
            f"one prompt for each of the {len(features_N2D)} pairs and at least two different ones are needed, got "
            f"{len(prompts)} with {len(set(prompts))} different"
        )
    f = features_N2D.astype(np.float64)
    d = f[:, 0] - f[:, 1]
    clouds = {"pairs": (f[:, 0], f[:, 1]), "differences": (d, -d)}
    return {
        name: {
            "silhouette_cosine": _silhouette(*two, "cosine"),
            "silhouette_euclidean": _silhouette(*two, "euclidean"),
            "probe_auroc": _probe(*two, prompts, folds, seed),
        }
        for name, two in clouds.items()
    }


Cloud = Float[np.ndarray, "N D"]


def _silhouette(first: Cloud, second: Cloud, metric: Literal["cosine", "euclidean"]) -> Float[np.ndarray, "N"]:
    from sklearn.metrics import silhouette_samples

    points = np.concatenate([first, second])
    if metric == "euclidean":
        points = points - points.mean(0)  # Else the distances of features with a large common part lose their digits.
    return silhouette_samples(points, np.repeat([0, 1], len(first)), metric=metric).reshape(2, -1).mean(0)


def _probe(first: Cloud, second: Cloud, prompts: Sequence[str], folds: int, seed: int) -> Float[np.ndarray, "N"]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import GroupKFold

    groups = ranks(prompts)
    n = int(groups.max()) + 1
    values = np.zeros(len(first))
    for train, test in GroupKFold(min(folds, n), shuffle=True, random_state=seed).split(first, groups=groups):
        probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        probe.fit(np.concatenate([first[train], second[train]]), np.repeat([1, 0], len(train)))
        score: Callable[[Cloud], Float[np.ndarray, "n"]] = probe.decision_function
        values[test] = components(score(first[test]), score(second[test]))
    return values


def components(first_N: Float[np.ndarray, "N"], second_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """One number a pair whose mean is the AUROC of `first` above `second`, a tie counting half (DeLong et al. 1988)."""
    above = (np.sign(first_N[:, None] - second_N[None, :]) + 1) / 2
    return above.mean(1) + above.mean(0) - above.mean()


def picture(features_N2D: Float[np.ndarray, "N 2 D"], options: FeatureOptions) -> dict[str, Any]:
    """2-D t-SNE of chosen and rejected features together (van der Maaten and Hinton 2008), started from their PCA."""
    from sklearn.manifold import TSNE

    shown = features_N2D[:: -(-len(features_N2D) // options.drawn)].astype(np.float64)
    points = np.concatenate([shown[:, 0], shown[:, 1]])
    perplexity = min(options.perplexity, (len(points) - 1) / 3)
    drawn = TSNE(perplexity=perplexity, init="pca", random_state=options.seed, n_jobs=1).fit_transform(points)
    chosen, rejected = np.round(drawn.astype(np.float64), 2).reshape(2, -1, 2).tolist()
    return {"perplexity": perplexity, "chosen": chosen, "rejected": rejected}
