"""Other people's tools served by these kernels, one module per tool: ``mergekernels.integrations.<tool>``.

Every module has the same shape: ``enable(**options)``, ``disable()``, the context manager ``enabled(**options)``,
``stats()`` and ``reset_stats()``. A tool is imported only when its module is asked to enable itself. A call that these
kernels cannot serve goes to the tool's own code and is counted with the reason.
"""
