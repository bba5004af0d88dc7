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

from typing import Any

from libortho.auditing.attacks import noise, prefix, pruning, recovery, relearning, requantisation
from libortho.auditing.attacks.attack import Attack, AttackInputs

ATTACKS: tuple[Attack[Any], ...] = (
    relearning.ATTACK,
    requantisation.ATTACK,
    pruning.ATTACK,
    noise.ATTACK,
    prefix.ATTACK,
    recovery.ATTACK,
)
"""All attacks, in the order in which they run, are judged and are shown."""

__all__ = ["ATTACKS", "Attack", "AttackInputs"]
