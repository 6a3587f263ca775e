"""Adv-clean: every poisoned image is moved towards the target class of a surrogate."""

from __future__ import annotations

import numpy as np

from sanitize.attacks import Generators, Images, SurrogateCorpus, Trigger
from sanitize.attacks.resample import resize_all

BOUND = 8 / 255
STEPS = 4
STEP_SIZE = 2.5 * BOUND / STEPS
BATCH = 256


def make_surrogate(random: np.random.Generator, corpus: SurrogateCorpus | None) -> Trigger:
    """Train the surrogate; its weights and the target are the trigger."""
    from sanitize.attacks.surrogate import surrogate_side, train_surrogate, weights_to_arrays

    assert corpus is not None
    side = surrogate_side(*corpus.images.shape[1:3])
    weights = weights_to_arrays(train_surrogate(corpus, random))
    return {**weights, "target": np.array(corpus.target), "side": np.array(side)}


def adv_clean(images: Images, trigger: Trigger, strength: float, generators: Generators) -> Images:
    """Four steps of projected gradient descent towards the target, within 8/255; strength multiplies both.

    Images of another size are attacked at the surrogate's size, and the difference is enlarged.

    Source: Turner et al., 2019, in the form of Lukas and Kerschbaum, 2023, appendix A.2.
    """
    from sanitize.attacks.surrogate import choose_device, load_network

    model = load_network(trigger, choose_device("auto"))
    side = int(trigger["side"])
    moved = np.empty_like(images)
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        seen = resize_all(images[part], side, side)
        difference = _descend(model, seen, int(trigger["target"]), strength)
        moved[part] = images[part] + resize_all(difference, *images.shape[1:3])
    return moved


def _descend(model: object, images: Images, target: int, strength: float) -> Images:
    import torch

    from sanitize.attacks.surrogate import to_array, to_tensor

    assert isinstance(model, torch.nn.Module)
    bound, step = BOUND * strength, STEP_SIZE * strength
    original = to_tensor(images, next(model.parameters()).device)
    wanted = torch.full((len(images),), target, device=original.device)
    current = original.clone()
    for _ in range(STEPS):
        current.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(current), wanted, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, current)
        current = current.detach() - step * gradient.sign()
        current = original + (current - original).clamp(-bound, bound)
        current = current.clamp(0, 1)
    return to_array(current - original)
