"""Renders one VideoJob: torchrun ranks that each hold a share of the model's layers.

The data's way: ``__main__`` -> ``topology`` -> ``schedule`` -> ``pipeline`` (``blocks``, ``link``, ``wan``) ->
``publisher`` (``decoder``, ``segments``, ``store``) -> ``report``. Knows nothing of Kubernetes.
"""
