"""The CPU executor: kernels, weights in panels, and the lowering of a program to instructions."""
