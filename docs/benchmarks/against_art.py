"""Activation clustering and spectral signatures against the Adversarial Robustness Toolbox, same activations.

python docs/benchmarks/against_art.py [RUN]     needs: pip install -c constraints.txt -e '.[benchmark]'

Without a run folder: 3,000 planted activations of three classes, with 50 poisons in one of them.
"""

import sys
from pathlib import Path

import numpy as np
from art.defences.detector.poison import SpectralSignatureDefense
from art.defences.detector.poison.activation_defence import reduce_dimensionality
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score, silhouette_score

from sanitize.pipeline import score_inputs
from sanitize.rundir import RunDir
from sanitize.scores.activation_clustering import cluster_scores, reduce
from sanitize.scores.spectral_signatures import squared_projections


def planted():
    rng = np.random.default_rng(0)
    activations = rng.normal(0, 1, (3_000, 64)).astype(np.float32)
    class_id = (np.arange(3_000) % 3).astype(np.int32)
    activations += 3 * rng.normal(0, 1, (3, 64)).astype(np.float32)[class_id]
    poison = (class_id == 1) & (np.arange(3_000) >= 2_850)
    activations[poison] += 0.9
    return activations, class_id, poison


def of_run(path):
    with RunDir.open(path) as run:
        inputs, _, _ = score_inputs(run, 0)
        return inputs.activations(), inputs.class_id, None


def art_spectral(activations):
    """ART's score of one class. It takes the singular vector of centred activations and projects the ones it
    was given; the paper's algorithm projects centred ones, so both are compared."""
    score = SpectralSignatureDefense.spectral_signature_scores
    return score(activations).ravel(), score(activations - activations.mean(axis=0)).ravel()


def art_clusters(activations):
    """ART's reduction and 2-means of one class, without its classifier wrapper."""
    reduced = reduce_dimensionality(activations, nb_dims=10, reduce="FastICA")
    return KMeans(2, n_init=10, random_state=0).fit_predict(reduced), reduced


HEAD = "| class | n | Spearman, ART as it is | Spearman, ART on centred activations | top 15 % in common "
HEAD += "| clusters: adjusted Rand | silhouette, ours | silhouette, ART |\n" + "|---" * 8 + "|"


def main():
    activations, class_id, poison = of_run(Path(sys.argv[1])) if len(sys.argv) > 1 else planted()
    spectral = squared_projections(activations, class_id)
    clusters = cluster_scores(activations, class_id, seed=0)
    as_it_is, smaller = np.zeros(len(activations)), np.zeros(len(activations))
    print(HEAD)
    for own in np.unique(class_id):
        rows = np.flatnonzero(class_id == own)
        raw, centred = art_spectral(activations[rows])
        labels, reduced = art_clusters(activations[rows])
        as_it_is[rows], smaller[rows] = raw, labels == np.bincount(labels, minlength=2).argmin()
        count = round(0.15 * len(rows))
        common = set(np.argsort(-centred)[:count]) & set(np.argsort(-spectral[rows])[:count])
        mine = clusters[rows] > -0.5
        figures = [
            spearmanr(raw, spectral[rows])[0],
            spearmanr(centred, spectral[rows])[0],
            len(common) / count,
            adjusted_rand_score(labels, mine),
            silhouette_score(reduce(activations[rows], 0), mine),
            silhouette_score(reduced, labels),
        ]
        print(f"| {own} | {len(rows)} |", " | ".join(f"{figure:.3f}" for figure in figures), "|")
    if poison is not None:
        inside = class_id == class_id[poison][0]
        ours, theirs = (roc_auc_score(poison[inside], s[inside]) for s in (spectral, as_it_is))
        print(f"AUROC of spectral signatures: ours {ours:.3f}, ART {theirs:.3f}")
        ours, theirs = (clusters[poison] > -0.5).mean(), smaller[poison].mean()
        print(f"poison in the smaller cluster: ours {ours:.3f}, ART {theirs:.3f}")


if __name__ == "__main__":
    main()
