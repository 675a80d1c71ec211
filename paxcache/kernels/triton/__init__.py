"""The ops for NVIDIA GPUs from Ampere on, in Triton."""
