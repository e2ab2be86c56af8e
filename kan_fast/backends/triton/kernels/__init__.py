"""The kernels and the mathematics that they share; importing it imports Triton."""
