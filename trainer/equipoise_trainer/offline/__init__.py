"""The paper's offline search: a policy γ[T, N] moved by the adjoint of whole training runs (arXiv 2402.17759, Eq. 6).

Shape legend: N examples, T training steps = rows of the policy, M examples of target A, P parameters, k rows of a
segment. Weights are served weights, N·γ, with mean 1 over a row; losses are in nats.
"""
