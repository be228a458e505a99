"""Compiled modules: `cpu`, and the kernels for each float type (f32, f64) and level (v2, v3, v4, or base)."""
