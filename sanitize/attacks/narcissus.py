"""Narcissus: one learned perturbation that makes a surrogate surer of the target class."""

from __future__ import annotations

import numpy as np

from sanitize.attacks import Generators, Images, SurrogateCorpus, Trigger
from sanitize.attacks.resample import resize
from sanitize.errors import UsageError

BOUND = 16 / 255
STEPS = 300
BATCH = 128


def make_perturbation(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """Train a surrogate, then find the perturbation within 16/255 that lowers its loss on the target class.

    Returns:
        ``perturbation``: (R, R, 3) float32.

    Raises:
        UsageError: no sample of the target class.
    """
    import torch

    from sanitize.attacks.surrogate import square, to_array, to_tensor, train_surrogate

    assert corpus is not None
    members = corpus.images[corpus.labels == corpus.target]
    if not len(members):
        raise UsageError(f"narcissus: no sample of target class {corpus.target} to learn its trigger from")
    model = train_surrogate(corpus, random)
    device = next(model.parameters()).device
    pixels = to_tensor(square(members), device)
    target = torch.tensor(corpus.target, device=device)
    perturbation = torch.zeros_like(pixels[:1], requires_grad=True)
    optimizer = torch.optim.RAdam([perturbation], lr=0.01)
    for _ in range(STEPS):
        chosen = random.integers(len(pixels), size=min(BATCH, len(pixels)))
        images = (pixels[torch.as_tensor(chosen, device=device)] + perturbation).clamp(0, 1)
        loss = torch.nn.functional.cross_entropy(model(images), target.expand(len(images)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            perturbation.clamp_(-BOUND, BOUND)
    return {"perturbation": to_array(perturbation)[0]}


def narcissus(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Add the perturbation of make_perturbation, enlarged to the image; strength multiplies it.

    Source: Zeng et al., 2022; test strengths as there.
    """
    return images + np.float32(strength) * resize(trigger["perturbation"], *images.shape[1:3])
