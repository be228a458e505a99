"""NVIDIA GPUs, through numba-cuda. Rooms: `device` (the one door to numba.cuda, and what kernels are made of), `arrays`
(device arrays in and out, streams), `scores` (kernels of given scores), `driver` (calls with device arrays)."""
