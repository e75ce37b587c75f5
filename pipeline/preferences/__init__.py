"""Pairs of sampled answers, and who says which one is better: simulated annotators, a judge, or people."""
