"""The GPU path: torch, Triton and bitsandbytes. Nothing on the CPU path imports it."""
