"""Matryoshka transcoders in plain PyTorch: configuration, capture, training, evaluation, analysis, report.

Nothing in this package imports Ray; `cluster/` runs these parts on a cluster.
"""
