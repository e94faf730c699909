"""The annealing law's clock.

With a schedule of rates r_i the loss falls as L = L0 + A S1^-a - C S2, where S1 is the sum of the rates so far and S2 the
annealed area (Tissue et al. 2024, arXiv 2408.11029, section 3; the multi-power form of Luo et al. 2025, arXiv 2503.12811,
bends S2). From one state, on the same batches, all rates share L0, A and a: what a small rate does, a larger one does
sooner, until it does harm.

Trials are measured at a running average of their weights, which to first order are the weights of a run whose rates fall:
an average with weights w_j over steps j equals steps at r_i times sum(w_j for j >= i). So a high rate's noise, which S2 takes
away in the end, does not speak against it, and S1 is the mean of those sums.
"""

from trainkit.autolrs._average import POWER

# Mean of the tail sums 1 - u^(POWER + 1) of the averaging weights: a trial's averaged weights lag by a fifth.
AVERAGED = 1.0 - 1.0 / (POWER + 2.0)
