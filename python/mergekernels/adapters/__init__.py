"""LoRA adapters: what one is in memory, how several are aligned, merged, extracted and applied.

Bytes are in `formats.adapters`, tensor functions in `ops.spectral`, methods in `_methods`.
"""
