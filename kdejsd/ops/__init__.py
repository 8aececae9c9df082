"""Holds the ops: torch operators over the compiled kernels, with checks, autograd and fake implementations."""
