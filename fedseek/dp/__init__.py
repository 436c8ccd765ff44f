"""Differential privacy at a site: accounting, sampling, noise, the private step, and the guards that watch them."""
