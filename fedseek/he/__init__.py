"""Homomorphic encryption: parameters with a proven noise bound, packing, ciphertexts, the sites' secret key."""
