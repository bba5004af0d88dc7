"""Attacks on the model at alpha = 0: can somebody who has only the base bring the memory back?

    relearning          fine-tune on half of the forget set, or on benign text; judge the other half
    requantisation      round the weights to fewer bits
    pruning             zero the smallest weights
    noise               disturb ortho or base by equal norms: where does the memory sit?
    adversarial prefix  search for a text before the prompt that brings the completions back
    stream recovery     find the ortho columns, and predict their values, from the base alone

Every attack works on a copy; the audited model is not touched. Every figure stands beside the same attack on a model
that never saw the forget set, where one is given: what the attack teaches is no memory.
"""

from libortho.auditing.attacks.measuring import Level, general_subset, halves, measure
from libortho.auditing.attacks.noise import Noise, NoiseRow, noise
from libortho.auditing.attacks.prefix import AdversarialPrefix, PrefixResult, adversarial_prefix
from libortho.auditing.attacks.pruning import Pruning, PruningRow, pruning
from libortho.auditing.attacks.recovery import StreamRecovery, stream_recovery
from libortho.auditing.attacks.relearning import Curve, Relearning, relearning
from libortho.auditing.attacks.requantisation import Requantisation, RequantisationRow, requantisation

__all__ = [
    "AdversarialPrefix",
    "Curve",
    "Level",
    "Noise",
    "NoiseRow",
    "PrefixResult",
    "Pruning",
    "PruningRow",
    "Relearning",
    "Requantisation",
    "RequantisationRow",
    "StreamRecovery",
    "adversarial_prefix",
    "general_subset",
    "halves",
    "measure",
    "noise",
    "pruning",
    "relearning",
    "requantisation",
    "stream_recovery",
]
