"""The decoder on a torch device: dense weights, kv and a cache of experts in its memory.

Imported only where a device is asked for, or found: the CPU path never imports torch.
"""
