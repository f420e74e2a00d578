"""Accuracy of PruMerge and of simpler ways to spend the same number of visual tokens.

    prumerge-fast evaluate --count 2000 --output results.json

puts all policies on the demo scenes or on a question file with answers,
with bootstrap intervals. `policies` says what is compared, `metrics` how it is scored.
"""
