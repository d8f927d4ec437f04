"""Sweeps over training: named ablations as data, Ray Tune around `pipelines`."""
