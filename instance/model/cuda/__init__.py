"""The engine on CUDA: kernels, graphs, sampling and memory.

Triton's kernels run on the CPU too, under its interpreter (``TRITON_INTERPRET=1``), which is
how they are tested where there is no GPU. Nothing here is imported before a model is to run
on a GPU.
"""
